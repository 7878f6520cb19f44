"""Makes .venv from requirements/dev.txt, and uv where there is none."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
from typing import TYPE_CHECKING

from .errors import MissingToolError
from .paths import PYTHON, REQUIREMENTS, ROOT, VENV
from .process import run

if TYPE_CHECKING:
    from pathlib import Path

PROJECTS = (ROOT / "operator", ROOT / "loader_image", ROOT / "tools" / "kube")
INSTALL_SECONDS = 1200


def ensure() -> None:
    """Bring .venv in line with the lock file; does nothing when it is."""
    stamp = VENV / "headrace-lock"
    wanted = _lock_digest()
    if PYTHON.exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    print("environment: installing requirements/dev.txt into .venv", flush=True)
    uv = find_uv()
    if not PYTHON.exists():
        run([uv, "venv", "--quiet", "--python", sys.executable, VENV], timeout=INSTALL_SECONDS)
    install: list[str | Path] = [
        uv,
        "pip",
        "install",
        "--quiet",
        "--system-certs",
        "--python",
        PYTHON,
        "--no-deps",
    ]
    locked = ["--require-hashes", "-r", f"{REQUIREMENTS}/dev.txt"]
    run([*install, *locked], timeout=INSTALL_SECONDS)
    editable: list[str | Path] = [word for project in PROJECTS for word in ("-e", project)]
    constraints = ["--build-constraints", f"{REQUIREMENTS}/build.txt"]
    run([*install, *constraints, *editable], timeout=INSTALL_SECONDS)
    stamp.write_text(wanted)


def find_uv() -> str | Path:
    """Return uv: the installed one, or one made from requirements/build.txt under .cache/."""
    if installed := shutil.which("uv"):
        return installed
    home = ROOT / ".cache" / "uv"
    uv = home / "bin" / "uv"
    if uv.exists():
        return uv
    if importlib.util.find_spec("ensurepip") is None:
        raise MissingToolError(
            "uv is not installed and cannot be: this Python has no ensurepip; "
            "install uv, or python3-venv (apt-get install python3-venv)"
        )
    run([sys.executable, "-m", "venv", "--clear", home], timeout=INSTALL_SECONDS)
    pip = ["-m", "pip", "install", "--quiet", "--require-hashes"]
    locked = ["-r", f"{REQUIREMENTS}/build.txt"]
    run([home / "bin" / "python", *pip, *locked], timeout=INSTALL_SECONDS)
    return uv


def _lock_digest() -> str:
    digest = hashlib.sha256(sys.version.encode())
    projects = [project / "pyproject.toml" for project in PROJECTS]
    for path in (REQUIREMENTS / "dev.txt", REQUIREMENTS / "build.txt", *projects):
        digest.update(path.read_bytes())
    return digest.hexdigest()
