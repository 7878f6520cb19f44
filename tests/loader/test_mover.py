"""The compiled inner loop of a load, with functions of this file in place of the GPU driver's."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace_loader.cuda import native

PIECE = 8192
SOURCE = Path(native.__file__).with_name("mover.c")
QUERY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
RECORD = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
COPY = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
)


@pytest.fixture(scope="module")
def mover(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("mover") / "mover.so"
    strict = ["-Wall", "-Wextra", "-Werror", "-O2"]
    subprocess.run(
        [compiler, *strict, "-shared", "-fPIC", SOURCE, "-o", library], check=True, timeout=60
    )
    return native.mover(library)


class FakeDriver:
    """Events that are ready at the second question; copies at once, into host memory."""

    def __init__(self, copy_code: int = 0) -> None:
        self.asked: list[int] = []
        self.recorded: list[int] = []
        self._copy_code = copy_code
        self._functions = (QUERY(self._query), RECORD(self._record), COPY(self._copy))
        self._buffers = [ctypes.create_string_buffer(b"\xff" * PIECE, PIECE) for _ in range(2)]
        addresses = [ctypes.cast(one, ctypes.c_void_p) for one in self._functions]
        self.lane = native.Lane(*addresses, None, piece=PIECE)
        for slot, buffer in enumerate(self._buffers):
            self.lane.buffer[slot], self.lane.event[slot] = ctypes.addressof(buffer), slot + 1

    def _query(self, event: int) -> int:
        self.asked.append(event)
        return 600 if len(self.asked) % 2 else 0

    def _record(self, event: int, _stream: int) -> int:
        self.recorded.append(event)
        return 0

    def _copy(self, pointer: int, source: int, size: int, _stream: int) -> int:
        ctypes.memmove(pointer, source, size)
        return self._copy_code


@pytest.fixture
def move(mover: Any, tmp_path: Path) -> Callable[..., tuple[int, bytes]]:
    def moved(driver: FakeDriver, content: bytes, offset: int, size: int) -> tuple[int, bytes]:
        (tmp_path / "file").write_bytes(content)
        target = ctypes.create_string_buffer(b"\xee" * (size + 64), size + 64)
        descriptor = os.open(tmp_path / "file", os.O_RDONLY)
        code = mover(driver.lane, descriptor, offset, size, ctypes.addressof(target))
        os.close(descriptor)
        return code, target.raw

    return moved


@pytest.mark.parametrize("size", [1, 8, PIECE, PIECE + 3, 5 * PIECE + 4093])
def test_all_bytes_arrive_padded_with_zeros_to_whole_words(
    move: Callable[..., tuple[int, bytes]], size: int
) -> None:
    content, driver = os.urandom(4096 + size), FakeDriver()
    code, target = move(driver, content, 4096, size)
    assert code == 0
    assert target[:size] == content[4096:]
    padded = -(-size // 8) * 8
    assert target[size:padded] == bytes(padded - size)
    assert target[padded:] == b"\xee" * (size + 64 - padded)  # nothing beyond


def test_buffers_take_turns_and_each_is_waited_for(move: Callable[..., tuple[int, bytes]]) -> None:
    driver = FakeDriver()
    move(driver, os.urandom(3 * PIECE), 0, 3 * PIECE)
    assert driver.recorded == [1, 2, 1]
    assert driver.asked == [1, 1, 2, 2, 1, 1]


def test_a_file_that_ends_early_is_told(move: Callable[..., tuple[int, bytes]]) -> None:
    assert move(FakeDriver(), os.urandom(PIECE), 0, PIECE + 1)[0] == 1


def test_a_failed_copy_is_told(move: Callable[..., tuple[int, bytes]]) -> None:
    assert move(FakeDriver(copy_code=700), os.urandom(PIECE), 0, PIECE)[0] == 1


def test_without_the_library_there_is_none(tmp_path: Path) -> None:
    assert native.mover(tmp_path / "none.so") is None
