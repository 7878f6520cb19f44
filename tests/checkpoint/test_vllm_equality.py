"""The checkpoint against vLLM itself: same names, types, shapes and bytes; same tokens."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from safetensors import safe_open

from headrace_checkpoint.sharder import ShardRequest, shard

from .architectures import CASES, COMMON, LLAMAS, OTHERS, Case
from .conftest import read_tensors, tiny_llama, write_tensors
from .quantized_models import quantize

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

ARCHITECTURES = Path(__file__).parents[2] / "docs" / "architectures.md"
READ_BY_VLLM = [
    *(Case(name, 1) for name in ("plain", "tied", "odd", "qwen3-moe", "gpt-oss")),
    Case("llama-wide", 1, form="ct-fp8-channel"),
    Case("llama-wide", 1, quantization="fp8"),
]
LOADED_BY_VLLM = [
    *(Case("llama-wide", 2, form=form) for form in ("gptq", "awq", "fp8-block")),
    Case("mixtral", 2, pp=2, ep=2),
]
"""What vLLM's CPU build can load on any processor, and compute on some."""

CACHE_SCALE = re.compile(r"\.attn\.[kqv]_(scale|zero_point)$")
ROUTERS = ("model.layers.0.mlp.gate", "model.layers.1.mlp.gate")


@dataclass(frozen=True)
class Both:
    """What our sharder and vLLM made; tokens are (from the model, from our checkpoint)."""

    ours: Path
    theirs: Path
    tokens: dict


def make_models(directory):
    for name, size in LLAMAS.items():
        tiny_llama.make_tiny_llama(directory / name, tiny_llama.Size(**size))
    path = directory / "tied-stored-twice" / "model.safetensors"
    tensors = read_tensors(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_tensors(path, tensors)


def shard_models(models, ours):
    for model, form in {(case.model, case.form) for case in CASES if case.form}:
        kept = ROUTERS if "qwen3-moe" in model else ()
        quantize(models / model, models / f"{model}-{form}", form, kept)
    for case in {*CASES, *READ_BY_VLLM}:
        shard_case(case, models, ours / str(case))


def shard_case(case, models, output):
    request = ShardRequest(
        source=models / case.source,
        output=output,
        tensor_parallel_size=case.tp,
        pipeline_parallel_size=case.pp,
        expert_parallel_size=case.ep,
        identity={},
        dtype=case.dtype,
        quantization=case.quantization,
        part_bytes=1_000_000,
    )
    shard(request)


def ask_vllm(request, log, when_made):
    """Run vllm_truth.py, calling `when_made` while it waits; returns its tokens."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Threads that wait for one another while others have the cores take most of the time.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    command = [sys.executable, Path(__file__).with_name("vllm_truth.py"), json.dumps(request)]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        try:
            if "MADE\n" in process.stdout:
                when_made()
            output, _ = process.communicate("\n", timeout=800)
        except BaseException:
            process.kill()
            raise
    assert process.returncode == 0, output[-4000:] + log.read_text()[-4000:]
    return json.loads(re.search(r"^TOKENS (.*)$", output, re.MULTILINE)[1])


@pytest.fixture(scope="session")
def both(tmp_path_factory):
    """Every case made by both sides; one vLLM process for all of them."""
    root = tmp_path_factory.mktemp("vllm")
    models, ours, theirs = (root / name for name in ("models", "ours", "theirs"))
    make_models(models)
    make = [
        {"family": family, "fields": COMMON | fields, "out": str(models / name)}
        for name, (family, fields) in OTHERS.items()
    ]
    save = [
        *(save_job(case, models / case.source, theirs / str(case)) for case in CASES),
        *(
            save_job(case, ours / str(case), theirs / f"{case}-loaded", "sharded_state")
            for case in LOADED_BY_VLLM
        ),
    ]
    generate = [
        {"model": str(model), "load_format": load_format, "quantization": online}
        for case in READ_BY_VLLM
        for model, load_format, online in (
            (models / case.source, "auto", case.online),
            (ours / str(case), "sharded_state", None),
        )
    ]
    request = {"make": make, "save": save, "generate": generate}
    answers = iter(ask_vllm(request, root / "stderr", lambda: shard_models(models, ours)))
    tokens = {case: (next(answers), next(answers)) for case in READ_BY_VLLM}
    return Both(ours, theirs, tokens)


def save_job(case, model, out, load_format="auto"):
    return {
        "model": str(model),
        "out": str(out),
        "tp": case.tp,
        "pp": case.pp,
        "ep": case.ep,
        "dtype": case.dtype,
        "quantization": case.online,
        "load_format": load_format,
    }


def rank_tensors(directory, rank, case):
    stage = f"model-pp-{rank // case.tp}-tp-{rank % case.tp}-part-*.safetensors"
    tensors = {}
    for path in directory.glob(stage if case.pp > 1 else f"model-rank-{rank}-part-*.safetensors"):
        part = read_tensors(path)
        assert not part.keys() & tensors.keys()
        tensors |= part
    return tensors


def name_of(case):
    patched = case.form.endswith("block")
    return f"{case}-kernel-said-to-be-supported" if patched else str(case)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_rank_equals_vllm_bit_for_bit(both, case):
    for rank in range(case.tp * case.pp):
        ours = rank_tensors(both.ours / str(case), rank, case)
        theirs = rank_tensors(both.theirs / str(case), rank, case)
        assert len(theirs) > 10
        if case.quantization != "none":
            # vLLM has these where config.json says that the model is quantized, as ours does.
            ours = {n: t for n, t in ours.items() if not CACHE_SCALE.search(n)}
        assert {n: t[:2] for n, t in ours.items()} == {n: t[:2] for n, t in theirs.items()}
        assert [n for n in theirs if ours[n] != theirs[n]] == []


@pytest.mark.parametrize("case", LOADED_BY_VLLM, ids=name_of)
def test_plain_vllm_loads_it_whole(both, case):
    """With the config.json of the checkpoint it makes the parameters that the files hold."""
    for rank in range(case.tp * case.pp):
        ours = rank_tensors(both.ours / str(case), rank, case)
        assert rank_tensors(both.theirs / f"{case}-loaded", rank, case) == ours


@pytest.mark.parametrize("case", READ_BY_VLLM, ids=str)
def test_plain_vllm_reads_it_and_answers_the_same(both, case):
    from_model, from_checkpoint = both.tokens[case]
    assert len(set(from_model)) > 4
    assert from_checkpoint == from_model


def test_the_version_compared_is_the_one_in_docs():
    version = metadata.version("vllm-cpu")
    assert f"vLLM {version} (CPU build)" in ARCHITECTURES.read_text()


def test_the_safetensors_library_reads_the_parts(both):
    for path in (both.ours / "plain-tp2-auto").glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            assert set(file.keys()) == set(read_tensors(path))
