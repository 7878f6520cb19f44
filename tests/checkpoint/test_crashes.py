"""Published whole or not at all, whatever ends the writer and whenever."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from headrace_checkpoint import lease, staging
from headrace_checkpoint.manifest import read_manifest
from headrace_checkpoint.sharder import assign

from .conftest import tiny_llama

PARTS = 4
FAULTS = Path(__file__).with_name("faults.py")


def broken_at_every_call(model, fault):
    # In memory: the order of the calls is what counts, and a disk would take minutes.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        result = subprocess.run(
            [sys.executable, FAULTS, model, directory, fault],
            capture_output=True,
            text=True,
            check=True,
        )
    assert not result.stderr
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(reports) > 100
    assert reports[-1]["first"] == 0
    return reports


@pytest.fixture
def model(make_model):
    """Has a tensor of more than a chunk, so that direct and buffered writes are met."""
    return make_model(layers=1, tied=True, vocab_size=17000)


def test_killed_at_every_call_then_run_again(model):
    """Writes are torn: half of what was asked for is there."""
    reports = broken_at_every_call(model, "kill")
    # One that dies before it has a lock is collected by its age.
    nameless = [r["after_second"]["leftovers"] for r in reports if r["after_second"]["leftovers"]]
    assert len(nameless) == 1
    assert nameless[0][0].endswith(".new")
    nameless[0].clear()
    for position, report in enumerate(reports[:-1], 1):
        assert report["first"] == -signal.SIGKILL, position
        after = report["after_first"]
        assert after["sound"] is True or not after["published"], position
        assert report["second"] == 0, position
        assert report["after_second"] == {"published": True, "sound": True, "leftovers": []}, (
            position
        )
    assert {report["after_first"]["published"] for report in reports} == {True, False}
    assert {report["resumed"] for report in reports} == set(range(PARTS + 1))


def test_injected_error_at_every_call_then_run_again(model):
    """The clean-up of a failed writer must not fail it once more, nor leave half of it."""
    reports = broken_at_every_call(model, "errors")
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


def start(model, output, log, *options):
    command = [sys.executable, "-m", "headrace_checkpoint.cli", "shard", "--source", model]
    command += ["--output", output, "--tensor-parallel-size", "4", *options]
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


def at_work(volume):
    return list(volume.glob(".checkpoint.work/writing/*/model-rank-3-*"))


def ended(process):
    output, errors = process.communicate(timeout=120)
    assert not errors
    return process.returncode, json.loads(output.splitlines()[-1])


@pytest.mark.parametrize(
    "signals", [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)], ids=str
)
def test_a_signal_ends_it_cleanly(larger_model, tmp_path, signals):
    volume, log = tmp_path / "volume", tmp_path / "log"
    process = start(larger_model, volume / "checkpoint", log)
    wait_for(lambda: at_work(volume))
    for number in signals:
        process.send_signal(number)
    assert ended(process)[0] == 75
    assert json.loads(log.read_text())["reason"] == "Interrupted"
    assert list(volume.iterdir()) == []


def test_two_writers_of_one_part_at_once(larger_model, tmp_path, headrace, shard, monkeypatch):
    """The second waits for the first while that gets on, and then overtakes it."""
    monkeypatch.setattr(staging, "_PATIENCE_SECONDS", 0.3)
    volume = tmp_path / "volume"
    first = start(larger_model, volume / "checkpoint", tmp_path / "first-log")
    wait_for(lambda: at_work(volume))
    first.send_signal(signal.SIGSTOP)
    second = shard(larger_model, 4)
    assert second.reason == "Published"
    assert "other-writer-overtaken" in {event["event"] for event in second.events}
    first.send_signal(signal.SIGCONT)
    code, last = ended(first)
    assert (code, last["event"]) == (0, "AlreadyPublished")
    assert [path.name for path in volume.iterdir()] == ["checkpoint"]
    assert headrace("verify", volume / "checkpoint").code == 0


def test_a_writer_without_its_locks_does_no_harm(larger_model, tmp_path, shard, headrace):
    """As on a file system whose locks do not reach other nodes: it is taken for dead."""
    volume = tmp_path / "volume"
    process = start(larger_model, volume / "checkpoint", tmp_path / "log")
    wait_for(lambda: at_work(volume))
    process.send_signal(signal.SIGSTOP)
    for lock in volume.glob(".checkpoint.work/**/*lock"):
        content = lock.read_bytes()
        lock.unlink()
        lock.write_bytes(content)
    assert shard(larger_model, 4).reason == "Published"
    process.send_signal(signal.SIGCONT)
    code, last = ended(process)
    assert (code, last["event"]) == (0, "AlreadyPublished")
    assert [path.name for path in volume.iterdir()] == ["checkpoint"]
    assert headrace("verify", volume / "checkpoint").code == 0


def test_workers_of_two_jobs_share_the_work(larger_model, tmp_path, headrace, shard):
    """Two Jobs of two workers each, and one of the four killed: one whole checkpoint."""
    volume = tmp_path / "volume"
    options = ["--workers", 2, "--part-bytes", 4_000_000, "--worker"]
    workers = [
        start(
            larger_model, volume / "checkpoint", tmp_path / f"log-{job}-{worker}", *options, worker
        )
        for job in range(2)
        for worker in range(2)
    ]
    wait_for(lambda: at_work(volume))
    workers[0].kill()
    workers[0].communicate()
    endings = [ended(worker) for worker in workers[1:]]
    assert {code for code, _ in endings} == {0}
    events = [last["event"] for _, last in endings]
    assert set(events) <= {"Published", "AlreadyPublished", "PartsWritten"}
    again = start(larger_model, volume / "checkpoint", tmp_path / "log", *options, 0)
    code, last = ended(again)
    assert code == 0
    # Nobody tells it if the killed one published.
    assert [*events, last["event"]].count("Published") <= 1
    # The killed one may have had a directory that was not yet its lock's: removed in a while.
    left = {path.name for path in volume.iterdir() if not path.name.endswith(".new")}
    assert left == {"checkpoint"}
    assert headrace("verify", volume / "checkpoint").code == 0
    assert shard(larger_model, 4, output=tmp_path / "alone" / "checkpoint").code == 0
    one, other = (read_manifest(path / "checkpoint") for path in (volume, tmp_path / "alone"))
    assert one.total_bytes == other.total_bytes


def test_each_worker_writes_its_parts_and_any_may_be_last(larger_model, shard, volume, headrace):
    """Each source byte is read once and each target byte written once, whoever is last."""
    options = ("--workers", 3, "--part-bytes", 4_000_000, "--worker")
    outcomes = [shard(larger_model, 2, *options, worker) for worker in (2, 0)]
    # Nobody else has begun, so the first does the work of all.
    assert [outcome.reason for outcome in outcomes] == ["Published", "AlreadyPublished"]
    assert headrace("verify", volume / "checkpoint").code == 0


def test_injected_lack_of_locks_leaves_each_worker_its_parts(
    larger_model, shard, volume, headrace, monkeypatch
):
    def unsupported(fd, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(lease.fcntl, "flock", unsupported)
    options = ("--workers", 3, "--part-bytes", 4_000_000, "--worker")
    outcomes = [shard(larger_model, 2, *options, worker) for worker in (2, 0, 1)]
    reasons = [outcome.reason for outcome in outcomes]
    assert reasons == ["PartsWritten", "PartsWritten", "Published"]
    written = [
        {event["part"] for event in outcome.events if event["event"] == "part-written"}
        for outcome in outcomes
    ]
    parts = len(read_manifest(volume / "checkpoint").rank_parts(0))
    assert sorted(number for numbers in written for number in numbers) == list(range(parts))
    assert headrace("verify", volume / "checkpoint").code == 0


def test_shares_are_even():
    assert assign([4, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4]]
    assert assign([1], 3) == [[0], [], []]


def interrupted_after_one_part(model, shard, monkeypatch):
    """Leave a staging directory with one part of several done."""
    real = staging.Staging.record

    def record(self, number, parts):
        real(self, number, parts)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "record", record)
        with pytest.raises(KeyboardInterrupt):
            shard(model, 2, "--part-bytes", 200_000)


def test_a_damaged_part_is_not_trusted(model, shard, volume, headrace, monkeypatch):
    interrupted_after_one_part(model, shard, monkeypatch)
    (path,) = volume.glob(".checkpoint.work/checkpoint/model-rank-1-*")
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff\xff\xff")
    outcome = shard(model, 2)
    assert outcome.reason == "Published"
    (rejected,) = [event for event in outcome.events if event["event"] == "part-rejected"]
    assert path.name in rejected["error"]
    assert headrace("verify", volume / "checkpoint").code == 0


def test_another_source_starts_over(make_model, shard, volume, headrace, monkeypatch):
    """The same shapes and other weights are another model, also where only some differ."""
    size = {"layers": 1, "tied": True, "vocab_size": 17000}
    model, other = make_model(**size), make_model("other", seed=2, **size)
    interrupted_after_one_part(model, shard, monkeypatch)
    (other / "model.safetensors").rename(model / "model.safetensors")
    outcome = shard(model, 2)
    assert outcome.reason == "Published"
    assert "staging-discarded" in {event["event"] for event in outcome.events}
    assert "resumed" not in {event["event"] for event in outcome.events}


def test_a_changed_source_is_not_the_published_one(make_model, shard, volume, headrace):
    model, other = make_model(), make_model("other", seed=2)
    assert shard(model, 2).code == 0
    assert headrace("verify", volume / "checkpoint", "--source", model).code == 0
    (other / "model.safetensors").rename(model / "model.safetensors")
    outcome = shard(model, 2)
    assert (outcome.code, outcome.reason) == (65, "SourceChanged")
    assert "model.safetensors: differs since" in outcome.message
    outcome = headrace("verify", volume / "checkpoint", "--source", model)
    assert (outcome.code, outcome.events[-1]["reason"]) == (65, "SourceChanged")
