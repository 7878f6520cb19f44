"""SGLang over weights that a loader holds on the GPU."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
        found = re.search(r"headrace: zero-copy: bytes=(\d+) of (\d+)", engine.output())
        assert found is not None
        assert int(found[2]) - int(found[1]) <= COPIED
        if options is eager:
            engine.kill()
    assert re.search(r"Capture .*graph.* end", engine.output())
    loader.kill()
    assert engine.ask() == tokens
