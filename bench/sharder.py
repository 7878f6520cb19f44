"""How close does `headrace shard` come to `cp` of the same bytes on the same disk?

    make bench-sharder ARGS="--gib 8 --tensor-parallel-size 8 --rounds 3"

Makes a Llama of real shapes and random weights in DIRECTORY, then times the command and
`cp` in turn. Both are treated alike: the source is dropped from the page cache (read into
it with --warm) and all earlier writes and deletions are on the disk before the clock
starts; it stops when files and directory are synced, which the command does itself and
`cp` leaves to `fsync` here.
The command's time includes the start of Python, and the digests that `cp` does not make.

The last line is JSON. write_ratio_vs_cp is the median over the rounds of the bytes per
second that the command writes, divided by those of the `cp` after it in the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headrace_checkpoint.dtypes import tensor_bytes
from headrace_checkpoint.manifest import TensorEntry, read_manifest
from headrace_checkpoint.safetensors_format import build_header
from workspace.steps import Steps

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from tiny_llama import Size

GIB = 2**30
BLOCK = 64 * 2**20
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Run:
    """What one timed run wrote, and its highest resident memory."""

    seconds: float
    written: int
    rss: int

    @property
    def rate(self) -> float:
        return self.written / self.seconds


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options = parse()
    check_space(options)
    size = model_size(options)
    entries = layout(size)
    largest = max(entry.nbytes for entry in entries)
    weights = entries[-1].offset + entries[-1].nbytes
    steps = Steps(total=1 + 2 * options.rounds)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory(prefix="bench-sharder-", dir=options.directory) as root:
        source, target = Path(root, "source"), Path(root, "target")
        with steps.step(f"{weights / GIB:.2f} GiB of weights, {size.layers} layers, in {root}"):
            make_model(source, size, entries)
        for number in range(1, options.rounds + 1):
            with steps.step(f"headrace shard, round {number} of {options.rounds}"):
                set_cache(source / WEIGHTS, options.warm)
                ours.append(timed(shard, source, target, options))
                steps.say(f"{ours[-1].rate / GIB:.3f} GiB/s, {ours[-1].rss / GIB:.2f} GiB resident")
            with steps.step(f"cp, round {number} of {options.rounds}"):
                set_cache(source / WEIGHTS, options.warm)
                theirs.append(timed(copy, source, target))
                steps.say(f"{theirs[-1].rate / GIB:.3f} GiB/s")
    ratios = [a.rate / b.rate for a, b in zip(ours, theirs, strict=True)]
    result = {
        "write_ratio_vs_cp": round(statistics.median(ratios), 3),
        "write_ratio_vs_cp_min": round(min(ratios), 3),
        "write_ratio_vs_cp_max": round(max(ratios), 3),
        "rss_gib": round(max(run.rss for run in ours) / GIB, 3),
        "largest_tensor_gib": round(largest / GIB, 3),
        "bytes": ours[0].written,
        "tensor_parallel_size": options.tensor_parallel_size,
        "workers": options.workers,
        "source": "in the page cache" if options.warm else "not in the page cache",
        "shard_seconds": [round(run.seconds, 2) for run in ours],
        "cp_seconds": [round(run.seconds, 2) for run in theirs],
    }
    print(json.dumps(result), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="on the disk to measure")
    parser.add_argument("--gib", type=float, default=8.0, help="weights, to the nearest layer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="have the source in the page cache")
    parser.add_argument("--tensor-parallel-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1, help="processes that share the work")
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--intermediate-size", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=128256)
    return parser.parse_args()


def check_space(options: argparse.Namespace) -> None:
    needed, free = 2.1 * options.gib, shutil.disk_usage(options.directory).free / GIB
    if free < needed:
        raise SystemExit(
            f"--gib {options.gib:g}: source and copy need {needed:.1f} GiB, {options.directory} "
            f"has {free:.1f} GiB free; take less or another --directory"
        )


def model_size(options: argparse.Namespace) -> Size:
    def sized(layers: int) -> Size:
        return Size(
            layers=layers,
            hidden_size=options.hidden_size,
            intermediate_size=options.intermediate_size,
            heads=options.heads,
            kv_heads=options.kv_heads,
            vocab_size=options.vocab_size,
        )

    one, two = (sum(entry.nbytes for entry in layout(sized(n))) for n in (1, 2))
    return sized(max(1, 1 + round((options.gib * GIB - one) / (two - one))))


def layout(size: Size) -> list[TensorEntry]:
    entries, offset = [], 0
    for name, shape in size.shapes().items():
        entries.append(TensorEntry(name, "BF16", shape, offset, tensor_bytes("BF16", shape)))
        offset += entries[-1].nbytes
    return entries


def make_model(directory: Path, size: Size, entries: list[TensorEntry]) -> None:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(size.config()))
    generator = np.random.default_rng(0)
    left = entries[-1].offset + entries[-1].nbytes
    with (directory / WEIGHTS).open("wb") as file:
        file.write(build_header(entries, alignment=8))
        while left:
            block = generator.bytes(min(BLOCK, left))
            file.write(block)
            left -= len(block)


def set_cache(path: Path, warm: bool) -> None:
    os.sync()
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while warm and file.read(BLOCK):
            pass


def timed(action, source: Path, target: Path, *arguments) -> Run:
    """Run `action(source, target, *arguments)` and remove what it wrote."""
    began = time.perf_counter()
    rss = action(source, target, *arguments)
    seconds = time.perf_counter() - began
    found = list(target.glob("*.safetensors"))
    run = Run(seconds, sum(path.stat().st_size for path in found), rss)
    shutil.rmtree(target)
    return run


def shard(source: Path, target: Path, options: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "headrace_checkpoint.cli", "shard", "--source", str(source)]
    command += ["--output", str(target), "--workers", str(options.workers)]
    command += ["--tensor-parallel-size", str(options.tensor_parallel_size)]
    processes = [
        subprocess.Popen([*command, "--worker", str(number)], stdout=subprocess.DEVNULL)
        for number in range(options.workers)
    ]
    highest = 0
    try:
        for process in processes:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            highest = max(highest, usage.ru_maxrss * 1024)
    finally:
        for process in processes:
            if process.returncode is None:
                process.terminate()
                process.wait()
    for process in processes:
        if process.returncode:
            raise SystemExit(f"headrace shard ended with {process.returncode}")
    read_manifest(target)
    return highest


def copy(source: Path, target: Path) -> int:
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in (*target.iterdir(), target):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return 0


if __name__ == "__main__":
    main()
