"""What needs a real GPU: `pytest -m gpu`. Without one these tests are skipped and say why."""

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def _missing() -> str | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "needs an NVIDIA GPU: there is no driver here (libcuda.so.1)"
    code = driver.cuInit(0)
    return f"needs an NVIDIA GPU: cuInit answers {code}" if code else None


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """Skip where there is none."""
    if reason := _missing():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def used_mib() -> Callable[[], int]:
    """Memory of GPU 0 in use, as another process sees it."""

    def used() -> int:
        command = ["nvidia-smi", "-i", "0", "--query-gpu=memory.used", "--format=csv,noheader"]
        out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return int(out.stdout.split()[0])

    return used


@pytest.fixture
def start_engine(
    load_module: Callable[[Path], Any], tmp_path: Path
) -> Iterator[Callable[..., Any]]:
    """Start engines: a script of this directory and its arguments; all end with the test."""
    module = load_module(HERE / "engine_process.py")
    started: list[Any] = []

    def start(script: str, *arguments: object, **environment: str) -> Any:
        log = tmp_path / f"engine{len(started)}.log"
        started.append(module.EngineProcess(log, script, *arguments, **environment))
        return started[-1]

    yield start
    for engine in started:
        engine.kill()


@pytest.fixture
def ask_plain(start_engine: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """Ask an engine that reads its weights itself; returns what it said when ready, and tokens."""

    def ask(script: str, *arguments: object, **environment: str) -> tuple[Any, Any]:
        engine = start_engine(script, *arguments, **environment)
        said, tokens = engine.ready(), engine.ask()
        first = tokens[0] if isinstance(tokens[0], list) else tokens
        assert len(set(first)) > 4  # a degenerate answer would prove little
        engine.kill()
        return said, tokens

    return ask


@pytest.fixture
def hold(
    start_loader: Callable[..., Any], tmp_path: Path
) -> Callable[..., tuple[Any, dict[str, str]]]:
    """Load a checkpoint and delete its weight files, so that engines have none to read.

    Returns the loader, and the environment of an engine with its plugin.
    """

    def held(checkpoint: Path, *options: str) -> tuple[Any, dict[str, str]]:
        plugin = tmp_path / "plugin"
        loader = start_loader(checkpoint, "--backend", "cuda", f"--plugin-dir={plugin}", *options)
        loader.until_phase("Ready")
        for part in checkpoint.glob("*.safetensors"):
            part.unlink()
        path = [str(plugin), os.environ.get("PYTHONPATH", "")]
        socket = str(loader.socket)
        return loader, {"HEADRACE_SOCKET": socket, "PYTHONPATH": os.pathsep.join(path)}

    return held
