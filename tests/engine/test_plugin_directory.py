"""The directory a loader makes for a stock engine's PYTHONPATH."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace_loader.errors import RuntimeDirectoryUnusable
from headrace_loader.plugin import copy_engine_side

FIND = """
import importlib.metadata, sys
for group in ("vllm.general_plugins", "sglang.srt.plugins"):
    found = importlib.metadata.entry_points(group=group, name="headrace")
    assert "torch" not in sys.modules
    print([point.value for point in found], found["headrace"].load().__module__)
import headrace_engine, headrace_handover
print(headrace_engine.__file__, headrace_handover.__file__)
assert "torch" not in sys.modules, "plugins must be cheap to import"
"""


def test_a_stock_interpreter_finds_the_entry_point(tmp_path: Path) -> None:
    copy_engine_side(tmp_path)
    # -S: without the site packages, where this repository may be installed
    out = subprocess.run(
        [sys.executable, "-S", "-c", FIND],
        env={"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.splitlines()
    assert out[0] == "['headrace_engine:register'] headrace_engine"
    assert out[1] == "['headrace_engine:register_sglang'] headrace_engine"
    assert out[2].count(str(tmp_path)) == 2


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(directory)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in directory.rglob("*")
        if "__pycache__" not in path.parts
    }


def test_an_equal_copy_is_left_alone(tmp_path: Path) -> None:
    copy_engine_side(tmp_path)
    (tmp_path / "headrace_engine/__pycache__").mkdir()  # an engine has imported it
    before = snapshot(tmp_path / "headrace_engine")
    copy_engine_side(tmp_path)
    assert snapshot(tmp_path / "headrace_engine") == before


def test_another_version_and_leftovers_are_replaced(tmp_path: Path) -> None:
    copy_engine_side(tmp_path)
    changed = tmp_path / "headrace_engine/errors.py"
    expected = changed.read_text()
    changed.write_text("half a file")
    (tmp_path / "headrace_engine/removed_since.py").write_text("")
    (tmp_path / ".new-dead").mkdir()
    copy_engine_side(tmp_path)
    assert changed.read_text() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "headrace_engine",
        "headrace_engine.dist-info",
        "headrace_handover",
    ]
    assert not (tmp_path / "headrace_engine/removed_since.py").exists()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeDirectoryUnusable, match="--plugin-dir"):
        copy_engine_side(tmp_path / "file" / "plugin")


def test_it_is_there_before_the_loader_is_alive(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    """With gate Overlap the engine starts when /healthz answers."""
    support.make_checkpoint(tmp_path / "checkpoint")
    loader = start_loader(tmp_path / "checkpoint", f"--plugin-dir={tmp_path / 'plugin'}")
    loader.until(lambda _: True)
    assert (tmp_path / "plugin/headrace_engine.dist-info/entry_points.txt").exists()
