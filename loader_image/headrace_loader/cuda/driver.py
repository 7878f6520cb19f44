"""The few CUDA driver calls the loader needs, checked and typed.

Everything here is the driver's C interface, called through ctypes: no runtime library, no torch,
nothing to install beside the driver. Calls that wait release the interpreter's lock; calls
that only queue work keep it, because getting it back can cost more than they do. One process
uses one device; its primary context exists only while the process lives, memory exported as a
file descriptor lives on without it.

Importing it raises ImportError where there is no driver, or one that lacks a call. Numbers are of
cuda.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import time
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headrace_loader.errors import GpuFailed

if TYPE_CHECKING:
    from collections.abc import Callable

try:
    _library = ctypes.CDLL("libcuda.so.1")
    _library_keeping_lock = ctypes.PyDLL("libcuda.so.1")
except OSError as missing:
    raise ImportError(str(missing)) from None

_OUT_OF_MEMORY = 2
_NO_BINARY, _INVALID_PTX, _UNSUPPORTED_PTX = 209, 218, 222
_NOT_READY = 600
_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED
_ON_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_READ_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE
_RECOMMENDED = 1  # CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
_RDMA_WITH_VMM = 110  # CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_EVENT_POLL_SECONDS = 20e-6
_PCI_BUS_ID_BYTES = 32
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, since Linux 5.14
POSIX_FD = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

u64 = ctypes.c_ulonglong
"""A CUdeviceptr, a CUmemGenericAllocationHandle, or a size in a kernel's arguments."""


class CudaError(GpuFailed):
    """A driver call failed; the attributes tell causes that a user can mend."""

    def __init__(self, call: str, code: int) -> None:
        self.out_of_memory = code == _OUT_OF_MEMORY
        self.no_code = code in (_NO_BINARY, _INVALID_PTX, _UNSUPPORTED_PTX)
        name = c_char_p()
        _library.cuGetErrorName(c_int(code), byref(name))
        super().__init__(f"{call}: {name.value.decode() if name.value else code}")


def _check(code: int, function: Any, _: object) -> None:  # noqa: ANN401 - ctypes has no type for it
    if code:
        raise CudaError(function.__name__, code)


def bind(name: str, *kinds: Any, queues: bool = False) -> Any:  # noqa: ANN401 - as above
    """Return a driver function that takes arguments of `kinds` and raises CudaError.

    `queues` tells that it only queues work and never waits for the device.
    """
    try:
        function = getattr(_library_keeping_lock if queues else _library, name)
    except AttributeError:
        raise ImportError(f"the NVIDIA driver is too old: it has no {name}") from None
    function.argtypes = kinds
    function.errcheck = _check
    return function


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", c_int), ("id", c_int))


