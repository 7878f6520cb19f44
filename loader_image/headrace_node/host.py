"""Files and programs of a node, seen from the node itself or from a privileged container.

A container with hostPID sees the node's files below /proc/1/root, and runs its programs with
nsenter in the namespaces of its first process.
"""

import os
import stat
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from headrace_node.errors import StepFailed

NODE_ROOT = Path("/proc/1/root")
NO_SUCH_PROGRAM = 127
"""Status where there is no such program; nsenter's, too."""

_PROGRAM_SECONDS = 300.0
_MAX_SHOWN = 400
_ENTER = ("nsenter", "--target", "1", "--mount", "--uts", "--ipc", "--net", "--")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended."""

    status: int
    output: str

    @property
    def ok(self) -> bool:
        """Whether it succeeded."""
        return self.status == 0


Run = Callable[[Sequence[str]], Outcome]


def run_here(arguments: Sequence[str]) -> Outcome:
    """Run a program of this mount namespace."""
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
    try:
        ended = subprocess.run(
            list(arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            timeout=_PROGRAM_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        return Outcome(NO_SUCH_PROGRAM, f"{arguments[0]}: not found")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Outcome(126, str(error))
    return Outcome(ended.returncode, ended.stdout.decode(errors="replace"))


def run_on_node(arguments: Sequence[str]) -> Outcome:
    """Run a program of the node from a container with the host's PID namespace."""
    return run_here([*_ENTER, *arguments])


@dataclass(slots=True)
class Host:
    """The node. With `dry_run` nothing is changed, and `changes` says what would have been."""

    root: Path = Path("/")
    run_program: Run | None = None
    dry_run: bool = False
    changes: list[str] = field(default_factory=list)

    def read(self, path: str) -> str | None:
        """Return a file's text; None where it cannot be read."""
        try:
            return self.path(path).read_text(errors="replace")
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        """Whether there is such a file or directory."""
        return self.path(path).exists()

    def names(self, path: str) -> list[str]:
        """Return the sorted names in a directory; none where it cannot be read."""
        try:
            return sorted(entry.name for entry in self.path(path).iterdir())
        except OSError:
            return []

    def target(self, path: str) -> str:
        """Return the last component that a symbolic link points to; empty where there is none."""
        try:
            return self.path(path).readlink().name
        except OSError:
            return ""

    def ask(self, *arguments: str) -> Outcome:
        """Run a program that changes nothing."""
        return self._runner()(arguments)

    def change(self, *arguments: str, tolerate: str = "") -> None:
        """Run a program that changes the node.

        `tolerate` is text of an output that means it was so already.

        Raises:
            StepFailed: it failed.
        """
        self.changes.append(" ".join(arguments))
        if self.dry_run:
            return
        outcome = self._runner()(arguments)
        if not outcome.ok and not (tolerate and tolerate in outcome.output):
            said = " ".join(outcome.output.split())[-_MAX_SHOWN:]
            raise StepFailed(f"{' '.join(arguments)}: status {outcome.status}: {said}")

    def write(self, path: str, content: str) -> None:
        """Write a file whole or not at all; nothing where it has that content.

        Raises:
            StepFailed: it cannot be written.
        """
        if self.read(path) == content:
            return
        self.changes.append(f"write {path}")
        if not self.dry_run:
            self._replace(path, content.encode(), 0o644)

    def copy(self, path: str, to: str) -> None:
        """Copy a file with its mode, whole or not at all; raises StepFailed."""
        self.changes.append(f"write {to}")
        if self.dry_run:
            return
        try:
            content, mode = self.path(path).read_bytes(), self.path(path).stat().st_mode
        except OSError as error:
            raise StepFailed(f"read {path}: {error.strerror}") from None
        self._replace(to, content, stat.S_IMODE(mode))

    def remove(self, path: str) -> None:
        """Remove a file that may be missing; raises StepFailed."""
        if not self.exists(path):
            return
        self.changes.append(f"remove {path}")
        if self.dry_run:
            return
        try:
            self.path(path).unlink(missing_ok=True)
        except OSError as error:
            raise StepFailed(f"remove {path}: {error.strerror}") from None

    def _replace(self, path: str, content: bytes, mode: int) -> None:
        """Put a file in place that is whole also after a loss of power."""
        target = self.path(path)
        temporary = target.with_name(f".{target.name}.headrace")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
            temporary.replace(target)
        except OSError as error:
            raise StepFailed(f"write {path}: {error.strerror}") from None

    def path(self, path: str) -> Path:
        """Return where a path of the node is here."""
        return self.root / path.lstrip("/")

    def _runner(self) -> Run:
        if self.run_program is not None:
            return self.run_program
        return run_here if self.root == Path("/") else run_on_node
