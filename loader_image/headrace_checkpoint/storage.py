"""File system calls of source and checkpoint, with failures in the package's own terms.

Everything that touches either volume goes through here, so that each call's failure
names the file, what was tried and what to do about it.
"""

import ctypes
import errno
import fcntl
import functools
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace_checkpoint.errors import (
    CheckpointError,
    NoSpaceOnVolume,
    SourceCorrupt,
    SourceNotFound,
    StorageError,
    VolumeReadOnly,
)
from headrace_checkpoint.files import NotRegularFile, open_regular
from headrace_checkpoint.report import log

DIRECT_ALIGNMENT = mmap.PAGESIZE
"""What offset, length and address of a direct transfer are multiples of; Lustre asks for pages."""

_CACHESTAT = 451  # linux/include/uapi/asm-generic/unistd.h: the number on every architecture
_LIBC = ctypes.CDLL(None)

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
    except NotRegularFile as error:
        raise SourceCorrupt(f"{path}: {error.strerror}; copy it again") from error
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


class AlignedBuffer:
    """Memory for direct transfers, to be used again: new pages cost more than what fills them."""

    def __init__(self) -> None:
        self._memory = memoryview(b"")

    def view(self, length: int) -> memoryview:
        """At least `length` bytes, aligned; views given before are of no more use."""
        if len(self._memory) < length:
            self._memory = memoryview(mmap.mmap(-1, _aligned(length)))
        return self._memory[: _aligned(length)]


def _aligned(length: int) -> int:
    return -(-length // DIRECT_ALIGNMENT) * DIRECT_ALIGNMENT


def set_direct(fd: int, path: Path, direct: bool) -> None:
    """Transfer between memory and device alone, past the page cache, or through it again.

    Filling and emptying the page cache costs more processor time than all other work on
    the same bytes. Where the file system knows no direct transfers, nothing changes.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | (os.O_DIRECT if direct else 0))
    except OSError as error:
        _log_no_direct_transfers(path.parent, str(error))


@functools.cache
def _log_no_direct_transfers(directory: Path, error: str) -> None:
    log("no-direct-transfers", "warning", directory=str(directory), error=error)


def _in_page_cache(fd: int, offset: int, length: int) -> bool:
    """Whether all of an aligned range is there; False where cachestat(2) is not (before 6.5)."""
    asked = (ctypes.c_uint64 * 2)(offset, length)
    found = (ctypes.c_uint64 * 5)()
    answered = _LIBC.syscall(ctypes.c_long(_CACHESTAT), fd, asked, found, 0) == 0
    return answered and found[0] * mmap.PAGESIZE >= length


class SourceFile:
    """An open source file: regular, on the file system of its directory, unchanged while open.

    A symbolic link may lead to another directory, as in a model hub's cache, but not to
    another file system: whoever fills the source must not make the sharder publish the
    container's own files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._direct: int | None = None
        with reading(path):
            self._fd = open_regular(path)
            self._opened = os.fstat(self._fd)
            foreign = path.is_symlink() and self._opened.st_dev != path.parent.stat().st_dev
        if foreign:
            os.close(self._fd)
            raise SourceCorrupt(f"{path}: link leaves the source's file system; copy the file")

    @property
    def size(self) -> int:
        """Bytes, as of opening."""
        return self._opened.st_size

    @property
    def version(self) -> str:
        """None: times change without the content, and may not where it does."""
        return ""

    def read_at(self, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes; raises SourceCorrupt where the file ends before."""
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview, needed: int | None = None) -> None:
        """Fill `buffer` from `offset`, all of it or at least its first `needed` bytes."""
        done, needed = 0, len(buffer) if needed is None else needed
        while done < needed:
            fd = self._descriptor(offset + done, len(buffer) - done)
            with reading(self.path):
                count = self._read(fd, buffer[done:], offset + done)
            if count == 0:
                raise SourceCorrupt(
                    f"{self.path}: ends at byte {offset + done}; copy the file again"
                )
            done += count

    def _read(self, fd: int, buffer: memoryview, offset: int) -> int:
        try:
            return os.preadv(fd, [buffer], offset)
        except OSError as error:
            if fd == self._fd or error.errno != errno.EINVAL:
                raise
            _log_no_direct_transfers(self.path.parent, str(error))
            return os.preadv(self._fd, [buffer], offset)

    def read_aligned(self, offset: int, length: int, buffer: AlignedBuffer) -> memoryview:
        """Read `length` bytes as part of an aligned transfer; returns their place in `buffer`."""
        skipped = offset % DIRECT_ALIGNMENT
        view = buffer.view(skipped + length)
        self.read_into(offset - skipped, view, skipped + length)
        return view[skipped : skipped + length]

    def allow_direct(self) -> None:
        """Read past the page cache what is not in it; buffers must be aligned from now on."""
        direct = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT
        try:
            self._direct = os.open(f"/proc/self/fd/{self._fd}", direct)
        except OSError as error:
            _log_no_direct_transfers(self.path.parent, str(error))

    def _descriptor(self, offset: int, length: int) -> int:
        unaligned = (offset | length) % DIRECT_ALIGNMENT
        if self._direct is None or unaligned or _in_page_cache(self._fd, offset, length):
            return self._fd
        return self._direct

    def check_unchanged(self) -> None:
        """Raise StorageError where the file was written since it was opened."""
        with reading(self.path):
            now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self._opened.st_size, self._opened.st_mtime_ns):
            raise StorageError(f"{self.path}: changed while it was read; keep the source unchanged")

    def close(self) -> None:
        """Close the descriptors."""
        os.close(self._fd)
        if self._direct is not None:
            os.close(self._direct)


def create_file(path: Path) -> int:
    """Create a file that must not exist; returns a descriptor for writing."""
    with writing(path):
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)


def write_at(fd: int, path: Path, offset: int, data: bytes | memoryview) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data)
    while view:
        if (offset | len(view)) % DIRECT_ALIGNMENT:
            set_direct(fd, path, False)
        with writing(path):
            count = _write(fd, path, view, offset)
        view = view[count:]
        offset += count


def _write(fd: int, path: Path, data: memoryview, offset: int) -> int:
    """Write some; some file systems take the flag for direct transfers and refuse the transfer."""
    try:
        return os.pwrite(fd, data, offset)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        _log_no_direct_transfers(path.parent, str(error))
        set_direct(fd, path, False)
        return os.pwrite(fd, data, offset)


def close(fd: int, path: Path) -> None:
    """Close what was written: on a network file system this, too, can say that it did not fit."""
    with writing(path):
        os.close(fd)


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
        close(fd, path)


def file_system_type(path: Path) -> int:
    """The f_type of statfs(2), which os.statvfs leaves out; 0 where there is no answer."""
    answer = ctypes.create_string_buffer(256)  # struct statfs has 120 bytes, f_type first
    failed = _LIBC.statfs(os.fsencode(path), answer)
    return 0 if failed else ctypes.c_long.from_buffer(answer).value


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
