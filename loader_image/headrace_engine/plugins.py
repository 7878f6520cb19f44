"""What the plugins of engines share: settings, one attachment a rank, checks, what is logged."""

import contextlib
import dataclasses
import faulthandler
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headrace_engine.assign import assign, refuse_meta_tensors
from headrace_engine.copies import log_copies, private_bytes, replaced_by_processing
from headrace_engine.errors import SettingsInvalid, Unsupported, WeightsMismatch
from headrace_engine.weights import DEFAULT_TIMEOUT, PrivateCopy, Weights, attach
from headrace_handover import Loading

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
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
            raise SettingsInvalid("--model-loader-extra-config: timeout: must be seconds, above 0")
        return cls(socket, float(timeout))


def attached(
    settings: Settings, rank: int, device: torch.device, logger: logging.Logger
) -> Weights:
    """Return this process's attachment to a rank; waits until the weights are resident."""
    key = (settings.socket or "", rank, str(device))
    if key not in _attached:
        _attached[key] = _attach(settings, rank, device, logger)
    return _attached[key]


def _attach(settings: Settings, rank: int, device: torch.device, logger: logging.Logger) -> Weights:
    began = time.monotonic()
    weights = attach(
        settings.socket,
        rank=rank,
        device=device,
        timeout=settings.timeout,
        on_progress=_ProgressLog(rank, logger),
    )
    logger.info(
        "headrace: attached rank=%d tensors=%d bytes=%d seconds=%.3f mapping_seconds=%.4f",
        rank,
        len(weights),
        weights.nbytes,
        time.monotonic() - began,
        weights.seconds,
    )
    return weights


class _ProgressLog:
    """Logs the progress of a load that is waited for, every few seconds."""

    def __init__(self, rank: int, logger: logging.Logger) -> None:
        self._rank = rank
        self._logger = logger
        self._next = 0.0

    def __call__(self, loading: Loading) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _PROGRESS_SECONDS
            self._logger.info(
                "headrace: rank=%d waits for weights: %d of %d bytes (%s)",
                self._rank,
                loading.loaded_bytes,
                loading.total_bytes,
                loading.note,
            )


def fill(
    model: nn.Module,
    prepare: Callable[[], tuple[Mapping[str, torch.Tensor], Sequence[PrivateCopy]]],
    process: Callable[[], None],
    *,
    device: torch.device,
    engine: str,
    logger: logging.Logger,
) -> None:
    """Put the weights in place, let the engine `process` them, and log what it copied.

    `prepare` returns the tensors and which of them are private already. It is called here, for
    until Python 3.11 a call keeps its arguments: post-processing may free private ones, one layer
    after the other.
    """
    tensors, copies = prepare()
    made = [*copies, *assign(model, tensors, {copy.name for copy in copies})]
    total = sum(tensor.nbytes for tensor in tensors.values())
    copied = {copy.name for copy in made}
    views = {name: tensor for name, tensor in tensors.items() if name not in copied}
    del tensors
    refuse_meta_tensors(model)
    before = private_bytes(device)
    with _post_processing(engine, device):
        process()
    refuse_meta_tensors(model)
    grown = private_bytes(device) - before
    made += replaced_by_processing(model, views)
    log_copies(logger, made, total)
    logger.info("headrace: post-processing added %d bytes of private memory", max(0, grown))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        logger.info("headrace: torch allocated at most %d bytes until now", peak)


@contextlib.contextmanager
def _post_processing(engine: str, device: torch.device) -> Iterator[None]:
    """Say so when the engine writes to the weights while it post-processes them."""
    # On the CPU a write in place ends in SIGSEGV; this shows where.
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # a stderr without descriptor
        if not faulthandler.is_enabled():
            faulthandler.enable()
    try:
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except torch.AcceleratorError as error:
        raise Unsupported(
            f"--load-format headrace: the GPU failed while {engine} post-processed the weights, "
            "which are read-only: a quantization or kernel that changes weights in place cannot be "
            f"used (CUDA_LAUNCH_BLOCKING=1 shows which): {error}"
        ) from error


def refuse_reloading(*_arguments: object, **_options: object) -> None:
    """Raise Unsupported, in place of what loads weights: these are read-only."""
    raise Unsupported(
        "--load-format headrace: reloading weights into a model in place is not possible, "
        "its weights are shared and read-only"
    )


def check_checkpoint(model: str, weights: Weights, logger: logging.Logger) -> None:
    """Refuse weights of another checkpoint than the one the configuration comes from."""
    path = Path(model) / _MANIFEST
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        logger.warning(
            "headrace: %s cannot be read (%s): not checked that --model and the resident weights "
            "belong together",
            path,
            error.strerror,
        )
        return
    if digest != weights.checkpoint:
        raise WeightsMismatch(
            f"--model {model}: its {_MANIFEST} has SHA-256 {digest}, the resident "
            f"weights come from {weights.checkpoint}; give loader and engine the same checkpoint"
        )
