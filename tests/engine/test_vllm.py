"""A stock vLLM over resident weights: same tokens as plain vLLM from the unsharded model."""

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
RANKS = 2
QUANTIZED = (
    "awq",
    "gptq",
    "ct-int4-group",
    "ct-int4-zero",
    "ct-int4-channel",
    "fp8-block",
    "ct-fp8-block",
)
CHANNEL = "ct-fp8-channel"
FUSED_ANEW = ("fp8-tensor", "fp8-tensor-static", "ct-fp8-tensor", "ct-fp8-tensor-static")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process less to start; ranks keep their own
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # ranks may share a NUMA node
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def run(script: str, *arguments: str, **environment: str) -> str:
    """Run a script of this directory; returns everything it printed."""
    out = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        env=os.environ | ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )
    assert out.returncode == 0, out.stdout[-8000:]
    return out.stdout


def marked(output: str, marker: str) -> Any:
    match = re.search(rf"^{marker} (.*)$", output, re.MULTILINE)
    assert match is not None, output[-8000:]
    return json.loads(match[1])


@pytest.fixture(scope="session")
def model(make_model: Callable[..., Path]) -> Path:
    return make_model()


@pytest.fixture(scope="session")
def plain_tokens(model: Path) -> list[int]:
    output = run("serve.py", str(model), "auto", str(RANKS))
    tokens: list[int] = marked(output, "TOKENS")
    assert len(set(tokens)) > 4  # a degenerate answer would prove little
    return tokens


