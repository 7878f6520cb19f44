"""Exception tree of the package; messages name the field, its value, the rule and the fix."""
# Read as conditions, not as Python errors: no "Error" suffix.
# ruff: noqa: N818


class HandoverError(Exception):
    """Base of all errors this package raises on purpose."""


class ProtocolViolation(HandoverError):
    """The peer sent something the protocol does not allow."""


class PeerClosed(HandoverError):
    """The peer closed the connection where the protocol expects it to go on."""


class PeerTooSlow(HandoverError):
    """The peer did not send or take a whole message in time."""


class LoaderUnreachable(HandoverError):
    """The socket cannot be used, and trying again will not help."""


class AttachTimeout(HandoverError):
    """The loader did not hand over the weights in time."""


class Refused(HandoverError):
    """The loader answered with an error; `reason` is its CamelCase word."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
