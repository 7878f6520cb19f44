"""Everything that the tools raise on purpose; each message says what to do."""

from __future__ import annotations


class ToolError(Exception):
    """A step cannot go on; the message is one for the person at the terminal."""


class MissingToolError(ToolError):
    """A program or a right is missing on this machine."""


class CommandError(ToolError):
    """A program failed; the message holds the end of what it printed."""
