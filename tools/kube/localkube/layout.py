"""Where the files of one cluster lie, and the names derived from its directory."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from .errors import InvalidInputError, TeardownError


@dataclass(frozen=True)
class Layout:
    """The directory of a cluster. Only the names below are created and deleted in it."""

    root: Path

    @classmethod
    def of(cls, directory: str | os.PathLike[str]) -> Self:
        """Return the layout of `directory`, which need not exist.

        Raises InvalidInputError when it is an existing file.
        """
        root = Path(directory).resolve()
        if root.exists() and not root.is_dir():
            raise InvalidInputError(
                f"cluster directory {root}: is not a directory; name another one"
            )
        return cls(root)

    @property
    def identity(self) -> str:
        """Eight characters for the names of things outside the directory."""
        return hashlib.sha256(os.fsencode(self.root)).hexdigest()[:8]

    @property
    def group(self) -> str:
        """The name of the control group around the node's processes."""
        return f"localkube-{self.identity}"

    @property
    def record(self) -> Path:
        """What was asked for, as JSON; there from the start of `up` to the end of `down`."""
        return self.root / "cluster.json"

    @property
    def lock(self) -> Path:
        """Held while the cluster is brought up or torn down."""
        return self.root / ".lock"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.root / "kubeconfig"

    @property
    def pki(self) -> Path:
        """Certificates and keys."""
        return self.root / "pki"

    @property
    def config(self) -> Path:
        """The components' own configuration files and kubeconfigs."""
        return self.root / "config"

    @property
    def logs(self) -> Path:
        """One log file per component. Kept by `down`, emptied by `up`."""
        return self.root / "logs"

    @property
    def etcd(self) -> Path:
        """The data of etcd."""
        return self.root / "etcd"

    @property
    def node(self) -> Path:
        """What the real node keeps on disk: images, containers, volumes."""
        return self.root / "node"

    def log(self, component: str) -> Path:
        """Return the log file of `component`."""
        return self.logs / f"{component}.log"

    def log_tail(self, component: str, lines: int = 12) -> str:
        """Return the last lines that `component` logged."""
        try:
            text = self.log(component).read_text(errors="replace")
        except OSError:
            return "(no log)"
        return "\n".join(text.splitlines()[-lines:])

    def clear(self) -> None:
        """Delete everything but the logs and the lock.

        Raises TeardownError when something is mounted there: it may hold what is not ours.
        """
        mounted = [point for point in _mount_points() if point.is_relative_to(self.root)]
        if mounted:
            raise TeardownError(f"mounted: {', '.join(map(str, mounted))}; unmount, then repeat")
        for directory in (self.pki, self.config, self.etcd, self.node):
            if directory.exists():
                shutil.rmtree(directory)
        for socket in self.root.glob("etcd-*:0"):
            socket.unlink()
        self.kubeconfig.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)


def _mount_points() -> list[Path]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [Path(os.fsdecode(_unescape(line.split()[4]))) for line in lines]


def _unescape(text: str) -> bytes:
    """Undo the octal escapes that the kernel writes for blanks."""
    return re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), os.fsencode(text))
