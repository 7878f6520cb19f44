"""bench/sharder.py ends with its line of JSON; what it measures is not asserted here."""

import json
import os
import subprocess
import sys

from .conftest import REPOSITORY

SIZES = {"gib": 0.02, "hidden_size": 512, "intermediate_size": 1024, "heads": 8, "kv_heads": 4}
SIZES |= {"vocab_size": 512, "tensor_parallel_size": 2, "rounds": 3}


def bench(directory, **options):
    command = [sys.executable, REPOSITORY / "bench" / "sharder.py", "--directory", directory]
    return subprocess.run(
        command + [f"--{name.replace('_', '-')}={value}" for name, value in options.items()],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY / "tools"), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )


def test_last_line(tmp_path):
    result = bench(tmp_path, **SIZES)
    assert result.returncode == 0, result.stderr
    *progress, last = result.stdout.splitlines()
    assert [line for line in progress if "step 7 of 7: cp, round 3 of 3" in line]
    report = json.loads(last)
    assert 18_000_000 < report["bytes"] < 24_000_000
    assert 0 < report["write_ratio_vs_cp_min"] <= report["write_ratio_vs_cp"]
    assert report["write_ratio_vs_cp"] <= report["write_ratio_vs_cp_max"]
    assert 0.01 < report["rss_gib"] < 2
    assert report["largest_tensor_gib"] == round(1024 * 512 * 2 / 2**30, 3)
    assert len(report["shard_seconds"]) == len(report["cp_seconds"]) == 3
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_noticed_first(tmp_path):
    result = bench(tmp_path, gib=1e9)
    assert result.returncode == 1
    assert result.stderr.startswith("--gib 1e+09: source and copy need ")
    assert list(tmp_path.iterdir()) == []
