"""Quantized formats: how they are told, split and refused, and what is published of them."""

import json

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
from headrace_checkpoint.layouts.blocks import experts
from headrace_checkpoint.layouts.rules import Architecture, Piece, Size, SparseLayers, Split, Tensor
from headrace_checkpoint.plan import SourceTensor
from headrace_checkpoint.planner import plan
from headrace_checkpoint.quantization import parse_format

from .conftest import read_tensors, write_tensors
from .quantized_models import CONFIGS, quantize
from .test_layout_rules import numbered_arrays
from .test_planner import carry_out

SIZES = {name: Size(name) for name in ("layers", "heads", "dim", "hidden", "experts", "inner")}
FUSED = Tensor(
    "f.weight",
    (
        Piece("a.weight", ("heads*dim", "hidden"), Split(0, "heads")),
        Piece("b.weight", ("heads*dim", "hidden"), Split(0, "heads")),
    ),
    linear=True,
)
PROJ = ("gate_proj", "up_proj", "down_proj")
ROWS = Tensor(
    "o.weight", (Piece("o.weight", ("hidden", "heads*dim"), Split(1, "heads")),), linear=True
)


def make_plan(rules, quantization, sources, tp=1, **fields):
    table = Architecture("Model", SIZES, (), rules, (), sparse_layers=SparseLayers())
    base = {"layers": 1, "heads": 4, "dim": 8, "hidden": 16, "experts": 2, "inner": 16}
    config = ModelConfig(base | {"quantization_config": quantization} | fields, ("Model",))
    tensors = {
        name: SourceTensor(name, dtype, shape, "f", 0) for name, (dtype, shape) in sources.items()
    }
    return plan(table, config, tensors, tensor_parallel_size=tp, dtype="BF16")


