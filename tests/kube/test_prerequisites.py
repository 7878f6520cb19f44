"""What is missing is said in one message, with what still works and what to do."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from localkube import LocalkubeError, binaries, prerequisites
from localkube.__main__ import main

NOBODY = 65534
# Imports what is imported late as well, since nobody may read this user's Python.
AS_NOBODY = (
    "import encodings.idna, os, sys; from localkube.__main__ import main; "
    f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY}); sys.exit(main(sys.argv[1:]))"
)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as somebody else")


def as_nobody(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", AS_NOBODY, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@needs_root
def test_a_node_without_root_is_refused_in_one_message():
    result = as_nobody("up", "--node", "--dir", "/nonexistent/cluster")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "root is missing (the effective user id is 65534)" in result.stderr
    assert "What works without: the control plane and simulated nodes" in result.stderr
    assert result.stderr.endswith("bring the node up as root\n")


@needs_root
@pytest.mark.cluster
def test_a_control_plane_needs_no_root():
    assets = binaries.ensure(binaries.CONTROL_PLANE)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        for name, path in assets.items():
            os.link(path, Path(folder) / name)
        os.chown(folder, NOBODY, NOBODY)
        cluster = Path(folder) / "cluster"
        try:
            up = as_nobody("up", "--dir", cluster, KUBEBUILDER_ASSETS=folder)
            assert up.returncode == 0, up.stderr
            status = as_nobody("status", "--dir", cluster)
            pids = dict(line.split() for line in status.stdout.splitlines())
            assert set(pids) == {*binaries.CONTROL_PLANE} - {"kubectl"}
            assert Path(f"/proc/{pids['kube-apiserver']}").stat().st_uid == NOBODY
        finally:
            down = as_nobody("down", "--dir", cluster)
        assert down.returncode == 0, down.stderr
        assert as_nobody("status", "--dir", cluster).returncode == 3


def test_every_missing_package_is_named_once(tmp_path, monkeypatch):
    monkeypatch.setattr(prerequisites, "SEARCH_PATH", str(tmp_path))
    monkeypatch.setattr(prerequisites, "PLUGIN_DIRECTORIES", (str(tmp_path),))
    with pytest.raises(LocalkubeError) as refusal:
        prerequisites.check_node()
    message = str(refusal.value)
    for package in {*prerequisites.COMMANDS.values(), prerequisites.PLUGINS_PACKAGE}:
        assert message.count(f"(package {package})") == 1
    assert "run `python -m localkube install-packages` as root" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["up", "--kwok", "-1", "--dir", "x"], "must be 0 or more"),
        (["up", "--kwok", "many", "--dir", "x"], "invalid"),
        (["up"], "--dir"),
        (["fly"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_errors_of_the_system_are_no_tracebacks(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert main(["up", "--dir", str(file / "below")]) == 1
    assert main(["image-import", "--dir", str(tmp_path), "missing.tar"]) == 1
    errors = capsys.readouterr().err
    assert "Not a directory" in errors
    assert "has no running node" in errors
