"""Liveness: is every loop of the operator still turning, and do the watches deliver?

An unreachable API server is no reason to restart, so attempts count, not successes. A watch
that delivers nothing while listings show changes is one: nothing else revives it.
"""

import time
from collections.abc import Callable

STALE_SECONDS = 180.0


class Health:
    """Heartbeats by name, and reasons to restart given by others."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._beats: dict[str, float] = {}
        self._broken: dict[str, str] = {}

    def beat(self, loop: str) -> None:
        """Note that a loop has turned."""
        self._beats[loop] = self._clock()

    def report(self, part: str, problem: str | None) -> None:
        """Note what is broken about a part, or that nothing is."""
        if problem is None:
            self._broken.pop(part, None)
        else:
            self._broken[part] = problem

    def problems(self) -> list[str]:
        """Return what is wrong; empty when the process is alive."""
        now = self._clock()
        stale = [
            f"{loop} has not turned for {now - beat:.0f} s"
            for loop, beat in sorted(self._beats.items())
            if now - beat > STALE_SECONDS
        ]
        return stale + [f"{part}: {problem}" for part, problem in sorted(self._broken.items())]
