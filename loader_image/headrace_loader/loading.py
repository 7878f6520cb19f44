"""One load: its workers, what is still missing, and what is said of how it goes and ends."""

import signal
import time
from dataclasses import dataclass, field

from headrace_handover.messages import Ready, Region, Tensor, TensorGroup, grouped
from headrace_loader import system
from headrace_loader.checkpoint import Checkpoint
from headrace_loader.errors import GpuFailed, InternalError, LoaderError, OutOfMemory, StorageError
from headrace_loader.state import RankState
from headrace_loader.worker_process import WorkerEnded, WorkerProcess
from headrace_loader.worker_protocol import Filled


@dataclass(slots=True)
class Load:
    """A load that is going on.

    Attributes:
        workers: one for each rank.
        missing: ranks whose weights are not there yet.
        running: ranks whose worker has not ended.
        opened_by: when all have to have their device and files open; monotonic, in seconds.
        tensors: what is in the parts of each rank.
        oom_kills: how many processes the kernel had killed for memory before.
    """

    workers: list[WorkerProcess]
    missing: set[int]
    running: set[int]
    opened_by: float
    began: float = field(default_factory=time.time)
    tensors: dict[int, list[tuple[TensorGroup, ...]]] = field(default_factory=dict)
    oom_kills: int = field(default_factory=system.oom_kills)


def stalled(ranks: list[RankState], load: Load, seconds: float) -> StorageError | GpuFailed:
    """Say what a load is waiting for that has brought no news for so many seconds."""
    if not load.missing:
        left = ", ".join(map(str, sorted(load.running)))
        return GpuFailed(
            f"rank {left}: the weights are verified, but their worker did not end within "
            f"{seconds:g} s; look for Xid in the node's kernel log"
        )
    missing = ", ".join(
        f"rank {rank.rank} ({rank.read_bytes} of {rank.total_bytes} bytes)"
        for rank in ranks
        if rank.rank in load.missing
    )
    return StorageError(
        f"{missing}: no byte arrived for {seconds:g} s; look at the file system's health, "
        "and for Xid in the node's kernel log"
    )


def died(ended: WorkerEnded, load: Load) -> LoaderError:
    """Say why a worker may have ended that did not say so itself."""
    if ended.exit_code == -signal.SIGKILL and system.oom_kills() > load.oom_kills:
        return OutOfMemory(
            f"rank {ended.rank}: the kernel killed the worker for memory; raise "
            "spec.loading.resources.limits.memory above the weights"
        )
    how = f"exit code {ended.exit_code}"
    if ended.exit_code < 0:
        how = f"signal {-ended.exit_code}"
    return InternalError(f"rank {ended.rank}: the worker ended without a word ({how})")


def rank_states(checkpoint: Checkpoint, ranks: range) -> list[RankState]:
    """Return the state of ranks of which nothing is loaded yet."""
    manifest = checkpoint.manifest
    return [
        RankState(rank, sum(part.data_bytes for part in manifest.rank_parts(rank)))
        for rank in ranks
    ]


def tensors_of(checkpoint: Checkpoint, rank: int) -> list[tuple[TensorGroup, ...]]:
    """Return the tensors of each of a rank's parts, as engines are told of them."""
    return [
        grouped(
            Tensor(item.name, item.dtype, item.shape, item.offset, item.nbytes)
            for item in part.tensors
        )
        for part in checkpoint.manifest.rank_parts(rank)
    ]


def ready_message(
    rank: int, checkpoint: Checkpoint, filled: Filled, tensors: list[tuple[TensorGroup, ...]]
) -> Ready:
    """Return what engines are told of a rank's weights once they are there."""
    parts = checkpoint.manifest.rank_parts(rank)
    regions = tuple(
        Region(part.part, nbytes, part.data_bytes, of_part)
        for part, nbytes, of_part in zip(parts, filled.region_bytes, tensors, strict=True)
    )
    return Ready(rank, checkpoint.digest, regions)


def summary(ranks: list[RankState]) -> list[dict[str, object]]:
    """Return what the log says of a load that is complete."""
    return [
        {
            "rank": rank.rank,
            "bytes": rank.total_bytes,
            "bytesPerSecond": rank.bytes_per_second and round(rank.bytes_per_second),
            "path": rank.path.path if rank.path else None,
        }
        for rank in ranks
    ]
