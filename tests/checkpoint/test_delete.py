"""`headrace delete`: whole or not at all, and never what somebody holds."""

import errno
import fcntl
import os

import pytest

from headrace_checkpoint import lease
from headrace_checkpoint.lease import holding
from headrace_checkpoint.manifest import read_manifest


@pytest.fixture
def checkpoint(model, shard, volume):
    shard(model, 2)
    return volume / "checkpoint"


def test_deleted_and_deleted_again(headrace, checkpoint, volume):
    (volume / ".checkpoint.0123abcd.dead").mkdir()
    (volume / "checkpoint2").mkdir()
    outcome = headrace("delete", checkpoint)
    assert (outcome.code, outcome.reason) == (0, "Deleted")
    assert [path.name for path in volume.iterdir()] == ["checkpoint2"]
    outcome = headrace("delete", checkpoint)
    assert (outcome.code, outcome.events[-1]["event"]) == (0, "AlreadyDeleted")


def test_what_a_loader_holds_is_left_alone(headrace, checkpoint):
    with holding(checkpoint), holding(checkpoint) as held:
        assert held
        outcome = headrace("delete", checkpoint)
        assert (outcome.code, outcome.reason) == (75, "CheckpointInUse")
    assert headrace("verify", checkpoint).code == 0
    assert headrace("delete", checkpoint).code == 0


def test_what_a_writer_works_at_is_left_alone(headrace, model, shard, volume, monkeypatch):
    from headrace_checkpoint.staging import Staging

    codes = []
    real = Staging.record

    def record(self, number, parts):
        real(self, number, parts)
        codes.append(headrace("delete", volume / "checkpoint").code)

    monkeypatch.setattr(Staging, "record", record)
    assert shard(model, 2).reason == "Published"
    assert codes == [75]
    assert headrace("verify", volume / "checkpoint").code == 0


def test_parts_that_nobody_goes_on_with_are_deleted(headrace, volume):
    (volume / ".checkpoint.work").mkdir(parents=True)
    (volume / ".checkpoint.work" / "lock").touch()
    assert headrace("delete", volume / "checkpoint").code == 0
    assert list(volume.iterdir()) == []


def test_injected_lack_of_locks_keeps_it(headrace, checkpoint, monkeypatch):
    def unsupported(fd, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(lease.fcntl, "flock", unsupported)
    outcome = headrace("delete", checkpoint)
    assert (outcome.code, outcome.reason) == (75, "CheckpointInUse")
    assert "no file locks" in outcome.message


def test_injected_rule_of_nfs_that_locks_alone_what_is_open_for_writing(
    headrace, checkpoint, monkeypatch
):
    real = lease.fcntl.flock

    def flock(fd, operation):
        writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        if operation & fcntl.LOCK_EX and not writable:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(fd, operation)

    monkeypatch.setattr(lease.fcntl, "flock", flock)
    assert headrace("delete", checkpoint).code == 0


def test_injected_error_of_locking_is_told_and_keeps_it(headrace, checkpoint, monkeypatch):
    def failing(fd, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(lease.fcntl, "flock", failing)
    outcome = headrace("delete", checkpoint)
    assert (outcome.code, outcome.reason) == (75, "StorageError")
    monkeypatch.undo()
    assert read_manifest(checkpoint).parts


def test_no_checkpoint_is_left_alone(headrace, tmp_path):
    directory = tmp_path / "precious"
    directory.mkdir()
    (directory / "file").touch()
    outcome = headrace("delete", directory)
    assert (outcome.code, outcome.reason) == (65, "CheckpointConflict")
    assert (directory / "file").exists()


def test_who_deletes_keeps_loaders_out(checkpoint):
    with holding(checkpoint, exclusive=True) as alone, holding(checkpoint) as held:
        assert (alone, held) == (True, False)
