"""The vocabulary of layout tables.

A table says for every tensor of the engine which source tensors it is fused from, in
which order, and how tensor parallel ranks divide each of them. `{layer}` in a name
stands for every layer. The planner is the only reader.
"""

from dataclasses import dataclass
from typing import Literal

Stage = Literal["first", "last", "first-not-last", "all"]
"""Pipeline stages that have a tensor outside of the layers."""


@dataclass(frozen=True, slots=True)
class Size:
    """A dimension of the model: a field of config.json.

    `alias` is another name of the field. `default` names other sizes that stand in when
    both are absent or null: the first one, divided by the others.
    """

    field: str
    default: tuple[str, ...] = ()
    alias: str | None = None


@dataclass(frozen=True, slots=True)
class Flag:
    """Holds where a boolean field of config.json is true; absent and null are `default`."""

    field: str
    default: bool = False


@dataclass(frozen=True, slots=True)
class Given:
    """Holds where a field of config.json is neither absent nor null."""

    field: str


@dataclass(frozen=True, slots=True)
class Equals:
    """Holds where a field of config.json has this value; `a.b` is field b of the object a."""

    field: str
    value: str


Condition = Flag | Given | Equals


@dataclass(frozen=True, slots=True)
class Split:
    """How ranks divide one axis of a source tensor.

    The axis is cut in whole units of size `unit` (a name of the table's sizes, such as
    attention heads). With `replicate`, ranks beyond the number of units share them.
    `pad` rounds the number of units up; what has no source is zero.
    """

    axis: int
    unit: str
    replicate: bool = False
    pad: int = 1


@dataclass(frozen=True, slots=True)
class Piece:
    """A source tensor's share in a fused tensor.

    `shape` gives one entry per axis: names of sizes, multiplied where joined by `*`, the
    products added where joined by `+`. Without `split` every rank has the whole tensor, or, with
    `on_first_rank`, rank 0 has it and the others zeros, as of what is added after their sum.
    With `stacked` the source holds all of a stack along one more axis, its first. With
    `transposed` the engine has the two axes the other way round.
    """

    source: str
    shape: tuple[str, ...]
    split: Split | None = None
    on_first_rank: bool = False
    stacked: bool = False
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the engine: pieces joined along the first axis.

    With `stack`, the name of a size, it has that many such joints one after the other along
    a new first axis, and `{index}` in a piece's source is the position, unless the piece is
    `stacked`; these are experts, which expert parallel ranks have whole. `dtype` is for tensors
    whose element type is not the model's. It exists where `when` holds and `unless` does not,
    and, with `sparse`, only in layers that have experts (true) or in those that have none
    (false). `linear` are weights that quantized formats store as other tensors: a table without
    any is of unquantized models only. `stage` is for tensors outside of the
    layers: without it, those before the layers are in the first, those after in the last.
    """

    name: str
    pieces: tuple[Piece, ...]
    when: Condition | None = None
    unless: Condition | None = None
    sparse: bool | None = None
    stack: str | None = None
    dtype: str | None = None
    linear: bool = False
    stage: Stage | None = None


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor of the engine that no source holds: elements of one value.

    `dtype` None is the model's. It exists where `when` holds.
    """

    name: str
    value: float
    dtype: str | None = "F32"
    shape: tuple[int, ...] = ()
    when: Condition | None = None


@dataclass(frozen=True, slots=True)
class Copy:
    """A source tensor that some writers store although the engine takes it from elsewhere.

    It is left out, and must be the same bytes as `original`.
    """

    name: str
    original: str
    when: Condition


@dataclass(frozen=True, slots=True)
class SparseLayers:
    """Which layers have experts, by the names of fields of config.json.

    Layer i has them if i >= `first`, i + `offset` is a multiple of `step`, and i is not in
    the list `dense`; an absent field takes nothing away.
    """

    first: str | None = None
    step: str | None = None
    offset: int = 0
    dense: str | None = None


@dataclass(frozen=True, slots=True)
class DroppedLayers:
    """Layers after the last that the engine leaves out, such as multi-token prediction.

    Their tensors' names start with `prefix`; `count` is the field of config.json with
    their number, absent for none.
    """

    prefix: str
    count: str


@dataclass(frozen=True, slots=True)
class Architecture:
    """The table of one architecture, in the order the checkpoint is written.

    `ignored` are suffixes of source tensors that the engine recomputes.
    `layers` names the size that counts layers.
    """

    name: str
    sizes: dict[str, Size]
    before_layers: tuple[Tensor | Constant, ...]
    per_layer: tuple[Tensor | Constant, ...]
    after_layers: tuple[Tensor | Constant, ...]
    copies: tuple[Copy, ...] = ()
    ignored: tuple[str, ...] = ()
    layers: str = "layers"
    sparse_layers: SparseLayers | None = None
    dropped_layers: DroppedLayers | None = None
