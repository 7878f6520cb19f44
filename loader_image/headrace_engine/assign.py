"""Puts resident weights in the place of a model's parameters."""

from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from headrace_engine.errors import WeightsMismatch
from headrace_engine.weights import PrivateCopy

_SHOWN = 10
_BUFFER = "buffers are written by the engine"


@dataclass(slots=True)
class Slot:
    """A parameter or persistent buffer and every place of the model that holds it."""

    tensor: torch.Tensor
    names: list[str]
    places: list[tuple[dict[str, torch.Tensor | None], str]]

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter, which post-processing may only replace, not write."""
        return isinstance(self.tensor, nn.Parameter)


def assign(
    model: nn.Module, weights: Mapping[str, torch.Tensor], private: Container[str] = ()
) -> list[PrivateCopy]:
    """Replace every parameter and persistent buffer by the weight of its name.

    Class and attributes (weight loaders, sharding dimensions) are kept; tied parameters stay
    one object. Parameters become views of the weights. Buffers, which engines write to,
    become copies unless the weight is `private` already; the copies are returned. Raises
    WeightsMismatch naming what is missing, left over, or of another shape or element type;
    the model is then of no use.
    """
    slots = _slots(model)
    _refuse(
        "the model needs, the checkpoint does not have",
        [slot.names[0] for slot in slots if _weight_name(slot, weights) is None],
    )
    chosen = {name: slot for slot in slots if (name := _weight_name(slot, weights)) is not None}
    _refuse("the checkpoint has, the model does not know", sorted(weights.keys() - chosen.keys()))
    _refuse(
        "shape or element type differs",
        [
            _difference(name, slot.tensor, weights[name])
            for name, slot in chosen.items()
            if _differs(slot.tensor, weights[name])
        ],
    )
    copies: list[PrivateCopy] = []
    for name, slot in chosen.items():
        weight = weights[name]
        if not slot.is_parameter and name not in private:
            weight = weight.clone()
            copies.append(PrivateCopy(name, weight.nbytes, _BUFFER))
        new = _dressed_as(slot.tensor, weight)
        for holder, leaf in slot.places:
            holder[leaf] = new
    return copies


def meta_tensors(model: nn.Module) -> list[str]:
    """Return the names of tensors without memory, in parameters, buffers and attributes."""
    return sorted(
        f"{prefix}.{leaf}" if prefix else leaf
        for prefix, module in model.named_modules(remove_duplicate=False)
        for holder in (module._parameters, module._buffers, vars(module))
        for leaf, tensor in holder.items()
        if isinstance(tensor, torch.Tensor) and tensor.is_meta
    )


def refuse_meta_tensors(model: nn.Module) -> None:
    """Raise WeightsMismatch where a tensor of the model has no memory."""
    _refuse("nothing was loaded into", meta_tensors(model))


def _slots(model: nn.Module) -> list[Slot]:
    slots: dict[int, Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        persistent = {
            leaf: buffer
            for leaf, buffer in module._buffers.items()
            if leaf not in module._non_persistent_buffers_set
        }
        for holder, tensors in (
            (module._parameters, module._parameters),
            (module._buffers, persistent),
        ):
            for leaf, tensor in tensors.items():
                if tensor is None:
                    continue
                slot = slots.setdefault(id(tensor), Slot(tensor, [], []))
                slot.names.append(f"{prefix}.{leaf}" if prefix else leaf)
                slot.places.append((holder, leaf))
    for module in model.modules():
        for thing in vars(module).values():
            # Such as attention's implementation, which keeps GPT-OSS's sinks to itself.
            for leaf, tensor in getattr(thing, "__dict__", {}).items():
                if id(tensor) in slots:
                    slots[id(tensor)].places.append((vars(thing), leaf))
    return list(slots.values())


def _weight_name(slot: Slot, weights: Mapping[str, torch.Tensor]) -> str | None:
    """Which of a slot's names the checkpoint uses; tied parameters are stored under one."""
    return min((name for name in slot.names if name in weights), default=None)


def _differs(tensor: torch.Tensor, weight: torch.Tensor) -> bool:
    return tensor.shape != weight.shape or tensor.dtype != weight.dtype


def _difference(name: str, tensor: torch.Tensor, weight: torch.Tensor) -> str:
    return (
        f"{name} (checkpoint {weight.dtype} {list(weight.shape)}, "
        f"model {tensor.dtype} {list(tensor.shape)})"
    )


def _refuse(what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise WeightsMismatch(
            f"{what}: {', '.join(names[:_SHOWN])}{more}; the checkpoint must be made for this "
            "model, tensor parallel size and --dtype"
        )


def _dressed_as(old: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """Make `data` a parameter if `old` is one, of its class and with its attributes."""
    new = nn.Parameter(data, requires_grad=False) if isinstance(old, nn.Parameter) else data
    new.__class__ = old.__class__
    new.__dict__ = old.__dict__.copy()
    return new
