"""The operator process: `headrace-operator`."""

import asyncio
import gc
import logging
import sys

from prometheus_client import start_http_server

from headrace_operator.cluster.connection import Connection, connect
from headrace_operator.cluster.kinds import MODEL_DEPLOYMENT, WATCHED
from headrace_operator.cluster.store import Store
from headrace_operator.errors import KindNotServed, OperatorError
from headrace_operator.handlers import watch
from headrace_operator.health import Health
from headrace_operator.logs import set_up_logging
from headrace_operator.plan import Settings
from headrace_operator.reconcile import WORKERS, Reconciler
from headrace_operator.resync import Resync
from headrace_operator.settings import ProcessSettings

EXIT_FAILURE = 1
EXIT_USAGE = 64
_DRAIN_SECONDS = 15.0
_logger = logging.getLogger("headrace_operator")


def main() -> int:
    """Run the operator until a signal stops it; the exit status is 0 then."""
    set_up_logging()
    # Hundreds of thousands of objects are of imports and stay: a listing, which makes many, would
    # have them all looked at dozens of times, for two thirds of its time.
    gc.freeze()
    try:
        settings = ProcessSettings.from_environment()
    except OperatorError as error:
        _logger.error("%s", error)  # noqa: TRY400  # the message says it all
        return EXIT_USAGE
    try:
        asyncio.run(_run(settings))
    except KindNotServed:
        _logger.error("the API server serves no ModelDeployments; apply the CRD")  # noqa: TRY400
        return EXIT_FAILURE
    except OperatorError as error:
        _logger.error("%s", error)  # noqa: TRY400
        return EXIT_FAILURE
    return 0


async def _run(settings: ProcessSettings) -> None:
    async with connect() as connection:
        await _serve(settings, connection)
    _logger.info("stopped")


async def _serve(settings: ProcessSettings, connection: Connection) -> None:
    store, health = Store(WATCHED), Health()
    planning = Settings(settings.loader_image, settings.static_volumes, settings.allowed_pod_fields)
    reconciler = Reconciler(connection.api, store, planning, health)
    queue = reconciler.queue
    resync = Resync(connection.api, store, queue, health, settings.namespaces)
    # Before any work: a child that has not been seen yet would look like a missing one.
    await resync.list_all()
    _serve_metrics(settings.metrics_port)
    workers = [asyncio.create_task(reconciler.work(n), name=f"worker {n}") for n in range(WORKERS)]
    resyncing = asyncio.create_task(resync.run(), name="resync")
    watching = asyncio.create_task(
        watch(
            connection,
            store,
            queue,
            health,
            namespaces=settings.namespaces,
            liveness_port=settings.liveness_port,
        ),
        name="watch",
    )
    _logger.info("serving %s", ", ".join(settings.namespaces) or "all namespaces")
    informing = [
        asyncio.create_task(informer.run(namespace), name=f"informer {informer.kind.plural}")
        for informer in resync.informers
        for namespace in informer.namespaces
        if informer.kind is not MODEL_DEPLOYMENT
    ]
    endless = [resyncing, *informing]
    tasks = [watching, *endless, *workers]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        queue.shut_down()
        for task in endless:
            task.cancel()
        _, running = await asyncio.wait(tasks, timeout=_DRAIN_SECONDS)
        for task in running:
            task.cancel()
    for task in ended:
        task.result()


def _serve_metrics(port: int) -> None:
    try:
        start_http_server(port)
    except OSError as error:
        raise OperatorError(
            f"HEADRACE_METRICS_PORT: {port}: {error.strerror}; choose a free port"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
