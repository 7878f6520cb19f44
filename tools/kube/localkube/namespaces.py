"""The namespaces of a real node: network, mounts and process ids of its own.

One process, `pause`, is their init. When it dies, the kernel kills every process of the node
and takes down its mounts and interfaces: there is nothing that a crash could leave behind.

Within, the node sees the machine's file system but for the usual places of a node's state,
which lie elsewhere on the machine, and /run, which is empty memory.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from . import processes
from .errors import CommandError, ComponentError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from .components import Components

COMPONENT = "node-init"
START_SECONDS = 10.0
COMMAND_SECONDS = 120.0


class Namespaces:
    """The namespaces whose init has process id `pid`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    @classmethod
    def create(
        cls,
        components: Components,
        pause: Path,
        directories: Mapping[str, Path],
        held: Sequence[int] = (),
    ) -> Self:
        """Create the namespaces, with `directories` seen at the paths that are their keys.

        The file descriptors `held` stay open as long as the namespaces exist.
        """
        flags = ["--net", "--mount", "--pid", "--mount-proc", "--propagation=slave"]
        command: list[str | Path] = ["unshare", *flags, "--fork", "--kill-child", pause]
        launcher = components.start(COMPONENT, command, descriptors=held)
        pid = components.wait_for(
            "creating namespaces", lambda: _child_running(launcher.pid, pause), START_SECONDS
        )
        namespaces = cls(pid)
        namespaces._mount(directories)
        return namespaces

    @classmethod
    def find(cls, owner: Path) -> Self:
        """Return the namespaces of the running cluster in `owner`.

        Raises ComponentError when it has none.
        """
        for process in processes.find(owner):
            if process.component == COMPONENT and _is_init(process.pid):
                return cls(process.pid)
        raise ComponentError(f"cluster {owner}: has no running node; bring it up with one")

    def enter(self, command: Sequence[str | Path]) -> list[str | Path]:
        """Return the command line that runs `command` in the namespaces."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--pid", "--", *command]

    def run(
        self, *command: str | Path, check: bool = True, timeout: float = COMMAND_SECONDS
    ) -> str:
        """Run `command` in the namespaces and return its output.

        Raises CommandError when it fails, unless `check` is false.
        """
        argv = self.enter(command)
        result = subprocess.run(
            argv,
            env={**os.environ, "PATH": processes.SEARCH_PATH},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        if check and result.returncode:
            shown = " ".join(map(str, command))
            raise CommandError(f"{shown} (in the node): {result.stderr.strip()}")
        return result.stdout

    def seen(self, path: str) -> Path:
        """Return where the machine sees what the node has at the absolute `path`."""
        return Path(f"/proc/{self.pid}/root{path}")

    def supports_overlay(self) -> bool:
        """Tell whether the node's images can be kept as overlay mounts."""
        probe = Path("/var/lib/containerd/overlay-probe")
        folders = {name: probe / name for name in ("lowerdir", "upperdir", "workdir")}
        merged = probe / "merged"
        self.run("rm", "-rf", probe)
        self.run("mkdir", "-p", merged, *folders.values())
        options = ",".join(f"{name}={folder}" for name, folder in folders.items())
        try:
            self.run("mount", "-t", "overlay", "-o", options, "overlay", merged)
        except CommandError:
            return False
        self.run("umount", merged)
        return True

    def filters_bridges(self) -> bool:
        """Tell whether the node's kernel shows bridged packets to the packet filter."""
        try:
            return self.run("cat", "/proc/sys/net/bridge/bridge-nf-call-iptables").strip() == "1"
        except CommandError:
            return False

    def _mount(self, directories: Mapping[str, Path]) -> None:
        # Pods may ask for mounts to propagate, which takes a shared tree; the machine's own
        # still gets none of them, as this one is a slave of it.
        self.run("mount", "--make-rshared", "/")
        for seen, source in directories.items():
            source.mkdir(parents=True, exist_ok=True)
            Path(seen).mkdir(parents=True, exist_ok=True)
            self.run("mount", "--bind", source, seen)
        self.run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")


def _child_running(parent: int, program: Path) -> int | None:
    """Return the child of `parent` once it runs `program`."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    try:
        for child in children.read_text().split():
            if Path(f"/proc/{child}/exe").samefile(program):
                return int(child)
    except OSError:
        pass  # the process ended meanwhile
    return None


def _is_init(pid: int) -> bool:
    """Tell whether `pid` is process 1 of a namespace of its own."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    ids = next((line for line in status.splitlines() if line.startswith("NSpid:")), "").split()[1:]
    return len(ids) > 1 and ids[-1] == "1"
