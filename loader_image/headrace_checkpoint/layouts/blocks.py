"""Groups of rules that several architectures share, named after vLLM's modules.

QKVParallelLinear and MergedColumnParallelLinear fuse and split output rows,
RowParallelLinear splits input columns and keeps its bias whole, ReplicatedLinear and norms
are whole on every rank, VocabParallelEmbedding pads the vocabulary to multiples of 64,
FusedMoE stacks the experts and splits each as it would a single MLP.
"""

from dataclasses import replace

from headrace_checkpoint.layouts.rules import (
    Condition,
    Constant,
    Copy,
    Equals,
    Flag,
    Piece,
    Size,
    Split,
    Tensor,
)

Rules = tuple[Tensor | Constant, ...]

LAYER = "model.layers.{layer}"
ATTENTION = f"{LAYER}.self_attn"
MLP = f"{LAYER}.mlp"

HEADS = Split(axis=0, unit="heads")
KV_HEADS = Split(axis=0, unit="kv_heads", replicate=True)
WHOLE_KV_HEADS = Split(axis=0, unit="kv_heads")
"""For classes that cannot have fewer key and value heads than ranks."""
VOCABULARY = Split(axis=0, unit="vocabulary", pad=64)

TIED = Flag("tie_word_embeddings")
TIED_BY_DEFAULT = Flag("tie_word_embeddings", default=True)

EMBEDDING = Tensor(
    "model.embed_tokens.weight",
    (Piece("model.embed_tokens.weight", ("vocabulary", "hidden"), VOCABULARY),),
)

HEAD = Tensor("lm_head.weight", (Piece("lm_head.weight", ("vocabulary", "hidden"), VOCABULARY),))

RECOMPUTED = (
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "rotary_pos_emb.inv_freq",
)
"""Suffixes of tensors that old checkpoints hold and the engine computes."""

SIZES = {
    "hidden": Size("hidden_size"),
    "inner": Size("intermediate_size"),
    "layers": Size("num_hidden_layers"),
    "heads": Size("num_attention_heads"),
    "kv_heads": Size("num_key_value_heads", default=("heads",)),
    "head_dim": Size("head_dim", default=("hidden", "heads")),
    "vocabulary": Size("vocab_size"),
}
EXPLICIT_HEAD_DIM = {"head_dim": Size("head_dim")}
"""For families whose default in transformers is not hidden size / heads."""


def whole(
    name: str,
    *shape: str,
    source: str | None = None,
    sparse: bool | None = None,
    linear: bool = False,
) -> Tensor:
    """A tensor that every rank has whole."""
    return Tensor(name, (Piece(source or name, shape),), sparse=sparse, linear=linear)


def norms(prefix: str, shape: str, *names: str) -> Rules:
    """Norm weights of one size below `prefix`."""
    return tuple(whole(f"{prefix}.{name}.weight", shape) for name in names)


def embedding(tied: Condition) -> Rules:
    """The embedding; tied, vLLM's state dict has it under the smaller of its two names.

    The last pipeline stage has it as its head, the first one under its own name.
    """
    return (
        replace(EMBEDDING, unless=tied),
        replace(EMBEDDING, when=tied, stage="first-not-last"),
        replace(EMBEDDING, name="lm_head.weight", when=tied, stage="last"),
    )


def head(tied: Condition) -> Rules:
    """The final norm and the head of its own where embeddings are not tied."""
    return (whole("model.norm.weight", "hidden"), replace(HEAD, unless=tied))


def on_every_stage(*rules: Tensor) -> Rules:
    """For modules that vLLM builds on every pipeline stage, needed there or not."""
    return tuple(replace(rule, stage="all") for rule in rules)


def embedding_on_every_stage(tied: Condition) -> Rules:
    """The embedding of a class whose stages all have all that is outside of the layers."""
    return on_every_stage(
        replace(EMBEDDING, unless=tied), replace(EMBEDDING, name=HEAD.name, when=tied)
    )


def head_on_every_stage(tied: Condition) -> Rules:
    """The final norm and the head of such a class."""
    return on_every_stage(whole("model.norm.weight", "hidden"), replace(HEAD, unless=tied))


def stored_twice(tied: Condition) -> tuple[Copy, ...]:
    """Tied embeddings that a writer stored under both names."""
    return (Copy("lm_head.weight", "model.embed_tokens.weight", when=tied),)


