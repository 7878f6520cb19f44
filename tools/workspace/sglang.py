"""SGLang for the tests: a directory for PYTHONPATH beside .venv, which has the rest."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

from . import venv
from .paths import PYTHON, REQUIREMENTS, cache_directory
from .process import run

INSTALL_SECONDS = 600
_LOCK = REQUIREMENTS / "sglang.txt"


def ensure() -> Path:
    """Return the directory; it is made from requirements/sglang.txt if need be."""
    digest = hashlib.sha256(sys.version.encode() + _LOCK.read_bytes()).hexdigest()
    cache = cache_directory("sglang")
    directory = cache / digest[:16]
    if directory.exists():
        return directory
    with tempfile.TemporaryDirectory(prefix=".new-", dir=cache) as name:
        fresh = Path(name) / "packages"
        install: list[str | Path] = [venv.find_uv(), "pip", "install", "--quiet"]
        install += ["--python", PYTHON if PYTHON.exists() else Path(sys.executable)]
        install += ["--system-certs", "--no-deps", "--require-hashes", "-r", _LOCK]
        # From elsewhere: the workspace's overrides leave torchvision out.
        run([*install, "--target", fresh], timeout=INSTALL_SECONDS, cwd=cache)
        if not directory.exists():  # else another process made it meanwhile
            fresh.rename(directory)
    return directory
