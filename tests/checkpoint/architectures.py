"""What is compared with vLLM: tiny models of every architecture, and how each is cut."""

from dataclasses import dataclass

LLAMAS = {
    "plain": {},
    "eight-heads": {"heads": 8, "layers": 1, "vocab_size": 70},
    "tied": {"tied": True},
    "tied-stored-twice": {"tied": True, "layers": 1},
    "one-kv-head": {"kv_heads": 1, "layers": 1},
    "odd": {
        "vocab_size": 70,
        "intermediate_size": 516,
        "attention_bias": True,
        "mlp_bias": True,
        "layers": 3,
    },
    "float32": {"dtype": "float32", "layers": 1},
}
"""Fields of tiny_llama.Size."""

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 70,
    "max_position_embeddings": 128,
}
_LATENT = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
}
OTHERS = {
    "mistral": ("Mistral", {"head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", {"head_dim": 16}),
    "gemma3": ("Gemma3", {"head_dim": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "num_hidden_layers": 4,
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
        },
    ),
    "deepseek-v2": (
        "DeepseekV2",
        _LATENT | {"q_lora_rank": None, "topk_method": "greedy", "moe_layer_freq": 1},
    ),
    "deepseek-v3": (
        "DeepseekV3",
        _LATENT
        | {
            "q_lora_rank": 48,
            "n_group": 2,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "num_nextn_predict_layers": 1,
        },
    ),
}
"""The family's name in transformers, and fields of its configuration beside COMMON."""


@dataclass(frozen=True)
class Case:
    """One checkpoint made by both sides."""

    model: str
    tp: int
    dtype: str = "auto"

    @property
    def architecture(self):
        """The model's class."""
        family = "Llama" if self.model in LLAMAS else OTHERS[self.model][0]
        return f"{family}ForCausalLM"

    def __str__(self):
        return f"{self.model}-tp{self.tp}-{self.dtype}"


CASES = [
    Case("plain", 1),
    Case("plain", 2),
    Case("plain", 4),
    Case("plain", 1, "float16"),
    Case("eight-heads", 8),
    Case("tied", 1),
    Case("tied", 2),
    Case("tied-stored-twice", 2),
    Case("one-kv-head", 2),
    Case("odd", 2),
    Case("odd", 4),
    Case("float32", 2),
    Case("float32", 1, "float32"),
    Case("float32", 1, "float16"),
    Case("qwen2-tied", 2),
    Case("qwen3-tied", 2),
    *(Case(name, tp) for name in OTHERS if not name.endswith("-tied") for tp in (1, 2, 4)),
    *(Case(name, 8) for name in ("mistral", "mixtral", "qwen3-moe", "deepseek-v3")),
]
