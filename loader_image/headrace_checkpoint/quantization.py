"""Quantized formats: what each has in the place of a linear layer's weight, as data.

A format is read from `quantization_config` of config.json as vLLM 0.32 reads it. Sources, by
`quant_method`: layers/quantization/fp8.py, auto_gptq.py, auto_awq.py and
compressed_tensors/ of vLLM.
"""

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from headrace_checkpoint.errors import ArchitectureUnsupported, ConfigInvalid

FIELD = "quantization_config"
_FIELDS = (FIELD, "compression_config")

# What an untrusted pattern may be, so that each match ends soon: 10 ms for the worst of them.
_MAX_PATTERNS = 32
_MAX_PATTERN = 256
_MAX_CHOICES = 5
_CHOICE = re.compile(r"[*+?{(]")
_LITERAL = re.compile(r"\\.|\[\^?\]?(?:\\.|[^]\\])*\]", re.DOTALL)
_START = re.compile(r"\(\?[:=!]")
_REPEATED = re.compile(r"\(\?|\)[*+?{]")

_T = TypeVar("_T", str, int)

Use = Literal["", "scale", "fp8", "fp8-scale"]
"""What is done with source elements: `scale` must be finite; `fp8` and `fp8-scale` are made of
the rows of an unquantized weight."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor that a format stores for a weight of (rows, columns).

    Its name has `suffix` in the place of "weight". `per` is how many rows and how many columns
    of the weight an entry stands for, 0 for all of them, which every rank has. `transposed`
    tensors have columns first. A `dtype` None is the model's. Fused layers join their pieces'
    tensors along the weight's rows, or have the `last` one's, where so of experts alone,
    `last_of_expert`. `fixed` is a shape that does not
    depend on the weight's; every rank has it whole.
    """

    suffix: str = "weight"
    dtype: str | None = None
    per: tuple[int, int] = (1, 1)
    transposed: bool = False
    last: bool = False
    last_of_expert: bool = False
    fixed: tuple[int, ...] | None = None
    use: Use = ""


Names = Sequence[str]
Skips = Callable[[str, Names, Container[str]], bool]


@dataclass(frozen=True, slots=True)
class Format:
    """A quantized format; `name` is shown in messages.

    `skips(fused, modules, tensors)` tells of a layer that is not quantized: by the fused
    layer's name, the source's module names and the names of all source tensors. `experts`:
    whether layers of experts can have it. Source tensors with the suffixes `ignored` are for
    engines of other kinds.
    """

    name: str
    stored: tuple[Stored, ...]
    skips: Skips
    experts: bool = True
    ignored: tuple[str, ...] = ()


PLAIN = (Stored(),)
_WEIGHT = Stored(dtype="F8_E4M3")
_WEIGHT_SCALE = Stored("weight_scale", "F32", use="scale")
_TENSOR_SCALE = replace(_WEIGHT_SCALE, per=(0, 0))
_CHANNEL_SCALE = replace(_WEIGHT_SCALE, per=(1, 0))
_INPUT_SCALE = replace(_TENSOR_SCALE, suffix="input_scale", last_of_expert=True)
_INT32_BITS = 32

ONLINE_FP8 = Format(
    "fp8 made of unquantized weights",
    (
        Stored(dtype="F8_E4M3", use="fp8"),
        Stored("weight_scale", "F32", per=(1, 0), use="fp8-scale"),
    ),
    skips=lambda _fused, modules, _tensors: modules[0].endswith(".mlp.gate"),
)
"""Per output channel, as vLLM's Fp8PtpcOnlineLinearMethod makes it; routers stay as they are."""

ONLINE_FP8_CONFIG: Mapping[str, object] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*mlp\\.gate$"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "float",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}
"""What a model made of ONLINE_FP8 says of itself: the field's FP8_DYNAMIC recipe."""


