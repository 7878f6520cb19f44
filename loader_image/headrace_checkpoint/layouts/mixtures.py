"""Decoders with experts: Mixtral, Qwen3-MoE, DeepSeek-V2 and -V3, GPT-OSS, as vLLM has them."""

from dataclasses import replace

from headrace_checkpoint.layouts.blocks import (
    ATTENTION,
    EMBEDDING,
    EXPLICIT_HEAD_DIM,
    HEAD,
    HEADS,
    LAYER,
    MLP,
    RECOMPUTED,
    SIZES,
    TIED,
    WHOLE_KV_HEADS,
    Rules,
    attention,
    embedding_on_every_stage,
    experts,
    head_on_every_stage,
    mlp,
    norms,
    on_every_stage,
    qkv,
    rows_parallel,
    scales,
    whole,
)
from headrace_checkpoint.layouts.dense import LLAMA
from headrace_checkpoint.layouts.rules import (
    Architecture,
    Constant,
    DroppedLayers,
    Equals,
    Given,
    Piece,
    Size,
    SparseLayers,
    Split,
    Tensor,
)

_NORMS = norms(LAYER, "hidden", "input_layernorm", "post_attention_layernorm")
_MIXTRAL_MOE = f"{LAYER}.block_sparse_moe"

MIXTRAL = replace(
    LLAMA,
    name="MixtralForCausalLM",
    before_layers=embedding_on_every_stage(TIED),
    after_layers=head_on_every_stage(TIED),
    sizes=SIZES | {"experts": Size("num_local_experts")},
    per_layer=(
        *attention(),
        whole(f"{_MIXTRAL_MOE}.gate.weight", "experts", "hidden"),
        *experts(f"{_MIXTRAL_MOE}.experts", "inner", gate="w1", up="w3", down="w2"),
        *_NORMS,
    ),
    sparse_layers=SparseLayers(),
)

_ROUTER = whole(
    f"{MLP}.experts.gate.weight", "experts", "hidden", source=f"{MLP}.gate.weight", sparse=True
)
"""The experts module holds the router, and vLLM's state dict has it under that name."""

_QWEN_ROUTER = replace(_ROUTER, linear=True)
"""The one router that vLLM quantizes, unless config.json says otherwise, as publishers do."""

QWEN3_MOE = replace(
    LLAMA,
    name="Qwen3MoeForCausalLM",
    before_layers=embedding_on_every_stage(TIED),
    after_layers=head_on_every_stage(TIED),
    sizes=SIZES
    | EXPLICIT_HEAD_DIM
    | {
        "experts": Size("num_experts", alias="num_local_experts"),
        "expert_inner": Size("moe_intermediate_size"),
    },
    per_layer=(
        *attention(),
        *norms(ATTENTION, "head_dim", "q_norm", "k_norm"),
        *mlp(sparse=False),
        _QWEN_ROUTER,
        *experts(f"{MLP}.experts", "expert_inner"),
        *_NORMS,
    ),
    sparse_layers=SparseLayers(step="decoder_sparse_step", offset=1, dense="mlp_only_layers"),
)

_LOW_RANK_QUERY = Given("q_lora_rank")
_LATENT = f"{ATTENTION}.mla_attn"
_QUERY_ROWS = "heads*nope+heads*rope"
_LATENT_ROWS = Piece(f"{ATTENTION}.kv_a_proj_with_mqa.weight", ("kv_rank+rope", "hidden"))


def _latent_attention() -> Rules:
    """Multi-head latent attention, with a low-rank query where q_lora_rank is given."""
    query = Piece(f"{ATTENTION}.q_proj.weight", (_QUERY_ROWS, "hidden"), HEADS)
    query_a = Piece(f"{ATTENTION}.q_a_proj.weight", ("q_rank", "hidden"))
    query_norm = Piece(f"{ATTENTION}.q_a_layernorm.weight", ("q_rank",))
    query_b = Piece(f"{ATTENTION}.q_b_proj.weight", (_QUERY_ROWS, "q_rank"), HEADS)
    key_value_b = Piece(
        f"{ATTENTION}.kv_b_proj.weight", ("heads*nope+heads*value", "kv_rank"), HEADS
    )
    low, full = _LOW_RANK_QUERY, _LATENT_ROWS
    return (
        Tensor(f"{ATTENTION}.fused_qkv_a_proj.weight", (query_a, full), when=low, linear=True),
        Tensor(f"{_LATENT}.q_a_layernorm.weight", (query_norm,), when=low),
        Tensor(f"{_LATENT}.q_b_proj.weight", (query_b,), when=low, linear=True),
        Tensor(f"{_LATENT}.q_proj.weight", (query,), unless=low, linear=True),
        Tensor(f"{ATTENTION}.kv_a_proj_with_mqa.weight", (full,), unless=low, linear=True),
        whole(f"{ATTENTION}.kv_a_layernorm.weight", "kv_rank"),
        Tensor(f"{ATTENTION}.kv_b_proj.weight", (key_value_b,), linear=True),
        rows_parallel(f"{_LATENT}.o_proj", "heads", "hidden", "heads*value", f"{ATTENTION}.o_proj"),
        *scales(f"{_LATENT}.mla_attn"),
    )


