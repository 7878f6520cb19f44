"""A stock SGLang over resident weights: its own tensors, bit for bit, and its own tokens."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

HERE = Path(__file__).parent
ENGINES = HERE.parents[1] / "docs/engines.md"
COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 70,
    "max_position_embeddings": 128,
}
_EXPERTS = {
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"head_dim": 16}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3-moe": ("Qwen3Moe", _EXPERTS),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "padded": ("Llama", {"intermediate_size": 96}),
    "gemma": ("Gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "dense-between": ("Qwen3Moe", _EXPERTS | {"decoder_sparse_step": 2}),
}
RANKS = (1, 2)


@pytest.fixture(scope="session")
def found(
    environment: dict[str, str],
    make_checkpoint: Callable[..., Path],
    start_loader: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """What SGLang makes of all models and settings: one process for each rank."""
    directory = tmp_path_factory.mktemp("models")
    make = [
        {"family": family, "fields": COMMON | fields, "out": str(directory / name)}
        for name, (family, fields) in (MODELS | REFUSED).items()
    ]
    with subprocess.Popen(
        [sys.executable, str(HERE / "ranks.py"), json.dumps(make)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line == "MADE\n":
                break
        else:
            pytest.fail("".join(printed[-40:]))
        jobs = [
            _job(f"{name}-{ranks}", directory / name, ranks, make_checkpoint, start_loader)
            for name in MODELS
            for ranks in RANKS
        ]
        jobs += _refused(jobs, directory, make_checkpoint, start_loader)
        output, _ = process.communicate(json.dumps(jobs) + "\n", timeout=600)
    marked: dict[str, Any] = _marked(output, "FOUND")
    return marked


def _job(
    name: str,
    model: Path,
    ranks: int,
    make_checkpoint: Callable[..., Path],
    start_loader: Callable[..., Any],
    **sharding: Any,
) -> dict[str, Any]:
    checkpoint = make_checkpoint(model, ranks=ranks, **sharding)
    loader = start_loader(checkpoint, f"--tensor-parallel-size={ranks}")
    return {
        "name": name,
        "ranks": ranks,
        "plain": str(model),
        "checkpoint": str(checkpoint),
        "socket": str(loader.socket),
        "changes": {},
    }


def _refused(
    jobs: list[dict[str, Any]], directory: Path, *making: Callable[..., Any]
) -> list[dict[str, Any]]:
    by_name = {job["name"]: job for job in jobs}
    llama = by_name["llama-1"]
    return [
        _job("padded", directory / "padded", 2, *making),
        _job("gemma", directory / "gemma", 1, *making),
        _job("dense-between", directory / "dense-between", 1, *making),
        _job("fp8", directory / "llama", 1, *making, quantization="fp8"),
        llama | {"name": "other", "socket": by_name["mistral-1"]["socket"]},
        llama | {"name": "dtype", "changes": {"dtype": "float16"}},
        llama | {"name": "offload", "changes": {"cpu_offload_gb": 1}},
        llama | {"name": "key", "changes": {"model_loader_extra_config": '{"sockets": ""}'}},
    ]


def _marked(output: str, marker: str) -> Any:
    match = re.search(rf"^{marker} (.*)$", output, re.MULTILINE)
    assert match is not None, output[-8000:]
    return json.loads(match[1])


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", MODELS)
def test_tensors_are_those_of_its_own_loader(found: dict[str, Any], name: str, ranks: int) -> None:
    of_ranks = found[f"{name}-{ranks}"]
    assert len(of_ranks) == ranks
    for one in of_ranks:
        assert "error" not in one, one["error"]
        assert one["difference"] == ""
        assert one["shared"] > 0
        assert set(one["private"]) <= set(one["copies"])
        assert one["preloaded"][0] == one["preloaded"][1] > 0
        assert "reloading weights" in one["reload"]
        assert not one["training"]


def test_what_it_takes_is_what_is_proven_and_documented(found: dict[str, Any]) -> None:
    proven = {f"{family}ForCausalLM" for family, _ in MODELS.values()}
    assert found["alone"][0]["architectures"] == sorted(proven)
    section = ENGINES.read_text().split("## SGLang")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+ForCausalLM)`", section, re.MULTILINE)) == proven


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("padded", "gate_up_proj.weight (checkpoint torch.bfloat16 [96, 64], model"),
        ("gemma", "does not support architecture GemmaForCausalLM"),
        ("dense-between", "does not have: model.layers.0.mlp.experts.w13_weight"),
        ("fp8", "does not support quantization compressed-tensors"),
        ("other", "the resident weights come from"),
        ("dtype", "model.embed_tokens.weight (checkpoint torch.bfloat16 [128, 64], model"),
        ("offload", "does not support offloading weights"),
        ("key", "sockets: known are socket, timeout"),
    ],
)
def test_what_would_be_wrong_is_refused(found: dict[str, Any], name: str, message: str) -> None:
    for one in found[name]:
        assert message in one["error"]


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        ("pp_size", "pipeline parallelism"),
        ("ep_size", "expert parallelism"),
        ("attn_dp_size", "data parallel attention or experts"),
        ("moe_dp_size", "data parallel attention or experts"),
        ("attn_cp_size", "context parallelism"),
        ("dcp_size", "context parallelism"),
    ],
)
def test_other_groups_of_ranks_are_refused(found: dict[str, Any], size: str, kind: str) -> None:
    message = f"--load-format headrace does not support {kind}"
    assert found["alone"][0]["parallel"][size] == message


def test_layouts_of_equal_shape_are_refused(found: dict[str, Any]) -> None:
    alone = found["alone"][0]
    assert {"load_up_proj_weight_first", "use_triton_kernels"} <= alone["layouts"].keys()
    for flag, message in alone["layouts"].items():
        assert f"experts: SimpleNamespace has experts in a layout of its own ({flag})" in message
    assert "layer.attn._k_scale is 0.5" in alone["scale"]


@pytest.mark.skipif(
    os.environ.get("HEADRACE_SGLANG") != "engine",
    reason="SGLang's whole engine takes a minute a start: make test-sglang",
)
@pytest.mark.parametrize("ranks", RANKS)
def test_the_same_tokens_as_plain_sglang(
    make_model: Callable[..., Path],
    environment: dict[str, str],
    make_checkpoint: Callable[..., Path],
    start_loader: Callable[..., Any],
    ranks: int,
) -> None:
    model = make_model()
    plain = _serve(environment, model, "auto", ranks)
    checkpoint = make_checkpoint(model, ranks=ranks)
    loader = start_loader(checkpoint, f"--tensor-parallel-size={ranks}")
    loader.until_phase("Ready")
    for part in checkpoint.glob("*.safetensors"):
        part.unlink()  # the engine has nothing to read weights from
    ours = _serve(
        environment | {"HEADRACE_SOCKET": str(loader.socket)}, checkpoint, "headrace", ranks
    )
    tokens = _marked(plain, "TOKENS")
    assert len(set(tokens)) > 4  # a degenerate answer would prove little
    assert _marked(ours, "TOKENS") == tokens
    log = re.sub(r"^\[[^]]*\] ", "", ours, flags=re.MULTILINE).splitlines()
    attached = [line for line in log if line.startswith("headrace: attached")]
    assert len(attached) == ranks
    measured = next(n for n, line in enumerate(log) if line.startswith("Memory baseline taken"))
    assert log.index(attached[0]) < measured
    zero_copy = re.findall(r"headrace: zero-copy: bytes=(\d+) of (\d+)", ours)
    assert len(zero_copy) == ranks
    assert all(kept == of for kept, of in zero_copy)


def _serve(environment: dict[str, str], model: Path, load_format: str, ranks: int) -> str:
    out = subprocess.run(
        [sys.executable, str(HERE / "serve.py"), str(model), load_format, str(ranks)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert out.returncode == 0, out.stdout[-8000:]
    return out.stdout
