"""`headrace plan`: AWS's published loads, sizes of models, and refusal of nonsense."""

import json
import os
import re
from pathlib import Path

import pytest

from headrace_cli.errors import InputInvalid
from headrace_cli.sizing.hardware import (
    CAPACITY_STEP_GIB,
    INSTANCES,
    MIN_CAPACITY_GIB,
    TIERS,
    capacity_fault,
)
from headrace_cli.sizing.model import size_of
from headrace_cli.sizing.predict import FileSystem, Node, predict_load, predict_shard
from headrace_cli.sizing.published import NODE, ROWS, STORAGE, TOLERANCE
from headrace_operator.plan import fsx
from headrace_operator.plan.presets import PRESETS

LLAMA_405B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 128,
    "num_hidden_layers": 126,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
MIXTRAL_8X22B = {
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_attention_heads": 48,
    "num_hidden_layers": 56,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "vocab_size": 32768,
    "torch_dtype": "bfloat16",
}
DEEPSEEK_V3 = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "quantization_config": {"quant_method": "fp8"},
}


@pytest.mark.parametrize("row", [row for row in ROWS if not row.unpredicted], ids=lambda r: r.case)
def test_published_loads_by_gpudirect_are_reproduced(row):
    assert abs(row.error) <= TOLERANCE


def test_the_documentation_has_the_same_table():
    text = (Path(__file__).parents[2] / "docs/cli.md").read_text()
    table = re.findall(
        r"^\| (Llama .*), \d+ GB \| ([\d.]+) s \| ([\d.]+) s \| ([+-]\d+) % \|$", text, re.M
    )
    predicted = [row for row in ROWS if not row.unpredicted]
    assert table == [
        (
            row.case.removesuffix(", GPUDirect"),
            *(f"{seconds:.3g}" if seconds >= 10 else f"{seconds:.2f}" for seconds in times(row)),
            f"{100 * row.error:+.0f}",
        )
        for row in predicted
    ]


def times(row):
    return row.seconds, row.predicted


def test_what_is_not_reproduced_says_why(headrace):
    ran = headrace("plan", "--published", "--output=json")
    rows = json.loads(ran.out)["rows"]
    assert (ran.code, len(rows)) == (0, len(ROWS))
    others = [row for row in rows if row["predictedSeconds"] is None]
    assert others
    assert all("constructor" in row["notPredicted"] for row in others)


def test_the_load_of_405b_is_limited_by_the_file_system(headrace):
    ran = headrace("plan", "--model=llama-3.1-405b", "-o", "json")
    document = json.loads(ran.out)
    assert document["load"]["seconds"] == pytest.approx(10.4, rel=TOLERANCE)
    assert document["load"]["bottleneck"] == "throughput of the file system"
    assert document["fits"]["fitsInGpuMemory"] is True


def test_replicas_share_the_file_system_and_nothing_else():
    total = 10**12
    one = predict_load(total, STORAGE, NODE)
    two = predict_load(total, STORAGE, NODE, replicas=2)
    assert two.bottleneck.bytes_per_second == one.bottleneck.bytes_per_second / 2
    warm = predict_load(total, STORAGE, NODE, warm=True)
    assert warm.bottleneck.name.startswith("one client")


def test_the_capacity_for_a_time_is_the_smallest_that_keeps_it(headrace):
    options = ("plan", "--model=llama-3.1-405b", "-ojson")
    capacity = json.loads(headrace(*options, "--within=10").out)["capacityGiBWithin"]
    at = [
        json.loads(headrace(*options, "--capacity-gib", size).out)["load"]["seconds"]
        for size in (capacity, capacity - 4800)
    ]
    assert at[0] <= 10 < at[1]
    ran = headrace(*options, "--within=1")
    assert (ran.code, ran.out) == (os.EX_USAGE, "")
    assert "no file system is that fast" in ran.err


def test_few_network_cards_are_the_bottleneck():
    load = predict_load(10**12, STORAGE, Node(8, 1, 200, 55e9))
    assert load.bottleneck.name == "1 network cards of 200 Gbps"


def test_sharding_405b_takes_what_its_documentation_computes():
    shard = predict_shard(812 * 10**9, STORAGE, cores=4, network_gbps=100)
    assert shard.seconds == pytest.approx(180, rel=0.05)
    small = predict_shard(812 * 10**9, FileSystem(4800, 1000), cores=4, network_gbps=100)
    assert small.seconds == pytest.approx(6.4 * 60, rel=0.05)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(LLAMA_405B, 405.85e9), (MIXTRAL_8X22B, 140.6e9), (DEEPSEEK_V3, 671.0e9)],
    ids=["llama", "mixtral", "deepseek"],
)
def test_published_parameter_counts(config, parameters):
    assert size_of(config).parameters == pytest.approx(parameters, rel=0.001)


def test_quantization_halves_the_bytes():
    assert size_of(DEEPSEEK_V3).bytes_per_parameter == 1
    assert size_of(LLAMA_405B).total_bytes == 2 * size_of(LLAMA_405B, "fp8").total_bytes