# Both at the same tensor parallel size: the order of sums in bfloat16 decides between tokens.
# One rank is compared on a real node.
def test_the_same_tokens_as_plain_vllm(
    model: Path,
    plain_tokens: list[int],
    make_checkpoint: Callable[..., Path],
    start_loader: Callable[..., Any],
    tmp_path: Path,
) -> None:
    checkpoint = make_checkpoint(model, ranks=RANKS)
    plugin = tmp_path / "plugin"
    size = f"--tensor-parallel-size={RANKS}"
    loader = start_loader(checkpoint, size, f"--plugin-dir={plugin}")
    loader.until_phase("Ready")
    for part in checkpoint.glob("*.safetensors"):
        part.unlink()  # the engine has nothing to read weights from
    output = run(
        "serve.py",
        str(checkpoint),
        "headrace",
        str(RANKS),
        PYTHONPATH=str(plugin),
        HEADRACE_SOCKET=str(loader.socket),
    )
    assert marked(output, "TOKENS") == plain_tokens

    total = loader.status()["totalBytes"]
    attached = re.findall(r"headrace: attached rank=(\d+) tensors=(\d+) bytes=(\d+)", output)
    assert sorted(attached) == [(str(rank), "23", str(total // RANKS)) for rank in range(RANKS)]
    copied = sum(map(int, re.findall(r"private copies: tensors=\d+ bytes=(\d+)", output)))
    zero_copy = re.findall(r"zero-copy: bytes=(\d+) of (\d+)", output)
    assert len(zero_copy) == RANKS
    kept, of = (sum(map(int, column)) for column in zip(*zero_copy, strict=True))
    assert (kept + copied, of) == (total, total)
    assert kept > 0  # embeddings, norms and lm_head stay where they are on every CPU
    engines = loader.status()["engines"]
    assert sorted(engine["rank"] for engine in engines) == list(range(RANKS))


def test_a_quantization_that_repacks_serves_the_same_tokens_from_private_copies(
    model: Path,
    make_quantized: Callable[..., Path],
    make_checkpoint: Callable[..., Path],
    start_loader: Callable[..., Any],
) -> None:
    # Not in bfloat16, for which vLLM's kernel uses AMX wherever the CPU tells of it, even if the
    # kernel of the machine does not let processes have it.
    awq = make_quantized(model, "awq")
    checkpoint = make_checkpoint(awq, "float16")
    loader = start_loader(checkpoint)
    loader.until_phase("Ready")
    plain = marked(run("serve.py", str(awq), "auto", "1", "float16"), "TOKENS")
    assert len(set(plain)) > 4
    arguments = (str(checkpoint), "headrace", "1", "float16")
    output = run("serve.py", *arguments, HEADRACE_SOCKET=str(loader.socket))
    assert marked(output, "TOKENS") == plain
    pattern = r"private copies: tensors=24 bytes=(\d+) reason=(\w+) may write to weights"
    (copied,) = re.findall(pattern, output)
    assert copied[1].startswith("AutoAWQ")
    assert int(copied[0]) > loader.status()["totalBytes"] // 2


@pytest.fixture(scope="session")
def found(
    model: Path,
    make_quantized: Callable[..., Path],
    make_model: Callable[..., Path],
    make_checkpoint: Callable[..., Path],
    start_loader: Callable[..., Any],
) -> dict[str, Any]:
    """What vLLM builds of several checkpoints, all in one process."""
    plain = make_checkpoint(model)
    tied = make_checkpoint(make_model(tied=True))
    large = make_checkpoint(make_model(vocab_size=32768, hidden_size=512, layers=1))
    float32 = make_checkpoint(make_model(dtype="float32"), "float32")
    fp8 = make_checkpoint(model, quantization="fp8")
    paths = {"plain": plain, "tied": tied, "large": large, "float32": float32, "fp8": fp8}
    sources = {form: make_quantized(model, form) for form in (*QUANTIZED, *FUSED_ANEW, CHANNEL)}
    paths |= {form: make_checkpoint(source) for form, source in sources.items()}
    loaders = {name: start_loader(path, "--path", "Off") for name, path in paths.items()}
    jobs: dict[str, dict[str, Any]] = {
        name: {"model": str(path), "socket": str(loaders[name].socket)}
        for name, path in paths.items()
    }
    for name, source in {"plain": model, **sources}.items():
        jobs[name]["like"] = str(source)
    jobs["float32"]["dtype"] = "float32"  # linear weights are repacked on many more CPUs
    jobs["dtype"] = jobs["plain"] | {"dtype": "float16"}
    jobs["other"] = jobs["plain"] | {"socket": jobs["tied"]["socket"]}
    jobs["online"] = jobs["plain"] | {"quantization": "fp8"}
    jobs["sleep"] = jobs["plain"] | {"changes": {"enable_sleep_mode": True}}
    jobs["offload"] = jobs["plain"] | {"cpu_offload_gb": 1}
    jobs["prefetch"] = jobs["plain"] | {"offload_group_size": 2}
    jobs["transfer"] = jobs["plain"] | {"weight_transfer_config": {"backend": "nccl"}}
    output = run("build.py", json.dumps(list(jobs.values())))
    return dict(zip(jobs, marked(output, "FOUND"), strict=True))


@pytest.mark.parametrize("name", ["plain", "tied", "large", "float32", "fp8", *QUANTIZED])
def test_the_model_is_made_of_shared_memory(found: dict[str, Any], name: str) -> None:
    assert "error" not in found[name], found[name]["error"]
    assert found[name]["embedding_shared"]
    assert found[name]["norm_shared"]
    assert found[name]["tied"] == (name == "tied")
    assert found[name]["rotary_right"]
    assert found[name]["scale"] == 1.0
    assert found[name]["attributes_kept"]
    assert not found[name]["training"]


def test_fp8_weights_stay_where_they_are(found: dict[str, Any]) -> None:
    assert found["fp8"]["linear"] == ["torch.float8_e4m3fn", True]


@pytest.mark.parametrize("name", QUANTIZED)
def test_weights_that_a_quantization_may_write_to_are_private(
    found: dict[str, Any], name: str
) -> None:
    assert found[name]["linear"][1] is False


@pytest.mark.parametrize("name", ["plain", CHANNEL, *QUANTIZED])
def test_parameters_are_bit_for_bit_those_of_vllms_own_loader(
    found: dict[str, Any], name: str
) -> None:
    assert found[name]["differing"] == []


@pytest.mark.parametrize("name", FUSED_ANEW)
def test_fp8_that_is_scaled_anew_in_place_is_private_with_an_imitated_kernel_of_cuda(
    found: dict[str, Any], name: str
) -> None:
    assert "error" not in found[name], found[name]["error"]
    assert found[name]["linear"] == ["torch.float8_e4m3fn", False]
    assert found[name]["differing"] == []


def test_quantizing_while_loading_is_refused(found: dict[str, Any]) -> None:
    assert "quantization fp8 of a model that is not quantized" in found["online"]["error"]


def test_no_weight_is_allocated(found: dict[str, Any]) -> None:
    assert found["large"]["external"] > 32768 * 512 * 2 * 2
    assert found["large"]["largest"] < 4 << 20


@pytest.mark.parametrize(
    ("name", "feature"),
    [("offload", "offloading"), ("prefetch", "offloading"), ("transfer", "weight transfer")],
)
def test_what_moves_weights_is_refused(found: dict[str, Any], name: str, feature: str) -> None:
    assert f"--load-format headrace does not support {feature}" in found[name]["error"]


def test_reloading_is_refused(found: dict[str, Any]) -> None:
    assert "reloading weights into a model in place is not possible" in found["plain"]["reloaded"]


def test_another_element_type_is_refused(found: dict[str, Any]) -> None:
    assert found["dtype"]["error"].startswith("WeightsMismatch: shape or element type differs")
    assert "torch.bfloat16" in found["dtype"]["error"]


def test_another_checkpoint_is_refused(found: dict[str, Any]) -> None:
    assert "the resident weights come from" in found["other"]["error"]


def test_sleep_mode_is_refused(found: dict[str, Any]) -> None:
    assert "sleep mode" in found["sleep"]["error"]
