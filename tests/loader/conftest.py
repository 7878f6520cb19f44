"""Loader processes that end with their test."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def compile_c() -> Callable[[Path, Path], None]:
    """Compile a C file to a library, with all warnings; skips where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    options = ["-Wall", "-Wextra", "-Werror", "-O2", "-shared", "-fPIC", "-pthread"]

    def compiled(source: Path, library: Path) -> None:
        subprocess.run([compiler, *options, source, "-o", library], check=True, timeout=60)

    return compiled


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
