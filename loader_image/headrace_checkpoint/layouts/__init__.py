"""Layout tables: where each engine tensor comes from and how ranks share it, as data."""

from headrace_checkpoint.layouts import dense, mixtures
from headrace_checkpoint.layouts.rules import Architecture

VLLM: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        dense.LLAMA,
        dense.MISTRAL,
        dense.QWEN2,
        dense.QWEN3,
        dense.GEMMA,
        dense.GEMMA2,
        dense.GEMMA3,
        mixtures.MIXTRAL,
        mixtures.QWEN3_MOE,
        mixtures.DEEPSEEK_V2,
        mixtures.DEEPSEEK_V3,
        mixtures.GPT_OSS,
    )
}
"""Layout `vllm`: the state dict of vLLM after weight loading, before post-processing."""

LAYOUTS: dict[str, dict[str, Architecture]] = {"vllm": VLLM}
