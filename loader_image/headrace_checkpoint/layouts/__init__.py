"""Layout tables: where each engine tensor comes from and how ranks share it, as data."""

from headrace_checkpoint.layouts import llama
from headrace_checkpoint.layouts.rules import Architecture

VLLM: dict[str, Architecture] = {
    architecture.name: architecture for architecture in (llama.LLAMA_FOR_CAUSAL_LM,)
}
"""Layout `vllm`: the state dict of vLLM after weight loading, before post-processing."""

LAYOUTS: dict[str, dict[str, Architecture]] = {"vllm": VLLM}
