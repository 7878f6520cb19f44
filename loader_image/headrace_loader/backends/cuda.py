"""GPU memory: exportable allocations filled from storage and checked on the GPU.

Three ways lead there. GPUDirect Storage moves data from storage to the GPU by DMA; it is taken
when `gds.probe` finds all it needs. Otherwise the data is staged through host memory: by direct
I/O, or from the page cache when the file is there already. Staging uses two pinned buffers of
one chunk per thread: while the copy engine empties one, the thread reads the next chunk into
the other. Buffers this small stay in the CPU's cache between read and copy, and that is why they
beat larger ones, and also beat registering the page cache with the driver.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from headrace_checkpoint.manifest import MULTILINEAR64
from headrace_loader.backends import (
    BackendOptions,
    ChunkMismatch,
    PartSource,
    PathPolicy,
    PathReport,
    Progress,
    Region,
)
from headrace_loader.backends.parallel import run_parallel
from headrace_loader.backends.reading import PartFile, staged
from headrace_loader.cuda import gds
from headrace_loader.cuda.digester import WORD, Digester
from headrace_loader.cuda.driver import Allocation, CudaError, Device, Event, PinnedBuffer, Stream
from headrace_loader.errors import (
    BackendUnavailable,
    DirectPathUnavailable,
    InternalError,
    OutOfMemory,
)

_VISIBLE = "CUDA_VISIBLE_DEVICES"


class CudaRegion:
    """One allocation of a whole number of 2 MiB pages, mapped read-write in this process."""

    def __init__(self, allocation: Allocation) -> None:
        self._allocation = allocation

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._allocation.size

    @property
    def pointer(self) -> int:
        """Address on the device."""
        return self._allocation.pointer

    def export(self) -> int:
        """Return a new descriptor of the allocation."""
        return self._allocation.export()

    def close(self) -> None:
        """Unmap; the memory lives on in exported descriptors."""
        self._allocation.release()


@dataclass(frozen=True, slots=True)
class _Piece:
    """One chunk of one part; `index` counts the chunks of all parts."""

    file: PartFile
    chunk: int
    index: int
    pointer: int


class _Lane(Protocol):
    """One thread's way to move chunks; work after a chunk is queued on `stream`."""

    stream: Stream

    def move(self, piece: _Piece, begin: int, end: int) -> None:
        """Bring bytes `begin` to `end` of the part to `piece.pointer`, padded to 8 with zeros."""


class _StagedLane:
    """Reads into pinned memory and copies from there."""

    def __init__(self, chunk_bytes: int) -> None:
        self.stream = Stream()
        pinned = PinnedBuffer(2 * chunk_bytes)
        memory = (ctypes.c_ubyte * pinned.size).from_address(pinned.address)
        view = memoryview(memory).cast("B")
        self._slots = [
            (pinned.address + begin, view[begin : begin + chunk_bytes], Event())
            for begin in (0, chunk_bytes)
        ]

    def move(self, piece: _Piece, begin: int, end: int) -> None:
        address, view, copied = self._slots[0]
        self._slots.reverse()
        copied.wait()
        piece.file.read_into(view, begin, end)
        size, padded = end - begin, _padded(end - begin)
        view[size:padded] = bytes(padded - size)
        self.stream.copy_to_device(piece.pointer, address, padded)
        copied.record(self.stream)


class _DirectLane:
    """Lets cuFile move the data; the padding of the last chunk is cleared first."""

    def __init__(self, files: dict[str, gds.DirectFile]) -> None:
        self.stream = Stream()
        self._files = files

    def move(self, piece: _Piece, begin: int, end: int) -> None:
        source = piece.file.source
        size, padded = end - begin, _padded(end - begin)
        if padded > size:
            self.stream.clear(piece.pointer + padded - WORD, WORD)
            self.stream.synchronize()
        self._files[str(source.path)].read(piece.pointer, source.offset + begin, size)


