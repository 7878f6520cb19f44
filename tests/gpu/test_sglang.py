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
LLAMA = {
    "layers": 4,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "heads": 16,
    "kv_heads": 4,
}
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


@pytest.fixture
def compare(
    make_checkpoint: Callable[..., Path],
    ask_plain: Callable[..., Any],
    hold: Callable[..., Any],
    start_engine: Callable[..., Any],
) -> Callable[..., tuple[Any, Any, Any]]:
    """Ask an engine that reads a model, and engines whose weights a loader holds.

    Each of these starts after the one before was killed, with options of its own. Returns the
    loader, the last engine, and the tokens.
    """

    def compare(
        model: Path, *options: dict[str, Any], ranks: int = 1, **environment: str
    ) -> tuple[Any, Any, Any]:
        first, *_ = every = [json.dumps(ALWAYS | more) for more in options]
        script = "serve_sglang.py"
        _, tokens = ask_plain(script, model, "auto", SERVE_OPTIONS=first, **environment)
        checkpoint = make_checkpoint(model, ranks=ranks)
        loader, found = hold(checkpoint, f"--tensor-parallel-size={ranks}")
        environment |= found
        engine = None
        for one in every:
            if engine:
                engine.kill()
            engine = start_engine(script, checkpoint, "headrace", SERVE_OPTIONS=one, **environment)
            engine.ready()
            assert engine.ask() == tokens
            assert [own <= COPIED for own in copied(engine.output())] == [True] * ranks
        return loader, engine, tokens

    return compare


def test_sglang_serves_the_same_tokens_and_copies_nothing(
    make_model: Callable[..., Path], compare: Callable[..., Any]
) -> None:
    loader, engine, tokens = compare(make_model(**LLAMA), EAGER, GRAPHS)
    assert re.search(r"Capture .*graph.* end", engine.output())
    loader.kill()
    assert engine.ask() == tokens


def test_a_mixture_of_experts_serves_the_same_tokens(
    load_module: Callable[[Path], Any], tmp_path: Path, compare: Callable[..., Any]
) -> None:
    models = load_module(Path(__file__).parents[1] / "checkpoint/tiny_models.py")
    models.make_model("Qwen3Moe", EXPERTS, tmp_path / "model")
    options = EAGER | {"moe_runner_backend": "triton"}
    compare(tmp_path / "model", options, TORCHDYNAMO_DISABLE="1")  # a router is compiled


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_on_two_gpus_serve_the_same_tokens(
    make_model: Callable[..., Path], compare: Callable[..., Any]
) -> None:
    options = EAGER | {"tp_size": 2, "disable_custom_all_reduce": True}
    compare(make_model(**LLAMA), options, ranks=2)
