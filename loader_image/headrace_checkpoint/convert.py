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
}
"""The numpy type that holds each supported element type."""

# What torch's x86 kernels make of any NaN, by source; other devices choose other payloads.
_BF16_NAN = {"F32": np.uint16(0xFFFF), "F16": np.uint16(0x7FC0)}
_F16_QUIET_NAN = 0x7E00
_F32_QUIET_BIT = np.uint32(0x0040_0000)


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
