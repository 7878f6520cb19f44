"""Finds out what an engine copied after all, and says so."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from headrace_engine.weights import PrivateCopy

_RSS_ANON = re.compile(r"^RssAnon:\s+(\d+) kB$", re.MULTILINE)


def replaced_by_processing(
    model: nn.Module, weights: Mapping[str, torch.Tensor]
) -> list[PrivateCopy]:
    """Return the parameters that post-processing took out of the shared memory.

    `weights` are the views the model was given, by the names of the model's parameters.
    """
    kept = {
        parameter.data_ptr()
        for _, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.numel()
    }
    modules = dict(model.named_modules(remove_duplicate=False))
    return [
        PrivateCopy(name, weight.nbytes, _reason(modules.get(name.rpartition(".")[0])))
        for name, weight in weights.items()
        if weight.numel() and weight.data_ptr() not in kept
    ]


def _reason(module: nn.Module | None) -> str:
    method = getattr(module, "quant_method", None)
    owner = type(module if method is None else method).__name__
    return f"{owner}.process_weights_after_loading changes the layout"


def log_copies(logger: logging.Logger, copies: Iterable[PrivateCopy], total: int) -> None:
    """Log one line per reason, and what remains shared of `total` bytes."""
    tensors: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for copy in copies:
        tensors[copy.reason] += 1
        nbytes[copy.reason] += copy.nbytes
    for reason, count in tensors.items():
        logger.info(
            "headrace: private copies: tensors=%d bytes=%d reason=%s", count, nbytes[reason], reason
        )
    logger.info("headrace: zero-copy: bytes=%d of %d", total - nbytes.total(), total)


def private_bytes(device: torch.device) -> int:
    """Return what torch has allocated on a GPU, or on a CPU the process's resident private memory.

    0 where the kernel does not say.
    """
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    match = _RSS_ANON.search(Path("/proc/self/status").read_text())
    return int(match[1]) * 1024 if match else 0
