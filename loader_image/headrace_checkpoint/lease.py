"""Locks on a published checkpoint: shared by those who have loaded it, alone for who deletes it.

The lock is flock(2) on manifest.json, for which loaders need no right to write. Standard library
only, as loaders hold it for as long as their weights may have to be read again.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace_checkpoint.manifest import FILE_NAME

_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


def try_lock(fd: int, kind: int) -> bool | None:
    """Lock without waiting: True, False where another holds it, None where locks do not exist.

    Raises OSError where locking fails for another reason.
    """
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


@contextmanager
def holding(directory: Path, *, exclusive: bool = False) -> Iterator[bool | None]:
    """Hold a checkpoint; yields what try_lock returned. Raises OSError where there is none."""
    # NFS locks alone only what is open for writing.
    mode = os.O_RDWR if exclusive else os.O_RDONLY
    fd = os.open(directory / FILE_NAME, mode | os.O_CLOEXEC)
    try:
        yield try_lock(fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
    finally:
        os.close(fd)
