"""How ranks cut a source tensor, and how cuts become one tensor of the engine."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from headrace_checkpoint.plan import Beside, Fill, Segment, Slice
from headrace_checkpoint.quantization import Stored


@dataclass(frozen=True, slots=True)
class Cut:
    """A source tensor of `shape` of which ranks have `share` each, from `first[rank]` of `axis`.

    With `index` the source tensor is a stack of such tensors, and this is the one at `index`.
    """

    template: Slice
    shape: tuple[int, ...]
    share: tuple[int, ...]
    axis: int | None = None
    first: tuple[int, ...] = ()
    index: int | None = None

    @property
    def target_share(self) -> tuple[int, ...]:
        """The shape of a rank's share in the engine's tensor."""
        return self.share[::-1] if self.template.transposed else self.share

    def segments(self, rank: int) -> list[Segment]:
        """Return a rank's share: of its source and, beyond that, zeros."""
        rows, columns = (0, self.shape[0]), (0, math.prod(self.shape[1:]))
        if self.axis is not None:
            begin, end = (
                min(self.first[rank] + count, self.shape[self.axis])
                for count in (0, self.share[self.axis])
            )
            rows, columns = ((begin, end), columns) if self.axis == 0 else (rows, (begin, end))
        found = self._slice(rows, columns)
        segments: list[Segment] = [found] if found.elements else []
        missing = math.prod(self.share) - found.elements
        return [*segments, Fill(missing, 0.0)] if missing else segments

    def _slice(self, rows: tuple[int, int], columns: tuple[int, int]) -> Slice:
        if self.index is None:
            return replace(self.template, rows=rows, columns=columns)
        if len(self.shape) == 1:
            return replace(self.template, rows=(self.index, self.index + 1), columns=rows)
        begin, end = (self.index * self.shape[0] + row for row in rows)
        return replace(self.template, rows=(begin, end), columns=columns, row_axes=2)


def joined(pieces: Sequence[list[Segment]], stored: Stored) -> list[Segment]:
    """Join pieces along the rows of the weight; transposed, these are columns."""
    if stored.transposed and len(pieces) > 1:
        slices = [one for segments in pieces for one in segments if isinstance(one, Slice)]
        return [Beside(tuple(slices))]
    return [segment for segments in pieces for segment in segments]


def joined_shape(shapes: Sequence[tuple[int, ...]], stored: Stored) -> tuple[int, ...]:
    """Return the shape of what is joined of pieces of these shapes."""
    if stored.per == (0, 0):
        return (len(shapes),)
    if stored.transposed:
        return shapes[0][0], sum(shape[1] for shape in shapes)
    return sum(shape[0] for shape in shapes), *shapes[0][1:]


def merged(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Join slices of a stack that go on where the one before ends, and fills of one value."""
    last: Segment | None = None
    for segment in segments:
        both = _joined_to(last, segment)
        if last is not None and both is None:
            yield last
        last = both or segment
    if last is not None:
        yield last


def _joined_to(last: Segment | None, segment: Segment) -> Segment | None:
    match last, segment:
        case Fill(), Fill() if last.value == segment.value:
            return Fill(last.elements + segment.elements, last.value)
        case Slice(transposed=False), Slice() if last.rows[1] == segment.rows[0]:
            both = replace(last, rows=(last.rows[0], segment.rows[1]))
            return both if replace(segment, rows=both.rows) == both else None
    return None
