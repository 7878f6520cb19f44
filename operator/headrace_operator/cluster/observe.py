"""Observation of one ModelDeployment: its children from the store, the rest by request."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, Generic, TypeVar

from headrace_operator.cluster.api import Api, Object
from headrace_operator.cluster.kinds import (
    CLAIM,
    CLAIM_TEMPLATE,
    DEPLOYMENT,
    DEVICE_CLASS,
    DISRUPTION_BUDGET,
    EVENT,
    GROUP_SET,
    JOB,
    NODE,
    POD,
    REPLICA_SET,
    REVISION,
    SERVICE,
    STORAGE_CLASS,
    VOLUME,
    Kind,
)
from headrace_operator.cluster.loaders import Loaders
from headrace_operator.cluster.store import Key, Store, key_of
from headrace_operator.errors import Forbidden, KindNotServed, NotFound
from headrace_operator.plan import Needs, Observed, needs, path_in_use, wants_history
from headrace_operator.plan.failures import stuck, stuck_claims
from headrace_operator.plan.fsx import DRIVER
from headrace_operator.plan.names import COMPONENT_LABEL, OWNER_LABEL, RECLAIM
from headrace_operator.plan.objects import (
    at,
    controller_uid,
    is_deleting,
    mapping,
    name_of,
    text,
    uid_of,
)
from headrace_operator.plan.rollout import is_group_set
from headrace_operator.plan.serving import loader_addresses
from headrace_operator.plan.serving_pod import GPU_RESOURCE

_T = TypeVar("_T")
_CLUSTER_FACTS_SECONDS = 60.0
_MISSING_FACTS_SECONDS = 5.0
_MAX_EVENTS = 20
_SET_NAME_LABEL = "leaderworkerset.sigs.k8s.io/name"
_POLICY = "persistentVolumeReclaimPolicy"


class Observer:
    """Collects what the plan of a ModelDeployment depends on."""

    def __init__(
        self, api: Api, store: Store, notify: Callable[[Key], None] = lambda _: None
    ) -> None:
        """`notify` is told of whom there is more to observe than was returned."""
        self._api = api
        self._store = store
        self._notify = notify
        # By ModelDeployment, at a version: reading one takes a hundred times as long as looking.
        self._paths: dict[Key, tuple[int, str]] = {}
        self._gpus_of_nodes = _Cached(self._list_gpus_of_nodes)
        # That no volume is ill is the usual case, and asking lists all volumes of the cluster.
        self._volumes = _Cached(self._list_volumes, empty_seconds=_CLUSTER_FACTS_SECONDS)
        self._loaders = Loaders()
        self._dra_served = _Cached(lambda: api.serves(CLAIM_TEMPLATE))
        self._groups_served = _Cached(lambda: api.serves(GROUP_SET))
        self._device_classes = _Cached(self._list_device_classes)

    async def observe(self, resource: Object, now: datetime) -> Observed:
        """Return the observed state. Raises ApiError."""
        wanted = needs(resource)
        key = key_of(resource)
        self._store.use_claims(key, (wanted.claim, wanted.source_claim))
        pods = tuple(self._store.children(POD, key))
        jobs = (*self._owned(JOB, resource), *self._reclaiming(key))
        claim = self._store.claim(Key(key.namespace, wanted.claim or ""))
        storage_class, unreadable = await self._storage_class(wanted, claim)
        workloads = (*self._owned(DEPLOYMENT, resource), *self._owned(GROUP_SET, resource))
        observed = Observed(
            claim=claim,
            source_claim=self._store.claim(Key(key.namespace, wanted.source_claim or "")),
            volume=await self._volume_of(wanted, claim),
            storage_class=storage_class,
            jobs=jobs,
            deployment=next(iter(workloads), None),
            disruption_budget=next(iter(self._owned(DISRUPTION_BUDGET, resource)), None),
            service=next(iter(self._owned(SERVICE, resource)), None),
            claims=self._owned(CLAIM, resource),
            claim_templates=self._owned(CLAIM_TEMPLATE, resource),
            pods=pods,
            gpus_of_nodes=await self._gpus_of_nodes.get() if wanted.gpus_of_nodes else None,
            dra_served=await self._dra_served.get() if wanted.dra_served else None,
            unreadable=unreadable,
            device_classes=await self._device_classes.get() if wanted.device_classes else None,
            groups_served=await self._groups_served.get() if wanted.groups_served else None,
            paths_in_use=self._paths_of_others(key) if wanted.paths_in_use else frozenset(),
            warnings={
                uid_of(body): event
                for body in (*stuck(pods, jobs, now), *stuck_claims(claim, now))
                if (event := await self._last_warning(body)) is not None
            },
        )
        if wants_history(resource, observed, now):
            history = await self._history(mapping(observed.deployment))
            observed = replace(observed, history=history)
        if not wanted.loaded_paths:
            return observed
        told = await self._loaders.paths(loader_addresses(observed), lambda: self._notify(key))
        return replace(observed, loaded_paths=told)

    def _paths_of_others(self, key: Key) -> frozenset[str]:
        known, self._paths = self._paths, {}
        for other, version in self._store.versions().items():
            entry = known.get(other)
            if entry is None or entry[0] != version:
                entry = version, path_in_use(self._store.resource(other) or {})
            self._paths[other] = entry
        return frozenset(path for other, (_, path) in self._paths.items() if other != key and path)

    def _reclaiming(self, key: Key) -> tuple[Object, ...]:
        """Return the Jobs that delete checkpoints; they have no owner to be told by."""
        return tuple(
            job
            for job in self._store.children(JOB, key)
            if text(job, "metadata", "labels", COMPONENT_LABEL) == RECLAIM
            and not controller_uid(job)
        )

    def _owned(self, kind: Kind, resource: Object) -> tuple[Object, ...]:
        children = self._store.children(kind, key_of(resource))
        return tuple(child for child in children if controller_uid(child) == uid_of(resource))

    async def _get(self, kind: Kind, name: str | None) -> Object | None:
        if not name:
            return None
        try:
            return await self._api.get(kind, name)
        except NotFound:
            return None

    async def _storage_class(
        self, wanted: Needs, claim: Object | None
    ) -> tuple[Object | None, frozenset[str]]:
        """Return the StorageClass of a claim that is still to be made."""
        if claim is not None:
            return None, frozenset()
        try:
            return await self._get(STORAGE_CLASS, wanted.storage_class), frozenset()
        except Forbidden:
            return None, frozenset({STORAGE_CLASS.name})

    async def _volume_of(self, wanted: Needs, claim: Object | None) -> Object | None:
        """Return the claim's volume if there is something to tell of it, or the static one."""
        if text(claim, "status", "phase") == "Bound":
            volumes = await self._volumes.get()
            return mapping(volumes).get(text(claim, "spec", "volumeName"))
        try:
            return await self._get(VOLUME, wanted.volume)
        except Forbidden:
            return None  # making it is refused as well, and that is told

    async def _list_volumes(self) -> Mapping[str, Object]:
        """Return the volumes that are ill or provisioned for us: one request for everyone."""
        try:
            volumes = (await self._api.list(VOLUME)).objects
        except Forbidden:
            return {}
        return {name_of(v): _essence(v) for v in volumes if _is_worth_telling(v)}

    async def _last_warning(self, body: Mapping[str, Any]) -> Object | None:
        listing = await self._api.list(
            EVENT,
            text(body, "metadata", "namespace"),
            field_selector=f"involvedObject.uid={uid_of(body)},type=Warning",
            limit=_MAX_EVENTS,
        )
        return max(listing.objects, key=_event_time, default=None)

    async def _history(self, workload: Mapping[str, Any]) -> tuple[Object, ...]:
        """Return the earlier templates of a workload; not watched, as asked for so rarely."""
        kind, label = REPLICA_SET, OWNER_LABEL
        value = text(workload, "metadata", "labels", OWNER_LABEL)
        if is_group_set(workload):
            kind, label, value = REVISION, _SET_NAME_LABEL, name_of(workload)
        namespace = text(workload, "metadata", "namespace")
        listing = await self._api.list(kind, namespace, label_selector=f"{label}={value}")
        return tuple(o for o in listing.objects if controller_uid(o) == uid_of(workload))

    async def _list_device_classes(self) -> frozenset[str] | None:
        try:
            return frozenset(map(name_of, (await self._api.list(DEVICE_CLASS)).objects))
        except (Forbidden, KindNotServed):
            return None

    async def _list_gpus_of_nodes(self) -> frozenset[int] | None:
        try:
            nodes = (await self._api.list(NODE)).objects
        except Forbidden:
            # The rule is optional: an operator of one namespace may not see nodes.
            return None
        counts = (text(mapping(n, "status", "allocatable"), GPU_RESOURCE) for n in nodes)
        return frozenset(int(count) for count in counts if count.isdigit() and count != "0")


