"""The weights of one rank as torch tensors over the loader's memory."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from headrace_engine.cuda_mapping import CudaMapping
from headrace_engine.dtypes import TORCH_DTYPES
from headrace_engine.errors import Unsupported, WeightsMismatch
from headrace_engine.mapping import HostMapping
from headrace_handover import Attachment, Loading, MappableRegion, TensorGroup
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


class _Views:
    """Tensors of one group, each made when it is asked for: making one takes some 5 us."""

    def __init__(self, octets: torch.Tensor, group: TensorGroup) -> None:
        self._storage = octets.untyped_storage()
        self._group = group
        self._dtype = _dtype(group)
        self._offsets = dict(zip(group.names, group.offsets, strict=True))
        address = octets.data_ptr()
        self.copies = {
            name: PrivateCopy(name, group.nbytes, f"not aligned to {ALIGNMENT} bytes")
            for name, offset in self._offsets.items()
            if (address + offset) % ALIGNMENT and group.nbytes
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a tensor with a storage of exactly its size; a copy if it is not aligned."""
        offset = self._offsets[name]
        part = self._storage[offset : offset + self._group.nbytes]
        if name in self.copies:
            part = part.clone()
        empty = torch.empty(0, dtype=self._dtype, device=part.device)
        return empty.set_(part, 0, self._group.shape)


class Weights(Mapping[str, torch.Tensor]):
    """Tensors by name; all but `copies` are read-only views of the loader's memory.

    A tensor is made when it is first asked for, and is the same object ever after. The attachment
    is held, also by the tensors: its connection is the lease on the weights. `seconds` is what
    mapping them took.
    """

    def __init__(self, attachment: Attachment, place: torch.device) -> None:
        began = time.monotonic()
        self.attachment = attachment
        self.copies: list[PrivateCopy] = []
        self._views: dict[str, _Views] = {}
        self._made: dict[str, torch.Tensor] = {}
        for item in attachment.regions:
            octets = _mapping(item, place, attachment).octets()
            for group in item.region.groups:
                views = _Views(octets, group)
                self.copies += views.copies.values()
                self._views |= dict.fromkeys(group.names, views)
        self.seconds = time.monotonic() - began

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._made:
            self._made.setdefault(name, self._views[name][name])
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._views

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

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
        groups = (group for item in self.attachment.regions for group in item.region.groups)
        return sum(group.nbytes * len(group.names) for group in groups)


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
    `on_progress` is called about once a second meanwhile. The memory stays for as long as the
    result or a tensor of it does. Raises headrace_handover's errors, Unsupported for a device that
    cannot be used, MappingFailed, and WeightsMismatch for contradictions in the reply.
    """
    path = Path(socket_path or os.environ.get("HEADRACE_SOCKET") or DEFAULT_SOCKET)
    place = _place(device)
    name = _memory_name(place)
    attachment = hand_over(path, rank=rank, device=name, timeout=timeout, on_progress=on_progress)
    try:
        return Weights(attachment, place)
    except BaseException:
        attachment.close()
        raise


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
    if place.type == "cuda" and place.index >= torch.cuda.device_count():
        raise Unsupported(f"device {place}: this process sees {torch.cuda.device_count()} GPUs")
    return place


def _memory_name(place: torch.device) -> str:
    """Return what the handover protocol calls the device's memory."""
    if place.type == "cpu":
        return "host"
    return f"GPU-{torch.cuda.get_device_properties(place).uuid}"


def _mapping(
    item: MappableRegion, place: torch.device, attachment: Attachment
) -> HostMapping | CudaMapping:
    if place.type == "cpu":
        return HostMapping(item, attachment)
    return CudaMapping(item, place.index, attachment)


def _dtype(group: TensorGroup) -> torch.dtype:
    """Return torch's element type of a group; raises WeightsMismatch naming a tensor of it."""
    dtype = TORCH_DTYPES.get(group.dtype)
    if dtype is None or group.nbytes != dtype.itemsize * math.prod(group.shape):
        raise WeightsMismatch(
            f"{', '.join(group.names[:1])}: {group.nbytes} bytes of {group.dtype} "
            f"{list(group.shape)}: sizes that do not fit, or an element type this engine's torch "
            "does not have"
        )
    return dtype
