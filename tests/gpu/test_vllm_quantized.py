"""A stock vLLM over quantized weights in GPU memory: the same tokens, from private copies."""

import importlib.util
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

UTILIZATION = 0.3


@pytest.mark.parametrize("form", ["gptq", "awq", "fp8-tensor", "fp8-block", "ct-int4-group"])
def test_quantized_weights_that_vllm_may_write_to_are_private_copies(
    form: str,
    make_model: Callable[..., Path],
    make_quantized: Callable[..., Path],
    make_checkpoint: Callable[..., Path],
    ask_plain: Callable[..., Any],
    hold: Callable[..., Any],
    start_engine: Callable[..., Any],
) -> None:
    source = make_model(hidden_size=1024, intermediate_size=2816, heads=16)
    model = make_quantized(source, form)
    _, tokens = ask_plain("serve.py", model, "auto", UTILIZATION)
    checkpoint = make_checkpoint(model)
    loader, environment = hold(checkpoint)
    engine = start_engine("serve.py", checkpoint, "headrace", UTILIZATION, **environment)
    engine.ready()
    assert engine.ask() == tokens
    copied = re.findall(
        r"private copies: tensors=\d+ bytes=(\d+) reason=\w+ may write to weights", engine.output()
    )
    assert sum(map(int, copied)) > loader.status()["totalBytes"] // 2
