"""CPUs near a GPU: parsing, and what happens on machines that do not tell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_loader.topology import near_cpus, parse_cpu_list

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
    assert near_cpus(name, sysfs(tmp_path, "4-5\n")) == {4, 5}


@pytest.mark.parametrize("cpus", ["", "what", "3-"])
def test_a_machine_that_does_not_tell(tmp_path: Path, cpus: str) -> None:
    assert near_cpus("0000:3b:00.0", sysfs(tmp_path, cpus)) is None
    assert near_cpus("0000:ff:00.0", tmp_path) is None


def run_near(root: Path) -> list[str]:
    """What it returns and the affinity after it, in a process of its own."""
    code = (
        "import os, sys; from pathlib import Path; from headrace_loader.topology import run_near\n"
        "near = run_near('0000:3b:00.0', Path(sys.argv[1]))\n"
        "print(sorted(near or [])); print(sorted(os.sched_getaffinity(0)))"
    )
    command = [sys.executable, "-c", code, str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_process_moves_near_and_stays_where_nothing_near_is_its_own(tmp_path: Path) -> None:
    mine = sorted(os.sched_getaffinity(0))
    near = sysfs(tmp_path / "near", f"{mine[-1]},4095")
    assert run_near(near) == [f"[{mine[-1]}]", f"[{mine[-1]}]"]
    assert run_near(sysfs(tmp_path / "far", "4095")) == ["[]", str(mine)]
