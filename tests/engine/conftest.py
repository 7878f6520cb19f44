"""Loaders, checkpoints and tiny models for the engine's tests."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from headrace_checkpoint.sharder import ShardRequest, shard

REPOSITORY = Path(__file__).parents[2]


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def start_loader(
    support: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Any]]:
    """Start loaders; all end with the session."""
    started: list[Any] = []

    def start(checkpoint: Path, *arguments: str, **environment: str) -> Any:
        root = tmp_path_factory.mktemp("loader")
        started.append(support.LoaderProcess(root, checkpoint, *arguments, **environment))
        return started[-1]

    yield start
    for loader in started:
        loader.close()


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a tiny Llama; keyword arguments are those of tiny_llama.Size."""
    tiny_llama = _module(REPOSITORY / "examples/tiny_llama.py")

    def make(**size: Any) -> Path:
        directory = tmp_path_factory.mktemp("model")
        made: Path = tiny_llama.make_tiny_llama(directory, tiny_llama.Size(**size))
        return made

    return make


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Shard a model; returns the checkpoint's directory."""

    def make(model: Path, dtype: str = "auto", ranks: int = 1, quantization: str = "none") -> Path:
        output = tmp_path_factory.mktemp("checkpoints") / "made"
        shard(
            ShardRequest(
                source=model,
                output=output,
                tensor_parallel_size=ranks,
                identity={},
                dtype=dtype,
                quantization=quantization,
            )
        )
        return output

    return make
