"""Decoders without experts: Llama, Mistral, Qwen2, Qwen3, Gemma, as vLLM lays them out."""

from dataclasses import replace

from headrace_checkpoint.layouts.blocks import (
    ATTENTION,
    EMBEDDING,
    EXPLICIT_HEAD_DIM,
    LAYER,
    MLP,
    RECOMPUTED,
    SIZES,
    TIED,
    TIED_BY_DEFAULT,
    attention,
    embedding,
    embedding_on_every_stage,
    head,
    head_on_every_stage,
    mlp,
    norms,
    on_every_stage,
    qkv,
    stored_twice,
    whole,
)
from headrace_checkpoint.layouts.rules import Architecture, Flag, Piece, Size, Split, Tensor

_ATTENTION_BIAS = Flag("attention_bias")
_MLP_BIAS = Flag("mlp_bias")
_INNER_ROWS = Split(axis=0, unit="inner")
_NORMS = norms(LAYER, "hidden", "input_layernorm", "post_attention_layernorm")
_FEEDFORWARD_NORMS = norms(
    LAYER, "hidden", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
_HEAD_NORMS = norms(ATTENTION, "head_dim", "q_norm", "k_norm")
_BIASES = (
    qkv("bias", when=_ATTENTION_BIAS),
    Tensor(
        f"{ATTENTION}.o_proj.bias",
        (Piece(f"{ATTENTION}.o_proj.bias", ("hidden",)),),
        when=_ATTENTION_BIAS,
    ),
    Tensor(
        f"{MLP}.gate_up_proj.bias",
        (
            Piece(f"{MLP}.gate_proj.bias", ("inner",), _INNER_ROWS),
            Piece(f"{MLP}.up_proj.bias", ("inner",), _INNER_ROWS),
        ),
        when=_MLP_BIAS,
    ),
    Tensor(f"{MLP}.down_proj.bias", (Piece(f"{MLP}.down_proj.bias", ("hidden",)),), when=_MLP_BIAS),
)

LLAMA = Architecture(
    name="LlamaForCausalLM",
    sizes=SIZES,
    before_layers=embedding(TIED),
    per_layer=(*attention(), *mlp(), *_BIASES, *_NORMS),
    after_layers=head(TIED),
    copies=stored_twice(TIED),
    ignored=RECOMPUTED,
)

MISTRAL = replace(LLAMA, name="MistralForCausalLM", per_layer=(*attention(), *mlp(), *_NORMS))

QWEN2 = replace(
    LLAMA,
    name="Qwen2ForCausalLM",
    sizes=SIZES | {"head_dim": Size("hidden_size / num_attention_heads", ("hidden", "heads"))},
    per_layer=(*attention(), qkv("bias"), *mlp(), *_NORMS),
)

QWEN3 = replace(
    LLAMA,
    name="Qwen3ForCausalLM",
    sizes=SIZES | EXPLICIT_HEAD_DIM,
    per_layer=(*attention(), *_HEAD_NORMS, *mlp(), *_NORMS),
)

GEMMA = replace(
    LLAMA,
    name="GemmaForCausalLM",
    sizes=SIZES | EXPLICIT_HEAD_DIM,
    before_layers=embedding_on_every_stage(TIED_BY_DEFAULT),
    per_layer=(*attention(), *mlp(), *_NORMS),
    after_layers=head_on_every_stage(TIED_BY_DEFAULT),
    copies=stored_twice(TIED_BY_DEFAULT),
)

GEMMA3 = replace(
    GEMMA,
    name="Gemma3ForCausalLM",
    per_layer=(
        *attention(),
        *_HEAD_NORMS,
        *mlp(),
        *_NORMS,
        *_FEEDFORWARD_NORMS,
    ),
)

GEMMA2 = replace(
    GEMMA,
    name="Gemma2ForCausalLM",
    before_layers=on_every_stage(EMBEDDING),
    per_layer=(
        *attention(),
        *mlp(),
        *_NORMS,
        *_FEEDFORWARD_NORMS,
    ),
    after_layers=on_every_stage(whole("model.norm.weight", "hidden")),
)
"""vLLM's module has no head: it uses the embedding, whatever config.json says of tying."""
