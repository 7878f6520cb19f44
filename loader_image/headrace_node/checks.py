"""What is wrong with a node and the fix, as `headrace doctor --node` shows it."""

from collections.abc import Iterator
from dataclasses import dataclass

from headrace_node import cufile
from headrace_node.facts import Facts, gather
from headrace_node.host import Host

OK, WARNING, PROBLEM = "ok", "warning", "problem"
_APPLY = "headrace-node apply"


@dataclass(frozen=True, slots=True)
class Check:
    """One check's result: ok, warning or problem."""

    check: str
    grade: str
    message: str
    fix: str = ""


def check(host: Host) -> list[Check]:
    """Check a node."""
    facts = gather(host)
    return [
        *_system(facts),
        *_gpu(facts),
        *_network(facts),
        *_storage(facts),
        *_cufile(host, facts),
    ]


def _system(facts: Facts) -> Iterator[Check]:
    if facts.is_supported:
        yield Check("system", OK, f"Amazon Linux 2023, kernel {facts.kernel}")
    else:
        message, _, fix = facts.unsupported_reason.partition("; ")
        yield Check("system", PROBLEM, message, fix)
    if facts.iommu:
        fix = "boot with iommu=off; NVIDIA advises it for GPUDirect on x86"
        yield Check("IOMMU", WARNING, "is on: transfers between NIC and GPU are translated", fix)


def _gpu(facts: Facts) -> Iterator[Check]:
    if not facts.gpu_driver:
        fix = "use a GPU instance with the accelerated AMI, or install NVIDIA's driver"
        yield Check("driver", PROBLEM, "NVIDIA's driver is not loaded", fix)
        return
    yield Check("driver", OK, f"NVIDIA {facts.gpu_driver}")
    if not facts.nvidia_fs:
        fix = "bake an image with nvidia-gds for this kernel and driver, then: modprobe nvidia-fs"
        yield Check("nvidia-fs", PROBLEM, "the module is not loaded: no GPUDirect Storage", fix)
        return
    yield Check("nvidia-fs", OK, f"nvidia-fs {facts.nvidia_fs}")
    if facts.gds_of_lustre == "Supported":
        yield Check("GDS", OK, "gdscheck: Lustre is supported")
    elif facts.gds_of_lustre:
        fix = "load nvidia-fs after the Lustre client: modprobe lustre; modprobe -r nvidia-fs; "
        fix += "modprobe nvidia-fs"
        yield Check("GDS", PROBLEM, f"gdscheck: Lustre is {facts.gds_of_lustre}", fix)
    else:
        fix = "install the package gds-tools, which has gdscheck"
        yield Check("GDS", WARNING, "gdscheck is not there or does not answer", fix)


def _network(facts: Facts) -> Iterator[Check]:
    if not facts.efa:
        fix = "launch the node with EFA interfaces (infra/nodes.yaml) and the driver efa"
        yield Check("EFA", PROBLEM, "there is no EFA device", fix)
        return
    yield Check("EFA", OK, f"{len(facts.efa)} devices")
    up, missing = len(facts.efa_nids), facts.missing_efa
    if up == len(facts.efa):
        yield Check("LNet", OK, f"{up} EFA interfaces are up")
    elif missing:
        names = ", ".join(device.name for device in missing)
        yield Check("LNet", PROBLEM, f"LNet does not use {names}: loads go over TCP", _APPLY)
    else:
        fix = "lnetctl net show -v; check that the security group allows all traffic within it"
        yield Check("LNet", PROBLEM, f"{up} of {len(facts.efa)} EFA interfaces are up", fix)


def _storage(facts: Facts) -> Iterator[Check]:
    if not facts.lustre:
        yield Check(
            "Lustre",
            PROBLEM,
            "the client is not installed",
            f"{_APPLY}, or: dnf install lustre-client",
        )
        return
    yield Check("Lustre", OK, f"client {facts.lustre}")
    if not facts.mounts:
        yield Check("mount", OK, "no Lustre file system is mounted; pods mount it when they start")
    elif facts.peers_over_efa:
        message = f"{', '.join(facts.mounts)}, {facts.peers_over_efa} peers over EFA"
        yield Check("mount", OK, message)
    else:
        fix = "the file system may lack EFA or be in another zone; else: headrace-node apply"
        yield Check("mount", PROBLEM, f"{facts.mounts[0]}: no server is reached over EFA", fix)


def _cufile(host: Host, facts: Facts) -> Iterator[Check]:
    current = host.read(cufile.PATH)
    if current is None:
        yield Check("cuFile", WARNING, f"there is no {cufile.PATH}: its defaults apply", _APPLY)
    elif current == cufile.configuration(facts):
        yield Check("cuFile", OK, f"{cufile.PATH} fits this node")
    else:
        yield Check(
            "cuFile", WARNING, f"{cufile.PATH} is another one than headrace-node writes", _APPLY
        )