def stored(form, name, rows, columns, group):
    """Types and shapes of a linear layer of each kind, written down from the formats' papers."""
    match form:
        case "gptq":
            kinds = {
                "qweight": ("I32", (columns // 8, rows)),
                "qzeros": ("I32", (columns // group, rows // 8)),
                "scales": ("F16", (columns // group, rows)),
            }
        case "awq":
            kinds = {
                "qweight": ("I32", (columns, rows // 8)),
                "qzeros": ("I32", (columns // group, rows // 8)),
                "scales": ("F16", (columns // group, rows)),
            }
        case "block":
            kinds = {
                "weight": ("F8_E4M3", (rows, columns)),
                "weight_scale_inv": ("F32", (-(-rows // group), -(-columns // group))),
            }
    return {f"{name}.{suffix}": kind for suffix, kind in kinds.items()}


QUANTIZATION = {
    "gptq": lambda group: CONFIGS["gptq"] | {"group_size": group},
    "awq": lambda group: CONFIGS["awq"] | {"group_size": group},
    "block": lambda group: CONFIGS["fp8-block"] | {"weight_block_size": [group, group]},
}


@given(
    st.sampled_from(list(QUANTIZATION)),
    st.sampled_from([8, 16, 24]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
)
def test_shares_put_together_are_the_source(form, group, units, hidden, tp):
    """Fused columns-parallel and rows-parallel layers, at any group size that ranks can have."""
    dim, hidden, heads = units * group, hidden * group, 4
    fields = {"dim": dim, "hidden": hidden}
    kinds = stored(form, "a", heads * dim, hidden, group)
    kinds |= stored(form, "b", heads * dim, hidden, group)
    kinds |= stored(form, "o", hidden, heads * dim, group)
    checkpoint = make_plan((FUSED, ROWS), QUANTIZATION[form](group), kinds, tp, **fields)
    arrays = numbered_arrays({name: shape for name, (_, shape) in kinds.items()})
    ranks = carry_out(checkpoint, arrays)
    joined = 1 if form in ("gptq", "awq") else 0
    for name, array in arrays.items():
        module, _, suffix = name.partition(".")
        shares = [rank[f"{'o' if module == 'o' else 'f'}.{suffix}"] for rank in ranks]
        if module == "o":
            found = np.concatenate(shares, axis=1 - joined)
        else:
            halves = [np.split(share, 2, axis=joined)["ab".index(module)] for share in shares]
            found = np.concatenate(halves, axis=joined)
        np.testing.assert_array_equal(found, array, err_msg=name)


@pytest.mark.parametrize(
    ("form", "rule", "message"),
    [
        (
            "block",
            FUSED,
            "'a.weight_scale_inv' (fp8 in blocks): a rank's share of the weight has 8 ",
        ),
        ("block", ROWS, "16 columns: must be a multiple of 24; choose a smaller size"),
        ("gptq", ROWS, "(gptq int4): a rank's share of the weight has 16 columns: must be a mult"),
        ("awq", ROWS, "'o.qzeros' (awq int4): a rank's share of the weight has 16 columns: must"),
    ],
)
def test_a_share_that_cuts_a_group_is_refused(form, rule, message):
    kinds = {}
    columns = 48 if rule is ROWS else 8
    for piece in rule.pieces:
        shape = (16, columns) if rule is ROWS else (48, 16)
        kinds |= stored(form, piece.source.removesuffix(".weight"), *shape, 24)
    fields = {"heads": 3 if rule is ROWS else 6, "dim": 16 if rule is ROWS else 8}
    tp = 3 if rule is ROWS else 6
    with pytest.raises(ParallelismInvalid) as caught:
        make_plan((rule,), QUANTIZATION[form](24), kinds, tp, **fields)
    assert message in str(caught.value)


def test_a_piece_that_ends_within_a_block_cannot_be_followed():
    pieces = (Piece("a.weight", ("dim", "hidden")), Piece("b.weight", ("dim", "hidden")))
    kinds = stored("block", "a", 8, 16, 16) | stored("block", "b", 8, 16, 16)
    with pytest.raises(ParallelismInvalid, match=r"'a\.weight_scale_inv' .* has 8 rows: must be"):
        make_plan((Tensor("f.weight", pieces, linear=True),), QUANTIZATION["block"](16), kinds)


def test_experts_in_int4_are_refused_by_name():
    rules = experts("m", "inner")
    with pytest.raises(ArchitectureUnsupported, match=r"awq int4: m\.0\.gate_proj: not supported"):
        make_plan(rules, CONFIGS["awq"], {"m.0.gate_proj.qweight": ("I32", (16, 2))})


def test_layers_that_are_not_quantized_keep_their_weight():
    quantization = CONFIGS["fp8-tensor"] | {"modules_to_not_convert": ["o"]}
    kinds = {f"{name}.weight": ("F8_E4M3", (32, 16)) for name in "ab"}
    kinds |= {"a.weight_scale": ("F32", ()), "b.weight_scale": ("BF16", (1,))}
    checkpoint = make_plan((FUSED, ROWS), quantization, kinds | {"o.weight": ("BF16", (16, 32))})
    found = {t.name: (t.dtype, t.shape) for part in checkpoint.parts for t in part.tensors}
    assert found == {
        "f.weight": ("F8_E4M3", (64, 16)),
        "f.weight_scale": ("F32", (2,)),
        "o.weight": ("BF16", (16, 32)),
    }
    assert (checkpoint.quantized, checkpoint.unquantized) == (("a", "b"), ("o",))


def test_experts_are_excepted_by_the_name_of_all_of_them():
    quantization = CONFIGS["fp8-tensor"] | {"modules_to_not_convert": ["l.0.experts"]}
    kinds = {f"l.0.experts.{n}.{name}.weight": ("BF16", (16, 16)) for n in (0, 1) for name in PROJ}
    checkpoint = make_plan(experts("l.{layer}.experts", "inner"), quantization, kinds)
    assert checkpoint.unquantized == tuple(f"l.0.experts.0.{name}" for name in PROJ)


def test_a_fused_layer_of_which_one_piece_is_quantized_is_refused():
    quantization = CONFIGS["fp8-tensor"] | {"ignored_layers": ["b"]}
    with pytest.raises(
        ConfigInvalid, match="of a, b, which engines fuse, b alone is not quantized"
    ):
        make_plan((FUSED,), quantization, {})


@pytest.mark.parametrize(
    ("name", "kind", "error", "message"),
    [
        ("a.weight_scale", None, TensorMissing, "Model with fp8 per tensor needs it"),
        ("a.weight_scale", ("F32", (2,)), SourceCorrupt, r"shape \[2\]: config.json demands \[1\]"),
        ("a.weight_scale", ("F8_E8M0", ()), ArchitectureUnsupported, "dtype F8_E8M0"),
        ("a.weight", ("F8_E5M2", (32, 16)), ArchitectureUnsupported, "dtype F8_E5M2: supported"),
        ("a.k_scale", ("F32", ()), ArchitectureUnsupported, "has no place for it"),
    ],
)
def test_tensors_that_contradict_the_format(name, kind, error, message):
    kinds = {f"{module}.weight": ("F8_E4M3", (32, 16)) for module in "ab"}
    kinds |= {f"{module}.weight_scale": ("F32", ()) for module in "ab"}
    kinds[name] = kind
    with pytest.raises(error, match=message):
        make_plan((FUSED,), CONFIGS["fp8-tensor"], {n: k for n, k in kinds.items() if k})


def changed(form, **fields):
    return CONFIGS[form] | fields


def changed_group(form, part, **fields):
    group = CONFIGS[form]["config_groups"]["group_0"]
    group = group | ({part: group[part] | fields} if part else fields)
    return CONFIGS[form] | {"config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("quantization", "field"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method"),
        ({}, "quant_method"),
        (changed("fp8-block", activation_scheme="static"), "activation_scheme"),
        (changed("fp8-block", store_dtype="mxfp4"), "store_dtype"),
        (changed("fp8-block", fmt="e5m2"), "fmt"),
        (changed("gptq", desc_act=True), "desc_act"),
        (changed("gptq", bits=8), "bits"),
        (changed("gptq", sym=False), "sym"),
        (changed("gptq", dynamic={"-:x": {}}), "dynamic"),
        (changed("awq", version="gemv"), "version"),
        (changed("awq", lm_head=True), "lm_head"),
        (changed("ct-fp8-tensor", kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (changed("ct-fp8-tensor", sparsity_config={"format": "dense"}), "sparsity_config"),
        (changed("ct-fp8-tensor", format="nvfp4-pack-quantized"), "format"),
        (changed("ct-fp8-tensor", config_groups={}), "config_groups"),
        (changed_group("ct-fp8-tensor", None, targets=["re:.*q_proj"]), "targets"),
        (changed_group("ct-fp8-tensor", None, input_activations=None), "input_activations"),
        (changed_group("ct-fp8-tensor", "weights", num_bits=4), "weights.num_bits"),
        (changed_group("ct-int4-group", "weights", actorder="group"), "weights.actorder"),
        (changed_group("ct-int4-group", "weights", type="uint"), "weights.type"),
        (changed_group("ct-int4-channel", "weights", symmetric=False), "weights.strategy"),
    ],
)
def test_what_is_not_supported_is_named(quantization, field):
    with pytest.raises(ArchitectureUnsupported) as caught:
        parse_format({"quantization_config": quantization})
    prefix = (
        "config_groups.group_0."
        if "." in field or field in ("targets", "input_activations")
        else ""
    )
    assert str(caught.value).startswith(f"config.json: quantization_config.{prefix}{field}: ")


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ("fp8", "quantization_config: 'fp8': must be an object"),
        (changed("fp8-block", weight_block_size=[128]), "weight_block_size: .128.: must be two"),
        (changed("fp8-block", modules_to_not_convert="lm_head"), "must be a list of names"),
        (changed("awq", group_size=0), "group_size: 0: must be a whole number from 1"),
        (changed("gptq", group_size="32"), "group_size: '32': must be a whole number from 1"),
    ],
)
def test_values_that_mean_nothing_are_named(quantization, message):
    with pytest.raises(ConfigInvalid, match=message):
        parse_format({"quantization_config": quantization})


@pytest.mark.parametrize("pattern", ["re:(", "re:[", "re:a{99999999999}"])
def test_a_pattern_that_is_none_is_named(pattern):
    quantization = changed("ct-fp8-tensor", ignore=[pattern])
    with pytest.raises(ConfigInvalid, match=r"quantization_config\.ignore: 're:.*': "):
        parse_format({"quantization_config": quantization})


@pytest.mark.parametrize(
    "ignore",
    [
        ["re:(a+)+$"],
        ["re:(?:[)]|a|aa)*$"],
        ["re:(?x)(a+) +$"],  # with blanks that mean nothing
        ["re:(a|a)" + "(a|a)" * 40],
        ["re:" + ".*" * 20 + "x"],
        ["re:" + "a?" * 100 + "a" * 100],
        ["re:" + "(" * 50_000],
        [f"re:{number}" for number in range(33)],
    ],
)
@pytest.mark.timeout(20)
def test_patterns_that_could_take_for_ever_are_refused(ignore):
    quantization = changed("ct-fp8-tensor", ignore=ignore)
    name = "a" * 60 + ".b"
    piece = Piece(f"{name}.weight", ("hidden", "heads*dim"), Split(1, "heads"))
    layer = Tensor(f"{name}.weight", (piece,), linear=True)
    with pytest.raises(ArchitectureUnsupported, match=r"quantization_config\.ignore: .*; \w+"):
        make_plan((layer,), quantization, {})


@pytest.mark.parametrize(
    ("pattern", "ignored"),
    [
        (r"re:.*mlp\.gate$", "mlp.gate"),
        (r"re:^(?!.*(?:experts|proj)).*", "mlp.gate"),
        (r"re:.*layers\.[0-9]+\.mlp\.(gate|shared_expert_gate)\b", "mlp.gate"),
        (r"re:model[.]layers[.](?:\d|1\d)[.]self_attn[.]([qkv]|qkv)_proj", "self_attn.q_proj"),
    ],
)
def test_patterns_that_models_have_are_taken(pattern, ignored):
    found = parse_format({"quantization_config": changed("ct-fp8-tensor", ignore=[pattern])})
    layers = ["mlp.gate", "self_attn.q_proj", "mlp.experts.1.up_proj"]
    names = [f"model.layers.0.{layer}" for layer in layers]
    assert [n for n in names if found.skips(n, (n,), ())] == [f"model.layers.0.{ignored}"]


SIZE = {"layers": 1, "hidden_size": 256, "intermediate_size": 256, "heads": 2, "kv_heads": 2}


@pytest.fixture
def quantized(make_model, tmp_path):
    def make(form):
        quantize(make_model(**SIZE), tmp_path / form, form)
        return tmp_path / form

    return make


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("fp8-block", "model.layers.0.mlp.down_proj.weight_scale_inv"),
        ("ct-fp8-tensor-static", "model.layers.0.self_attn.k_proj.input_scale"),
        ("gptq", "model.layers.0.self_attn.v_proj.scales"),
    ],
)
def test_scales_that_are_no_numbers_are_refused(quantized, shard, volume, form, name, value):
    model = quantized(form)
    tensors = read_tensors(model / "model.safetensors")
    dtype, shape, data = tensors[name]
    bits = np.array([value], np.float32).tobytes()
    width = 4 if dtype == "F32" else 2
    tensors[name] = (dtype, shape, data[:-width] + bits[4 - width :])
    write_tensors(model / "model.safetensors", tensors)
    outcome = shard(model, 2)
    assert (outcome.code, outcome.reason) == (65, "SourceCorrupt")
    assert f"model.safetensors: tensor {name!r}: NaN or infinite in rows" in outcome.message
    assert not list(volume.glob("checkpoint*"))


@pytest.mark.parametrize("value", [0x7FC0, 0x7F80])
def test_weights_that_are_no_numbers_do_not_become_fp8(model, shard, value):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = read_tensors(model / "model.safetensors")
    dtype, shape, data = tensors[name]
    tensors[name] = (dtype, shape, data[:-2] + value.to_bytes(2, "little"))
    write_tensors(model / "model.safetensors", tensors)
    outcome = shard(model, 2, "--quantization", "fp8")
    assert (outcome.code, outcome.reason) == (65, "SourceCorrupt")
    assert f"tensor {name!r}: NaN or infinite in rows" in outcome.message
    assert shard(model, 2).reason == "Published"


def test_a_quantized_model_is_not_quantized_again(quantized, shard):
    outcome = shard(quantized("awq"), 1, "--quantization", "fp8")
    assert (outcome.code, outcome.reason) == (65, "ArchitectureUnsupported")
    assert "the model is quantized already" in outcome.message


def test_fp8_says_of_itself_what_engines_need(model, shard, volume):
    shard(model, 1, "--quantization", "fp8")
    made = volume / "checkpoint"
    source = json.loads((model / "config.json").read_text())
    config = json.loads((made / "config.json").read_text())
    found = config.pop("quantization_config")
    assert config == source
    assert parse_format({"quantization_config": found}).name == "compressed-tensors fp8 per channel"
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["identity"]["quantization"] == "fp8"


@pytest.mark.parametrize(
    ("form", "field", "named"),
    [("gptq", "modules_in_block_to_quantize", 7), ("awq", "modules_to_not_convert", None)],
)
def test_what_vllm_takes_from_names_of_tensors_is_said(
    quantized, shard, volume, form, field, named
):
    """The names are others in the checkpoint."""
    model = quantized(form)
    shard(model, 1)
    found = json.loads((volume / "checkpoint" / "config.json").read_text())["quantization_config"]
    assert len(found.pop(field, [])) == (named or 0)
    assert found == CONFIGS[form]


def test_every_other_config_is_copied_unchanged(quantized, shard, volume):
    model = quantized("fp8-block")
    shard(model, 1)
    config = (volume / "checkpoint" / "config.json").read_bytes()
    assert config == (model / "config.json").read_bytes()


def test_files_of_stages_are_named_as_sharded_state_names_them(model, shard, volume):
    shard(model, 2, "--pipeline-parallel-size", 2)
    names = sorted(path.name for path in (volume / "checkpoint").glob("*.safetensors"))
    assert names == [f"model-pp-{s}-tp-{r}-part-0.safetensors" for s in (0, 1) for r in (0, 1)]
    manifest = json.loads((volume / "checkpoint" / "manifest.json").read_text())
    assert manifest["parallelism"] == {"tensor": 2, "pipeline": 2, "expert": 1}
    assert [part["rank"] for part in manifest["parts"]] == [0, 1, 2, 3]


def test_verify_reads_stages_and_formats(headrace, shard, quantized, volume):
    shard(quantized("ct-int4-group"), 2)
    assert headrace("verify", volume / "checkpoint").code == 0
