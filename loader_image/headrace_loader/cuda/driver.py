"""The few CUDA driver calls the loader needs, checked and typed.

Everything here is the driver API through cuda-bindings: no runtime library, no torch. One process
uses one device; its primary context exists only while the process lives, memory exported
as a file descriptor lives on without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cuda.bindings import driver as cu

POSIX_FD = cu.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_OUT_OF_MEMORY = cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY


class CudaError(Exception):
    """A driver call failed; `out_of_memory` tells the one cause a user can mend."""

    def __init__(self, call: str, code: object) -> None:
        self.out_of_memory = code == _OUT_OF_MEMORY
        super().__init__(f"{call}: {getattr(code, 'name', code)}")


def check(call: str, result: tuple[Any, ...]) -> Any:  # noqa: ANN401 - cuda-bindings has no types
    """Return what a driver call returned beside its status; raise CudaError unless it succeeded."""
    code, *values = result
    if code != cu.CUresult.CUDA_SUCCESS:
        raise CudaError(call, code)
    return values[0] if len(values) == 1 else tuple(values)


@dataclass(frozen=True)
class Allocation:
    """Device memory mapped read-write into this process; `size` is a multiple of 2 MiB."""

    handle: Any
    pointer: int
    size: int

    def export(self) -> int:
        """Return a new file descriptor that keeps the memory alive and lets others map it."""
        fd: int = check(
            "cuMemExportToShareableHandle",
            cu.cuMemExportToShareableHandle(self.handle, POSIX_FD, 0),
        )
        return fd

    def release(self) -> None:
        """Unmap it here; exported descriptors keep the memory."""
        check("cuMemUnmap", cu.cuMemUnmap(self.pointer, self.size))
        check("cuMemAddressFree", cu.cuMemAddressFree(self.pointer, self.size))
        check("cuMemRelease", cu.cuMemRelease(self.handle))


class Device:
    """One GPU with its primary context, current in the thread that opened it."""

    def __init__(self, ordinal: int = 0) -> None:
        check("cuInit", cu.cuInit(0))
        self.device = check("cuDeviceGet", cu.cuDeviceGet(ordinal))
        self.context = check("cuDevicePrimaryCtxRetain", cu.cuDevicePrimaryCtxRetain(self.device))
        self.use()

    @property
    def uuid(self) -> str:
        """GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx, as nvidia-smi prints it."""
        h = check("cuDeviceGetUuid", cu.cuDeviceGetUuid(self.device)).bytes.hex()
        return f"GPU-{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"

    def use(self) -> None:
        """Make the context current in the calling thread."""
        check("cuCtxSetCurrent", cu.cuCtxSetCurrent(self.context))

    def free_bytes(self) -> int:
        """Return the free memory of the device in bytes."""
        return int(check("cuMemGetInfo", cu.cuMemGetInfo())[0])

    def _properties(self) -> Any:  # noqa: ANN401 - cuda-bindings has no types
        properties = cu.CUmemAllocationProp()
        properties.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.requestedHandleTypes = POSIX_FD
        properties.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = int(self.device)
        attribute = (
            cu.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED
        )
        supported = check("cuDeviceGetAttribute", cu.cuDeviceGetAttribute(attribute, self.device))
        properties.allocFlags.gpuDirectRDMACapable = int(supported)
        return properties

    def allocate(self, size: int) -> Allocation:
        """Allocate at least `size` bytes that can be exported, and map them read-write."""
        properties = self._properties()
        flag = cu.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        granularity = check(
            "cuMemGetAllocationGranularity", cu.cuMemGetAllocationGranularity(properties, flag)
        )
        size = -(-size // granularity) * granularity
        handle = check("cuMemCreate", cu.cuMemCreate(size, properties, 0))
        pointer = check("cuMemAddressReserve", cu.cuMemAddressReserve(size, 0, 0, 0))
        check("cuMemMap", cu.cuMemMap(pointer, size, 0, handle, 0))
        access = cu.CUmemAccessDesc()
        access.location = properties.location
        access.flags = cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        check("cuMemSetAccess", cu.cuMemSetAccess(pointer, size, [access], 1))
        return Allocation(handle, int(pointer), size)


class Stream:
    """Asynchronous work of one thread."""

    def __init__(self) -> None:
        flag = cu.CUstream_flags.CU_STREAM_NON_BLOCKING
        self.handle = check("cuStreamCreate", cu.cuStreamCreate(flag))

    def copy_to_device(self, destination: int, source: int, size: int) -> None:
        """Queue a copy of `size` bytes from pinned host memory."""
        check(
            "cuMemcpyHtoDAsync",
            cu.cuMemcpyHtoDAsync(destination, source, size, self.handle),
        )

    def clear(self, pointer: int, size: int) -> None:
        """Queue zeroing of `size` bytes of device memory."""
        check("cuMemsetD8Async", cu.cuMemsetD8Async(pointer, 0, size, self.handle))

    def synchronize(self) -> None:
        """Wait until everything queued is done."""
        check("cuStreamSynchronize", cu.cuStreamSynchronize(self.handle))


class Event:
    """A point in a stream that a thread can wait for."""

    def __init__(self) -> None:
        flag = cu.CUevent_flags.CU_EVENT_DISABLE_TIMING
        self.handle = check("cuEventCreate", cu.cuEventCreate(flag))

    def record(self, stream: Stream) -> None:
        """Mark the work queued in `stream` so far."""
        check("cuEventRecord", cu.cuEventRecord(self.handle, stream.handle))

    def wait(self) -> None:
        """Wait for the marked work; returns at once when nothing was marked."""
        check("cuEventSynchronize", cu.cuEventSynchronize(self.handle))


class PinnedBuffer:
    """Page-locked host memory, until the process ends; copies run at the link's full rate."""

    def __init__(self, size: int) -> None:
        self.address = int(check("cuMemHostAlloc", cu.cuMemHostAlloc(size, 0)))
        self.size = size
