"""The source model's config.json: what layouts ask of it, checked field by field."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from headrace_checkpoint import quantization
from headrace_checkpoint.errors import ArchitectureUnsupported, ConfigInvalid
from headrace_checkpoint.layouts.rules import (
    Architecture,
    Condition,
    Equals,
    Flag,
    Given,
    Size,
    SparseLayers,
)

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Names used in config.json and on the command line, to safetensors names."""

_MAX_SIZE = 2**31


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A parsed config.json; `values` is the whole document, `content` the file."""

    values: Mapping[str, object]
    architectures: tuple[str, ...]
    content: bytes = b""

    @classmethod
    def from_json(cls, content: bytes) -> "ModelConfig":
        """Parse; raises ConfigInvalid."""
        try:
            values = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigInvalid(f"config.json: no JSON document: {error}") from None
        if not isinstance(values, dict):
            raise ConfigInvalid("config.json: must be a JSON object")
        return cls(values, _architectures(values), content)

    def quantized(self) -> "ModelConfig":
        """Return what an unquantized model says of itself once it is FP8."""
        if quantization.parse_format(self.values) is not None:
            raise ArchitectureUnsupported(
                f"config.json: {quantization.FIELD}: the model is quantized already; shard it with "
                "quantization none"
            )
        return self._with({**self.values, quantization.FIELD: quantization.ONLINE_FP8_CONFIG})

    def serving(self, quantized: tuple[str, ...], unquantized: tuple[str, ...]) -> "ModelConfig":
        """Return what engines must read beside the checkpoint, given the linear layers' names."""
        values = quantization.served(self.values, quantized, unquantized)
        return self if values == self.values else self._with(values)

    def _with(self, values: Mapping[str, object]) -> "ModelConfig":
        return ModelConfig(
            values, self.architectures, json.dumps(values, indent=2).encode() + b"\n"
        )

    def architecture(self, supported: Mapping[str, Architecture]) -> Architecture:
        """Return the table for this model; raises ArchitectureUnsupported."""
        for name in self.architectures:
            if name in supported:
                return supported[name]
        raise ArchitectureUnsupported(
            f"config.json: architectures: {_shown(list(self.architectures))}: "
            f"none is supported; supported are {', '.join(sorted(supported))}"
        )

    def sizes(self, architecture: Architecture) -> dict[str, int]:
        """Evaluate the table's sizes; raises ConfigInvalid naming the field."""
        sizes: dict[str, int] = {}
        for name, size in architecture.sizes.items():
            names = (size.field, size.alias) if size.alias else (size.field,)
            given = [field for field in names if self.values.get(field) is not None]
            values = {_natural(field, self.values[field]) for field in given}
            if len(values) > 1:
                raise ConfigInvalid(
                    f"config.json: {' and '.join(given)}: two names of one size, with "
                    f"different values: {', '.join(map(str, sorted(values)))}"
                )
            sizes[name] = values.pop() if values else _default(size, sizes)
        return sizes

    def holds(self, condition: Condition) -> bool:
        """Evaluate a table's condition; raises ConfigInvalid where a flag is no boolean."""
        value: object = self.values
        for name in condition.field.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        match condition:
            case Given():
                return value is not None
            case Equals():
                return value == condition.value
            case Flag():
                if value is not None and not isinstance(value, bool):
                    raise ConfigInvalid(
                        f"config.json: {condition.field}: {_shown(value)}: must be true or false"
                    )
                return condition.default if value is None else value

    def sparse_layers(self, rule: SparseLayers | None, layers: int) -> frozenset[int]:
        """Numbers, below `layers`, of the layers that have experts."""
        if rule is None:
            return frozenset()
        first = self.count(rule.first)
        step = max(1, self.count(rule.step, 1))
        dense = self.values.get(rule.dense) if rule.dense else None
        if dense is not None and not isinstance(dense, list):
            raise ConfigInvalid(f"config.json: {rule.dense}: {_shown(dense)}: must be a list")
        return frozenset(
            layer
            for layer in range(first, layers)
            if (layer + rule.offset) % step == 0 and layer not in (dense or ())
        )

    def count(self, field: str | None, default: int = 0) -> int:
        """Return a field that counts from 0; absent and null are `default`."""
        value = self.values.get(field) if field else None
        if value is None:
            return default
        if type(value) is not int or not 0 <= value < _MAX_SIZE:
            raise ConfigInvalid(
                f"config.json: {field}: {_shown(value)}: must be a whole number from 0"
            )
        return value

    def dtype(self) -> str | None:
        """Return the safetensors name of the declared element type, None where undeclared."""
        field = "dtype" if self.values.get("dtype") is not None else "torch_dtype"
        value = self.values.get(field)
        if value is None:
            return None
        name = value.removeprefix("torch.") if isinstance(value, str) else ""
        if name not in DTYPES:
            raise ConfigInvalid(
                f"config.json: {field}: {_shown(value)}: must be one of {', '.join(DTYPES)}"
            )
        return DTYPES[name]


def _architectures(values: Mapping[str, object]) -> tuple[str, ...]:
    names = values.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ConfigInvalid(
            f"config.json: architectures: {_shown(names)}: must be a list with the model's "
            'class, such as ["LlamaForCausalLM"]; add it as the model\'s publisher states it'
        )
    return tuple(names)


def _default(size: Size, sizes: Mapping[str, int]) -> int:
    if not size.default:
        raise ConfigInvalid(f"config.json: {size.field}: missing; the architecture needs it")
    value, *divisors = (sizes[name] for name in size.default)
    for divisor in divisors:
        if value % divisor:
            raise ConfigInvalid(
                f"config.json: {size.field}: missing, and {value} is not divisible by {divisor}; "
                f"add {size.field}"
            )
        value //= divisor
    return value


def _natural(field: str, value: object) -> int:
    if type(value) is not int or not 0 < value < _MAX_SIZE:
        raise ConfigInvalid(
            f"config.json: {field}: {_shown(value)}: must be a whole number from 1 to {_MAX_SIZE}"
        )
    return value


def _shown(value: object) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 100 else shown[:97] + "..."
