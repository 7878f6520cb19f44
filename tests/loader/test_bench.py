"""bench/loader.py at a tiny size: what it promises to print is there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "loader.py"


def bench(directory: Path, *options: str, path: str | None = None) -> dict[str, Any]:
    """Run on the host with little; returns what it wrote, whose result is what it printed."""
    small = ["--backend", "host", "--gib", "0.005", *options]
    files = ["--directory", directory / "bench", "--output", directory / "result.json"]
    done = subprocess.run(
        [sys.executable, BENCH, *small, *files],
        env=os.environ | ({"PATH": path} if path else {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "step 1 of 1" in done.stderr
    result: dict[str, Any] = json.loads((directory / "result.json").read_text())
    assert result["result"] == json.loads(done.stdout)
    assert not list((directory / "bench").iterdir())
    return result


def test_host_run_ends_with_the_promised_line(tmp_path: Path) -> None:
    result = bench(tmp_path, "--repeats", "1", "--peer-gib", "0", "--cold-gib", "0")
    line = result["result"]
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
    assert [point["gib"] for point in result["points"]] == [0.005]


def test_several_ranks_are_loaded_at_once(tmp_path: Path) -> None:
    result = bench(tmp_path, "--repeats", "1", "--cold-gib", "0", "--ranks", "3")
    (point,) = result["points"]
    assert 0 < point["headrace"]["median"] <= 3.001 * point["slowest_rank"]["median"]
    assert result["result"]["ranks"] == 3


FIO = """#!/bin/sh
echo '{"jobs": [{"read": {"io_bytes": 5242880, "runtime": 1}}]}'
exit %d
"""


@pytest.mark.parametrize("code", [0, 1])
def test_cold_loads_are_compared_with_an_imitated_fio_unless_it_fails(
    tmp_path: Path, code: int
) -> None:
    script = tmp_path / "fio"
    script.write_text(FIO % code)
    script.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = bench(tmp_path, "--repeats", "2", "--peers", path=path)
    line, (point,) = result["result"], result["points"]
    if point["cold_path"] != "O_DIRECT":
        pytest.skip("the file system has no direct reads")
    assert line["cold_ratio_vs_direct_read"] > 0
    assert len(point["cold_headrace"]["all"]) == 2
    assert (line["cold_ratio_vs_fio"] is None, "cold_fio" not in point) == (code != 0, code != 0)
