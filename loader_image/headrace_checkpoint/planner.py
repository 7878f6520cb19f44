"""Decides which source bytes every rank's tensors are made of. Pure: no input or output.

The one reader of layout tables. A plan is checked completely before anything is
written: sizes against the parallelism, every source tensor against the sizes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import overload

from headrace_checkpoint.config import DTYPES, ModelConfig
from headrace_checkpoint.cuts import Cut, joined, joined_shape, merged
from headrace_checkpoint.errors import (
    ArchitectureUnsupported,
    ConfigInvalid,
    ParallelismInvalid,
    SourceCorrupt,
    TensorMissing,
)
from headrace_checkpoint.layouts.rules import (
    Architecture,
    Constant,
    Piece,
    Split,
    Stage,
    Tensor,
)
from headrace_checkpoint.plan import (
    DEFAULT_PART_BYTES,
    Fill,
    Plan,
    Segment,
    Slice,
    SourceTensor,
    TargetTensor,
    parts_of,
)
from headrace_checkpoint.quantization import (
    ONLINE_FP8,
    PLAIN,
    Format,
    Stored,
    parse_format,
    refuse_format,
)

_SUGGESTED_RANKS = 64
_MAX_LAYERS = 10_000
_SOURCE_DTYPES = tuple(DTYPES.values())


def plan(
    architecture: Architecture,
    config: ModelConfig,
    sources: Mapping[str, SourceTensor],
    *,
    tensor_parallel_size: int,
    dtype: str,
    part_bytes: int = DEFAULT_PART_BYTES,
    pipeline_parallel_size: int = 1,
    expert_parallel_size: int = 1,
    quantize: bool = False,
) -> Plan:
    """Plan a checkpoint with elements of `dtype` (safetensors name) in parts of `part_bytes`.

    A tensor larger than `part_bytes` gets a part of its own. `expert_parallel_size` is 1 or the
    tensor parallel size: then ranks have whole experts, as with vLLM's
    --enable-expert-parallel. With `quantize` an unquantized source becomes FP8, and `config` is
    what the checkpoint's config.json says. Raises ConfigInvalid, ParallelismInvalid,
    TensorMissing, SourceCorrupt for a wrong shape, and ArchitectureUnsupported for a source
    tensor that the table has no place for.
    """
    planner = _Planner(architecture, config, sources, tensor_parallel_size, dtype)
    planner.format = planner.find_format(quantize=quantize)
    planner.stages = pipeline_parallel_size
    planner.expert_ranks = expert_parallel_size
    planner.check_parallelism()
    targets = [planner.targets(stage) for stage in range(pipeline_parallel_size)]
    equal, ignored = planner.leftovers()
    return Plan(
        architecture=architecture.name,
        tensor_parallel_size=tensor_parallel_size,
        parts=tuple(parts_of(targets, part_bytes)),
        equal=equal,
        ignored=ignored,
        quantized=tuple(planner.quantized),
        unquantized=tuple(planner.unquantized),
    )


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
        self.format: Format | None = None
        self.stages = 1
        self.expert_ranks = 1
        self.sizes = config.sizes(architecture)
        self.layers = self.sizes[architecture.layers]
        self._check_count(architecture.sizes[architecture.layers].field, self.layers)
        self.sparse = config.sparse_layers(architecture.sparse_layers, self.layers)
        self.used: set[str] = set()
        self.quantized: list[str] = []
        self.unquantized: list[str] = []

    def _check_count(self, field: str, layers: int) -> None:
        """Raise ConfigInvalid for more layers than any model has, before one is looked at."""
        if layers > _MAX_LAYERS:
            raise ConfigInvalid(
                f"config.json: {field}: {layers}: must be at most {_MAX_LAYERS}; correct it"
            )

    def find_format(self, *, quantize: bool) -> Format | None:
        """Return the source's format; raises ArchitectureUnsupported where the table has none."""
        rules = self.architecture.per_layer
        if any(isinstance(rule, Tensor) and rule.linear for rule in rules):
            return ONLINE_FP8 if quantize else parse_format(self.config.values)
        if quantize:
            raise ArchitectureUnsupported(
                f"quantization fp8: {self.architecture.name} is supported unquantized only; shard "
                "it with quantization none"
            )
        refuse_format(self.config.values, self.architecture.name)
        return None

    def targets(self, stage: int) -> list[TargetTensor]:
        """Return the tensors of a pipeline stage, in the order of the table."""
        return [
            self._target(rule, stored)
            for rule in self._rules(stage)
            for stored in self._stored(rule)
        ]

    def _rules(self, stage: int) -> Iterator[Tensor | Constant]:
        """Yield the rules that apply to a stage, with layer numbers filled in."""
        yield from self._of_stage(self.architecture.before_layers, stage, "first")
        for layer in range(*stage_layers(self.layers, self.stages)[stage]):
            for rule in self._applying(self.architecture.per_layer, layer in self.sparse):
                yield _numbered(rule, "{layer}", layer)
        yield from self._of_stage(self.architecture.after_layers, stage, "last")

    def _of_stage(
        self, rules: Sequence[Tensor | Constant], stage: int, usual: Stage
    ) -> Iterator[Tensor | Constant]:
        first, last = stage == 0, stage == self.stages - 1
        has = {"first": first, "last": last, "first-not-last": first and not last, "all": True}
        for rule in self._applying(rules):
            if has[getattr(rule, "stage", None) or usual]:
                yield rule

    def _applying(
        self, rules: Sequence[Tensor | Constant], sparse: bool | None = None
    ) -> Iterator[Tensor | Constant]:
        """Yield the rules whose conditions hold, for a kind of layer where `sparse` is given."""
        for rule in rules:
            if rule.when and not self.config.holds(rule.when):
                continue
            if isinstance(rule, Tensor):
                if rule.unless and self.config.holds(rule.unless):
                    continue
                if None not in (sparse, rule.sparse) and sparse != rule.sparse:
                    continue
            yield rule

    def _stored(self, rule: Tensor | Constant) -> Sequence[Stored]:
        """Return what is stored of a rule's tensor: several tensors in a quantized format."""
        if self.format is None or not isinstance(rule, Tensor) or not rule.linear:
            return PLAIN
        modules = [piece.source.removesuffix(".weight") for piece in rule.pieces]
        fused = rule.name.removesuffix(".weight")
        if rule.stack:
            fused = modules[0].partition(".{index}")[0]
            modules = [module.replace("{index}", "0") for module in modules]
        if self.format.skips(fused, modules, self.sources):
            self.unquantized += modules
            return PLAIN
        if rule.stack and not self.format.experts:
            raise ArchitectureUnsupported(
                f"config.json: quantization_config: {self.format.name}: {modules[0]}: not "
                "supported for experts; use another format, or leave them unquantized"
            )
        self.quantized += modules
        return self.format.stored

    def _target(self, rule: Tensor | Constant, stored: Stored) -> TargetTensor:
        if isinstance(rule, Constant):
            fill = Fill(math.prod(rule.shape), rule.value)
            return TargetTensor(
                rule.name, rule.dtype or self.dtype, rule.shape, ((fill,),) * self.ranks
            )
        dtype = stored.dtype or rule.dtype or self.dtype
        by_rank: list[list[Segment]] = [[] for _ in range(self.ranks)]
        shape: tuple[int, ...] = ()
        for index in range(self.sizes[rule.stack] if rule.stack else 1):
            pieces = _numbered(rule, "{index}", index).pieces if rule.stack else rule.pieces
            cuts = [self._cut(rule, p, stored, p is not pieces[-1], index) for p in pieces]
            if stored.last or (rule.stack and stored.last_of_expert):
                del cuts[:-1]
            for rank in self._holders(rule, index):
                by_rank[rank] += joined([cut.segments(rank) for cut in cuts], stored)
            shape = joined_shape([cut.target_share for cut in cuts], stored)
        if rule.stack:
            experts = self.sizes[rule.stack] // self.expert_ranks
            shape = (experts, *shape) if stored.per != (0, 0) or shape != (1,) else (experts,)
        segments = tuple(tuple(merged(of_rank)) for of_rank in by_rank)
        return TargetTensor(_in_place(rule.name, stored), dtype, shape, segments)

    def _holders(self, rule: Tensor, index: int) -> Sequence[int]:
        """Ranks that have one of stacked experts: with expert parallelism, consecutive ones."""
        if rule.stack is None or self.expert_ranks == 1:
            return range(self.ranks)
        return (index // (self.sizes[rule.stack] // self.expert_ranks),)

    def _cut(self, rule: Tensor, piece: Piece, stored: Stored, followed: bool, index: int) -> "Cut":
        """Check a piece's source tensor, and how ranks divide it, or that at `index` of it."""
        extents = tuple(map(self._extent, piece.shape))
        per = stored.per if len(extents) == 2 else (1,) * len(extents)
        shape = tuple(-(-n // each) if each else 1 for n, each in zip(extents, per, strict=True))
        online = stored.use.startswith("fp8")
        source = piece.source if online else _in_place(piece.source, stored)
        expected = stored.fixed or (shape[::-1] if stored.transposed else shape)
        self._check_source(source, rule, piece, extents if online else expected, stored)
        template = Slice(
            source,
            (0, 0),
            (0, 0),
            stored.use,
            self.dtype if online else "",
            transposed=piece.transposed,
        )
        if stored.fixed:
            return Cut(template, stored.fixed, stored.fixed)
        whole_experts = rule.stack is not None and self.expert_ranks > 1
        position = index if piece.stacked else None
        if piece.on_first_rank and not whole_experts:
            first = (0, *[expected[0]] * (self.ranks - 1))
            return Cut(template, expected, expected, 0, first, position)
        split = None if whole_experts else piece.split
        if split is None or not per[split.axis]:
            if followed and per[0] > 1 and extents[0] % per[0]:
                raise self._uneven(source, extents[0], per[0], "rows")
            return Cut(template, expected, expected, index=position)
        axis, each = split.axis, per[split.axis]
        width = extents[axis] // self.sizes[split.unit]
        begin, end = (unit * width for unit in self._units(split, 0))
        alone = end - begin == extents[axis] and (axis == 1 or len(rule.pieces) == 1)
        if (end - begin) % each and not alone:
            raise self._uneven(source, end - begin, each, ("rows", "columns")[axis])
        first = tuple(self._units(split, rank)[0] * width // each for rank in range(self.ranks))
        stored_axis = 1 - axis if stored.transposed else axis
        share = list(expected)
        share[stored_axis] = -(-(end - begin) // each)
        return Cut(template, expected, tuple(share), stored_axis, first, position)

    def _uneven(self, source: str, count: int, each: int, what: str) -> ParallelismInvalid:
        name = self.format.name if self.format else ""
        return ParallelismInvalid(
            f"tensor parallel size {self.ranks}: tensor {source!r} ({name}): a rank's share of the "
            f"weight has {count} {what}: must be a multiple of {each}; choose a smaller size"
        )

    def leftovers(self) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
        """Account for every source tensor that no rule used."""
        equal, ignored = [], []
        copies = {c.name: c.original for c in self.architecture.copies if self.config.holds(c.when)}
        dropped = self._dropped_layers()
        suffixes = self.architecture.ignored + (self.format.ignored if self.format else ())
        for name in sorted(self.sources.keys() - self.used):
            if name in copies:
                equal.append((name, copies[name]))
            elif name.endswith(suffixes) or name.startswith(dropped):
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
        count = self.config.count(rule.count)
        self._check_count(rule.count, count)
        layers = range(self.layers, self.layers + count)
        return tuple(rule.prefix.replace("{layer}", str(layer)) for layer in layers)

    def _check_source(
        self, source: str, rule: Tensor, piece: Piece, shape: tuple[int, ...], stored: Stored
    ) -> None:
        """Check shape and element type of a source tensor against config.json.

        `shape` is that of the piece; the tensor may be a stack of such.
        """
        stack = (rule.stack,) if rule.stack and piece.stacked else ()
        shape = (*(self.sizes[name] for name in stack), *shape)
        found = self.sources.get(source)
        quantized = f" with {self.format.name}" if self.format else ""
        if found is None:
            raise TensorMissing(
                f"tensor {source!r}: in none of the source's files, "
                f"{self.architecture.name}{quantized} needs it; complete the source"
            )
        shapes = [(), (1,)] if stored.per == (0, 0) else [shape]
        if found.shape not in shapes:
            sizes = ", ".join(self._described(axis) for axis in (*stack, *piece.shape))
            raise SourceCorrupt(
                f"{found.file}: tensor {source!r}: shape {list(found.shape)}: config.json "
                f"demands {list(shapes[-1])} ({sizes}{quantized})"
            )
        exact = stored.dtype if stored.dtype and not stored.use else None
        if found.dtype not in ((exact,) if exact else _SOURCE_DTYPES):
            raise ArchitectureUnsupported(
                f"{found.file}: tensor {source!r}: dtype {found.dtype}: "
                f"supported{quantized} are {exact or ', '.join(_SOURCE_DTYPES)}"
            )
        self.used.add(source)

    def _extent(self, axis: str) -> int:
        products = (product.split("*") for product in axis.split("+"))
        return sum(math.prod(self.sizes[name] for name in names) for names in products)

    def _described(self, axis: str) -> str:
        products = (product.split("*") for product in axis.split("+"))
        fields = self.architecture.sizes
        return " + ".join(" * ".join(fields[name].field for name in names) for names in products)

    def check_parallelism(self) -> None:
        """Raise ParallelismInvalid naming every size in the way, and the sizes that do divide."""
        self._check_stages()
        self._check_experts()
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

    def _check_stages(self) -> None:
        if self.stages > self.layers:
            raise ParallelismInvalid(
                f"pipeline parallel size {self.stages}: each stage needs a layer, and "
                f"{self.architecture.sizes[self.architecture.layers].field} is {self.layers}"
            )

    def _check_experts(self) -> None:
        if self.expert_ranks == 1:
            return
        if self.expert_ranks != self.ranks:
            raise ParallelismInvalid(
                f"expert parallel size {self.expert_ranks}: must be 1 or the tensor parallel "
                f"size, {self.ranks}"
            )
        rules = self.architecture.per_layer
        stacks = {rule.stack for rule in rules if isinstance(rule, Tensor) and rule.stack}
        if not stacks or not self.sparse:
            raise ParallelismInvalid(
                f"expert parallel size {self.expert_ranks}: {self.architecture.name} with this "
                "config.json has no experts; choose 1"
            )
        for stack in stacks:
            if self.sizes[stack] % self.expert_ranks:
                raise ParallelismInvalid(
                    f"expert parallel size {self.expert_ranks}: does not divide "
                    f"{self.architecture.sizes[stack].field} {self.sizes[stack]}"
                )

    def _splits(self) -> list[Split]:
        architecture = self.architecture
        kinds = {layer in self.sparse for layer in range(self.layers)}
        rules = [rule for k in kinds for rule in self._applying(architecture.per_layer, k)]
        rules += self._applying((*architecture.before_layers, *architecture.after_layers))
        tensors = [rule for rule in rules if isinstance(rule, Tensor)]
        divided = [rule for rule in tensors if not (rule.stack and self.expert_ranks > 1)]
        pieces = (piece for rule in divided for piece in rule.pieces)
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


def stage_layers(layers: int, stages: int) -> list[tuple[int, int]]:
    """Half-open ranges of the layers of each pipeline stage, as vLLM's get_pp_indices has them.

    What does not divide goes to the stages before the last, one each, from the last but one.
    """
    counts = [layers // stages] * stages
    for stage in range(layers % stages):
        counts[-2 - stage] += 1
    ends = list(accumulate(counts))
    return [(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _in_place(name: str, stored: Stored) -> str:
    """Return the name that a format's tensor has in the place of a weight's name."""
    return name if stored is PLAIN[0] else name.removesuffix("weight") + stored.suffix


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
