"""Host memory: memfds filled by direct I/O, several threads reading and checking chunks."""

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from headrace_checkpoint.digest import digester
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
from headrace_loader.backends.reading import PartFile
from headrace_loader.errors import DirectPathUnavailable, InternalError, OutOfMemory

DEVICE = "host"

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_MFD_NOEXEC_SEAL = 0x0008  # since Linux 6.3; later Python versions name it
_NO_GPU_DIRECT = "host memory has no GPUDirect path"


class HostRegion:
    """A memfd, mapped read-write; a whole number of pages."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._descriptor = _memfd()
        try:
            os.ftruncate(self._descriptor, self._nbytes)
            self._mapping = mmap.mmap(self._descriptor, self._nbytes)
        except OSError as error:
            os.close(self._descriptor)
            raise OutOfMemory(
                f"{self._nbytes} bytes of host memory for one region: {error.strerror}"
            ) from None
        self.view = memoryview(self._mapping)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._nbytes

    def export(self) -> int:
        """Return a new descriptor of the memfd."""
        return os.dup(self._descriptor)

    def close(self) -> None:
        """Unmap; sealing against writes needs every writable mapping gone."""
        self.view.release()
        self._mapping.close()
        os.close(self._descriptor)


@dataclass(frozen=True, slots=True)
class _Piece:
    """One chunk of one part, bound for the same place of the region that `view` covers."""

    file: PartFile
    view: memoryview
    chunk: int


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

    def allocate(self, nbytes: int) -> HostRegion:
        """Reserve address space and a memfd; pages come when they are filled."""
        return HostRegion(nbytes)

    def fill(self, transfers: Sequence[tuple[Region, PartSource]], progress: Progress) -> None:
        """Read and check chunk by chunk, in the order of the parts."""
        with ExitStack() as stack:
            files = [stack.enter_context(PartFile(source)) for _, source in transfers]
            progress.path(self._report(files))
            views = [_view(region) for region, _ in transfers]
            pieces = (
                _Piece(file, view, chunk)
                for file, view in zip(files, views, strict=True)
                for chunk in range(len(file.source.digests))
            )
            run_parallel(pieces, lambda piece: _load(piece, progress), self._options.read_threads)

    def close(self) -> None:
        """Nothing is held beside the regions."""

    def _report(self, files: Sequence[PartFile]) -> PathReport:
        off = self._options.policy is PathPolicy.OFF
        buffered = [file.buffered_reason for file in files if file.buffered_reason]
        return PathReport(
            path="buffered" if buffered else "O_DIRECT",
            reason=buffered[0] if buffered else "",
            direct=False,
            direct_reason="PolicyOff" if off else "HostBackend",
            direct_message="spec.loading.path is Off" if off else _NO_GPU_DIRECT,
        )


def _view(region: Region) -> memoryview:
    if not isinstance(region, HostRegion):
        raise InternalError("a region of another backend was given to the host backend")
    return region.view


def _load(piece: _Piece, progress: Progress) -> None:
    source = piece.file.source
    begin, end = source.chunk_range(piece.chunk)
    piece.file.read_into(piece.view[begin:], begin, end)
    progress.read(end - begin)
    digest = digester(source.digest_algorithm, source.chunk_bytes)
    found = digest(piece.view[begin:end])
    if found != source.digests[piece.chunk]:
        raise ChunkMismatch(source, piece.chunk, found)
    progress.verified(end - begin)


def _memfd() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("headrace", flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise OutOfMemory(f"memfd_create: {error.strerror}") from None
        return os.memfd_create("headrace", flags)


def seal(descriptor: int) -> None:
    """Forbid writing, shrinking, growing and lifting the seals, for everybody and for good."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        raise InternalError(f"sealing loaded weights failed: {error.strerror}") from None
