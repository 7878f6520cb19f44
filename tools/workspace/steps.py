"""Progress for a person: step n of m, time since the start, time of each step."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Steps:
    """Numbers the steps of one command; `total` is known before the first."""

    total: int
    number: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds since the first step could begin."""
        return time.monotonic() - self.began

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Announce a step, and how long it took once it ended well."""
        self.number += 1
        self._print(f"step {self.number} of {self.total}: {title}")
        began = time.monotonic()
        yield
        self.say(f"done in {time.monotonic() - began:.1f} s")

    def say(self, text: str) -> None:
        """Print lines that belong to the current step."""
        for line in text.splitlines():
            self._print(f"    {line}")

    def _print(self, text: str) -> None:
        minutes, seconds = divmod(int(self.elapsed), 60)
        print(f"[{minutes:02}:{seconds:02}] {text}", flush=True)
