"""What is to be done on a node, in order. Each step tells whether it is done, does it, undoes it.

A step that is done does nothing when it is applied again. The node is looked at anew after each
change, because later steps depend on it.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from headrace_node import cufile, unit
from headrace_node.errors import StepFailed, Unsupported
from headrace_node.facts import Facts, gather
from headrace_node.files import OwnFile
from headrace_node.host import Host

EFA_HUGE_PAGES = 5128
"""Pages of 2 MiB, as the EFA installer reserves them."""
_EXISTS = "exist"
_IN_PROGRESS = "already in progress"
# AWS's EFA example of its CSI driver.
_TUNING = {
    "ldlm.namespaces.*.lru_max_age": "600000",
    "llite.*.max_cached_mb": "64",
    "osc.*OST*.max_rpcs_in_flight": "32",
    "mdc.*.max_rpcs_in_flight": "64",
    "mdc.*.max_mod_rpcs_in_flight": "50",
}
_LRU_SIZE, _LRU_PER_CORE, _LEAST_LRU = "ldlm.namespaces.*.lru_size", 100, 1600


@dataclass(frozen=True, slots=True)
class Node:
    """A node and what was found on it."""

    host: Host
    facts: Facts


@dataclass(frozen=True, slots=True)
class Step:
    """One step. `apply` and `revert` raise StepFailed; `revert` leaves what was there before."""

    name: str
    is_done: Callable[[Node], bool]
    apply: Callable[[Node], None]
    revert: Callable[[Node], None]


def all_steps(huge_pages: int) -> tuple[Step, ...]:
    """Return the steps in their order. What others may use by now is not taken away again."""
    return (
        Step("lustre-client", lambda n: bool(n.facts.lustre), _install_lustre, _leave),
        Step("nvidia-fs", _has_nvidia_fs, _load_nvidia_fs, _leave),
        _huge_pages_step(huge_pages),
        Step("lnet-efa", lambda n: not n.facts.missing_efa, _add_efa, _remove_efa),
        Step("peers", _has_peers, _discover_peers, _leave),
        Step("tuning", lambda n: not list(_untuned(n)), _tune, _leave),
        Step("unit", _has_unit, _write_unit, _remove_unit),
        _cufile_step(),
    )


def _leave(node: Node) -> None:
    """Undo nothing."""


def _install_lustre(node: Node) -> None:
    node.host.change("dnf", "install", "-y", "lustre-client")


def _has_nvidia_fs(node: Node) -> bool:
    return bool(node.facts.nvidia_fs) or not node.facts.gpu_driver


def _load_nvidia_fs(node: Node) -> None:
    if not node.host.ask("modinfo", "nvidia-fs").ok:
        raise StepFailed(
            "nvidia-fs: the module is not installed: EKS's images lack it; bake an image with "
            "nvidia-gds for this kernel and driver (docs/nodes.md)"
        )
    node.host.change("modprobe", "nvidia-fs")


def _huge_pages_step(wanted: int) -> Step:
    file = OwnFile("sysctl", unit.SYSCTL_PATH, unit.sysctl(wanted))

    def apply(node: Node) -> None:
        file.put(node.host)
        node.host.change("sysctl", "-w", f"vm.nr_hugepages={wanted}")

    return Step(
        "hugepages",
        lambda node: node.facts.huge_pages >= wanted,
        apply,
        lambda node: file.take_back(node.host),
    )


def _add_efa(node: Node) -> None:
    """Give LNet every EFA device, preferred to TCP."""
    host, facts = node.host, node.facts
    if not facts.ethernet:
        raise StepFailed("lnet-efa: the node has no default route to find its interface by")
    host.change("modprobe", "lnet")
    host.change("modprobe", "kefalnd", f"ipif_name={facts.ethernet}")
    host.change("modprobe", "ksocklnd")
    host.change("lnetctl", "lnet", "configure")
    if not any(nid.net == "tcp" for nid in facts.nids):
        command = ("lnetctl", "net", "add", "--net", "tcp", "--if", facts.ethernet)
        host.change(*command, tolerate=_EXISTS)
    for device in facts.missing_efa:
        host.change(*unit.net_add(device), tolerate=_EXISTS)
    host.change("lnetctl", "set", "discovery", "1")
    host.change(*unit.PREFER_EFA, tolerate=_IN_PROGRESS)
    host.change("modprobe", "lustre")


def _remove_efa(node: Node) -> None:
    if not any(nid.net == "efa" for nid in node.facts.nids):
        return
    if node.facts.mounts:
        raise StepFailed(
            f"lnet-efa: {node.facts.mounts[0]} is mounted; drain the node before its network is "
            "taken away"
        )
    node.host.change("lnetctl", "net", "del", "--net", "efa")


def _has_peers(node: Node) -> bool:
    facts = node.facts
    return not facts.mounts or not facts.efa_nids or facts.peers_over_efa > 0


def _discover_peers(node: Node) -> None:
    """Let LNet learn the file servers' EFA addresses by asking their TCP ones."""
    for server in sorted({mount.partition(":")[0] for mount in node.facts.mounts}):
        node.host.change("lnetctl", "discover", server)


