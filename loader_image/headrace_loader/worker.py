"""Fills the memory of one rank, passes its descriptors to the supervisor, and exits.

A process of its own per rank lets each open one device and leave nothing behind on it.
"""

import os
import select
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import NoReturn

from headrace_handover.channel import Channel
from headrace_handover.errors import HandoverError
from headrace_loader.backends import (
    Backend,
    BackendOptions,
    ChunkMismatch,
    PathReport,
    Region,
    open_backend,
)
from headrace_loader.errors import InternalError, LoaderError
from headrace_loader.worker_protocol import (
    Failed,
    Filled,
    Message,
    Mismatched,
    PathChosen,
    Progressed,
    decode_plan,
    encode,
)

_REPORT_SECONDS = 0.1
_SEND_SECONDS = 30.0


class SupervisorLink:
    """The worker's end of the socket pair; ends the process when the supervisor is gone."""

    def __init__(self, descriptor: int) -> None:
        self._channel = Channel(socket.socket(fileno=descriptor), accept_descriptors=False)
        self._lock = threading.Lock()
        threading.Thread(target=_end_with, args=(descriptor,), daemon=True).start()

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send a message; safe from any thread."""
        try:
            with self._lock:
                deadline = time.monotonic() + _SEND_SECONDS
                self._channel.send(encode(message), descriptors, deadline=deadline)
        except HandoverError:
            _end()


def _end_with(descriptor: int) -> None:
    """End when the other side of a socket is gone; it never sends anything.

    By poll, not by the channel: its time limits are those of the thread that sends.
    """
    end = select.poll()
    end.register(descriptor, select.POLLIN)
    end.poll()
    _end()


def _end() -> NoReturn:
    """End at once: nobody waits for the weights any more, and no memory must outlive that."""
    os._exit(os.EX_UNAVAILABLE)


class ProgressReporter:
    """Counts what the backend reports, and passes it on ten times a second where it changed.

    A thread does, so that nothing is left untold when storage hangs.
    """

    def __init__(self, link: SupervisorLink, backend: Backend) -> None:
        self._link = link
        self._backend = backend
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._read = 0
        self._verified = 0
        self._began = time.time()
        self._first_byte: float | None = None
        self._last_byte: float | None = None
        self.verified_at = self._began
        self._ended = threading.Event()

    def path(self, report: PathReport) -> None:
        """Pass the path on; reading begins then."""
        backend = self._backend
        self._link.send(PathChosen(backend.device, report, backend.locality))
        self._began = time.time()
        threading.Thread(target=self._send_often, daemon=True).start()

    def read(self, nbytes: int) -> None:
        """Count bytes read."""
        with self._lock:
            self._last_byte = time.time()
            if self._first_byte is None:
                self._first_byte = self._last_byte
            self._read += nbytes

    def verified(self, nbytes: int) -> None:
        """Count bytes verified."""
        with self._lock:
            self.verified_at = time.time()
            self._verified += nbytes

    def end(self) -> None:
        """Pass on the last counts."""
        self._ended.set()
        self._send()

    def _send_often(self) -> None:
        told = 0
        while not self._ended.wait(_REPORT_SECONDS):
            if self._read != told:
                told = self._read
                self._send()

    def _send(self) -> None:
        with self._sending:  # of two threads, the one that sends last knows of as much
            with self._lock:
                message = Progressed(
                    self._read, self._verified, self._began, self._first_byte, self._last_byte
                )
            self._link.send(message)


def run(socket_descriptor: int, backend: str, options: BackendOptions) -> int:
    """Load one rank; returns the exit code."""
    link = SupervisorLink(socket_descriptor)
    try:
        _load(backend, options, link)
    except LoaderError as error:
        return _report(link, error)
    except Exception as error:  # noqa: BLE001 - a defect still has to be reported
        text = f"worker {options.local_rank} of this loader: {type(error).__name__}: {error}"
        return _report(link, InternalError(text))
    return 0


def _report(link: SupervisorLink, error: LoaderError) -> int:
    link.send(Failed(error.reason, str(error)))
    return error.exit_code


def _load(name: str, options: BackendOptions, link: SupervisorLink) -> None:
    backend = open_backend(name, options)
    content = sys.stdin.buffer.read()
    if not content:
        _end()
    sources = decode_plan(content)
    progress = ProgressReporter(link, backend)
    regions: list[Region] = [backend.allocate(source.nbytes) for source in sources]
    try:
        backend.fill(list(zip(regions, sources, strict=True)), progress)
    except ChunkMismatch as error:
        link.send(Mismatched(sources.index(error.source), error.chunk, error.found))
        return
    progress.end()
    filled = Filled(tuple(region.nbytes for region in regions), progress.verified_at)
    link.send(filled, [region.export() for region in regions])
