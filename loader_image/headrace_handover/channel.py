"""Lines with file descriptors over a unix stream socket.

Descriptors travel as SCM_RIGHTS with the first byte of the line they belong to. The
kernel may deliver them together with the end of an earlier line, so a channel collects
them until the message that owns them is known. Whatever it collected and nobody took is
closed with the channel: no error leaks a descriptor.
"""

import array
import contextlib
import os
import socket
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from headrace_handover.errors import PeerClosed, PeerTooSlow, ProtocolViolation

_READ_BYTES = 256 * 1024
_MAX_DESCRIPTORS = 253
_DESCRIPTOR_BYTES = array.array("i").itemsize


class Channel:
    """One end of a connection; owns the socket. For one thread at a time, but for `interrupt`.

    `accept_descriptors=False` makes the kernel drop what the peer attaches.
    """

    def __init__(self, sock: socket.socket, *, accept_descriptors: bool) -> None:
        self._sock = sock
        self._accept_descriptors = accept_descriptors
        self._buffer = bytearray()
        self._searched = 0
        self._descriptors: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket and every descriptor nobody took; may be called twice."""
        self._sock.close()
        self._descriptors, left = [], self._descriptors
        close_all(left)

    def interrupt(self) -> None:
        """Make the other threads' calls on this channel end; safe from any thread."""
        with contextlib.suppress(OSError):  # not connected any more: what was wanted
            self._sock.shutdown(socket.SHUT_RDWR)

    def take_descriptors(self, count: int) -> list[int]:
        """Return the descriptors received so far; the caller owns them.

        Raises ProtocolViolation, and keeps them, when there are not exactly `count`.
        """
        if len(self._descriptors) != count:
            raise ProtocolViolation(
                f"{len(self._descriptors)} file descriptors: the message needs {count}"
            )
        self._descriptors, taken = [], self._descriptors
        return taken

    def send(self, line: bytes, descriptors: Sequence[int] = (), *, deadline: float) -> None:
        """Send a whole line; `deadline` is a value of time.monotonic().

        Raises PeerClosed or PeerTooSlow; the connection is then of no more use.
        """
        ancillary = []
        if descriptors:
            packed = array.array("i", descriptors)
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)]
        view = memoryview(line)
        try:
            while view:
                self._sock.settimeout(_remaining(deadline))
                view = view[self._sock.sendmsg([view], ancillary) :]
                ancillary = []
        except TimeoutError:
            raise PeerTooSlow("the peer does not take the message") from None
        except ConnectionError:
            raise PeerClosed("the peer closed the connection") from None

    def receive(self, *, limit: int, deadline: float | None) -> bytes | None:
        """Return the next line without its line feed, or None when the peer is done.

        Raises ProtocolViolation for a line longer than `limit`, PeerTooSlow after
        `deadline`, PeerClosed when the connection ends within a line.
        """
        while (end := self._buffer.find(b"\n", self._searched)) < 0:
            self._searched = len(self._buffer)
            if len(self._buffer) >= limit:
                raise ProtocolViolation(f"a line of more than {limit} bytes")
            if not self._receive_some(limit, deadline):
                if self._buffer:
                    raise PeerClosed("the peer closed the connection within a message")
                return None
        if end >= limit:
            raise ProtocolViolation(f"a line of more than {limit} bytes")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return line

    def _receive_some(self, limit: int, deadline: float | None) -> bool:
        self._sock.settimeout(None if deadline is None else _remaining(deadline))
        size = min(_READ_BYTES, limit)
        try:
            data = self._receive_with_descriptors(size) if self._accept_descriptors else None
            if data is None:
                data = self._sock.recv(size)
        except TimeoutError:
            raise PeerTooSlow("the peer did not send a whole message in time") from None
        except ConnectionError:
            raise PeerClosed("the peer reset the connection") from None
        self._buffer += data
        return bool(data)

    def _receive_with_descriptors(self, size: int) -> bytes:
        space = socket.CMSG_SPACE(_MAX_DESCRIPTORS * _DESCRIPTOR_BYTES)
        data, ancillary, flags, _ = self._sock.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                packed = array.array("i")
                packed.frombytes(content[: len(content) - len(content) % packed.itemsize])
                self._descriptors += packed
        if flags & socket.MSG_CTRUNC:
            raise ProtocolViolation(
                "file descriptors were lost on the way: this process is at its limit of open "
                "files (ulimit -n), raise it"
            )
        if len(self._descriptors) > _MAX_DESCRIPTORS:
            raise ProtocolViolation(f"more than {_MAX_DESCRIPTORS} file descriptors")
        return data


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors; each is closed whatever happens to the others."""
    for descriptor in descriptors:
        # Linux releases the descriptor even where close(2) reports an error.
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _remaining(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
