"""Volumes that are full, read-only or failing: exit code 75, the reason, nothing half written.

The full and the read-only volume are real file systems; failing reads are injected, since
no local file system fails to order.
"""

import errno
import fcntl
import os
import resource
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from headrace_checkpoint import lease, staging
from headrace_checkpoint.manifest import read_manifest

from .conftest import read_tensors, write_tensors


@pytest.fixture
def small_volume(tmp_path):
    """Mount a tmpfs; call with mount options, get its path."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    path = tmp_path / "small-volume"
    path.mkdir()

    def mount(options):
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "headrace-test", path], check=True)
        return path

    yield mount
    subprocess.run(["umount", path], check=True)


def test_too_small_a_volume_is_noticed_before_writing(model, shard, small_volume):
    volume = small_volume("size=1m")
    outcome = shard(model, output=volume / "checkpoint")
    assert (outcome.code, outcome.reason) == (75, "NoSpaceOnVolume")
    assert "bytes free: the checkpoint needs 2492960" in outcome.message
    assert list(volume.iterdir()) == []


def test_a_volume_that_fills_up(model, shard, small_volume):
    """Room for the weights alone, not for headers and files: the kernel's ENOSPC."""
    volume = small_volume("size=2456k")
    outcome = shard(model, output=volume / "checkpoint")
    assert (outcome.code, outcome.reason) == (75, "NoSpaceOnVolume")
    assert "model-rank-0-part-0.safetensors: No space left on device" in outcome.message
    assert list(volume.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,size=8m", volume], check=True)
    assert shard(model, output=volume / "checkpoint").reason == "Published"


def test_no_inodes_left(model, shard, small_volume):
    volume = small_volume("nr_inodes=6")
    outcome = shard(model, output=volume / "checkpoint")
    assert (outcome.code, outcome.reason) == (75, "NoSpaceOnVolume")
    assert list(volume.iterdir()) == []


def test_read_only_volume(model, shard, small_volume):
    volume = small_volume("size=8m")
    subprocess.run(["mount", "-o", "remount,ro", volume], check=True)
    outcome = shard(model, output=volume / "root" / "checkpoint")
    assert (outcome.code, outcome.reason) == (75, "VolumeReadOnly")
    assert "Read-only file system; mount the volume read-write for user 0" in outcome.message


def test_published_checkpoint_on_a_read_only_volume(model, shard, small_volume):
    volume = small_volume("size=8m")
    shard(model, output=volume / "checkpoint")
    subprocess.run(["mount", "-o", "remount,ro", volume], check=True)
    assert shard(model, output=volume / "checkpoint").reason == "AlreadyPublished"


def test_file_size_limit(model, shard, volume):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        outcome = shard(model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (outcome.code, outcome.reason) == (75, "NoSpaceOnVolume")
    assert "File too large" in outcome.message
    assert list(volume.iterdir()) == []


def test_injected_read_error_of_the_source(model, shard, volume, monkeypatch):
    real = os.preadv

    def failing(fd, buffers, offset):
        if offset > 1_000_000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    outcome = shard(model)
    assert (outcome.code, outcome.reason) == (75, "StorageError")
    assert "model.safetensors: reading failed: Input/output error" in outcome.message
    assert not volume.exists()


@pytest.mark.parametrize("change", ["touched", "truncated"])
def test_source_changed_while_it_is_read(model, shard, volume, monkeypatch, change):
    path = model / "model.safetensors"
    real, calls = os.preadv, 0

    def changing(fd, buffers, offset):
        nonlocal calls
        calls += 1
        if calls == 40:
            os.utime(path) if change == "touched" else os.truncate(path, 100_000)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", changing)
    outcome = shard(model)
    assert outcome.reason == {"touched": "StorageError", "truncated": "SourceCorrupt"}[change]
    assert list(volume.iterdir()) == []


def evict(path):
    """Drop a file from the page cache, so that it is read by direct transfers."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def buffered(fd, mode):
    """A second descriptor that may transfer what is not aligned."""
    same = os.open(f"/proc/self/fd/{fd}", mode)
    try:
        yield same
    finally:
        os.close(same)


@pytest.mark.parametrize("limit", [69_632, 70_001], ids=["aligned", "unaligned"])
def test_short_reads_and_writes_are_continued(model, shard, volume, monkeypatch, limit):
    """Cut short they go on where they ended, also where direct transfers cannot."""
    evict(model / "model.safetensors")
    preadv, pwrite = os.preadv, os.pwrite

    def read(fd, buffers, offset):
        if len(buffers[0]) <= limit:
            return preadv(fd, buffers, offset)
        with buffered(fd, os.O_RDONLY) as same:
            return preadv(same, [buffers[0][:limit]], offset)

    def write(fd, data, offset):
        if len(data) <= limit:
            return pwrite(fd, data, offset)
        with buffered(fd, os.O_WRONLY) as same:
            return pwrite(same, data[:limit], offset)

    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(os, "pwrite", write)
    assert shard(model).code == 0
    monkeypatch.undo()
    name = "model.layers.1.self_attn.o_proj.weight"
    part = read_tensors(volume / "checkpoint" / "model-rank-0-part-0.safetensors")
    assert part[name] == read_tensors(model / "model.safetensors")[name]


@pytest.mark.parametrize("cached", [False, True])
def test_the_source_is_read_from_where_it_is(model, shard, monkeypatch, cached):
    """From the page cache where it is there, and past it otherwise."""
    kernel = tuple(map(int, os.uname().release.split(".")[:2]))
    kind = subprocess.run(["stat", "-fc%T", model], capture_output=True, text=True, check=True)
    if kernel < (6, 5) or kind.stdout.strip() == "tmpfs":
        pytest.skip("needs cachestat(2) and a file system on a disk")
    evict(model / "model.safetensors")
    if cached:
        (model / "model.safetensors").read_bytes()
    real, direct = os.preadv, []

    def recording(fd, buffers, offset):
        direct.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", recording)
    assert shard(model).code == 0
    assert direct.count(True) == 0 if cached else direct.count(True) > 20


def test_injected_lack_of_direct_transfers(model, shard, volume, monkeypatch, headrace):
    def refusing(real, flags):
        def call(*arguments):
            if arguments[flags] & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(*arguments)

        return call

    monkeypatch.setattr(os, "open", refusing(os.open, 1))
    monkeypatch.setattr(fcntl, "fcntl", refusing(fcntl.fcntl, -1))
    outcome = shard(model, 2)
    said = [e["directory"] for e in outcome.events if e["event"] == "no-direct-transfers"]
    assert len(said) == 2
    assert said[0] == str(model)
    assert headrace("verify", volume / "checkpoint").code == 0


def test_injected_refusal_of_direct_transfers_at_the_transfer(
    model, shard, volume, monkeypatch, headrace
):
    """The flag is taken, as by some file systems in user space."""
    evict(model / "model.safetensors")

    def refusing(real):
        def call(fd, *arguments):
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(fd, *arguments)

        return call

    monkeypatch.setattr(os, "preadv", refusing(os.preadv))
    monkeypatch.setattr(os, "pwrite", refusing(os.pwrite))
    outcome = shard(model, 2)
    assert outcome.reason == "Published"
    said = [e["directory"] for e in outcome.events if e["event"] == "no-direct-transfers"]
    assert len(said) == len(set(said)) > 0
    assert headrace("verify", volume / "checkpoint").code == 0


def leave_behind(volume, name, lock=True):
    path = volume / name
    path.mkdir(parents=True)
    (path / "model-rank-0-part-0.safetensors").write_bytes(b"half")
    if lock:
        (path / "lock").touch()
    return path


def make_old(path):
    for found in [*path.rglob("*"), path]:
        os.utime(found, (0, 0))


def test_leftovers_are_removed_and_nothing_else(model, shard, volume):
    leave_behind(volume, ".checkpoint.0123abcd.new")
    make_old(leave_behind(volume, ".checkpoint.4567abcd.new", lock=False))
    leave_behind(volume, ".checkpoint.89ababcd.dead")
    kept = [".other.0123abcd.new", ".checkpoint.x.new", ".checkpoint.y.0123abcd.new", "checkpoint2"]
    kept.append(leave_behind(volume, ".checkpoint.cdefabcd.new", lock=False).name)
    for name in kept:
        (volume / name).mkdir(exist_ok=True)
    outcome = shard(model)
    assert [e["event"] for e in outcome.events].count("leftover-removed") == 3
    assert sorted(path.name for path in volume.iterdir()) == sorted(["checkpoint", *kept])


def test_injected_lack_of_file_locks(model, shard, volume, monkeypatch):
    """As on Lustre mounted without flock: leftovers are judged by their age, and it says so."""

    def unsupported(fd, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(lease.fcntl, "flock", unsupported)
    old = leave_behind(volume, ".checkpoint.0123abcd.new")
    young = leave_behind(volume, ".checkpoint.4567abcd.new")
    make_old(old)
    outcome = shard(model)
    assert outcome.reason == "Published"
    assert "no-file-locks" in {event["event"] for event in outcome.events}
    assert not old.exists()
    assert young.exists()


def test_another_writer_is_first(model, shard, volume, monkeypatch, headrace):
    """The other, of the same parts, publishes between this one's look and its rename."""
    real = staging.Staging.publish

    def late(self, manifest):
        monkeypatch.setattr(staging.Staging, "publish", real)
        assert shard(model).reason == "Published"
        return real(self, manifest)

    monkeypatch.setattr(staging.Staging, "publish", late)
    assert shard(model).reason == "AlreadyPublished"
    assert [path.name for path in volume.iterdir()] == ["checkpoint"]
    assert headrace("verify", volume / "checkpoint").code == 0


def test_a_second_signal_does_not_cut_the_clean_up_short(model, shard, volume, monkeypatch):
    real = staging.shutil.rmtree

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        real(*arguments, **options)

    def record(self, *_):
        monkeypatch.setattr(staging.shutil, "rmtree", interrupted)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(staging.Staging, "record", record)
    outcome = shard(model)
    assert (outcome.code, outcome.reason) == (75, "Interrupted")
    assert list(volume.iterdir()) == []


def test_a_defect_is_reported_as_one(model, shard, volume, monkeypatch):
    def broken(self, *_):
        raise ZeroDivisionError("of our own making")

    monkeypatch.setattr(staging.Staging, "record", broken)
    outcome = shard(model)
    assert (outcome.code, outcome.reason) == (70, "InternalError")
    assert outcome.message == "ZeroDivisionError: of our own making"
    assert list(volume.iterdir()) == []


def test_injected_error_when_a_written_file_is_closed(model, shard, volume, monkeypatch):
    """As of NFS, which may tell of a quota only then."""
    real = os.close

    def closing(fd):
        path = Path(f"/proc/self/fd/{fd}").readlink()
        real(fd)
        if path.name == "model-rank-0-part-0.safetensors":
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "close", closing)
    outcome = shard(model)
    assert (outcome.code, outcome.reason) == (75, "NoSpaceOnVolume")
    assert "model-rank-0-part-0.safetensors: Disk quota exceeded" in outcome.message
    assert list(volume.iterdir()) == []


def test_what_another_writer_has_discarded_is_gone_already(tmp_path):
    staging.discard(tmp_path / ".checkpoint.work")


def test_many_parts_and_ranks(model, shard, volume):
    """Each tensor in a file of its own, for four ranks."""
    assert shard(model, 4, "--part-bytes", 1).code == 0
    manifest = read_manifest(volume / "checkpoint")
    assert all(len(part.tensors) == 1 for part in manifest.parts)
    assert len(manifest.parts) == 4 * len(manifest.rank_parts(0))


def test_scalars_alone_fill_a_part(model, shard, volume):
    """A part may hold nothing but an unaligned scalar."""
    shard(model, 1, "--part-bytes", 1)
    sizes = {part.data_bytes for part in read_manifest(volume / "checkpoint").parts}
    assert 4 in sizes


def test_weights_given_twice_with_equal_bytes(make_model, shard, volume):
    source = make_model(tied=True)
    path = source / "model.safetensors"
    tensors = read_tensors(path)
    write_tensors(path, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert shard(source).code == 0
    stored = read_tensors(volume / "checkpoint" / "model-rank-0-part-0.safetensors")
    assert "model.embed_tokens.weight" not in stored
    assert "lm_head.weight" in stored
