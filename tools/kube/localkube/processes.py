"""Starting, finding and killing the processes of one cluster.

Every process carries its cluster's directory in its environment. That mark, unlike a
recorded process id, is there before the process does anything, survives the loss of every
record and never names a stranger, so finding and killing rely on it alone.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import TeardownError

if TYPE_CHECKING:
    from collections.abc import Sequence

OWNER = "LOCALKUBE_OWNER"
COMPONENT = "LOCALKUBE_COMPONENT"
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Process:
    """A running process of a cluster."""

    pid: int
    parent: int
    component: str


def spawn(
    component: str,
    command: Sequence[str | Path],
    *,
    owner: Path,
    log: Path,
    descriptors: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `command` in the background, in a session of its own, with `owner` as directory.

    Its output goes to `log`; it inherits the open file `descriptors`. The caller's environment,
    with its proxies and secrets, is not passed on.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=owner,
            env={
                "PATH": SEARCH_PATH,
                "HOME": str(owner),
                OWNER: str(owner),
                COMPONENT: component,
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=descriptors,
        )


def find(owner: Path) -> list[Process]:
    """Return the running processes that carry the mark of the cluster in `owner`."""
    return [process for pid in _all() if (process := _inspect(pid, owner)) is not None]


def owners() -> set[Path]:
    """Return the directories of all clusters whose processes this user may see."""
    return {Path(mark) for pid in _all() if (mark := _environment(pid).get(OWNER))}


def _all() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _environment(pid: int) -> dict[str, str]:
    """Return the environment of process `pid`; that of a zombie, or a stranger's, is empty."""
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(os.fsdecode(pair).split("=", 1) for pair in pairs if b"=" in pair)


def _inspect(pid: int, owner: Path) -> Process | None:
    """Return process `pid` if it belongs to `owner`."""
    environment = _environment(pid)
    if environment.get(OWNER) != str(owner):
        return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    parent = int(stat.rpartition(")")[2].split()[1])
    return Process(pid, parent, environment.get(COMPONENT, "?"))


def kill_all(owner: Path, *, seconds: float = 20.0) -> None:
    """Kill every process of the cluster in `owner`, and those they start meanwhile.

    Raises TeardownError when some are still there after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while processes := find(owner):
        # Children first: their parents then reap them, and none is left to process 1.
        parents = {process.parent for process in processes}
        leaves = [process for process in processes if process.pid not in parents]
        if time.monotonic() > deadline:
            raise TeardownError(
                f"still running after {seconds:.0f} s: "
                + ", ".join(f"{p.component} (pid {p.pid})" for p in processes)
            )
        descriptors = [d for p in leaves if (d := _kill(p, owner)) is not None]
        _await_exit(descriptors, deadline)


def _kill(process: Process, owner: Path) -> int | None:
    """Send SIGKILL and return a descriptor that turns readable at the process's end."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:
        return None
    # The descriptor pins the process; only now is it certain that the id was not reused.
    if _inspect(process.pid, owner) is None:
        os.close(descriptor)
        return None
    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    return descriptor


def _await_exit(descriptors: list[int], deadline: float) -> None:
    for descriptor in descriptors:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
        os.close(descriptor)
