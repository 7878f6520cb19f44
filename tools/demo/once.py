"""A run on a cluster of its own that leaves nothing behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from localkube import Cluster, LocalkubeError
from workspace.errors import ToolError
from workspace.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def on_a_cluster(name: str, body: Callable[[Cluster, Path], None]) -> int:
    """Call `body` with a cluster that is not up and a directory; return the exit code."""
    root = ROOT / ".cache" / name
    cluster = Cluster(root / "cluster")
    try:
        body(cluster, root)
    except (ToolError, LocalkubeError, subprocess.TimeoutExpired) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        cluster.down()
        shutil.rmtree(root, ignore_errors=True)
    return 0