def _tune(node: Node) -> None:
    for name, value in _untuned(node):
        node.host.change("lctl", "set_param", f"{name}={value}")


def _untuned(node: Node) -> Iterator[tuple[str, str]]:
    """Yield Lustre's client settings that are not what they should be; they live with a mount."""
    if not node.facts.mounts:
        return
    cores = (node.host.read("/proc/cpuinfo") or "").count("processor\t") or os.cpu_count() or 1
    lru = str(max(_LEAST_LRU, _LRU_PER_CORE * cores))
    for name, value in ({_LRU_SIZE: lru} | _TUNING).items():
        shown = node.host.ask("lctl", "get_param", "-n", name)
        # llite's max_cached_mb is one of several lines, each with its name.
        found = re.findall(r"^(?:max_cached_mb:\s*)?(\d+)$", shown.output, re.MULTILINE)
        if not shown.ok or any(now != value for now in found):
            yield name, value


def _unit_files(node: Node) -> tuple[OwnFile, ...]:
    facts = node.facts
    return (
        OwnFile("modprobe", unit.MODPROBE_PATH, unit.modprobe_options(facts)),
        OwnFile("modules", unit.MODULES_PATH, unit.modules(facts)),
        OwnFile("service", unit.UNIT_PATH, unit.unit(facts)),
    )


def _has_unit(node: Node) -> bool:
    return not node.facts.efa or all(file.is_there(node.host) for file in _unit_files(node))


def _write_unit(node: Node) -> None:
    for file in _unit_files(node):
        file.put(node.host)
    node.host.change("systemctl", "daemon-reload")
    node.host.change("systemctl", "enable", unit.NAME)


def _remove_unit(node: Node) -> None:
    ours = [file for file in _unit_files(node) if file.is_ours(node.host)]
    if not ours:
        return
    if node.host.exists(unit.UNIT_PATH):
        node.host.change("systemctl", "disable", unit.NAME)
    for file in ours:
        file.take_back(node.host)
    node.host.change("systemctl", "daemon-reload")


def _cufile_step() -> Step:
    def file(node: Node) -> OwnFile:
        return OwnFile("cufile", cufile.PATH, cufile.configuration(node.facts))

    return Step(
        "cufile",
        lambda node: file(node).is_there(node.host),
        lambda node: file(node).put(node.host),
        lambda node: file(node).take_back(node.host),
    )


@dataclass(frozen=True, slots=True)
class Report:
    """What one step came to: done, changed, would change, pending or failed; with the reason."""

    step: str
    outcome: str
    message: str = ""


def check(host: Host, steps: Sequence[Step]) -> list[Report]:
    """Say what is done and what is not."""
    node = _supported(host)
    return [Report(s.name, "done" if s.is_done(node) else "pending") for s in steps]


def apply(host: Host, steps: Sequence[Step]) -> list[Report]:
    """Do what is not done. A step that fails is reported, and the others are done.

    Raises:
        Unsupported: nothing can be done on this operating system.
    """
    node = _supported(host)
    reports = []
    for step in steps:
        try:
            reports.append(_applied(node, step))
        except StepFailed as error:
            reports.append(Report(step.name, "failed", str(error)))
        if not host.dry_run and reports[-1].outcome in ("changed", "failed"):
            node = Node(host, gather(host))
    return reports


def _applied(node: Node, step: Step) -> Report:
    host = node.host
    if step.is_done(node):
        return Report(step.name, "done")
    before = len(host.changes)
    step.apply(node)
    what = "; ".join(host.changes[before:])
    return Report(step.name, "would change" if host.dry_run else "changed", what)


def revert(host: Host, steps: Sequence[Step]) -> list[Report]:
    """Undo the steps, last first."""
    node = _supported(host)
    reports = []
    for step in reversed(steps):
        before = len(host.changes)
        try:
            step.revert(node)
        except StepFailed as error:
            reports.append(Report(step.name, "failed", str(error)))
            continue
        what = "; ".join(host.changes[before:])
        outcome = "done" if not what else "would change" if host.dry_run else "changed"
        reports.append(Report(step.name, outcome, what))
    return reports


def _supported(host: Host) -> Node:
    facts = gather(host)
    if not facts.is_supported:
        raise Unsupported(facts.unsupported_reason)
    return Node(host, facts)
