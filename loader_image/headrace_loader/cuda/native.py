"""The compiled inner loop of lanes, mover.c, where the loader was built with a C compiler."""

import ctypes
from ctypes import POINTER, c_int, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

LIBRARY = Path(__file__).with_name("mover.so")

_BUFFERS = 2


class Lane(ctypes.Structure):
    """struct lane of mover.c; keep alive what it points to."""

    _fields_ = (
        ("event_query", c_void_p),
        ("event_record", c_void_p),
        ("copy_to_device", c_void_p),
        ("stream", c_void_p),
        ("buffer", c_void_p * _BUFFERS),
        ("event", c_void_p * _BUFFERS),
        ("piece", c_size_t),
        ("next", c_size_t),
    )


@cache
def mover(library: Path = LIBRARY) -> Any:  # noqa: ANN401 - ctypes has no type for it
    """Return headrace_move(lane, file, offset, size, pointer) -> 0 if all went well, or None.

    It runs without the interpreter's lock.
    """
    try:
        function = ctypes.CDLL(str(library)).headrace_move
    except OSError:
        return None
    function.argtypes = (POINTER(Lane), c_int, c_int64, c_size_t, c_uint64)
    return function
