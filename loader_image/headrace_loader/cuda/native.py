"""The compiled load from the page cache, mover.c, where the loader was built with a C compiler."""

import ctypes
from ctypes import POINTER, c_char, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path

LIBRARY = Path(__file__).with_name("mover.so")

CALLS = (
    "cuEventQuery",
    "cuEventRecord",
    "cuStreamWaitEvent",
    "cuMemcpyHtoDAsync_v2",
    "cuLaunchKernel",
)
"""The driver's functions that it is handed, in the order of Load's first fields."""
_CACHE_LINE = 64


class Run(ctypes.Structure):
    """struct run of mover.c: what to move, and whether it was."""

    _fields_ = (
        ("offset", c_int64),
        ("size", c_uint64),
        ("pointer", c_uint64),
        ("chunk_bytes", c_uint64),
        ("digests", c_uint64),
        ("left", c_uint64),
        ("file", c_int32),
        ("done", c_int32),
    )


class Slot(ctypes.Structure):
    """struct slot of mover.c: pinned memory for a block; keep alive what it points to."""

    _fields_ = (
        ("buffer", c_void_p),
        ("event", c_void_p),
        ("run", POINTER(Run)),
        ("begin", c_uint64),
        ("size", c_uint64),
        ("left", c_uint64),
        ("copying", c_int32),
        ("apart", c_char * _CACHE_LINE),
    )


class Load(ctypes.Structure):
    """struct load of mover.c; keep alive what it points to."""

    _fields_ = (
        ("event_query", c_void_p),
        ("event_record", c_void_p),
        ("stream_wait", c_void_p),
        ("copy_to_device", c_void_p),
        ("launch", c_void_p),
        ("kernel", c_void_p),
        ("copies", c_void_p),
        ("digests", c_void_p),
        ("runs", POINTER(Run)),
        ("slots", POINTER(Slot)),
        ("run_count", c_uint64),
        ("slot_count", c_uint64),
        ("thread_count", c_uint64),
        ("slot_bytes", c_uint64),
        ("piece_bytes", c_uint64),
        ("blocks", c_uint64),
        ("threads", c_uint64),
        ("apart", c_char * _CACHE_LINE),
        ("locked", c_uint64),
        ("next_run", c_uint64),
        ("next_begin", c_uint64),
        ("next_bytes", c_uint64),
        ("opened", c_uint64),
        ("taken", c_uint64),
        ("all_open", c_uint64),
        ("apart_too", c_char * _CACHE_LINE),
        ("running", c_uint64),
        ("started", c_uint64),
        ("woken", c_uint64),
        ("ready", c_uint64),
        ("begun", c_uint64),
        ("moved", c_uint64),
        ("failed", c_uint64),
        ("released", c_uint64),
        ("present", c_uint64),
    )


class Mover:
    """The library's functions. They run without the interpreter's lock.

    Raises:
        OSError: there is no such library, or it was compiled of other sources.
    """

    def __init__(self, library: Path) -> None:
        functions = ctypes.CDLL(str(library))
        _check_sizes(functions, library)
        self._prepare, self._load = functions.headrace_prepare, functions.headrace_load
        self._wake, self._release = functions.headrace_wake, functions.headrace_release
        for function in (self._prepare, self._wake, self._load, self._release):
            function.argtypes, function.restype = (POINTER(Load),), None

    def prepare(self, load: Load) -> None:
        """Start the threads, which wait for `load` to be called, and then for `release`."""
        self._prepare(load)

    def wake(self, load: Load) -> None:
        """Wait until all threads are there; they sleep again if `load` is not called soon."""
        self._wake(load)

    def load(self, load: Load) -> None:
        """Move all runs."""
        self._load(load)

    def release(self, load: Load) -> None:
        """End the threads, once what `load` queued is done."""
        self._release(load)


def _check_sizes(functions: ctypes.CDLL, library: Path) -> None:
    """Raise OSError where it was compiled of other sources, and would read other fields."""
    mirrored = [ctypes.sizeof(structure) for structure in (Load, Run, Slot)]
    try:
        sizes = list((c_uint64 * len(mirrored)).in_dll(functions, "headrace_sizes"))
    except ValueError:
        sizes = []
    if sizes != mirrored:
        raise OSError(f"{library} was compiled of other sources; install the package again")


@cache
def mover(library: Path = LIBRARY) -> Mover | None:
    """Return the compiled code, None where there is none."""
    try:
        return Mover(library)
    except OSError:
        return None
