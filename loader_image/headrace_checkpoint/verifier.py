"""Checks a published checkpoint against its manifest, byte for byte."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from headrace_checkpoint.digest import digester
from headrace_checkpoint.errors import (
    DigestMismatch,
    ManifestInvalid,
    SourceChanged,
    SourceCorrupt,
    SourceNotFound,
)
from headrace_checkpoint.manifest import (
    FILE_NAME,
    CopiedFile,
    Manifest,
    Part,
    check_self_digest,
    read_manifest_and_content,
)
from headrace_checkpoint.places import find_place
from headrace_checkpoint.progress import Progress
from headrace_checkpoint.report import log
from headrace_checkpoint.safetensors_format import read_header
from headrace_checkpoint.source import Source
from headrace_checkpoint.storage import SourceFile


def verify(directory: Path) -> Manifest:
    """Read every byte of a checkpoint; returns its manifest.

    Raises FileNotFoundError where there is no manifest, ManifestInvalid, and
    DigestMismatch naming file and tensors of the first difference.
    """
    manifest, content = read_manifest_and_content(directory)
    try:
        if not check_self_digest(content):
            log("manifest-not-compared", "warning", error="it has no digest of itself")
    except ManifestInvalid as error:
        raise ManifestInvalid(f"{directory / FILE_NAME}: {error}") from None
    for file in manifest.files:
        _verify_file(directory, file)
    with Progress(manifest.total_bytes) as progress:
        for part in manifest.parts:
            verify_part(
                directory, part, manifest.digest_algorithm, manifest.chunk_bytes, progress.add
            )
            log("part-verified", file=part.file, bytes=part.data_bytes)
    return manifest


def compare_source(manifest: Manifest, source: str, revision: str, name: str) -> None:
    """Compare the fingerprints that `name`'s manifest has of its source with that source.

    Raises SourceChanged naming the first file that differs, and what reading the source raises.
    """
    if not manifest.source:
        log("source-not-compared", "warning", error=f"{name}: kept no fingerprints")
        return
    with Source(find_place(source, revision)) as found:
        found.open_weights()
        now = {file.file: file for file in found.fingerprints()}
    before = {file.file: file for file in manifest.source}
    for file in sorted(before.keys() | now.keys()):
        if before.get(file) != now.get(file):
            what = "is gone" if file not in now else "is new" if file not in before else "differs"
            raise SourceChanged(
                f"{source}: {file}: {what} since {name} was made of revision {revision!r}; give "
                "the changed model another spec.model.revision, or restore the file"
            )


@contextmanager
def _opened(path: Path, size: int) -> Iterator[SourceFile]:
    """Open a file of the checkpoint; whatever is wrong with it is a DigestMismatch."""
    try:
        with closing(SourceFile(path)) as file:
            if file.size != size:
                raise DigestMismatch(f"{path}: {file.size} bytes, the manifest says {size}")
            yield file
    except (SourceNotFound, SourceCorrupt) as error:
        text = str(error)
        raise DigestMismatch(text if text.startswith(str(path)) else f"{path}: {text}") from None


def _verify_file(directory: Path, expected: CopiedFile) -> None:
    path = directory / expected.file
    with _opened(path, expected.nbytes) as file:
        content = file.read_at(0, file.size)
    if hashlib.sha256(content).hexdigest() != expected.digest:
        raise DigestMismatch(f"{path}: content differs from its digest")


def verify_part(
    directory: Path,
    part: Part,
    algorithm: str,
    chunk_bytes: int,
    count: Callable[[int], None] = lambda _: None,
) -> None:
    """Read every byte of a part, telling `count`; raises DigestMismatch at the first difference."""
    path = directory / part.file
    with _opened(path, part.file_bytes) as file:
        header = read_header(file.read_at, file.size)
        if (header.tensors, header.data_offset) != (part.tensors, part.data_offset):
            raise DigestMismatch(f"{path}: the header's tensors differ from the manifest's")
        digest = digester(algorithm, chunk_bytes)
        buffer = bytearray(chunk_bytes)
        for number, expected in enumerate(part.chunk_digests):
            begin = number * chunk_bytes
            end = min(begin + chunk_bytes, part.data_bytes)
            chunk = memoryview(buffer)[: end - begin]
            file.read_into(part.data_offset + begin, chunk)
            if digest(chunk) != expected:
                raise DigestMismatch(
                    f"{path}: chunk {number} (data bytes {begin} to {end}) differs from its "
                    f"digest; it holds {', '.join(part.names_between(begin, end))}"
                )
            count(end - begin)
