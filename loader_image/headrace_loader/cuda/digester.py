"""Chunk digests computed on the GPU, where the weights are."""

from __future__ import annotations

import ctypes
from importlib import resources
from typing import Any

from cuda.bindings import driver as cu

from headrace_loader.cuda.driver import Stream, check

WORD = 8
_BLOCKS, _THREADS = 64, 256


class Digester:
    """Digests of `count` chunks, filled in any order by any number of streams."""

    def __init__(self, count: int) -> None:
        image = resources.files(__package__).joinpath("digest.ptx").read_bytes() + b"\0"
        module = check("cuModuleLoadData", cu.cuModuleLoadData(image))
        self._function: Any = check(
            "cuModuleGetFunction", cu.cuModuleGetFunction(module, b"multilinear64")
        )
        self._count = count
        self._digests = int(check("cuMemAlloc", cu.cuMemAlloc(count * WORD)))
        check("cuMemsetD8", cu.cuMemsetD8(self._digests, 0, count * WORD))
        # It only queues the clearing, and the streams of the threads do not wait for it.
        check("cuCtxSynchronize", cu.cuCtxSynchronize())

    def queue(self, stream: Stream, index: int, pointer: int, size: int) -> None:
        """Queue the digest of chunk `index`: `size` bytes, a multiple of 8, at `pointer`."""
        values = (pointer, size // WORD, self._digests + index * WORD)
        kinds = (ctypes.c_void_p, ctypes.c_ulonglong, ctypes.c_void_p)
        check(
            "cuLaunchKernel",
            cu.cuLaunchKernel(
                self._function, _BLOCKS, 1, 1, _THREADS, 1, 1, 0, stream.handle, (values, kinds), 0
            ),
        )

    def results(self) -> list[str]:
        """Return the digests as 16 hex digits each; the streams must have been synchronized."""
        buffer = (ctypes.c_ulonglong * self._count)()
        address = ctypes.addressof(buffer)
        size = self._count * WORD
        check("cuMemcpyDtoH", cu.cuMemcpyDtoH(address, self._digests, size))
        check("cuMemFree", cu.cuMemFree(self._digests))
        return [f"{value:016x}" for value in buffer]
