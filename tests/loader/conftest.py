"""Loader processes that end with their test."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _load() -> ModuleType:
    path = Path(__file__).with_name("loader_process.py")
    spec = importlib.util.spec_from_file_location("loader_process", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def support() -> ModuleType:
    """The module loader_process."""
    return _load()


@pytest.fixture
def start_loader(support: ModuleType, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start loaders, each in a directory of its own; all end with the test."""
    started: list[Any] = []

    def start(checkpoint: Path, *arguments: str, **environment: str) -> Any:
        root = tmp_path / f"loader{len(started)}"
        started.append(support.LoaderProcess(root, checkpoint, *arguments, **environment))
        return started[-1]

    yield start
    for loader in started:
        loader.close()
