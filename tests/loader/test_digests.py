"""Digests of chunks by compiled code are numpy's, whatever is behind them in the buffer."""

import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from headrace_checkpoint.digest import digester
from headrace_checkpoint.manifest import MULTILINEAR64
from headrace_loader.backends import digests

CHUNK = 4096
SOURCE = digests.LIBRARY.with_suffix(".c")


@pytest.fixture(scope="module")
def compiled(
    compile_c: Callable[[Path, Path], None], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    library = tmp_path_factory.mktemp("digest") / "digest.so"
    compile_c(SOURCE, library)
    return digests.compiled(library)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Have digests computed by these functions, or by numpy (None)."""

    def switch(functions: Any) -> None:
        monkeypatch.setattr(digests, "compiled", lambda: functions)
        digests._multipliers.cache_clear()

    yield switch
    digests._multipliers.cache_clear()


@given(data=st.binary(min_size=1, max_size=CHUNK))
@example(data=b"\xff" * CHUNK)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_compiled_digests_are_those_of_the_format(
    compiled: Any, use: Callable[[Any], None], data: bytes
) -> None:
    use(compiled)
    buffer = memoryview(mmap.mmap(-1, CHUNK))
    buffer[:] = os.urandom(CHUNK)
    buffer[: len(data)] = data
    found = digests.digest(MULTILINEAR64, CHUNK, buffer, len(data))
    assert found == digester(MULTILINEAR64, CHUNK)(data)
    assert bytes(buffer[: len(data)]) == data


@pytest.mark.parametrize("algorithm", [MULTILINEAR64, "sha256"])
def test_without_compiled_code_numpy_does_it(use: Callable[[Any], None], algorithm: str) -> None:
    use(None)
    buffer = memoryview(mmap.mmap(-1, CHUNK))
    buffer[:] = data = os.urandom(CHUNK)
    assert digests.digest(algorithm, CHUNK, buffer, CHUNK) == digester(algorithm, CHUNK)(data)


def test_other_algorithms_are_not_taken_by_compiled_code(
    compiled: Any, use: Callable[[Any], None]
) -> None:
    use(compiled)
    buffer = memoryview(mmap.mmap(-1, CHUNK))
    found = digests.digest("sha256", CHUNK, buffer, CHUNK)
    assert found == digester("sha256", CHUNK)(bytes(CHUNK))


def test_a_library_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert digests.compiled(tmp_path / "none.so") is None
