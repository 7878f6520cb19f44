"""How a part is cut for the GPU; needs none."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace_loader.backends import PartSource
from headrace_loader.cuda.runs import PIECE_BYTES, RUN_BYTES, Run, cut, padded

MIB = 1024 * 1024


def runs(nbytes: int, chunk_bytes: int, threads: int = 2) -> list[Run]:
    """The runs of a part that comes after one of seven chunks, which is left out."""
    files: list[Any] = []
    for size in (7 * chunk_bytes, nbytes):
        digests = ("0" * 16,) * -(-size // chunk_bytes)
        source = PartSource(Path("part"), 4096, size, chunk_bytes, "multilinear64", digests)
        files.append(SimpleNamespace(source=source))
    return [run for run in cut(files, [1 << 50, 1 << 40], threads) if run.file is files[1]]


@pytest.mark.parametrize(
    ("nbytes", "chunk_bytes"),
    [(1, 4096), (100 * MIB + 3, 4 * MIB), (65 * MIB, 4096), (200 * MIB, 64 * MIB), (9, 8192)],
)
def test_runs_cover_every_byte_once_and_begin_at_chunks(nbytes: int, chunk_bytes: int) -> None:
    end = 0
    for run in runs(nbytes, chunk_bytes):
        assert run.begin == end
        assert run.begin == (run.index - 7) * chunk_bytes
        assert run.pointer == (1 << 40) + run.begin
        for begin, piece_end, pointer in run.pieces():
            assert begin == end
            assert pointer == (1 << 40) + begin
            assert 0 < piece_end - begin <= PIECE_BYTES
            end = piece_end
        assert run.end == end
    assert end == nbytes


def test_runs_get_shorter_towards_the_end() -> None:
    sizes = [run.end - run.begin for run in runs(1000 * MIB, 4 * MIB, 4)]
    assert sizes[0] == RUN_BYTES
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 4 * MIB


@pytest.mark.parametrize(("size", "expected"), [(0, 0), (1, 8), (8, 8), (9, 16)])
def test_padding_fills_words(size: int, expected: int) -> None:
    assert padded(size) == expected