@pytest.mark.parametrize("tier", TIERS)
def test_capacities_with_efa_are_multiples_of_the_tiers_step(tier):
    step = TIERS[tier].efa_step
    assert capacity_fault(3 * step, tier, efa=True) is None
    fault = capacity_fault(3 * step + 1200, tier, efa=True)
    assert fault is not None
    assert f"use {3 * step} or {4 * step}" in fault
    assert capacity_fault(1200, tier, efa=False) is None


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--model-gb=nan"], os.EX_USAGE, "--model-gb"),
        (["--model-gb=big"], os.EX_USAGE, "'big' is not a valid number"),
        (["--model-gb=inf"], os.EX_USAGE, "--model-gb"),
        (["--model-gb=-1"], os.EX_USAGE, "--model-gb"),
        (["--model-gb=0"], os.EX_USAGE, "--model-gb"),
        (["--model-gb=10", "--capacity-gib=6000"], os.EX_USAGE, "use 4800 or 9600"),
        (["--model-gb=10", "--capacity-gib=1e99"], os.EX_USAGE, "--capacity-gib"),
        (["--model-gb=10", "--tier=7"], os.EX_USAGE, "--tier"),
        (["--model-gb=10", "--nics=17"], os.EX_USAGE, "p5en.48xlarge has 16"),
        (["--model-gb=10", "--gpus=99"], os.EX_USAGE, "p5en.48xlarge has 8"),
        (["--model-gb=10", "--replicas=0"], os.EX_USAGE, "--replicas"),
        (["--model-gb=10", "--node-price=free"], os.EX_USAGE, "--node-price"),
        (["--model-gb=10", "--model=llama-3.1-70b"], os.EX_USAGE, "one of --model"),
        ([], os.EX_USAGE, "one of --model"),
        (["--model=gpt"], os.EX_NOINPUT, "is not known"),
        (["--config=/nowhere/config.json"], os.EX_NOINPUT, "No such file"),
        (["--model-gb=1e-12"], os.EX_DATAERR, "has no weights"),
    ],
)
def test_nonsense_is_one_sentence_and_an_exit_code(headrace, options, code, words):
    ran = headrace("plan", *options)
    assert ran.code == code
    assert words in ran.err
    assert ran.err.count("\n") == 1
    assert ran.out == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "hidden_size"),
        (json.dumps(LLAMA_405B | {"hidden_size": "big"}), "hidden_size"),
        (json.dumps(LLAMA_405B | {"num_attention_heads": 0}), "num_attention_heads"),
        (json.dumps(LLAMA_405B | {"hidden_size": 0}), "has no weights"),
        (json.dumps(LLAMA_405B | {"torch_dtype": ["x"]}), "torch_dtype"),
        (json.dumps(LLAMA_405B | {"quantization_config": {"quant_method": "odd"}}), "quant_method"),
    ],
)
def test_wrong_config_is_named(headrace, tmp_path, content, words):
    path = tmp_path / "config.json"
    path.write_text(content)
    ran = headrace("plan", "--config", path)
    assert (ran.code, ran.out) == (os.EX_DATAERR, "")
    assert words in ran.err


def test_a_model_in_a_model_is_found(headrace, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gemma3", "text_config": LLAMA_405B}))
    ran = headrace("plan", "--config", path, "--output=json")
    assert json.loads(ran.out)["inputs"]["total_bytes"] == size_of(LLAMA_405B).total_bytes


def test_costs_need_prices_that_are_known_or_given(headrace):
    unknown = json.loads(headrace("plan", "--model-gb=100", "-ojson").out)["cost"]
    assert unknown == {"idleGpusPerColdStart": None, "fileSystemPerMonth": None}
    options = ("--node-price=36", "--storage-price=0.5", "--replicas=2")
    known = json.loads(headrace("plan", "--model-gb=100", *options, "-ojson").out)
    assert known["cost"]["idleGpusPerColdStart"] == pytest.approx(
        0.01 * 2 * known["load"]["seconds"], abs=1e-3
    )
    assert known["cost"]["fileSystemPerMonth"] == pytest.approx(96000 * 1.073741824 * 0.5, abs=1)


def test_weights_that_do_not_fit_are_said(headrace):
    ran = headrace("plan", "--model-gb=2000", "--instance=p5en.48xlarge")
    assert "do not fit" in ran.out


def test_every_instance_is_planned_for(headrace):
    for name in INSTANCES:
        assert headrace("plan", "--model-gb=100", "--instance", name).code == 0


def test_errors_of_sizes_are_of_the_command_line():
    with pytest.raises(InputInvalid, match="num_hidden_layers"):
        size_of({"hidden_size": 1})


def test_predictions_and_the_operator_know_the_same_file_systems_and_nodes() -> None:
    """Two tables, because the operator's brings pydantic, which `headrace plan` does without."""
    (tier,) = (tier for tier in fsx.TIERS if tier.deployment == "PERSISTENT_2")
    assert {name: tier.efa_step for name, tier in TIERS.items()} == tier.efa_steps
    assert {*tier.steps.values()} == {CAPACITY_STEP_GIB}
    assert tier.sizes == (MIN_CAPACITY_GIB,)
    for preset in PRESETS.values():
        (name,) = preset.instance_types
        assert (INSTANCES[name].gpus, INSTANCES[name].nics) == (preset.gpus, preset.efa_interfaces)
