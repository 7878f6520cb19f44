"""The load format "headrace" of SGLang: parameters are views of memory the loader holds."""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.model_loader.loader import (
    BaseModelLoader,
    DefaultModelLoader,
    _initialize_model,
)
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.srt.runtime_context import get_exec, get_model, get_parallel
from torch import nn

from headrace_engine.errors import Unsupported, WeightsMismatch
from headrace_engine.meta import WeightsOnMeta
from headrace_engine.plugins import (
    Settings,
    attached,
    check_checkpoint,
    fill,
    refuse_reloading,
)
from headrace_engine.weights import PrivateCopy, Weights

if TYPE_CHECKING:
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig

_LOG = logging.getLogger("sglang.headrace")

ARCHITECTURES = frozenset(
    {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    }
)
"""Those whose tensors in a checkpoint are SGLang's own, bit for bit: tests/sglang/test_sglang.py.

A tensor of equal shape whose rows are in another order cannot be told otherwise.
"""

_RENAMED = (
    (".experts.routed_experts.", ".experts."),
    (".mlp.experts.gate.", ".mlp.gate."),
)
"""Modules that vLLM has and SGLang has not."""

_OTHER_LAYOUTS = (
    "load_up_proj_weight_first",
    "use_triton_kernels",
    "use_flashinfer_trtllm_moe",
)
"""Attributes of methods that load experts the other way round or transposed, or permute them."""

_VLLM_SCALE = re.compile(r"\.attn\._(q|k|v|prob)_scale$")


class HeadraceModelLoader(BaseModelLoader):
    """Attaches to the loader of this pod in place of reading a checkpoint."""

    def __init__(self, load_config: "LoadConfig") -> None:
        super().__init__(load_config)
        self._settings = Settings.parse(load_config.model_loader_extra_config)

    def download_model(self, model_config: "ModelConfig") -> None:
        """Do nothing: configuration and tokenizer are local, weights are in memory."""

    def load_model(
        self, *, model_config: "ModelConfig", device_config: "DeviceConfig"
    ) -> nn.Module:
        """Build the model over the resident weights."""
        _check_features(model_config)
        device = _device(device_config.device_type)
        weights = attached(self._settings, get_parallel().tp_rank, device, _LOG)
        check_checkpoint(model_config.model_path, weights, _LOG)
        with set_default_torch_dtype(model_config.dtype):
            with device, WeightsOnMeta():
                model = _initialize_model(model_config, self.load_config)
            _check_layouts(model)
            fill(
                model,
                lambda: as_sglang_names(weights),
                lambda: DefaultModelLoader.postprocess_weights(model, device),
                device=device,
                engine="SGLang",
                logger=_LOG,
            )
        self.preloaded_weights_bytes = weights.allocated_bytes
        model.load_weights = refuse_reloading
        return model.eval()


def wait_for_weights(*, device: str, is_draft_worker: bool) -> None:
    """Attach before SGLang measures the memory that is free: what it counts is resident then."""
    if not is_draft_worker:
        settings = Settings.parse(_extra_config())
        attached(settings, get_parallel().tp_rank, _device(device), _LOG)


def as_sglang_names(weights: Weights) -> tuple[dict[str, torch.Tensor], list[PrivateCopy]]:
    """Return tensors and private copies by the names of SGLang's modules.

    vLLM's attention scales are left out: without a quantized KV cache they are ones that SGLang
    does not have.
    """
    names = {name: _renamed(name) for name in weights if not _VLLM_SCALE.search(name)}
    _refuse_scales({name: weights[name] for name in weights.keys() - names.keys()})
    tensors = {new: weights[old] for old, new in names.items()}
    copies = [
        dataclasses.replace(copy, name=names[copy.name])
        for copy in weights.copies
        if copy.name in names
    ]
    return tensors, copies


def _renamed(name: str) -> str:
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name


def _refuse_scales(scales: Mapping[str, torch.Tensor]) -> None:
    if scales and not bool((torch.stack(list(scales.values())) == 1).all()):
        other = min(name for name, scale in scales.items() if scale.item() != 1)
        raise WeightsMismatch(
            f"{other} is {scales[other].item()}: attention scales other than 1 are vLLM's alone; "
            "shard a model without KV cache scales"
        )


def _check_features(model_config: "ModelConfig") -> None:
    """Refuse what would cut, read, move or rewrite weights otherwise than the checkpoint has them.

    Sizes of other groups of ranks than tensor parallel ones change shapes, or which rank has what.
    """
    parallel, execution = get_parallel(), get_exec()
    architectures = set(model_config.hf_config.architectures or ())
    unproven = architectures - ARCHITECTURES
    refusals = {
        f"architecture {', '.join(sorted(unproven)) or None} (known are "
        f"{', '.join(sorted(ARCHITECTURES))})": not architectures or bool(unproven),
        f"quantization {model_config.quantization}": model_config.quantization is not None,
        "a speculative draft model (set its own load format)": model_config.is_draft_model,
        "pipeline parallelism": parallel.pp_size > 1,
        "expert parallelism": parallel.ep_size > 1,
        "data parallel attention or experts": max(parallel.attn_dp_size, parallel.moe_dp_size) > 1,
        "context parallelism": max(parallel.attn_cp_size, parallel.dcp_size) > 1,
        "expert placement (EPLB)": (
            execution.moe.enable_eplb or execution.moe.init_expert_location != "trivial"
        ),
        "offloading weights": (
            execution.offload.cpu_offload_gb > 0
            or execution.offload.offload_group_size > 0
            or execution.moe.enable_paged_experts
        ),
        "the memory saver": execution.features.enable_memory_saver,
    }
    refused = [feature for feature, wanted in refusals.items() if wanted]
    if refused:
        raise Unsupported(f"--load-format headrace does not support {', '.join(refused)}")


def _check_layouts(model: nn.Module) -> None:
    """Refuse kernels that have experts in a layout of their own, in shapes that may be equal."""
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        found = [flag for flag in _OTHER_LAYOUTS if getattr(method, flag, False)]
        if found:
            raise Unsupported(
                f"--load-format headrace: {name}: {type(method).__name__} has experts in a layout "
                f"of its own ({', '.join(found)}); choose --moe-runner-backend triton"
            )


def _device(name: str) -> torch.device:
    """With its index: SGLang's staging copies weights that are on cuda:0 and not on cuda."""
    if name == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def _extra_config() -> dict[str, Any] | None:
    extra = get_model().model_loader_extra_config
    return json.loads(extra) if isinstance(extra, str) else extra
