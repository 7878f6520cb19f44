"""Work shared by a few threads, in order, ended by the first failure."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

Work = TypeVar("Work")


def run_parallel(work: Iterable[Work], bodies: Sequence[Callable[[Work], None]]) -> None:
    """Run one of `bodies`, each in a thread of its own, on each item, items in order.

    The first exception ends all threads after their current item and is raised here.
    """
    items = _Locked(iter(work))
    failures: list[BaseException] = []

    def drain(body: Callable[[Work], None]) -> None:
        try:
            for item in items:
                if failures:
                    return
                body(item)
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            failures.append(error)

    running = [threading.Thread(target=drain, args=(body,), daemon=True) for body in bodies]
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
