"""Element types by their safetensors names, with sizes in bytes. Standard library only."""

import math
from collections.abc import Sequence

ITEM_BYTES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Size in bytes of a dense tensor; `()` is a scalar. Raises KeyError for an unknown dtype."""
    return ITEM_BYTES[dtype] * math.prod(shape)
