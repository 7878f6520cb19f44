"""A stock vLLM on one GPU: plain, and attached to what the loader holds. Prints JSON.

    python bench/engine.py [--layers 16] [--utilization 0.4] [--work DIR] > results.json

Needs a GPU, a CUDA build of vLLM and the loader's CUDA backend. Makes a random Llama of several
GiB, serves it with plain vLLM, then from a loader's memory: two engines at a time, one killed and
replaced, the loader killed and restarted, at last all of them dead. Progress goes to stderr.
"""

import argparse
import contextlib
import datetime as dt
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
for folder in ("tests/gpu", "tests/loader", "examples", "loader_image"):
    sys.path.insert(0, str(REPOSITORY / folder))

from engine_process import EngineProcess  # noqa: E402
from loader_process import LoaderProcess  # noqa: E402
from tiny_llama import Size, make_tiny_llama  # noqa: E402

from headrace_checkpoint.sharder import ShardRequest, shard  # noqa: E402

MIB = 1 << 20
_SAID = {
    "attach_ms": (r"headrace: attached .* seconds=([\d.]+) mapping", 1000),
    "mapping_ms": (r"mapping_seconds=([\d.]+)", 1000),
    "zero_copy_bytes": (r"zero-copy: bytes=(\d+) of", 1),
    "parameter_bytes": (r"zero-copy: bytes=\d+ of (\d+)", 1),
    "post_processing_bytes": (r"post-processing added (\d+) bytes", 1),
    "torch_peak_bytes_in_load": (r"torch allocated at most (\d+) bytes", 1),
    "vllm_model_gib": (r"Model loading took ([\d.]+) ?GiB", 1),
    "vllm_model_seconds": (r"Model loading took .* and ([\d.]+) seconds", 1),
}


def log(text: str) -> None:
    sys.stderr.write(f"[{time.strftime('%H:%M:%S')}] {text}\n")
    sys.stderr.flush()


def used_mib() -> int:
    """GPU memory in use, as another process sees it, once processes that end have ended."""
    before, now = -1, int(nvidia_smi("memory.used").split()[0])
    while now != before:
        time.sleep(1)
        before, now = now, int(nvidia_smi("memory.used").split()[0])
    return now


def nvidia_smi(fields: str) -> str:
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def make(work: Path, layers: int) -> tuple[Path, Path]:
    """The model as transformers has it, and its checkpoint."""
    size = Size(
        layers=layers,
        hidden_size=4096,
        intermediate_size=11008,
        heads=32,
        kv_heads=8,
        vocab_size=32000,
    )
    model, checkpoint = work / "model", work / "checkpoint"
    if not model.exists():
        make_tiny_llama(work / "new", size)
        (work / "new").rename(model)
        log("model made")
    if not checkpoint.exists():
        shard(
            ShardRequest(
                source=model, output=checkpoint, tensor_parallel_size=1, identity={}, dtype="auto"
            )
        )
        log("checkpoint made")
    return model, checkpoint


class Bench:
    """Processes that end with it, and what they said."""

    def __init__(self, work: Path, utilization: float) -> None:
        self._logs = Path(tempfile.mkdtemp(dir=work))
        self._utilization = utilization
        self._started: list[EngineProcess] = []

    def engine(self, model: Path, load_format: str, **environment: str) -> EngineProcess:
        path = self._logs / f"engine{len(self._started)}.log"
        started = EngineProcess(
            path, "serve.py", model, load_format, self._utilization, **environment
        )
        self._started.append(started)
        return started

    def holder(self, socket: Path) -> EngineProcess:
        started = EngineProcess(self._logs / f"holder{len(self._started)}.log", "holder.py", socket)
        self._started.append(started)
        return started

    def end(self) -> None:
        for engine in self._started:
            engine.kill()


