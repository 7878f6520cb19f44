"""The loader's main loop: load once, hold, hand over, until told to stop.

One thread, this one, changes the state. Signals and workers put news into its queue;
HTTP and handover threads only read the state. The supervisor holds descriptors, nothing
else of the weights: no mapping, no device context.
"""

import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from headrace_checkpoint import signals
from headrace_checkpoint.lease import holding
from headrace_checkpoint.report import log
from headrace_handover.channel import close_all
from headrace_handover.errors import HandoverError
from headrace_handover.messages import Ready
from headrace_handover.server import HandoverServer, Offer, prepare_directory
from headrace_loader import system
from headrace_loader.backends import PathPolicy, PathReport, protect
from headrace_loader.checkpoint import Checkpoint, check_ranks, load_manifest
from headrace_loader.engine_cache import EngineCache, EngineCacheOptions
from headrace_loader.errors import (
    PUBLISHED,
    BackendUnavailable,
    CheckpointMissing,
    InternalError,
    LoaderError,
    ManifestInvalid,
    RuntimeDirectoryUnusable,
    StorageError,
)
from headrace_loader.lease import Lease
from headrace_loader.loading import (
    Load,
    died,
    rank_states,
    ready_message,
    stalled,
    summary,
    tensors_of,
)
from headrace_loader.state import LoaderState, Phase, RankState, Settings
from headrace_loader.weight_source import ResidentWeights
from headrace_loader.worker_process import (
    WorkerEnded,
    WorkerEvent,
    WorkerNews,
    WorkerOptions,
    WorkerProcess,
)
from headrace_loader.worker_protocol import Failed, Filled, Mismatched, PathChosen, Progressed

HANDOVER_DIRECTORY = "handover"

