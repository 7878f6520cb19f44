"""A process that tears a cluster down when the one that uses it is gone, however it went."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

DISMISS_SECONDS = 60.0


class Guard:
    """Runs `localkube guard`, which waits for the end of a pipe that only this process holds."""

    def __init__(self, directory: Path) -> None:
        package_parent = str(Path(__file__).parent.parent)
        search_path = os.pathsep.join([package_parent, os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", __package__, "guard", "--dir", directory],
            env={**os.environ, "PYTHONPATH": search_path},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def dismiss(self) -> None:
        """End the guard; the cluster, if still up, goes down."""
        self._process.communicate(timeout=DISMISS_SECONDS)
