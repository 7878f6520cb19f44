"""Other loaders of safetensors files, each in a process of its own, measured on demand.

    python peers.py NAME DEVICE

says on a line of JSON whether NAME is installed; then each line of standard input names a
directory to load and each answer is a line with the seconds it took. Importing the library
and opening the device come before, so they do not count.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

THREADS = int(os.environ.get("BENCH_THREADS", "10"))


def safetensors(device: str) -> Callable[[Sequence[str]], Any]:
    from safetensors.torch import load_file

    def load(paths: Sequence[str]) -> Any:
        files = [load_file(path, device=device) for path in paths]
        if device == "cpu":  # so far only mapped
            return [tensor.clone() for file in files for tensor in file.values()]
        return files

    return load


def runai(device: str) -> Callable[[Sequence[str]], Any]:
    from runai_model_streamer import SafetensorsStreamer

    def load(paths: Sequence[str]) -> Any:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(list(paths))
            return [tensor.to(device) for _, tensor in streamer.get_tensors()]

    return load


def vllm(device: str) -> Callable[[Sequence[str]], Any]:
    """Its default loader's iterator, and a copy of each tensor as models' parameters take it."""
    import torch
    from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

    def load(paths: Sequence[str]) -> Any:
        weights = safetensors_weights_iterator(list(paths), use_tqdm_on_load=False)
        return [torch.empty_like(found, device=device).copy_(found) for _, found in weights]

    return load


def fastsafetensors(device: str) -> Callable[[Sequence[str]], Any]:
    from fastsafetensors import fastsafe_open

    def load(paths: Sequence[str]) -> Any:
        with fastsafe_open(list(paths), device=device, nogds=True) as file:
            return [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - no mapping

    return load


def instanttensor(device: str) -> Callable[[Sequence[str]], Any]:
    from instanttensor import BackendPolicy, safe_open

    def load(paths: Sequence[str]) -> Any:
        with safe_open(
            list(paths), framework="pt", device=device, backend=BackendPolicy.BUFFERED
        ) as file:
            return list(file.tensors())

    return load


def kvikio(device: str) -> Callable[[Sequence[str]], Any]:
    import cupy
    from kvikio import CompatMode, CuFile, defaults

    defaults.set({"compat_mode": CompatMode.ON, "num_threads": THREADS})

    def load(paths: Sequence[str]) -> Any:
        buffers = [cupy.empty(Path(path).stat().st_size, dtype=cupy.uint8) for path in paths]
        files = [CuFile(path, "r") for path in paths]  # open until they are read
        for read in [file.pread(buffer) for file, buffer in zip(files, buffers, strict=True)]:
            read.get()
        return buffers

    if device == "cpu":
        raise ImportError("kvikio reads to GPUs alone")
    return load


PEERS = {
    "safetensors": ("safetensors", safetensors),
    "vllm": ("vllm", vllm),
    "runai-model-streamer": ("runai-model-streamer", runai),
    "fastsafetensors": ("fastsafetensors", fastsafetensors),
    "instanttensor": ("instanttensor", instanttensor),
    "kvikio": ("kvikio-cu13", kvikio),
}


def _version(distribution: str) -> str:
    """Return the version of what has the module of that name: vLLM's build for CPUs is another."""
    return version(packages_distributions().get(distribution, [distribution])[0])


def _settle(device: str) -> None:
    if device == "cpu":
        return
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.synchronize()
    if "cupy" in sys.modules:
        sys.modules["cupy"].cuda.Device().synchronize()


def _forget() -> None:
    gc.collect()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.empty_cache()
    if "cupy" in sys.modules:
        sys.modules["cupy"].get_default_memory_pool().free_all_blocks()


def main() -> None:
    name, device = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    distribution, make = PEERS[name]
    try:
        load = make(device)
        state: dict[str, object] = {"version": _version(distribution)}
    except (ImportError, PackageNotFoundError, OSError, RuntimeError) as error:
        state = {"missing": f"not installed: {error}"}
    print(json.dumps(state), file=answers, flush=True)
    for line in sys.stdin if "version" in state else ():
        paths = sorted(str(path) for path in Path(line.strip()).glob("*.safetensors"))
        begin = time.perf_counter()
        try:
            loaded = load(paths)
            _settle(device)
            answer: dict[str, object] = {"seconds": time.perf_counter() - begin}
            del loaded
        except Exception as error:  # noqa: BLE001 - a peer's failure is a result
            answer = {"error": f"{type(error).__name__}: {error}"}
        _forget()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
