"""What an engine compiles, kept on the volume for the pods after it.

Once weights are fast, an engine's start is compiling: torch.compile, Triton, Inductor. The engine
writes its caches to a directory of the pod. When it answers requests, the loader packs that
directory into one file on the volume, and unpacks the file before the next pod's engine starts.

The file is replaced by one rename, so any number of pods may write it and readers see a whole one;
each entry has a CRC-32. The engine itself never writes to the volume. A cache is worth nothing but
time: what goes wrong with it is logged, shown in the status, and never fails a load.
"""

import contextlib
import errno
import os
import re
import shutil
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from headrace_checkpoint.report import log
from headrace_loader.state import EngineCachePhase, EngineCacheState, LoaderState

CONTENT = "content"
"""Directory that holds the caches, in the directory shared with the engine."""
MAX_BYTES = 8 << 30
"""A larger cache is neither packed nor unpacked."""
MAX_FILES = 100_000

_FRESH = ".new-"
_UNKNOWN = "unknown"
_STOP_SECONDS = 1.0
_RESTORE_SECONDS = 30.0
_STEP_SECONDS = 0.1
_LEFTOVER_SECONDS = 3600.0
_POLL_SECONDS = 1.0
_REQUEST_SECONDS = 2.0
_Files = dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCacheOptions:
    """Where caches are.

    Attributes:
        local: directory of the pod that the engine writes to, below `CONTENT`.
        store: directory on the volume.
        key: name of the file in `store`, without the device and the suffix.
        engine_port: port at which the engine answers GET /health once it has compiled.
    """

    local: Path
    store: Path
    key: str
    engine_port: int


