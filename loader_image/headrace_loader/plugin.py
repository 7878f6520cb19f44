"""Copies the engine side where a stock engine finds it: a directory on its PYTHONPATH.

The copy is two packages and the metadata that announces the entry points for vLLM and SGLang.
Every entry appears whole, by rename, and the announcement comes last, so an engine never imports
half a plugin. A loader that starts again leaves an equal copy untouched.
"""

import filecmp
import importlib.metadata
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from headrace_loader.errors import InternalError, RuntimeDirectoryUnusable

PACKAGES = ("headrace_handover", "headrace_engine")

_DISTRIBUTION = "headrace-loader"
_METADATA_NAME = "headrace_engine.dist-info"
_ENTRY_POINTS = """\
[vllm.general_plugins]
headrace = headrace_engine:register

[sglang.srt.plugins]
headrace = headrace_engine:register_sglang
"""


def copy_engine_side(target: Path) -> None:
    """Copy the packages and their announcement into `target`, which is created if need be.

    Raises RuntimeDirectoryUnusable.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        for leftover in target.glob(".new-*"):
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=target) as name:
            fresh = Path(name)
            for package in PACKAGES:
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(_package_directory(package), fresh / package, ignore=ignore)
            _write_metadata(fresh / _METADATA_NAME)
            for entry in (*PACKAGES, _METADATA_NAME):
                _replace(fresh, target, entry)
    except OSError as error:
        raise RuntimeDirectoryUnusable(
            f"--plugin-dir {target}: {error.strerror or error}; it must be writable by this user"
        ) from None


def _package_directory(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InternalError(f"package {package} is not installed beside the loader")
    return Path(spec.origin).parent


def _write_metadata(directory: Path) -> None:
    version = importlib.metadata.version(_DISTRIBUTION)
    directory.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: headrace-engine\nVersion: {version}\n"
    (directory / "METADATA").write_text(metadata)
    (directory / "entry_points.txt").write_text(_ENTRY_POINTS)


def _replace(fresh: Path, target: Path, entry: str) -> None:
    present = target / entry
    if present.exists():
        if _equal(fresh / entry, present):
            return
        # In the temporary directory it is removed together with it.
        present.rename(fresh / f"{entry}.old")
    (fresh / entry).rename(present)


def _equal(one: Path, other: Path) -> bool:
    names = sorted(_files(one))
    if names != sorted(_files(other)):
        return False
    return not any(filecmp.cmpfiles(one, other, names, shallow=False)[1:])


def _files(directory: Path) -> Iterator[str]:
    for path in directory.rglob("*"):
        if path.is_file() and path.parent.name != "__pycache__":
            yield str(path.relative_to(directory))
