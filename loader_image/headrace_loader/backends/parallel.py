"""Work shared by a few threads, in order, ended by the first failure."""

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Work = TypeVar("Work")


def run_parallel(work: Iterable[Work], body: Callable[[Work], None], threads: int) -> None:
    """Run `body` on each item, items in order, in `threads` threads.

    The first exception ends all threads after their current item and is raised here.
    """
    items = _Locked(iter(work))
    failures: list[BaseException] = []

    def drain() -> None:
        try:
            for item in items:
                if failures:
                    return
                body(item)
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            failures.append(error)

    running = [threading.Thread(target=drain, daemon=True) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failures:
        raise failures[0]


class _Locked(Iterator[Work]):
    """An iterator that threads may share."""

    def __init__(self, inner: Iterator[Work]) -> None:
        self._inner = inner
        self._lock = threading.Lock()

    def __next__(self) -> Work:
        with self._lock:
            return next(self._inner)
