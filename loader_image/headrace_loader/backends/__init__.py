"""What holds the weights: the interface between loading and the kinds of memory.

A worker process opens one backend for one rank, allocates a region per part, fills all of
them in one call and exports a descriptor for each. After that it closes the backend and
exits: the memory lives on in the descriptors, which the supervisor holds. So a backend
may keep whatever filling needs (a CUDA context, pinned buffers, threads) without that
outliving the load.

Filling and checking are one step, because where the bytes can be checked without a second
read from storage (on the GPU, in a bounce buffer, in place) is the backend's knowledge.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from headrace_loader.errors import BackendUnavailable
from headrace_loader.topology import Locality

POLICY_OFF = "PolicyOff"
POLICY_OFF_MESSAGE = "spec.loading.path is Off"
"""Reason and explanation of a path that is not direct because nobody wants it to be."""


class PathPolicy(enum.StrEnum):
    """What the user wants of GPUDirect: data going from storage to the GPU by DMA."""

    REQUIRE = "Require"
    PREFER = "Prefer"
    OFF = "Off"


@dataclass(frozen=True, slots=True)
class PathReport:
    """How the bytes travel. What is reported is what is done, never what was asked for.

    `path` names the way: GPUDirect, O_DIRECT, PageCache, buffered (the file system refuses direct
    reads), or mixed. `reason` says why no better way is taken and is empty where there is none.
    `direct` is True only for real GPUDirect; otherwise `direct_reason` (CamelCase) and
    `direct_message` say why not.
    """

    path: str
    reason: str
    direct: bool
    direct_reason: str
    direct_message: str


@dataclass(frozen=True, slots=True)
class PartSource:
    """The data section of one part file and the digests of its chunks.

    `offset` and `chunk_bytes` are multiples of 4096; `digests` cover consecutive
    `chunk_bytes` pieces of the `nbytes` after `offset`, the last one possibly short.
    """

    path: Path
    offset: int
    nbytes: int
    chunk_bytes: int
    digest_algorithm: str
    digests: tuple[str, ...]

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """Begin and end of a chunk, in bytes of the data section."""
        begin = chunk * self.chunk_bytes
        return begin, min(begin + self.chunk_bytes, self.nbytes)


class ChunkMismatch(Exception):  # noqa: N818 - the condition, as in errors.py
    """A chunk's digest differs; the caller knows which tensors lie there."""

    def __init__(self, source: PartSource, chunk: int, found: str) -> None:
        super().__init__(f"{source.path}: chunk {chunk} has digest {found}")
        self.source = source
        self.chunk = chunk
        self.found = found


class Progress(Protocol):
    """Told by a backend how filling goes; every method may be called from any thread."""

    def path(self, report: PathReport) -> None:
        """Report the way the bytes take, before the first of them moves."""

    def read(self, nbytes: int) -> None:
        """Report bytes that arrived in the region."""

    def verified(self, nbytes: int) -> None:
        """Report bytes whose digest was right."""


class Region(Protocol):
    """One allocation, writable by this process for as long as it lives."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated: at least what was asked for."""

    def export(self) -> int:
        """Return a new descriptor that keeps the memory and lets others map it; caller owns it."""


class Backend(Protocol):
    """Memory of one kind on one device, used by one worker for one rank."""

    @property
    def device(self) -> str:
        """Where the memory is: "host" or "GPU-<uuid>"; engines must ask for the same."""

    @property
    def locality(self) -> Locality | None:
        """Where a GPU is in the machine; None for memory of the host."""

    def allocate(self, nbytes: int) -> Region:
        """Allocate a region; raises OutOfMemory."""

    def fill(self, transfers: Sequence[tuple[Region, PartSource]], progress: Progress) -> None:
        """Read every part into its region and check every chunk.

        Raises ChunkMismatch, CheckpointMissing, DigestMismatch for a file of the wrong
        size, StorageError, and DirectPathUnavailable where the policy requires what
        this storage cannot do.
        """


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """What a worker tells its backend. `local_rank` selects the device."""

    local_rank: int
    policy: PathPolicy
    read_threads: int
    cpus: int
    """How many CPUs it may keep busy: others load beside it."""


BACKENDS = ("host", "cuda")


def open_backend(name: str, options: BackendOptions) -> Backend:
    """Open a backend in this process.

    Raises BackendUnavailable, and DirectPathUnavailable where it can be told already.
    """
    if name == "host":
        from headrace_loader.backends.host import HostBackend

        return HostBackend(options)
    try:
        from headrace_loader.backends.cuda import CudaBackend

        return CudaBackend(options)
    except (ImportError, RuntimeError) as error:
        # RuntimeError is what the bindings raise where the driver's library is missing.
        raise BackendUnavailable(
            f"--backend {name}: no CUDA support here: {error}; use an image with it on a node with "
            "the NVIDIA driver, or --backend host (spec.gpu.sharing: None)"
        ) from None


def protect(name: str, descriptor: int) -> None:
    """Make exported memory immutable as far as its kind allows, once its worker is gone.

    Called by the supervisor, which has no device context. Host memory is sealed; device
    memory has no such thing, there the engine's mapping is what forbids writing.
    """
    if name == "host":
        from headrace_loader.backends.host import seal

        seal(descriptor)