def findings(engine: EngineProcess, began: float) -> dict[str, Any]:
    """Start an engine's answers off: what it serves, and what its log says of memory."""
    ready = engine.ready()
    found: dict[str, Any] = {"ready_seconds": round(time.monotonic() - began, 1), **ready}
    found["tokens"] = engine.ask()
    output = engine.output()
    for name, (pattern, scale) in _SAID.items():
        if match := re.search(pattern, output):
            found[name] = round(float(match[1]) * scale, 2)
    found["hbm_used_mib"] = used_mib()
    return found


@contextlib.contextmanager
def loader_of(work: Path, checkpoint: Path) -> Iterator[LoaderProcess]:
    root = Path(tempfile.mkdtemp(dir=work))
    plugin = f"--plugin-dir={root}/plugin"
    loader = LoaderProcess(root, checkpoint, "--backend", "cuda", plugin)
    try:
        yield loader
    finally:
        loader.close()


def run(bench: Bench, work: Path, layers: int) -> dict[str, Any]:
    model, checkpoint = make(work, layers)
    steps: dict[str, Any] = {"hbm_used_mib_idle": used_mib()}
    log("plain vLLM")
    plain = bench.engine(model, "auto")
    steps["plain"] = findings(plain, time.monotonic())
    plain.kill()

    log("loader")
    with loader_of(work, checkpoint) as loader:
        loader.until_phase("Ready")
        steps["weights_bytes"] = loader.status()["totalBytes"]
        steps["hbm_used_mib_loader_alone"] = used_mib()
        log("an engine that is torch alone")
        holder = bench.holder(loader.socket)
        steps["torch_alone"] = holder.ready()
        holder.kill()
        paths = [f"{loader.root}/plugin", os.environ.get("PYTHONPATH", "")]
        environment = {
            "PYTHONPATH": os.pathsep.join(paths),
            "HEADRACE_SOCKET": str(loader.socket),
        }
        log("first engine")
        began = time.monotonic()
        first = bench.engine(checkpoint, "headrace", **environment)
        steps["first"] = findings(first, began)
        log("second engine beside it")
        began = time.monotonic()
        second = bench.engine(checkpoint, "headrace", **environment)
        steps["second_beside_it"] = findings(second, began)
        first.kill()
        steps["hbm_used_mib_first_killed"] = used_mib()
        log("an engine after the first was killed")
        began = time.monotonic()
        third = bench.engine(checkpoint, "headrace", **environment)
        steps["after_kill"] = findings(third, began)
        loader.kill()
        steps["loader_dead"] = {"tokens": third.ask()}
        held = used_mib()
        loader.start()
        status = loader.until_phase("Orphaned")
        steps["orphaned"] = {
            "read_bytes": status["readBytes"],
            "hbm_added_mib": used_mib() - held,
            "tokens": third.ask(),
        }
        log("all killed but the restarted loader")
        second.kill()
        third.kill()
        loader.until_phase("Ready")
        steps["hbm_used_mib_reloaded"] = used_mib()
    steps["hbm_used_mib_all_dead"] = used_mib()
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--utilization", type=float, default=0.4)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--commit", default=None, help="where the repository is no git checkout")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="headrace-engine-"))
    work.mkdir(parents=True, exist_ok=True)
    commit = (
        arguments.commit
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    bench = Bench(work, arguments.utilization)
    try:
        steps = run(bench, work, arguments.layers)
    finally:
        bench.end()
        if arguments.work is None:
            shutil.rmtree(work)
    engines = ("plain", "first", "second_beside_it", "after_kill", "loader_dead", "orphaned")
    tokens = [steps[name].pop("tokens") for name in engines]
    result = {
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "commit": commit,
        "command": f"python bench/engine.py --layers {arguments.layers}",
        "hardware": f"one {nvidia_smi('name,memory.total,driver_version')}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "vllm": importlib.metadata.version("vllm"),
        "torch": importlib.metadata.version("torch"),
        "gpu_memory_utilization": arguments.utilization,
        "tokens": json.dumps(tokens[0]),
        "same_tokens_everywhere": all(one == tokens[0] for one in tokens),
        "kv_blocks_ratio_vs_plain": steps["first"]["blocks"] / steps["plain"]["blocks"],
        "steps": steps,
    }
    json.dump(result, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
