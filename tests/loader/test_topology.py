"""CPUs near a GPU: parsing, and what happens on machines that do not tell."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_loader.topology import Locality, locality, parse_cpu_list

DEVICE = "bus/pci/devices/0000:3b:00.0"


def sysfs(root: Path, cpus: str) -> Path:
    (root / DEVICE).mkdir(parents=True)
    (root / DEVICE / "local_cpulist").write_text(cpus)
    return root


@given(st.sets(st.integers(0, 4095)))
def test_a_list_is_its_cpus(cpus: set[int]) -> None:
    assert parse_cpu_list(",".join(map(str, cpus)) + "\n") == cpus


@pytest.mark.parametrize(
    ("text", "cpus"), [("", set()), ("0-2,7\n", {0, 1, 2, 7}), ("5-5", {5}), ("0-95,192-287", None)]
)
def test_ranges(text: str, cpus: set[int] | None) -> None:
    expected = {*range(96), *range(192, 288)} if cpus is None else cpus
    assert parse_cpu_list(text) == expected


@pytest.mark.parametrize("name", ["0000:3b:00.0", "00000000:3B:00.0"])
def test_names_of_driver_and_sysfs(tmp_path: Path, name: str) -> None:
    assert locality(name, sysfs(tmp_path, "4-5\n")).cpus == {4, 5}
    assert locality(f"0001{name[-12:]}", tmp_path).cpus == set()  # of another domain


@pytest.mark.parametrize("cpus", ["", "what", "3-"])
def test_a_machine_that_does_not_tell(tmp_path: Path, cpus: str) -> None:
    assert locality("0000:3b:00.0", sysfs(tmp_path, cpus)).cpus == set()
    assert locality("0000:ff:00.0", tmp_path) == Locality("0000:ff:00.0")


SWITCH = "devices/pci0000:38/0000:38:01.0/0000:39:00.0"
"""The GPU's PCI switch, and devices elsewhere: of another switch, on another socket."""


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., Path]:
    """Write a sysfs: a GPU below a switch, and RDMA devices by their path and NUMA node."""

    def write(nics: dict[str, tuple[str, int]], gpu_node: int = 0) -> Path:
        gpu = tmp_path / SWITCH / "0000:3a:00.0/0000:3b:00.0"
        devices = {gpu: gpu_node}
        (tmp_path / "bus/pci/devices").mkdir(parents=True)
        (tmp_path / "bus/pci/devices/0000:3b:00.0").symlink_to(gpu)
        for name, (path, node) in nics.items():
            devices[tmp_path / path] = node
            link = tmp_path / path / "infiniband" / name
            link.mkdir(parents=True)
            (link / "device").symlink_to("../..")
            (tmp_path / "class/infiniband").mkdir(parents=True, exist_ok=True)
            (tmp_path / "class/infiniband" / name).symlink_to(link)
        for path, node in devices.items():
            path.mkdir(parents=True, exist_ok=True)
            (path / "numa_node").write_text(f"{node}\n")
        return tmp_path

    return write


def test_the_nics_below_the_gpus_switch_are_near(machine: Callable[..., Path]) -> None:
    root = machine(
        {
            "efa_0": (f"{SWITCH}/0000:3a:01.0/0000:3c:00.0", 0),
            "efa_1": (f"{SWITCH}/0000:3a:01.0/0000:3d:00.0", 0),
            "efa_2": ("devices/pci0000:38/0000:38:02.0/0000:4a:00.0", 0),
            "efa_3": ("devices/pci0000:98/0000:98:01.0/0000:9c:00.0", 1),
        }
    )
    found = locality("0000:3b:00.0", root)
    assert (found.numa_node, found.nics) == (0, ("efa_0", "efa_1"))


def test_without_a_switch_nics_of_the_same_socket_are_near(machine: Callable[..., Path]) -> None:
    root = machine(
        {
            "efa_0": ("devices/pci0000:38/0000:38:02.0/0000:4a:00.0", 1),
            "efa_1": ("devices/pci0000:98/0000:98:01.0/0000:9c:00.0", 1),
            "efa_2": ("devices/pci0000:a8/0000:a8:01.0/0000:ac:00.0", 0),
        },
        gpu_node=1,
    )
    assert locality("0000:3b:00.0", root).nics == ("efa_0", "efa_1")


def test_where_no_node_is_told_no_nic_is_near(machine: Callable[..., Path]) -> None:
    root = machine({"efa_0": ("devices/pci0000:98/0000:98:01.0/0000:9c:00.0", -1)}, gpu_node=-1)
    found = locality("0000:3b:00.0", root)
    assert (found.numa_node, found.nics) == (None, ())


def run_near(root: Path) -> list[str]:
    """What it returns and the affinity after it, in a process of its own."""
    code = (
        "import os, sys; from pathlib import Path\n"
        "from headrace_loader.topology import locality, run_near\n"
        "near = run_near(locality('0000:3b:00.0', Path(sys.argv[1])).cpus)\n"
        "print(sorted(near or [])); print(sorted(os.sched_getaffinity(0)))"
    )
    command = [sys.executable, "-c", code, str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_process_moves_near_and_stays_where_nothing_near_is_its_own(tmp_path: Path) -> None:
    mine = sorted(os.sched_getaffinity(0))
    near = sysfs(tmp_path / "near", f"{mine[-1]},4095")
    assert run_near(near) == [f"[{mine[-1]}]", f"[{mine[-1]}]"]
    assert run_near(sysfs(tmp_path / "far", "4095")) == ["[]", str(mine)]
