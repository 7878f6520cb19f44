"""The lease on resident weights: a lock that lives as long as anybody holds them.

flock(2) locks belong to an open file description. The loader locks the file and passes
the locked description to each engine along with the weights; the kernel releases the lock
when the last process that has it is gone. A loader that starts again and cannot take the lock
knows that an engine still holds the weights of its predecessor.
"""

import fcntl
import os
from pathlib import Path

from headrace_loader.errors import RuntimeDirectoryUnusable

FILE_NAME = "lease"


class Lease:
    """The lock file in `directory`; not locked until `acquire` says so."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE_NAME
        try:
            self.descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise RuntimeDirectoryUnusable(f"{self._path}: {error.strerror}") from None

    def acquire(self) -> bool:
        """Take the lock if it is free; never waits. Raises RuntimeDirectoryUnusable."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise RuntimeDirectoryUnusable(
                f"{self._path}: {error.strerror}: --runtime-dir must be on a file system with flock"
            ) from None
        return True

    def close(self) -> None:
        """Give up this process's share; engines keep theirs."""
        os.close(self.descriptor)