def qkv(
    kind: str, *columns: str, when: Condition | None = None, kv_heads: Split = KV_HEADS
) -> Tensor:
    """Query, key and value rows below one another, of weights or biases."""
    query, key = ("heads*head_dim", *columns), ("kv_heads*head_dim", *columns)
    pieces = (
        Piece(f"{ATTENTION}.q_proj.{kind}", query, HEADS),
        Piece(f"{ATTENTION}.k_proj.{kind}", key, kv_heads),
        Piece(f"{ATTENTION}.v_proj.{kind}", key, kv_heads),
    )
    linear = kind == "weight"
    return Tensor(f"{ATTENTION}.qkv_proj.{kind}", pieces, when=when, linear=linear)


def rows_parallel(
    name: str,
    split: str,
    rows: str,
    columns: str,
    source: str | None = None,
    sparse: bool | None = None,
) -> Tensor:
    """A weight whose input columns are split in units of `split`."""
    piece = Piece(f"{source or name}.weight", (rows, columns), Split(axis=1, unit=split))
    return Tensor(f"{name}.weight", (piece,), sparse=sparse, linear=True)


def scales(attention: str) -> Rules:
    """The scalars of vLLM's attention layers, 1 where the source holds none."""
    names = ("_k_scale", "_prob_scale", "_q_scale", "_v_scale")
    return tuple(Constant(f"{attention}.{name}", 1.0) for name in names)


_CACHE_SCALES = ("k_scale", "q_scale", "v_scale")
_METHOD = "quantization_config.quant_method"


def cache_scales(attention: str) -> Rules:
    """What two of vLLM's quantization methods have for scales of the cache, without values.

    BaseKVCacheMethod and CompressedTensorsKVCacheMethod create them, and post-processing
    takes them away.
    """
    fp8, compressed = Equals(_METHOD, "fp8"), Equals(_METHOD, "compressed-tensors")
    zero_points = ("k_zero_point", "q_zero_point", "v_zero_point")
    return (
        *(
            Constant(f"{attention}.{name}", -1.0, dtype=None, when=fp8)
            for name in (*_CACHE_SCALES, "prob_scale")
        ),
        *(Constant(f"{attention}.{n}", 1.0, shape=(1,), when=compressed) for n in _CACHE_SCALES),
        *(
            Constant(f"{attention}.{name}", 0.0, dtype=None, shape=(1,), when=compressed)
            for name in zero_points
        ),
    )


def attention(kv_heads: Split = KV_HEADS) -> Rules:
    """Grouped-query attention without biases."""
    return (
        qkv("weight", "hidden", kv_heads=kv_heads),
        rows_parallel(f"{ATTENTION}.o_proj", "heads", "hidden", "heads*head_dim"),
        *scales(f"{ATTENTION}.attn"),
        *cache_scales(f"{ATTENTION}.attn"),
    )


def mlp(
    target: str = MLP,
    source: str = MLP,
    inner: str = "inner",
    split: str = "inner",
    sparse: bool | None = None,
) -> Rules:
    """Gate and up rows below one another, and the down projection, in units of `split`."""
    rows = Split(axis=0, unit=split)
    gate_up = (
        Piece(f"{source}.gate_proj.weight", (inner, "hidden"), rows),
        Piece(f"{source}.up_proj.weight", (inner, "hidden"), rows),
    )
    return (
        Tensor(f"{target}.gate_up_proj.weight", gate_up, sparse=sparse, linear=True),
        rows_parallel(f"{target}.down_proj", split, "hidden", inner, f"{source}.down_proj", sparse),
    )


def experts(
    module: str, inner: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> Rules:
    """All experts of a layer: gate and up stacked, down stacked, in units of `inner`."""
    rows, columns = Split(axis=0, unit=inner), Split(axis=1, unit=inner)
    one = f"{module}.{{index}}"
    gate_up = (
        Piece(f"{one}.{gate}.weight", (inner, "hidden"), rows),
        Piece(f"{one}.{up}.weight", (inner, "hidden"), rows),
    )
    down_piece = (Piece(f"{one}.{down}.weight", ("hidden", inner), columns),)
    routed = f"{module}.routed_experts"
    return (
        Tensor(f"{routed}.w13_weight", gate_up, sparse=True, stack="experts", linear=True),
        Tensor(f"{routed}.w2_weight", down_piece, sparse=True, stack="experts", linear=True),
    )
