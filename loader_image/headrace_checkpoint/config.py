"""The source model's config.json: what layouts ask of it, checked field by field."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from headrace_checkpoint.errors import ArchitectureUnsupported, ConfigInvalid
from headrace_checkpoint.layouts.rules import Architecture, Size

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Names used in config.json and on the command line, to safetensors names."""

_MAX_SIZE = 2**31
_UNSUPPORTED = ("quantization_config", "compression_config")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A parsed config.json; `values` is the whole document."""

    values: Mapping[str, object]
    architectures: tuple[str, ...]

    @classmethod
    def from_json(cls, content: bytes) -> "ModelConfig":
        """Parse; raises ConfigInvalid, or ArchitectureUnsupported for quantized models."""
        try:
            values = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigInvalid(f"config.json: no JSON document: {error}") from None
        if not isinstance(values, dict):
            raise ConfigInvalid("config.json: must be a JSON object")
        for field in _UNSUPPORTED:
            if values.get(field) is not None:
                raise ArchitectureUnsupported(
                    f"config.json: {field}: quantized models are not supported; "
                    "use the unquantized model"
                )
        return cls(values, _architectures(values))

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
            value = self.values.get(size.field)
            sizes[name] = _default(size, sizes) if value is None else _natural(size.field, value)
        return sizes

    def flag(self, field: str) -> bool:
        """Return a boolean field; absent and null are false."""
        value = self.values.get(field)
        if value is not None and not isinstance(value, bool):
            raise ConfigInvalid(f"config.json: {field}: {_shown(value)}: must be true or false")
        return bool(value)

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
