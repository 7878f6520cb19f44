"""The ways of bytes to the GPU, one lane per thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from headrace_loader.cuda.driver import Event, HostBuffer, Stream
from headrace_loader.cuda.runs import PIECE_BYTES, WORD, Run, padded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from headrace_loader.cuda.digester import Digester
    from headrace_loader.cuda.gds import DirectFile

_BUFFERS = 2
_MAX_PINNED_BYTES = 1024 * 1024 * 1024


class Lane(Protocol):
    """One thread's way to move bytes; what must follow them is queued on `stream`."""

    stream: Stream

    def move(self, run: Run, moved: Callable[[int], None]) -> None:
        """Bring a run to its place, padded with zeros to whole words; tell `moved` of bytes."""


class StagedLane:
    """Reads into pinned memory and copies from there.

    While the copy engine empties one buffer, the thread reads the next piece into the other.
    Buffers this small stay in the CPU's cache between read and copy, and that is why they beat
    larger ones. They also beat registering the mapped page cache with the driver, which makes
    all other copies wait while it registers and forgets pages.
    """

    def __init__(self, pinned: HostBuffer, offset: int) -> None:
        self.stream = Stream()
        self._buffers = [
            (pinned.address + begin, pinned.view[begin : begin + PIECE_BYTES], Event())
            for begin in range(offset, offset + _BUFFERS * PIECE_BYTES, PIECE_BYTES)
        ]

    def warm(self, pointer: int, digester: Digester) -> None:
        """Use the stream, with what comes to `pointer` later: the first time takes longer."""
        self.stream.copy_to_device(pointer, self._buffers[0][0], WORD)
        digester.warm(self.stream, pointer)
        self.stream.synchronize()

    def move(self, run: Run, moved: Callable[[int], None]) -> None:
        """Read piece by piece, and queue the copies."""
        for begin, end, pointer in run.pieces():
            address, view, copied = self._buffers[0]
            self._buffers.reverse()
            copied.wait()
            run.file.read_into(view, begin, end)
            size = end - begin
            if size % WORD:
                view[size : padded(size)] = bytes(padded(size) - size)
            self.stream.copy_to_device(pointer, address, padded(size))
            copied.record(self.stream)
            moved(size)


class DirectLane:
    """Lets cuFile move the data."""

    def __init__(self, files: Mapping[Path, DirectFile]) -> None:
        self.stream = Stream()
        self._files = files

    def move(self, run: Run, moved: Callable[[int], None]) -> None:
        """Clear the last word if a piece does not fill it, and read."""
        source = run.file.source
        for begin, end, pointer in run.pieces():
            size = end - begin
            if size % WORD:
                self.stream.clear(pointer + padded(size) - WORD, WORD)
                self.stream.synchronize()
            self._files[source.path].read(pointer, source.offset + begin, size)
            moved(size)


def staged_lanes(pinned: HostBuffer) -> list[StagedLane]:
    """Return as many lanes as `pinned` has room for."""
    return [StagedLane(pinned, offset) for offset in range(0, pinned.size, _BUFFERS * PIECE_BYTES)]


def pinned_bytes(threads: int) -> int:
    """Bytes of pinned buffers for `threads` staged lanes, fewer where they would be too many."""
    per_lane = _BUFFERS * PIECE_BYTES
    return min(threads, _MAX_PINNED_BYTES // per_lane) * per_lane
