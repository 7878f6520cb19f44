"""The load format "headrace" of vLLM: parameters are views of memory the loader holds."""

import dataclasses
import faulthandler
import hashlib
import logging
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.utils import (
    initialize_model,
    process_weights_after_loading,
)
from vllm.utils.torch_utils import set_default_torch_dtype

from headrace_engine.assign import assign, refuse_meta_tensors
from headrace_engine.copies import log_copies, private_bytes, replaced_by_processing
from headrace_engine.errors import SettingsInvalid, Unsupported, WeightsMismatch
from headrace_engine.meta import WeightsOnMeta
from headrace_engine.weights import DEFAULT_TIMEOUT, Weights, attach
from headrace_handover import Loading

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.config.load import LoadConfig

# A child of vLLM's own logger, the only one its configuration prints.
_LOG = logging.getLogger("vllm.headrace")
_PROGRESS_SECONDS = 5.0
_MANIFEST = "manifest.json"

_attached: dict[tuple[str, int, str], Weights] = {}
"""Attachments of this process. Kept until it ends: its weights and lease live in them."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """--model-loader-extra-config: path of the socket, seconds to wait for weights."""

    socket: str | None = None
    timeout: float = DEFAULT_TIMEOUT

    @classmethod
    def parse(cls, extra: dict[str, Any] | None) -> "Settings":
        """Check the keys and types; raises SettingsInvalid."""
        extra = extra or {}
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(extra.keys() - set(known))
        if unknown:
            raise SettingsInvalid(
                f"--model-loader-extra-config: {', '.join(unknown)}: known are {', '.join(known)}"
            )
        socket, timeout = extra.get("socket"), extra.get("timeout", DEFAULT_TIMEOUT)
        if socket is not None and not isinstance(socket, str):
            raise SettingsInvalid("--model-loader-extra-config: socket: must be a path")
        if not isinstance(timeout, int | float) or not timeout > 0:
            raise SettingsInvalid("--model-loader-extra-config: timeout: must be seconds, above 0")
        return cls(socket, float(timeout))


class HeadraceModelLoader(BaseModelLoader):
    """Attaches to the loader of this pod in place of reading a checkpoint."""

    def __init__(self, load_config: "LoadConfig") -> None:
        super().__init__(load_config)
        self._settings = Settings.parse(load_config.model_loader_extra_config)

    def download_model(self, model_config: "ModelConfig") -> None:
        """Do nothing: configuration and tokenizer are local, weights are in memory."""

    def load_weights(self, model: nn.Module, model_config: "ModelConfig") -> None:  # noqa: ARG002
        """Refuse: the weights in memory are read-only and cannot be loaded into tensors."""
        raise Unsupported(
            "--load-format headrace: reloading weights into a model in place is not possible, "
            "its weights are shared and read-only"
        )

    def get_external_weight_memory(self, vllm_config: "VllmConfig") -> int:
        """Bytes the loader holds on this worker's device; waits until they are resident."""
        return self._weights(vllm_config).allocated_bytes

    def load_model(
        self, vllm_config: "VllmConfig", model_config: "ModelConfig", prefix: str = ""
    ) -> nn.Module:
        """Build the model over the resident weights."""
        _check_features(vllm_config, model_config)
        weights = self._weights(vllm_config)
        _check_checkpoint(model_config, weights)
        _tie_again(model_config, weights.tensors)
        device = self._device(vllm_config)
        with set_default_torch_dtype(model_config.dtype):
            with device, WeightsOnMeta():
                model = initialize_model(
                    vllm_config=vllm_config, model_config=model_config, prefix=prefix
                )
            private = {copy.name for copy in weights.copies}
            copies = [*weights.copies, *assign(model, weights.tensors, private)]
            refuse_meta_tensors(model)
            before = private_bytes(device)
            _process(model, model_config, device)
            refuse_meta_tensors(model)
        grown = private_bytes(device) - before
        copied = {copy.name for copy in copies}
        views = {name: tensor for name, tensor in weights.tensors.items() if name not in copied}
        copies += replaced_by_processing(model, views)
        log_copies(_LOG, copies, weights.nbytes)
        _LOG.info("headrace: post-processing added %d bytes of private memory", max(0, grown))
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            _LOG.info("headrace: torch allocated at most %d bytes until now", peak)
        return model.eval()

    def _device(self, vllm_config: "VllmConfig") -> torch.device:
        return torch.device(self.load_config.device or vllm_config.device_config.device)

    def _weights(self, vllm_config: "VllmConfig") -> Weights:
        rank = get_tensor_model_parallel_rank()
        device = self._device(vllm_config)
        key = (self._settings.socket or "", rank, str(device))
        if key not in _attached:
            _attached[key] = self._attach(rank, device)
        return _attached[key]

    def _attach(self, rank: int, device: torch.device) -> Weights:
        began = time.monotonic()
        weights = attach(
            self._settings.socket,
            rank=rank,
            device=device,
            timeout=self._settings.timeout,
            on_progress=_ProgressLog(rank),
        )
        _LOG.info(
            "headrace: attached rank=%d tensors=%d bytes=%d seconds=%.3f mapping_seconds=%.4f",
            rank,
            len(weights.tensors),
            weights.nbytes,
            time.monotonic() - began,
            weights.seconds,
        )
        return weights