class EngineCache:
    """Restores the caches once, and publishes them once when the engine answers."""

    def __init__(self, options: EngineCacheOptions, state: LoaderState) -> None:
        self._options = options
        self._state = state
        self._content = options.local / CONTENT
        kind = re.sub(r"[^A-Za-z0-9._-]+", "-", processors())
        self._file = options.store / f"{options.key}-{kind}.zip"
        self._is_damaged = False
        self._stopped = threading.Event()
        self._restoring = threading.Thread(target=self.restore, name="engine-cache", daemon=True)

    def start(self) -> None:
        """Restore in a thread, beside the reading of weights."""
        self._restoring.start()

    def wait(self, given_up: Callable[[], bool]) -> None:
        """Return when the engine may start: caches are restored, or that takes too long."""
        deadline = time.monotonic() + _RESTORE_SECONDS
        while self._restoring.is_alive() and not given_up():
            if time.monotonic() >= deadline:
                log("engine-cache", "warning", message=f"no end after {_RESTORE_SECONDS:g} s")
                return
            self._restoring.join(_STEP_SECONDS)

    def watch(self) -> None:
        """Wait in a thread for the engine, and publish what it compiled."""
        threading.Thread(target=self._watch, name="engine-cache-watch", daemon=True).start()

    def stop(self) -> None:
        """Ask the threads to end; the one that unpacks is waited for, not for long."""
        self._stopped.set()
        if self._restoring.is_alive():
            self._restoring.join(_STOP_SECONDS)

    def restore(self) -> None:
        """Unpack the volume's file, unless an engine has begun to write already."""
        try:
            self._restore()
        except Exception as error:  # noqa: BLE001 - zipfile lets through what zlib and lzma raise
            self._is_damaged = not isinstance(error, OSError)
            self._say(EngineCachePhase.FAILED, f"{self._file}: {type(error).__name__}: {error}")

    def _restore(self) -> None:
        for leftover in self._options.local.glob(f"{_FRESH}*"):  # of one that was killed
            shutil.rmtree(leftover)
        if self._content.exists():
            self._say(EngineCachePhase.KEPT, "the pod's own caches are still there")
            return
        try:
            archive = zipfile.ZipFile(self._file)
        except FileNotFoundError:
            self._say(EngineCachePhase.MISSING, f"{self._file}: nothing compiled yet")
            return
        with archive:
            files = self._unpack(archive)
        if files is None:
            return
        self._say(EngineCachePhase.RESTORED, str(self._file), files)
        with self._state.changing():
            self._state.mark("engineCacheRestored")

    def _watch(self) -> None:
        url = f"http://127.0.0.1:{self._options.engine_port}/health"
        while not _answers(url):
            if self._stopped.wait(_POLL_SECONDS):
                return
        with self._state.changing():
            self._state.mark("engineReady")
        try:
            self.publish()
        except Exception as error:  # noqa: BLE001 - worth nothing but time
            self._say(EngineCachePhase.FAILED, f"{self._file}: {type(error).__name__}: {error}")

    def publish(self) -> None:
        """Replace the volume's file if it lacks what the engine wrote, or was damaged.

        Raises OSError, or ValueError where the caches are larger than `MAX_BYTES`.
        """
        files = dict(_regular_files(self._content))
        if not self._is_damaged and files.items() <= self._published().items():
            return
        _check(len(files), sum(files.values()))
        prefix = f".{self._file.stem}."
        descriptor, name = tempfile.mkstemp(prefix=prefix, dir=self._options.store)
        try:
            with os.fdopen(descriptor, "wb") as out:
                self._remove_leftovers(prefix, os.fstat(descriptor).st_mtime)
                _pack(self._content, files, out)
                out.flush()
                os.fsync(out.fileno())
            Path(name).replace(self._file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        self._say(EngineCachePhase.PUBLISHED, str(self._file), files)
        with self._state.changing():
            self._state.mark("engineCachePublished")

    def _published(self) -> _Files:
        """Return what the volume's file lists; nothing where it cannot be read."""
        try:
            with zipfile.ZipFile(self._file) as archive:
                return _listed(archive)
        except Exception:  # noqa: BLE001 - as in restore
            return {}

    def _remove_leftovers(self, prefix: str, now: float) -> None:
        """Remove what killed pods left; `now` is of the volume's clock."""
        for path in self._options.store.glob(f"{prefix}*"):
            with contextlib.suppress(FileNotFoundError):
                if now - path.stat().st_mtime > _LEFTOVER_SECONDS:
                    path.unlink()

    def _unpack(self, archive: zipfile.ZipFile) -> _Files | None:
        """Return what was unpacked; None if told to stop meanwhile."""
        entries = archive.infolist()
        _check(len(entries), sum(entry.file_size for entry in entries))
        # Not a TemporaryDirectory: at the process's end that is removed under this thread's feet.
        directory = tempfile.mkdtemp(prefix=_FRESH, dir=self._options.local)
        try:
            fresh = Path(directory) / CONTENT
            fresh.mkdir()
            for entry in entries:
                if self._stopped.is_set():
                    return None
                archive.extract(entry, fresh)
            fresh.rename(self._content)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise FileExistsError("an engine that did not wait has begun to compile") from None
            raise
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        return _listed(archive)

    def _say(self, phase: EngineCachePhase, message: str, files: _Files | None = None) -> None:
        nbytes = sum(files.values()) if files else 0
        with self._state.changing():
            self._state.engine_cache = EngineCacheState(phase, message, nbytes)
        level = "warning" if phase is EngineCachePhase.FAILED else "info"
        log("engine-cache", level, state=phase, message=message, bytes=nbytes)


def processors(proc: Path = Path("/proc")) -> str:
    """Return the models of GPU and processor: compiled code is for both."""
    gpus = sorted(proc.glob("driver/nvidia/gpus/*/information"))
    gpu = _field(gpus[0], "Model") if gpus else "no GPU"
    return f"{gpu} {_processor(proc / 'cpuinfo')}"


def _processor(cpuinfo: Path) -> str:
    """Return the model, or what tells cores apart where the kernel has no name for it, as on arm64.

    Source: c_show in arch/arm64/kernel/cpuinfo.c.
    """
    name = _field(cpuinfo, "model name")
    if name != _UNKNOWN and not name.startswith("ARM"):
        return name
    return " ".join(_field(cpuinfo, f"CPU {part}") for part in ("implementer", "variant", "part"))


def _field(path: Path, name: str) -> str:
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return _UNKNOWN


def _answers(url: str) -> bool:
    import urllib.request  # here, where the weights are loaded: it would delay them
    from http.client import HTTPException

    try:
        with urllib.request.urlopen(url, timeout=_REQUEST_SECONDS):  # noqa: S310 - the pod's own
            return True
    except (OSError, HTTPException):  # URLError is an OSError
        return False


def _listed(archive: zipfile.ZipFile) -> _Files:
    """Return path and size of each file in an archive."""
    return {entry.filename: entry.file_size for entry in archive.infolist()}


def _regular_files(root: Path) -> Iterator[tuple[str, int]]:
    """Yield path below root and size of each file; links are not followed, nor are they files."""
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            if path.is_file() and not path.is_symlink():
                yield str(path.relative_to(root)), path.stat().st_size


def _pack(root: Path, files: _Files, out: IO[bytes]) -> None:
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            descriptor = os.open(root / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with (
                os.fdopen(descriptor, "rb") as source,
                archive.open(name, "w", force_zip64=True) as entry,
            ):
                shutil.copyfileobj(source, entry, 1 << 20)


def _check(count: int, nbytes: int) -> None:
    if count > MAX_FILES or nbytes > MAX_BYTES:
        raise ValueError(
            f"{count} files of {nbytes} bytes are more than {MAX_FILES} files or {MAX_BYTES} bytes"
        )
