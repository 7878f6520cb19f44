"""What a checkpoint is to be made of: slices of the source, tensors of ranks, parts of files."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from headrace_checkpoint.dtypes import ITEM_BYTES, tensor_bytes
from headrace_checkpoint.manifest import TENSOR_ALIGNMENT, TensorEntry, rank_file
from headrace_checkpoint.quantization import Use

DEFAULT_PART_BYTES = 4 * 1024**3


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of the source model; `offset` counts bytes from the start of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows and columns, as half-open ranges, of a source tensor seen as a matrix.

    The first `row_axes` axes together are the rows, the others the columns; a vector has one
    column. `transposed`, the elements are in the order of the columns. With
    `use` "scale" the elements must be finite. With "fp8" and "fp8-scale" they are of the matrix
    that is made of the rows converted to `dtype` (safetensors name): the quantized elements, or
    one column of scales.
    """

    source: str
    rows: tuple[int, int]
    columns: tuple[int, int]
    use: Use = ""
    dtype: str = ""
    row_axes: int = 1
    transposed: bool = False

    @property
    def elements(self) -> int:
        """Number of elements."""
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])


@dataclass(frozen=True, slots=True)
class Fill:
    """Elements of one value that come from no source."""

    elements: int
    value: float


@dataclass(frozen=True, slots=True)
class Beside:
    """Slices of equally many rows side by side: a row of one is followed by that of the next."""

    slices: tuple[Slice, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return sum(one.elements for one in self.slices)


Segment = Slice | Fill | Beside


@dataclass(frozen=True, slots=True)
class TargetTensor:
    """A tensor as each rank stores it; `by_rank[r]` are its segments in memory order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    by_rank: tuple[tuple[Segment, ...], ...]

    @property
    def nbytes(self) -> int:
        """Bytes per rank."""
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class PartPlan:
    """One file of every rank of a stage: its tensors as they are written, with their offsets.

    `number` counts the parts of the `stage`, which is one of `stages`.
    """

    tensors: tuple[TargetTensor, ...]
    entries: tuple[TensorEntry, ...]
    number: int
    stage: int
    stages: int

    @property
    def ranks(self) -> range:
        """The ranks that have this part, all tensor parallel ranks of the stage."""
        count = len(self.tensors[0].by_rank)
        return range(self.stage * count, (self.stage + 1) * count)

    def file(self, rank: int) -> str:
        """Return the name of the file of one of the ranks."""
        return rank_file(rank, self.number, len(self.tensors[0].by_rank), self.stages)

    @property
    def data_bytes(self) -> int:
        """Bytes of the data section."""
        return self.entries[-1].offset + self.entries[-1].nbytes


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole checkpoint; `equal` are pairs of source tensors that must hold the same bytes.

    `quantized` and `unquantized` are the source's linear layers, where it has a format.
    """

    architecture: str
    tensor_parallel_size: int
    parts: tuple[PartPlan, ...]
    equal: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]
    quantized: tuple[str, ...] = ()
    unquantized: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Bytes of weights over all ranks."""
        return self.tensor_parallel_size * sum(part.data_bytes for part in self.parts)


def in_parts(whole: Plan, part_bytes: int) -> Plan:
    """Return the plan with parts of another size."""
    stages: list[list[TargetTensor]] = [[] for _ in range(whole.parts[0].stages)]
    for part in whole.parts:
        stages[part.stage] += part.tensors
    return replace(whole, parts=tuple(parts_of(stages, part_bytes)))


def most_parts(whole: Plan) -> int:
    """Return the number of parts of the ranks that have most."""
    return max(Counter(part.stage for part in whole.parts).values())


def parts_of(stages: Sequence[Sequence[TargetTensor]], part_bytes: int) -> Iterator[PartPlan]:
    """Yield the parts of each stage's tensors; a tensor larger than `part_bytes` gets its own."""
    for stage, targets in enumerate(stages):
        for number, group in enumerate(_groups(targets, part_bytes)):
            yield _part(group, number, stage, len(stages))


def _groups(targets: Sequence[TargetTensor], part_bytes: int) -> Iterator[list[TargetTensor]]:
    group: list[TargetTensor] = []
    size = 0
    for target in targets:
        if group and size + target.nbytes > part_bytes:
            yield group
            group, size = [], 0
        group.append(target)
        size += target.nbytes
    yield group


def _part(targets: Sequence[TargetTensor], number: int, stage: int, stages: int) -> PartPlan:
    """Order tensors so that all but small leftovers are aligned, and lay them back to back."""
    ordered = sorted(targets, key=_alignment_order)
    entries = []
    offset = 0
    for target in ordered:
        entries.append(TensorEntry(target.name, target.dtype, target.shape, offset, target.nbytes))
        offset += target.nbytes
    return PartPlan(tuple(ordered), tuple(entries), number, stage, stages)


def _alignment_order(target: TargetTensor) -> tuple[bool, int]:
    """Multiples of the alignment first; then wide elements before narrow ones keep each aligned."""
    if target.nbytes % TENSOR_ALIGNMENT == 0:
        return (False, 0)
    return (True, -ITEM_BYTES[target.dtype])
