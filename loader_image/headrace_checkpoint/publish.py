"""What is at the place of a checkpoint already: it, nothing, or something in the way."""

from collections.abc import Mapping
from pathlib import Path

from headrace_checkpoint.errors import (
    CheckpointConflict,
    CheckpointInUse,
    ManifestInvalid,
    StorageError,
)
from headrace_checkpoint.lease import holding
from headrace_checkpoint.manifest import Manifest, read_manifest
from headrace_checkpoint.staging import collect_leftovers, discard, work_path
from headrace_checkpoint.storage import sync_directory, writing


def find_published(directory: Path, identity: Mapping[str, object]) -> Manifest | None:
    """Return the manifest of the checkpoint that is already there, None where there is none.

    Raises CheckpointConflict where `directory` holds anything else: the checkpoint of
    another identity, a damaged one, or none at all.
    """
    try:
        with writing(directory):
            empty = not any(directory.iterdir())
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        if isinstance(error.__cause__, NotADirectoryError):
            raise CheckpointConflict(f"{directory}: is not a directory; remove it") from None
        raise
    if empty:
        return None
    try:
        manifest = read_manifest(directory)
    except (FileNotFoundError, ManifestInvalid) as error:
        raise CheckpointConflict(
            f"{directory}: exists and is no checkpoint ({error}); remove it"
        ) from None
    if manifest.identity != identity:
        raise CheckpointConflict(
            f"{directory}: holds the checkpoint of {dict(manifest.identity)}, asked for was "
            f"{dict(identity)}; choose another directory or remove it"
        )
    _check_sizes(directory, manifest)
    return manifest


def delete(directory: Path) -> bool:
    """Delete a checkpoint and what its writers left; False where there was nothing.

    Who opens it while it goes finds none or a whole one: it is renamed first. Raises
    CheckpointInUse where a loader or a writer holds it or the file system has no locks to tell,
    CheckpointConflict where the directory is no checkpoint, StorageError.
    """
    collect_leftovers(directory, also_work=True)
    if work_path(directory).exists():
        raise CheckpointInUse(f"{directory}: is being written; try again when that has ended")
    if not directory.exists():
        return False
    try:
        read_manifest(directory)
    except (FileNotFoundError, ManifestInvalid) as error:
        raise CheckpointConflict(f"{directory}: is no checkpoint ({error}); left alone") from None
    with writing(directory), holding(directory, exclusive=True) as held:
        if not held:
            why = "somebody has loaded it" if held is False else "the volume has no file locks"
            raise CheckpointInUse(f"{directory}: {why}; left alone")
        discard(directory)
    sync_directory(directory.parent)
    if directory.exists():
        raise StorageError(f"{directory}: could not be removed; see the log")
    return True


def _check_sizes(directory: Path, manifest: Manifest) -> None:
    expected = {part.file: part.file_bytes for part in manifest.parts}
    expected |= {file.file: file.nbytes for file in manifest.files}
    for name, size in expected.items():
        try:
            found = f"{(directory / name).stat().st_size} bytes"
        except OSError as error:
            found = error.strerror or str(error)
        if found != f"{size} bytes":
            raise CheckpointConflict(
                f"{directory / name}: {found}, the manifest says {size} bytes; "
                "the published checkpoint is damaged, remove it"
            )
