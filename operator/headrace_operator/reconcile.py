"""The reconciliation: observe -> plan -> write, by a few workers over a queue of keys."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from headrace_operator.cluster.api import Api, Object
from headrace_operator.cluster.execute import Executor
from headrace_operator.cluster.observe import Observer
from headrace_operator.cluster.store import Key, Store
from headrace_operator.coldstart import ColdStarts
from headrace_operator.errors import ApiError, Conflict, NamespaceTerminating
from headrace_operator.health import Health
from headrace_operator.metrics import (
    QUEUE_DEPTH,
    RECONCILE_ERRORS,
    RECONCILE_SECONDS,
    forget,
    report_status,
)
from headrace_operator.plan import Observed, Settings, plan
from headrace_operator.plan.objects import integer
from headrace_operator.queue import WorkQueue
from headrace_operator.usage import CheckpointJobs, Gpus

WORKERS = 4
_IDLE_SECONDS = 30.0
_logger = logging.getLogger(__name__)


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass
class Reconciler:
    """Brings ModelDeployments to what their specs say, one at a time per worker."""

    api: Api
    store: Store
    settings: Settings
    health: Health
    queue: WorkQueue[Key] = field(default_factory=WorkQueue)
    clock: Callable[[], datetime] = _utc_now

    def __post_init__(self) -> None:
        QUEUE_DEPTH.set_function(self.queue.__len__)
        self._observer = Observer(self.api, self.store, self.queue.add)
        self._executor = Executor(self.api, self.store)
        started = self.clock()
        self._cold_starts, self._jobs, self._gpus = (
            ColdStarts(started),
            CheckpointJobs(started),
            Gpus(),
        )

    async def work(self, worker: int) -> None:
        """Work on keys until the queue is shut down."""
        while True:
            self.health.beat(f"worker {worker}")
            try:
                # Not wait_for(): it makes tasks, and kopf cancels those it did not expect.
                async with asyncio.timeout(_IDLE_SECONDS):
                    key = await self.queue.get()
            except TimeoutError:
                continue
            if key is None:
                return
            await self._work_on(key)

    async def _work_on(self, key: Key) -> None:
        started = time.monotonic()
        try:
            again_after = await self.reconcile(key)
        except NamespaceTerminating:
            self.queue.done(key)
        except ApiError as error:
            delay = self.queue.failed(key, is_stale=isinstance(error, Conflict))
            RECONCILE_ERRORS.labels(error.reason).inc()
            context = {"object": key, "reason": error.reason, "seconds": delay}
            _logger.warning("not reconciled, trying again: %s", error, extra=context)
        except Exception:
            # A bug must not take the other objects down with it; it is loud and counted.
            self.queue.failed(key)
            RECONCILE_ERRORS.labels("InternalError").inc()
            _logger.exception("not reconciled, trying again", extra={"object": key})
        else:
            self.queue.done(key, again_after)
        finally:
            RECONCILE_SECONDS.observe(time.monotonic() - started)

    async def reconcile(self, key: Key) -> float | None:
        """Bring one ModelDeployment to what its spec says, as far as possible now.

        Returns the seconds after which it should be looked at without any event.
        Raises ApiError.
        """
        resource = self.store.resource(key)
        if resource is None:
            self.store.use_claims(key, ())
            self._gpus.forget(key)
            self._cold_starts.forget(key)
            forget(*key)
            return None
        now = self.clock()
        observed = await self._observer.observe(resource, now)
        planned = plan(resource, observed, self.settings, now)
        if planned.finalizer:
            resource = await self._executor.write_finalizer(resource, planned)
        rejections = await self._executor.write_children(resource, planned)
        if rejections:
            planned = plan(resource, replace(observed, rejections=rejections), self.settings, now)
        # Events go first: written after the status, a crash between the two would lose them.
        for transition in planned.transitions:
            await self._executor.report(resource, transition, now)
        if planned.status is not None:
            resource = await self._executor.write_status(resource, planned.status)
            replicas = integer(resource, "spec", "replicas")
            report_status(*key, replicas, planned.status["status"])
        if not planned.finalizer:
            await self._executor.write_finalizer(resource, planned)
        self._account(key, resource, observed, now)
        return planned.requeue_seconds

    def _account(self, key: Key, resource: Object, observed: Observed, now: datetime) -> None:
        self._cold_starts.note(key, observed.pods)
        self._gpus.note(key, resource, observed.pods, now)
        self._jobs.note(key, observed.jobs)
