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
EAGER = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "disable_cuda_graph": True,
    "disable_radix_cache": True,
    "mem_fraction_static": 0.2,
    "dtype": "bfloat16",
}
COPIED = 4096  # bytes at most: scalars that are not aligned


def test_sglang_serves_the_same_tokens_and_copies_nothing(
    make_model: Callable[..., Path],
    make_checkpoint: Callable[..., Path],
    hold: Callable[..., Any],
    start_engine: Callable[..., Any],
) -> None:
    model = make_model(layers=4, hidden_size=2048, intermediate_size=5632, heads=16, kv_heads=4)
    options = {"SERVE_OPTIONS": json.dumps(EAGER)}
    plain = start_engine("serve_sglang.py", model, "auto", **options)
    plain.ready()
    tokens = plain.ask()
    assert len(set(tokens[0])) > 4  # a degenerate answer would prove little
    plain.kill()

    checkpoint = make_checkpoint(model)
    _, environment = hold(checkpoint)
    for part in checkpoint.glob("*.safetensors"):
        part.unlink()  # the engine has nothing to read weights from
    options |= environment
    for _ in range(2):  # the second attaches after the first was killed
        engine = start_engine("serve_sglang.py", checkpoint, "headrace", **options)
        engine.ready()
        assert engine.ask() == tokens
        found = re.search(r"headrace: zero-copy: bytes=(\d+) of (\d+)", engine.output())
        assert found is not None
        assert int(found[2]) - int(found[1]) <= COPIED
        engine.kill()
