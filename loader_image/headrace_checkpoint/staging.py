"""The directory in which all writers of one checkpoint work, until one of them publishes it.

`<parent>/.<name>.work/` holds what survives a killed writer and is shared by the workers of
a Job, and by two Jobs that make the same checkpoint:

    plan.json            what is made, from which source; another plan is another checkpoint
    lock                 shared lock of every writer: who holds it alone may remove all of this
    checkpoint/          the future checkpoint: whole files only
    journal/part-N.json  part N of all ranks is durable, with its digests; part-N.lock: under way
    writing/UID/         what one writer has not finished; UID/lock says that it lives

It appears whole by one rename, and a part appears by renames after it is durable, so nothing
half done is ever taken for done. The last writer to finish renames `checkpoint/` to the target.
Locks save work and tell the living from the dead; nothing depends on them for being right:
two writers of one part write two files of the same bytes, and the later rename replaces the
earlier one. Where the file system has no locks, a writer is dead after 15 minutes without a write.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from headrace_checkpoint.errors import InputError, ManifestInvalid, StorageError
from headrace_checkpoint.files import read_regular
from headrace_checkpoint.lease import try_lock
from headrace_checkpoint.manifest import FILE_NAME, Manifest, Part, parts_from_json
from headrace_checkpoint.report import log
from headrace_checkpoint.storage import make_directories, sync_directory, write_file, writing

PLAN = "plan.json"
_DATA, _JOURNAL, _WRITING, _LOCK = "checkpoint", "journal", "writing", "lock"
_EXISTS = {errno.ENOTEMPTY, errno.EEXIST}
_ABANDONED_SECONDS = 15 * 60
_ATTEMPTS = 100
_PAUSE_SECONDS = 0.2
_PATIENCE_SECONDS = 60.0


class Staging:
    """One writer's place in the shared directory, as a context manager; see `join`."""

    def __init__(self, target: Path, path: Path, lock: int, plan: Mapping[str, Any]) -> None:
        self.target = target
        self.path = path
        self.plan = plan
        self.data = path / _DATA
        self._lock = lock
        self._journal = path / _JOURNAL
        self.mine = path / _WRITING / secrets.token_hex(4)
        self._alive: int | None = None

    def __enter__(self) -> Self:
        self._collect_dead_writers()
        with writing(self.mine):
            self.mine.mkdir()
        self._alive, locked = _open_lock(self.mine / _LOCK, fcntl.LOCK_EX, create=True)
        self.has_locks = locked is not None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._is_worthless(error):
            discard(self.path)
        shutil.rmtree(self.mine, ignore_errors=True)
        if self._alive is not None:
            os.close(self._alive)
        os.close(self._lock)

    def part(self, number: int) -> tuple[Part, ...] | None:
        """What the journal says of a part, in order of the ranks; None where it is not done."""
        path = self._record(number)
        try:
            content = read_regular(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"{path}: reading failed: {error.strerror}") from error
        try:
            return parts_from_json(content)
        except ManifestInvalid as error:
            self.reject(number, str(error))
            return None

    def recorded(self) -> set[int]:
        """Numbers of the parts that are done."""
        with writing(self._journal):
            names = [path.name for path in self._journal.iterdir()]
        found = (re.fullmatch(r"part-(\d+)\.json", name) for name in names)
        return {int(match[1]) for match in found if match}

    def record(self, number: int, parts: tuple[Part, ...]) -> None:
        """Take over a part's files, which must be durable in `mine`, and say that it is done."""
        for part in parts:
            with writing(self.data / part.file):
                (self.mine / part.file).rename(self.data / part.file)
        sync_directory(self.data)
        path = self.mine / f"part-{number}.json"
        content = json.dumps([part.to_object() for part in parts])
        write_file(path, content.encode())
        with writing(path):
            path.rename(self._record(number))
        sync_directory(self._journal)

    def reject(self, number: int, error: str) -> None:
        """Forget that a part is done: what is there is not what was written."""
        log("part-rejected", "warning", part=number, error=error)
        with writing(self._journal), suppress(FileNotFoundError):
            self._record(number).unlink()

    @contextmanager
    def claim(self, number: int) -> Iterator[bool]:
        """Hold a part for this writer; False where another writer has it under way."""
        path = self._journal / f"part-{number}.lock"
        fd, locked = _open_lock(path, fcntl.LOCK_EX, create=True)
        try:
            yield locked is not False
        finally:
            os.close(fd)

    def wait(self, done: Callable[[], bool]) -> bool:
        """Wait while other writers get on; False where none has written for a minute."""
        seen, since = self._sizes(), time.monotonic()
        while not done():
            time.sleep(_PAUSE_SECONDS)
            now = self._sizes()
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > _PATIENCE_SECONDS:
                return False
        return True

    def publish(self, manifest: Manifest) -> bool:
        """Rename to the target what is whole now; False where another writer was first.

        Raises StorageError, VolumeReadOnly, NoSpaceOnVolume.
        """
        path = self.mine / FILE_NAME
        write_file(path, manifest.to_json())
        try:
            with writing(self.data):
                path.rename(self.data / FILE_NAME)
            sync_directory(self.data)
            with writing(self.data):
                self.data.rename(self.target)
        except StorageError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in {*_EXISTS, errno.ENOENT}:
                published = False
            else:
                raise
        else:
            published = True
        sync_directory(self.target.parent)
        discard(self.path)
        return published

    def _is_worthless(self, error: BaseException) -> bool:
        """Whether no later attempt gets any further from here, and nobody else is at work."""
        hopeless = isinstance(error, InputError)
        return (hopeless or not any(self._journal.glob("*.json"))) and bool(
            _try_lock(self._lock, fcntl.LOCK_EX)
        )

    def _record(self, number: int) -> Path:
        return self._journal / f"part-{number}.json"

    def _sizes(self) -> list[tuple[str, int, int]]:
        found = []
        for path in sorted((self.path / _WRITING).glob("*/*")):
            with suppress(OSError):
                state = path.stat()
                found.append((str(path), state.st_size, state.st_mtime_ns))
        return found

    def _collect_dead_writers(self) -> None:
        with writing(self.path):
            others = sorted((self.path / _WRITING).iterdir())
        for path in others:
            if _is_dead(path):
                shutil.rmtree(path, ignore_errors=True)
                log("leftover-removed", path=str(path))