class _ProgressLog:
    """Logs the progress of a load that is waited for, every few seconds."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._next = 0.0

    def __call__(self, loading: Loading) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _PROGRESS_SECONDS
            _LOG.info(
                "headrace: rank=%d waits for weights: %d of %d bytes (%s)",
                self._rank,
                loading.loaded_bytes,
                loading.total_bytes,
                loading.note,
            )


def _process(model: nn.Module, model_config: "ModelConfig", device: torch.device) -> None:
    """Let vLLM post-process the weights; say so when it writes to them."""
    # On the CPU a write in place ends in SIGSEGV; this shows where.
    if not faulthandler.is_enabled():
        faulthandler.enable()
    try:
        process_weights_after_loading(model, model_config, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except torch.AcceleratorError as error:
        raise Unsupported(
            "--load-format headrace: the GPU failed while vLLM post-processed the weights, which "
            "are read-only: a quantization or kernel that changes weights in place cannot be used "
            f"(CUDA_LAUNCH_BLOCKING=1 shows which): {error}"
        ) from error


def _check_features(vllm_config: "VllmConfig", model_config: "ModelConfig") -> None:
    """Refuse what would read, move or rewrite weights behind the loader's back."""
    parallel = vllm_config.parallel_config
    refusals = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "expert parallelism": parallel.enable_expert_parallel,
        "a speculative draft model (set its own load format)": (
            model_config is not vllm_config.model_config
        ),
        f"quantization {model_config.quantization} (but FP8 per channel of compressed-tensors)": (
            model_config.quantization is not None and not _is_fp8_per_channel(model_config)
        ),
        "sleep mode": bool(model_config.enable_sleep_mode),
    }
    refused = [feature for feature, wanted in refusals.items() if wanted]
    if refused:
        raise Unsupported(f"--load-format headrace does not support {', '.join(refused)}")


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


def _check_checkpoint(model_config: "ModelConfig", weights: Weights) -> None:
    """Refuse weights of another checkpoint than the one the configuration comes from."""
    path = Path(model_config.model) / _MANIFEST
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        _LOG.warning(
            "headrace: %s cannot be read (%s): not checked that --model and the resident weights "
            "belong together",
            path,
            error.strerror,
        )
        return
    if digest != weights.checkpoint:
        raise WeightsMismatch(
            f"--model {model_config.model}: its {_MANIFEST} has SHA-256 {digest}, the resident "
            f"weights come from {weights.checkpoint}; give loader and engine the same checkpoint"
        )
