"""Opens files by their names on volumes that others can write to. Standard library only."""

import errno
import os
import stat
from pathlib import Path


class NotRegularFile(OSError):  # noqa: N818 - as the standard library names them
    """A FIFO, device, socket or directory is in the place of a file."""

    def __init__(self, path: Path) -> None:
        super().__init__(errno.EINVAL, "must be a regular file", str(path))


def open_regular(path: Path, flags: int = 0) -> int:
    """Open a file for reading. Raises OSError, and NotRegularFile for what opening may block on."""
    found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise NotRegularFile(path)
        return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC | flags)
    finally:
        os.close(found)


def read_regular(path: Path, limit: int = -1) -> bytes:
    """Read a file, or its first `limit` bytes; raises what `open_regular` does."""
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read(limit)
