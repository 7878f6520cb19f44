"""bench/loader.py at a tiny size: what it promises to print is there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "loader.py"


def test_host_run_ends_with_the_promised_line(tmp_path: Path) -> None:
    small = ["--backend", "host", "--gib", "0.005", "--repeats", "1"]
    alone = ["--peer-gib", "0", "--cold-gib", "0"]
    files = ["--directory", tmp_path / "bench", "--output", tmp_path / "result.json"]
    done = subprocess.run(
        [sys.executable, BENCH, *small, *alone, *files],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "step 1 of 1" in done.stderr
    line = json.loads(done.stdout)
    assert line["device"] == "host"
    assert line["path"] in ("O_DIRECT", "PageCache", "buffered")
    assert line["warm_ratio_vs_read"] > 0
    assert line["overhead_s"] > 0
    assert line["attach_ms"] > 0
    for unmeasured in (
        "warm_ratio_vs_pinned",
        "cold_ratio_vs_fio",
        "best_peer",
        "ratio_vs_best_peer",
    ):
        assert line[unmeasured] is None
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["result"] == line
    assert [point["gib"] for point in result["points"]] == [0.005]
    assert not list((tmp_path / "bench").iterdir())


def test_several_ranks_are_loaded_at_once(tmp_path: Path) -> None:
    small = ["--backend", "host", "--gib", "0.005", "--repeats", "1", "--ranks", "3"]
    files = ["--directory", tmp_path / "bench", "--output", tmp_path / "result.json"]
    done = subprocess.run(
        [sys.executable, BENCH, *small, "--cold-gib", "0", *files],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (point,) = json.loads((tmp_path / "result.json").read_text())["points"]
    assert 0 < point["headrace"]["median"] <= 3.001 * point["slowest_rank"]["median"]
    assert json.loads(done.stdout)["ranks"] == 3


FIO = """#!/bin/sh
echo '{"jobs": [{"read": {"io_bytes": 5242880, "runtime": 1}}]}'
exit %d
"""


def cold_run(directory: Path, fio: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run with cold rounds beside a program that says it is fio and exits with a code."""
    script = directory / "fio"
    script.write_text(FIO % fio)
    script.chmod(0o755)
    small = ["--backend", "host", "--gib", "0.005", "--repeats", "2", "--peers"]
    files = ["--directory", directory / "bench", "--output", directory / "result.json"]
    done = subprocess.run(
        [sys.executable, BENCH, *small, *files],
        env=os.environ | {"PATH": f"{directory}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (point,) = json.loads((directory / "result.json").read_text())["points"]
    return json.loads(done.stdout), point


@pytest.mark.parametrize("code", [0, 1])
def test_cold_loads_are_compared_with_an_imitated_fio_unless_it_fails(
    tmp_path: Path, code: int
) -> None:
    line, point = cold_run(tmp_path, code)
    if point["cold_path"] != "O_DIRECT":
        pytest.skip("the file system has no direct reads")
    assert line["cold_ratio_vs_direct_read"] > 0
    assert len(point["cold_headrace"]["all"]) == 2
    assert (line["cold_ratio_vs_fio"] is None, "cold_fio" not in point) == (code != 0, code != 0)
