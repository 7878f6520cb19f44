"""The server side: a bounded number of connections, a thread for each, none trusted.

The server knows the protocol, not the weights: a `WeightSource` answers requests. A
connection that has received its weights stays open as the client's lease; the source is
told when it begins and ends.
"""

import contextlib
import logging
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn, Protocol

from headrace_handover.channel import Channel
from headrace_handover.client import TOO_MANY_CONNECTIONS
from headrace_handover.errors import HandoverError, PeerClosed, ProtocolViolation, Refused
from headrace_handover.messages import MAX_REQUEST_BYTES, Failure, Loading, Ready, Request

SOCKET_NAME = "handover.sock"

_LOG = logging.getLogger(__name__)
_BACKLOG = 128
_PEER_CREDENTIALS = struct.Struct("3i")
_ACCEPT_PAUSE_SECONDS = 0.1
_JOIN_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Peer:
    """A client that holds the weights of a rank; `connection` tells equal peers apart.

    `pid` is as the kernel sees it from here: 0 for a process of another PID namespace.
    """

    connection: int
    rank: int
    device: str
    pid: int


@dataclass(frozen=True)
class Offer:
    """A ready message and the descriptors that go with it; they stay the source's."""

    ready: Ready
    descriptors: Sequence[int]

    @cached_property
    def line(self) -> bytes:
        """The message as it is sent; made once, since there may be tens of thousands of tensors."""
        return self.ready.encode()

    def prepare(self) -> None:
        """Make the line before somebody waits for it."""
        _ = self.line


class WeightSource(Protocol):
    """What the server hands out. Every method is called from many threads."""

    def answer(self, request: Request) -> Loading | Offer | Failure:
        """Return the present answer to a request, at once."""

    def wait(self, request: Request, seconds: float) -> None:
        """Return once the answer is another one than Loading, or after `seconds`."""

    def attached(self, peer: Peer) -> None:
        """Note that a client received the weights."""

    def detached(self, peer: Peer) -> None:
        """Note that the lease of a client ended."""

    def refused(self, reason: str) -> None:
        """Note that a connection was refused."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a server; times in seconds."""

    connections: int = 64
    request_seconds: float = 5.0
    send_seconds: float = 30.0
    progress_seconds: float = 1.0


