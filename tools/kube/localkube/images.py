"""The images of the real node, and the directory they are kept in."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from typing import TYPE_CHECKING

from .files import write_private

if TYPE_CHECKING:
    from pathlib import Path

    from .namespaces import Namespaces

# containerd's namespace for everything that the kubelet sees.
NAMESPACE = "k8s.io"
IMPORT_SECONDS = 1200.0


class ImageStore:
    """The directory `root` with what containerd keeps on disk, for one cluster at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.containerd = root / "containerd"

    def acquire(self) -> int | None:
        """Return a file descriptor; who has it open has the store. None when somebody else has."""
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    def note_of(self, archive: Path) -> Path:
        """Return the file that tells which images came out of `archive`, as it is now."""
        state = archive.stat()
        key = f"{archive}\0{state.st_size}\0{state.st_mtime_ns}"
        return self.root / "imported" / hashlib.sha256(key.encode()).hexdigest()[:32]


class Images:
    """The images of a running node."""

    def __init__(
        self, namespaces: Namespaces, ctr: Path, store: ImageStore, snapshotter: str
    ) -> None:
        self._namespaces = namespaces
        self._ctr = ctr
        self._store = store
        self._snapshotter = snapshotter

    def add(self, archive: Path) -> list[str]:
        """Import `archive` unless its images are there already; return their names.

        Raises CommandError when it is not an image archive.
        """
        note = self._store.note_of(archive)
        present = self._present()
        known = [line.split() for line in note.read_text().splitlines()] if note.exists() else []
        if known and all(present.get(name) == digest for name, digest in known):
            return [name for name, _ in known]
        # --local: the other way, through the transfer service, takes twice as long.
        flags = ("--local", f"--snapshotter={self._snapshotter}")
        output = self._run("import", *flags, archive)
        imported = re.findall(r"^unpacking (\S+) \((sha256:[0-9a-f]+)\)", output, re.MULTILINE)
        write_private(note, "".join(f"{name} {digest}\n" for name, digest in imported))
        self._forget_replaced()
        return [name for name, _ in imported]

    def _forget_replaced(self) -> None:
        """Drop images that an import has taken the name from; the kubelet here never does.

        containerd's CRI plugin keeps each under the digest of its configuration as well.
        """
        present = self._present()
        named = {digest for name, digest in present.items() if not name.startswith("sha256:")}
        nameless = [name for name, digest in present.items() if digest not in named]
        if nameless:
            self._run("remove", "--sync", *nameless)

    def _present(self) -> dict[str, str]:
        rows = [line.split() for line in self._run("list").splitlines()[1:]]
        return {row[0]: row[2] for row in rows}

    def _run(self, *arguments: str | Path) -> str:
        command = (self._ctr, f"--namespace={NAMESPACE}", "images", *arguments)
        return self._namespaces.run(*command, timeout=IMPORT_SECONDS)
