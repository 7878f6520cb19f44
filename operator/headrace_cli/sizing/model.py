"""How many bytes a model's weights have, from its config.json alone.

The parameters of the decoder-only families that Headrace shards: attention with grouped or
latent (MLA) keys and values, a gated MLP, experts with or without shared ones. Norms and
biases of projections are counted where the family has them; they are below a thousandth.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from headrace_cli.errors import InputInvalid

_DTYPE_BYTES = {"bfloat16": 2.0, "float16": 2.0, "float32": 4.0}
_QUANTIZED_BYTES = {"fp8": 1.0}
_MAX = 1 << 31

KNOWN_MODELS = {
    # Sizes of AWS's shards (published.py), and of DeepSeek-V3 as published, in bytes.
    "llama-3.1-405b": 812 * 10**9,
    "llama-3.1-405b-fp8": 408 * 10**9,
    "llama-3.1-70b": 141 * 10**9,
    "llama-3.1-70b-fp8": 72 * 10**9,
    "mixtral-8x22b": 282 * 10**9,
    "deepseek-v3": 689 * 10**9,
}


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Parameters, bytes of one of them, and bytes in all."""

    parameters: int
    bytes_per_parameter: float

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights."""
        return round(self.parameters * self.bytes_per_parameter)


def size_of(config: Mapping[str, object], dtype: str = "auto") -> ModelSize:
    """Return the size of the model that a config.json describes.

    Raises:
        InputInvalid: a field is missing or no number that makes sense.
    """
    fields = _Fields(config)
    return ModelSize(_parameters(fields), _bytes_per_parameter(config, dtype))


class _Fields:
    """Numbers of a config.json; names may have an alias."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self._config = config

    def get(self, *names: str, default: int | None = None) -> int:
        for name in names:
            value = self._config.get(name)
            if value is None:
                continue
            if type(value) is not int or not 0 <= value < _MAX:
                raise InputInvalid(f"config.json: {name}: {value!r}: must be a whole number from 0")
            return value
        if default is None:
            raise InputInvalid(
                f"config.json: {names[0]}: is missing; give a decoder-only model's config.json, "
                "or the size with --model-gb"
            )
        return default

    def flag(self, name: str, *, default: bool) -> bool:
        value = self._config.get(name)
        return default if value is None else bool(value)


def _parameters(fields: _Fields) -> int:
    hidden, layers = fields.get("hidden_size"), fields.get("num_hidden_layers")
    vocabulary = fields.get("vocab_size") * hidden
    tied = fields.flag("tie_word_embeddings", default=False)
    sparse = _sparse_layers(fields, layers)
    dense_mlp = 3 * hidden * fields.get("intermediate_size")
    return (
        (1 if tied else 2) * vocabulary
        + layers * (_attention(fields, hidden) + 2 * hidden)
        + (layers - sparse) * dense_mlp
        + (sparse * _experts(fields, hidden) if sparse else 0)
        + hidden
    )


def _attention(fields: _Fields, hidden: int) -> int:
    heads = fields.get("num_attention_heads")
    if not heads:
        raise InputInvalid("config.json: num_attention_heads: 0: must be at least 1")
    latent = fields.get("kv_lora_rank", default=0)
    if latent:
        return _latent_attention(fields, hidden, heads, latent)
    keys = fields.get("num_key_value_heads", default=heads)
    width = fields.get("head_dim", default=hidden // heads)
    return 2 * hidden * heads * width + 2 * hidden * keys * width


def _latent_attention(fields: _Fields, hidden: int, heads: int, latent: int) -> int:
    """Count multi-head latent attention, as in DeepSeek-V2 (arXiv 2405.04434, section 2.1)."""
    rope, nope = fields.get("qk_rope_head_dim"), fields.get("qk_nope_head_dim")
    value, rank = fields.get("v_head_dim"), fields.get("q_lora_rank", default=0)
    width = heads * (rope + nope)
    queries = rank * (hidden + 1 + width) if rank else hidden * width
    down, up = hidden * (latent + rope) + latent, latent * heads * (nope + value)
    return queries + down + up + heads * value * hidden


def _sparse_layers(fields: _Fields, layers: int) -> int:
    """Layers with experts: all of them after the first dense ones, every so many."""
    if not _expert_count(fields):
        return 0
    first = min(layers, fields.get("first_k_dense_replace", default=0))
    step = max(1, fields.get("decoder_sparse_step", "moe_layer_freq", default=1))
    return (layers - first) // step


def _expert_count(fields: _Fields) -> int:
    return fields.get("num_local_experts", "n_routed_experts", "num_experts", default=0)


def _experts(fields: _Fields, hidden: int) -> int:
    width = fields.get("moe_intermediate_size", "intermediate_size")
    one = 3 * hidden * width
    shared = fields.get("n_shared_experts", default=0) * one
    own = fields.get("shared_expert_intermediate_size", default=0)
    gate = 3 * hidden * own + hidden if own else 0
    return _expert_count(fields) * (one + hidden) + shared + gate


def _bytes_per_parameter(config: Mapping[str, object], dtype: str) -> float:
    if dtype != "auto":
        return {**_DTYPE_BYTES, **_QUANTIZED_BYTES}[dtype]
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping):
        method = str(quantization.get("quant_method"))
        if method not in _QUANTIZED_BYTES:
            raise InputInvalid(
                f"config.json: quantization_config.quant_method: {method!r}: its size is not "
                "known; give the size with --model-gb"
            )
        return _QUANTIZED_BYTES[method]
    named = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if named not in _DTYPE_BYTES:
        raise InputInvalid(
            f"config.json: torch_dtype: {named!r}: must be one of {', '.join(_DTYPE_BYTES)}"
        )
    return _DTYPE_BYTES[named]
