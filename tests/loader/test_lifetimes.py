"""Who may die when: engines, workers and loaders killed with SIGKILL."""

import mmap
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace_handover import AttachTimeout, attach

HOLDER = """
import mmap, sys, time
from headrace_handover import attach
held = attach(sys.argv[1], rank=0, device="host", timeout=60)
memory = mmap.mmap(held.regions[0].descriptor, held.regions[0].region.nbytes, prot=mmap.PROT_READ)
print("holding", flush=True)
for line in sys.stdin:
    print(sum(memory[:]), flush=True)
"""


class Engine:
    """A process that attaches like an engine and reads its weights when asked."""

    def __init__(self, loader: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(loader.socket)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def until_holding(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "holding\n"

    def checksum(self) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)


PART = "model-rank-0-part-0.safetensors"


@pytest.fixture
def start_engine() -> Any:
    started: list[Engine] = []

    def start(loader: Any) -> Engine:
        started.append(Engine(loader))
        return started[-1]

    yield start
    for engine in started:
        engine.kill()


@pytest.fixture
def checkpoint(support: Any, tmp_path: Path) -> Path:
    support.make_checkpoint(tmp_path / "checkpoint", parts=((("a", "U8", (50000,)),),))
    return tmp_path / "checkpoint"


@pytest.fixture
def expected(checkpoint: Path) -> int:
    return sum((checkpoint / PART).read_bytes()[4096:])


def workers_of(loader: Any) -> list[int]:
    out = Path(f"/proc/{loader.process.pid}/task/{loader.process.pid}/children").read_text()
    return [int(pid) for pid in out.split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_engine_dies_and_the_next_one_attaches(
    checkpoint: Path, expected: int, start_loader: Callable[..., Any], start_engine: Any
) -> None:
    loader = start_loader(checkpoint)
    first = start_engine(loader)
    first.until_holding()
    first.kill()
    status = loader.until(lambda status: status["engines"] and status["engines"][0]["detached"])
    assert status["phase"] == "Ready"
    second = start_engine(loader)
    second.until_holding()
    assert second.checksum() == expected
    status = loader.until(lambda status: len(status["engines"]) == 2)
    assert [engine["pid"] for engine in status["engines"]] == [
        first.process.pid,
        second.process.pid,
    ]
    assert len([event for event in loader.events() if event["event"] == "resident"]) == 1


def test_two_engines_share_one_copy(
    checkpoint: Path, expected: int, start_loader: Callable[..., Any], start_engine: Any
) -> None:
    loader = start_loader(checkpoint)
    engines = [start_engine(loader) for _ in range(2)]
    for engine in engines:
        engine.until_holding()
        assert engine.checksum() == expected
    inodes = {
        link.stat().st_ino
        for engine in engines
        for link in Path(f"/proc/{engine.process.pid}/fd").iterdir()
        if "memfd:headrace" in str(link.readlink())
    }
    assert len(inodes) == 1


def test_a_loader_killed_while_loading_loads_again(
    support: Any,
    checkpoint: Path,
    expected: int,
    start_loader: Callable[..., Any],
    start_engine: Any,
) -> None:
    held = support.hold(checkpoint / PART)
    loader = start_loader(checkpoint)
    loader.until_phase("Loading")
    engine = start_engine(loader)  # waits through the restart, as with gate Overlap
    until(lambda: workers_of(loader))
    (worker,) = workers_of(loader)
    loader.kill()
    until(lambda: not alive(worker))
    os.close(held)
    loader.start()
    loader.until_phase("Ready")
    engine.until_holding()
    assert engine.checksum() == expected


def test_a_worker_killed_while_loading_ends_the_loader(
    support: Any, checkpoint: Path, start_loader: Callable[..., Any]
) -> None:
    held = support.hold(checkpoint / PART)
    loader = start_loader(checkpoint)
    loader.until_phase("Loading")
    until(lambda: workers_of(loader))
    os.kill(workers_of(loader)[0], signal.SIGKILL)
    assert loader.wait() == 70
    termination = loader.termination()
    assert termination["reason"] == "InternalError"
    assert "signal 9" in termination["message"]
    os.close(held)


def test_a_loader_killed_while_an_engine_holds_loads_no_second_copy(
    checkpoint: Path, expected: int, start_loader: Callable[..., Any], start_engine: Any
) -> None:
    loader = start_loader(checkpoint)
    engine = start_engine(loader)
    engine.until_holding()
    loader.kill()
    assert engine.checksum() == expected

    loader.start()
    status = loader.until_phase("Orphaned")
    assert status["readBytes"] == 0
    assert loader.get("/readyz").code == 200
    assert loader.get("/readyz").text.startswith("Orphaned: an engine still holds")
    assert engine.checksum() == expected
    notes: list[str] = []
    with pytest.raises(AttachTimeout):
        attach(
            loader.socket,
            rank=0,
            device="host",
            timeout=2.5,
            on_progress=lambda loading: notes.append(loading.note),
        )
    assert notes[0].startswith("an engine still holds")
    assert loader.status()["phase"] == "Orphaned"

    engine.kill()
    status = loader.until_phase("Ready")
    assert status["readBytes"] == status["totalBytes"]
    assert set(status["timeline"]) >= {"orphaned", "loadBegan", "resident"}
    after = start_engine(loader)
    after.until_holding()
    assert after.checksum() == expected


def test_an_orphaned_loader_ends_on_sigterm(
    checkpoint: Path, start_loader: Callable[..., Any], start_engine: Any
) -> None:
    loader = start_loader(checkpoint)
    start_engine(loader).until_holding()
    loader.kill()
    loader.start()
    loader.until_phase("Orphaned")
    assert loader.terminate() == 0


def test_memory_is_free_when_both_are_dead(
    support: Any, tmp_path: Path, start_loader: Callable[..., Any], start_engine: Any
) -> None:
    size = 64 << 20
    support.make_checkpoint(
        tmp_path / "large", parts=((("a", "U8", (size,)),),), chunk_bytes=4 << 20
    )
    loader = start_loader(tmp_path / "large")
    engine = start_engine(loader)
    engine.until_holding()
    held = shared_memory()
    loader.kill()
    assert shared_memory() > held - size // 2
    engine.kill()
    until(lambda: shared_memory() < held - size // 2)


def shared_memory() -> int:
    """Bytes of all memfds and tmpfs files of the machine."""
    match = re.search(r"^Shmem:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def test_the_supervisor_maps_nothing(checkpoint: Path, start_loader: Callable[..., Any]) -> None:
    loader = start_loader(checkpoint)
    loader.until_phase("Ready")
    assert "memfd:headrace" not in Path(f"/proc/{loader.process.pid}/maps").read_text()
    assert workers_of(loader) == []
    with attach(loader.socket, rank=0, device="host", timeout=10) as attachment:
        item = attachment.regions[0]
        with mmap.mmap(item.descriptor, item.region.nbytes, prot=mmap.PROT_READ) as memory:
            assert len(memory) == item.region.nbytes
