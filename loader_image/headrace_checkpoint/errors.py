"""Exception tree of the package.

Every class carries what the process that meets it must report: `reason`, the
CamelCase word that ends in the termination log and in conditions, and
`exit_code` after sysexits(3). Messages name the field, tensor or file, its value,
the rule it breaks and the fix.
"""
# Class names are the published reasons, which carry no "Error" suffix.
# ruff: noqa: N818

import os


class CheckpointError(Exception):
    """Base of all errors this package raises on purpose."""

    exit_code = os.EX_SOFTWARE

    @property
    def reason(self) -> str:
        """The published reason: the class's own name."""
        return type(self).__name__


class InternalError(CheckpointError):
    """A defect of Headrace, never of its input."""


class InputError(CheckpointError):
    """The input cannot be used; trying again with the same input is pointless."""

    exit_code = os.EX_DATAERR


class SourceNotFound(InputError):
    """The source directory, or a file it promises, does not exist."""


class SourceForbidden(InputError):
    """The source exists, as far as one can see, and may not be read."""


class ConfigInvalid(InputError):
    """config.json is absent, unreadable or contradicts itself."""


class ArchitectureUnsupported(InputError):
    """No layout table covers this architecture or a feature of this model."""


class ParallelismInvalid(InputError):
    """The parallel sizes do not divide the model."""


class SourceCorrupt(InputError):
    """A source file is truncated, lies about its content or contradicts config.json."""


class TensorMissing(InputError):
    """A tensor the architecture needs is in no source file."""


class ManifestInvalid(InputError):
    """manifest.json is unreadable or breaks a rule of the format."""


class DigestMismatch(InputError):
    """Bytes on the volume differ from what was written."""


class CheckpointConflict(InputError):
    """The target directory exists and is not the checkpoint that was asked for."""


class SourceChanged(InputError):
    """The source is not the one that the published checkpoint was made of."""


class TransientError(CheckpointError):
    """The environment failed; the same call may succeed later."""

    exit_code = os.EX_TEMPFAIL


class NoSpaceOnVolume(TransientError):
    """The volume, a quota or a file size limit is exhausted."""


class VolumeReadOnly(TransientError):
    """The volume is mounted read-only or refuses writes to this user."""


class StorageError(TransientError):
    """Reading or writing failed for another reason, such as EIO or ESTALE."""


class CheckpointInUse(TransientError):
    """Somebody reads or writes what was to be deleted, or nobody can tell."""


class Interrupted(TransientError):
    """A signal asked the process to stop."""
