"""Where things are: the repository, its environment, the cache shared by all clones."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
REQUIREMENTS = ROOT / "requirements"


def cache_directory(*parts: str) -> Path:
    """Return a directory under $HEADRACE_CACHE (default ~/.cache/headrace); it is made."""
    base = os.environ.get("HEADRACE_CACHE") or Path.home() / ".cache" / "headrace"
    directory = Path(base).joinpath(*parts)
    directory.mkdir(parents=True, exist_ok=True)
    return directory
