"""The weights of one rank as torch tensors over the loader's memory."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from headrace_engine.cuda_mapping import CudaMapping
from headrace_engine.dtypes import TORCH_DTYPES
from headrace_engine.errors import Unsupported, WeightsMismatch
from headrace_engine.mapping import HostMapping
from headrace_handover import Attachment, Loading, MappableRegion, Tensor
from headrace_handover import attach as hand_over

DEFAULT_SOCKET = Path("/run/headrace/handover/handover.sock")
DEFAULT_TIMEOUT = 1800.0
"""Seconds to wait for weights that are still being loaded."""

ALIGNMENT = 64
"""Bytes. What torch's own allocations on the CPU start at; vectorized kernels count on it.

GPU kernels ask for 16, and get what CPU kernels get."""


@dataclass(frozen=True, slots=True)
class PrivateCopy:
    """A tensor that is no view of the shared memory."""

    name: str
    nbytes: int
    reason: str


@dataclass(slots=True, eq=False)
class Weights(Mapping[str, torch.Tensor]):
    """Tensors by name; all but `copies` are read-only views of the loader's memory.

    The attachment is held: its connection is the lease on the weights. `seconds` is what mapping
    and making the tensors took.
    """

    attachment: Attachment
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    copies: list[PrivateCopy] = field(default_factory=list)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

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


def attach(
    socket_path: Path | str | None = None,
    *,
    rank: int = 0,
    device: torch.device | str,
    timeout: float = DEFAULT_TIMEOUT,
    on_progress: Callable[[Loading], None] | None = None,
) -> Weights:
    """Attach to the loader and map the weights of `rank`, a tensor parallel rank.

    `socket_path` defaults to HEADRACE_SOCKET, then to DEFAULT_SOCKET. `device` is torch's ("cpu",
    "cuda", "cuda:1") or a GPU's UUID as nvidia-smi prints it ("GPU-..."); it must be the one that
    holds the rank. Waits for weights that are still being loaded, `timeout` seconds at most;
    `on_progress` is called about once a second meanwhile. Keep the result for as long as the
    tensors are used. Raises headrace_handover's errors, Unsupported for a device that cannot be
    used, MappingFailed, and WeightsMismatch for contradictions in the reply.
    """
    path = Path(socket_path or os.environ.get("HEADRACE_SOCKET") or DEFAULT_SOCKET)
    place = _place(device)
    name = _memory_name(place)
    attachment = hand_over(path, rank=rank, device=name, timeout=timeout, on_progress=on_progress)
    began = time.monotonic()
    try:
        weights = Weights(attachment)
        for item in attachment.regions:
            octets = _mapping(item, place).octets()
            storage, address = octets.untyped_storage(), octets.data_ptr()
            for entry in item.region.tensors:
                _add(weights, entry, storage, address)
    except BaseException:
        attachment.close()
        raise
    weights.seconds = time.monotonic() - began
    return weights


def _place(device: torch.device | str) -> torch.device:
    """Return the CPU or one GPU; raises Unsupported."""
    if isinstance(device, str) and device.startswith("GPU-"):
        visible = [
            _memory_name(torch.device("cuda", index)) for index in range(torch.cuda.device_count())
        ]
        if device not in visible:
            raise Unsupported(
                f"device {device}: this process sees {', '.join(visible) or 'no GPU'}; give loader "
                "and engine the same GPUs"
            )
        return torch.device("cuda", visible.index(device))
    place = torch.device(device)
    if place.type not in ("cpu", "cuda"):
        raise Unsupported(f"device {place}: weights can be resident in host or CUDA memory")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise Unsupported(f"device {place}: this process sees no GPU that torch can use")
    if place.type == "cuda" and place.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return place


def _memory_name(place: torch.device) -> str:
    """Return what the handover protocol calls the device's memory."""
    if place.type == "cpu":
        return "host"
    return f"GPU-{torch.cuda.get_device_properties(place).uuid}"


def _mapping(item: MappableRegion, place: torch.device) -> HostMapping | CudaMapping:
    return HostMapping(item) if place.type == "cpu" else CudaMapping(item, place.index)


def _add(weights: Weights, entry: Tensor, storage: torch.UntypedStorage, address: int) -> None:
    dtype = TORCH_DTYPES.get(entry.dtype)
    if dtype is None or entry.nbytes != dtype.itemsize * math.prod(entry.shape):
        raise WeightsMismatch(
            f"{entry.name}: {entry.nbytes} bytes of {entry.dtype} {list(entry.shape)}: sizes that "
            "do not fit, or an element type this engine's torch does not have"
        )
    part = storage[entry.offset : entry.offset + entry.nbytes]
    if entry.nbytes and (address + entry.offset) % ALIGNMENT:
        part = part.clone()
        reason = f"not aligned to {ALIGNMENT} bytes"
        weights.copies.append(PrivateCopy(entry.name, entry.nbytes, reason))
    empty = torch.empty(0, dtype=dtype, device=storage.device)
    weights.tensors[entry.name] = empty.set_(part, 0, entry.shape)