class HandoverServer:
    """Listens in `directory`, which it creates for its own user alone."""

    def __init__(self, directory: Path, source: WeightSource, limits: Limits | None = None) -> None:
        self.path = directory / SOCKET_NAME
        self._source = source
        self._limits = limits or Limits()
        self._uid = os.geteuid()
        self._lock = threading.Lock()
        self._open: dict[int, tuple[Channel, threading.Thread]] = {}
        self._accepted = 0
        self._closing = False
        self._last_refusal_logged = -1.0
        prepare_directory(directory)
        self._listener = _listen(self.path)
        self._acceptor = threading.Thread(target=self._accept_all, name="handover", daemon=True)

    def start(self) -> None:
        """Begin to accept connections."""
        self._acceptor.start()

    def close(self) -> None:
        """Stop accepting, end every connection, remove the socket; bounded in time."""
        self._closing = True
        with contextlib.suppress(OSError):  # wakes the acceptor; closing alone would not
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.path.unlink(missing_ok=True)
        with self._lock:
            connections = list(self._open.values())
        for channel, _ in connections:
            channel.interrupt()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in [self._acceptor, *(thread for _, thread in connections)]:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))

    def _accept_all(self) -> None:
        while not self._closing:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._closing:
                    return
                # Out of descriptors or memory: the listener is fine, so wait for better times.
                _LOG.warning("accepting a connection failed: %s", error)
                time.sleep(_ACCEPT_PAUSE_SECONDS)
                continue
            self._begin(sock)

    def _begin(self, sock: socket.socket) -> None:
        channel = Channel(sock, accept_descriptors=False)
        try:
            pid, uid, _ = _PEER_CREDENTIALS.unpack(
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
            )
            self._admit(channel, pid, uid)
        except (HandoverError, OSError, RuntimeError) as error:
            # RuntimeError: no thread could be started.
            self._log_refusal(error)
            channel.close()

    def _log_refusal(self, error: Exception) -> None:
        """Log at most one refusal per second: a flood must not fill the log."""
        now = time.monotonic()
        if now - self._last_refusal_logged >= 1.0:
            self._last_refusal_logged = now
            _LOG.warning("connection refused: %s", error)

    def _admit(self, channel: Channel, pid: int, uid: int) -> None:
        if uid != self._uid:
            message = (
                f"user {uid} may not attach: run the engine as user {self._uid}, as the loader"
            )
            self._refuse(channel, Failure("PeerNotPermitted", message), wait=0.0)
        with self._lock:
            full = len(self._open) >= self._limits.connections
            self._accepted += 1
            number = self._accepted
            if not full:
                thread = threading.Thread(
                    target=self._serve_and_close,
                    args=(channel, number, pid),
                    name=f"handover-{number}",
                    daemon=True,
                )
                self._open[number] = (channel, thread)
        if full:
            message = f"{self._limits.connections} connections are open, which is the limit"
            self._refuse(channel, Failure(TOO_MANY_CONNECTIONS, message), wait=0.0)
        try:
            thread.start()
        except RuntimeError:
            self._forget(number)
            raise

    def _forget(self, number: int) -> None:
        with self._lock:
            self._open.pop(number, None)

    def _refuse(self, channel: Channel, failure: Failure, *, wait: float) -> NoReturn:
        """Send the refusal and raise it; a peer that does not listen is not waited for."""
        self._source.refused(failure.reason)
        # A fresh connection's send buffer takes such a message without blocking.
        with contextlib.suppress(HandoverError):
            channel.send(failure.encode(), deadline=time.monotonic() + wait + 0.01)
        raise Refused(failure.reason, failure.message)

    def _serve_and_close(self, channel: Channel, number: int, pid: int) -> None:
        try:
            self._serve(channel, number, pid)
        except HandoverError as error:
            _LOG.debug("handover connection %d ended: %s", number, error)
        except OSError as error:  # such as too many descriptors on their way (ETOOMANYREFS)
            _LOG.warning("handover connection %d failed: %s", number, error)
        finally:
            channel.close()
            self._forget(number)

    def _serve(self, channel: Channel, number: int, pid: int) -> None:
        try:
            request = self._receive_request(channel)
        except ProtocolViolation as error:
            self._refuse(channel, Failure("ProtocolViolation", str(error)), wait=1.0)
        if request is None:
            return
        while isinstance(answer := self._source.answer(request), Loading):
            channel.send(answer.encode(), deadline=time.monotonic() + self._limits.send_seconds)
            self._source.wait(request, self._limits.progress_seconds)
            if self._closing:
                raise PeerClosed("the server is closing")
        if isinstance(answer, Failure):
            self._refuse(channel, answer, wait=1.0)
        self._hand_over(channel, answer, Peer(number, request.rank, request.device, pid))

    def _receive_request(self, channel: Channel) -> Request | None:
        deadline = time.monotonic() + self._limits.request_seconds
        line = channel.receive(limit=MAX_REQUEST_BYTES, deadline=deadline)
        return None if line is None else Request.decode(line)

    def _hand_over(self, channel: Channel, offer: Offer, peer: Peer) -> None:
        deadline = time.monotonic() + self._limits.send_seconds
        channel.send(offer.line, offer.descriptors, deadline=deadline)
        self._source.attached(peer)
        try:
            if channel.receive(limit=1, deadline=None) is not None:
                raise ProtocolViolation("the client sent something after its request")
        finally:
            self._source.detached(peer)


def prepare_directory(directory: Path) -> None:
    """Create a directory only this user can enter, or check that it is one.

    Raises HandoverError when it belongs to someone else or is open to others and cannot be
    closed, OSError when it cannot be created.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise HandoverError(
            f"{directory}: must be a directory owned by user {os.geteuid()}, not a link; remove it"
        )
    directory.chmod(0o700)


def _listen(path: Path) -> socket.socket:
    """Bind the socket, replacing that of a server which is gone."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                path.unlink(missing_ok=True)
            else:
                raise HandoverError(f"{path}: another loader is serving here; stop it first")
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise HandoverError(f"{path}: {error}: the socket cannot be made") from None
    except HandoverError:
        listener.close()
        raise
    return listener
