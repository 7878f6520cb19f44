"""Handover protocol between loader and engine: messages and file descriptors over a unix socket."""

from headrace_handover.client import Attachment, MappableRegion, attach
from headrace_handover.errors import (
    AttachTimeout,
    HandoverError,
    LoaderUnreachable,
    PeerClosed,
    PeerTooSlow,
    ProtocolViolation,
    Refused,
)
from headrace_handover.messages import Loading, Ready, Region, Request, Tensor, TensorGroup

__all__ = [
    "AttachTimeout",
    "Attachment",
    "HandoverError",
    "LoaderUnreachable",
    "Loading",
    "MappableRegion",
    "PeerClosed",
    "PeerTooSlow",
    "ProtocolViolation",
    "Ready",
    "Refused",
    "Region",
    "Request",
    "Tensor",
    "TensorGroup",
    "attach",
]
