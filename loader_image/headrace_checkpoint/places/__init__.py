"""Where source models lie: a directory, a prefix in S3, a repository of the Hugging Face Hub."""

import os
import re
from pathlib import Path
from typing import Protocol

from headrace_checkpoint.errors import SourceNotFound, StorageError
from headrace_checkpoint.storage import AlignedBuffer, SourceFile, reading

_SCHEME = re.compile(r"([a-z0-9]+)://(.*)", re.DOTALL)


class OpenFile(Protocol):
    """A file of the source, open for reading; unchanged while open, or noticed.

    The methods raise SourceNotFound, SourceForbidden, SourceCorrupt and StorageError; reading may
    be called from several threads.
    """

    @property
    def size(self) -> int:
        """Bytes, as of opening."""

    @property
    def version(self) -> str:
        """What changes whenever the content does; empty where the place has no such thing."""

    def read_at(self, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""

    def allow_direct(self) -> None:
        """Bypass the page cache from now on, where there is one; see SourceFile."""

    def read_aligned(self, offset: int, length: int, buffer: AlignedBuffer) -> memoryview:
        """Read `length` bytes; returns their place in `buffer`."""

    def check_unchanged(self) -> None:
        """Raise StorageError where the file was written since it was opened."""

    def close(self) -> None:
        """Let go of it."""


class Place(Protocol):
    """Holds the files of one model; `str()` of it is what messages call it."""

    def names(self) -> list[str]:
        """Names of the files, sorted; those of folders below it are left out."""

    def open(self, name: str) -> OpenFile:
        """Open a file."""


class Directory:
    """A directory of a mounted file system."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def names(self) -> list[str]:
        """Names of all but folders."""
        with reading(self._path):
            entries = sorted(os.scandir(self._path), key=lambda entry: entry.name)
            return [e.name for e in entries if not e.is_dir(follow_symlinks=False)]

    def open(self, name: str) -> SourceFile:
        """Open a file."""
        return SourceFile(self._path / name)


def find_place(source: str, revision: str) -> Place:
    """Return the place that a source names: s3://BUCKET/PREFIX, hf://OWNER/NAME, or a directory.

    `revision` is a branch, tag or commit of an hf:// source; the others have none. Raises
    SourceNotFound for another scheme.
    """
    match = _SCHEME.fullmatch(source)
    if match is None:
        return Directory(Path(source))
    scheme, rest = match.groups()
    if scheme == "s3":
        from headrace_checkpoint.places.s3 import Bucket

        return Bucket(rest)
    if scheme == "hf":
        from headrace_checkpoint.places.hub import Repository

        return Repository(rest, revision)
    raise SourceNotFound(
        f"--source {source}: {scheme} is no known scheme; give s3://, hf:// or a directory"
    )


class RemoteFile:
    """The part of OpenFile that needs no more than ranges of a remote file."""

    def __init__(self, name: str, size: int, version: str) -> None:
        self._name = name
        self.size = size
        self.version = version

    def fetch(self, offset: int, length: int) -> bytes | memoryview:
        """Fetch a range that lies within the file."""
        raise NotImplementedError

    def read_at(self, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes."""
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        if not buffer:
            return
        data = self.fetch(offset, len(buffer))
        if len(data) != len(buffer):
            raise StorageError(
                f"{self._name}: {len(data)} bytes came of {len(buffer)} at {offset}; try again"
            )
        buffer[:] = data

    def allow_direct(self) -> None:
        """Do nothing: no page cache is in between."""

    def read_aligned(self, offset: int, length: int, buffer: AlignedBuffer) -> memoryview:
        """Read `length` bytes; returns their place in `buffer`."""
        view = buffer.view(length)[:length]
        self.read_into(offset, view)
        return view

    def check_unchanged(self) -> None:
        """Do nothing: what is read is addressed by its content or revision."""

    def close(self) -> None:
        """Do nothing: connections belong to the place."""
