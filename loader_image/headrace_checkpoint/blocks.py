"""Blocks of a part: which source rows come next, read once and made into each rank's elements."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import replace
from itertools import cycle, groupby, zip_longest
from typing import NamedTuple

import numpy as np

from headrace_checkpoint.convert import (
    STORAGE,
    Array,
    convert,
    finite,
    fp8_elements,
    fp8_scales,
    transpose,
)
from headrace_checkpoint.errors import SourceCorrupt
from headrace_checkpoint.plan import Beside, Fill, PartPlan, Segment, Slice
from headrace_checkpoint.source import Source
from headrace_checkpoint.storage import AlignedBuffer

BLOCK_BYTES = 8 * 1024 * 1024
"""Source bytes read at a time; with the writers' chunks this bounds memory."""

_BLOCKS_AHEAD = 4


class _Piece(NamedTuple):
    """The next elements of a rank's tensor, few enough to be read and converted at once."""

    rank: int
    dtype: str
    segment: Segment

    @property
    def rows(self) -> tuple[tuple[str, tuple[int, int], int], ...]:
        """Which rows of which source tensors it needs, and how many axes make the rows."""
        return tuple((one.source, one.rows, one.row_axes) for one in _slices(self.segment))


def _slices(segment: Segment) -> tuple[Slice, ...]:
    if isinstance(segment, Beside):
        return segment.slices
    return () if isinstance(segment, Fill) else (segment,)


Blocks = list[tuple[int, Array]]
"""Elements to append, by rank; they may lie in a buffer that is used again."""


def read_ahead(source: Source, part_plan: PartPlan, executor: Executor) -> Iterator[Blocks]:
    """Yield what to append, in order, while `executor` makes the _BLOCKS_AHEAD next ones."""
    buffers = cycle([AlignedBuffer() for _ in range(_BLOCKS_AHEAD + 1)])
    ahead: deque[Future[Blocks]] = deque()
    for _, pieces in groupby(_pieces(source, part_plan), lambda piece: piece.rows):
        ahead.append(executor.submit(_read, source, list(pieces), next(buffers)))
        if len(ahead) > _BLOCKS_AHEAD:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def _read(source: Source, pieces: list[_Piece], buffer: AlignedBuffer) -> Blocks:
    """Read the rows that the pieces have in common, once, and cut and convert them."""
    found: dict[str, Array] = {}
    for name, rows, row_axes in pieces[0].rows:
        found[name] = source.read(name, rows, AlignedBuffer() if found else buffer, row_axes)
    blocks = []
    for rank, dtype, segment in pieces:
        if isinstance(segment, Fill):
            fill = np.full(segment.elements, segment.value, STORAGE["F32"])
            blocks.append((rank, convert(fill, "F32", dtype)))
            continue
        arrays = [_made(source, one, found[one.source], dtype) for one in _slices(segment)]
        blocks.append((rank, arrays[0] if len(arrays) == 1 else np.hstack(arrays)))
    return blocks


def _made(source: Source, wanted: Slice, rows: Array, dtype: str) -> Array:
    """Cut and convert rows of a source tensor; raises SourceCorrupt for scales that are none."""
    tensor = source.tensors[wanted.source]
    if wanted.use.startswith("fp8"):
        rows = convert(rows, tensor.dtype, wanted.dtype)
        scales = fp8_scales(rows, wanted.dtype)
        if not np.isfinite(scales).all():
            raise SourceCorrupt(
                f"{tensor.file}: tensor {wanted.source!r}: NaN or infinite in rows "
                f"{wanted.rows[0]} to {wanted.rows[1] - 1}: FP8 needs finite weights"
            )
        made = scales if wanted.use == "fp8-scale" else fp8_elements(rows, wanted.dtype)
        return made[:, slice(*wanted.columns)]
    block = rows[:, slice(*wanted.columns)]
    if wanted.use == "scale" and not finite(block, tensor.dtype):
        raise SourceCorrupt(
            f"{tensor.file}: tensor {wanted.source!r}: NaN or infinite in rows "
            f"{wanted.rows[0]} to {wanted.rows[1] - 1}: scales must be finite; copy it again"
        )
    converted = convert(block, tensor.dtype, dtype)
    return transpose(converted) if wanted.transposed else converted


def _pieces(source: Source, part_plan: PartPlan) -> Iterator[_Piece]:
    for tensor in part_plan.tensors:
        for row in zip_longest(*(_cut(source, segments) for segments in tensor.by_rank)):
            for rank, segment in enumerate(row):
                if segment is not None:
                    yield _Piece(rank, tensor.dtype, segment)


def _cut(source: Source, segments: Iterable[Segment]) -> Iterator[Segment]:
    """Cut a rank's segments into blocks."""
    for segment in segments:
        if isinstance(segment, Fill):
            for begin in range(0, segment.elements, BLOCK_BYTES):
                yield Fill(min(BLOCK_BYTES, segment.elements - begin), segment.value)
        elif isinstance(segment, Slice) and segment.transposed:
            yield segment  # the first element of its last row comes before the second of its first
        elif isinstance(segment, Slice):
            width = source.row_bytes(segment.source, segment.row_axes)
            for rows in row_blocks(segment.rows, width):
                yield replace(segment, rows=rows)
        else:
            width = sum(source.row_bytes(one.source) for one in segment.slices)
            for rows in row_blocks(segment.slices[0].rows, width):
                yield Beside(tuple(replace(one, rows=rows) for one in segment.slices))


def row_blocks(rows: tuple[int, int], row_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows that are no more than a block, or one row."""
    step = max(1, BLOCK_BYTES // row_bytes)
    for begin in range(*rows, step):
        yield begin, min(begin + step, rows[1])
