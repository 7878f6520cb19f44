"""The exceptions of localkube: one root, so that a caller can catch them all."""

from __future__ import annotations


class LocalkubeError(Exception):
    """Something localkube was asked to do cannot be done; the message says why and what to do."""


class InvalidInputError(LocalkubeError):
    """An argument or option has a value that cannot be used."""


class PrerequisiteError(LocalkubeError):
    """The machine lacks something (a package, root, a Go toolchain)."""


class BuildError(LocalkubeError):
    """A pinned binary could not be built."""


class ComponentError(LocalkubeError):
    """A component exited or did not become ready in time."""


class CommandError(LocalkubeError):
    """A command run on behalf of the caller ended with a non-zero status."""


class TeardownError(LocalkubeError):
    """Something of the cluster is still there after teardown."""
