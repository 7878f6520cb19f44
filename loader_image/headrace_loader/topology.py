"""Which GPU a worker uses, and which CPUs are near it, so that threads and buffers are, too.

The RDMA devices near it are reported, for cuFile and the network choose those themselves.

A copy between a GPU and memory of the other socket crosses the link between sockets, which is
slower than PCIe and shared by all GPUs.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from headrace_loader.errors import BackendUnavailable

SYSFS = Path("/sys")

_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Locality:
    """Where a GPU is in the machine, as far as the machine tells: "", None and () where not.

    `cpu_list` are the CPUs near it, such as "0-3,8"; `nics` the RDMA devices below the same PCI
    switch, or else on the same NUMA node.
    """

    pci_bus_id: str
    numa_node: int | None = None
    cpu_list: str = ""
    nics: tuple[str, ...] = ()

    @property
    def cpus(self) -> frozenset[int]:
        """The CPUs near it; none where the machine does not tell."""
        try:
            return parse_cpu_list(self.cpu_list)
        except ValueError:
            return frozenset()

    def document(self) -> dict[str, object]:
        """Return it as status and log have it."""
        return {
            "pciBusId": self.pci_bus_id,
            "numaNode": self.numa_node,
            "cpus": self.cpu_list,
            "nics": list(self.nics),
        }


def locality(pci_bus_id: str, sysfs: Path = SYSFS) -> Locality:
    """Look a PCI device up in sysfs.

    `pci_bus_id` is domain:bus:device.function in hexadecimal, as the driver gives it (the
    domain may have eight digits; sysfs has at least four). Source:
    Documentation/ABI/testing/sysfs-bus-pci, local_cpulist and numa_node.
    """
    domain, _, rest = pci_bus_id.lower().partition(":")
    device = sysfs / "bus/pci/devices" / f"{domain.lstrip('0'):0>4}:{rest}"
    try:
        cpu_list = (device / "local_cpulist").read_text().strip()
    except OSError:
        cpu_list = ""
    node = _numa_node(device)
    return Locality(pci_bus_id, node, cpu_list, _near_nics(device, node, sysfs))


def _numa_node(device: Path) -> int | None:
    try:
        number = int((device / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return number if number >= 0 else None  # -1 where the firmware does not tell


def _near_nics(device: Path, node: int | None, sysfs: Path) -> tuple[str, ...]:
    """Names of the RDMA devices that share most bridges with a device, else its NUMA node.

    A device's real path names all bridges above it, the root complex first.
    """
    bridge = device.resolve().parent
    root = len((sysfs / "devices").resolve().parts) + 1
    found: dict[str, int] = {}
    for nic in sorted((sysfs / "class/infiniband").glob("*/device")):
        shared = len(Path(os.path.commonpath([bridge, nic.resolve().parent])).parts)
        if shared > root or (node is not None and node == _numa_node(nic)):
            found[nic.parent.name] = max(shared, root)
    nearest = max(found.values(), default=0)
    return tuple(name for name, shared in found.items() if shared == nearest)


def parse_cpu_list(text: str) -> frozenset[int]:
    """Parse a CPU list such as "0-3,8,10-11"; raises ValueError.

    Source: cpuset(7), list format.
    """
    cpus: set[int] = set()
    for item in filter(None, text.strip().split(",")):
        first, dash, last = item.partition("-")
        cpus.update(range(int(first), int(last if dash else first) + 1))
    return frozenset(cpus)


def run_near(cpus: Collection[int]) -> frozenset[int] | None:
    """Keep this process, and memory it touches first, on some CPUs.

    Returns the CPUs it now runs on; None where it stays as it was: none are given, or the
    container may use none of them.
    """
    near = frozenset(cpus) & os.sched_getaffinity(0)
    if not near:
        return None
    os.sched_setaffinity(0, near)
    return near


def see_only(local_rank: int) -> None:
    """Hide all GPUs but a rank's: cuFile opens a context on every device it sees.

    Call it before the driver is initialized. Raises BackendUnavailable where there are too few.
    """
    visible = os.environ.get(_VISIBLE)
    devices = [str(n) for n in range(local_rank + 1)]
    if visible is not None:  # set and empty: none, as the driver understands it
        devices = [name for name in visible.split(",") if name]
    if local_rank >= len(devices):
        raise BackendUnavailable(
            f"--backend cuda: rank {local_rank} needs GPU {local_rank}, {_VISIBLE} has "
            f"{len(devices)}; give the pod one GPU per rank"
        )
    os.environ[_VISIBLE] = devices[local_rank]
