"""Observation of one ModelDeployment: its children from the store, the rest by request."""

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
    EVENT,
    JOB,
    NODE,
    POD,
    SERVICE,
    VOLUME,
    Kind,
)
from headrace_operator.cluster.loaders import Loaders
from headrace_operator.cluster.store import Key, Store, key_of
from headrace_operator.errors import Forbidden, NotFound
from headrace_operator.plan import Observed, needs
from headrace_operator.plan.failures import stuck
from headrace_operator.plan.objects import controller_uid, mapping, text, uid_of
from headrace_operator.plan.serving import loader_addresses
from headrace_operator.plan.serving_pod import GPU_RESOURCE

_T = TypeVar("_T")
_CLUSTER_FACTS_SECONDS = 60.0
_MAX_EVENTS = 20


class Observer:
    """Collects what the plan of a ModelDeployment depends on."""

    def __init__(self, api: Api, store: Store) -> None:
        self._api = api
        self._store = store
        self._gpus_of_nodes = _Cached(self._list_gpus_of_nodes)
        self._loaders = Loaders()
        self._dra_served = _Cached(lambda: api.serves(CLAIM_TEMPLATE))

    async def observe(self, resource: Object, now: datetime) -> Observed:
        """Return the observed state. Raises ApiError."""
        wanted = needs(resource)
        key = key_of(resource)
        self._store.use_claims(key, (wanted.claim, wanted.source_claim))
        pods = tuple(self._store.children(POD, key))
        jobs = self._owned(JOB, resource)
        observed = Observed(
            claim=self._store.claim(Key(key.namespace, wanted.claim or "")),
            source_claim=self._store.claim(Key(key.namespace, wanted.source_claim or "")),
            volume=await self._volume(wanted.volume),
            jobs=jobs,
            deployment=next(iter(self._owned(DEPLOYMENT, resource)), None),
            service=next(iter(self._owned(SERVICE, resource)), None),
            claims=self._owned(CLAIM, resource),
            claim_templates=self._owned(CLAIM_TEMPLATE, resource),
            pods=pods,
            gpus_of_nodes=await self._gpus_of_nodes.get() if wanted.gpus_of_nodes else None,
            dra_served=await self._dra_served.get() if wanted.dra_served else None,
            warnings={
                uid_of(body): event
                for body in stuck(pods, jobs, now)
                if (event := await self._last_warning(body)) is not None
            },
        )
        if not wanted.loaded_paths:
            return observed
        told = await self._loaders.paths(loader_addresses(observed))
        return replace(observed, loaded_paths=told)

    def _owned(self, kind: Kind, resource: Object) -> tuple[Object, ...]:
        children = self._store.children(kind, key_of(resource))
        return tuple(child for child in children if controller_uid(child) == uid_of(resource))

    async def _volume(self, name: str | None) -> Object | None:
        if not name:
            return None
        try:
            return await self._api.get(VOLUME, name)
        except NotFound:
            return None

    async def _last_warning(self, body: Mapping[str, Any]) -> Object | None:
        listing = await self._api.list(
            EVENT,
            text(body, "metadata", "namespace"),
            field_selector=f"involvedObject.uid={uid_of(body)},type=Warning",
            limit=_MAX_EVENTS,
        )
        return max(listing.objects, key=_event_time, default=None)

    async def _list_gpus_of_nodes(self) -> frozenset[int] | None:
        try:
            nodes = (await self._api.list(NODE)).objects
        except Forbidden:
            # The rule is optional: an operator of one namespace may not see nodes.
            return None
        counts = (text(mapping(n, "status", "allocatable"), GPU_RESOURCE) for n in nodes)
        return frozenset(int(count) for count in counts if count.isdigit() and count != "0")


def _event_time(event: Object) -> str:
    return (
        text(event, "series", "lastObservedTime")
        or text(event, "lastTimestamp")
        or text(event, "eventTime")
        or text(event, "metadata", "creationTimestamp")
    )


class _Cached(Generic[_T]):
    """A fact about the cluster that changes rarely."""

    def __init__(self, fetch: Callable[[], Awaitable[_T]]) -> None:
        self._fetch = fetch
        self._value: _T | None = None
        self._expires = 0.0

    async def get(self) -> _T | None:
        if time.monotonic() >= self._expires:
            self._value = await self._fetch()
            self._expires = time.monotonic() + _CLUSTER_FACTS_SECONDS
        return self._value
