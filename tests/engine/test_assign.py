"""Models built without memory for weights, and weights put in their parameters' place."""

import faulthandler
import io
import logging
import sys
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from headrace_engine import plugins
from headrace_engine.assign import assign, meta_tensors, refuse_meta_tensors
from headrace_engine.copies import replaced_by_processing
from headrace_engine.errors import WeightsMismatch
from headrace_engine.meta import WeightsOnMeta
from headrace_engine.weights import PrivateCopy


class Marked(nn.Parameter):
    """A parameter class of its own, as vLLM's are."""


class Implementation:
    """No module, and holds a parameter all the same, as vLLM's attention holds sinks."""

    def __init__(self, parameter: torch.Tensor) -> None:
        self.parameter = parameter


class Model(nn.Module):
    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.linear = nn.Linear(4, 4, bias=False)
        self.linear.weight = Marked(torch.empty(4, 4), requires_grad=False)
        self.linear.weight.weight_loader = "kept"
        self.norm = nn.Parameter(torch.ones(4), requires_grad=False)
        self.head = nn.Linear(4, 8, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.alias = self.linear.weight
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("table", torch.arange(4.0).cos(), persistent=False)
        self.work = torch.empty(3, device="cpu")
        self.implementation = Implementation(self.norm)


def build(**options: Any) -> Model:
    with torch.device("cpu"), WeightsOnMeta():
        return Model(**options)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }


def test_weights_have_no_memory_and_everything_else_is_real() -> None:
    model = build()
    assert model.embedding.weight.is_meta
    assert model.linear.weight.is_meta
    assert torch.equal(model.table, torch.arange(4.0).cos())
    assert model.work.device.type == "cpu"
    assert meta_tensors(model) == ["alias", "embedding.weight", "head.weight", "linear.weight"]


def test_parameters_become_the_weights_themselves() -> None:
    model = build()
    weights = weights_of(model)
    del weights["alias"]
    copies = assign(model, weights)
    for name in weights.keys() - {"scale"}:
        parameter = model.get_parameter(name)
        assert parameter.data_ptr() == weights[name].data_ptr(), name
        assert not parameter.requires_grad
    assert model.alias is model.linear.weight
    assert model.implementation.parameter is model.norm
    assert type(model.linear.weight) is Marked
    assert model.linear.weight.weight_loader == "kept"
    assert copies == [PrivateCopy("scale", 4, "buffers are written by the engine")]
    assert model.scale.data_ptr() != weights["scale"].data_ptr()
    assert torch.equal(model.scale, weights["scale"])
    refuse_meta_tensors(model)


def test_a_private_weight_is_not_copied_again() -> None:
    model = build()
    weights = weights_of(model)
    del weights["alias"]
    assert assign(model, weights, {"scale"}) == []
    assert model.scale.data_ptr() == weights["scale"].data_ptr()


@pytest.mark.parametrize("stored", ["embedding.weight", "head.weight"])
def test_tied_weights_stay_one_object(stored: str) -> None:
    model = build(tied=True)
    weights = weights_of(model)
    for name in {"embedding.weight", "head.weight", "alias"} - {stored}:
        del weights[name]
    assign(model, weights)
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.data_ptr() == weights[stored].data_ptr()


def change(weights: dict[str, torch.Tensor], name: str, tensor: torch.Tensor | None) -> None:
    if tensor is None:
        del weights[name]
    else:
        weights[name] = tensor


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("embedding.weight", None, "does not have: embedding.weight;"),
        ("scale", None, "does not have: scale;"),
        ("other", torch.ones(1), "does not know: other;"),
        (
            "norm",
            torch.ones(5),
            r"norm \(checkpoint torch.float32 \[5\], model torch.float32 \[4\]\)",
        ),
        ("norm", torch.ones(4, dtype=torch.float16), r"norm \(checkpoint torch.float16"),
    ],
)
def test_what_does_not_fit_is_named(name: str, tensor: torch.Tensor | None, message: str) -> None:
    model = build()
    weights = weights_of(model)
    del weights["alias"]
    change(weights, name, tensor)
    with pytest.raises(WeightsMismatch, match=message):
        assign(model, weights)


def test_what_nothing_was_loaded_into_is_named() -> None:
    model = build()
    weights = weights_of(model)
    del weights["alias"]
    assign(model, weights)
    model.head.register_buffer("late", torch.empty(2, device="meta"), persistent=False)
    model.work2 = torch.empty(2, device="meta")
    with pytest.raises(WeightsMismatch, match=r"nothing was loaded into: head\.late, work2;"):
        refuse_meta_tensors(model)


class Repacking:
    """A method whose processing changes the layout, as vLLM's on some CPUs."""


def test_copies_made_by_processing_are_found() -> None:
    model = build()
    weights = weights_of(model)
    del weights["alias"]
    assign(model, weights)
    model.linear.quant_method = Repacking()
    packed = weights["linear.weight"].t().contiguous()
    model.linear.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    del model.alias
    model.linear.apply_packed = lambda x: x @ packed
    reason = "Repacking.process_weights_after_loading changes the layout"
    shared = {name: tensor for name, tensor in weights.items() if name != "scale"}
    assert replaced_by_processing(model, shared) == [PrivateCopy("linear.weight", 64, reason)]


def test_private_weights_that_post_processing_replaces_are_freed_at_once() -> None:
    """Else a model that is repacked would be held twice until its last layer is."""
    model = build()
    shared = weights_of(model)
    del shared["alias"]
    memory: list[weakref.ref[Any]] = []
    freed: list[bool] = []

    def prepare() -> tuple[dict[str, torch.Tensor], list[PrivateCopy]]:
        copied = np.ones((8, 4), np.float32)
        memory.append(weakref.ref(copied))
        name = "embedding.weight"
        copy = PrivateCopy(name, copied.nbytes, "may be written to")
        return shared | {name: torch.from_numpy(copied)}, [copy]

    def process() -> None:
        freed.append(memory[0]() is None)
        model.embedding.weight = nn.Parameter(torch.ones(8, 4), requires_grad=False)
        freed.append(memory[0]() is None)

    plugins.fill(
        model,
        prepare,
        process,
        device=torch.device("cpu"),
        engine="none",
        logger=logging.getLogger(__name__),
    )
    assert freed == [False, True]


def test_a_stderr_without_a_descriptor_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faulthandler, "is_enabled", lambda: False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with plugins._post_processing("none", torch.device("cpu")):
        pass