class CudaBackend:
    """Memory of one GPU; the process uses no other."""

    def __init__(self, options: BackendOptions) -> None:
        self._options = options
        _see_only(options.local_rank)
        try:
            self._device = Device()
        except CudaError as error:
            raise BackendUnavailable(
                f"--backend cuda: GPU {options.local_rank} cannot be used: {error}; check that "
                "the container sees its GPUs (spec.gpu.sharing)"
            ) from None
        self._direct = gds.probe(options.policy is not PathPolicy.OFF)
        if options.policy is PathPolicy.REQUIRE and not self._direct.available:
            raise DirectPathUnavailable(f"--path Require: {self._direct.message}")

    @property
    def device(self) -> str:
        """GPU-<uuid>."""
        return self._device.uuid

    def allocate(self, nbytes: int) -> CudaRegion:
        """Allocate exportable memory that GPUDirect can reach where the device allows it."""
        try:
            return CudaRegion(self._device.allocate(nbytes))
        except CudaError as error:
            if not error.out_of_memory:
                raise
            raise OutOfMemory(
                f"{self.device}: {nbytes} bytes for one region: "
                f"{self._device.free_bytes()} bytes are free; use more GPUs "
                "(spec.parallelism.tensorParallelSize) or end what else uses this one"
            ) from None

    def fill(self, transfers: Sequence[tuple[Region, PartSource]], progress: Progress) -> None:
        """Move all chunks, digests behind them on the GPU, and compare at the end."""
        with ExitStack() as stack:
            files = [stack.enter_context(PartFile(s, prefer_cache=True)) for _, s in transfers]
            lane, report = self._way(files)
            progress.path(report)
            pieces = _pieces(files, [_pointer(region) for region, _ in transfers])
            digester = Digester(len(pieces))
            local = threading.local()
            lanes: list[_Lane] = []

            def move(piece: _Piece) -> None:
                if not hasattr(local, "lane"):
                    self._device.use()
                    local.lane = lane()
                    lanes.append(local.lane)
                begin, end = piece.file.source.chunk_range(piece.chunk)
                local.lane.move(piece, begin, end)
                digester.queue(local.lane.stream, piece.index, piece.pointer, _padded(end - begin))
                progress.read(end - begin)

            run_parallel(pieces, move, self._options.read_threads)
            for used in lanes:
                used.stream.synchronize()
        _compare(pieces, digester.results(), progress)

    def close(self) -> None:
        """The context ends with the process."""

    def _way(self, files: Sequence[PartFile]) -> tuple[Callable[[], _Lane], PathReport]:
        """Choose how the bytes travel; opening the files tells whether cuFile takes them."""
        direct = self._direct
        if direct.available:
            try:
                opened = {str(file.source.path): gds.DirectFile(file.source.path) for file in files}
            except DirectPathUnavailable as error:
                if self._options.policy is PathPolicy.REQUIRE:
                    raise
                direct = gds.Probe(False, "FileSystemUnsupported", str(error))
            else:
                return lambda: _DirectLane(opened), PathReport("GPUDirect", "", True, "", "")
        chunk_bytes = max(file.source.chunk_bytes for file in files)
        report = staged(files, direct.reason, direct.message)
        return lambda: _StagedLane(chunk_bytes), report


def _see_only(local_rank: int) -> None:
    """Hide all other GPUs: cuFile opens a context on every device it sees."""
    visible = os.environ.get(_VISIBLE)
    devices = visible.split(",") if visible else [str(n) for n in range(local_rank + 1)]
    if local_rank >= len(devices):
        raise BackendUnavailable(
            f"--backend cuda: rank {local_rank} needs GPU {local_rank}, {_VISIBLE} has "
            f"{len(devices)}; give the pod one GPU per rank"
        )
    os.environ[_VISIBLE] = devices[local_rank]


def _padded(size: int) -> int:
    return -(-size // WORD) * WORD


def _pointer(region: Region) -> int:
    if not isinstance(region, CudaRegion):
        raise InternalError("a region of another backend was given to the CUDA backend")
    return region.pointer


def _pieces(files: Sequence[PartFile], pointers: Sequence[int]) -> list[_Piece]:
    pieces: list[_Piece] = []
    for file, pointer in zip(files, pointers, strict=True):
        source = file.source
        if source.digest_algorithm != MULTILINEAR64:
            raise BackendUnavailable(
                f"{source.path}: digestAlgorithm {source.digest_algorithm}: the CUDA backend "
                f"checks {MULTILINEAR64} alone; shard the model again"
            )
        first = len(pieces)
        pieces.extend(
            _Piece(file, chunk, first + chunk, pointer + chunk * source.chunk_bytes)
            for chunk in range(len(source.digests))
        )
    return pieces


def _compare(pieces: Sequence[_Piece], found: Sequence[str], progress: Progress) -> None:
    for piece, digest in zip(pieces, found, strict=True):
        source = piece.file.source
        if digest != source.digests[piece.chunk]:
            raise ChunkMismatch(source, piece.chunk, digest)
        begin, end = source.chunk_range(piece.chunk)
        progress.verified(end - begin)