_LEASE_POLL_SECONDS = 0.5
_FAREWELL_SECONDS = 0.3
_END_SECONDS = 10.0
_OPENING_SECONDS = 300.0
_STALLED_SECONDS = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line, typed."""

    checkpoint: Path
    tensor_parallel_size: int
    backend: str
    policy: PathPolicy
    runtime_directory: Path
    host: str
    port: int
    plugin_directory: Path | None
    read_threads: int
    engine_cache: EngineCacheOptions | None = None
    nodes: int = 1
    node_rank: int = 0

    @property
    def ranks(self) -> range:
        """The ranks to hold; each node of a replica has as many, in the order of the nodes."""
        count = self.tensor_parallel_size // self.nodes
        return range(self.node_rank * count, (self.node_rank + 1) * count)


@dataclass(frozen=True, slots=True)
class Stop:
    """News: a signal asked the loader to end."""

    signal: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """News: the checkpoint is read and held, or why it is not."""

    result: Checkpoint | LoaderError


News = WorkerNews | Prepared | Stop


class Supervisor:
    """Runs a loader; `run` returns when a signal asks it to stop."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._early: deque[News] = deque()
        self._held: list[int] = []
        self._kept = ExitStack()
        self._started: Load | None = None
        self._state = LoaderState(
            Settings(options.backend, options.policy, options.tensor_parallel_size, options.ranks),
            system.process_start_time(),
        )
        cache = options.engine_cache
        self._engine_cache = EngineCache(cache, self._state) if cache else None

    def run(self) -> None:
        """Load and hold. Raises LoaderError, having told waiting engines and the status."""
        for number in signals.STOPPING:
            signal.signal(number, self._stop)
        signals.release()
        system.allow_open_files()
        with ExitStack() as stack:
            lease = self._open_lease()
            stack.callback(lease.close)
            stack.callback(self._kept.close)
            stack.callback(lambda: close_all(self._held))
            stack.callback(self._end_workers)
            if lease.acquire():
                self._start_workers()  # which open their devices while all else is prepared
            self._serve(stack)
            try:
                self._live(lease)
            except LoaderError as error:
                self._fail(error)
                raise

    @property
    def _directory(self) -> Path:
        return self._options.runtime_directory / HANDOVER_DIRECTORY

    def _open_lease(self) -> Lease:
        with self._runtime_errors():
            prepare_directory(self._directory)
        return Lease(self._directory)

    def _serve(self, stack: ExitStack) -> None:
        # Imported here, when workers run already.
        from headrace_loader.http_server import StatusServer
        from headrace_loader.plugin import copy_engine_side

        with self._runtime_errors():
            handover = HandoverServer(self._directory, ResidentWeights(self._state))
        stack.callback(handover.close)
        if self._options.plugin_directory is not None:
            copy_engine_side(self._options.plugin_directory)
        http = StatusServer(self._options.host, self._options.port, self._state)
        handover.start()
        http.start()
        stack.callback(http.close)
        if self._engine_cache:
            self._engine_cache.start()
            stack.callback(self._engine_cache.stop)

    @contextmanager
    def _runtime_errors(self) -> Iterator[None]:
        try:
            yield
        except (HandoverError, OSError) as error:
            raise RuntimeDirectoryUnusable(
                f"--runtime-dir {self._options.runtime_directory}: {error}"
            ) from None

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        # Nothing else: it may interrupt a log line, which must not be begun within another.
        self._news.put(Stop(signal.Signals(number).name))

    def _next(self, seconds: float | None = None) -> News:
        """Wait for news; raises queue.Empty where there are none in time."""
        news = self._early.popleft() if self._early else self._news.get(timeout=seconds)
        if isinstance(news, Stop):
            log("stopping", signal=news.signal)
        return news

    def _live(self, lease: Lease) -> None:
        try:
            checkpoint = self._checkpoint()
            if checkpoint is None:
                return
            if self._started is None and not self._acquire(lease):
                return
            loaded = self._load(self._started or self._start_workers(), checkpoint, lease)
        finally:
            self._end_workers()
        while loaded and not isinstance(self._next(), Stop):
            pass  # what workers still say after a load is of no interest

    def _checkpoint(self) -> Checkpoint | None:
        """Read and hold the checkpoint, in a thread: a hung volume holds it up, and not a signal.

        Returns None when told to stop meanwhile.
        """
        threading.Thread(target=self._prepare, daemon=True).start()
        until, early = time.monotonic() + _OPENING_SECONDS, list[News]()
        while True:
            try:
                news = self._next(max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise StorageError(
                    f"--checkpoint {self._options.checkpoint}: its manifest was not read after "
                    f"{_OPENING_SECONDS:g} s; look at the file system's health"
                ) from None
            if isinstance(news, Stop):
                return None
            if isinstance(news, Prepared):
                break
            early.append(news)
        self._early.extend(early)
        if isinstance(news.result, LoaderError):
            raise news.result
        self._describe(news.result)
        return news.result

    def _prepare(self) -> None:
        result: Checkpoint | LoaderError
        try:
            result = load_manifest(self._options.checkpoint)
            check_ranks(result, self._options.tensor_parallel_size)
            self._hold_checkpoint()
        except LoaderError as error:
            result = error
        except Exception as error:  # noqa: BLE001 - the main thread waits for it
            result = InternalError(f"{type(error).__name__}: {error}")
        self._news.put(Prepared(result))

    def _describe(self, checkpoint: Checkpoint) -> None:
        with self._state.changing():
            self._state.checkpoint = checkpoint
            self._state.ranks = rank_states(checkpoint, self._options.ranks)
            self._state.mark("manifestRead")
        total = self._state.total_bytes
        log("manifest-read", totalBytes=total, ranks=len(self._state.ranks))

    def _hold_checkpoint(self) -> None:
        """Let nobody delete the checkpoint while this loader lives: it may have to load again."""
        directory = self._options.checkpoint
        try:
            held = self._kept.enter_context(holding(directory))
        except FileNotFoundError as error:
            raise CheckpointMissing(f"--checkpoint {directory}: {error.strerror}") from error
        except OSError as error:
            raise StorageError(f"--checkpoint {directory}: {error.strerror}") from error
        if held is False:
            raise CheckpointMissing(f"--checkpoint {directory}: is being deleted")

    def _acquire(self, lease: Lease) -> bool:
        """Wait until nobody holds weights of an earlier loader; False when told to stop."""
        if lease.acquire():
            return True
        message = (
            "an engine still holds the weights of an earlier loader; loading again waits for "
            "its end"
        )
        with self._state.changing():
            self._state.enter(Phase.ORPHANED, message)
            self._state.mark("orphaned")
        log("orphaned", "warning", message=message)
        while not lease.acquire():
            try:
                if isinstance(self._next(_LEASE_POLL_SECONDS), Stop):
                    return False
            except queue.Empty:
                continue
        log("lease-ended")
        return True

    def _load(self, load: Load, checkpoint: Checkpoint, lease: Lease) -> bool:
        """Load all ranks; False when told to stop meanwhile."""
        if self._options.backend == "host":
            system.check_memory(self._state.total_bytes)
        with self._state.changing():
            self._state.loads += 1
            self._state.enter(Phase.LOADING, "reading weights")
            self._state.mark("loadBegan")
            for rank in self._state.ranks:
                rank.worker_started = load.began
        for worker in load.workers:
            worker.load(checkpoint.sources(worker.rank))
        # Now, while weights are read: there may be tens of thousands.
        load.tensors = {rank: tensors_of(checkpoint, rank) for rank in load.missing}
        # Ready says that no worker is left, either.
        while load.running:
            news = self._next_of(load)
            if isinstance(news, Stop):
                return False
            if not isinstance(news, Prepared):
                self._take(news, load, checkpoint, lease)
        if self._engine_cache:
            self._engine_cache.wait(lambda: not self._news.empty())  # a wish to stop, no less
            if self._is_stopped():
                return False
            self._engine_cache.watch()
        with self._state.changing():
            self._state.enter(Phase.READY, "weights are resident and verified")
            self._state.mark("ready")
        log("resident", totalBytes=self._state.total_bytes, ranks=summary(self._state.ranks))
        return True

    def _is_stopped(self) -> bool:
        """Whether a signal asked the loader to end, once all workers have."""
        with suppress(queue.Empty):
            while not isinstance(self._next(0.0), Stop):
                pass
            return True
        return False

    def _next_of(self, load: Load) -> News:
        """Wait for news of a load.

        Raises:
            BackendUnavailable: it does not get under way.
            StorageError, GpuFailed: it does not go on.
        """
        opening = [rank.rank for rank in self._state.ranks if rank.path is None]
        left = load.opened_by - time.monotonic()
        try:
            return self._next(max(0.0, left) if opening else _STALLED_SECONDS)
        except queue.Empty:
            if not opening:
                raise stalled(self._state.ranks, load, _STALLED_SECONDS) from None
            ranks = ", ".join(map(str, opening))
            raise BackendUnavailable(
                f"rank {ranks}: GPU, cuFile and the checkpoint's files were not open after "
                f"{_OPENING_SECONDS:g} s; look at the file system's health, and for Xid in the "
                "node's kernel log"
            ) from None

    def _start_workers(self) -> Load:
        options = self._options
        ranks = options.ranks
        cpus = max(1, system.usable_cpus() // len(ranks))
        told = WorkerOptions(options.backend, options.policy, options.read_threads, cpus)
        load = self._started = Load(
            [], set(ranks), set(ranks), opened_by=time.monotonic() + _OPENING_SECONDS
        )
        for device, rank in enumerate(ranks):
            load.workers.append(WorkerProcess(rank, device, told, self._news.put))
        return load

    def _end_workers(self) -> None:
        """Whatever they still do: a load was given up, or is complete."""
        workers = self._started.workers if self._started else []
        for worker in workers:
            worker.kill()
        deadline = time.monotonic() + _END_SECONDS  # of all: storage that hangs keeps them alive
        for worker in workers:
            worker.stop(deadline - time.monotonic())
        self._started = None
        self._drain()

    def _drain(self) -> None:
        """Close what workers handed in after the load was given up; keep a wish to stop."""
        self._early.clear()  # it came before workers had anything to hand in
        kept: list[Stop] = []
        while not self._news.empty():
            news = self._news.get()
            if isinstance(news, Stop):
                kept.append(news)
            elif isinstance(news, WorkerEvent):
                close_all(news.descriptors)
        for stop in kept:
            self._news.put(stop)

    def _take(self, news: WorkerNews, load: Load, checkpoint: Checkpoint, lease: Lease) -> None:
        index = news.rank - self._options.ranks.start
        rank = self._state.ranks[index]
        if isinstance(news, WorkerEnded):
            if rank.rank in load.missing:
                raise died(news, load)
            load.running.discard(rank.rank)
            return
        message = news.message
        if isinstance(message, Failed):
            raise PUBLISHED.get(message.reason, InternalError)(message.message)
        if isinstance(message, Mismatched):
            raise checkpoint.mismatch(rank.rank, message.part, message.chunk, message.found)
        if isinstance(message, Filled):
            ready = ready_message(rank.rank, checkpoint, message, load.tensors[rank.rank])
            self._hold(rank, ready, message.verified_at, news.descriptors, lease)
            load.missing.discard(rank.rank)
            load.workers[index].kill()
            return
        with self._state.changing():
            if isinstance(message, PathChosen):
                rank.device, rank.path = message.device, message.report
                rank.locality = message.locality
            if isinstance(message, Progressed):
                rank.progress = message
        if isinstance(message, PathChosen):
            self._log_path(rank, message.report)

    def _hold(
        self,
        rank: RankState,
        ready: Ready,
        verified_at: float,
        descriptors: tuple[int, ...],
        lease: Lease,
    ) -> None:
        self._held += descriptors
        for descriptor in descriptors:
            protect(self._options.backend, descriptor)
        offer = Offer(ready, (*descriptors, lease.descriptor))
        with self._state.changing():
            rank.verified_at = verified_at
            rank.offer = offer
            if self._state.resident:
                self._state.mark("resident")
        try:
            offer.prepare()  # while the engine's container starts
        except ValueError as error:
            raise ManifestInvalid(
                f"--checkpoint {self._options.checkpoint}: rank {rank.rank}: {error}; shard the "
                "model for more ranks"
            ) from None

    def _log_path(self, rank: RankState, report: PathReport) -> None:
        """Say which way the bytes take; a way worse than what was wished for is a warning."""
        fallback = self._options.policy is PathPolicy.PREFER and not report.direct
        level = "warning" if fallback or report.reason else "info"
        fields: dict[str, object] = {"path": report.path, "reason": report.reason}
        if rank.locality is not None:
            fields["gpu"] = rank.locality.document()
        if self._options.policy is not PathPolicy.OFF:
            fields |= {
                "gpuDirect": report.direct,
                "gpuDirectReason": report.direct_reason,
                "gpuDirectMessage": report.direct_message,
            }
        log("path", level, rank=rank.rank, device=rank.device, **fields)

    def _fail(self, error: LoaderError) -> None:
        with self._state.changing():
            self._state.reason = error.reason
            self._state.enter(Phase.FAILED, str(error))
        time.sleep(_FAREWELL_SECONDS)  # lets waiting engines receive the reason