def join(
    target: Path, terms: Mapping[str, Any], prepare: Callable[[Path], Mapping[str, Any]]
) -> Staging:
    """Enter the staging directory of `target`; make it where there is none.

    `terms` is what all writers must agree on. `prepare(directory)` fills the directory's
    subdirectory `checkpoint` once `directory` has its layout, and returns what else the
    plan says; it is called only by a writer that makes the directory. A directory of other terms
    is removed if nobody works in it. Raises StorageError where somebody does, and what
    `prepare` raises.
    """
    make_directories(target.parent)
    path = work_path(target)
    for _ in range(_ATTEMPTS):
        try:
            lock, locked = _open_lock(path / _LOCK, fcntl.LOCK_SH)
        except FileNotFoundError:
            _create(target, path, terms, prepare)
            continue
        if locked is False or not _is_at(lock, path / _LOCK):
            os.close(lock)  # being removed; another one can be made in a moment
            time.sleep(_PAUSE_SECONDS)
            continue
        plan = _read_plan(path)
        if plan.get("terms") == terms:
            log("staging-joined", path=str(path))
            return Staging(target, path, lock, plan)
        alone = _try_lock(lock, fcntl.LOCK_EX)
        if alone or (alone is None and _is_old(path)):
            log("staging-discarded", "warning", path=str(path), reason="made of another source")
            discard(path)
            os.close(lock)
            continue
        os.close(lock)
        raise StorageError(
            f"{path}: another writer makes {target.name} of another source or for another "
            "identity; keep the source unchanged, or wait until it has ended"
        )
    raise StorageError(f"{path}: could not be entered in {_ATTEMPTS} attempts; try again")


def work_path(target: Path) -> Path:
    """Where the writers of a target work."""
    return target.with_name(f".{target.name}.work")


