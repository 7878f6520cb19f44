"""How a part is cut for the GPU; needs none."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace_loader.backends import PartSource
from headrace_loader.cuda.runs import PIECE_BYTES, Run, cut, padded

MIB = 1024 * 1024


def runs(nbytes: int, chunk_bytes: int) -> list[Run]:
    digests = ("0" * 16,) * -(-nbytes // chunk_bytes)
    source = PartSource(Path("part"), 4096, nbytes, chunk_bytes, "multilinear64", digests)
    file: Any = SimpleNamespace(source=source)
    return list(cut(file, 7, 1 << 40))


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


def test_a_launch_covers_several_chunks_where_they_are_small() -> None:
    assert [run.index for run in runs(100 * MIB, 4 * MIB)] == [7, 15, 23, 31]


@pytest.mark.parametrize(("size", "expected"), [(0, 0), (1, 8), (8, 8), (9, 16)])
def test_padding_fills_words(size: int, expected: int) -> None:
    assert padded(size) == expected
