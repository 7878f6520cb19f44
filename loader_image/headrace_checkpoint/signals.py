"""SIGTERM and SIGINT, kept until somebody can obey them.

The kernel drops a signal to process 1 of a container that has no handler for it yet, which
takes as long as Python's imports; a blocked one stays pending. Standard library alone, so that
a command can begin with it.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def kept() -> Iterator[None]:
    """Let them wait for `release`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def release() -> None:
    """Let the handlers, which are there now, have what was kept and what comes."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
