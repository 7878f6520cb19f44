"""The digest of weight data."""

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from headrace_checkpoint.digest import chunk_digest

MASK = 2**64 - 1


def splitmix64(index: int) -> int:
    z = (index + 1) * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def reference(chunk: bytes) -> str:
    """The definition, word by word in Python integers."""
    words = [chunk[i : i + 8] for i in range(0, len(chunk), 8)]
    total = sum(int.from_bytes(w, "little") * (splitmix64(i) | 1) for i, w in enumerate(words))
    return f"{total & MASK:016x}"


@given(st.binary(max_size=500))
def test_equals_its_definition(chunk: bytes) -> None:
    assert chunk_digest(chunk, 512) == reference(chunk)


@given(st.binary(min_size=1, max_size=256), st.data())
def test_any_flipped_bit_changes_it(chunk: bytes, data: st.DataObject) -> None:
    bit = data.draw(st.integers(0, 8 * len(chunk) - 1))
    flipped = bytearray(chunk)
    flipped[bit // 8] ^= 1 << bit % 8
    assert chunk_digest(flipped, 256) != chunk_digest(chunk, 256)


def test_swapped_blocks_change_it() -> None:
    chunk = random.Random(1).randbytes(8192)
    assert chunk_digest(chunk[4096:] + chunk[:4096], 8192) != chunk_digest(chunk, 8192)


def test_takes_any_buffer() -> None:
    array = np.arange(64, dtype=np.float32)
    assert chunk_digest(array.tobytes(), 256) == chunk_digest(array.view(np.uint8), 256)
    assert chunk_digest(memoryview(array).cast("B"), 256) == reference(array.tobytes())
