"""Builds models whose weights take no memory, while everything else in them is real."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class WeightsOnMeta(TorchFunctionMode):
    """Within this context `torch.empty` without a device makes meta tensors.

    That is how layers allocate what a checkpoint fills afterwards. What is computed at
    construction, such as rotary tables, comes from other functions and is made for
    real; so are work buffers, which name their device. Building the whole model on the meta
    device instead would lose both.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever torch returns
        """Send allocations of weights to the meta device, pass everything else on."""
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
