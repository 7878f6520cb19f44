"""The compiled load from the page cache, mover.c, where the loader was built with a C compiler."""

import ctypes
from ctypes import POINTER, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

LIBRARY = Path(__file__).with_name("mover.so")

CALLS = (
    "cuCtxSetCurrent",
    "cuEventQuery",
    "cuEventRecord",
    "cuMemcpyHtoDAsync_v2",
    "cuLaunchKernel",
)
"""The driver's functions that it is handed, in the order of Load's first fields."""
_BUFFERS = 2


class Run(ctypes.Structure):
    """struct run of mover.c: what to move, and whether it was."""

    _fields_ = (
        ("offset", c_int64),
        ("size", c_uint64),
        ("pointer", c_uint64),
        ("chunk_bytes", c_uint64),
        ("digests", c_uint64),
        ("file", c_int32),
        ("done", c_int32),
    )


class Lane(ctypes.Structure):
    """struct lane of mover.c; keep alive what it points to."""

    _fields_ = (
        ("stream", c_void_p),
        ("buffer", c_void_p * _BUFFERS),
        ("event", c_void_p * _BUFFERS),
    )


class Load(ctypes.Structure):
    """struct load of mover.c; keep alive what it points to."""

    _fields_ = (
        ("context_use", c_void_p),
        ("event_query", c_void_p),
        ("event_record", c_void_p),
        ("copy_to_device", c_void_p),
        ("launch", c_void_p),
        ("context", c_void_p),
        ("kernel", c_void_p),
        ("runs", POINTER(Run)),
        ("lanes", POINTER(Lane)),
        ("run_count", c_uint64),
        ("lane_count", c_uint64),
        ("piece", c_uint64),
        ("blocks", c_uint64),
        ("threads", c_uint64),
        ("next_run", c_uint64),
        ("next_lane", c_uint64),
        ("moved", c_uint64),
        ("failed", c_uint64),
    )


@cache
def mover(library: Path = LIBRARY) -> Any:  # noqa: ANN401 - ctypes has no type for it
    """Return headrace_load(Load), or None.

    It runs without the interpreter's lock, for the whole load.
    """
    try:
        function = ctypes.CDLL(str(library)).headrace_load
    except OSError:
        return None
    function.argtypes, function.restype = (POINTER(Load),), None
    return function
