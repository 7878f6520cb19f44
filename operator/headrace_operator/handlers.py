"""kopf: the watch of ModelDeployments, the login, the liveness endpoint, signals.

The only module that imports kopf. The handler puts the name of a ModelDeployment into the
queue and does nothing else: no finalizers and no annotations on anyone's objects. The children
have informers (cluster/informer.py), which cost a fraction of a handler per event.
"""

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

import kopf

from headrace_operator.cluster.connection import Connection
from headrace_operator.cluster.kinds import MODEL_DEPLOYMENT
from headrace_operator.cluster.store import Key, Store
from headrace_operator.health import Health
from headrace_operator.queue import WorkQueue

_PREFIX = "headrace.dev"
_REQUEST_TIMEOUT_SECONDS = 30
_PAGE_SIZE = 500
# Below the 30 s that Kubernetes gives a pod to end.
_EXIT_SECONDS = 25


async def watch(
    connection: Connection,
    store: Store,
    queue: WorkQueue[Key],
    health: Health,
    *,
    namespaces: tuple[str, ...],
    liveness_port: int,
) -> None:
    """Watch until SIGTERM or SIGINT, or until a watch fails for good, which raises."""
    await kopf.operator(
        registry=_registry(connection, store, queue, health),
        settings=_settings(),
        standalone=True,
        liveness_endpoint=f"http://0.0.0.0:{liveness_port}/healthz",
        clusterwide=not namespaces,
        namespaces=namespaces,
    )


def _registry(
    connection: Connection, store: Store, queue: WorkQueue[Key], health: Health
) -> kopf.OperatorRegistry:
    registry = kopf.OperatorRegistry()
    kind = MODEL_DEPLOYMENT
    subscribe = kopf.on.event(
        kind.group, kind.version, kind.plural, id=f"observe-{kind.plural}", registry=registry
    )
    subscribe(_observer(store, queue))

    @kopf.on.login(registry=registry)
    async def log_in(**_: object) -> kopf.ConnectionInfo:
        return kopf.ConnectionInfo(**asdict(await connection.credentials()))

    @kopf.on.probe(registry=registry, id="problems")
    async def probe(**_: object) -> list[str]:
        problems = health.problems()
        if problems:
            # An ordinary exception would be tried again within the same request.
            raise kopf.PermanentError("; ".join(problems))
        return problems

    return registry


def _observer(store: Store, queue: WorkQueue[Key]) -> Callable[..., Awaitable[None]]:
    async def observe(event: kopf.RawEvent, **_: object) -> None:
        body: Any = event["object"]
        gone, listed = event["type"] == "DELETED", event["type"] is None
        for key in store.observe(MODEL_DEPLOYMENT, body, gone=gone, listed=listed):
            queue.add(key)

    return observe


class _NoDiffBase(kopf.AnnotationsDiffBaseStorage):
    """Keeps nothing to compare with: no handler looks at differences.

    The framework prepares for one at every event, with two deep copies of the object.
    """

    def build(self, **_: object) -> kopf.BodyEssence:
        return kopf.BodyEssence({})


def _settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.networking.request_timeout = _REQUEST_TIMEOUT_SECONDS
    settings.watching.chunk_size = _PAGE_SIZE
    # No handler keeps state, so neither is used; if one ever did, it would not be under
    # the framework's own name.
    settings.persistence.finalizer = f"{_PREFIX}/finalizer"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=_PREFIX)
    settings.persistence.diffbase_storage = _NoDiffBase(prefix=_PREFIX)
    settings.process.ultimate_exiting_timeout = _EXIT_SECONDS
    return settings