class _AllocationFlags(ctypes.Structure):
    _fields_ = (
        ("compression", c_ubyte),
        ("gpu_direct_rdma", c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", c_ubyte * 4),
    )


class _AllocationProperties(ctypes.Structure):
    _fields_ = (
        ("type", c_int),
        ("handle_types", c_int),
        ("location", Location),
        ("win32", c_void_p),
        ("flags", _AllocationFlags),
    )


class AccessDescription(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", c_int))


_properties = POINTER(_AllocationProperties)
_init = bind("cuInit", c_uint)
_device_get = bind("cuDeviceGet", POINTER(c_int), c_int)
_device_uuid = bind("cuDeviceGetUuid_v2", c_char * 16, c_int)
_device_pci_bus_id = bind("cuDeviceGetPCIBusId", c_char_p, c_int, c_int)
_device_attribute = bind("cuDeviceGetAttribute", POINTER(c_int), c_int, c_int)
_context_retain = bind("cuDevicePrimaryCtxRetain", POINTER(c_void_p), c_int)
_context_use = bind("cuCtxSetCurrent", c_void_p, queues=True)
_context_synchronize = bind("cuCtxSynchronize")
_memory_info = bind("cuMemGetInfo_v2", POINTER(c_size_t), POINTER(c_size_t))
_granularity = bind("cuMemGetAllocationGranularity", POINTER(c_size_t), _properties, c_int)
_create = bind("cuMemCreate", POINTER(u64), c_size_t, _properties, u64)
_release = bind("cuMemRelease", u64)
_export = bind("cuMemExportToShareableHandle", POINTER(c_int), u64, c_int, u64)
_reserve = bind("cuMemAddressReserve", POINTER(u64), c_size_t, c_size_t, u64, u64)
_free_address = bind("cuMemAddressFree", u64, c_size_t)
_map = bind("cuMemMap", u64, c_size_t, c_size_t, u64, u64)
_unmap = bind("cuMemUnmap", u64, c_size_t)
_set_access = bind("cuMemSetAccess", u64, c_size_t, POINTER(AccessDescription), c_size_t)
_host_register = bind("cuMemHostRegister_v2", c_void_p, c_size_t, c_uint)
_host_alloc = bind("cuMemHostAlloc", POINTER(c_void_p), c_size_t, c_uint)
_host_free = bind("cuMemFreeHost", c_void_p)
_alloc = bind("cuMemAlloc_v2", POINTER(u64), c_size_t)
_free = bind("cuMemFree_v2", u64)
_clear = bind("cuMemsetD8_v2", u64, c_ubyte, c_size_t)
_stream_create = bind("cuStreamCreate", POINTER(c_void_p), c_uint)
_stream_synchronize = bind("cuStreamSynchronize", c_void_p)
_copy_async = bind("cuMemcpyHtoDAsync_v2", u64, c_void_p, c_size_t, c_void_p, queues=True)
_copy_back = bind("cuMemcpyDtoHAsync_v2", c_void_p, u64, c_size_t, c_void_p, queues=True)
_clear_async = bind("cuMemsetD8Async", u64, c_ubyte, c_size_t, c_void_p, queues=True)
_event_create = bind("cuEventCreate", POINTER(c_void_p), c_uint)
_event_record = bind("cuEventRecord", c_void_p, c_void_p, queues=True)
_event_query = _library_keeping_lock.cuEventQuery
_event_query.argtypes = (c_void_p,)
_load_module = bind("cuModuleLoadData", POINTER(c_void_p), c_char_p)
_get_function = bind("cuModuleGetFunction", POINTER(c_void_p), c_void_p, c_char_p)
_launch = bind(
    "cuLaunchKernel",
    *(c_void_p, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint),
    *(c_void_p, POINTER(c_void_p), c_void_p),
    queues=True,
)


@dataclass(frozen=True)
class Allocation:
    """Device memory mapped read-write into this process; `size` is a multiple of 2 MiB."""

    handle: u64
    pointer: int
    size: int

    def export(self) -> int:
        """Return a new file descriptor that keeps the memory alive and lets others map it."""
        descriptor = c_int()
        _export(byref(descriptor), self.handle, POSIX_FD, 0)
        return descriptor.value

    def release(self) -> None:
        """Unmap it here; exported descriptors keep the memory."""
        _unmap(self.pointer, self.size)
        _free_address(self.pointer, self.size)
        _release(self.handle)


class Device:
    """One GPU with its primary context, current in the thread that opened it.

    `found` is called when its name is known, before the context is made, which takes longest.
    """

    def __init__(self, ordinal: int = 0, found: Callable[[Device], None] | None = None) -> None:
        _init(0)
        device = c_int()
        _device_get(byref(device), ordinal)
        self.ordinal = device.value
        if found is not None:
            found(self)
        self._context = c_void_p()
        _context_retain(byref(self._context), self.ordinal)
        self.use()

    @property
    def uuid(self) -> str:
        """GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx, as nvidia-smi prints it."""
        octets = (c_char * 16)()
        _device_uuid(octets, self.ordinal)
        h = octets.raw.hex()
        return f"GPU-{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"

    @property
    def pci_bus_id(self) -> str:
        """domain:bus:device.function in hexadecimal."""
        name = ctypes.create_string_buffer(_PCI_BUS_ID_BYTES)
        _device_pci_bus_id(name, len(name), self.ordinal)
        return name.value.decode()

    def use(self) -> None:
        """Make the context current in the calling thread."""
        _context_use(self._context)

    def free_bytes(self) -> int:
        """Return the free memory of the device in bytes."""
        free, total = c_size_t(), c_size_t()
        _memory_info(byref(free), byref(total))
        return free.value

    def allocate(self, size: int) -> Allocation:
        """Allocate at least `size` bytes that can be exported, and map them read-write."""
        rdma = c_int()
        _device_attribute(byref(rdma), _RDMA_WITH_VMM, self.ordinal)
        location = Location(_ON_DEVICE, self.ordinal)
        flags = _AllocationFlags(gpu_direct_rdma=rdma.value)
        properties = _AllocationProperties(_PINNED, POSIX_FD, location, None, flags)
        granularity, handle = c_size_t(), u64()
        _granularity(byref(granularity), byref(properties), _RECOMMENDED)
        size = -(-size // granularity.value) * granularity.value
        _create(byref(handle), size, byref(properties), 0)
        return Allocation(handle, self.map(handle, size, _READ_WRITE), size)

    def map(self, handle: u64, size: int, access: int) -> int:
        """Map memory into this process and return its address."""
        pointer = u64()
        _reserve(byref(pointer), size, 0, 0, 0)
        _map(pointer, size, 0, handle, 0)
        description = AccessDescription(Location(_ON_DEVICE, self.ordinal), access)
        _set_access(pointer, size, byref(description), 1)
        return pointer.value


class Stream:
    """Asynchronous work of one thread."""

    def __init__(self) -> None:
        self.handle = c_void_p()
        _stream_create(byref(self.handle), _NON_BLOCKING)

    def copy_to_device(self, destination: int, source: int, size: int) -> None:
        """Queue a copy of `size` bytes from pinned host memory."""
        _copy_async(destination, source, size, self.handle)

    def clear(self, pointer: int, size: int) -> None:
        """Queue zeroing of `size` bytes of device memory."""
        _clear_async(pointer, 0, size, self.handle)

    def synchronize(self) -> None:
        """Wait until everything queued is done."""
        _stream_synchronize(self.handle)


class Event:
    """A point in a stream that a thread can wait for.

    Waiting polls: an event that wakes its waiter costs an interrupt whether anybody waits or not.
    """

    def __init__(self) -> None:
        self.handle = c_void_p()
        _event_create(byref(self.handle), _NO_TIMING)

    def record(self, stream: Stream) -> None:
        """Mark the work queued in `stream` so far."""
        _event_record(self.handle, stream.handle)

    def wait(self) -> None:
        """Wait for the marked work; returns at once when nothing was marked."""
        while code := _event_query(self.handle):
            if code != _NOT_READY:
                raise CudaError("cuEventQuery", code)
            time.sleep(_EVENT_POLL_SECONDS)


class HostBuffer:
    """Host memory that is there already and becomes page-locked by `pin`.

    Made while the device is being opened: clearing the pages takes longer than locking them.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # only faster
            memory.madvise(mmap.MADV_HUGEPAGE)
            memory.madvise(_POPULATE_WRITE)
        self.view = memoryview(memory)
        self.address = ctypes.addressof(c_ubyte.from_buffer(memory))

    def pin(self) -> None:
        """Page-lock it until the process ends; copies then run at the link's full rate."""
        _host_register(self.address, self.size, 0)


def address(name: str) -> int:
    """Return the address of a driver function, for other native code to call."""
    return int(ctypes.cast(getattr(_library, name), c_void_p).value or 0)


class Words:
    """64-bit words on the device, zero at first."""

    def __init__(self, count: int) -> None:
        pointer = u64()
        _alloc(byref(pointer), count * ctypes.sizeof(u64))
        self.pointer = int(pointer.value)
        _clear(self.pointer, 0, count * ctypes.sizeof(u64))
        copy = c_void_p()
        _host_alloc(byref(copy), count * ctypes.sizeof(u64), 0)
        self._copy = (u64 * count).from_address(copy.value or 0)
        # It only queues the clearing, and the streams of other threads do not wait for it.
        _context_synchronize()

    def take(self, stream: Stream) -> list[int]:
        """Return their values as they are when the work queued in `stream` is done."""
        # Into memory that is not pinned the driver copies twice, and behind a wait.
        _copy_back(self._copy, self.pointer, ctypes.sizeof(self._copy), stream.handle)
        stream.synchronize()
        return list(self._copy)

    def free(self) -> None:
        """Give the memory back."""
        _free(self.pointer)
        _host_free(self._copy)


class Kernel:
    """A function of a module: `image` is PTX or machine code, `kinds` the types it takes."""

    def __init__(self, image: bytes, name: str) -> None:
        module = c_void_p()
        self._function = c_void_p()
        _load_module(byref(module), image)
        _get_function(byref(self._function), module, name.encode())

    @property
    def handle(self) -> int:
        """The function, for compiled code to launch."""
        return self._function.value or 0

    def launch(
        self, stream: Stream, blocks: tuple[int, int], threads: int, arguments: tuple[int, ...]
    ) -> None:
        """Queue it with `blocks` in x and y; every argument is a 64-bit number or address."""
        values = (u64 * len(arguments))(*arguments)
        begin, step = ctypes.addressof(values), ctypes.sizeof(u64)
        addresses = (c_void_p * len(arguments))(*range(begin, begin + len(arguments) * step, step))
        _launch(self._function, *blocks, 1, threads, 1, 1, 0, stream.handle, addresses, None)
