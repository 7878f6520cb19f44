"""Digests of chunks in buffers of this process: by compiled code, digest.c, or by numpy."""

import ctypes
from ctypes import c_size_t, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from headrace_checkpoint.manifest import MULTILINEAR64

LIBRARY = Path(__file__).with_name("digest.so")
_WORD = 8


def digest(algorithm: str, chunk_bytes: int, buffer: memoryview, size: int) -> str:
    """Return the hex digest of the first `size` bytes of `buffer`, which holds a whole chunk.

    With compiled code the word in which they end is filled with zeros.
    """
    functions = compiled()
    if functions is not None and algorithm == MULTILINEAR64:
        words = -(-size // _WORD)
        buffer[size : words * _WORD] = bytes(words * _WORD - size)
        data = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        found = functions.headrace_digest(data, _multipliers(chunk_bytes // _WORD), words)
        return f"{found:016x}"
    from headrace_checkpoint.digest import digester  # it imports numpy, which takes a while

    return digester(algorithm, chunk_bytes)(buffer[:size])


@cache
def compiled(library: Path = LIBRARY) -> Any:  # noqa: ANN401 - functions of a library have no type
    """Return the compiled functions, None where the loader was built without a C compiler."""
    try:
        functions = ctypes.CDLL(str(library))
    except OSError:
        return None
    functions.headrace_multipliers.argtypes = (c_void_p, c_size_t)
    functions.headrace_multipliers.restype = None
    functions.headrace_digest.argtypes = (c_void_p, c_void_p, c_size_t)
    functions.headrace_digest.restype = c_uint64
    return functions


@cache
def _multipliers(words: int) -> ctypes.Array[c_uint64]:
    table = (c_uint64 * words)()
    compiled().headrace_multipliers(table, words)
    return table
