"""Checks a published checkpoint against its manifest, byte for byte."""

import hashlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from headrace_checkpoint.digest import digester
from headrace_checkpoint.errors import DigestMismatch, SourceCorrupt, SourceNotFound
from headrace_checkpoint.manifest import CopiedFile, Manifest, Part, read_manifest
from headrace_checkpoint.report import log
from headrace_checkpoint.safetensors_format import read_header
from headrace_checkpoint.storage import SourceFile


def verify(directory: Path) -> Manifest:
    """Read every byte of a checkpoint; returns its manifest.

    Raises FileNotFoundError where there is no manifest, ManifestInvalid, and
    DigestMismatch naming file and tensors of the first difference.
    """
    manifest = read_manifest(directory)
    for file in manifest.files:
        _verify_file(directory, file)
    for part in manifest.parts:
        _verify_part(directory, manifest, part)
        log("part-verified", file=part.file, bytes=part.data_bytes)
    return manifest


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


def _verify_part(directory: Path, manifest: Manifest, part: Part) -> None:
    path = directory / part.file
    with _opened(path, part.file_bytes) as file:
        header = read_header(file.read_at, file.size)
        if (header.tensors, header.data_offset) != (part.tensors, part.data_offset):
            raise DigestMismatch(f"{path}: the header's tensors differ from the manifest's")
        _verify_chunks(file, manifest, part)


def _verify_chunks(file: SourceFile, manifest: Manifest, part: Part) -> None:
    digest = digester(manifest.digest_algorithm, manifest.chunk_bytes)
    buffer = bytearray(manifest.chunk_bytes)
    for number, expected in enumerate(part.chunk_digests):
        begin = number * manifest.chunk_bytes
        end = min(begin + manifest.chunk_bytes, part.data_bytes)
        chunk = memoryview(buffer)[: end - begin]
        file.read_into(part.data_offset + begin, chunk)
        if digest(chunk) != expected:
            raise DigestMismatch(
                f"{file.path}: chunk {number} (data bytes {begin} to {end}) differs from its "
                f"digest; it holds {', '.join(part.names_between(begin, end))}"
            )
