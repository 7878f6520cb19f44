"""SGLang over weights that a loader holds on the GPU."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not importlib.util.find_spec("sglang"), reason="needs SGLang"),
]
ALWAYS = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "disable_radix_cache": True,
    "mem_fraction_static": 0.2,
    "dtype": "bfloat16",
}
EAGER = {"disable_cuda_graph": True}
GRAPHS = {
    "cuda_graph_bs_decode": [1, 2, 4],
    "cuda_graph_max_bs_decode": 4,
    "disable_prefill_cuda_graph": True,
}
COPIED = 4096  # bytes at most: scalars that are not aligned
EXPERTS = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}


def copied(output: str) -> list[int]:
    """Bytes that are not where the loader put them, for each rank that said so."""
    found = re.findall(r"headrace: zero-copy: bytes=(\d+) of (\d+)", output)
    return [int(total) - int(kept) for kept, total in found]


def test_sglang_serves_the_same_tokens_and_copies_nothing(
    make_model: Callable[..., Path],
    make_checkpoint: Callable[..., Path],
    hold: Callable[..., Any],
    start_engine: Callable[..., Any],
) -> None:
    model = make_model(layers=4, hidden_size=2048, intermediate_size=5632, heads=16, kv_heads=4)
    eager, graphs = ({"SERVE_OPTIONS": json.dumps(ALWAYS | options)} for options in (EAGER, GRAPHS))
    plain = start_engine("serve_sglang.py", model, "auto", **eager)
    plain.ready()
    tokens = plain.ask()
    assert len(set(tokens[0])) > 4  # a degenerate answer would prove little
    plain.kill()

    checkpoint = make_checkpoint(model)
    loader, environment = hold(checkpoint)
    for part in checkpoint.glob("*.safetensors"):
        part.unlink()  # the engine has nothing to read weights from
    for options in (eager, graphs):  # the second attaches after the first was killed
        engine = start_engine("serve_sglang.py", checkpoint, "headrace", **options, **environment)
        engine.ready()
        assert engine.ask() == tokens
        (own,) = copied(engine.output())
        assert own <= COPIED
        if options is eager:
            engine.kill()
    assert re.search(r"Capture .*graph.* end", engine.output())
    loader.kill()
    assert engine.ask() == tokens


def test_a_mixture_of_experts_serves_the_same_tokens(
    load_module: Callable[[Path], Any],
    tmp_path: Path,
    make_checkpoint: Callable[..., Path],
    hold: Callable[..., Any],
    start_engine: Callable[..., Any],
) -> None:
    models = load_module(Path(__file__).parents[1] / "checkpoint/tiny_models.py")
    models.make_model("Qwen3Moe", EXPERTS, tmp_path / "model")
    options = json.dumps(ALWAYS | EAGER | {"moe_runner_backend": "triton"})
    environment = {"SERVE_OPTIONS": options, "TORCHDYNAMO_DISABLE": "1"}  # a router is compiled
    compare(tmp_path / "model", 1, environment, make_checkpoint, hold, start_engine)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_on_two_gpus_serve_the_same_tokens(
    make_model: Callable[..., Path],
    make_checkpoint: Callable[..., Path],
    hold: Callable[..., Any],
    start_engine: Callable[..., Any],
) -> None:
    model = make_model(layers=4, hidden_size=2048, intermediate_size=5632, heads=16, kv_heads=4)
    options = ALWAYS | EAGER | {"tp_size": 2, "disable_custom_all_reduce": True}
    environment = {"SERVE_OPTIONS": json.dumps(options)}
    compare(model, 2, environment, make_checkpoint, hold, start_engine)


def compare(
    model: Path,
    ranks: int,
    environment: dict[str, str],
    make_checkpoint: Callable[..., Path],
    hold: Callable[..., Any],
    start_engine: Callable[..., Any],
) -> None:
    """Ask an engine that reads the model, and one whose weights a loader holds."""
    plain = start_engine("serve_sglang.py", model, "auto", **environment)
    plain.ready()
    tokens = plain.ask()
    assert len(set(tokens[0])) > 4  # a degenerate answer would prove little
    plain.kill()
    checkpoint = make_checkpoint(model, ranks=ranks)
    _, more = hold(checkpoint, f"--tensor-parallel-size={ranks}")
    engine = start_engine("serve_sglang.py", checkpoint, "headrace", **environment, **more)
    engine.ready()
    assert engine.ask() == tokens
    assert [own <= COPIED for own in copied(engine.output())] == [True] * ranks
