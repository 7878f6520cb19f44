"""A work queue of keys: each key once, one worker at a time per key, backoff per key.

What events tell of comes before what is only looked at again.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

FIRST_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 60.0
_TURN = 8  # every so many keys one is of the background, however much there is beside it


class WorkQueue(Generic[K]):
    """Keys waiting for work.

    A key that is added while it waits is not added again; one that is added while it is
    worked on waits until that is done. So all changes are seen, and no two workers ever
    work on the same key.
    """

    def __init__(self) -> None:
        self._ready: OrderedDict[K, None] = OrderedDict()
        self._background: OrderedDict[K, None] = OrderedDict()
        self._turn = 0
        self._working: set[K] = set()
        self._again: set[K] = set()
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._failures: dict[K, int] = {}
        self._changed = asyncio.Event()
        self._is_shut_down = False

    def __len__(self) -> int:
        """Return how many keys are ready to be worked on."""
        return len(self._ready) + len(self._background)

    def add(self, key: K, *, background: bool = False) -> None:
        """Make a key ready, now.

        Args:
            background: nothing is known to have changed, so those of which something is come
                first: with thousands of keys, a user would wait for all of them.
        """
        self._cancel_timer(key)
        if key in self._working:
            self._again.add(key)
        elif key not in self._ready:
            if background:
                self._background[key] = None
            else:
                self._background.pop(key, None)
                self._ready[key] = None
            self._changed.set()

    def add_later(self, key: K, seconds: float) -> None:
        """Make a key ready after some time, unless it is ready before."""
        self._cancel_timer(key)
        self._timers[key] = asyncio.get_running_loop().call_later(seconds, self.add, key)

    def shut_down(self) -> None:
        """Let all who wait for a key go without one, now and later."""
        self._is_shut_down = True
        self._changed.set()
        for key in list(self._timers):
            self._cancel_timer(key)

    async def get(self) -> K | None:
        """Wait for a key and take it; `done` or `failed` has to follow. None after the end."""
        while not len(self) and not self._is_shut_down:
            self._changed.clear()
            await self._changed.wait()
        if self._is_shut_down:
            return None
        self._turn = (self._turn + 1) % _TURN
        first, second = self._ready, self._background
        if self._turn == 0:
            first, second = second, first
        key, _ = (first or second).popitem(last=False)
        self._working.add(key)
        return key

    def done(self, key: K, again_after: float | None = None) -> None:
        """Give a key back after its work succeeded."""
        self._failures.pop(key, None)
        self._give_back(key, again_after)

    def failed(self, key: K, *, is_stale: bool = False) -> float:
        """Give a key back after its work failed; return the seconds until it is tried again.

        Args:
            is_stale: it failed because it began from an old state, so that a change which was
                added meanwhile makes it ready at once.
        """
        count = self._failures.get(key, 0)
        self._failures[key] = count + 1
        delay = min(FIRST_BACKOFF_SECONDS * 2.0 ** min(count, 16), MAX_BACKOFF_SECONDS)
        if not is_stale:
            # Events during the work must not shorten the backoff.
            self._again.discard(key)
        self._give_back(key, delay)
        return delay

    def _give_back(self, key: K, again_after: float | None) -> None:
        self._working.remove(key)
        if key in self._again:
            self._again.remove(key)
            self.add(key)
        elif again_after is not None:
            self.add_later(key, again_after)

    def _cancel_timer(self, key: K) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
