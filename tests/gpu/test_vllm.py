"""A stock vLLM over weights in GPU memory: the same tokens, no copy, the same KV cache."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="needs vLLM"),
]

MIB = 1 << 20
LAYERS = 4
UTILIZATION = 0.3
CUDA_GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2]}


def test_vllm_serves_from_the_loaders_memory(
    make_model: Callable[..., Path],
    make_checkpoint: Callable[..., Path],
    ask_plain: Callable[..., Any],
    hold: Callable[..., Any],
    start_engine: Callable[..., Any],
) -> None:
    """One story, since starting an engine takes most of a minute."""
    model = make_model(
        layers=LAYERS,
        hidden_size=2048,
        intermediate_size=5632,
        heads=16,
        kv_heads=4,
        vocab_size=32000,
    )
    said, tokens = ask_plain("serve.py", model, "auto", UTILIZATION)
    blocks = said["blocks"]

    checkpoint = make_checkpoint(model)
    loader, environment = hold(checkpoint)
    total = loader.status()["totalBytes"]

    engine = start_engine("serve.py", checkpoint, "headrace", UTILIZATION, **environment)
    # What the loader holds is rounded up to pages; a block is smaller than that.
    assert abs(engine.ready()["blocks"] - blocks) <= 0.01 * blocks
    assert engine.ask() == tokens
    said = engine.output()
    # Nothing is copied but attention's four scalar scales per layer.
    copied = sum(map(int, re.findall(r"private copies: tensors=\d+ bytes=(\d+)", said)))
    assert copied == 16 * LAYERS
    assert f"headrace: zero-copy: bytes={total - copied} of {total}" in said
    ((added, peak),) = re.findall(
        r"post-processing added (\d+) bytes.*torch allocated at most (\d+) bytes", said, re.DOTALL
    )
    assert int(added) < MIB
    assert int(peak) < total // 20

    engine.kill()
    environment["SERVE_OPTIONS"] = json.dumps({"compilation_config": CUDA_GRAPHS})
    again = start_engine("serve.py", checkpoint, "headrace", UTILIZATION, **environment)
    again.ready()
    assert "Capturing CUDA graphs" in again.output()
    assert again.ask() == tokens
    loader.kill()
    assert again.ask() == tokens


def test_a_method_that_writes_to_weights_fails_and_says_so(
    make_model: Callable[..., Path],
    make_checkpoint: Callable[..., Path],
    hold: Callable[..., Any],
    start_engine: Callable[..., Any],
) -> None:
    checkpoint = make_checkpoint(make_model())
    _, environment = hold(checkpoint)
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    engine = start_engine("writing.py", checkpoint, "headrace", 0.1, **environment)
    assert engine.process.wait(200) != 0
    assert (
        "a quantization or kernel that changes weights in place cannot be used" in engine.output()
    )


def test_fp8_weights_stay_where_they_are(
    make_model: Callable[..., Path],
    make_checkpoint: Callable[..., Path],
    ask_plain: Callable[..., Any],
    hold: Callable[..., Any],
    start_engine: Callable[..., Any],
) -> None:
    """What the engine reads from the same files by itself serves the same tokens."""
    model = make_model(layers=LAYERS, hidden_size=1024, intermediate_size=2816, heads=16)
    checkpoint = make_checkpoint(model, quantization="fp8")
    _, tokens = ask_plain("serve.py", checkpoint, "sharded_state", UTILIZATION)
    _, environment = hold(checkpoint)
    engine = start_engine("serve.py", checkpoint, "headrace", UTILIZATION, **environment)
    engine.ready()
    assert engine.ask() == tokens
    ((kept, total),) = re.findall(r"headrace: zero-copy: bytes=(\d+) of (\d+)", engine.output())
    assert int(kept) > 0.95 * int(total)
