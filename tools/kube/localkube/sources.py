"""Files of pinned Go modules that are read, not built: others' custom resource definitions."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from .errors import BuildError
from .modules import Module
from .toolchain import find_go

_SECONDS = 300.0


def source(path: str, pinned_in: str = "crds") -> Path:
    """Return the directory of a module that modules/PINNED_IN requires, fetched if need be.

    The go.sum there says what the files must be. Raises BuildError when they cannot be had.
    """
    module = Module(pinned_in, {})
    environment = {**os.environ, "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=mod"}
    result = subprocess.run(
        [find_go(module.go_version), "mod", "download", "-json", path],
        cwd=module.directory,
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
