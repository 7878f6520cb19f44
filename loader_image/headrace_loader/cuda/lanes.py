"""The ways of bytes to the GPU, one lane per thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from headrace_loader.cuda.driver import Event, PinnedBuffer, Stream
from headrace_loader.cuda.runs import PIECE_BYTES, WORD, padded

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from headrace_loader.backends.reading import PartFile
    from headrace_loader.cuda.gds import DirectFile

_BUFFERS = 2
_MAX_PINNED_BYTES = 1024 * 1024 * 1024


class Lane(Protocol):
    """One thread's way to move bytes; what must follow them is queued on `stream`."""

    stream: Stream

    def move(self, file: PartFile, begin: int, end: int, pointer: int) -> None:
        """Bring a piece, bytes `begin` to `end` of the part, to `pointer`.

        It is padded with zeros to whole words, at most PIECE_BYTES.
        """


class StagedLane:
    """Reads into pinned memory and copies from there.

    While the copy engine empties one buffer, the thread reads the next piece into the other.
    Buffers this small stay in the CPU's cache between read and copy, and that is why they beat
    larger ones, and also beat registering the page cache with the driver.
    """

    def __init__(self, pinned: PinnedBuffer, offset: int) -> None:
        self.stream = Stream()
        self._buffers = [
            (pinned.address + begin, pinned.view[begin : begin + PIECE_BYTES], Event())
            for begin in range(offset, offset + _BUFFERS * PIECE_BYTES, PIECE_BYTES)
        ]

    def move(self, file: PartFile, begin: int, end: int, pointer: int) -> None:
        """Read the piece, and queue its copy."""
        address, view, copied = self._buffers[0]
        self._buffers.reverse()
        copied.wait()
        file.read_into(view, begin, end)
        size = end - begin
        if size % WORD:
            view[size : padded(size)] = bytes(padded(size) - size)
        self.stream.copy_to_device(pointer, address, padded(size))
        copied.record(self.stream)


class DirectLane:
    """Lets cuFile move the data."""

    def __init__(self, files: Mapping[Path, DirectFile]) -> None:
        self.stream = Stream()
        self._files = files

    def move(self, file: PartFile, begin: int, end: int, pointer: int) -> None:
        """Clear the last word if the piece does not fill it, and read."""
        size = end - begin
        if size % WORD:
            self.stream.clear(pointer + padded(size) - WORD, WORD)
            self.stream.synchronize()
        source = file.source
        self._files[source.path].read(pointer, source.offset + begin, size)


def staged_lanes(threads: int) -> list[StagedLane]:
    """Return lanes for `threads` threads, fewer where they would pin more than 1 GiB."""
    pinned = PinnedBuffer(pinned_bytes(threads))
    return [StagedLane(pinned, offset) for offset in range(0, pinned.size, _BUFFERS * PIECE_BYTES)]


def pinned_bytes(threads: int) -> int:
    """Bytes of host memory that `staged_lanes` pins."""
    per_lane = _BUFFERS * PIECE_BYTES
    return min(threads, _MAX_PINNED_BYTES // per_lane) * per_lane
