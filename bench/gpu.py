"""The engine's side of GPU memory, and the link's limit: what benches and tests need of CUDA."""

from __future__ import annotations

import ctypes
import sys
import time

from headrace_loader.cuda.driver import (
    POSIX_FD,
    Allocation,
    Device,
    HostBuffer,
    Stream,
    bind,
    u64,
)

READ_ONLY = 1  # CU_MEM_ACCESS_FLAGS_PROT_READ
GIB = 1 << 30

_import = bind("cuMemImportFromShareableHandle", ctypes.POINTER(u64), ctypes.c_void_p, ctypes.c_int)
_copy_to_host = bind("cuMemcpyDtoH_v2", ctypes.c_void_p, u64, ctypes.c_size_t)


def map_read_only(device: Device, descriptor: int, size: int) -> Allocation:
    """Map memory that another process exported."""
    handle = u64()
    _import(ctypes.byref(handle), descriptor, POSIX_FD)
    return Allocation(handle, device.map(handle, size, READ_ONLY), size)


def content(pointer: int, size: int) -> bytes:
    """Copy device memory back."""
    buffer = ctypes.create_string_buffer(size)
    _copy_to_host(buffer, pointer, size)
    return buffer.raw


class Link:
    """Copies from pinned memory with nothing else to do: the limit of any load."""

    _PINNED = 256 << 20
    _TARGET = 1 << 30

    def __init__(self, device: Device) -> None:
        self._target = device.allocate(self._TARGET)
        self._pinned = HostBuffer(self._PINNED)
        self._pinned.pin()
        self._stream = Stream()

    def rate(self, nbytes: int) -> float:
        """Copy `nbytes` and return GiB/s."""
        begin = time.perf_counter()
        for done in range(0, nbytes, self._PINNED):
            size = min(self._PINNED, nbytes - done)
            target = self._target.pointer + done % self._TARGET
            self._stream.copy_to_device(target, self._pinned.address, size)
        self._stream.synchronize()
        return nbytes / GIB / (time.perf_counter() - begin)


def serve_link() -> None:
    """Copy as many bytes as each line of standard input says; answer with GiB/s."""
    link = Link(Device())
    print("ready", flush=True)
    for line in sys.stdin:
        print(link.rate(int(line)), flush=True)


if __name__ == "__main__":
    serve_link()
