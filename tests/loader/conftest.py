"""Loader processes that end with their test."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


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