def parse_format(config: Mapping[str, object]) -> Format | None:
    """Return the format of a parsed config.json; None for unquantized models.

    Raises ArchitectureUnsupported naming the field that asks for something else.
    """
    given = [field for field in _FIELDS if config.get(field) is not None]
    if not given:
        return None
    if given != [FIELD]:
        raise _unsupported(given[-1], config[given[-1]], f"only {FIELD} is supported")
    values = _Values(config[FIELD], FIELD)
    methods: Mapping[str, Callable[[_Values], Format]] = {
        "fp8": _fp8,
        "compressed-tensors": _compressed_tensors,
        "gptq": _gptq,
        "awq": _awq,
    }
    return methods[values.choice("quant_method", *methods)](values)


def refuse_format(config: Mapping[str, object], architecture: str) -> None:
    """Raise ArchitectureUnsupported naming the field of config.json that asks for a format."""
    for field in _FIELDS:
        found = config.get(field)
        method = found.get("quant_method") if isinstance(found, dict) else found
        if found is not None:
            rule = f"{architecture} is supported unquantized only; take its bfloat16 form"
            raise _unsupported(f"{field}.quant_method", method, rule)


def _fp8(values: "_Values") -> Format:
    scheme = values.choice("activation_scheme", "dynamic", "static")
    values.absent("store_dtype")
    if values.get("fmt") is not None:
        values.choice("fmt", "e4m3")
    ignored = values.names("ignored_layers") or values.names("modules_to_not_convert")
    skips = _skips(lambda name: _exactly(name, ignored))
    if values.get("weight_block_size") is not None:
        if scheme != "dynamic":
            values.refuse("activation_scheme", "blocks need dynamic")
        scale = Stored("weight_scale_inv", "F32", per=values.pair("weight_block_size"), use="scale")
        return Format("fp8 in blocks", (_WEIGHT, scale), skips)
    stored: tuple[Stored, ...] = (_WEIGHT, _TENSOR_SCALE)
    if scheme == "static":
        stored += (_INPUT_SCALE,)
    return Format("fp8 per tensor", stored, skips)


def _compressed_tensors(values: "_Values") -> Format:
    for field in ("kv_cache_scheme", "transform_config"):
        values.absent(field)
    if values.get("sparsity_config"):
        values.refuse("sparsity_config", "sparse weights are not supported")
    group = values.only_group()
    skips = _skips(_matcher(values.names("ignore")))
    weights = group.child("weights")
    group.absent("output_activations")
    weights.choice("dynamic", False)
    form = group if group.get("format") is not None else values
    if weights.choice("type", "float", "int") == "float":
        form.choice("format", "float-quantized", "naive-quantized")
        return _compressed_float(group, weights, skips)
    form.choice("format", "pack-quantized")
    return _compressed_int(group, weights, skips)


def _compressed_float(group: "_Values", weights: "_Values", skips: Skips) -> Format:
    weights.choice("num_bits", 8)
    weights.choice("symmetric", True)
    inputs = group.child("input_activations")
    inputs.choice("type", "float")
    inputs.choice("num_bits", 8)
    strategy = weights.choice("strategy", "tensor", "channel", "block")
    dynamic = inputs.choice("dynamic", True, False)
    if not dynamic:
        inputs.choice("strategy", "tensor")
        inputs.choice("symmetric", True)
    if strategy == "block":
        inputs.choice("dynamic", True)
        scale = replace(_WEIGHT_SCALE, per=weights.pair("block_structure"))
        return Format("compressed-tensors fp8 in blocks", (_WEIGHT, scale), skips)
    stored: tuple[Stored, ...] = (
        _WEIGHT,
        _CHANNEL_SCALE if strategy == "channel" else _TENSOR_SCALE,
    )
    if not dynamic:
        stored += (_INPUT_SCALE,)
    # vLLM's class for experts takes these two, and blocks.
    experts = (strategy == "channel") == dynamic
    return Format(f"compressed-tensors fp8 per {strategy}", stored, skips, experts)


