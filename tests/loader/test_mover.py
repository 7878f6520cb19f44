"""The compiled inner loop of a load, with functions of this file in place of the GPU driver's."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace_loader.cuda import native

PIECE = 8192
SOURCE = Path(native.__file__).with_name("mover.c")
SLOT = 4 * PIECE
KERNEL, COPIES, DIGESTING, DIGESTS = 12, 13, 14, 1 << 20
INT, ADDRESS, WORDS = ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint64)
QUERY = ctypes.CFUNCTYPE(INT, ADDRESS)
RECORD = ctypes.CFUNCTYPE(INT, ADDRESS, ADDRESS)
WAIT = ctypes.CFUNCTYPE(INT, ADDRESS, ADDRESS, ctypes.c_uint)
COPY = ctypes.CFUNCTYPE(INT, ctypes.c_uint64, ADDRESS, ctypes.c_size_t, ADDRESS)
LAUNCH = ctypes.CFUNCTYPE(
    INT, ADDRESS, *[ctypes.c_uint] * 7, ADDRESS, ctypes.POINTER(WORDS), ADDRESS
)


@pytest.fixture(scope="module")
def mover(
    compile_c: Callable[[Path, Path], None], tmp_path_factory: pytest.TempPathFactory
) -> native.Mover | None:
    library = tmp_path_factory.mktemp("mover") / "mover.so"
    compile_c(SOURCE, library)
    return native.mover(library)


class FakeDriver:
    """Events that are ready at the second question; copies at once, into host memory."""

    def __init__(self, slots: int = 2, *, failing: str = "", fails_at: int = 1) -> None:
        self.asked: list[int] = []
        self.did: list[tuple[str, int]] = []
        self.launched: list[tuple[int, ...]] = []
        self._failing, self._left = failing, fails_at
        self._functions = (
            QUERY(self._query),
            RECORD(self._record),
            WAIT(self._wait),
            COPY(self._copy),
            LAUNCH(self._launch),
        )
        self._buffers = [ctypes.create_string_buffer(b"\xff" * SLOT, SLOT) for _ in range(slots)]
        self.calls = [ctypes.cast(one, ADDRESS) for one in self._functions]
        self.slots = (native.Slot * slots)(
            *((ctypes.addressof(buffer), n + 1) for n, buffer in enumerate(self._buffers))
        )

    def _answer(self, call: str) -> int:
        if call == self._failing:
            self._left -= 1
        return 700 if self._failing == call and self._left < 1 else 0

    def _query(self, event: int) -> int:
        self.asked.append(event)
        return 600 if self.asked.count(event) % 2 else self._answer("query")

    def _record(self, event: int, stream: int) -> int:
        assert stream == COPIES
        self.did.append(("record", event))
        return self._answer("record")

    def _wait(self, stream: int, event: int, flags: int) -> int:
        assert (stream, flags) == (DIGESTING, 0)
        self.did.append(("wait", event))
        return self._answer("wait")

    def _copy(self, pointer: int, source: int, size: int, stream: int) -> int:
        assert stream == COPIES
        ctypes.memmove(pointer, source, size)
        self.did.append(("copy", size))
        return self._answer("copy")

    def _launch(self, kernel: int, x: int, y: int, z: int, threads: int, *rest: Any) -> int:
        arguments = rest[-2]
        values = (arguments[n].contents.value for n in range(4))
        self.did.append(("launch", y))
        self.launched.append((kernel, x, y, z, threads, *rest[:4], *values))
        return self._answer("launch")


class Moved:
    """What came of moving `sizes` bytes of a file, one run each, from `offset` on."""

    def __init__(
        self,
        mover: Any,
        path: Path,
        driver: FakeDriver,
        sizes: tuple[int, ...],
        offset: int,
        threads: int,
        first: int,
    ) -> None:
        self.begins = [sum(sizes[:n]) + 64 * n for n in range(len(sizes))]
        total = sum(sizes) + 64 * len(sizes)
        target = ctypes.create_string_buffer(b"\xee" * total, total)
        descriptor = os.open(path, os.O_RDONLY)
        self.runs = (native.Run * len(sizes))(
            *(
                (offset + sum(sizes[:n]), size, ctypes.addressof(target) + begin, 4096, DIGESTS + n)
                for n, (size, begin) in enumerate(zip(sizes, self.begins, strict=True))
            )
        )
        for run in self.runs:
            run.file = descriptor
        self.load = native.Load(
            *driver.calls,
            KERNEL,
            COPIES,
            DIGESTING,
            self.runs,
            driver.slots,
            run_count=len(sizes),
            slot_count=len(driver.slots),
            thread_count=threads,
            slot_bytes=SLOT,
            piece_bytes=PIECE,
            blocks=16,
            threads=256,
            next_bytes=first,
        )
        mover.prepare(self.load)
        mover.load(self.load)
        mover.release(self.load)
        os.close(descriptor)
        self.target = target.raw
        self.done = [run.done for run in self.runs]


Move = Callable[..., Moved]


@pytest.fixture
def move(mover: Any, tmp_path: Path) -> Move:
    def moved(
        driver: FakeDriver,
        content: bytes,
        *sizes: int,
        offset: int = 0,
        threads: int = 1,
        first: int = SLOT,
    ) -> Moved:
        (tmp_path / "file").write_bytes(content)
        return Moved(mover, tmp_path / "file", driver, sizes, offset, threads, first)

    return moved


@pytest.mark.parametrize("size", [1, 8, PIECE, PIECE + 3, SLOT, 3 * SLOT + 4093])
def test_all_bytes_arrive_padded_with_zeros_to_whole_words(move: Move, size: int) -> None:
    content, driver = os.urandom(4096 + size), FakeDriver()
    moved = move(driver, content, size, offset=4096)
    assert (moved.done, moved.load.moved) == ([1], size)
    assert moved.target[:size] == content[4096:]
    padded = -(-size // 8) * 8
    assert moved.target[size:padded] == bytes(padded - size)
    assert moved.target[padded:] == b"\xee" * (size + 64 - padded)  # nothing beyond


def test_slots_take_turns_and_each_is_waited_for(move: Move) -> None:
    driver = FakeDriver()
    move(driver, os.urandom(4 * SLOT), 4 * SLOT)
    *blocks, wait, launch = driver.did
    # Who is late may find the second block first. The run's digests wait for the last one queued.
    assert blocks[::2] == [("copy", SLOT)] * 4
    assert sorted(blocks[1::2]) == [("record", event) for event in (1, 1, 2, 2)]
    assert (wait, launch) == (("wait", blocks[-1][1]), ("launch", 4 * SLOT // 4096))
    assert min(driver.asked.count(1), driver.asked.count(2)) >= 2


def test_blocks_grow_to_the_size_of_a_slot(move: Move) -> None:
    driver = FakeDriver(slots=1)  # in order
    move(driver, os.urandom(2 * SLOT), 2 * SLOT, first=PIECE)
    sizes = [size for what, size in driver.did if what == "copy"]
    assert sizes == [PIECE, 2 * PIECE, SLOT, PIECE]


def test_digests_are_queued_behind_the_copies_of_each_run(move: Move) -> None:
    driver = FakeDriver(slots=1)
    moved = move(driver, os.urandom(SLOT + 12288 + 4097), SLOT + 12288, 4097)
    places = [run.pointer for run in moved.runs]
    words, chunks = (SLOT + 12288) // 8, SLOT // 4096 + 3
    assert driver.launched == [
        (KERNEL, 16, chunks, 1, 256, 1, 1, 0, DIGESTING, places[0], words, 512, DIGESTS),
        (KERNEL, 16, 2, 1, 256, 1, 1, 0, DIGESTING, places[1], 513, 512, DIGESTS + 1),
    ]
    assert driver.did == [
        *(("copy", SLOT), ("record", 1), ("copy", 12288), ("record", 1)),
        *(("wait", 1), ("launch", chunks)),
        *(("copy", 4104), ("record", 1), ("wait", 1), ("launch", 2)),
    ]


@pytest.mark.parametrize("slots", [1, 3])
def test_threads_share_the_blocks(move: Move, slots: int) -> None:
    content, driver = os.urandom(64 * PIECE + 16 * SLOT), FakeDriver(slots)
    sizes = (*[PIECE] * 64, 16 * SLOT)
    moved = move(driver, content, *sizes, threads=4, first=PIECE)
    assert (moved.done, moved.load.moved) == ([1] * 65, len(content))
    for n, (begin, size) in enumerate(zip(moved.begins, sizes, strict=True)):
        assert moved.target[begin : begin + size] == content[n * PIECE :][:size]


def test_a_file_that_ends_early_is_told(move: Move) -> None:
    driver = FakeDriver(slots=1)  # the first run is copied before the second is read
    moved = move(driver, os.urandom(PIECE + 8), PIECE, 9)
    assert (moved.done, moved.load.failed, moved.load.moved) == ([1, 0], 1, PIECE)


def test_without_threads_all_is_left(move: Move) -> None:
    moved = move(driver := FakeDriver(), os.urandom(PIECE), PIECE, threads=0)
    assert (moved.done, moved.load.moved, driver.did) == ([0], 0, [])


@pytest.mark.parametrize("call", ["query", "record", "copy", "wait", "launch"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_failed_call_ends_all_and_leaves_the_rest_undone(
    move: Move, call: str, threads: int
) -> None:
    driver = FakeDriver(failing=call, fails_at=2)
    moved = move(driver, os.urandom(64 * PIECE), *[PIECE] * 64, threads=threads)
    assert moved.load.failed == 1
    assert moved.done.count(0) > 32
    assert moved.load.moved == moved.done.count(1) * PIECE
    if call != "launch":
        assert len(driver.launched) == moved.done.count(1)


def test_without_the_library_there_is_none(tmp_path: Path) -> None:
    assert native.mover(tmp_path / "none.so") is None