def discard(path: Path) -> None:
    """Remove a directory: at once for whoever looks for it under its name."""
    dead = _sibling(path, "dead")
    with writing(path), suppress(FileNotFoundError):
        path.rename(dead)
    shutil.rmtree(dead, ignore_errors=True)
    if dead.exists():
        log("leftover-kept", "warning", path=str(dead))


def collect_leftovers(target: Path, *, also_work: bool = False) -> None:
    """Remove what dead writers left that nobody can go on with; failures are logged.

    With `also_work`, what others could go on with as well, if nobody is at it.
    """
    name = re.compile(rf"\.{re.escape(target.name)}\.(?:[0-9a-f]{{8}}\.(new|dead)|work)")
    try:
        found = sorted(path for path in target.parent.iterdir() if name.fullmatch(path.name))
    except OSError:
        return  # the parent does not exist yet, or the writer is about to say why it cannot be read
    for path in found:
        if path.suffix == ".work" and not also_work:
            continue
        try:
            if path.suffix == ".dead":
                shutil.rmtree(path)
            elif _is_dead(path):
                discard(path)
            else:
                log("other-writer-active", path=str(path))
                continue
        except (OSError, StorageError) as error:
            log("leftover-kept", "warning", path=str(path), error=str(error))
        else:
            log("leftover-removed", path=str(path))


def _create(
    target: Path,
    path: Path,
    terms: Mapping[str, Any],
    prepare: Callable[[Path], Mapping[str, Any]],
) -> None:
    """Make the directory whole or not at all, unless another writer is first."""
    new = _sibling(path, "new")
    lock = None
    with writing(new):
        new.mkdir()
    try:
        # First of all, so that whoever finds the directory can tell whether its maker lives.
        lock, _ = _open_lock(new / _LOCK, fcntl.LOCK_SH, create=True)
        plan = {"terms": terms, **prepare(new)}
        for name in (_JOURNAL, _WRITING):
            with writing(new):
                (new / name).mkdir()
        write_file(new / PLAN, json.dumps(plan).encode())
        sync_directory(new / _DATA)
        sync_directory(new)
        with writing(new):
            new.rename(path)
        sync_directory(target.parent)
    except StorageError as error:
        cause = error.__cause__
        if not (isinstance(cause, OSError) and cause.errno in _EXISTS):
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _sibling(path: Path, suffix: str) -> Path:
    name = path.name.removesuffix(".work").removesuffix(".new").removeprefix(".")
    return path.with_name(f".{name}.{secrets.token_hex(4)}.{suffix}")


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan = json.loads(read_regular(path / PLAN))
    except (OSError, ValueError):
        return {}
    return plan if isinstance(plan, dict) else {}


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False


def _open_lock(path: Path, kind: int, *, create: bool = False) -> tuple[int, bool | None]:
    """Open and lock without waiting; whether it worked is as from _try_lock.

    Raises FileNotFoundError where there is none and `create` is not given.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    try:
        with writing(path):
            fd = os.open(path, flags, 0o644)
    except StorageError as error:
        if not create and isinstance(error.__cause__, FileNotFoundError):
            raise FileNotFoundError(str(path)) from None
        raise
    try:
        return fd, _try_lock(fd, kind)
    except BaseException:
        os.close(fd)
        raise


def _try_lock(fd: int, kind: int) -> bool | None:
    """Lock without waiting: True, False where another holds it, None where locks do not exist."""
    try:
        locked = try_lock(fd, kind)
    except OSError as error:
        raise StorageError(f"locking failed: {error.strerror}") from error
    if locked is None:
        log("no-file-locks", "warning", fix="mount the volume with the option flock")
    return locked


def _is_dead(path: Path) -> bool:
    """Whether nobody works in a directory that has a lock file, as far as one can tell."""
    try:
        fd, locked = _open_lock(path / _LOCK, fcntl.LOCK_EX)
    except FileNotFoundError:
        return _is_old(path)
    os.close(fd)
    return _is_old(path) if locked is None else locked


def _is_old(path: Path) -> bool:
    """Without locks, judge by time: a living writer writes all the time."""
    newest = path.stat().st_mtime
    for found in path.rglob("*"):
        with suppress(FileNotFoundError):
            newest = max(newest, found.stat().st_mtime)
    return time.time() - newest > _ABANDONED_SECONDS
