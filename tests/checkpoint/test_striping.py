"""Layout on Lustre. There is none here: that the volume is one is injected, and `lfs` is a
script that records its arguments and answers in the form of the real one's manual pages.
"""

import json
import os

import pytest

from headrace_checkpoint import striping
from headrace_checkpoint.manifest import read_manifest

DF = "".join(
    f"fsx-{kind}000{n}_UUID  1152241664  7808  1152231808  1% /fsx[{kind}:{n}]\n"
    for kind, n in [("MDT", 0), *(("OST", n) for n in range(4))]
)
SCRIPT = """#!/bin/sh
for path; do :; done
[ -d "$path" ] && content=$(ls -A "$path" | wc -l)
echo "${{content:-file}} $@" >> {calls}
[ "$1" = "{broken}" ] && {{ echo "error: $1: no such device" >&2; exit 19; }}
case "$1 $2" in
"df "*) printf '%s' '{df}' ;;
"getstripe -c") shift 2; for file in "$@"; do echo {count}; done; echo ;;
"getstripe -S") shift 2; for file in "$@"; do echo 16777216; done; echo ;;
esac
"""


@pytest.fixture
def recording_lfs(tmp_path, monkeypatch):
    """Put the script on PATH and a Lustre under the volume; returns what it was called with."""
    monkeypatch.setattr(striping, "file_system_type", lambda path: 0x0BD00BD0)
    calls = tmp_path / "calls"

    def install(count, broken=""):
        directory = tmp_path / "bin"
        directory.mkdir()
        script = SCRIPT.format(calls=calls, df=DF, count=count, broken=broken)
        (directory / "lfs").write_text(script)
        (directory / "lfs").chmod(0o755)
        monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
        return lambda: calls.read_text().splitlines()

    return install


def events(outcome):
    return {event["event"]: event for event in outcome.events}


def test_recorded_lfs_is_asked_before_the_first_byte_and_after_the_last(
    model, shard, volume, recording_lfs
):
    calls = recording_lfs(count=1)
    outcome = shard(model, 2)
    assert outcome.reason == "Published"
    assert events(outcome)["striped"]["stripeCount"] == 1
    df, setstripe, counts, sizes = (line.split() for line in calls())
    directory = df[-1]
    assert df == ["1", "df", directory]  # the lock
    assert setstripe == ["1", "setstripe", "-c", "1", "-S", "16777216", directory]
    parts = read_manifest(volume / "checkpoint").parts
    # Subdirectories take over the layout of the one they are made in.
    files = [f"{volume}/.checkpoint.work/checkpoint/{part.file}" for part in parts]
    assert counts == ["file", "getstripe", "-c", *files]
    assert sizes == ["file", "getstripe", "-S", *files]


@pytest.mark.parametrize(
    ("part_bytes", "stripes"), [(1, 1), (16 << 20, 1), ((16 << 20) + 1, 2), (4 << 30, 4)]
)
def test_recorded_lfs_is_told_as_many_targets_as_a_part_fills(
    tmp_path, recording_lfs, part_bytes, stripes
):
    calls = recording_lfs(count=stripes)
    assert striping.set_striping(tmp_path, part_bytes) == stripes
    assert f"setstripe -c {stripes} -S 16777216 {tmp_path}" in calls()[-1]


def test_recorded_lfs_shows_another_layout_than_was_set(model, shard, recording_lfs):
    recording_lfs(count=3)
    outcome = shard(model, 2)
    assert outcome.reason == "Published"
    failed = events(outcome)["striping-failed"]
    assert failed["level"] == "warning"
    assert "asked for 1 OSTs, files have [3]" in failed["error"]


@pytest.mark.parametrize("command", ["df", "setstripe", "getstripe"])
def test_recorded_lfs_fails(model, shard, recording_lfs, command):
    recording_lfs(count=1, broken=command)
    outcome = shard(model, 2)
    assert outcome.reason == "Published"
    error = events(outcome)["striping-failed"]["error"]
    assert error == f"lfs {command}: status 19: error: {command}: no such device"


def test_recorded_lfs_names_no_target(tmp_path, recording_lfs, monkeypatch, capsys):
    monkeypatch.setitem(globals(), "DF", "")
    calls = recording_lfs(count=1)
    assert striping.set_striping(tmp_path, 1) is None
    assert "names no OST" in json.loads(capsys.readouterr().out)["error"]
    assert len(calls()) == 1


def test_injected_lustre_without_lfs(model, shard, recording_lfs, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = shard(model, 2)
    assert outcome.reason == "Published"
    assert "'lfs'" in events(outcome)["striping-failed"]["error"]


def test_another_file_system_is_left_alone_and_it_says_so(model, shard):
    outcome = shard(model, 2)
    line = events(outcome)["striping-skipped"]
    assert line["reason"] == "not a Lustre file system"
    assert json.dumps(line)
