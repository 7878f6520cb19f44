"""The supervisor's view of a worker: started, listened to, ended."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace_handover.channel import Channel
from headrace_handover.errors import HandoverError
from headrace_loader.backends import PartSource, PathPolicy
from headrace_loader.errors import InternalError
from headrace_loader.worker_protocol import (
    MAX_LINE_BYTES,
    Failed,
    Filled,
    Message,
    decode,
    encode_plan,
)


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What every worker of a load is told."""

    backend: str
    policy: PathPolicy
    read_threads: int
    cpus: int
    """How many CPUs one of them may keep busy."""


@dataclass(frozen=True, slots=True)
class WorkerEvent:
    """A worker's message; descriptors come with `Filled` and belong to the receiver."""

    rank: int
    message: Message
    descriptors: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    """A worker's process is gone; a negative code is the signal that ended it."""

    rank: int
    exit_code: int


WorkerNews = WorkerEvent | WorkerEnded


class WorkerProcess:
    """One worker. Its news go to the function `news`, the last of them WorkerEnded.

    It opens its device, counted from 0 in the pod, at once and waits for what to load. It knows
    its rank on this node only; `rank` is that of the whole replica.
    """

    def __init__(
        self, rank: int, device: int, options: WorkerOptions, news: Callable[[WorkerNews], None]
    ) -> None:
        self.rank = rank
        self._news = news
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        reading, writing = os.pipe()
        self._plan = os.fdopen(writing, "wb")
        self._is_told = False
        with theirs, os.fdopen(reading) as stdin:
            self._process = subprocess.Popen(
                _command(device, options, theirs.fileno()),
                stdin=stdin,
                pass_fds=(theirs.fileno(),),
            )
        self._channel = Channel(ours, accept_descriptors=True)
        self._thread = threading.Thread(target=self._listen, name=f"worker-{rank}", daemon=True)
        self._thread.start()

    def load(self, sources: Sequence[PartSource]) -> None:
        """Tell it to load these parts; returns at once."""
        self._is_told = True
        threading.Thread(target=self._tell, args=(encode_plan(sources),), daemon=True).start()

    def _tell(self, plan: bytes) -> None:
        # A worker that is gone says so in its news.
        with contextlib.suppress(OSError), self._plan:
            self._plan.write(plan)

    def kill(self) -> None:
        """Kill the worker unless it has ended; its end will be in the news."""
        self._process.kill()

    def stop(self, seconds: float) -> None:
        """Kill the worker unless it has ended, and wait for it, not longer than `seconds`."""
        self.kill()
        self._thread.join(max(0.0, seconds))
        if not self._is_told:  # else who writes closes it, and may have to wait for the worker
            with contextlib.suppress(OSError):
                self._plan.close()

    def _listen(self) -> None:
        try:
            self._receive_all()
        except (HandoverError, InternalError) as error:
            text = f"rank {self.rank}: what the worker sent cannot be used: {error}"
            self._news(WorkerEvent(self.rank, Failed(InternalError.__name__, text)))
            self._process.kill()
        finally:
            self._channel.close()
            self._news(WorkerEnded(self.rank, self._process.wait()))

    def _receive_all(self) -> None:
        while True:
            line = self._channel.receive(limit=MAX_LINE_BYTES, deadline=None)
            if line is None:
                return
            message = decode(line)
            descriptors: tuple[int, ...] = ()
            if isinstance(message, Filled):
                count = len(message.region_bytes)
                descriptors = tuple(self._channel.take_descriptors(count))
            self._news(WorkerEvent(self.rank, message, descriptors))


def _command(device: int, options: WorkerOptions, descriptor: int) -> Sequence[str]:
    return [
        sys.executable,
        "-P",  # nothing is imported from the current directory
        "-m",
        "headrace_loader.worker_main",
        f"--socket={descriptor}",
        f"--rank={device}",
        f"--backend={options.backend}",
        f"--path={options.policy}",
        f"--read-threads={options.read_threads}",
        f"--cpus={options.cpus}",
    ]
