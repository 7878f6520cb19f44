"""The weights of one rank as torch tensors over the loader's memory."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from headrace_engine.dtypes import TORCH_DTYPES
from headrace_engine.errors import Unsupported, WeightsMismatch
from headrace_engine.mapping import HostMapping
from headrace_handover import Attachment, Loading, Tensor, attach

DEFAULT_SOCKET = Path("/run/headrace/handover/handover.sock")
DEFAULT_TIMEOUT = 1800.0
"""Seconds to wait for weights that are still being loaded."""

ALIGNMENT = 64
"""Bytes. What torch's own allocations on the CPU start at; vectorized kernels count on it."""


@dataclass(frozen=True, slots=True)
class PrivateCopy:
    """A tensor that is no view of the shared memory."""

    name: str
    nbytes: int
    reason: str


@dataclass(slots=True)
class Weights:
    """Tensors by name; all but `copies` are read-only views of the loader's memory.

    The attachment is held: its connection is the lease on the weights.
    """

    attachment: Attachment
    tensors: dict[str, torch.Tensor]
    seconds: float
    copies: list[PrivateCopy] = field(default_factory=list)

    @property
    def checkpoint(self) -> str:
        """Hex SHA-256 of the checkpoint's manifest.json."""
        return self.attachment.ready.checkpoint

    @property
    def allocated_bytes(self) -> int:
        """Bytes of memory the loader holds for this rank."""
        return self.attachment.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def attach_weights(
    socket_path: Path | None = None,
    *,
    rank: int,
    device: str = "host",
    timeout: float = DEFAULT_TIMEOUT,
    on_progress: Callable[[Loading], None] | None = None,
) -> Weights:
    """Attach to the loader and map the weights of `rank`.

    `socket_path` defaults to HEADRACE_SOCKET, then to DEFAULT_SOCKET. Keep the result for as
    long as the tensors are used. Raises headrace_handover's errors, Unsupported for a
    device this build cannot map, WeightsMismatch for contradictions in the reply.
    """
    if device != "host":
        raise Unsupported(f"device {device}: this build maps host memory alone")
    path = socket_path or Path(os.environ.get("HEADRACE_SOCKET") or DEFAULT_SOCKET)
    attachment = attach(path, rank=rank, device=device, timeout=timeout, on_progress=on_progress)
    began = time.monotonic()
    try:
        weights = Weights(attachment, {}, 0.0)
        for item in attachment.regions:
            mapping = HostMapping(item)
            for entry in item.region.tensors:
                _add(weights, entry, mapping)
    except BaseException:
        attachment.close()
        raise
    weights.seconds = time.monotonic() - began
    return weights


def _add(weights: Weights, entry: Tensor, mapping: HostMapping) -> None:
    dtype = TORCH_DTYPES.get(entry.dtype)
    if dtype is None or entry.nbytes != dtype.itemsize * math.prod(entry.shape):
        raise WeightsMismatch(
            f"{entry.name}: {entry.nbytes} bytes of {entry.dtype} {list(entry.shape)}: sizes that "
            "do not fit, or an element type this engine's torch does not have"
        )
    if entry.nbytes == 0:
        weights.tensors[entry.name] = torch.empty(entry.shape, dtype=dtype)
        return
    if (mapping.address + entry.offset) % ALIGNMENT == 0:
        view = mapping.tensor(entry.offset, entry.nbytes, dtype, entry.shape)
        weights.tensors[entry.name] = view
        return
    octets = mapping.tensor(entry.offset, entry.nbytes, torch.uint8, (entry.nbytes,))
    weights.tensors[entry.name] = octets.clone().view(dtype).view(entry.shape)
    reason = f"not aligned to {ALIGNMENT} bytes"
    weights.copies.append(PrivateCopy(entry.name, entry.nbytes, reason))
