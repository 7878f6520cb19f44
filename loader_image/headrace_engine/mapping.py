"""Maps a region of host memory read-only into this process and makes tensors of it."""

import ctypes
import mmap
import os

import numpy as np
import torch

from headrace_engine.errors import WeightsMismatch
from headrace_handover import MappableRegion


class HostMapping:
    """A region mapped PROT_READ: a write through it is a segmentation fault.

    Tensors made of it keep it mapped.
    """

    def __init__(self, item: MappableRegion) -> None:
        nbytes = item.region.nbytes
        size = os.fstat(item.descriptor).st_size
        if size < nbytes:  # pages beyond the end would be a bus error on first use
            raise WeightsMismatch(
                f"part {item.region.part}: its memory has {size} bytes: the loader says {nbytes}"
            )
        self._nbytes = nbytes
        self._memory = mmap.mmap(item.descriptor, nbytes, prot=mmap.PROT_READ)
        self.address = int(np.frombuffer(self._memory, np.uint8).ctypes.data)

    def octets(self) -> torch.Tensor:
        """Return the region as bytes; storages that are parts of its storage keep it mapped.

        torch has no read-only tensors and warns about read-only buffers; a ctypes array at the same
        address does not know. The page protection is what forbids writing.
        """
        array = (ctypes.c_uint8 * self._nbytes).from_address(self.address)
        # The tensor keeps the array, the array keeps the mapping.
        array.mapping = self  # type: ignore[attr-defined]
        return torch.frombuffer(array, dtype=torch.uint8)
