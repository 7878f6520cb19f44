"""What the loader knows at the moment: one object, changed by the supervisor, read by threads."""

import enum
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from headrace_handover.server import Offer, Peer
from headrace_loader.backends import PathPolicy, PathReport
from headrace_loader.checkpoint import Checkpoint
from headrace_loader.topology import Locality
from headrace_loader.worker_protocol import Progressed

_KEPT_ATTACHMENTS = 64


class Phase(enum.StrEnum):
    """Where the loader stands; the same words in status, metrics and messages."""

    STARTING = "Starting"
    LOADING = "Loading"
    READY = "Ready"
    ORPHANED = "Orphaned"
    FAILED = "Failed"


@dataclass(slots=True)
class RankState:
    """One rank's load. Times are Unix times, None before they happen."""

    rank: int
    total_bytes: int
    worker_started: float | None = None
    device: str | None = None
    path: PathReport | None = None
    progress: Progressed | None = None
    verified_at: float | None = None
    offer: Offer | None = None
    locality: Locality | None = None

    @property
    def read_bytes(self) -> int:
        """Bytes that arrived in memory."""
        return self.progress.read if self.progress else 0

    @property
    def bytes_per_second(self) -> float | None:
        """Rate of reading since its begin, until the last byte; None before the first."""
        return _rate([self])

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the last byte at that rate; None before the first byte."""
        rate = self.bytes_per_second
        return (self.total_bytes - self.read_bytes) / rate if rate else None


def _rate(ranks: Collection[RankState]) -> float | None:
    """Bytes per second of ranks together, from the first begin to the last byte, or until now.

    None before the first byte.
    """
    parts = [rank.progress for rank in ranks if rank.progress is not None]
    last = [part.last_byte for part in parts if part.last_byte is not None]
    if not last:
        return None
    complete = all(rank.read_bytes >= rank.total_bytes for rank in ranks)
    until = max(last) if complete else time.time()
    return sum(p.read for p in parts) / max(1e-6, until - min(p.began for p in parts))


@dataclass(slots=True)
class Attachment:
    """An engine's hold on the weights of a rank; `ended` is None while it lasts."""

    peer: Peer
    began: float
    ended: float | None = None


class EngineCachePhase(enum.StrEnum):
    """What became of the caches of compiled code."""

    OFF = "Off"
    MISSING = "Missing"
    KEPT = "Kept"
    RESTORED = "Restored"
    PUBLISHED = "Published"
    FAILED = "Failed"


@dataclass(frozen=True, slots=True)
class EngineCacheState:
    """The latest news of the caches; `nbytes` is their size where it is known, else 0."""

    phase: EngineCachePhase = EngineCachePhase.OFF
    message: str = ""
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user asked for, as far as it shows in the status."""

    backend: str
    policy: PathPolicy
    tensor_parallel_size: int
    ranks: range = range(1)
    """The ranks this loader holds: all, or those of its node."""


@dataclass(slots=True)
class LoaderState:
    """The whole state. Read and change it only within `reading()` and `changing()`."""

    settings: Settings
    process_started: float
    phase: Phase = Phase.STARTING
    message: str = "starting"
    reason: str = ""
    checkpoint: Checkpoint | None = None
    ranks: list[RankState] = field(default_factory=list)
    timeline: dict[str, float] = field(default_factory=dict)
    attached: dict[int, Attachment] = field(default_factory=dict)
    ended: deque[Attachment] = field(default_factory=lambda: deque(maxlen=_KEPT_ATTACHMENTS))
    attachments: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    loads: int = 0
    engine_cache: EngineCacheState = EngineCacheState()
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep the state as it is."""
        with self._changed:
            yield

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Change the state and wake whoever waits for a change."""
        with self._changed:
            yield
            self._changed.notify_all()

    def wait_for(self, check: Callable[[], bool], seconds: float) -> None:
        """Return once `check`, asked after each change, is true, or after `seconds`."""
        with self._changed:
            self._changed.wait_for(check, seconds)

    def enter(self, phase: Phase, message: str) -> None:
        """Change the phase; call within `changing()`."""
        self.phase = phase
        self.message = message

    def mark(self, event: str) -> None:
        """Note the time of an event; call within `changing()`."""
        self.timeline[event] = time.time()

    @property
    def serving(self) -> bool:
        """Whether the pod's readiness probe should pass.

        An orphaned loader is: its predecessor's weights are resident and being served.
        """
        return self.phase in (Phase.READY, Phase.ORPHANED)

    @property
    def resident(self) -> bool:
        """Whether every rank's weights are there and verified."""
        return bool(self.ranks) and all(rank.offer is not None for rank in self.ranks)

    @property
    def total_bytes(self) -> int:
        """Bytes of weights of all ranks, 0 before the manifest is read."""
        return sum(rank.total_bytes for rank in self.ranks)

    @property
    def slowest(self) -> RankState | None:
        """The rank with the lowest rate, which sets the time; None while one has none."""
        if any(rank.bytes_per_second is None for rank in self.ranks):
            return None
        return min(self.ranks, key=lambda rank: rank.bytes_per_second or 0.0, default=None)

    @property
    def bytes_per_second(self) -> float | None:
        """Rate of all ranks together, until the last byte; None before the first."""
        return _rate(self.ranks)

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until all ranks have their last byte; None while one has no rate."""
        left = [rank.eta_seconds for rank in self.ranks]
        known = [seconds for seconds in left if seconds is not None]
        return max(known) if known and len(known) == len(left) else None

    @property
    def read_bytes(self) -> int:
        """Bytes in memory so far."""
        return sum(rank.read_bytes for rank in self.ranks)
