"""What AWS sells, as far as a load's time and cost depend on it.

Sources are named by entry. Prices change: what has no source that could be cited is None, and
the user gives it.
"""

from dataclasses import dataclass

GIB = 1 << 30
TIB = 1 << 40
GIB_PER_TIB = 1024


@dataclass(frozen=True, slots=True)
class Tier:
    """A throughput tier of FSx for Lustre PERSISTENT_2 SSD.

    `disk` and `network` in MB/s per TiB (LustreGuide, "Performance characteristics of SSD
    storage classes"): disk for what must come from the drives, network for what the servers
    have in memory. `efa_step` in GiB: EFA file systems come in multiples of it (LustreGuide,
    "Increasing storage capacity"). `price` in $ per GB-month, us-east-1.
    """

    disk: int
    network: int
    efa_step: int
    price: float | None = None


TIERS = {
    125: Tier(125, 320, 38400, price=0.145),  # price: c3x.dev's page on the resource
    250: Tier(250, 640, 19200),
    500: Tier(500, 1300, 9600),
    1000: Tier(1000, 2600, 4800),
}

MIN_CAPACITY_GIB = 1200
CAPACITY_STEP_GIB = 2400
"""Without EFA: 1200 GiB, or multiples of 2400 GiB."""
MAX_CAPACITY_GIB = 10_000_000


@dataclass(frozen=True, slots=True)
class Instance:
    """An instance type with EFA and GPUs.

    `gpu_bytes` is of one GPU, `nic_gbps` of one EFA device, `pcie` in bytes/s per GPU.
    `price` in $ per hour, on demand.
    """

    gpus: int
    gpu: str
    gpu_bytes: int
    nics: int
    nic_gbps: int
    architecture: str = "x86_64"
    price: float | None = None
    pcie: float = 55e9


INSTANCES = {
    # 16 x 200 Gbps; no on-demand price that could be cited.
    "p5en.48xlarge": Instance(8, "H200", 141 * 10**9, 16, 200),
    # Prices of the two P6: third-party listings, us-west-2.
    "p6-b200.48xlarge": Instance(8, "B200", 179 * 10**9, 8, 400, price=113.93),
    "p6-b300.48xlarge": Instance(8, "B300", 268 * 10**9, 16, 400, price=142.416),
    # One EFA-only interface of 400 Gbps per GPU: 1600 Gbps, 28.8 Tbps for an UltraServer of 18.
    "p6e-gb200.36xlarge": Instance(4, "GB200", 185 * 10**9, 4, 400, "arm64"),
}

CLIENT_BYTES_PER_SECOND = 150e9
"""1200 Gbps: the most one client reached with EFA and GDS when AWS introduced it (2024)."""


def capacity_fault(capacity_gib: int, tier: int, *, efa: bool) -> str | None:
    """Return what is wrong with a file system's capacity, and the nearest right ones."""
    step = TIERS[tier].efa_step if efa else CAPACITY_STEP_GIB
    if not efa and capacity_gib == MIN_CAPACITY_GIB:
        return None
    if capacity_gib >= step and capacity_gib % step == 0:
        return None
    below, above = capacity_gib // step * step, -(-capacity_gib // step) * step
    nearest = " or ".join(f"{size}" for size in (below, max(above, step)) if size)
    what = f"with EFA at {tier} MB/s/TiB a file system" if efa else "a file system"
    return f"{what} has a multiple of {step} GiB; use {nearest}"
