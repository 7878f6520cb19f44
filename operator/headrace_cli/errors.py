"""Why a command ends, as one sentence and one exit code.

The codes are those of sysexits.h, as in the loader and the sharder; docs/cli.md lists them.
"""
# Class names say what is wrong, without an "Error" suffix.
# ruff: noqa: N818

import os

EXIT_FOUND = 1
"""A check found a problem, or a wait ended without what was waited for."""
EXIT_INTERRUPTED = 130


class CommandFailed(Exception):
    """Base of all reasons to end a command; the text is the whole message."""

    exit_code = EXIT_FOUND


class UsageWrong(CommandFailed):
    """An option or argument makes no sense."""

    exit_code = os.EX_USAGE


class InputInvalid(CommandFailed):
    """A file or an answer is not what it should be."""

    exit_code = os.EX_DATAERR


class NotFound(CommandFailed):
    """What was named does not exist."""

    exit_code = os.EX_NOINPUT


class Unavailable(CommandFailed):
    """A cluster, loader or package that is needed cannot be reached."""

    exit_code = os.EX_UNAVAILABLE


class KindMissing(Unavailable):
    """The cluster does not serve a kind of object."""


class NoPermission(CommandFailed):
    """The cluster refuses: credentials have expired, or a right is missing."""

    exit_code = os.EX_NOPERM
