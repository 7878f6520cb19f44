"""The client side: ask for a rank's weights, receive their descriptors, hold the lease."""

import contextlib
import gc
import os
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from headrace_handover.channel import Channel, close_all
from headrace_handover.errors import (
    AttachTimeout,
    LoaderUnreachable,
    PeerClosed,
    PeerTooSlow,
    ProtocolViolation,
    Refused,
)
from headrace_handover.messages import (
    MAX_REPLY_BYTES,
    Failure,
    Loading,
    Ready,
    Region,
    Request,
    decode_reply,
)

TOO_MANY_CONNECTIONS = "TooManyConnections"
"""The one refusal that trying again can cure."""

_FIRST_RETRY_SECONDS = 0.05
_LAST_RETRY_SECONDS = 1.0
_LONGEST_SECONDS = 365 * 86400.0

ProgressCallback = Callable[[Loading], None]


@dataclass(frozen=True, slots=True)
class MappableRegion:
    """A region and the descriptor of its memory."""

    region: Region
    descriptor: int


class Attachment:
    """The weights of one rank, held: descriptors, lease and connection; a context manager.

    The memory stays allocated at least until `close()`, or until nobody refers to this any more.
    An engine keeps it for as long as it lives and lets the end of its process close everything.
    """

    def __init__(self, channel: Channel, ready: Ready, descriptors: list[int]) -> None:
        # At the process's end the kernel closes them, after whatever still uses the memory.
        self._closing = weakref.finalize(self, _close, channel, descriptors)
        self._closing.atexit = False
        self.ready = ready
        self.regions = tuple(map(MappableRegion, ready.regions, descriptors[:-1]))
        self.lease_descriptor = descriptors[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Bytes allocated for this rank."""
        return sum(item.region.nbytes for item in self.regions)

    def close(self) -> None:
        """End the lease and close every descriptor; mappings made from them stay valid."""
        self._closing()


def _close(channel: Channel, descriptors: list[int]) -> None:
    channel.close()
    close_all(descriptors)


def attach(
    socket_path: str | os.PathLike[str],
    *,
    rank: int,
    device: str,
    timeout: float,
    on_progress: ProgressCallback | None = None,
) -> Attachment:
    """Wait until the loader hands over the weights of `rank`; at most `timeout` seconds, or a year.

    A loader that is not there yet, or restarts while it loads, is waited for; `on_progress`
    is called about once a second meanwhile. Raises Refused for the loader's own errors,
    AttachTimeout, LoaderUnreachable for a socket that can never work, and
    ProtocolViolation for a peer that is no loader.
    """
    deadline = time.monotonic() + min(timeout, _LONGEST_SECONDS)  # sockets cannot wait for ever
    request = Request(rank, device)
    delay = _FIRST_RETRY_SECONDS
    while True:
        try:
            return _attach_once(os.fspath(socket_path), request, deadline, on_progress)
        except PeerTooSlow:
            raise AttachTimeout(
                f"{socket_path}: rank {rank} was not handed over within {timeout:g} s"
            ) from None
        except (FileNotFoundError, ConnectionError, BlockingIOError, PeerClosed) as error:
            cause = str(error)
        except Refused as error:
            if error.reason != TOO_MANY_CONNECTIONS:
                raise
            cause = str(error)
        if time.monotonic() + delay >= deadline:
            raise AttachTimeout(
                f"{socket_path}: no loader handed over rank {rank} within {timeout:g} s; "
                f"last: {cause}"
            )
        time.sleep(delay)
        delay = min(2 * delay, _LAST_RETRY_SECONDS)


def _attach_once(
    path: str, request: Request, deadline: float, on_progress: ProgressCallback | None
) -> Attachment:
    channel = Channel(_connect(path, deadline), accept_descriptors=True)
    try:
        # A server that refuses at once may close before it has read; its reason is there to read.
        with contextlib.suppress(PeerClosed):
            channel.send(request.encode(), deadline=deadline)
        ready = _await_ready(channel, request, deadline, on_progress)
        return Attachment(channel, ready, channel.take_descriptors(ready.descriptors))
    except BaseException:
        channel.close()
        raise


def _connect(path: str, deadline: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        sock.connect(path)
    except TimeoutError:
        sock.close()
        raise PeerTooSlow("connecting took too long") from None
    except (FileNotFoundError, ConnectionError, BlockingIOError):
        sock.close()
        raise
    except OSError as error:
        sock.close()
        raise LoaderUnreachable(
            f"{path}: {error.strerror or error}: the socket must be reachable by this user; run "
            "loader and engine as the same user and mount the same volume in both"
        ) from None
    return sock


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Keep the garbage collector off: a reply makes many objects and no garbage.

    With tens of thousands of tensors it would go through all of an engine's objects several times.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _await_ready(
    channel: Channel, request: Request, deadline: float, on_progress: ProgressCallback | None
) -> Ready:
    while True:
        line = channel.receive(limit=MAX_REPLY_BYTES, deadline=deadline)
        if line is None:
            raise PeerClosed("the loader closed the connection before the weights were ready")
        with _without_collections():
            reply = decode_reply(line)
        if isinstance(reply, Failure):
            raise Refused(reply.reason, reply.message)
        if isinstance(reply, Loading):
            if on_progress is not None:
                on_progress(reply)
            continue
        if reply.rank != request.rank:
            raise ProtocolViolation(f"rank: {reply.rank}: asked for {request.rank}")
        return reply