DEEPSEEK_V3 = Architecture(
    name="DeepseekV3ForCausalLM",
    sizes={
        **{name: SIZES[name] for name in ("hidden", "inner", "layers", "heads", "vocabulary")},
        "q_rank": Size("q_lora_rank", default=("hidden",)),
        "kv_rank": Size("kv_lora_rank"),
        "nope": Size("qk_nope_head_dim"),
        "rope": Size("qk_rope_head_dim"),
        "value": Size("v_head_dim"),
        "experts": Size("n_routed_experts"),
        "expert_inner": Size("moe_intermediate_size"),
        "shared": Size("n_shared_experts"),
    },
    before_layers=(EMBEDDING,),
    per_layer=(
        *_latent_attention(),
        *mlp(sparse=False),
        _ROUTER,
        Tensor(
            f"{MLP}.experts.gate.e_score_correction_bias",
            (Piece(f"{MLP}.gate.e_score_correction_bias", ("experts",)),),
            when=Equals("topk_method", "noaux_tc"),
            sparse=True,
            dtype="F32",
        ),
        *experts(f"{MLP}.experts", "expert_inner"),
        *mlp(
            f"{MLP}.experts._shared_experts._layer",
            f"{MLP}.shared_experts",
            inner="shared*expert_inner",
            split="expert_inner",
            sparse=True,
        ),
        *_NORMS,
    ),
    after_layers=(whole("model.norm.weight", "hidden"), HEAD),
    ignored=RECOMPUTED,
    sparse_layers=SparseLayers(first="first_k_dense_replace", step="moe_layer_freq"),
    dropped_layers=DroppedLayers(f"{LAYER}.", count="num_nextn_predict_layers"),
)

DEEPSEEK_V2 = replace(DEEPSEEK_V3, name="DeepseekV2ForCausalLM")


_EXPERTS = f"{MLP}.experts"
_EXPERT_ROWS = Split(axis=0, unit="inner")
_EXPERT_COLUMNS = Split(axis=1, unit="inner")


def _gpt_oss_experts() -> Rules:
    """All experts of a layer, of sources that hold them stacked; gate and up take turns there.

    The down projection's bias is added after the sum over ranks, so rank 0 alone has it.
    """
    both = "inner+inner"
    sources = {
        "w13_weight": Piece("gate_up_proj", ("hidden", both), _EXPERT_COLUMNS, transposed=True),
        "w13_bias": Piece("gate_up_proj_bias", (both,), _EXPERT_ROWS),
        "w2_weight": Piece("down_proj", ("inner", "hidden"), _EXPERT_ROWS, transposed=True),
        "w2_bias": Piece("down_proj_bias", ("hidden",), on_first_rank=True),
    }
    return tuple(
        Tensor(
            f"{_EXPERTS}.routed_experts.{name}",
            (replace(piece, source=f"{_EXPERTS}.{piece.source}", stacked=True),),
            sparse=True,
            stack="experts",
        )
        for name, piece in sources.items()
    )


def _in_attn(*rules: Tensor | Constant) -> Rules:
    """Attention in a module that vLLM names attn, of a class without quantized formats."""
    renamed = (replace(r, name=r.name.replace(".self_attn.", ".attn.")) for r in rules)
    return tuple(replace(r, linear=False) if isinstance(r, Tensor) else r for r in renamed)


GPT_OSS = Architecture(
    name="GptOssForCausalLM",
    sizes=SIZES | EXPLICIT_HEAD_DIM | {"experts": Size("num_local_experts")},
    before_layers=on_every_stage(replace(EMBEDDING, name="model.embedding.weight")),
    per_layer=(
        *_in_attn(
            *attention(kv_heads=WHOLE_KV_HEADS),
            qkv("bias", kv_heads=WHOLE_KV_HEADS),
            whole(f"{ATTENTION}.o_proj.bias", "hidden"),
            Tensor(f"{ATTENTION}.sinks", (Piece(f"{ATTENTION}.sinks", ("heads",), HEADS),)),
        ),
        whole(f"{MLP}.router.weight", "experts", "hidden"),
        whole(f"{MLP}.router.bias", "experts"),
        *_gpt_oss_experts(),
        *_NORMS,
    ),
    after_layers=on_every_stage(whole("model.norm.weight", "hidden"), HEAD),
    ignored=RECOMPUTED,
    sparse_layers=SparseLayers(),
)
