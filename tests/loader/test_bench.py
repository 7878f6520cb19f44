"""bench/loader.py at a tiny size: what it promises to print is there."""

import json
import subprocess
import sys
from pathlib import Path

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
