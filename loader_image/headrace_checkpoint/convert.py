"""Conversions between floating-point element types, bit for bit as torch's `Tensor.to` does.

numpy has no bfloat16: BF16 data travels as little-endian uint16.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

STORAGE: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F8_E4M3": np.dtype("u1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
"""The numpy type that holds each supported element type."""

# What torch's x86 kernels make of any NaN, by source; other devices choose other payloads.
_BF16_NAN = {"F32": np.uint16(0xFFFF), "F16": np.uint16(0x7FC0)}
_F16_QUIET_NAN = 0x7E00
_F32_QUIET_BIT = np.uint32(0x0040_0000)


_STRIP_ROWS = 64
_FP8_MAX = np.float32(448.0)
_FP8_SMALLEST_SCALE = np.float32(1.0) / (_FP8_MAX * np.float32(512.0))
_FP8_SMALLEST_NORMAL_BITS = np.uint32(121 << 23)
_FP8_SUBNORMAL_SHIFT = np.uint32(141 << 23)


def fp8_scales(array: Array, dtype: str) -> Array:
    """Return what each row of a matrix of `dtype` is divided by to become FP8, as one column.

    The largest magnitude of the row becomes 448, the largest of E4M3, as in vLLM's
    quantization/online/fp8.py (_fp8_channel_scale). NaN and infinity stay visible.
    """
    largest = np.abs(_to_float32(array, dtype)).max(axis=1, keepdims=True)
    scales: Array = np.maximum(largest / _FP8_MAX, _FP8_SMALLEST_SCALE)
    return scales


def fp8_elements(array: Array, dtype: str) -> Array:
    """Return a matrix of `dtype` divided by its fp8_scales as E4M3, rounded to nearest even."""
    scaled = _to_float32(array, dtype) / fp8_scales(array, dtype)
    bits = np.clip(scaled, -_FP8_MAX, _FP8_MAX).view(np.uint32)
    sign = ((bits >> 24) & 0x80).astype(np.uint8)
    magnitude = bits & 0x7FFF_FFFF
    # As torch does it: a sum with a power of two whose last bit is the smallest subnormal rounds.
    shifted = magnitude.view(np.float32) + _FP8_SUBNORMAL_SHIFT.view(np.float32)
    subnormal = (shifted.view(np.uint32) - _FP8_SUBNORMAL_SHIFT).astype(np.uint8)
    odd = (magnitude >> 20) & 1
    normal = ((magnitude - np.uint32(120 << 23) + np.uint32(0x7FFFF) + odd) >> 20).astype(np.uint8)
    return np.where(magnitude < _FP8_SMALLEST_NORMAL_BITS, subnormal, normal) | sign


def finite(array: Array, dtype: str) -> bool:
    """Tell whether no element of a floating-point type is NaN or infinite."""
    return bool(np.isfinite(_to_float32(array, dtype)).all())


def convert(array: Array, source: str, target: str) -> Array:
    """Convert elements from one safetensors type to another, rounding to nearest even.

    `array` has the numpy type STORAGE[source]; the result, of the same shape and any
    strides, has STORAGE[target]. Values beyond the target's range become infinities.
    """
    if source == target:
        return array
    single = _to_float32(array, source)
    if target == "F32":
        return single
    if target == "BF16":
        return _bfloat16(single, _BF16_NAN[source])
    return _float16(single)


def transpose(matrix: Array) -> Array:
    """Return a matrix with rows and columns exchanged, dense.

    In strips, because numpy's own copy of a transposed matrix misses the cache at every element:
    a sixth of the speed at 2880 by 5760.
    """
    made = np.empty(matrix.shape[::-1], matrix.dtype)
    for row in range(0, len(matrix), _STRIP_ROWS):
        made[:, row : row + _STRIP_ROWS] = matrix[row : row + _STRIP_ROWS].T
    return made


def _to_float32(array: Array, source: str) -> Array:
    if source == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if source == "F32":
        return array
    single = array.astype(np.float32)
    nans = np.isnan(array)
    if nans.any():
        single.view(np.uint32)[nans] |= _F32_QUIET_BIT
    return single


def _bfloat16(single: Array, nan: np.uint16) -> Array:
    bits = np.ascontiguousarray(single).view(np.uint32)
    # Adding just under half of the dropped part, plus one where the kept part is odd,
    # carries into the kept part exactly when rounding to nearest even goes up.
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    rounded[np.isnan(single)] = nan
    return rounded


def _float16(single: Array) -> Array:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        half = single.astype(np.float16)
    nans = np.isnan(single)
    if nans.any():
        bits = np.ascontiguousarray(single[nans]).view(np.uint32)
        payload = ((bits >> 16) & 0x8000) | _F16_QUIET_NAN | ((bits >> 13) & 0x3FF)
        half.view(np.uint16)[nans] = payload.astype(np.uint16)
    return half
