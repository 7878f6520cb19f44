"""What tables are made of: experts, sums of sizes, kinds of layers, conditions, dropped layers."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_checkpoint.config import ModelConfig
from headrace_checkpoint.errors import (
    ArchitectureUnsupported,
    ConfigInvalid,
    ParallelismInvalid,
    SourceCorrupt,
    TensorMissing,
)
from headrace_checkpoint.layouts import VLLM
from headrace_checkpoint.layouts.blocks import experts
from headrace_checkpoint.layouts.rules import (
    Architecture,
    DroppedLayers,
    Equals,
    Flag,
    Given,
    Piece,
    Size,
    SparseLayers,
    Split,
    Tensor,
)
from headrace_checkpoint.plan import SourceTensor
from headrace_checkpoint.planner import plan

from .architectures import CASES, FORMATS, SPLITS
from .quantized_models import CONFIGS
from .test_planner import carry_out

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"
FORMAT_ROW = re.compile(r"^\| `([\w-]+)` \|.*\| ([\w, ]+) \| ([\d, ]+) \|$", re.MULTILINE)
ROW = re.compile(r"\| `(\w+)` \|.*\| ([\d, ]+) \|$", re.MULTILINE)


def numbered_arrays(shapes):
    """Arrays whose elements all differ."""
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    starts = np.cumsum([1, *sizes[:-1]])
    return {
        name: np.arange(start, start + size, dtype=np.float64).reshape(shape)
        for (name, shape), start, size in zip(shapes.items(), starts, sizes, strict=True)
    }


def make_plan(per_layer, fields, shapes, tp=1, ep=1, **architecture):
    names = ("layers", "experts", "inner", "hidden", "heads", "a", "b")
    table = Architecture(
        name="Model",
        sizes={name: Size(name) for name in names if name in fields},
        before_layers=(),
        per_layer=per_layer,
        after_layers=(),
        **architecture,
    )
    sources = {name: SourceTensor(name, "BF16", shape, "f", 0) for name, shape in shapes.items()}
    config = ModelConfig(fields, ("Model",))
    return plan(
        table, config, sources, tensor_parallel_size=tp, expert_parallel_size=ep, dtype="BF16"
    )


def tensors_of(checkpoint):
    return {tensor.name: tensor for part in checkpoint.parts for tensor in part.tensors}


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 2, 3, 4]))
def test_experts_are_stacked_and_each_is_split(count, width, hidden, tp):
    inner = width * tp
    shapes = {}
    for expert in range(count):
        shapes[f"m.{expert}.w1.weight"] = shapes[f"m.{expert}.w3.weight"] = (inner, hidden)
        shapes[f"m.{expert}.w2.weight"] = (hidden, inner)
    fields = {"layers": 1, "experts": count, "inner": inner, "hidden": hidden}
    rules = experts("m", "inner", gate="w1", up="w3", down="w2")
    checkpoint = make_plan(rules, fields, shapes, tp, sparse_layers=SparseLayers())
    arrays = numbered_arrays(shapes)
    for rank, found in enumerate(carry_out(checkpoint, arrays)):
        share = slice(rank * width, (rank + 1) * width)
        for expert in range(count):
            gate, up = (arrays[f"m.{expert}.{name}.weight"][share] for name in ("w1", "w3"))
            down = arrays[f"m.{expert}.w2.weight"][:, share]
            w13 = found["m.routed_experts.w13_weight"][expert]
            np.testing.assert_array_equal(w13, np.vstack([gate, up]))
            np.testing.assert_array_equal(found["m.routed_experts.w2_weight"][expert], down)


def make_stack(piece, count, inner, tp, ep):
    """What ranks have of one stacked tensor `x`, and the whole of it."""
    sizes = {"inner": inner, "hidden": 3, "inner+inner": 2 * inner}
    fields = {"layers": 1, "experts": count, "inner": inner, "hidden": 3}
    shapes = {"x": (count, *(sizes[axis] for axis in piece.shape))}
    rule = Tensor("x", (piece,), stack="experts")
    checkpoint = make_plan((rule,), fields, shapes, tp, ep, sparse_layers=SparseLayers())
    arrays = numbered_arrays(shapes)
    return [rank["x"] for rank in carry_out(checkpoint, arrays)], arrays["x"]


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.sampled_from([("inner", "hidden"), ("hidden", "inner+inner"), ("inner+inner",)]),
    st.booleans(),
    st.booleans(),
)
def test_a_stack_in_one_tensor_is_cut_at_each_position(
    count, width, tp, whole, shape, split, transposed
):
    axis = next(axis for axis, size in enumerate(shape) if "inner" in size)
    transposed = transposed and len(shape) == 2
    cut = Split(axis, "inner") if split else None
    piece = Piece("x", shape, cut, stacked=True, transposed=transposed)
    count = count * tp if whole else count
    ranks, array = make_stack(piece, count, width * tp, tp, tp if whole else 1)
    if whole and tp > 1:
        expected = np.split(array, tp)
    else:
        expected = np.split(array, tp, axis=1 + axis) if split else [array] * tp
    for found, share in zip(ranks, expected, strict=True):
        np.testing.assert_array_equal(found, share.swapaxes(1, 2) if transposed else share)


@given(st.integers(1, 3), st.sampled_from([1, 2, 4]), st.booleans())
def test_the_first_rank_alone_has_what_is_added_after_the_sum(count, tp, whole):
    piece = Piece("x", ("hidden",), on_first_rank=True, stacked=True)
    count = count * tp if whole else count
    ranks, array = make_stack(piece, count, tp, tp, tp if whole else 1)
    zeros = [np.zeros_like(array)] * (tp - 1)
    expected = np.split(array, tp) if whole else [array, *zeros]
    np.testing.assert_array_equal(ranks, expected)


def test_what_lies_together_is_one_slice():
    piece = Piece("x", ("inner", "hidden"), Split(1, "hidden"), stacked=True)
    fields = {"layers": 1, "experts": 5, "inner": 2, "hidden": 4}
    rule = Tensor("x", (piece,), stack="experts")
    shapes = {"x": (5, 2, 4)}
    checkpoint = make_plan((rule,), fields, shapes, 2, sparse_layers=SparseLayers())
    assert [(s.rows, s.columns) for (s,) in tensors_of(checkpoint)["x"].by_rank] == [
        ((0, 10), (0, 2)),
        ((0, 10), (2, 4)),
    ]


def test_a_stack_of_another_size_is_described_in_full():
    piece = Piece("x", ("hidden",), stacked=True)
    fields = {"layers": 1, "experts": 2, "hidden": 3}
    with pytest.raises(SourceCorrupt, match=re.escape("demands [2, 3] (experts, hidden)")):
        make_plan((Tensor("x", (piece,), stack="experts"),), fields, {"x": (3, 3)})


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 2, 4]))
def test_units_of_summed_sizes_stay_whole(heads, a, b, tp):
    piece = Piece("x", ("heads*a+heads*b", "hidden"), Split(axis=0, unit="heads"))
    shapes = {"x": (heads * tp * (a + b), 2)}
    fields = {"layers": 1, "heads": heads * tp, "a": a, "b": b, "hidden": 2}
    checkpoint = make_plan((Tensor("x", (piece,)),), fields, shapes, tp)
    arrays = numbered_arrays(shapes)
    ranks = [rank["x"] for rank in carry_out(checkpoint, arrays)]
    assert {len(rank) for rank in ranks} == {heads * (a + b)}
    np.testing.assert_array_equal(np.concatenate(ranks), arrays["x"])


def test_a_summed_size_is_described_in_full():
    piece = Piece("x", ("heads*a+b",))
    fields = {"layers": 1, "heads": 2, "a": 3, "b": 4}
    with pytest.raises(SourceCorrupt, match=re.escape("demands [10] (heads * a + b)")):
        make_plan((Tensor("x", (piece,)),), fields, {"x": (9,)})


@given(
    st.integers(1, 12),
    st.none() | st.integers(0, 14),
    st.none() | st.integers(0, 4),
    st.integers(0, 1),
    st.none() | st.lists(st.integers(0, 12), max_size=4),
)
def test_layers_with_experts_are_those_of_the_rule(layers, first, step, offset, dense):
    rule = SparseLayers("first", "step", offset, "dense")
    config = ModelConfig({"first": first, "step": step, "dense": dense}, ())
    found = config.sparse_layers(rule, layers)
    for layer in range(layers):
        starts = first is None or layer >= first
        steps = not step or (layer + offset) % step == 0
        assert (layer in found) == (starts and steps and layer not in (dense or []))


SPARSE_OR_DENSE = (
    Tensor("{layer}.dense", (Piece("{layer}.d", ("inner",), Split(0, "inner")),), sparse=False),
    Tensor("{layer}.sparse", (Piece("{layer}.s", ("hidden",), Split(0, "hidden")),), sparse=True),
)
FIELDS = {"layers": 2, "inner": 3, "hidden": 4}


def test_each_layer_has_the_tensors_of_its_kind():
    rule = SparseLayers(first="first")
    shapes = {"0.d": (3,), "1.s": (4,)}
    checkpoint = make_plan(SPARSE_OR_DENSE, FIELDS | {"first": 1}, shapes, sparse_layers=rule)
    assert list(tensors_of(checkpoint)) == ["0.dense", "1.sparse"]
    with pytest.raises(TensorMissing, match=r"'1\.s'"):
        make_plan(SPARSE_OR_DENSE, FIELDS | {"first": 1}, {"0.d": (3,)}, sparse_layers=rule)


def test_only_kinds_of_layers_that_exist_limit_the_ranks():
    shapes = {"0.s": (4,), "1.s": (4,)}
    make_plan(SPARSE_OR_DENSE, FIELDS, shapes, tp=2, sparse_layers=SparseLayers())
    with pytest.raises(ParallelismInvalid, match="inner 3"):
        make_plan(SPARSE_OR_DENSE, FIELDS, {"0.d": (3,), "1.d": (3,)}, tp=2)


def test_layers_the_engine_drops_are_ignored_and_no_others():
    rules = (Tensor("m.{layer}.x", (Piece("m.{layer}.x", ("hidden",)),)),)
    dropped = DroppedLayers("m.{layer}.", count="ahead")
    fields = {"layers": 1, "hidden": 4, "ahead": 2}
    shapes = {"m.0.x": (4,), "m.1.any": (7,), "m.2.x": (4,)}
    checkpoint = make_plan(rules, fields, shapes, dropped_layers=dropped)
    assert checkpoint.ignored == ("m.1.any", "m.2.x")
    assert list(tensors_of(checkpoint)) == ["m.0.x"]
    with pytest.raises(ConfigInvalid, match="ahead: 2147483647: must be at most 10000"):
        make_plan(rules, fields | {"ahead": 2**31 - 1}, shapes, dropped_layers=dropped)
    for unknown in ("m.3.x", "m.10.x", "m.0.y"):
        with pytest.raises(ArchitectureUnsupported, match=unknown):
            make_plan(rules, fields, shapes | {unknown: (4,)}, dropped_layers=dropped)


def test_a_tensor_can_have_an_element_type_of_its_own():
    rules = (Tensor("x", (Piece("x", ("hidden",)),), dtype="F32"),)
    found = tensors_of(make_plan(rules, {"layers": 1, "hidden": 4}, {"x": (4,)}))["x"]
    assert (found.dtype, found.nbytes) == ("F32", 16)


@pytest.mark.parametrize(
    ("condition", "fields", "holds"),
    [
        (Flag("f"), {}, False),
        (Flag("f"), {"f": None}, False),
        (Flag("f"), {"f": True}, True),
        (Flag("f", default=True), {}, True),
        (Flag("f", default=True), {"f": False}, False),
        (Given("f"), {}, False),
        (Given("f"), {"f": None}, False),
        (Given("f"), {"f": 0}, True),
        (Equals("f", "a"), {}, False),
        (Equals("f", "a"), {"f": "a"}, True),
        (Equals("f", "a"), {"f": "b"}, False),
    ],
)
def test_conditions(condition, fields, holds):
    assert ModelConfig(fields, ()).holds(condition) is holds


SIZES = {"experts": Size("num_experts", alias="num_local_experts")}
ALIASED = Architecture("Model", SIZES, (), (), ())


@pytest.mark.parametrize(
    "fields",
    [{"num_experts": 8}, {"num_local_experts": 8}, {"num_experts": 8, "num_local_experts": 8}],
)
def test_a_size_may_have_two_names(fields):
    assert ModelConfig(fields, ()).sizes(ALIASED) == {"experts": 8}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "num_experts: missing"),
        ({"num_experts": 8, "num_local_experts": 4}, "different values: 4, 8"),
        ({"num_local_experts": "8"}, 'num_local_experts: "8": must be a whole number'),
    ],
)
def test_two_names_that_disagree_are_refused(fields, message):
    with pytest.raises(ConfigInvalid, match=message):
        ModelConfig(fields, ()).sizes(ALIASED)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first": -1}, "first: -1: must be a whole number from 0"),
        ({"step": "2"}, 'step: "2": must be a whole number from 0'),
        ({"dense": 3}, "dense: 3: must be a list"),
    ],
)
def test_bad_rules_of_layers_are_refused(fields, message):
    with pytest.raises(ConfigInvalid, match=message):
        ModelConfig(fields, ()).sparse_layers(SparseLayers("first", "step", 0, "dense"), 4)


def test_the_table_in_docs_is_what_the_equality_test_compares():
    compared = {}
    for case in CASES:
        compared.setdefault(case.architecture, set()).add(case.tp)
    documented = {
        name: {int(size) for size in sizes.split(", ")}
        for name, sizes in ROW.findall(DOCUMENT.read_text())
        if name in VLLM
    }
    assert documented == compared
    assert documented.keys() == VLLM.keys()
    assert all(sizes >= {1, 2, 4} for sizes in documented.values())


def test_every_class_is_compared_in_stages():
    assert {case.architecture for case in SPLITS if case.pp > 1} == VLLM.keys()


def test_the_formats_in_docs_are_what_the_equality_test_compares():
    compared = {}
    for case in FORMATS:
        compared.setdefault(case.format, (set(), set()))
        compared[case.format][0].add(case.architecture.removesuffix("ForCausalLM"))
        compared[case.format][1].add(case.tp)
    documented = {
        name: (set(classes.split(", ")), {int(size) for size in sizes.split(", ")})
        for name, classes, sizes in FORMAT_ROW.findall(DOCUMENT.read_text())
        if name not in VLLM
    }
    assert documented == compared
    assert documented.keys() == CONFIGS.keys() | {"fp8"}
