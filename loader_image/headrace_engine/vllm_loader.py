"""The load format "headrace" of vLLM: parameters are views of memory the loader holds."""

import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.utils import (
    initialize_model,
    process_weights_after_loading,
)
from vllm.utils.torch_utils import set_default_torch_dtype

from headrace_engine.errors import Unsupported
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
    from vllm.config import ModelConfig, VllmConfig
    from vllm.config.load import LoadConfig

# A child of vLLM's own logger, the only one its configuration prints.
_LOG = logging.getLogger("vllm.headrace")


class HeadraceModelLoader(BaseModelLoader):
    """Attaches to the loader of this pod in place of reading a checkpoint."""

    def __init__(self, load_config: "LoadConfig") -> None:
        super().__init__(load_config)
        self._settings = Settings.parse(load_config.model_loader_extra_config)

    def download_model(self, model_config: "ModelConfig") -> None:
        """Do nothing: configuration and tokenizer are local, weights are in memory."""

    def load_weights(self, model: nn.Module, model_config: "ModelConfig") -> None:  # noqa: ARG002
        """Refuse: the weights in memory are read-only and cannot be loaded into tensors."""
        refuse_reloading()

    def get_external_weight_memory(self, vllm_config: "VllmConfig") -> int:
        """Bytes the loader holds on this worker's device; waits until they are resident."""
        return self._weights(vllm_config).allocated_bytes

    def load_model(
        self, vllm_config: "VllmConfig", model_config: "ModelConfig", prefix: str = ""
    ) -> nn.Module:
        """Build the model over the resident weights."""
        _check_features(vllm_config, model_config)
        weights = self._weights(vllm_config)
        check_checkpoint(model_config.model, weights, _LOG)
        _tie_again(model_config, weights)
        device = self._device(vllm_config)
        with set_default_torch_dtype(model_config.dtype):
            with device, WeightsOnMeta():
                model = initialize_model(
                    vllm_config=vllm_config, model_config=model_config, prefix=prefix
                )
            fill(
                model,
                lambda: _with_copies(model, model_config, weights),
                lambda: process_weights_after_loading(model, model_config, device),
                device=device,
                engine="vLLM",
                logger=_LOG,
            )
        model.load_weights = refuse_reloading
        return model.eval()

    def _device(self, vllm_config: "VllmConfig") -> torch.device:
        return torch.device(self.load_config.device or vllm_config.device_config.device)

    def _weights(self, vllm_config: "VllmConfig") -> Weights:
        rank = get_tensor_model_parallel_rank()
        return attached(self._settings, rank, self._device(vllm_config), _LOG)


def _check_features(vllm_config: "VllmConfig", model_config: "ModelConfig") -> None:
    """Refuse what would read, move or rewrite weights behind the loader's back."""
    parallel = vllm_config.parallel_config
    refusals = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "expert parallelism": parallel.enable_expert_parallel,
        "a speculative draft model (set its own load format)": (
            model_config is not vllm_config.model_config
        ),
        f"quantization {model_config.quantization} of a model that is not quantized "
        "(spec.model.quantization shards one as FP8)": (
            model_config.quantization is not None
            and getattr(model_config.hf_config, "quantization_config", None) is None
        ),
        "sleep mode": bool(model_config.enable_sleep_mode),
        "offloading weights to the CPU": _offloads(vllm_config),
        "weight transfer": getattr(vllm_config, "weight_transfer_config", None) is not None,
    }
    refused = [feature for feature, wanted in refusals.items() if wanted]
    if refused:
        raise Unsupported(f"--load-format headrace does not support {', '.join(refused)}")


def _offloads(vllm_config: "VllmConfig") -> bool:
    offload = vllm_config.offload_config
    return offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0


def _with_copies(
    model: nn.Module, model_config: "ModelConfig", weights: Weights
) -> tuple[Mapping[str, torch.Tensor], list[PrivateCopy]]:
    """Return the weights, private where a quantization may write to them, and the copies.

    vLLM replaces most of these by repacked ones anyway, which are private, too.
    """
    if model_config.quantization is None or _is_fp8_per_channel(model_config):
        return weights, weights.copies
    views = weights.keys() - {copy.name for copy in weights.copies}
    copied: dict[str, torch.Tensor] = {}
    copies = list(weights.copies)
    for path, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is None or type(method).__name__.startswith("Unquantized"):
            continue
        reason = f"{type(method).__name__} may write to weights while it processes them"
        for name, _ in module.named_parameters(prefix=path, recurse=False):
            if name in views:
                copied[name] = weights[name].clone()
                copies.append(PrivateCopy(name, copied[name].nbytes, reason))
    return {**weights, **copied}, copies


def _is_fp8_per_channel(model_config: "ModelConfig") -> bool:
    """Whether post-processing leaves quantized weights where they are: it only transposes views.

    FP8 per tensor is quantized anew in place where matrices are fused, integers are repacked.
    """
    found = getattr(model_config.hf_config, "quantization_config", None)
    groups = found.get("config_groups") if isinstance(found, dict) else None
    weights = [group["weights"] for group in groups.values()] if groups else []
    return bool(weights) and all(
        (one["type"], one["num_bits"], one["strategy"]) == ("float", 8, "channel")
        for one in weights
    )


def _tie_again(model_config: "ModelConfig", names: Collection[str]) -> None:
    """Build tied embeddings as tied where vLLM decided against it.

    vLLM unties them when the files hold an lm_head, to find out whether it is another
    tensor. A checkpoint stores tied embeddings once, under that very name: without a tensor
    for the embedding there is nothing to find out.
    """
    untied = getattr(model_config, "word_embeddings_untied_by_checkpoint", False)
    if not untied or any(name.endswith("embed_tokens.weight") for name in names):
        return
    for config in (model_config.hf_config, model_config.hf_config.get_text_config()):
        config.tie_word_embeddings = True
    model_config.word_embeddings_untied_by_checkpoint = False
