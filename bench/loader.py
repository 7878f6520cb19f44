"""How fast are weights resident, against the hardware's limits and other loaders?

    make bench-loader ARGS="--gib 1,16,48 --output FILE"

Every point writes a checkpoint, then in each round loads it with the real `headrace-loader`
(supervisor and worker as a pod starts them), measures the limit, and lets each peer load the same
files: page cache warm, one after the other, so that all meet the same machine. Cold rounds
drop the file from the page cache before each load. Numbers are in GiB/s:

- headrace: bytes by the time from the begin of reading to resident and verified; what comes
  before, such as opening files and allocating, is overhead, while peers' rates have that in them;
- limit: copies from pinned memory (cuda), or reads from the page cache to a buffer (host);
- overhead_s: from process start to resident, without that time;
- ready_s: from process start to Ready, when the workers are gone, too;
- attach_ms: from connecting to mapped regions, without torch; engine_attach_ms by
  headrace_engine.attach(); all_tensors_ms: then asking it for every tensor.

The last line of the output is JSON; null stands for what this machine cannot measure.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import platform
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint import large_tensors, moe_tensors, write_checkpoint
from headrace_handover import attach
from peers import PEERS
from targets import (
    GIB,
    NotMeasuredError,
    drop_cache,
    engine_attach_ms,
    fio_rate,
    open_target,
    read_rate,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent
BEGAN = time.monotonic()
PEER_SECONDS = 300  # for an answer of a peer: some hang
MARGIN = GIB  # bytes of storage to leave free
DIRECT = "O_DIRECT"


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", file=sys.stderr, flush=True)


@dataclass
class Series:
    """Values of one quantity over the rounds."""

    values: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, object] | None:
        if not self.values:
            return None
        low, high = min(self.values), max(self.values)
        rounded = [round(value, 4) for value in (low, self.median, high)]
        return dict(zip(("min", "median", "max"), rounded, strict=True)) | {
            "all": [round(value, 4) for value in self.values]
        }

    @property
    def median(self) -> float:
        return statistics.median(self.values)


class Point(dict[str, Series]):
    """One size and kind of checkpoint: series by name."""

    def __init__(self, name: str, gib: float, tensors: int) -> None:
        self.name, self.gib, self.tensors = name, gib, tensors
        self.path = self.cold_path = ""

    def add(self, name: str, value: float) -> None:
        self.setdefault(name, Series()).values.append(value)

    def ratio(self, name: str, limit: str) -> float | None:
        if name not in self or limit not in self:
            return None
        return round(self[name].median / self[limit].median, 4)

    def summary(self) -> dict[str, object]:
        series = {name: value.summary() for name, value in self.items()}
        about = {"name": self.name, "gib": self.gib, "tensors": self.tensors, "path": self.path}
        cold = {"cold_path": self.cold_path} if self.cold_path else {}
        ratio = self.ratio("headrace", "limit")
        return about | cold | {"ratio_vs_limit": ratio} | series


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def status_of(port: int) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/status", timeout=30) as answer:
        return dict(json.load(answer))


def load_once(point: Point, prefix: str, directory: Path, plan: Plan) -> None:
    """Run the loader until its weights are resident, attach to it, end it."""
    runtime, port = Path(tempfile.mkdtemp(prefix="headrace-bench-")), free_port()
    target, threads, interpreter = plan.target, plan.threads, plan.interpreter
    command = [
        *(interpreter, "-m", "headrace_loader", "--checkpoint", str(directory)),
        *("--backend", target.name, "--runtime-dir", str(runtime), "--host", "127.0.0.1"),
        *("--port", str(port), "--read-threads", str(threads)),
        *("--tensor-parallel-size", str(plan.ranks)),
    ]
    log = runtime / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    path = runtime / "handover" / "handover.sock"
    try:
        attach(path, rank=0, device=target.device, timeout=600).close()
        while (status := status_of(port))["phase"] == "Loading":
            time.sleep(0.01)
        attach_ms = target.attach_ms(path)
        engine_ms = None if prefix else engine_attach_ms(path, target.peer_device)
    except Exception as error:
        process.kill()
        raise SystemExit(f"the loader failed: {error}\n{log.read_text()}") from error
    process.send_signal(signal.SIGTERM)
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    shutil.rmtree(runtime)
    ranks, timeline = [rank["times"] for rank in status["ranks"]], status["timeline"]
    transfer = max(rank["verified"] for rank in ranks) - min(rank["readBegan"] for rank in ranks)
    path = status["ranks"][0]["path"]
    if prefix:
        # One load that came from the page cache is enough to make the point no cold one.
        point.cold_path = path if point.cold_path in ("", DIRECT) else point.cold_path
    else:
        point.path = path
    point.add(prefix + "headrace", status["totalBytes"] / GIB / transfer)
    resident = timeline["resident"] - timeline["processStarted"]
    point.add(prefix + "overhead_s", resident - transfer)
    point.add(prefix + "resident_s", resident)
    point.add(prefix + "ready_s", timeline["ready"] - timeline["processStarted"])
    point.add(prefix + "cpu_s", usage.ru_utime + usage.ru_stime)
    if len(ranks) > 1:
        slowest = max(rank["verified"] - rank["readBegan"] for rank in ranks)
        point.add(prefix + "slowest_rank", status["ranks"][0]["totalBytes"] / GIB / slowest)
    if not prefix:
        point.add("attach_ms", attach_ms)
    if engine_ms:
        point.add("engine_attach_ms", engine_ms[0])
        point.add("all_tensors_ms", engine_ms[1])


class Peer:
    """A peer's process; `missing` says why there is none."""

    def __init__(self, name: str, device: str, threads: int) -> None:
        self.name = name
        streams = {"RUNAI_STREAMER_CONCURRENCY": str(threads)}
        environment = os.environ | {"BENCH_THREADS": str(threads)} | streams
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "peers.py"), name, device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        state = self._answer()
        self.missing, self.version = state.get("missing"), state.get("version")

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], PEER_SECONDS)[0]:
            self._process.kill()
            said = f"no answer in {PEER_SECONDS} s"
            return {"missing": said, "error": said}
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"missing": "it died", "error": "it died"}

    def rate(self, directory: Path, nbytes: int) -> float:
        """Return GiB/s; raises NotMeasuredError, and the peer is missing from then on."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{directory}\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            self.missing = answer["error"]
            raise NotMeasuredError(self.missing)
        return nbytes / GIB / float(answer["seconds"])

    def close(self) -> None:
        self._process.communicate(timeout=60)


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    target: Any
    threads: int
    repeats: int
    directory: Path
    peers: list[Peer]
    peer_gib: float
    cold_gib: float
    interpreter: str
    ranks: int


@contextlib.contextmanager
def checkpoint(plan: Plan, gib: float, kind: str) -> Iterator[tuple[Path, Point, int]]:
    nbytes = int(gib * GIB) // 256 * 256
    free = shutil.disk_usage(plan.directory).free
    if free < nbytes * plan.ranks + MARGIN:
        raise SystemExit(f"{plan.directory}: {gib:g} GiB and a margin do not fit {free} bytes free")
    tensors = moe_tensors(nbytes) if kind == "moe" else large_tensors(nbytes)
    directory = plan.directory / f"{kind}-{gib:g}"
    say(f"writing {gib:g} GiB in {len(tensors)} tensors")
    write_checkpoint(directory, tensors, plan.ranks)
    try:
        yield directory, Point(kind, gib, len(tensors)), nbytes
    finally:
        shutil.rmtree(directory)


def measure(plan: Plan, gib: float, kind: str) -> Point:
    with checkpoint(plan, gib, kind) as (directory, point, nbytes):
        peers = plan.peers if kind == "large" and gib <= plan.peer_gib else []
        for number in range(plan.repeats):
            say(f"{kind} {gib:g} GiB, warm: round {number + 1} of {plan.repeats}")
            load_once(point, "", directory, plan)
            # Not behind a peer: on GPUs copies are slower for a while then, by a tenth.
            point.add("limit", plan.target.limit(directory))
            for peer in peers:
                if not peer.missing:
                    attempt(point, peer.name, lambda peer=peer: peer.rate(directory, nbytes))
        if kind == "large" and gib <= plan.cold_gib:
            cold_rounds(plan, directory, point, peers, nbytes)
    return point


def attempt(point: Point, name: str, rate: Callable[[], float]) -> bool:
    """Add a rate to a series, or leave it out of the point: a median of some rounds is none."""
    try:
        point.add(name, rate())
    except NotMeasuredError as error:
        say(f"{name}: not measured: {error}")
        point.pop(name, None)
        return False
    return True


def cold_rounds(plan: Plan, directory: Path, point: Point, peers: list[Peer], nbytes: int) -> None:
    """Measure in changing order: disks that allow bursts favour who comes first."""
    threads = plan.threads * plan.ranks
    readers: dict[str, Callable[[], float]] = {
        "cold_direct_read": lambda: read_rate(directory, threads, direct=True)
    }
    if shutil.which("fio"):
        readers["cold_fio"] = lambda: fio_rate(directory, plan.threads)
    for peer in peers:
        if not peer.missing:
            readers[f"cold_{peer.name}"] = lambda peer=peer: peer.rate(directory, nbytes)
    names = [*readers, "headrace"]
    for number in range(plan.repeats):
        say(f"{point.gib:g} GiB, cold: round {number + 1} of {plan.repeats}")
        first = number % len(names)
        for name in names[first:] + names[:first]:
            drop_cache(directory)
            if name == "headrace":
                load_once(point, "cold_", directory, plan)
            elif name in readers and not attempt(point, name, readers[name]):
                del readers[name]


def hardware(target: Any) -> str:
    text = f"{platform.machine()}, {os.cpu_count()} cores"
    if target.name != "cuda":
        return text
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    out = subprocess.run(query, check=True, capture_output=True, text=True, timeout=60)
    return f"{out.stdout.strip()}, {text}"


def lowest(points: list[Point], name: str, limit: str) -> float | None:
    """Return the lowest ratio among points that have both."""
    ratios = [ratio for point in points if (ratio := point.ratio(name, limit)) is not None]
    return min(ratios, default=None)


def highest(points: list[Point], name: str) -> float | None:
    """Return the highest median among points that have a series."""
    return max((round(point[name].median, 4) for point in points if name in point), default=None)


def best_peer(points: list[Point], prefix: str = "") -> tuple[str | None, float | None]:
    """Return the peer that comes closest at any size, and the ratio to it."""
    name = f"{prefix}headrace"
    ratios = [(r, peer) for peer in PEERS if (r := lowest(points, name, prefix + peer))]
    ratio, peer = min(ratios, default=(None, None))
    return peer, ratio


def headline(points: list[Point], plan: Plan) -> dict[str, object]:
    """The one line: the worst size of each number, rates and CPU time of the largest."""
    large = [point for point in points if point.name == "large"]
    last = max(large, key=lambda point: point.gib)
    # Where the cache cannot be dropped, as of a tmpfs, no load is a cold one.
    cold = [point for point in large if point.cold_path == DIRECT]
    peer, ratio_vs_peer = best_peer(large)
    cold_peer, cold_ratio_vs_peer = best_peer(cold, "cold_")
    warm = lowest(large, "headrace", "limit")
    rates = {point.gib: point["headrace"].median for point in large}
    many = [p for p in points if p.name == "moe" and p.gib in rates]
    many_ratios = [round(p["headrace"].median / rates[p.gib], 4) for p in many]
    engine = points[0].get("engine_attach_ms")  # its first value has torch open the GPU in it
    first = [round(value, 3) for value in engine.values] if engine else []
    on_gpu = plan.target.name == "cuda"
    return {
        "warm_ratio_vs_pinned": warm if on_gpu else None,
        "warm_ratio_vs_read": None if on_gpu else warm,
        "cold_ratio_vs_fio": lowest(cold, "cold_headrace", "cold_fio"),
        "cold_ratio_vs_direct_read": lowest(cold, "cold_headrace", "cold_direct_read"),
        "overhead_s": highest(points, "overhead_s"),
        "attach_ms": highest(points, "attach_ms"),
        "engine_attach_ms": highest(points, "engine_attach_ms"),
        "first_engine_attach_ms": first[0] if first else None,
        "best_peer": peer,
        "ratio_vs_best_peer": ratio_vs_peer,
        "cold_best_peer": cold_peer,
        "cold_ratio_vs_best_peer": cold_ratio_vs_peer,
        "many_tensors_ratio": min(many_ratios, default=None),
        "path": last.path,
        "device": plan.target.device,
        "backend": plan.target.name,
        "gib": [point.gib for point in large],
        "gib_per_second": round(last["headrace"].median, 3),
        "cpu_s": round(last["cpu_s"].median, 3),
        "pinned_bytes": plan.target.pinned_bytes(),
        "read_threads": plan.threads,
        "ranks": plan.ranks,
    }


def sizes(text: str) -> list[float]:
    return [float(item) for item in text.split(",") if item]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--backend", choices=("host", "cuda"), help="default: cuda where there is a GPU")
    add("--gib", type=sizes, help="sizes; default 1,16 with a GPU, else 0.25")
    add("--moe-gib", type=sizes, default=[], help="sizes with 46080 tensors instead of few")
    add("--repeats", type=int, default=3, help="rounds per size; default 3")
    add("--read-threads", type=int, default=16, help="per GPU; default 16")
    add("--ranks", type=int, default=1, help="GPUs to load at once, each with --gib; no peers")
    add(
        "--peer-gib",
        type=float,
        default=16,
        help="largest size that peers load; default 16; 0: none",
    )
    add("--peers", nargs="*", choices=PEERS, default=[*PEERS], help="which; default all")
    add("--cold-gib", type=float, default=16, help="largest cold size; default 16; 0: none")
    add("--python", default=sys.executable, help="the loader's interpreter, as of its image")
    add(
        "--directory",
        type=Path,
        default=Path(".cache/bench"),
        help="on the storage to measure; default .cache/bench",
    )
    add("--output", type=Path, help="file for all numbers")
    add("--commit", help="commit measured; default: git's HEAD")
    return parser.parse_args()


def main() -> None:
    options = parse()
    target = open_target(options.backend, options.read_threads, options.ranks)
    gib = options.gib or ([1, 16] if target.name == "cuda" else [0.25])
    options.directory.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(dir=options.directory.resolve()))
    peers: list[Peer] = []
    for name in options.peers if options.peer_gib > 0 and options.ranks == 1 else ():
        peers.append(Peer(name, target.peer_device, options.read_threads))
        say(f"peer {name}: {peers[-1].missing or peers[-1].version}")
    plan = Plan(
        target,
        options.read_threads,
        options.repeats,
        directory,
        peers,
        options.peer_gib,
        options.cold_gib,
        options.python,
        options.ranks,
    )
    todo = [(size, "large") for size in gib] + [(size, "moe") for size in options.moe_gib]
    points: list[Point] = []
    try:
        for number, (size, kind) in enumerate(todo, 1):
            say(f"step {number} of {len(todo)}: {size:g} GiB, {kind}")
            points.append(measure(plan, size, kind))
            say(json.dumps(points[-1].summary()))
            line = headline(points, plan)
            if options.output:  # after each point: what is measured is measured
                options.output.write_text(report(line, points, plan, options.commit))
    finally:
        shutil.rmtree(directory)
        for peer in peers:
            peer.close()
    print(json.dumps(line), flush=True)


def report(line: dict[str, object], points: list[Point], plan: Plan, commit: str | None) -> str:
    if commit is None:
        git = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
        out = subprocess.run(git, check=False, capture_output=True, text=True, timeout=60)
        commit = out.stdout.strip() or "unknown"
    about = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "hardware": hardware(plan.target),
        "commit": commit,
        "command": " ".join(["bench/loader.py", *sys.argv[1:]]),
        "unit": "GiB/s unless the name says otherwise",
        "peers": {peer.name: peer.version for peer in plan.peers},
    }
    content = about | {"result": line, "points": [point.summary() for point in points]}
    return json.dumps(content, indent=1) + "\n"


if __name__ == "__main__":
    main()
