"""Reads the manifest, with failures in the loader's own terms."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from headrace_checkpoint import errors as checkpoint_errors
from headrace_checkpoint import manifest as manifests
from headrace_checkpoint.manifest import Manifest
from headrace_handover.messages import MAX_REGIONS
from headrace_loader.backends import PartSource
from headrace_loader.errors import (
    CheckpointMissing,
    DigestMismatch,
    ManifestInvalid,
    ParallelismMismatch,
    StorageError,
)

_NAMED_TENSORS = 5


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint directory with its manifest and the hex SHA-256 of manifest.json."""

    directory: Path
    manifest: Manifest
    digest: str

    def sources(self, rank: int) -> list[PartSource]:
        """Return where to read the parts of a rank."""
        return [
            PartSource(
                path=self.directory / part.file,
                offset=part.data_offset,
                nbytes=part.data_bytes,
                chunk_bytes=self.manifest.chunk_bytes,
                digest_algorithm=self.manifest.digest_algorithm,
                digests=part.chunk_digests,
            )
            for part in self.manifest.rank_parts(rank)
        ]

    def mismatch(self, rank: int, number: int, chunk: int, found: str) -> DigestMismatch:
        """Return the error for a chunk of part `number` whose digest is `found`."""
        part, source = self.manifest.rank_parts(rank)[number], self.sources(rank)[number]
        begin, end = source.chunk_range(chunk)
        names = part.names_between(begin, end)
        more = f" and {len(names) - _NAMED_TENSORS} more" if len(names) > _NAMED_TENSORS else ""
        return DigestMismatch(
            f"{source.path}: chunk {chunk} (data bytes {begin} to {end}, tensors "
            f"{', '.join(names[:_NAMED_TENSORS])}{more}): {source.digest_algorithm} is "
            f"{found}, the manifest says {source.digests[chunk]}; the file is damaged, "
            "delete the checkpoint directory and shard the model again"
        )


def load_manifest(directory: Path) -> Checkpoint:
    """Read and check the manifest of a checkpoint directory.

    Raises CheckpointMissing, ManifestInvalid, StorageError.
    """
    try:
        manifest, content = manifests.read_manifest_and_content(directory)
    except FileNotFoundError as error:
        raise CheckpointMissing(f"--checkpoint {error}") from None
    except checkpoint_errors.ManifestInvalid as error:
        raise ManifestInvalid(f"{error}; shard the model again") from None
    except checkpoint_errors.StorageError as error:
        raise StorageError(str(error)) from None
    return Checkpoint(directory, manifest, hashlib.sha256(content).hexdigest())


def check_ranks(checkpoint: Checkpoint, tensor_parallel_size: int) -> None:
    """Raise ParallelismMismatch or ManifestInvalid where the ranks cannot be served."""
    parallelism = checkpoint.manifest.parallelism
    if parallelism.pipeline != 1:
        raise ParallelismMismatch(
            f"--checkpoint {checkpoint.directory}: pipeline parallel size {parallelism.pipeline}: "
            "loaders serve 1 alone; shard the model again without --pipeline-parallel-size"
        )
    if parallelism.tensor != tensor_parallel_size:
        raise ParallelismMismatch(
            f"--tensor-parallel-size {tensor_parallel_size}: {checkpoint.directory} has "
            f"{parallelism.tensor} ranks: the two must be equal; start loader and engine with "
            f"--tensor-parallel-size {parallelism.tensor}, or shard the model again for "
            f"{tensor_parallel_size}"
        )
    for rank in range(parallelism.ranks):
        count = len(checkpoint.manifest.rank_parts(rank))
        if count > MAX_REGIONS:
            raise ManifestInvalid(
                f"{checkpoint.directory}: rank {rank} has {count} parts: at most {MAX_REGIONS} "
                "can be handed over; shard the model again with larger parts"
            )
