"""Makes a small random Llama with a tokenizer: a real model directory that needs no download.

    python examples/tiny_llama.py OUTPUT_DIRECTORY [--layers 2 --hidden-size 320 ...]

The same seed and sizes give the same bytes. Needs numpy, tokenizers and
headrace_checkpoint; neither torch nor transformers.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from headrace_checkpoint.convert import STORAGE, convert
from headrace_checkpoint.dtypes import tensor_bytes
from headrace_checkpoint.manifest import TensorEntry
from headrace_checkpoint.safetensors_format import build_header

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
WORDS = """
a after air all and are at away bank barge basin bay beach bed below bend between blue boat
bottom bridge brook by calm canal cave channel clear cliff cloud cold course current dam dark dawn
deep delta ditch down dry each eddy edge every falls fast fed field fills fish flood flow flows foam
for forest fountain from gate glacier grass green harbor head high hill in into is island lake
land leads light low meadow mill moss mountain mouth moves never night north ocean of on over
past path pebble pipe pond pool power quiet rain rapids reed reservoir ridge rises river rock runs
sand sea shore silt silver sky slow sluice snow south spring steep still stone stream sun the
"""
BLOCK = 4 * 1024 * 1024
NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Dimensions of the model, named as in transformers' LlamaConfig."""

    layers: int = 2
    hidden_size: int = 256
    intermediate_size: int = 512
    heads: int = 4
    kv_heads: int = 2
    vocab_size: int = 128
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "bfloat16"

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.heads

    def config(self) -> dict[str, object]:
        """Return the content of config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": self.dtype,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tied,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": 2048,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors by the names that transformers gives them."""
        hidden, inner = self.hidden_size, self.intermediate_size
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden)
        }
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            linears = {
                "self_attn.q_proj": (query, hidden, self.attention_bias),
                "self_attn.k_proj": (key, hidden, self.attention_bias),
                "self_attn.v_proj": (key, hidden, self.attention_bias),
                "self_attn.o_proj": (hidden, query, self.attention_bias),
                "mlp.gate_proj": (inner, hidden, self.mlp_bias),
                "mlp.up_proj": (inner, hidden, self.mlp_bias),
                "mlp.down_proj": (hidden, inner, self.mlp_bias),
            }
            for name, (rows, columns, bias) in linears.items():
                shapes[f"{prefix}.{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"{prefix}.{name}.bias"] = (rows,)
            shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes


def make_tiny_llama(directory: Path, size: Size | None = None, seed: int = 0) -> Path:
    """Write config.json, tokenizer and model.safetensors into `directory`; returns it."""
    size = size or Size()
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", size.config())
    _write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    _write_tokenizer(directory, size.vocab_size)
    _write_weights(directory / "model.safetensors", size, seed)
    return directory


def _write_weights(path: Path, size: Size, seed: int) -> None:
    dtype = NAMES[size.dtype]
    generator = np.random.default_rng(seed)
    entries = []
    offset = 0
    for name, shape in size.shapes().items():
        entries.append(TensorEntry(name, dtype, shape, offset, tensor_bytes(dtype, shape)))
        offset += entries[-1].nbytes
    with path.open("wb") as file:
        file.write(build_header(entries, alignment=8, metadata={"format": "pt"}))
        for entry in entries:
            for block in _values(entry, generator):
                converted = convert(block, "F32", dtype)
                file.write(np.ascontiguousarray(converted, STORAGE[dtype]).data)


def _values(entry: TensorEntry, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield float32 values: norms near one, all else small and centred, so text varies."""
    left = int(np.prod(entry.shape))
    norm, spread = ("norm" in entry.name), (0.05 if "norm" in entry.name else 0.1)
    while left:
        count = min(left, BLOCK)
        yield generator.standard_normal(count, np.float32) * np.float32(spread) + np.float32(norm)
        left -= count


def _write_tokenizer(directory: Path, vocab_size: int) -> None:
    tokens = [*SPECIAL_TOKENS, ",", ".", *WORDS.split()]
    tokens += [f"drop{index}" for index in range(vocab_size - len(tokens))]
    vocabulary = {token: index for index, token in enumerate(tokens[:vocab_size])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "model_max_length": 2048,
            "clean_up_tokenization_spaces": False,
        },
    )


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Command line: sizes as options, the directory as the only argument."""
    parser = argparse.ArgumentParser(description="Make a small random Llama with a tokenizer.")
    parser.add_argument("directory", type=Path)
    # Heads of 80: with multiples of 32 vLLM 0.32 crashes so small a model on processors with AMX.
    default = Size(hidden_size=320)
    for name in ("layers", "hidden_size", "intermediate_size", "heads", "kv_heads", "vocab_size"):
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=getattr(default, name))
    parser.add_argument("--dtype", choices=NAMES, default=default.dtype)
    for name in ("tied", "attention_bias", "mlp_bias"):
        parser.add_argument("--" + name.replace("_", "-"), action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    directory, seed = options.pop("directory"), options.pop("seed")
    make_tiny_llama(directory, Size(**options), seed)


if __name__ == "__main__":
    main()