def _compressed_int(group: "_Values", weights: "_Values", skips: Skips) -> Format:
    group.absent("input_activations")
    pack = _INT32_BITS // weights.choice("num_bits", 4)
    if weights.get("actorder") is not None:
        weights.choice("actorder", "weight", "static")
    strategy = weights.choice("strategy", "group", "channel")
    size = weights.natural("group_size") if strategy == "group" else 0
    stored: tuple[Stored, ...] = (
        Stored("weight_packed", "I32", per=(1, pack)),
        Stored("weight_scale", per=(1, size), use="scale"),
        Stored("weight_shape", "I64", fixed=(2,), last=True),
    )
    if not weights.choice("symmetric", True, False):
        weights.choice("strategy", "group")
        stored += (Stored("weight_zero_point", "I32", per=(pack, size)),)
    return Format(f"compressed-tensors int4 per {strategy}", stored, skips, experts=False)


def _gptq(values: "_Values") -> Format:
    values.choice("sym", True)
    values.choice("desc_act", False)
    for field in ("dynamic", "modules_in_block_to_quantize", "lm_head"):
        if values.get(field):
            values.refuse(field, "is not supported; quantize all linear layers alike")
    pack = _INT32_BITS // values.choice("bits", 4)
    size = 0 if values.get("group_size") == -1 else values.natural("group_size")
    stored = (
        Stored("qweight", "I32", per=(1, pack), transposed=True),
        Stored("scales", per=(1, size), transposed=True, use="scale"),
        Stored("qzeros", "I32", per=(pack, size), transposed=True),
    )
    return Format("gptq int4", stored, _without("qweight"), experts=False, ignored=(".g_idx",))


def _awq(values: "_Values") -> Format:
    values.choice("zero_point", True)
    if values.get("version") is not None:
        values.choice("version", "gemm", "GEMM")
    if values.get("lm_head"):
        values.refuse("lm_head", "a quantized head is not supported")
    pack = _INT32_BITS // values.choice("w_bit" if values.get("w_bit") else "bits", 4)
    size = values.natural("q_group_size" if values.get("q_group_size") else "group_size")
    stored = (
        Stored("qweight", "I32", per=(pack, 1), transposed=True),
        Stored("qzeros", "I32", per=(pack, size), transposed=True),
        Stored("scales", per=(1, size), transposed=True, use="scale"),
    )
    ignored = values.names("modules_to_not_convert")
    contains = _skips(lambda name: any(part in name for part in ignored))
    return Format("awq int4", stored, contains if ignored else _without("qweight"), experts=False)


def served(config: Mapping[str, object], quantized: Names, unquantized: Names) -> dict[str, object]:
    """Return what config.json of the checkpoint says where the source's would not do.

    vLLM takes what GPTQ and AWQ models leave unsaid from the names of their tensors, which are
    others here: the linear layers that are `quantized` and `unquantized` are named.
    """
    values = config.get(FIELD)
    lists = {
        "gptq": ("modules_in_block_to_quantize", quantized),
        "awq": ("modules_to_not_convert", unquantized),
    }
    if not isinstance(values, dict) or values.get("quant_method") not in lists:
        return dict(config)
    field, names = lists[values["quant_method"]]
    if values.get(field) or not names:
        return dict(config)
    return {**config, FIELD: {**values, field: list(names)}}


def _skips(ignores: Callable[[str], bool]) -> Skips:
    """As vLLM decides it: by the fused layer's name, else by all of its pieces alike."""

    def skips(fused: str, modules: Names, _tensors: Container[str]) -> bool:
        if ignores(fused):
            return True
        ignored = [ignores(module) for module in modules]
        if any(ignored) and not all(ignored):
            raise ConfigInvalid(
                f"config.json: {FIELD}: of {', '.join(modules)}, which engines fuse, "
                f"{modules[ignored.index(True)]} alone is not quantized; all must be alike"
            )
        return all(ignored)

    return skips


def _without(suffix: str) -> Skips:
    """As vLLM decides it: layers that have no such tensor are not quantized."""
    return lambda _fused, modules, tensors: f"{modules[0]}.{suffix}" not in tensors


def _exactly(name: str, ignored: Names) -> bool:
    if "experts" in name:
        return any(name in other for other in ignored if "experts" in other)
    return name in ignored


