"""Predicts how long a cold load takes and what limits it.

    seconds = fixed + bytes of the fullest link / (its rate x efficiency)

Every byte crosses file system, network cards and the GPUs' PCIe links at the same time, so
the slowest of them sets the time. The file system is shared by all replicas that load at once; the
others are each node's own.
"""

import math
from dataclasses import dataclass

from headrace_cli.sizing.hardware import CLIENT_BYTES_PER_SECOND, GIB_PER_TIB, TIERS

FIXED_SECONDS = 0.42
"""Opening files and registering memory; see EFFICIENCY."""
EFFICIENCY = 0.80
"""Share of a provisioned rate that arrives.

Both are fitted to the four GPUDirect rows that AWS published (published.py): the largest
relative error, 8 %, is least at these values. On other hardware they are a guess.
"""
SHARD_SECONDS_PER_BYTE = 0.21 / (1 << 30)
"""The sharder's main thread, measured on 2 cores (docs/sharding.md)."""
SHARD_CORE_SECONDS_PER_BYTE = 0.75 / (1 << 30)
"""All of its threads, measured there as well."""
SHARD_EFFICIENCY = 0.9


@dataclass(frozen=True, slots=True)
class FileSystem:
    """FSx for Lustre PERSISTENT_2; capacity in GiB, tier in MB/s per TiB."""

    capacity_gib: int
    tier: int

    @property
    def disk_rate(self) -> float:
        """Bytes/s that the drives give."""
        return self.capacity_gib / GIB_PER_TIB * TIERS[self.tier].disk * 1e6

    @property
    def network_rate(self) -> float:
        """Bytes/s that the servers give of what they have in memory."""
        return self.capacity_gib / GIB_PER_TIB * TIERS[self.tier].network * 1e6


@dataclass(frozen=True, slots=True)
class Node:
    """What one replica loads through; rates in bytes/s."""

    gpus: int
    nics: int
    nic_gbps: float
    pcie_per_gpu: float


@dataclass(frozen=True, slots=True)
class Limit:
    """One thing all bytes pass, and how long they take if nothing else limits; unit as named."""

    name: str
    bytes_per_second: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """A load: seconds, the limits (slowest first), and what one replica reaches in bytes/s."""

    seconds: float
    limits: tuple[Limit, ...]
    bytes_per_second: float

    @property
    def bottleneck(self) -> Limit:
        """What sets the time."""
        return self.limits[0]


def predict_load(
    total_bytes: int, storage: FileSystem, node: Node, *, replicas: int = 1, warm: bool = False
) -> Prediction:
    """Predict how long `replicas` that start at once take to load `total_bytes` each.

    `warm`: the servers have the checkpoint in memory, so their network limits, not their drives.
    """
    rate = storage.network_rate if warm else storage.disk_rate
    source = "memory of the file servers" if warm else "throughput of the file system"
    rates = {
        source: rate / replicas,
        f"{node.nics} network cards of {node.nic_gbps:g} Gbps": node.nics * node.nic_gbps / 8 * 1e9,
        f"PCIe of {node.gpus} GPUs": node.gpus * node.pcie_per_gpu,
        "one client, most seen so far": CLIENT_BYTES_PER_SECOND,
    }
    limits = [
        Limit(name, rate, FIXED_SECONDS + total_bytes / (rate * EFFICIENCY))
        for name, rate in rates.items()
    ]
    limits.sort(key=lambda limit: -limit.seconds)
    seconds = limits[0].seconds
    return Prediction(seconds, tuple(limits), total_bytes / seconds)


def capacity_within(
    total_bytes: int, seconds: float, tier: int, node: Node, *, replicas: int = 1
) -> int | None:
    """Return the smallest EFA file system, in GiB, that `replicas` load from within `seconds`.

    None where something else than the file system takes longer, whatever its size.
    """
    if seconds <= FIXED_SECONDS:
        return None
    needed = total_bytes * replicas / ((seconds - FIXED_SECONDS) * EFFICIENCY)
    step = TIERS[tier].efa_step
    per_step = FileSystem(step, tier).disk_rate
    capacity = max(1, math.ceil(needed / per_step)) * step
    found = predict_load(total_bytes, FileSystem(capacity, tier), node, replicas=replicas)
    return capacity if found.seconds <= seconds else None


def predict_shard(
    total_bytes: int, storage: FileSystem, *, cores: int, network_gbps: float
) -> Prediction:
    """Predict how long one `headrace shard` takes, reading from and writing to the file system.

    As docs/sharding.md computes it: as many bytes are read as written, the network is full
    duplex, and the file system's throughput is taken as the sum of both.
    """
    rates = {
        "the sharder's main thread": 1 / SHARD_SECONDS_PER_BYTE,
        f"{cores} cores of the sharder": cores / SHARD_CORE_SECONDS_PER_BYTE,
        f"network of its node, {network_gbps:g} Gbps": network_gbps / 8 * 1e9,
        "throughput of the file system": storage.disk_rate / 2,
    }
    limits = [
        Limit(name, rate, total_bytes / (rate * SHARD_EFFICIENCY)) for name, rate in rates.items()
    ]
    limits.sort(key=lambda limit: -limit.seconds)
    return Prediction(limits[0].seconds, tuple(limits), total_bytes / limits[0].seconds)
