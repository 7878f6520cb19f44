"""A run that ends with an exit code, and one on a cluster of its own that leaves nothing behind."""

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

    def tear_down() -> None:
        cluster.down()
        shutil.rmtree(root, ignore_errors=True)

    return run(lambda: body(cluster, root), tear_down)


def run(
    body: Callable[[], None], tear_down: Callable[[], None], explain: Callable[[], str] = str
) -> int:
    """Call `body` and, whatever happens, `tear_down`; return the exit code.

    `explain` is asked, before anything is torn down, what to print above a failure.
    """
    try:
        body()
    except (ToolError, LocalkubeError, subprocess.TimeoutExpired) as error:
        print(f"{explain()}\nfailed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    finally:
        tear_down()
    return 0
