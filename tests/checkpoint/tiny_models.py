"""Makes tiny random models of any family with transformers' own classes.

Those define the tensors and their names; every element is random, so that no two tensors
are the same. For vllm_truth.py alone: transformers and torch take long to import.
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file


def make_model(family: str, fields: dict, directory: Path) -> None:
    """Write config.json and model.safetensors in bfloat16."""
    text = "Text" if family == "Gemma3" else ""
    config = getattr(transformers, f"{family}{text}Config")(**fields)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_()
    model.save_pretrained(directory)
    if family.startswith("Gemma"):
        _leave_to_default(directory / "config.json", "tie_word_embeddings")
    if family == "DeepseekV3":
        _complete_deepseek(directory / "model.safetensors", config)


def _leave_to_default(path: Path, field: str) -> None:
    """Remove a field that the family's publisher leaves out."""
    config = json.loads(path.read_text())
    del config[field]
    path.write_text(json.dumps(config))


def _complete_deepseek(path: Path, config: transformers.PretrainedConfig) -> None:
    """Add what DeepSeek publishes and transformers leaves out: a layer that predicts ahead.

    The router's correction is float32 there.
    """
    tensors = load_file(path)
    last = f"model.layers.{config.num_hidden_layers - 1}."
    ahead = f"model.layers.{config.num_hidden_layers}."
    for name in [name for name in tensors if name.startswith(last)]:
        if name.endswith("e_score_correction_bias"):
            tensors[name] = torch.randn(tensors[name].shape)
        tensors[name.replace(last, ahead)] = tensors[name].clone()
    hidden = config.hidden_size
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{ahead}{name}.weight"] = torch.randn(hidden, dtype=torch.bfloat16)
    tensors[f"{ahead}eh_proj.weight"] = torch.randn(hidden, 2 * hidden, dtype=torch.bfloat16)
    for name in ("embed_tokens", "shared_head.head"):
        tensors[f"{ahead}{name}.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
