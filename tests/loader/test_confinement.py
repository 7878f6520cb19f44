"""The loader as a pod confines it: an ordinary user, a read-only root file system."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

USER = 1000
WRITABLE = ("runtime", "plugin", "tmp")

# Reading everything stands for an image's files: here the interpreter may be in somebody's home.
CAPABILITIES = "-all,+dac_read_search"
AS_USER = [
    "setpriv",
    f"--reuid={USER}",
    f"--regid={USER}",
    "--clear-groups",
    "--no-new-privs",
    f"--bounding-set={CAPABILITIES}",
    f"--inh-caps={CAPABILITIES}",
    f"--ambient-caps={CAPABILITIES}",
]

# Prints the loader's last status.
CONFINED = """
import json, os, subprocess, sys, time, urllib.request
root = sys.argv[1]
try:
    open(root + "/probe", "w")
except OSError as error:
    assert error.errno == 30, error
process = subprocess.Popen(
    [sys.executable, "-m", "headrace_loader", "--backend", "host", "--port", "19417",
     "--host", "127.0.0.1", "--checkpoint", root + "/checkpoint",
     "--runtime-dir", root + "/runtime", "--plugin-dir", root + "/plugin"],
    env={"TMPDIR": root + "/tmp", "PATH": os.environ["PATH"]}, stdout=sys.stderr,
)
text = "{}"
while process.poll() is None and json.loads(text).get("phase") not in ("Ready", "Failed"):
    time.sleep(0.1)
    try:
        text = urllib.request.urlopen("http://127.0.0.1:19417/v1/status", timeout=5).read()
    except OSError:
        continue
process.terminate()
process.wait()
print(json.dumps(json.loads(text)))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="changing user and mounts needs root")
def test_an_ordinary_user_with_a_read_only_root(support: Any, tmp_path: Path) -> None:
    support.make_checkpoint(tmp_path / "checkpoint")
    for name in WRITABLE:
        (tmp_path / name).mkdir()
        os.chown(tmp_path / name, USER, USER)
    for directory in (tmp_path, *tmp_path.parents[:-1]):
        directory.chmod(stat.S_IMODE(directory.stat().st_mode) | 0o055)
    mounts = [f"mount --bind {tmp_path}/{name} {tmp_path}/{name}" for name in WRITABLE]
    script = " && ".join([*mounts, "mount -o remount,bind,ro /", 'exec "$@"'])
    command = ["unshare", "--mount", "sh", "-c", script, "sh", *AS_USER]
    command += [sys.executable, "-B", "-c", CONFINED, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert out.returncode == 0, out.stderr
    status = json.loads(out.stdout.splitlines()[-1])
    assert status["phase"] == "Ready", out.stderr
    assert (tmp_path / "plugin/headrace_engine.dist-info/entry_points.txt").stat().st_uid == USER
