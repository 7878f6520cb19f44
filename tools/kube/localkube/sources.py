"""Files of pinned Go modules that are read, not built: others' custom resource definitions."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from .errors import BuildError
from .modules import Module
from .toolchain import find_go

_MODULE = Module("crds", {})
_SECONDS = 300.0


def source(path: str) -> Path:
    """Return the directory of a module that modules/crds/go.mod requires, fetched if need be.

    Its go.sum says what the files must be. Raises BuildError when they cannot be had.
    """
    environment = {**os.environ, "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=mod"}
    result = subprocess.run(
        [find_go(_MODULE.go_version), "mod", "download", "-json", path],
        cwd=_MODULE.directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=_SECONDS,
    )
    try:
        return Path(json.loads(result.stdout)["Dir"])
    except (ValueError, KeyError) as error:
        said = (result.stderr or result.stdout).strip()
        raise BuildError(f"go mod download {path}: {said}") from error
