"""Element conversions against torch, bit for bit."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace_checkpoint.convert import STORAGE, convert

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
PAIRS = list(itertools.product(TORCH, repeat=2))


def torch_bits(array, source, target):
    """What torch makes of the same bits, as unsigned integers."""
    width = {2: np.int16, 4: np.int32}
    raw = torch.from_numpy(array.view(width[array.itemsize])).view(TORCH[source])
    signed = {2: torch.int16, 4: torch.int32}[STORAGE[target].itemsize]
    result = raw.to(TORCH[target]).view(signed).numpy()
    return result.view(f"u{result.itemsize}")


def our_bits(array, source, target):
    result = np.ascontiguousarray(convert(array, source, target))
    assert result.dtype == STORAGE[target]
    return result.view(f"u{result.itemsize}")


@pytest.mark.parametrize(("source", "target"), [pair for pair in PAIRS if pair[0] != "F32"])
def test_every_16_bit_value(source, target):
    array = np.arange(65536, dtype=np.uint16).view(STORAGE[source])
    np.testing.assert_array_equal(
        our_bits(array, source, target), torch_bits(array, source, target)
    )


@pytest.mark.parametrize("target", ["BF16", "F16"])
def test_float32_over_its_whole_range(target):
    """Every upper half with lower halves around the rounding points of both targets."""
    upper = np.arange(65536, dtype=np.uint32) << 16
    lower = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xF000, 0xFFFF]
    array = np.concatenate([upper | np.uint32(low) for low in lower]).view(np.float32)
    np.testing.assert_array_equal(our_bits(array, "F32", target), torch_bits(array, "F32", target))


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
@pytest.mark.parametrize("target", ["BF16", "F16"])
def test_any_float32(target, bits):
    array = np.array(bits, dtype=np.uint32).view(np.float32)
    np.testing.assert_array_equal(our_bits(array, "F32", target), torch_bits(array, "F32", target))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_strided_columns(source, target):
    """A column slice converts like a contiguous copy of it."""
    array = np.arange(64, dtype=np.uint32).astype(STORAGE[source]).reshape(8, 8)
    np.testing.assert_array_equal(
        our_bits(array[:, 2:5], source, target),
        our_bits(np.ascontiguousarray(array[:, 2:5]), source, target),
    )
