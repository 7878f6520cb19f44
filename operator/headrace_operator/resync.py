"""The resync: complete listings that repair the store, wake every object and test the watches."""

import asyncio
import functools
import logging
import time

from headrace_operator.cluster.api import Api, Object
from headrace_operator.cluster.execute import Executor
from headrace_operator.cluster.informer import Informer
from headrace_operator.cluster.kinds import CLAIM, MODEL_DEPLOYMENT, VOLUME, WATCHED
from headrace_operator.cluster.store import Key, Store
from headrace_operator.errors import ApiError, Forbidden
from headrace_operator.health import Health
from headrace_operator.metrics import WATCH_LAG
from headrace_operator.plan import Deletion
from headrace_operator.plan.names import (
    MANAGED_BY,
    MANAGED_BY_LABEL,
    NAMESPACE_LABEL,
    OWNER_LABEL,
)
from headrace_operator.plan.objects import at, text
from headrace_operator.plan.volume import is_orphan
from headrace_operator.queue import WorkQueue

PERIOD_SECONDS = 30.0
MAX_PERIOD_SECONDS = 3600.0
# What resyncs may cost, in cores: with thousands of objects they become rarer instead.
_SHARE_OF_A_CORE = 0.01
_DRAIN_SECONDS = 0.5
CHILD_SELECTOR = OWNER_LABEL
_logger = logging.getLogger(__name__)


class Resync:
    """Lists everything every half a minute; more rarely where that would cost too much."""

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
        self.informers = tuple(
            Informer(
                api,
                store,
                kind,
                namespaces or (None,),
                # Claims of others have no label of ours.
                "" if kind in (MODEL_DEPLOYMENT, CLAIM) else CHILD_SELECTOR,
                queue.add,
                health.beat,
            )
            for kind in WATCHED
        )

    async def run(self) -> None:
        """Resync until cancelled."""
        period = PERIOD_SECONDS
        while True:
            await self._rest(period)
            before = time.process_time()
            try:
                await self.cycle()
            except ApiError as error:
                _logger.warning("resync failed, trying again: %s", error)
            while len(self._queue):
                await self._rest(_DRAIN_SECONDS)
            seconds = (time.process_time() - before) / _SHARE_OF_A_CORE
            period = min(max(PERIOD_SECONDS, seconds), MAX_PERIOD_SECONDS)

    async def _rest(self, seconds: float) -> None:
        while seconds > 0:
            self._health.beat("resync")
            await asyncio.sleep(min(seconds, PERIOD_SECONDS))
            seconds -= PERIOD_SECONDS

    async def cycle(self) -> None:
        """List everything, test the watches, collect volumes. Raises ApiError."""
        await self.list_all()
        self._test_watches()
        await self._collect_volumes()

    async def list_all(self) -> None:
        """List all kinds into the store and enqueue every ModelDeployment. Raises ApiError."""
        add = functools.partial(self._queue.add, background=True)
        for informer in self.informers:
            await informer.list(add)
        for key in self._store.resources():
            add(key)

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
                try:
                    await self._executor.delete(Deletion.of(volume))
                except Forbidden:
                    return  # static volumes were switched off; what is left holds no data

    def _wants(self, volume: Object) -> bool:
        labels = at(volume, "metadata", "labels")
        key = Key(text(labels, NAMESPACE_LABEL), text(labels, OWNER_LABEL))
        return at(self._store.resource(key), "spec", "volume", "static") is not None