def _is_worth_telling(volume: Object) -> bool:
    is_ours = text(volume, "spec", "csi", "driver") == DRIVER
    return is_ours or is_deleting(volume) or text(volume, "status", "phase") == "Failed"


def _essence(volume: Object) -> Object:
    """Return the few fields that are looked at, as there may be tens of thousands of volumes."""
    metadata, spec = ("name", "labels", "deletionTimestamp"), ("claimRef", "csi", _POLICY)
    return {
        "metadata": {k: volume["metadata"].get(k) for k in metadata},
        "spec": {k: at(volume, "spec", k) for k in spec},
        "status": mapping(volume, "status"),
    }


def _event_time(event: Object) -> str:
    return (
        text(event, "series", "lastObservedTime")
        or text(event, "lastTimestamp")
        or text(event, "eventTime")
        or text(event, "metadata", "creationTimestamp")
    )


class _Cached(Generic[_T]):
    """A fact about the cluster that changes rarely, looked up again sooner where it is empty."""

    def __init__(
        self, fetch: Callable[[], Awaitable[_T]], *, empty_seconds: float = _MISSING_FACTS_SECONDS
    ) -> None:
        self._fetch = fetch
        self._empty_seconds = empty_seconds
        self._value: _T | None = None
        self._expires = 0.0
        self._fetching = asyncio.Lock()

    async def get(self) -> _T | None:
        async with self._fetching:
            if time.monotonic() >= self._expires:
                self._value = await self._fetch()
                # What is missing may be on its way: someone installs a driver or a CRD.
                kept = _CLUSTER_FACTS_SECONDS if self._value else self._empty_seconds
                self._expires = time.monotonic() + kept
        return self._value
