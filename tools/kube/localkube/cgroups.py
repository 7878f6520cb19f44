"""The control groups of the node: all its processes, pods included, live below one of ours.

On cgroup v1 every hierarchy is a tree of its own; on v2 there is one.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import TeardownError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

log = logging.getLogger(__name__)

# Moves itself into the groups whose files are given, then becomes the command that follows.
ENTER = 'while [ "$1" != -- ]; do echo 0 > "$1" || exit 1; shift; done; shift; exec "$@"'


class ControlGroups:
    """The groups /NAME/daemons, for the node's own processes, and /NAME/pods."""

    def __init__(self, name: str) -> None:
        self._roots = [(mount / name, version) for mount, version in _hierarchies()]
        self.pods = f"/{name}/pods"

    def create(self) -> None:
        """Create the groups in every hierarchy."""
        for root, version in self._roots:
            for group in (root, root / "daemons", root / "pods"):
                group.mkdir(exist_ok=True)
                if version == 1:
                    _inherit_cpuset(group)
                elif group is root:
                    _delegate_controllers(root.parent)
                    _delegate_controllers(root)

    def enter(self, command: Sequence[str | Path]) -> list[str | Path]:
        """Return the command line that runs `command` in the group of the daemons."""
        files = [root / "daemons" / "cgroup.procs" for root, _ in self._roots]
        return ["sh", "-c", ENTER, "enter", *files, "--", *command]

    def remove(self, *, seconds: float = 20.0) -> None:
        """Kill whatever is left in the groups and delete them.

        Raises TeardownError when that does not succeed within `seconds`.
        """
        deadline = time.monotonic() + seconds
        while left := [root for root, _ in self._roots if root.exists()]:
            if time.monotonic() > deadline:
                raise TeardownError(f"control groups in use: {', '.join(map(str, left))}")
            for root in left:
                _remove_tree(root)
            time.sleep(0.02)


def _hierarchies() -> Iterator[tuple[Path, int]]:
    """Yield the mount point and version of each hierarchy that groups can be made in."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        kind = fields[fields.index("-") + 1]
        if kind in ("cgroup", "cgroup2"):
            yield Path(fields[4]), 2 if kind == "cgroup2" else 1


def _inherit_cpuset(group: Path) -> None:
    """A new v1 cpuset group has no processors and no memory, and admits no process."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        own = group / name
        if own.exists() and not own.read_text().strip():
            own.write_text((group.parent / name).read_text())


def _delegate_controllers(group: Path) -> None:
    for controller in (group / "cgroup.controllers").read_text().split():
        try:
            (group / "cgroup.subtree_control").write_text(f"+{controller}")
        except OSError as error:
            log.warning("controller %s is not available in %s: %s", controller, group, error)


def _remove_tree(root: Path) -> None:
    for group, _, _ in os.walk(root, topdown=False):
        try:
            for pid in map(int, Path(group, "cgroup.procs").read_text().split()):
                if pid:  # 0 stands for a process that cannot be seen from here
                    os.kill(pid, signal.SIGKILL)
            Path(group).rmdir()
        except (FileNotFoundError, ProcessLookupError):
            continue  # went away meanwhile
        except OSError:
            return  # the processes are still on their way out
