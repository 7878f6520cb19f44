"""Decides which source bytes every rank's tensors are made of. Pure: no input or output.

The one reader of layout tables. A plan is checked completely before anything is
written: sizes against the parallelism, every source tensor against the sizes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import overload

from headrace_checkpoint.config import DTYPES, ModelConfig
from headrace_checkpoint.dtypes import ITEM_BYTES, tensor_bytes
from headrace_checkpoint.errors import (
    ArchitectureUnsupported,
    ParallelismInvalid,
    SourceCorrupt,
    TensorMissing,
)
from headrace_checkpoint.layouts.rules import Architecture, Constant, Piece, Split, Tensor
from headrace_checkpoint.manifest import TENSOR_ALIGNMENT, TensorEntry

DEFAULT_PART_BYTES = 4 * 1024**3
_SUGGESTED_RANKS = 64
_SOURCE_DTYPES = tuple(DTYPES.values())


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

    The first axis is the rows, the others together the columns; a vector has one column.
    """

    source: str
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])


@dataclass(frozen=True, slots=True)
class Fill:
    """Elements of one value that come from no source."""

    elements: int
    value: float


Segment = Slice | Fill


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
    """One file of every rank: its tensors in the order and at the offsets they are written."""

    tensors: tuple[TargetTensor, ...]
    entries: tuple[TensorEntry, ...]

    @property
    def data_bytes(self) -> int:
        """Bytes of the data section."""
        return self.entries[-1].offset + self.entries[-1].nbytes


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole checkpoint; `equal` are pairs of source tensors that must hold the same bytes."""

    architecture: str
    tensor_parallel_size: int
    parts: tuple[PartPlan, ...]
    equal: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of weights over all ranks."""
        return self.tensor_parallel_size * sum(part.data_bytes for part in self.parts)


def plan(
    architecture: Architecture,
    config: ModelConfig,
    sources: Mapping[str, SourceTensor],
    *,
    tensor_parallel_size: int,
    dtype: str,
    part_bytes: int = DEFAULT_PART_BYTES,
) -> Plan:
    """Plan a checkpoint with elements of `dtype` (safetensors name) in parts of `part_bytes`.

    A tensor larger than `part_bytes` gets a part of its own. Raises ConfigInvalid,
    ParallelismInvalid, TensorMissing, SourceCorrupt for a wrong shape, and
    ArchitectureUnsupported for a source tensor that the table has no place for.
    """
    planner = _Planner(architecture, config, sources, tensor_parallel_size, dtype)
    planner.check_parallelism()
    targets = [planner.target(rule) for rule in planner.rules()]
    equal, ignored = planner.leftovers()
    return Plan(
        architecture=architecture.name,
        tensor_parallel_size=tensor_parallel_size,
        parts=tuple(_part(group) for group in _groups(targets, part_bytes)),
        equal=equal,
        ignored=ignored,
    )


def in_parts(whole: Plan, part_bytes: int) -> Plan:
    """Return the plan with parts of another size."""
    targets = [target for part in whole.parts for target in part.tensors]
    return replace(whole, parts=tuple(_part(group) for group in _groups(targets, part_bytes)))


def resolve_dtype(requested: str, config: ModelConfig, sources: Mapping[str, SourceTensor]) -> str:
    """Turn `auto`, `bfloat16`, ... into a safetensors name, as vLLM resolves `--dtype`.

    `auto` is what config.json declares, else what the tensors have; models in float32
    are stored in bfloat16. Raises SourceCorrupt where tensors of several types leave
    `auto` undecided.
    """
    if requested != "auto":
        return DTYPES[requested]
    declared = config.dtype()
    if declared is None:
        found = sorted({tensor.dtype for tensor in sources.values()} & set(_SOURCE_DTYPES))
        if len(found) != 1:
            raise SourceCorrupt(
                f"config.json declares no dtype and the tensors have {', '.join(found) or 'none'} "
                f"of {', '.join(_SOURCE_DTYPES)}: state the dtype"
            )
        declared = found[0]
    return "BF16" if declared == "F32" else declared


