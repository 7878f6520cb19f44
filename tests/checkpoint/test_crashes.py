"""Published whole or not at all, whatever ends the writer and whenever."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import tiny_llama

FAULTS = Path(__file__).with_name("faults.py")


def broken_at_every_call(model, directory, fault):
    result = subprocess.run(
        [sys.executable, FAULTS, model, directory, fault],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not result.stderr
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(reports) > 30
    assert reports[-1]["first"] == 0
    return reports


@pytest.fixture
def model(make_model):
    """Has a tensor of more than a chunk, so that direct and buffered writes are met."""
    return make_model(layers=1, tied=True, vocab_size=17000)


def test_killed_at_every_call_then_run_again(model, tmp_path):
    reports = broken_at_every_call(model, tmp_path, "kill")
    for position, report in enumerate(reports[:-1], 1):
        assert report["first"] == -signal.SIGKILL, position
        after = report["after_first"]
        assert after["sound"] is True or not after["published"], position
        assert report["second"] == 0, position
        assert report["after_second"] == {"published": True, "sound": True, "leftovers": []}, (
            position
        )
    assert {report["after_first"]["published"] for report in reports} == {True, False}


def test_injected_error_at_every_call_then_run_again(model, tmp_path):
    """The clean-up of a failed writer must not fail it once more, nor leave half of it."""
    reports = broken_at_every_call(model, tmp_path, "EIO")
    for position, report in enumerate(reports, 1):
        assert report["first"] in {0, 75}, position
        after = report["after_first"]
        assert after["sound"] is True or not after["published"], position
        assert after["published"] or report["first"] == 75, position
        assert report["second"] == 0, position
        assert report["after_second"] == {"published": True, "sound": True, "leftovers": []}, (
            position
        )


@pytest.fixture(scope="session")
def larger_model(tmp_path_factory):
    """Large enough for a signal or another writer to meet a writer at work."""
    size = tiny_llama.Size(layers=3, hidden_size=1024, heads=16, intermediate_size=8192)
    return tiny_llama.make_tiny_llama(tmp_path_factory.mktemp("larger") / "model", size)


def start(model, output, log):
    command = [sys.executable, "-m", "headrace_checkpoint.cli", "shard", "--source", model]
    command += ["--output", output, "--tensor-parallel-size", "4"]
    return subprocess.Popen(
        [str(argument) for argument in command],
        env=os.environ | {"HEADRACE_TERMINATION_LOG": str(log)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "signals", [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)], ids=str
)
def test_a_signal_ends_it_cleanly(larger_model, tmp_path, signals):
    volume, log = tmp_path / "volume", tmp_path / "log"
    process = start(larger_model, volume / "checkpoint", log)
    wait_for(lambda: list(volume.glob(".checkpoint.*.tmp/model-rank-3-*")))
    for number in signals:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert json.loads(log.read_text())["reason"] == "Interrupted"
    assert not errors
    assert list(volume.iterdir()) == []


def test_two_writers_at_once(larger_model, tmp_path, headrace):
    """The second overtakes the first, and does not take it for dead."""
    volume = tmp_path / "volume"
    first = start(larger_model, volume / "checkpoint", tmp_path / "first-log")
    wait_for(lambda: list(volume.glob(".checkpoint.*.tmp/model-rank-3-*")))
    first.send_signal(signal.SIGSTOP)
    second = start(larger_model, volume / "checkpoint", tmp_path / "second-log")
    assert second.communicate(timeout=120)[1] == ""
    first.send_signal(signal.SIGCONT)
    assert first.communicate(timeout=120)[1] == ""
    assert (first.returncode, second.returncode) == (0, 0)
    assert json.loads((tmp_path / "first-log").read_text())["reason"] == "AlreadyPublished"
    assert json.loads((tmp_path / "second-log").read_text())["reason"] == "Published"
    assert [path.name for path in volume.iterdir()] == ["checkpoint"]
    assert headrace("verify", volume / "checkpoint").code == 0


def test_a_writer_taken_for_dead_cannot_publish(larger_model, tmp_path):
    """As on a file system whose locks do not reach other nodes: its lock file is gone."""
    volume, log = tmp_path / "volume", tmp_path / "log"
    process = start(larger_model, volume / "checkpoint", log)
    wait_for(lambda: list(volume.glob(".checkpoint.*.tmp/model-rank-3-*")))
    process.send_signal(signal.SIGSTOP)
    next(volume.glob(".checkpoint.*.lock")).unlink()
    other = start(larger_model, volume / "checkpoint", tmp_path / "other-log")
    assert other.wait(timeout=120) == 0
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=120) == 75
    assert json.loads(log.read_text())["reason"] == "StorageError"
    other.communicate()
    process.communicate()
    assert [path.name for path in volume.iterdir()] == ["checkpoint"]
