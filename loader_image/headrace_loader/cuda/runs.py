"""How a load is cut: runs of chunks, moved by one thread and digested by one launch.

Long runs save launches and handing out; short ones let all threads end together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from headrace_loader.backends.reading import PartFile
    from headrace_loader.cuda.digester import Digester
    from headrace_loader.cuda.driver import Stream

PIECE_BYTES = 4 * 1024 * 1024
"""Bytes read at once."""
WORD = 8
"""Digests are sums over words of this many bytes, the last one filled with zeros."""

_RUN_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Consecutive chunks of a part, bytes `begin` to `end`, bound for the address `pointer`.

    `index` is the number of the first of them among the chunks of all parts.
    """

    file: PartFile
    begin: int
    end: int
    index: int
    pointer: int

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """Yield begin, end and address of pieces of PIECE_BYTES, the last one possibly short."""
        for begin in range(self.begin, self.end, PIECE_BYTES):
            yield begin, min(begin + PIECE_BYTES, self.end), self.pointer + begin - self.begin

    def digest(self, digester: Digester, stream: Stream) -> None:
        """Queue the digests of the chunks."""
        chunk_bytes = self.file.source.chunk_bytes
        digester.queue(stream, self.index, self.pointer, self.end - self.begin, chunk_bytes)


def cut(file: PartFile, index: int, pointer: int) -> Iterator[Run]:
    """Yield the runs of a part whose first chunk is number `index`, bound for `pointer`."""
    source = file.source
    chunks = max(1, _RUN_BYTES // source.chunk_bytes)
    for first in range(0, len(source.digests), chunks):
        begin, _ = source.chunk_range(first)
        end = min(begin + chunks * source.chunk_bytes, source.nbytes)
        yield Run(file, begin, end, index + first, pointer + begin)


def padded(size: int) -> int:
    """Bytes of the words that hold `size` bytes."""
    return -(-size // WORD) * WORD
