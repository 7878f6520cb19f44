"""How far a command is: a bar on a terminal, JSON log lines elsewhere."""

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from headrace_checkpoint.report import is_for_people, log

if TYPE_CHECKING:
    from tqdm import tqdm

_SECONDS = 10.0


class Progress:
    """Counts bytes that are done, as a context manager."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._started = self._logged = time.monotonic()
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Self:
        if is_for_people():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, unit="B", unit_scale=True, unit_divisor=1024)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int) -> None:
        """Count bytes; shows or logs them now and then."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._logged > _SECONDS:
            self._logged = time.monotonic()
            log("progress", **self.fields())

    def fields(self) -> dict[str, object]:
        """How far it is, and in how many seconds it ends at the rate until now."""
        seconds = time.monotonic() - self._started
        rate = self._done / max(seconds, 1e-6)
        left = max(0, self._total - self._done)
        return {
            "bytes": self._done,
            "totalBytes": self._total,
            "seconds": round(seconds, 3),
            "mibPerSecond": round(rate / 2**20, 1),
            **({"etaSeconds": round(left / rate)} if rate else {}),
        }
