"""SGLang, loaders and checkpoints for its tests."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace_checkpoint.sharder import ShardRequest, shard
from headrace_loader.plugin import copy_engine_side
from workspace import sglang

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a process that finds SGLang and, as in a pod, the plugin."""
    plugin = tmp_path_factory.mktemp("plugin")
    copy_engine_side(plugin)
    path = (plugin, sglang.ensure(), Path(__file__).parent / "kernels")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": "0|0",  # ranks may share a NUMA node
        "SGLANG_NCCL_SO_PATH": "none",  # torch's would be used, which is for GPUs
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="session")
def start_loader(
    support: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Any]]:
    """Start loaders; all end with the session."""
    started: list[Any] = []

    def start(checkpoint: Path, *arguments: str) -> Any:
        root = tmp_path_factory.mktemp("loader")
        started.append(support.LoaderProcess(root, checkpoint, *arguments))
        return started[-1]

    yield start
    for loader in started:
        loader.close()


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Shard a model; returns the checkpoint's directory."""

    def make(model: Path, ranks: int = 1, quantization: str = "none") -> Path:
        output = tmp_path_factory.mktemp("checkpoints") / "made"
        shard(
            ShardRequest(
                source=model,
                output=output,
                tensor_parallel_size=ranks,
                identity={},
                dtype="auto",
                quantization=quantization,
            )
        )
        return output

    return make


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    spec = importlib.util.spec_from_file_location(
        "tiny_llama", REPOSITORY / "examples/tiny_llama.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    made: Path = module.make_tiny_llama(tmp_path_factory.mktemp("model"))
    return made