class _Planner:
    def __init__(
        self,
        architecture: Architecture,
        config: ModelConfig,
        sources: Mapping[str, SourceTensor],
        tensor_parallel_size: int,
        dtype: str,
    ) -> None:
        self.architecture = architecture
        self.config = config
        self.sources = sources
        self.ranks = tensor_parallel_size
        self.dtype = dtype
        self.sizes = config.sizes(architecture)
        layers = self.sizes[architecture.layers]
        self.sparse = config.sparse_layers(architecture.sparse_layers, layers)
        self.used: set[str] = set()

    def rules(self) -> Iterator[Tensor | Constant]:
        """Yield the rules that apply, with layer numbers filled in."""
        yield from self._applying(self.architecture.before_layers)
        for layer in range(self.sizes[self.architecture.layers]):
            for rule in self._applying(self.architecture.per_layer, layer in self.sparse):
                yield _numbered(rule, "{layer}", layer)
        yield from self._applying(self.architecture.after_layers)

    def _applying(
        self, rules: Sequence[Tensor | Constant], sparse: bool | None = None
    ) -> Iterator[Tensor | Constant]:
        """Yield the rules whose conditions hold, for a kind of layer where `sparse` is given."""
        for rule in rules:
            if isinstance(rule, Tensor):
                if rule.when and not self.config.holds(rule.when):
                    continue
                if rule.unless and self.config.holds(rule.unless):
                    continue
                if None not in (sparse, rule.sparse) and sparse != rule.sparse:
                    continue
            yield rule

    def target(self, rule: Tensor | Constant) -> TargetTensor:
        if isinstance(rule, Constant):
            return TargetTensor(rule.name, "F32", (), ((Fill(1, rule.value),),) * self.ranks)
        copies = self.sizes[rule.stack] if rule.stack else 1
        by_rank: list[list[Segment]] = [[] for _ in range(self.ranks)]
        for index in range(copies):
            pieces = _numbered(rule, "{index}", index).pieces if rule.stack else rule.pieces
            shapes = []
            for piece in pieces:
                shape = self._source_shape(piece)
                shapes.append(self._rank_shape(shape, piece.split))
                for rank in range(self.ranks):
                    by_rank[rank] += self._segments(piece, shape, rank)
        joined = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        stacked = (copies, *joined) if rule.stack else joined
        dtype = rule.dtype or self.dtype
        return TargetTensor(rule.name, dtype, stacked, tuple(map(tuple, by_rank)))

    def leftovers(self) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
        """Account for every source tensor that no rule used."""
        equal, ignored = [], []
        copies = {c.name: c.original for c in self.architecture.copies if self.config.holds(c.when)}
        dropped = self._dropped_layers()
        for name in sorted(self.sources.keys() - self.used):
            if name in copies:
                equal.append((name, copies[name]))
            elif name.endswith(self.architecture.ignored) or name.startswith(dropped):
                ignored.append(name)
            else:
                raise ArchitectureUnsupported(
                    f"{self.sources[name].file}: tensor {name!r}: {self.architecture.name} with "
                    "this config.json has no place for it; correct config.json or remove the tensor"
                )
        return tuple(equal), tuple(ignored)

    def _dropped_layers(self) -> tuple[str, ...]:
        """Prefixes of the tensors in layers that the engine does not load."""
        rule = self.architecture.dropped_layers
        if rule is None:
            return ()
        first = self.sizes[self.architecture.layers]
        layers = range(first, first + self.config.count(rule.count))
        return tuple(rule.prefix.replace("{layer}", str(layer)) for layer in layers)

    def _source_shape(self, piece: Piece) -> tuple[int, ...]:
        """Shape that config.json demands of a source tensor, checked against the file."""
        shape = tuple(map(self._extent, piece.shape))
        found = self.sources.get(piece.source)
        if found is None:
            raise TensorMissing(
                f"tensor {piece.source!r}: in none of the source's files, "
                f"{self.architecture.name} needs it; complete the source"
            )
        if found.shape != shape:
            raise SourceCorrupt(
                f"{found.file}: tensor {piece.source!r}: shape {list(found.shape)}: config.json "
                f"demands {list(shape)} ({', '.join(self._described(a) for a in piece.shape)})"
            )
        if found.dtype not in _SOURCE_DTYPES:
            raise ArchitectureUnsupported(
                f"{found.file}: tensor {piece.source!r}: dtype {found.dtype}: "
                f"supported are {', '.join(_SOURCE_DTYPES)}"
            )
        self.used.add(piece.source)
        return shape

    def _extent(self, axis: str) -> int:
        products = (product.split("*") for product in axis.split("+"))
        return sum(math.prod(self.sizes[name] for name in names) for names in products)

    def _described(self, axis: str) -> str:
        products = (product.split("*") for product in axis.split("+"))
        fields = self.architecture.sizes
        return " + ".join(" * ".join(fields[name].field for name in names) for names in products)

    def _rank_shape(self, shape: tuple[int, ...], split: Split | None) -> tuple[int, ...]:
        if split is None:
            return shape
        begin, end = self._units(split, 0)
        width = shape[split.axis] // self.sizes[split.unit]
        return (*shape[: split.axis], (end - begin) * width, *shape[split.axis + 1 :])

    def _segments(self, piece: Piece, shape: tuple[int, ...], rank: int) -> list[Segment]:
        rows, columns = (0, shape[0]), (0, math.prod(shape[1:]))
        if piece.split is None:
            return [Slice(piece.source, rows, columns)]
        units = self.sizes[piece.split.unit]
        width = shape[piece.split.axis] // units
        begin, end = (min(unit, units) for unit in self._units(piece.split, rank))
        if piece.split.axis == 1:
            return [Slice(piece.source, rows, (begin * width, end * width))]
        segments: list[Segment] = []
        if end > begin:
            segments.append(Slice(piece.source, (begin * width, end * width), columns))
        wanted = math.prod(self._rank_shape(shape, piece.split))
        missing = wanted - (end - begin) * width * columns[1]
        if missing:
            segments.append(Fill(missing, 0.0))
        return segments

    def check_parallelism(self) -> None:
        """Raise ParallelismInvalid naming every size in the way, and the sizes that do divide."""
        wrong = [split for split in self._splits() if not self._divides(split, self.ranks)]
        if not wrong:
            return
        possible = [
            str(ranks)
            for ranks in range(1, _SUGGESTED_RANKS + 1)
            if all(self._divides(split, ranks) for split in self._splits())
        ]
        raise ParallelismInvalid(
            f"tensor parallel size {self.ranks}: does not divide "
            f"{', '.join(map(self._obstacle, wrong))}; choose one of {', '.join(possible)}"
        )

    def _splits(self) -> list[Split]:
        architecture = self.architecture
        kinds = {layer in self.sparse for layer in range(self.sizes[architecture.layers])}
        rules = [rule for k in kinds for rule in self._applying(architecture.per_layer, k)]
        rules += self._applying((*architecture.before_layers, *architecture.after_layers))
        pieces = (piece for rule in rules for piece in getattr(rule, "pieces", ()))
        by_unit = {piece.split.unit: piece.split for piece in pieces if piece.split}
        return list(by_unit.values())

    def _divides(self, split: Split, ranks: int) -> bool:
        units = self._padded_units(split)
        return units % ranks == 0 or (split.replicate and ranks % units == 0)

    def _obstacle(self, split: Split) -> str:
        size, units = self.sizes[split.unit], self._padded_units(split)
        padded = f" (padded to {units})" if units != size else ""
        either = " (nor is a multiple of it)" if split.replicate else ""
        return f"{self.architecture.sizes[split.unit].field} {size}{padded}{either}"

    def _padded_units(self, split: Split) -> int:
        return -(-self.sizes[split.unit] // split.pad) * split.pad

    def _units(self, split: Split, rank: int) -> tuple[int, int]:
        """Half-open range of units of one rank, counting padding."""
        units = self._padded_units(split)
        if units % self.ranks == 0:
            share = units // self.ranks
            return rank * share, (rank + 1) * share
        first = rank // (self.ranks // units)
        return first, first + 1


@overload
def _numbered(rule: Tensor, placeholder: str, number: int) -> Tensor: ...
@overload
def _numbered(rule: Constant, placeholder: str, number: int) -> Constant: ...
def _numbered(rule: Tensor | Constant, placeholder: str, number: int) -> Tensor | Constant:
    name = rule.name.replace(placeholder, str(number))
    if isinstance(rule, Constant):
        return replace(rule, name=name)
    pieces = tuple(
        replace(piece, source=piece.source.replace(placeholder, str(number)))
        for piece in rule.pieces
    )
    return replace(rule, name=name, pieces=pieces)


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


def _part(targets: Sequence[TargetTensor]) -> PartPlan:
    """Order tensors so that all but small leftovers are aligned, and lay them back to back."""
    ordered = sorted(targets, key=_alignment_order)
    entries = []
    offset = 0
    for target in ordered:
        entries.append(TensorEntry(target.name, target.dtype, target.shape, offset, target.nbytes))
        offset += target.nbytes
    return PartPlan(tuple(ordered), tuple(entries))


def _alignment_order(target: TargetTensor) -> tuple[bool, int]:
    """Multiples of the alignment first; then wide elements before narrow ones keep each aligned."""
    if target.nbytes % TENSOR_ALIGNMENT == 0:
        return (False, 0)
    return (True, -ITEM_BYTES[target.dtype])
