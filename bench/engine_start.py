"""How long an engine takes to start, with and without what an earlier one compiled. Prints JSON.

    python bench/engine_start.py [--work DIR] > results.json

Two pods one after the other on one volume, each a real loader and a real vLLM, with compilation:
the first finds no compiled code, the second what the first one left. Both use the same paths, as
pods do, and the second one's directories are new. Phases are the engine's own log lines and the
loader's timeline. Progress goes to stderr.
"""

import argparse
import datetime as dt
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
for folder in ("tests/loader", "examples", "loader_image"):
    sys.path.insert(0, str(REPOSITORY / folder))

from loader_process import LoaderProcess  # noqa: E402
from tiny_llama import Size, make_tiny_llama  # noqa: E402

from headrace_checkpoint.sharder import ShardRequest, shard  # noqa: E402

START_SECONDS = 900
PHASES = {
    "attach": r"headrace: attached .*? seconds=([\d.]+)",
    "compile_s": r"torch\.compile.*? took ([\d.]+) s",
    "warm_up_s": r"warmup run took ([\d.]+) s",
    "init_engine_s": r"init engine .*? took ([\d.]+) s",
}


def log(text: str) -> None:
    sys.stderr.write(f"[{time.strftime('%H:%M:%S')}] {text}\n")
    sys.stderr.flush()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def pod(work: Path, checkpoint: Path, name: str) -> dict[str, Any]:
    """Start a loader and an engine as one pod would, wait for the cache's publication, stop."""
    local, store, port = work / "cache", work / "store", free_port()
    shutil.rmtree(local, ignore_errors=True)
    local.mkdir()
    store.mkdir(exist_ok=True)
    loader = LoaderProcess(
        work / name,
        checkpoint,
        *("--path", "Off", "--engine-cache-dir", str(local), "--engine-cache-store", str(store)),
        *("--engine-cache-key", "bench", "--engine-port", str(port)),
    )
    loader.until_phase("Ready")
    restored = loader.status()["engineCache"]
    content = local / "content"
    environment = os.environ | {
        "HEADRACE_SOCKET": str(loader.socket),
        "VLLM_CACHE_ROOT": str(content / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(content / "inductor"),
        "TRITON_CACHE_DIR": str(content / "triton"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint]
    command += ["--load-format", "headrace", "--port", str(port), "--max-model-len", "512"]
    output = work / f"{name}.log"
    began = time.time()
    with output.open("wb") as out:
        engine = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        status = loader.until(
            lambda status: engine.poll() is not None or "engineReady" in status["timeline"],
            START_SECONDS,
        )
        ready = status["timeline"]["engineReady"]
        first = restored["state"] != "Restored"
        if first:
            loader.until(lambda status: status["engineCache"]["state"] == "Published")
        else:
            time.sleep(3)
        status = loader.status()
    finally:
        os.killpg(engine.pid, signal.SIGTERM)
        engine.wait(60)
        loader.close()
    text = output.read_text(errors="replace")
    said = {key: re.findall(pattern, text) for key, pattern in PHASES.items()}
    return {
        "restored": restored,
        "after": status["engineCache"],
        "restore_s": _span(status, "processStarted", "engineCacheRestored"),
        "start_to_ready_s": round(ready - began, 2),
        **{key: float(found[-1]) for key, found in said.items() if found},
    }


def _span(status: dict[str, Any], begin: str, end: str) -> float | None:
    timeline = status["timeline"]
    return round(timeline[end] - timeline[begin], 3) if end in timeline else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="directory for everything (default: temporary)")
    parser.add_argument("--layers", type=int, default=8, help="layers of the random Llama")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work, prefix="engine-start-") as name:
        work = Path(name)
        model = make_tiny_llama(work / "model", Size(layers=options.layers))
        checkpoint = work / "checkpoint"
        shard(ShardRequest(source=model, output=checkpoint, tensor_parallel_size=1, identity={}))
        runs = {}
        for run in ("first", "second"):
            log(f"{run} pod")
            runs[run] = pod(work, checkpoint, run)
            log(json.dumps(runs[run]))
    result = {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch")},
        "layers": options.layers,
        **runs,
        "ratio_second_to_first": round(
            runs["second"]["start_to_ready_s"] / runs["first"]["start_to_ready_s"], 3
        ),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
