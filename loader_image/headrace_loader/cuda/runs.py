"""How a load is cut: runs of chunks, each digested by one launch.

Long runs save launches and handing out. Where one thread moves a whole run, short ones let all
threads end together. So they get shorter towards the end (guided self-scheduling, Polychronopoulos
and Kuck 1987).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from headrace_loader.backends.reading import PartFile
    from headrace_loader.cuda.digester import Digester
    from headrace_loader.cuda.driver import Stream

PIECE_BYTES = 4 * 1024 * 1024
"""Bytes read at once."""
WORD = 8
"""Digests are sums over words of this many bytes, the last one filled with zeros."""
RUN_BYTES = 64 * 1024 * 1024
"""Longest run, unless a chunk is longer."""


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


def cut(files: Sequence[PartFile], pointers: Sequence[int], threads: int) -> Iterator[Run]:
    """Yield the runs of parts bound for `pointers`, to be moved by `threads` threads."""
    left = sum(file.source.nbytes for file in files)
    index = 0
    for file, pointer in zip(files, pointers, strict=True):
        source = file.source
        begin = 0
        while begin < source.nbytes:
            share = min(RUN_BYTES, left // (2 * threads))
            nbytes = max(1, share // source.chunk_bytes) * source.chunk_bytes
            end = min(begin + nbytes, source.nbytes)
            yield Run(file, begin, end, index + begin // source.chunk_bytes, pointer + begin)
            left -= end - begin
            begin = end
        index += len(source.digests)


def padded(size: int) -> int:
    """Bytes of the words that hold `size` bytes."""
    return -(-size // WORD) * WORD
