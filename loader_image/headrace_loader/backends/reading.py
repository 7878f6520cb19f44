"""Reads part files: from the page cache if it holds them, else by direct I/O where that works.

Direct I/O moves data from storage into the region without a copy in the page cache, which
would otherwise compete with the weights for memory.
"""

import errno
import mmap
import os
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from headrace_checkpoint.files import NotRegularFile, open_regular
from headrace_loader.backends import PartSource, PathReport
from headrace_loader.errors import CheckpointMissing, DigestMismatch, StorageError
from headrace_loader.system import usable_cpus

ALIGNMENT = 4096
"""Bytes. Offsets, lengths and addresses of direct reads are multiples of it."""

_SAMPLES = 256

_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)


class PartFile:
    """An open part; `buffered_reason` is empty while reads are direct.

    A file that the page cache holds (`cached`) is read from there: that beats storage. `path` is
    the way's name in reports.
    """

    def __init__(self, source: PartSource) -> None:
        self.source = source
        self.buffered_reason = ""
        self.cached = False
        self._descriptor = -1
        try:
            self._descriptor = self._open()
            size = os.fstat(self._descriptor).st_size
        except FileNotFoundError:
            raise CheckpointMissing(
                f"{source.path}: no such file; the manifest names it, shard the model again"
            ) from None
        except NotRegularFile as error:
            raise DigestMismatch(
                f"{source.path}: {error.strerror}; shard the model again"
            ) from None
        except OSError as error:
            self.close()
            raise StorageError(
                f"{source.path}: opening failed: {error.strerror}; check the volume's mount and "
                "permissions"
            ) from None
        expected = source.offset + source.nbytes
        if size != expected:
            self.close()
            raise DigestMismatch(
                f"{source.path}: {size} bytes: the manifest says {expected}; shard the model again"
            )

    @property
    def path(self) -> str:
        """How it is read."""
        if self.cached:
            return "PageCache"
        return "buffered" if self.buffered_reason else "O_DIRECT"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def fileno(self) -> int:
        """Return the descriptor, which stays this object's."""
        return self._descriptor

    def read_into(self, view: memoryview, begin: int, end: int) -> None:
        """Read bytes `begin` to `end` of the data section to the start of `view`.

        `begin` is a multiple of 4096, and `view` has room up to the next such multiple after
        the last byte: direct reads are whole blocks.
        """
        limit = end if self.buffered_reason else -(-end // ALIGNMENT) * ALIGNMENT
        done = begin
        while done < end:
            count = self._read(view[done - begin : limit - begin], self.source.offset + done)
            if not self.buffered_reason and done + count < end:
                count -= count % ALIGNMENT  # cut short, a direct read goes on at a whole block
            if count == 0:
                raise DigestMismatch(
                    f"{self.source.path}: ends at byte {self.source.offset + done}; "
                    "it was cut while it was read, shard the model again"
                )
            done += count

    def _read(self, view: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._descriptor, [view], offset)
        except OSError as error:
            raise StorageError(
                f"{self.source.path}: reading {len(view)} bytes at {offset} failed: "
                f"{error.strerror}; look at the file system's health"
            ) from None

    def _open(self) -> int:
        descriptor = self._open_buffered("the page cache holds the file")
        self.cached = is_cached(descriptor, self.source.offset, self.source.nbytes)
        if self.cached:
            return descriptor
        os.close(descriptor)
        self.buffered_reason = ""
        try:
            descriptor = open_regular(self.source.path, os.O_DIRECT)
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            return self._open_buffered(f"the file system refuses O_DIRECT: {error.strerror}")
        try:
            self._probe(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _REFUSALS:
                raise
            return self._open_buffered(f"the file system refuses direct reads: {error.strerror}")
        return descriptor

    def _open_buffered(self, reason: str) -> int:
        self.buffered_reason = reason
        return open_regular(self.source.path)

    def _probe(self, descriptor: int) -> None:
        """Read one block: some file systems take the flag and refuse the read."""
        with mmap.mmap(-1, ALIGNMENT) as block:
            os.preadv(descriptor, [block], self.source.offset)


def staged(files: Sequence[PartFile], direct_reason: str, direct_message: str) -> PathReport:
    """Report that the bytes go through host memory, and by which kind of read."""
    ways = Counter(file.path for file in files)
    reasons = {file.buffered_reason: None for file in files if file.path == "buffered"}
    if len(ways) > 1:
        counts = (f"{count} of {len(files)} files by {way}" for way, count in ways.items())
        reasons = dict.fromkeys((", ".join(counts), *reasons))
    return PathReport(
        path="mixed" if len(ways) > 1 else next(iter(ways)),
        reason="; ".join(reasons),
        direct=False,
        direct_reason=direct_reason,
        direct_message=direct_message,
    )


def threads_for(files: Sequence[PartFile], most: int, share: int) -> int:
    """Return by how many threads files are best read, `most` at most, with `share` CPUs.

    Reads from the page cache never wait: more threads than CPUs are in each other's way. An eighth
    of many CPUs are left to all else that runs: a thread that is put off holds up a whole block.
    """
    if all(file.cached for file in files):
        cpus = min(share, usable_cpus())  # those near a GPU may be fewer
        return min(most, cpus - cpus // 8)
    return most


def is_cached(descriptor: int, offset: int, nbytes: int) -> bool:
    """Tell whether the page cache holds (nearly) all of a range, from a sample of its pages.

    A read with RWF_NOWAIT does not go to storage. False where the file system cannot tell.
    """
    step = max(ALIGNMENT, nbytes // _SAMPLES // ALIGNMENT * ALIGNMENT)
    with mmap.mmap(-1, ALIGNMENT) as block:
        for position in range(offset, offset + nbytes, step):
            try:
                if os.preadv(descriptor, [block], position, os.RWF_NOWAIT) == 0:
                    return False
            except (OSError, AttributeError):  # the file system or the C library has no such read
                return False
    return True
