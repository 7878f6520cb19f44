"""The Llama family as vLLM lays it out.

Follows vLLM's LlamaForCausalLM: QKVParallelLinear and MergedColumnParallelLinear fuse
and split output rows, RowParallelLinear splits input columns and keeps its bias whole,
VocabParallelEmbedding pads the vocabulary to multiples of 64. With tied embeddings the
state dict of vLLM keeps the shared tensor under the smaller of its two names.
"""

from headrace_checkpoint.layouts.rules import (
    Architecture,
    Constant,
    Copy,
    Piece,
    Size,
    Split,
    Tensor,
)

_LAYER = "model.layers.{layer}"
_ATTENTION = f"{_LAYER}.self_attn"
_MLP = f"{_LAYER}.mlp"

_HEADS = Split(axis=0, unit="heads")
_KV_HEADS = Split(axis=0, unit="kv_heads", replicate=True)
_VOCABULARY = Split(axis=0, unit="vocabulary", pad=64)
_INNER_ROWS = Split(axis=0, unit="inner")

_EMBEDDING = Piece("model.embed_tokens.weight", ("vocabulary", "hidden"), _VOCABULARY)

LLAMA_FOR_CAUSAL_LM = Architecture(
    name="LlamaForCausalLM",
    sizes={
        "hidden": Size("hidden_size"),
        "inner": Size("intermediate_size"),
        "layers": Size("num_hidden_layers"),
        "heads": Size("num_attention_heads"),
        "kv_heads": Size("num_key_value_heads", default=("heads",)),
        "head_dim": Size("head_dim", default=("hidden", "heads")),
        "vocabulary": Size("vocab_size"),
    },
    before_layers=(
        Tensor("model.embed_tokens.weight", (_EMBEDDING,), unless="tie_word_embeddings"),
        Tensor("lm_head.weight", (_EMBEDDING,), when="tie_word_embeddings"),
    ),
    per_layer=(
        Tensor(
            f"{_ATTENTION}.qkv_proj.weight",
            (
                Piece(f"{_ATTENTION}.q_proj.weight", ("heads*head_dim", "hidden"), _HEADS),
                Piece(f"{_ATTENTION}.k_proj.weight", ("kv_heads*head_dim", "hidden"), _KV_HEADS),
                Piece(f"{_ATTENTION}.v_proj.weight", ("kv_heads*head_dim", "hidden"), _KV_HEADS),
            ),
        ),
        Tensor(
            f"{_ATTENTION}.qkv_proj.bias",
            (
                Piece(f"{_ATTENTION}.q_proj.bias", ("heads*head_dim",), _HEADS),
                Piece(f"{_ATTENTION}.k_proj.bias", ("kv_heads*head_dim",), _KV_HEADS),
                Piece(f"{_ATTENTION}.v_proj.bias", ("kv_heads*head_dim",), _KV_HEADS),
            ),
            when="attention_bias",
        ),
        Tensor(
            f"{_ATTENTION}.o_proj.weight",
            (
                Piece(
                    f"{_ATTENTION}.o_proj.weight",
                    ("hidden", "heads*head_dim"),
                    Split(axis=1, unit="heads"),
                ),
            ),
        ),
        Tensor(
            f"{_ATTENTION}.o_proj.bias",
            (Piece(f"{_ATTENTION}.o_proj.bias", ("hidden",)),),
            when="attention_bias",
        ),
        Tensor(
            f"{_MLP}.gate_up_proj.weight",
            (
                Piece(f"{_MLP}.gate_proj.weight", ("inner", "hidden"), _INNER_ROWS),
                Piece(f"{_MLP}.up_proj.weight", ("inner", "hidden"), _INNER_ROWS),
            ),
        ),
        Tensor(
            f"{_MLP}.gate_up_proj.bias",
            (
                Piece(f"{_MLP}.gate_proj.bias", ("inner",), _INNER_ROWS),
                Piece(f"{_MLP}.up_proj.bias", ("inner",), _INNER_ROWS),
            ),
            when="mlp_bias",
        ),
        Tensor(
            f"{_MLP}.down_proj.weight",
            (Piece(f"{_MLP}.down_proj.weight", ("hidden", "inner"), Split(axis=1, unit="inner")),),
        ),
        Tensor(
            f"{_MLP}.down_proj.bias",
            (Piece(f"{_MLP}.down_proj.bias", ("hidden",)),),
            when="mlp_bias",
        ),
        Tensor(
            f"{_LAYER}.input_layernorm.weight",
            (Piece(f"{_LAYER}.input_layernorm.weight", ("hidden",)),),
        ),
        Tensor(
            f"{_LAYER}.post_attention_layernorm.weight",
            (Piece(f"{_LAYER}.post_attention_layernorm.weight", ("hidden",)),),
        ),
        Constant(f"{_ATTENTION}.attn._k_scale", 1.0),
        Constant(f"{_ATTENTION}.attn._prob_scale", 1.0),
        Constant(f"{_ATTENTION}.attn._q_scale", 1.0),
        Constant(f"{_ATTENTION}.attn._v_scale", 1.0),
    ),
    after_layers=(
        Tensor("model.norm.weight", (Piece("model.norm.weight", ("hidden",)),)),
        Tensor(
            "lm_head.weight",
            (Piece("lm_head.weight", ("vocabulary", "hidden"), _VOCABULARY),),
            unless="tie_word_embeddings",
        ),
    ),
    copies=(Copy("lm_head.weight", "model.embed_tokens.weight", when="tie_word_embeddings"),),
    ignored=(
        "rotary_emb.inv_freq",
        "rotary_emb.cos_cached",
        "rotary_emb.sin_cached",
        "rotary_pos_emb.inv_freq",
    ),
)
