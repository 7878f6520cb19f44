"""Layout planning: shards put together again are the source, for any size that divides."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_checkpoint.config import ModelConfig
from headrace_checkpoint.dtypes import ITEM_BYTES
from headrace_checkpoint.errors import ConfigInvalid, ParallelismInvalid, SourceCorrupt
from headrace_checkpoint.layouts.dense import LLAMA
from headrace_checkpoint.manifest import TENSOR_ALIGNMENT
from headrace_checkpoint.plan import Beside, Fill, SourceTensor
from headrace_checkpoint.planner import plan, resolve_dtype, stage_layers

from .conftest import tiny_llama


@st.composite
def sizes(draw):
    kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    heads = kv_heads * group
    return tiny_llama.Size(
        layers=draw(st.integers(1, 2)),
        hidden_size=heads * draw(st.integers(1, 3)),
        intermediate_size=draw(st.integers(1, 4)) * draw(st.sampled_from([1, 4, 12])),
        heads=heads,
        kv_heads=kv_heads,
        vocab_size=draw(st.integers(1, 200)),
        tied=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )


def config_of(size, **fields):
    return ModelConfig(size.config() | fields, ("LlamaForCausalLM",))


def arrays_of(size):
    """Sources whose elements all differ."""
    arrays, start = {}, 1
    for name, shape in size.shapes().items():
        count = math.prod(shape)
        arrays[name] = np.arange(start, start + count, dtype=np.float64).reshape(shape)
        start += count
    return arrays


def sources_of(size, dtype="BF16"):
    return {
        name: SourceTensor(name, dtype, shape, "model.safetensors", 0)
        for name, shape in size.shapes().items()
    }


PARALLEL = ("pipeline_parallel_size", "expert_parallel_size")


def make_plan(size, tp, part_bytes=10_000, **fields):
    return plan(
        LLAMA,
        config_of(size, **{k: v for k, v in fields.items() if k not in PARALLEL}),
        sources_of(size),
        tensor_parallel_size=tp,
        dtype="BF16",
        part_bytes=part_bytes,
        **{k: v for k, v in fields.items() if k in PARALLEL},
    )


def carry_out(checkpoint, arrays):
    """Evaluate a plan with numpy: one dictionary of tensors per rank."""
    ranks = [{} for _ in range(max(part.ranks.stop for part in checkpoint.parts))]
    for part in checkpoint.parts:
        for tensor in part.tensors:
            for rank, segments in zip(part.ranks, tensor.by_rank, strict=True):
                pieces = [segment_values(segment, arrays) for segment in segments]
                ranks[rank][tensor.name] = np.concatenate(pieces).reshape(tensor.shape)
    return ranks


def segment_values(segment, arrays):
    if isinstance(segment, Fill):
        return np.full(segment.elements, segment.value)
    if isinstance(segment, Beside):
        rows = segment.slices[0].rows[1] - segment.slices[0].rows[0]
        parts = [segment_values(one, arrays).reshape(rows, -1) for one in segment.slices]
        return np.hstack(parts).ravel()
    array = arrays[segment.source]
    matrix = array.reshape(math.prod(array.shape[: segment.row_axes]), -1)
    found = matrix[slice(*segment.rows), slice(*segment.columns)]
    return (found.T if segment.transposed else found).ravel()


def divides(size, tp):
    """The sizes vLLM accepts."""
    padded = -(-size.vocab_size // 64) * 64
    return (
        size.heads % tp == 0
        and (size.kv_heads % tp == 0 or tp % size.kv_heads == 0)
        and size.intermediate_size % tp == 0
        and padded % tp == 0
    )


@given(sizes(), st.sampled_from([1, 2, 3, 4, 8]))
def test_shards_reassemble_to_the_source(size, tp):
    if not divides(size, tp):
        with pytest.raises(ParallelismInvalid):
            make_plan(size, tp)
        return
    arrays = arrays_of(size)
    ranks = carry_out(make_plan(size, tp), arrays)
    reassembled = {}
    head = "lm_head.weight" if size.tied else "model.embed_tokens.weight"
    reassembled["model.embed_tokens.weight"] = vocabulary(ranks, head, size)
    if not size.tied:
        reassembled["lm_head.weight"] = vocabulary(ranks, "lm_head.weight", size)
    reassembled["model.norm.weight"] = replicated(ranks, "model.norm.weight")
    for layer in range(size.layers):
        reassembled |= layer_tensors(ranks, f"model.layers.{layer}", size)
    assert reassembled.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(reassembled[name], array, err_msg=name)


def vocabulary(ranks, name, size):
    rows = np.concatenate([rank[name] for rank in ranks])
    assert len(rows) % 64 == 0
    assert not rows[size.vocab_size :].any()
    return rows[: size.vocab_size]


def replicated(ranks, name):
    for rank in ranks:
        np.testing.assert_array_equal(rank[name], ranks[0][name])
    return ranks[0][name]


def layer_tensors(ranks, prefix, size):
    found = {}
    for kind in ["weight", "bias"] if size.attention_bias else ["weight"]:
        found |= attention_inputs(ranks, prefix, size, kind)
    if size.attention_bias:
        found[f"{prefix}.self_attn.o_proj.bias"] = replicated(
            ranks, f"{prefix}.self_attn.o_proj.bias"
        )
    for kind in ["weight", "bias"] if size.mlp_bias else ["weight"]:
        halves = [np.split(rank[f"{prefix}.mlp.gate_up_proj.{kind}"], 2) for rank in ranks]
        found[f"{prefix}.mlp.gate_proj.{kind}"] = np.concatenate([gate for gate, _ in halves])
        found[f"{prefix}.mlp.up_proj.{kind}"] = np.concatenate([up for _, up in halves])
    if size.mlp_bias:
        found[f"{prefix}.mlp.down_proj.bias"] = replicated(ranks, f"{prefix}.mlp.down_proj.bias")
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        found[f"{prefix}.{name}"] = np.hstack([rank[f"{prefix}.{name}"] for rank in ranks])
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        found[f"{prefix}.{name}"] = replicated(ranks, f"{prefix}.{name}")
    for name in ("_k_scale", "_prob_scale", "_q_scale", "_v_scale"):
        assert all(rank[f"{prefix}.self_attn.attn.{name}"] == 1.0 for rank in ranks)
    return found


def attention_inputs(ranks, prefix, size, kind):
    tp = len(ranks)
    query = size.heads // tp * size.head_dim
    key = max(1, size.kv_heads // tp) * size.head_dim
    cuts = [
        np.split(rank[f"{prefix}.self_attn.qkv_proj.{kind}"], [query, query + key])
        for rank in ranks
    ]
    copies = max(1, tp // size.kv_heads)
    found = {f"{prefix}.self_attn.q_proj.{kind}": np.concatenate([q for q, _, _ in cuts])}
    for index, name in ((1, "k_proj"), (2, "v_proj")):
        shares = [cut[index] for cut in cuts]
        for first in range(0, tp, copies):
            for share in shares[first : first + copies]:
                np.testing.assert_array_equal(share, shares[first])
        found[f"{prefix}.self_attn.{name}.{kind}"] = np.concatenate(shares[::copies])
    return found


@given(sizes(), st.sampled_from([1, 2, 4]), st.sampled_from([1, 500, 5_000, 10**9]))
def test_parts_hold_every_tensor_once_in_alignment_order(size, tp, part_bytes):
    if not divides(size, tp):
        return
    checkpoint = make_plan(size, tp, part_bytes)
    names = [tensor.name for part in checkpoint.parts for tensor in part.tensors]
    assert len(names) == len(set(names))
    for part in checkpoint.parts:
        assert part.data_bytes <= part_bytes or len(part.tensors) == 1
        assert [(e.name, e.nbytes) for e in part.entries] == [
            (t.name, t.nbytes) for t in part.tensors
        ]
        assert all(b.offset == a.offset + a.nbytes for a, b in pairwise(part.entries))
        for entry in part.entries:
            if entry.nbytes % TENSOR_ALIGNMENT == 0:
                assert entry.offset % TENSOR_ALIGNMENT == 0
            assert entry.offset % ITEM_BYTES[entry.dtype] == 0


@pytest.mark.parametrize(
    ("change", "tp", "message"),
    [
        (
            {},
            3,
            "does not divide num_attention_heads 4, num_key_value_heads 2 (nor is a multiple",
        ),
        (
            {},
            3,
            "of it), intermediate_size 512, vocab_size 128; choose one of 1, 2, 4",
        ),
        ({}, 8, "size 8: does not divide num_attention_heads 4; choose one of 1, 2, 4"),
        ({"heads": 6, "kv_heads": 3, "hidden_size": 192}, 2, "num_key_value_heads 3 (nor is"),
        ({"intermediate_size": 510}, 4, "size 4: does not divide intermediate_size 510"),
        ({"vocab_size": 100}, 3, "vocab_size 100 (padded to 128)"),
    ],
)
def test_sizes_that_do_not_divide_are_named(change, tp, message):
    with pytest.raises(ParallelismInvalid) as caught:
        make_plan(tiny_llama.Size(**change), tp)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers: missing"),
        ({"hidden_size": "256"}, 'hidden_size: "256": must be a whole number'),
        ({"hidden_size": True}, "hidden_size: true: must be a whole number"),
        ({"vocab_size": 0}, "vocab_size: 0: must be a whole number from 1"),
        ({"head_dim": None, "num_attention_heads": 5}, "head_dim: missing, and 256 is not divis"),
        ({"tie_word_embeddings": "no"}, 'tie_word_embeddings: "no": must be true or false'),
        ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers: 2147483647: must be at most 10000"),
    ],
)
def test_contradictory_config_is_named(fields, message):
    with pytest.raises(ConfigInvalid) as caught:
        make_plan(tiny_llama.Size(), 1, **fields)
    assert message in str(caught.value)


def test_absent_sizes_have_the_defaults_of_transformers():
    size = tiny_llama.Size(kv_heads=4)
    assert make_plan(size, 2) == make_plan(size, 2, num_key_value_heads=None, head_dim=None)


@pytest.mark.parametrize(
    ("declared", "stored", "requested", "resolved"),
    [
        ({"torch_dtype": "float16"}, "BF16", "auto", "F16"),
        ({"torch_dtype": None, "dtype": "bfloat16"}, "F16", "auto", "BF16"),
        ({"torch_dtype": "float16", "dtype": "bfloat16"}, "F16", "auto", "BF16"),
        ({"torch_dtype": "torch.float16"}, "BF16", "auto", "F16"),
        ({"torch_dtype": "float32"}, "F32", "auto", "BF16"),
        ({"torch_dtype": None}, "F16", "auto", "F16"),
        ({"torch_dtype": None}, "F32", "auto", "BF16"),
        ({"torch_dtype": "bfloat16"}, "BF16", "float32", "F32"),
    ],
)
def test_dtype_resolves_as_in_vllm(declared, stored, requested, resolved):
    size = tiny_llama.Size()
    config = config_of(size, **declared)
    assert resolve_dtype(requested, config, sources_of(size, stored)) == resolved


def test_undecidable_and_unknown_dtypes_are_refused():
    size = tiny_llama.Size()
    mixed = sources_of(size, "F16") | {"x": SourceTensor("x", "BF16", (1,), "f", 0)}
    with pytest.raises(SourceCorrupt, match="BF16, F16"):
        resolve_dtype("auto", config_of(size, torch_dtype=None), mixed)
    with pytest.raises(ConfigInvalid, match='torch_dtype: "int8"'):
        resolve_dtype("auto", config_of(size, torch_dtype="int8"), mixed)


@pytest.mark.parametrize(
    ("layers", "stages", "counts"),
    [
        (4, 1, [4]),
        (4, 2, [2, 2]),
        (3, 2, [2, 1]),
        (4, 3, [1, 2, 1]),
        (5, 3, [2, 2, 1]),
        (61, 8, [7, 7, 8, 8, 8, 8, 8, 7]),
    ],
)
def test_stages_have_the_layers_that_vllm_gives_them(layers, stages, counts):
    ranges = stage_layers(layers, stages)
    assert [end - begin for begin, end in ranges] == counts
    assert [begin for begin, _ in ranges] == [0, *(end for _, end in ranges[:-1])]


@given(sizes(), st.sampled_from([1, 2]), st.sampled_from([2]))
def test_stages_together_have_what_one_has(size, tp, stages):
    if not divides(size, tp) or size.layers < stages:
        return
    arrays = arrays_of(size)
    whole = carry_out(make_plan(size, tp), arrays)
    staged = carry_out(make_plan(size, tp, pipeline_parallel_size=stages), arrays)
    assert len(staged) == tp * stages
    for rank, found in enumerate(whole):
        first, last = staged[rank], staged[tp + rank]
        assert first.keys() & last.keys() == set()
        embedding = first.pop("model.embed_tokens.weight")
        assert {**first, **last}.keys() == found.keys() - (
            set() if size.tied else {"model.embed_tokens.weight"}
        )
        for name, array in {**first, **last}.items():
            np.testing.assert_array_equal(array, found[name], err_msg=name)
        name = "lm_head.weight" if size.tied else "model.embed_tokens.weight"
        np.testing.assert_array_equal(embedding, found[name])


def test_a_stage_without_layers_is_refused():
    with pytest.raises(ParallelismInvalid, match="size 3: each stage needs a layer, and num_hid"):
        make_plan(tiny_llama.Size(), 1, pipeline_parallel_size=3)


@pytest.mark.parametrize(
    ("tp", "experts", "message"),
    [(4, 2, "size 2: must be 1 or the tensor parallel size, 4"), (2, 2, "has no experts; choose")],
)
def test_expert_ranks_that_cannot_be(tp, experts, message):
    with pytest.raises(ParallelismInvalid, match=message):
        make_plan(tiny_llama.Size(), tp, expert_parallel_size=experts)
