"""What is on a node, as far as GPUDirect Storage over EFA depends on it. Reads, changes nothing."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from headrace_node.host import NO_SUCH_PROGRAM, Host

GDSCHECK = ("/usr/local/cuda/gds/tools/gdscheck", "/usr/local/cuda/gds/tools/gdscheck.py")
_AMAZON_LINUX = ("amzn", "2023")
_NET_TYPE = re.compile(r"-\s+net type:\s*(\S+)")
_NID = re.compile(r"-\s+nid:\s*(\S+)")
_STATUS = re.compile(r"status:\s*(\S+)")
_INTERFACE = re.compile(r"\d+:\s*(\S+)$")


@dataclass(frozen=True, slots=True)
class EfaDevice:
    """An EFA device by its name below /sys/class/infiniband; `numa` is -1 where unknown."""

    name: str
    numa: int


@dataclass(frozen=True, slots=True)
class Nid:
    """A network identifier of LNet: its interface, and whether it is up."""

    net: str
    nid: str
    interface: str
    up: bool


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that was found. Empty strings and tuples stand for what is missing."""

    os: str
    os_version: str
    kernel: str
    gpu_driver: str
    nvidia_fs: str
    lustre: str
    lnet_up: bool
    efa: tuple[EfaDevice, ...]
    nids: tuple[Nid, ...]
    peers_over_efa: int
    mounts: tuple[str, ...]
    gds_of_lustre: str
    huge_pages: int
    ethernet: str
    iommu: bool

    @property
    def is_supported(self) -> bool:
        """Whether the operating system is one that can be prepared."""
        return self.os == _AMAZON_LINUX[0] and self.os_version == _AMAZON_LINUX[1]

    @property
    def unsupported_reason(self) -> str:
        """Why the operating system cannot be prepared; empty where it can."""
        if self.is_supported:
            return ""
        if self.os == "bottlerocket":
            return (
                "Bottlerocket cannot be prepared: its root file system is read-only and it has no "
                "Lustre client with EFA and no nvidia-fs; use EKS's accelerated AL2023 AMI"
            )
        name = f"{self.os or 'an unknown system'} {self.os_version}".strip()
        return f"{name} cannot be prepared; use EKS's accelerated AL2023 AMI"

    @property
    def efa_nids(self) -> tuple[Nid, ...]:
        """EFA interfaces of LNet that are up."""
        return tuple(nid for nid in self.nids if nid.net == "efa" and nid.up)

    @property
    def missing_efa(self) -> tuple[EfaDevice, ...]:
        """EFA devices that LNet does not use."""
        used = {nid.interface for nid in self.nids if nid.net == "efa"}
        return tuple(device for device in self.efa if device.name not in used)

    @property
    def gds(self) -> str:
        """The label's word: verified, fallback (loads would leave the direct path) or missing."""
        if not self.gpu_driver or not self.nvidia_fs:
            return "missing"
        all_up = bool(self.efa) and len(self.efa_nids) == len(self.efa)
        return "verified" if self.gds_of_lustre == "Supported" and all_up else "fallback"


def gather(host: Host) -> Facts:
    """Look at a node."""
    release = _release(host.read("/etc/os-release") or "")
    lnet = host.ask("lnetctl", "net", "show")
    return Facts(
        os=release.get("ID", ""),
        os_version=release.get("VERSION_ID", ""),
        kernel=(host.read("/proc/sys/kernel/osrelease") or "").strip(),
        gpu_driver=_first_version(host.read("/proc/driver/nvidia/version")),
        nvidia_fs=_version_field(host.read("/proc/driver/nvidia-fs/version")),
        lustre=_module_version(host, "lustre"),
        lnet_up=lnet.ok,
        efa=efa_devices(host),
        nids=tuple(_nids(lnet.output)) if lnet.ok else (),
        peers_over_efa=len(
            re.findall(r"nid:\s*\S+@efa", host.ask("lnetctl", "peer", "show").output)
        ),
        mounts=tuple(_lustre_mounts(host.read("/proc/mounts") or "")),
        gds_of_lustre=_gds_of_lustre(host),
        huge_pages=_whole(host.read("/proc/sys/vm/nr_hugepages")),
        ethernet=_default_interface(host.read("/proc/net/route") or ""),
        iommu=bool(host.names("/sys/class/iommu")),
    )


def efa_devices(host: Host) -> tuple[EfaDevice, ...]:
    """Return the devices below /sys/class/infiniband that the driver efa serves."""
    base = "/sys/class/infiniband"
    return tuple(
        EfaDevice(name, _whole(host.read(f"{base}/{name}/device/numa_node"), -1))
        for name in host.names(base)
        if host.target(f"{base}/{name}/device/driver") == "efa"
    )


def _release(text: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip().strip("\"'") for key, _, value in pairs}


def _first_version(text: str | None) -> str:
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)*)\b", text or "")
    return found[1] if found else ""


def _version_field(text: str | None) -> str:
    found = re.search(r"version:?\s*(\S+)", text or "", re.IGNORECASE)
    return found[1] if found else ""


def _module_version(host: Host, module: str) -> str:
    outcome = host.ask("modinfo", "-F", "version", module)
    return outcome.output.strip().splitlines()[0] if outcome.ok and outcome.output.strip() else ""


def _nids(shown: str) -> Iterator[Nid]:
    """Parse `lnetctl net show`, whose YAML is plain enough for lines."""
    net = nid = interface = ""
    up = False
    for line in (*shown.splitlines(), "- net type: end"):
        text = line.strip()
        begins = _NET_TYPE.match(text) or _NID.match(text)
        if begins and nid:
            yield Nid(net, nid, interface, up)
            nid = interface = ""
            up = False
        if found := _NET_TYPE.match(text):
            net = found[1]
        elif found := _NID.match(text):
            nid = found[1]
        elif found := _STATUS.match(text):
            up = found[1] == "up"
        elif found := _INTERFACE.match(text):
            interface = found[1]


def _lustre_mounts(mounts: str) -> Iterator[str]:
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) > 2 and fields[2] == "lustre":
            yield fields[0]


def _gds_of_lustre(host: Host) -> str:
    """Return gdscheck's word on Lustre, Supported or Unsupported; empty without gdscheck."""
    for program in GDSCHECK:  # asked for, not looked for: /usr/local/cuda is an absolute link
        outcome = host.ask(program, "-p")
        if outcome.status != NO_SUCH_PROGRAM:
            found = re.search(r"^\s*lustre\s*:\s*(\w+)", outcome.output, re.I | re.M)
            return found[1] if found else ""
    return ""


def _default_interface(routes: str) -> str:
    """Return the interface of the default route, from /proc/net/route."""
    for line in routes.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 1 and fields[1] == "00000000":
            return fields[0]
    return ""


def _whole(text: str | None, otherwise: int = 0) -> int:
    try:
        return int((text or "").strip())
    except ValueError:
        return otherwise
