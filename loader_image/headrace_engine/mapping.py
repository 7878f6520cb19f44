"""Maps a region of host memory read-only into this process and makes tensors of it."""

import mmap
import os
import warnings

import torch

from headrace_engine.errors import WeightsMismatch
from headrace_handover import MappableRegion


class HostMapping:
    """A region mapped PROT_READ: a write through it is a segmentation fault.

    Tensors made of it keep it mapped, and what is `held` with it.
    """

    def __init__(self, item: MappableRegion, held: object = None) -> None:
        nbytes = item.region.nbytes
        size = os.fstat(item.descriptor).st_size
        if size < nbytes:  # pages beyond the end would be a bus error on first use
            raise WeightsMismatch(
                f"part {item.region.part}: its memory has {size} bytes: the loader says {nbytes}"
            )
        self._memory = _Memory(item.descriptor, nbytes, prot=mmap.PROT_READ)
        self._memory.held = held

    def octets(self) -> torch.Tensor:
        """Return the region as bytes; storages that are parts of its storage keep it mapped."""
        with warnings.catch_warnings():
            # torch has no read-only tensors; the page protection is what forbids writing.
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            return torch.frombuffer(self._memory, dtype=torch.uint8)


class _Memory(mmap.mmap):
    """A mapping, kept by the tensors over it, that keeps something else."""

    held: object = None
