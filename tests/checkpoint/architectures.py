"""What is compared with vLLM: tiny models of every architecture, and how each is cut."""

from dataclasses import dataclass

from .quantized_models import CONFIGS

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
_WIDE = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "head_dim": 128,
}
"""Wide enough for blocks of 128 at 8 ranks."""

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
    "gpt-oss": (
        "GptOss",
        {
            "num_key_value_heads": 4,
            "head_dim": 32,
            "intermediate_size": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 32,
        },
    ),
    "llama-wide": ("Llama", _WIDE),
    "qwen3-wide": ("Qwen3", _WIDE),
    "qwen3-moe-wide": (
        "Qwen3Moe",
        _WIDE
        | {
            "num_hidden_layers": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 512,
        },
    ),
    "deepseek-v3-wide": (
        "DeepseekV3",
        _WIDE
        | {
            "num_hidden_layers": 2,
            "num_key_value_heads": 8,
            "q_lora_rank": 128,
            "kv_lora_rank": 128,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 64,
            "v_head_dim": 64,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 512,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "num_nextn_predict_layers": 1,
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
    """One checkpoint made by both sides; `form` is of quantized_models.CONFIGS."""

    model: str
    tp: int
    dtype: str = "auto"
    form: str = ""
    pp: int = 1
    ep: int = 1
    quantization: str = "none"

    @property
    def architecture(self):
        """The model's class."""
        family = "Llama" if self.model in LLAMAS else OTHERS[self.model][0]
        return f"{family}ForCausalLM"

    @property
    def source(self):
        """The name of the model's directory."""
        return f"{self.model}-{self.form}" if self.form else self.model

    @property
    def format(self):
        """What docs/architectures.md calls the element types."""
        return "fp8" if self.quantization == "fp8" else self.form

    @property
    def online(self):
        """What vLLM is told to make of the unquantized model."""
        return "fp8_per_channel" if self.quantization == "fp8" else None

    def __str__(self):
        extra = f"-pp{self.pp}" if self.pp > 1 else ""
        extra += f"-ep{self.ep}" if self.ep > 1 else ""
        extra += "-quantized" if self.quantization != "none" else ""
        return f"{self.source}-tp{self.tp}{extra}-{self.dtype}"


DENSE = [name for name in OTHERS if not name.endswith(("-tied", "-wide"))]
PLAIN = [
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
    *(Case(name, tp) for name in DENSE for tp in (1, 2, 4)),
    *(Case(name, 8) for name in ("mistral", "mixtral", "qwen3-moe", "deepseek-v3")),
]
FORMATS = [
    *(Case("llama-wide", tp, form=form) for form in CONFIGS for tp in (1, 2, 4)),
    *(Case("qwen3-wide", tp, form="fp8-block") for tp in (1, 2, 4, 8)),
    *(Case("qwen3-wide", 2, form=form) for form in ("ct-fp8-channel", "gptq", "awq")),
    *(
        Case(model, tp, form=form)
        for model in ("qwen3-moe-wide", "deepseek-v3-wide")
        for form in ("fp8-block", "fp8-tensor-static", "ct-fp8-channel")
        for tp in (1, 2, 4)
    ),
    *(Case("qwen3-moe-wide", 2, form=form) for form in ("fp8-tensor", "ct-fp8-block")),
    *(Case("llama-wide", tp, quantization="fp8") for tp in (1, 2, 4)),
    Case("qwen2", 2, quantization="fp8"),
    Case("odd", 2, dtype="float16", quantization="fp8"),
]
SPLITS = [
    Case("plain", 1, pp=2),
    Case("tied", 2, pp=2),
    Case("odd", 1, pp=2),
    Case("gemma2", 2, pp=2),
    *(Case(name, 1, pp=2) for name in ("mistral", "qwen2", "qwen2-tied", "qwen3", "qwen3-tied")),
    *(Case(name, 1, pp=2) for name in ("gemma", "gemma3", "mixtral", "deepseek-v2", "gpt-oss")),
    Case("qwen3-moe-wide", 1, form="fp8-block", pp=2),
    Case("mixtral", 2, ep=2),
    Case("odd", 1, pp=3),
    Case("mixtral", 2, pp=2, ep=2),
    Case("qwen3-moe", 4, ep=4),
    Case("gpt-oss", 2, ep=2),
    Case("deepseek-v3", 1, pp=2),
    Case("deepseek-v3", 2, ep=2),
    Case("deepseek-v3-wide", 2, form="fp8-block", ep=2),
]
"""Pipeline and expert parallelism."""

CASES = [*PLAIN, *FORMATS, *SPLITS]
