"""Host memory: memfds, filled by several threads that read, check and store chunk by chunk.

Each thread reads into a buffer of one chunk, which stays in the CPU's cache while its digest
is taken and it is copied to the memfd. Reading straight into the mapped memfd saves the
copy but costs more: the kernel clears each page before the read overwrites it, and
unmapping walks them all.
"""

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest

from headrace_loader.backends import (
    POLICY_OFF,
    POLICY_OFF_MESSAGE,
    BackendOptions,
    ChunkMismatch,
    PartSource,
    PathPolicy,
    PathReport,
    Progress,
    Region,
)
from headrace_loader.backends.digests import digest
from headrace_loader.backends.parallel import run_parallel
from headrace_loader.backends.reading import PartFile, staged, threads_for
from headrace_loader.errors import DirectPathUnavailable, InternalError, OutOfMemory

DEVICE = "host"

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_MFD_NOEXEC_SEAL = 0x0008  # since Linux 6.3; later Python versions name it
_MAX_BUFFER_BYTES = 1024 * 1024 * 1024
_NO_GPU_DIRECT = "host memory has no GPUDirect path"


class HostRegion:
    """A memfd of a whole number of pages, written by pwrite: never mapped here."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            self._descriptor = _memfd()
            os.ftruncate(self._descriptor, self._nbytes)
        except (OSError, OverflowError) as error:
            raise OutOfMemory(f"{nbytes} bytes of host memory for one region: {error}") from None

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._nbytes

    def write(self, data: memoryview, offset: int) -> None:
        """Copy `data` to `offset`; safe from any thread. Raises OutOfMemory."""
        try:
            while data:
                count = os.pwrite(self._descriptor, data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            raise OutOfMemory(
                f"{self._nbytes} bytes of host memory for one region: {error.strerror}"
            ) from None

    def export(self) -> int:
        """Return a new descriptor of the memfd."""
        return os.dup(self._descriptor)


@dataclass(frozen=True, slots=True)
class _Piece:
    """One chunk of one part, bound for the same place of the region."""

    file: PartFile
    region: HostRegion
    chunk: int


class _Buffers(threading.local):
    """One buffer of a chunk per thread, aligned for direct reads."""

    def __init__(self, nbytes: int) -> None:
        self.view = memoryview(mmap.mmap(-1, nbytes))


class HostBackend:
    """Fills memfds; `policy` Require is refused, since GPUDirect has no meaning here."""

    def __init__(self, options: BackendOptions) -> None:
        if options.policy is PathPolicy.REQUIRE:
            raise DirectPathUnavailable(
                f"--path Require: {_NO_GPU_DIRECT}; use Prefer or Off (spec.loading.path), or a GPU"
            )
        self._options = options

    @property
    def device(self) -> str:
        """Host memory is one device."""
        return DEVICE

    @property
    def locality(self) -> None:
        """None: it is everywhere."""

    def allocate(self, nbytes: int) -> HostRegion:
        """Reserve address space and a memfd; pages come when they are filled."""
        return HostRegion(nbytes)

    def fill(self, transfers: Sequence[tuple[Region, PartSource]], progress: Progress) -> None:
        """Read and check chunk by chunk, all parts at once."""
        with ExitStack() as stack:
            files = [stack.enter_context(PartFile(s)) for _, s in transfers]
            progress.path(self._report(files))
            regions = [_host_region(region) for region, _ in transfers]
            pieces = _in_turn(
                [_Piece(file, region, chunk) for chunk in range(len(file.source.digests))]
                for file, region in zip(files, regions, strict=True)
            )
            chunk_bytes = max(file.source.chunk_bytes for file in files)
            buffers = _Buffers(chunk_bytes)

            def load(piece: _Piece) -> None:
                _load(piece, buffers.view, progress)

            most = max(1, _MAX_BUFFER_BYTES // chunk_bytes)
            options = self._options
            threads = threads_for(files, min(options.read_threads, most), options.cpus)
            run_parallel(pieces, [load] * threads)

    def _report(self, files: Sequence[PartFile]) -> PathReport:
        if self._options.policy is PathPolicy.OFF:
            return staged(files, POLICY_OFF, POLICY_OFF_MESSAGE)
        return staged(files, "HostBackend", _NO_GPU_DIRECT)


def _in_turn(parts: Iterable[Sequence[_Piece]]) -> Iterator[_Piece]:
    """Yield a piece of each part in turn: the kernel lets one thread at a time write to a memfd."""
    for pieces in zip_longest(*parts):
        yield from (piece for piece in pieces if piece is not None)


def _host_region(region: Region) -> HostRegion:
    if not isinstance(region, HostRegion):
        raise InternalError("a region of another backend was given to the host backend")
    return region


def _load(piece: _Piece, buffer: memoryview, progress: Progress) -> None:
    source = piece.file.source
    begin, end = source.chunk_range(piece.chunk)
    piece.file.read_into(buffer, begin, end)
    progress.read(end - begin)
    found = digest(source.digest_algorithm, source.chunk_bytes, buffer, end - begin)
    if found != source.digests[piece.chunk]:
        raise ChunkMismatch(source, piece.chunk, found)
    piece.region.write(buffer[: end - begin], begin)
    progress.verified(end - begin)


def _memfd() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("headrace", flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create("headrace", flags)


def seal(descriptor: int) -> None:
    """Forbid writing, shrinking, growing and lifting the seals, for everybody and for good."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        raise InternalError(f"sealing loaded weights failed: {error.strerror}") from None
