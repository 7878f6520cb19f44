"""Reads the manifest, with failures in the loader's own terms."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from headrace_checkpoint import errors as checkpoint_errors
from headrace_checkpoint import manifest as manifests
from headrace_checkpoint.manifest import Manifest
from headrace_handover.messages import MAX_REGIONS
from headrace_loader.errors import (
    CheckpointMissing,
    ManifestInvalid,
    ParallelismMismatch,
    StorageError,
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint directory with its manifest and the hex SHA-256 of manifest.json."""

    directory: Path
    manifest: Manifest
    digest: str


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
    if parallelism.tensor != tensor_parallel_size or parallelism.ranks != tensor_parallel_size:
        raise ParallelismMismatch(
            f"--tensor-parallel-size {tensor_parallel_size}: {checkpoint.directory} is cut for "
            f"tensor parallel size {parallelism.tensor}, pipeline parallel size "
            f"{parallelism.pipeline}; shard the model again for this size"
        )
    for rank in range(parallelism.ranks):
        count = len(checkpoint.manifest.rank_parts(rank))
        if count > MAX_REGIONS:
            raise ManifestInvalid(
                f"{checkpoint.directory}: rank {rank} has {count} parts: at most {MAX_REGIONS} "
                "can be handed over; shard the model again with larger parts"
            )
