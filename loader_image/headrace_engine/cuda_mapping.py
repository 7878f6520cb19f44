"""Maps a region of GPU memory read-only into this process and makes tensors of it.

The driver is called through ctypes. libcuda.so.1 is wherever an engine runs on a GPU, and these
calls have never changed; cuda-bindings come with some builds of torch only.
"""

import ctypes
import weakref
from contextlib import ExitStack
from functools import cache

import torch

from headrace_engine.errors import MappingFailed
from headrace_handover import MappableRegion

_POSIX_DESCRIPTOR = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_ON_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_READ = 1  # CU_MEM_ACCESS_FLAGS_PROT_READ

_U64, _SIZE = ctypes.c_uint64, ctypes.c_size_t


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (
        ("location_type", ctypes.c_int),
        ("location_id", ctypes.c_int),
        ("flags", ctypes.c_int),
    )


_CALLS = {
    "cuMemImportFromShareableHandle": (ctypes.POINTER(_U64), ctypes.c_void_p, ctypes.c_int),
    "cuMemAddressReserve": (ctypes.POINTER(_U64), _SIZE, _SIZE, _U64, _U64),
    "cuMemMap": (_U64, _SIZE, _SIZE, _U64, _U64),
    "cuMemSetAccess": (_U64, _SIZE, ctypes.POINTER(_Access), _SIZE),
    "cuMemUnmap": (_U64, _SIZE),
    "cuMemAddressFree": (_U64, _SIZE),
    "cuMemRelease": (_U64,),
    "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
}


class CudaMapping:
    """A region mapped on GPU `index` of torch: a kernel that writes to it ends the context.

    Tensors made of it keep it mapped, and what is `held` with it; the mapping keeps the memory
    allocated. Raises MappingFailed for a descriptor that is no such memory.
    """

    def __init__(self, item: MappableRegion, index: int, held: object = None) -> None:
        self._held = held
        nbytes = item.region.nbytes
        torch.cuda.synchronize(index)  # the driver wants the GPU's context to exist
        try:
            self.address, unmap = _map(item.descriptor, nbytes, index)
        except MappingFailed as error:
            raise MappingFailed(
                f"part {item.region.part}: its {nbytes} bytes cannot be mapped on GPU {index}: "
                f"{error}; loader and engine must see the same GPU"
            ) from None
        self._index, self._nbytes = index, nbytes
        # At the process's end the driver unmaps, and torch may be gone.
        weakref.finalize(self, _unmap, unmap, index).atexit = False

    def octets(self) -> torch.Tensor:
        """Return the region as bytes; storages that are parts of its storage keep it mapped."""
        return torch.as_tensor(_Octets(self, self._nbytes), device=f"cuda:{self._index}")


class _Octets:
    """A mapping as torch takes it: __cuda_array_interface__, as bytes.

    The interface has no bfloat16 and no float8, and torch refuses its read-only flag. torch keeps
    the object for as long as the storage lives.
    """

    def __init__(self, mapping: CudaMapping, nbytes: int) -> None:
        self.mapping = mapping
        self.__cuda_array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (nbytes,),
            "strides": None,
            "data": (mapping.address, False),
        }


def _map(descriptor: int, nbytes: int, index: int) -> tuple[int, ExitStack]:
    """Return the address, and what unmaps it when closed."""
    handle, address = _U64(), _U64()
    _call("cuMemImportFromShareableHandle", handle, descriptor, _POSIX_DESCRIPTOR)
    try:
        with ExitStack() as undo:
            _call("cuMemAddressReserve", address, nbytes, 0, 0, 0)
            undo.callback(_call, "cuMemAddressFree", address, nbytes)
            _call("cuMemMap", address, nbytes, 0, handle, 0)
            undo.callback(_call, "cuMemUnmap", address, nbytes)
            _call("cuMemSetAccess", address, nbytes, _Access(_ON_DEVICE, index, _READ), 1)
            return address.value, undo.pop_all()
    finally:
        _call("cuMemRelease", handle)


def _unmap(unmap: ExitStack, index: int) -> None:
    try:
        torch.cuda.synchronize(index)  # kernels that read the memory may still be running
    except RuntimeError:
        return  # the context is broken, and nothing can be unmapped in it
    unmap.close()


def _call(name: str, *arguments: object) -> None:
    driver = _driver()
    code = getattr(driver, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorName(code, text)
        raise MappingFailed(f"{name}: {(text.value or b'unknown error').decode()} ({code})")


@cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    for name, types in _CALLS.items():
        getattr(library, name).argtypes = types
    return library
