"""File system calls of source and checkpoint, with failures in the package's own terms.

Everything that touches either volume goes through here, so that each call's failure
names the file, what was tried and what to do about it.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from headrace_checkpoint.errors import (
    CheckpointError,
    NoSpaceOnVolume,
    SourceCorrupt,
    SourceNotFound,
    StorageError,
    VolumeReadOnly,
)

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Translate OSError of calls that change the target volume."""
    try:
        yield
    except OSError as error:
        raise _write_error(path, error) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Translate OSError of calls that read the source."""
    try:
        yield
    except OSError as error:
        text = error.strerror or str(error)
        if error.errno in _ABSENT:
            raise SourceNotFound(f"{path}: {text}; check the source path and its owner") from error
        raise StorageError(f"{path}: reading failed: {text}") from error


def _write_error(path: Path, error: OSError) -> CheckpointError:
    text = error.strerror or str(error)
    if error.errno in _NO_SPACE:
        return NoSpaceOnVolume(f"{path}: {text}; free space on the volume or enlarge it")
    if error.errno in _READ_ONLY:
        return VolumeReadOnly(
            f"{path}: {text}; mount the volume read-write for user {os.geteuid()}"
        )
    return StorageError(f"{path}: writing failed: {text}")


class SourceFile:
    """An open source file: regular, on the file system of its directory, unchanged while open.

    A symbolic link may lead to another directory, as in a model hub's cache, but not to
    another file system: whoever fills the source must not make the sharder publish the
    container's own files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path):
            # A FIFO in place of a file must not block the open.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            self._opened = os.fstat(self._fd)
            foreign = path.is_symlink() and self._opened.st_dev != path.parent.stat().st_dev
        if not stat.S_ISREG(self._opened.st_mode):
            os.close(self._fd)
            raise SourceCorrupt(f"{path}: must be a regular file")
        if foreign:
            os.close(self._fd)
            raise SourceCorrupt(f"{path}: link leaves the source's file system; copy the file")

    @property
    def size(self) -> int:
        """Bytes, as of opening."""
        return self._opened.st_size

    def read_at(self, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes; raises SourceCorrupt where the file ends before."""
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        while buffer:
            with reading(self.path):
                count = os.preadv(self._fd, [buffer], offset)
            if count == 0:
                raise SourceCorrupt(f"{self.path}: ends at byte {offset}; copy the file again")
            buffer = buffer[count:]
            offset += count

    def check_unchanged(self) -> None:
        """Raise StorageError where the file was written since it was opened."""
        with reading(self.path):
            now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self._opened.st_size, self._opened.st_mtime_ns):
            raise StorageError(f"{self.path}: changed while it was read; keep the source unchanged")

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def create_file(path: Path) -> int:
    """Create a file that must not exist; returns a descriptor for writing."""
    with writing(path):
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)


def write_at(fd: int, path: Path, offset: int, data: bytes | memoryview) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data)
    while view:
        with writing(path):
            count = os.pwrite(fd, view, offset)
        view = view[count:]
        offset += count


def sync(fd: int, path: Path) -> None:
    """Make a file or directory durable."""
    with writing(path):
        os.fsync(fd)


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    with writing(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync(fd, path)
    finally:
        os.close(fd)


def make_directories(path: Path) -> None:
    """Create a directory and the missing ones above it, durably."""
    if path.is_dir():
        return
    make_directories(path.parent)
    with writing(path):
        path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def write_file(path: Path, content: bytes) -> None:
    """Create a file with this content and make it durable."""
    fd = create_file(path)
    try:
        write_at(fd, path, 0, content)
        sync(fd, path)
    finally:
        os.close(fd)


def check_free_space(directory: Path, needed: int) -> None:
    """Raise NoSpaceOnVolume before hours of work that cannot end well."""
    with writing(directory):
        free = os.statvfs(directory)
    available = free.f_bavail * free.f_frsize
    if available < needed:
        raise NoSpaceOnVolume(
            f"{directory}: {available} bytes free: the checkpoint needs {needed}; "
            "free space on the volume or enlarge it"
        )