def _matcher(ignored: Names) -> Callable[[str], bool]:
    """Return what tells whether a layer's name is in a list of names and of patterns, re:..."""
    patterns = [_compiled(item) for item in ignored if item.startswith("re:")]
    if len(patterns) > _MAX_PATTERNS:
        rule = f"at most {_MAX_PATTERNS} patterns are supported; join some"
        raise _unsupported(f"{FIELD}.ignore", f"{len(patterns)} patterns", rule)
    plain = frozenset(ignored)
    return lambda name: name in plain or any(pattern.match(name) for pattern in patterns)


def _compiled(item: str) -> re.Pattern[str]:
    pattern = item.removeprefix("re:")
    bare = _START.sub("(", _LITERAL.sub("x", pattern[:_MAX_PATTERN]))
    many = len(pattern) > _MAX_PATTERN or len(_CHOICE.findall(bare)) > _MAX_CHOICES
    if many or _REPEATED.search(bare):
        raise _unsupported(
            f"{FIELD}.ignore",
            item,
            f"could match for ever; at most {_MAX_PATTERN} characters and {_MAX_CHOICES} of "
            "* + ? { ( are supported, no repeated group, and of what (? begins (?: (?= (?! alone; "
            "write it simpler, or name the layers",
        )
    try:
        return re.compile(pattern)
    except (re.error, OverflowError) as error:
        raise ConfigInvalid(f"config.json: {FIELD}.ignore: {item!r}: {error}") from None


class _Values:
    """A JSON object of config.json with its path, for messages that name the field."""

    def __init__(self, value: object, path: str) -> None:
        self._path = path
        if not isinstance(value, dict):
            raise ConfigInvalid(f"config.json: {path}: {value!r:.80}: must be an object")
        self._values: Mapping[str, object] = value

    def get(self, field: str) -> object:
        return self._values.get(field)

    def refuse(self, field: str, rule: str) -> None:
        raise _unsupported(f"{self._path}.{field}", self._values.get(field), rule)

    def absent(self, field: str) -> None:
        if self._values.get(field) is not None:
            self.refuse(field, "is not supported")

    def choice(self, field: str, *allowed: _T) -> _T:
        value = self._values.get(field)
        for one in allowed:
            if type(value) is type(one) and value == one:
                return one
        raise _unsupported(
            f"{self._path}.{field}", value, f"supported: {', '.join(map(repr, allowed))}"
        )

    def natural(self, field: str) -> int:
        value = self._values.get(field)
        if type(value) is not int or not 0 < value < 2**31:
            raise ConfigInvalid(
                f"config.json: {self._path}.{field}: {value!r:.80}: must be a whole number from 1"
            )
        return value

    def pair(self, field: str) -> tuple[int, int]:
        value = self._values.get(field)
        if (
            not isinstance(value, list)
            or len(value) != 2
            or not all(type(item) is int and 0 < item < 2**31 for item in value)
        ):
            raise ConfigInvalid(
                f"config.json: {self._path}.{field}: {value!r:.80}: must be two whole numbers "
                "from 1: rows and columns of a block"
            )
        return value[0], value[1]

    def names(self, field: str) -> Names:
        value = self._values.get(field)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigInvalid(
                f"config.json: {self._path}.{field}: {value!r:.80}: must be a list of names"
            )
        return value

    def child(self, field: str) -> "_Values":
        if self._values.get(field) is None:
            self.refuse(field, "must be given")
        return _Values(self._values[field], f"{self._path}.{field}")

    def only_group(self) -> "_Values":
        groups = self.child("config_groups")
        if len(groups._values) != 1:
            self.refuse("config_groups", "one group for all linear layers is supported")
        group = groups.child(next(iter(groups._values)))
        if group.get("targets") != ["Linear"]:
            group.refuse("targets", 'supported: ["Linear"]')
        return group


def _unsupported(field: str, value: object, rule: str) -> ArchitectureUnsupported:
    return ArchitectureUnsupported(f"config.json: {field}: {value!r:.80}: {rule}")
