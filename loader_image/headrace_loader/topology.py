"""Which GPU a worker uses, and which CPUs are near it, so that threads and buffers are, too.

A copy between a GPU and memory of the other socket crosses the link between sockets, which is
slower than PCIe and shared by all GPUs.
"""

import os
from pathlib import Path

from headrace_loader.errors import BackendUnavailable

SYSFS = Path("/sys")

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def near_cpus(pci_bus_id: str, sysfs: Path = SYSFS) -> frozenset[int] | None:
    """Return the CPUs near a PCI device; None where the machine does not tell.

    `pci_bus_id` is domain:bus:device.function in hexadecimal, as the driver gives it (the
    domain may have eight digits; sysfs has four). Source: Documentation/ABI/testing/sysfs-bus-pci,
    local_cpulist.
    """
    domain, _, rest = pci_bus_id.lower().partition(":")
    path = sysfs / "bus/pci/devices" / f"{domain[-4:]}:{rest}" / "local_cpulist"
    try:
        return parse_cpu_list(path.read_text()) or None
    except (OSError, ValueError):
        return None


def parse_cpu_list(text: str) -> frozenset[int]:
    """Parse a CPU list such as "0-3,8,10-11"; raises ValueError.

    Source: cpuset(7), list format.
    """
    cpus: set[int] = set()
    for item in filter(None, text.strip().split(",")):
        first, dash, last = item.partition("-")
        cpus.update(range(int(first), int(last if dash else first) + 1))
    return frozenset(cpus)


def run_near(pci_bus_id: str, sysfs: Path = SYSFS) -> frozenset[int] | None:
    """Keep this process, and memory it touches first, near a PCI device.

    Returns the CPUs it now runs on; None where it stays as it was: the machine does not tell
    what is near, or the container may use none of it.
    """
    near = (near_cpus(pci_bus_id, sysfs) or frozenset()) & os.sched_getaffinity(0)
    if not near:
        return None
    os.sched_setaffinity(0, near)
    return near


def see_only(local_rank: int) -> None:
    """Hide all GPUs but a rank's: cuFile opens a context on every device it sees.

    Call it before the driver is initialized. Raises BackendUnavailable where there are too few.
    """
    visible = os.environ.get(_VISIBLE)
    devices = visible.split(",") if visible else [str(n) for n in range(local_rank + 1)]
    if local_rank >= len(devices):
        raise BackendUnavailable(
            f"--backend cuda: rank {local_rank} needs GPU {local_rank}, {_VISIBLE} has "
            f"{len(devices)}; give the pod one GPU per rank"
        )
    os.environ[_VISIBLE] = devices[local_rank]
