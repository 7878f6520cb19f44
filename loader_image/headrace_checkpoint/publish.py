"""Publishes a checkpoint directory whole or not at all.

A writer works in `<parent>/.<name>.<uid>.tmp` and holds a lock on `.<name>.<uid>.lock`
beside it; one rename makes the directory visible. What dead writers left is recognised
by its free lock and removed by the next writer of the same name. Where the file system
has no locks, or none across nodes, a live writer may be taken for dead: since a leftover
is renamed before anything in it is removed, that writer fails to publish and can start
again, but a half removed directory is never published.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from headrace_checkpoint.errors import CheckpointConflict, ManifestInvalid, StorageError
from headrace_checkpoint.manifest import Manifest, read_manifest
from headrace_checkpoint.report import log
from headrace_checkpoint.storage import make_directories, sync_directory, writing

_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
_ABANDONED_SECONDS = 15 * 60
_ATTEMPTS = 16


def find_published(directory: Path, identity: Mapping[str, object]) -> Manifest | None:
    """Return the manifest of the checkpoint that is already there, None where there is none.

    Raises CheckpointConflict where `directory` holds anything else: the checkpoint of
    another identity, a damaged one, or none at all.
    """
    try:
        with writing(directory):
            empty = not any(directory.iterdir())
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        if isinstance(error.__cause__, NotADirectoryError):
            raise CheckpointConflict(f"{directory}: is not a directory; remove it") from None
        raise
    if empty:
        return None
    try:
        manifest = read_manifest(directory)
    except (FileNotFoundError, ManifestInvalid) as error:
        raise CheckpointConflict(
            f"{directory}: exists and is no checkpoint ({error}); remove it"
        ) from None
    if manifest.identity != identity:
        raise CheckpointConflict(
            f"{directory}: holds the checkpoint of {dict(manifest.identity)}, asked for was "
            f"{dict(identity)}; choose another directory or remove it"
        )
    _check_sizes(directory, manifest)
    return manifest


def _check_sizes(directory: Path, manifest: Manifest) -> None:
    expected = {part.file: part.file_bytes for part in manifest.parts}
    expected |= {file.file: file.nbytes for file in manifest.files}
    for name, size in expected.items():
        try:
            found = f"{(directory / name).stat().st_size} bytes"
        except OSError as error:
            found = error.strerror or str(error)
        if found != f"{size} bytes":
            raise CheckpointConflict(
                f"{directory / name}: {found}, the manifest says {size} bytes; "
                "the published checkpoint is damaged, remove it"
            )


class Workspace:
    """A locked temporary directory beside `target`, as a context manager.

    Leaving it removes the directory unless `publish` made it the target.
    """

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> Self:
        make_directories(self.target.parent)
        self._lock, self._lock_fd = _create_lock(self.target)
        self.path = self._lock.with_suffix(".tmp")
        try:
            with writing(self.path):
                self.path.mkdir()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self.path.exists():
            log("leftover-kept", "warning", path=str(self.path))
        self._release()

    def publish(self) -> bool:
        """Rename to the target; False where another writer was first.

        The files must be durable already. Raises StorageError, VolumeReadOnly, NoSpaceOnVolume.
        """
        sync_directory(self.path)
        try:
            with writing(self.path):
                self.path.rename(self.target)
        except StorageError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in {errno.ENOTEMPTY, errno.EEXIST}:
                return False
            raise
        sync_directory(self.target.parent)
        return True

    def _release(self) -> None:
        with suppress(OSError):
            self._lock.unlink()
        os.close(self._lock_fd)


def collect_leftovers(target: Path) -> None:
    """Remove what dead writers of the same target left; failures are logged, not raised."""
    name = re.compile(rf"\.{re.escape(target.name)}\.([0-9a-f]{{8}})\.(tmp|lock|dead)")
    try:
        found = {
            match[1] for path in target.parent.iterdir() if (match := name.fullmatch(path.name))
        }
    except OSError:
        return  # the parent does not exist yet, or the writer is about to say why it cannot be read
    for uid in sorted(found):
        base = target.with_name(f".{target.name}.{uid}.lock")
        try:
            removed = _collect(base)
        except OSError as error:
            log("leftover-kept", "warning", path=str(base), error=str(error))
        else:
            log("leftover-removed" if removed else "other-writer-active", path=str(base))


def _collect(lock: Path) -> bool:
    """Remove one leftover; False where its writer lives."""
    work, dead = lock.with_suffix(".tmp"), lock.with_suffix(".dead")
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        locked = _try_lock(fd)
        if not (_abandoned(lock, work) if locked is None else locked):
            return False
        with suppress(FileNotFoundError):
            work.rename(dead)
        if dead.exists():
            shutil.rmtree(dead)
        lock.unlink()
        return True
    finally:
        os.close(fd)


def _create_lock(target: Path) -> tuple[Path, int]:
    for _ in range(_ATTEMPTS):
        path = target.with_name(f".{target.name}.{secrets.token_hex(4)}.lock")
        with writing(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            locked = _try_lock(fd)
            # A collector may have locked and removed the file between the two calls.
            if locked is not False and path.exists():
                return path, fd
            os.close(fd)
    raise StorageError(f"{target.parent}: no lock file could be kept in {_ATTEMPTS} attempts")


def _try_lock(fd: int) -> bool | None:
    """Lock without waiting: True, False where another holds it, None where locks do not exist."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            log("no-file-locks", "warning", error=str(error))
            return None
        raise
    return True


def _abandoned(lock: Path, work: Path) -> bool:
    """Without locks, judge by time: a living writer writes all the time."""
    paths = [lock, *(work.iterdir() if work.exists() else ())]
    age: float = time.time() - max(path.stat().st_mtime for path in paths)
    return age > _ABANDONED_SECONDS
