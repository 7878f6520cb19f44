"""The vocabulary of layout tables.

A table says for every tensor of the engine which source tensors it is fused from, in
which order, and how tensor parallel ranks divide each of them. `{layer}` in a name
stands for every layer. The planner is the only reader.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Size:
    """A dimension of the model: a field of config.json.

    `default` names other sizes that stand in when the field is absent or null: the
    first one, divided by the others.
    """

    field: str
    default: tuple[str, ...] = ()


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

    `shape` gives one entry per axis: names of sizes, multiplied where joined by `*`.
    Without `split` every rank has the whole tensor.
    """

    source: str
    shape: tuple[str, ...]
    split: Split | None = None


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the engine: pieces joined along the first axis.

    It exists where the boolean fields of config.json agree: `when` true, `unless` false
    (absent is false).
    """

    name: str
    pieces: tuple[Piece, ...]
    when: str | None = None
    unless: str | None = None


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor of the engine that no source holds: an F32 scalar of a fixed value."""

    name: str
    value: float


@dataclass(frozen=True, slots=True)
class Copy:
    """A source tensor that some writers store although the engine takes it from elsewhere.

    It is left out, and must be the same bytes as `original`.
    """

    name: str
    original: str
    when: str


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
