"""Builds vLLM models over resident weights, without the engine around: a script.

    python build.py REQUEST_JSON

The request is a list of {"model", "socket", ...}; "changes" are made to the model's
configuration, "like" is a model that vLLM's own loader reads, to be compared, further keys are
engine arguments. Prints a list of findings as JSON after the marker FOUND: an error, or what the
model is made of.
"""

import json
import sys
import tempfile

import torch
from mapped import is_shared
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader

from headrace_engine import plugins
from headrace_engine.errors import Unsupported


class LargestAllocation(TorchDispatchMode):
    """Remembers the largest tensor with memory that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta and not is_shared(result):
            self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return result


def imitated_quant(output, values, scale, _group_shape):
    """What vLLM's kernel for CUDA does of the name; its build for CPUs has none."""
    limit = torch.finfo(output.dtype).max
    output.copy_((values.float() / scale).clamp(-limit, limit).to(output.dtype))


def configured(**arguments) -> VllmConfig:
    return EngineArgs(enforce_eager=True, max_model_len=128, **arguments).create_engine_config()


def differing(model: torch.nn.Module, job: dict) -> list[str]:
    """Names of parameters that are not, bit for bit, what vLLM's own loader makes."""
    config = configured(**job)
    with set_current_vllm_config(config):
        loader = get_model_loader(config.load_config)
        expected = dict(loader.load_model(config, config.model_config).named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    return [name for name in found if bits(found[name]) != bits(expected[name])]


def bits(tensor: torch.Tensor) -> tuple:
    flat = tensor.detach().contiguous().flatten()
    return tensor.dtype, tensor.shape, tensor.stride(), flat.view(torch.uint8).numpy().tobytes()


def attempt_reload(model: torch.nn.Module) -> str:
    try:
        model.load_weights(iter(()))
    except Unsupported as error:
        return str(error)
    return "loaded"


def build(job: dict) -> dict:
    socket, changes, like = job.pop("socket"), job.pop("changes", {}), job.pop("like", None)
    arguments = {"load_format": "headrace", "model_loader_extra_config": {"socket": socket}}
    config = configured(**arguments, **job)
    for name, value in changes.items():
        setattr(config.model_config, name, value)
    plugins._attached.clear()
    with set_current_vllm_config(config):
        loader = get_model_loader(config.load_config)
        external = loader.get_external_weight_memory(config)
        with LargestAllocation() as largest:
            model = loader.load_model(config, config.model_config)
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    linear = next(model.model.layers[0].self_attn.o_proj.parameters())
    rotary = model.model.layers[0].self_attn.rotary_emb
    cache = rotary._compute_cos_sin_cache().to(rotary.cos_sin_cache.dtype)
    return {
        "external": external,
        "linear": [str(linear.dtype), bool(linear.numel()) and is_shared(linear)],
        "largest": largest.nbytes,
        "embedding_shared": is_shared(embedding),
        "norm_shared": is_shared(model.model.norm.weight),
        "tied": head is embedding or head.data_ptr() == embedding.data_ptr(),
        "rotary_right": bool(torch.equal(cache, rotary.cos_sin_cache)),
        "scale": model.model.layers[0].self_attn.attn._k_scale.item(),
        "attributes_kept": hasattr(embedding, "weight_loader") and embedding.output_dim == 0,
        "training": model.training,
        "reloaded": attempt_reload(model),
        "differing": differing(model, job | {"model": like}) if like else None,
    }


def attempt(job: dict) -> dict:
    try:
        return build(job)
    except Exception as error:  # noqa: BLE001 - any failure is a finding
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    torch.ops._C.static_scaled_fp8_quant = imitated_quant
    with tempfile.TemporaryDirectory() as directory:
        config = EngineArgs(model=json.loads(sys.argv[1])[0]["model"]).create_engine_config()
        with set_current_vllm_config(config):
            parallel_state.init_distributed_environment(
                1, 0, f"file://{directory}/rendezvous", 0, backend="gloo"
            )
            parallel_state.initialize_model_parallel(1)
            found = [attempt(job) for job in json.loads(sys.argv[1])]
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()
    sys.stdout.write(f"FOUND {json.dumps(found)}\n")
