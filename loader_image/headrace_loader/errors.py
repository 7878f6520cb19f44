"""Exception tree of the loader.

Every class carries what the process reports when it ends: `reason`, the CamelCase word
in the termination log and in conditions, and `exit_code` after sysexits(3).
"""
# Class names are the published reasons, which carry no "Error" suffix.
# ruff: noqa: N818

import os


class LoaderError(Exception):
    """Base of all errors this package raises on purpose."""

    exit_code = os.EX_SOFTWARE

    @property
    def reason(self) -> str:
        """The published reason: the class's own name."""
        return type(self).__name__


class InternalError(LoaderError):
    """A defect of Headrace, never of its input."""


class CheckpointMissing(LoaderError):
    """The checkpoint directory, or a file its manifest promises, does not exist."""

    exit_code = os.EX_DATAERR


class ManifestInvalid(LoaderError):
    """manifest.json is unreadable, breaks a rule, or asks for more than can be handed over."""

    exit_code = os.EX_DATAERR


class ParallelismMismatch(LoaderError):
    """The checkpoint is cut for another number of ranks."""

    exit_code = os.EX_DATAERR


class DigestMismatch(LoaderError):
    """Bytes on the volume differ from what was written."""

    exit_code = os.EX_DATAERR


class BackendUnavailable(LoaderError):
    """The kind of memory that was asked for cannot be had here."""

    exit_code = os.EX_UNAVAILABLE


class DirectPathUnavailable(LoaderError):
    """GPUDirect is required and not to be had."""

    exit_code = os.EX_UNAVAILABLE


class OutOfMemory(LoaderError):
    """The weights do not fit."""

    exit_code = os.EX_TEMPFAIL


class StorageError(LoaderError):
    """Reading failed; the same load may succeed later."""

    exit_code = os.EX_TEMPFAIL


class GpuFailed(LoaderError):
    """A call of the GPU's driver failed, and not for lack of memory; the driver's own is below."""

    exit_code = os.EX_TEMPFAIL

    @property
    def reason(self) -> str:
        """Of subclasses, too."""
        return "GpuFailed"


class RuntimeDirectoryUnusable(LoaderError):
    """A directory the loader writes to, or its port, cannot be used."""

    exit_code = os.EX_UNAVAILABLE


PUBLISHED: dict[str, type[LoaderError]] = {
    kind.__name__: kind for kind in LoaderError.__subclasses__()
}
"""Classes by reason, to raise again what another process reported."""
