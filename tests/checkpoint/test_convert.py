"""Element conversions against torch, bit for bit."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace_checkpoint.convert import STORAGE, convert, fp8_elements, fp8_scales, transpose

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


@given(st.integers(1, 200), st.integers(1, 9))
def test_transposed_in_strips(rows, columns):
    matrix = np.arange(rows * (columns + 1), dtype=np.uint16).reshape(rows, -1)[:, :columns]
    found = transpose(matrix)
    np.testing.assert_array_equal(found, matrix.T)
    assert found.flags.c_contiguous


def torch_fp8(array, source):
    """What vLLM's _fp8_channel_scale and _fp8_quant_per_channel compute, in torch."""
    width = {2: np.int16, 4: np.int32}[array.itemsize]
    weight = torch.from_numpy(np.ascontiguousarray(array).view(width)).view(TORCH[source])
    largest = torch.tensor(448.0)
    scale = weight.abs().amax(dim=-1, keepdim=True).to(torch.float32) / largest
    scale = scale.clamp_min(1.0 / (largest * 512))
    quantized = (weight / scale).clamp_(-448.0, 448.0).to(torch.float8_e4m3fn)
    return quantized.view(torch.uint8).numpy(), scale.numpy()


@pytest.mark.parametrize("source", TORCH)
def test_fp8_of_numbers_all_over_the_range(source):
    """Rows whose largest is 448 have scale 1, so that every rounding point is met."""
    steps = np.arange(0, 449, 1 / 64, dtype=np.float32)
    small = np.arange(-64, 65, dtype=np.float32) * 2.0**-12
    row = np.concatenate([[448.0], steps, -steps, small, steps * 2.0**-8]).astype(np.float32)
    array = np.vstack([row, row * 3, row * 1e-30, row * 0])
    array = convert(array, "F32", source)
    elements, scales = torch_fp8(array, source)
    np.testing.assert_array_equal(fp8_scales(array, source), scales)
    np.testing.assert_array_equal(fp8_elements(array, source), elements)


@given(bits=st.lists(st.integers(0, 0xFFFF).filter(lambda b: b & 0x7F80 != 0x7F80), min_size=1))
def test_fp8_of_any_finite_bfloat16(bits):
    array = np.array([bits], dtype=np.uint16)
    elements, scales = torch_fp8(array, "BF16")
    np.testing.assert_array_equal(fp8_scales(array, "BF16"), scales)
    np.testing.assert_array_equal(fp8_elements(array, "BF16"), elements)
