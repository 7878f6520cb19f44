"""Why a node cannot be prepared, with the exit code that tells it."""
# Class names are the reasons in logs and labels, without an "Error" suffix.
# ruff: noqa: N818

import os


class NodeError(Exception):
    """Base; the text is for people."""

    exit_code = os.EX_UNAVAILABLE


class Unsupported(NodeError):
    """The operating system cannot be prepared, and never will be."""

    exit_code = os.EX_CONFIG


class StepFailed(NodeError):
    """A program of the node failed."""

    exit_code = os.EX_TEMPFAIL


class PublishFailed(NodeError):
    """The API server did not take the labels."""

    exit_code = os.EX_NOPERM
