"""A real server on a real socket, fed by a source the test controls."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from headrace_handover.messages import Failure, Loading, Ready, Region, Request, Tensor, grouped
from headrace_handover.server import HandoverServer, Limits, Offer, Peer


class Source:
    """Offers one memfd of known content, or whatever the test sets as `present`."""

    def __init__(self) -> None:
        self.content = b"weights!" * 512
        self.memory = os.memfd_create("test", os.MFD_CLOEXEC)
        os.write(self.memory, self.content)
        self.lease = os.memfd_create("lease", os.MFD_CLOEXEC)
        tensor = Tensor("a", "U8", (4096,), 0, 4096)
        ready = Ready(0, "c" * 64, (Region(0, 4096, 4096, grouped([tensor])),))
        self.offer = Offer(ready, (self.memory, self.lease))
        self.present: Loading | Offer | Failure = self.offer
        self.peers: list[Peer] = []
        self.refusals: list[str] = []
        self.changed = threading.Condition()

    def answer(self, request: Request) -> Loading | Offer | Failure:
        return self.present

    def set(self, answer: Loading | Offer | Failure) -> None:
        with self.changed:
            self.present = answer
            self.changed.notify_all()

    def wait(self, request: Request, seconds: float) -> None:
        with self.changed:
            self.changed.wait_for(lambda: not isinstance(self.answer(request), Loading), seconds)

    def attached(self, peer: Peer) -> None:
        with self.changed:
            self.peers.append(peer)
            self.changed.notify_all()

    def detached(self, peer: Peer) -> None:
        with self.changed:
            self.peers.remove(peer)
            self.changed.notify_all()

    def refused(self, reason: str) -> None:
        with self.changed:
            self.refusals.append(reason)
            self.changed.notify_all()

    def until(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, timeout=10)

    def close(self) -> None:
        os.close(self.memory)
        os.close(self.lease)


LIMITS = Limits(connections=4, request_seconds=0.5, send_seconds=2.0, progress_seconds=0.05)


@pytest.fixture
def source() -> Iterator[Source]:
    made = Source()
    yield made
    made.close()


@pytest.fixture
def server(tmp_path: Path, source: Source) -> Iterator[HandoverServer]:
    made = HandoverServer(tmp_path / "handover", source, LIMITS)
    made.start()
    yield made
    made.close()


@pytest.fixture
def descriptors() -> Callable[[], int]:
    """Count the open descriptors of this process."""
    return lambda: sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def no_leak(descriptors: Callable[[], int]) -> Iterator[None]:
    """The test ends with as many open descriptors as it began with."""
    before = descriptors()
    yield
    deadline = time.monotonic() + 5
    while descriptors() != before and time.monotonic() < deadline:
        time.sleep(0.01)  # the server's threads close theirs a moment after the peer
    assert descriptors() == before
