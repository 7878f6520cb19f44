"""The cold start as spans of time, and those as bars of text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH = 56
BAR = "█"


@dataclass(frozen=True)
class Span:
    """A phase; `begin` and `end` are Unix times in seconds."""

    name: str
    begin: float
    end: float
    note: str = ""

    @property
    def seconds(self) -> float:
        """How long it took; clocks with a resolution of a second never make it negative."""
        return max(0.0, self.end - self.begin)


def gantt(spans: Sequence[Span], width: int = WIDTH) -> str:
    """Draw the spans below each other, on one scale; at least one column each."""
    start = min(span.begin for span in spans)
    total = max(max(span.end for span in spans) - start, 1e-3)
    label = max(len(span.name) for span in spans)
    lines = [f"{'':{label}}  0 s{f'{total:.1f} s':>{width - 3}}"]
    for span in spans:
        left = min(int((span.begin - start) / total * width), width - 1)
        length = min(max(1, round(span.seconds / total * width)), width - left)
        bar = f"{' ' * left}{BAR * length}".ljust(width)
        lines.append(f"{span.name:{label}} |{bar}| {span.seconds:5.1f} s  {span.note}".rstrip())
    return "\n".join(lines)
