"""The resync: complete listings that repair the store, wake every object and test the watches."""

import asyncio
import logging

from headrace_operator.cluster.api import Api, Listing, Object
from headrace_operator.cluster.execute import Executor
from headrace_operator.cluster.kinds import MODEL_DEPLOYMENT, VOLUME, WATCHED, Kind
from headrace_operator.cluster.store import Key, Store
from headrace_operator.errors import ApiError, Forbidden, KindNotServed
from headrace_operator.health import Health
from headrace_operator.metrics import WATCH_LAG
from headrace_operator.plan import Deletion
from headrace_operator.plan.names import (
    MANAGED_BY,
    MANAGED_BY_LABEL,
    NAMESPACE_LABEL,
    OWNER_LABEL,
)
from headrace_operator.plan.objects import at, name_of, text, uid_of
from headrace_operator.plan.volume import is_orphan
from headrace_operator.queue import WorkQueue

PERIOD_SECONDS = 30.0
CHILD_SELECTOR = OWNER_LABEL
_logger = logging.getLogger(__name__)


class Resync:
    """Lists everything every half a minute."""

    def __init__(
        self,
        api: Api,
        store: Store,
        queue: WorkQueue[Key],
        health: Health,
        namespaces: tuple[str, ...] = (),
    ) -> None:
        self._api = api
        self._store = store
        self._queue = queue
        self._health = health
        self._namespaces = namespaces
        self._executor = Executor(api, store)

    async def run(self) -> None:
        """Resync until cancelled."""
        while True:
            self._health.beat("resync")
            await asyncio.sleep(PERIOD_SECONDS)
            try:
                await self.cycle()
            except ApiError as error:
                _logger.warning("resync failed, trying again: %s", error)

    async def cycle(self) -> None:
        """List everything, test the watches, collect volumes. Raises ApiError."""
        await self.list_all()
        self._test_watches()
        await self._collect_volumes()

    async def list_all(self) -> None:
        """List all kinds into the store and enqueue every ModelDeployment. Raises ApiError."""
        for kind in WATCHED:
            await self._list(kind)
        for key in self._store.resources():
            self._queue.add(key)

    async def _list(self, kind: Kind) -> None:
        selector = "" if kind is MODEL_DEPLOYMENT else CHILD_SELECTOR
        try:
            listings = [
                await self._api.list(kind, namespace, label_selector=selector)
                for namespace in self._namespaces or (None,)
            ]
        except KindNotServed:
            if kind is MODEL_DEPLOYMENT:
                raise
            return  # resource.k8s.io needs Kubernetes 1.34; without it there are none
        # Of several listings the earliest decides what is gone: the others saw more.
        listing = Listing(
            [body for one in listings for body in one.objects],
            min(one.resource_version for one in listings),
        )
        for key in self._store.replace(kind, listing):
            self._queue.add(key)

    def _test_watches(self) -> None:
        for kind in WATCHED:
            behind = self._store.is_behind(kind)
            WATCH_LAG.labels(kind.name).set(behind)
            problem = "the watch does not deliver what listings show" if behind else None
            self._health.report(f"watch of {kind.plural}", problem)

    async def _collect_volumes(self) -> None:
        """Delete the static volumes of ModelDeployments that are gone or changed their volume."""
        selector = f"{MANAGED_BY_LABEL}={MANAGED_BY}"
        if self._namespaces:
            selector += f",{NAMESPACE_LABEL} in ({','.join(self._namespaces)})"
        try:
            listing = await self._api.list(VOLUME, label_selector=selector)
        except Forbidden:
            return  # an operator of one namespace may go without cluster-wide permissions
        for volume in listing.objects:
            if is_orphan(volume, is_wanted=self._wants(volume)):
                deletion = Deletion(VOLUME.name, name_of(volume), None, uid_of(volume))
                try:
                    await self._executor.delete(deletion)
                except Forbidden:
                    return  # static volumes were switched off; what is left holds no data

    def _wants(self, volume: Object) -> bool:
        labels = at(volume, "metadata", "labels")
        key = Key(text(labels, NAMESPACE_LABEL), text(labels, OWNER_LABEL))
        return at(self._store.resource(key), "spec", "volume", "static") is not None
