"""A real loader process and hand-made checkpoints, for the tests of loader and engine."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace_checkpoint.digest import digester
from headrace_checkpoint.dtypes import tensor_bytes
from headrace_checkpoint.manifest import Manifest, Parallelism, Part, TensorEntry
from headrace_checkpoint.safetensors_format import build_header

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TensorSpec = tuple[str, str, tuple[int, ...]]


def make_checkpoint(
    directory: Path,
    *,
    ranks: int = 1,
    parts: Sequence[Sequence[TensorSpec]] = ((("weight", "F32", (4096,)), ("scale", "F32", ())),),
    chunk_bytes: int = 4096,
    algorithm: str = "sha256",
) -> Manifest:
    """Write a checkpoint of random bytes; equal parts for every rank."""
    directory.mkdir(parents=True)
    made = [
        _write_part(directory, rank, number, specs, chunk_bytes, algorithm)
        for rank in range(ranks)
        for number, specs in enumerate(parts)
    ]
    manifest = Manifest(
        layout="vllm",
        identity={},
        architecture="TestForCausalLM",
        parallelism=Parallelism(ranks),
        chunk_bytes=chunk_bytes,
        parts=tuple(made),
        files=(),
        digest_algorithm=algorithm,
    )
    (directory / "manifest.json").write_bytes(manifest.to_json())
    return manifest


def _write_part(
    directory: Path,
    rank: int,
    number: int,
    specs: Sequence[TensorSpec],
    chunk_bytes: int,
    algorithm: str,
) -> Part:
    tensors: list[TensorEntry] = []
    offset = 0
    for name, dtype, shape in specs:
        tensors.append(TensorEntry(name, dtype, shape, offset, tensor_bytes(dtype, shape)))
        offset += tensors[-1].nbytes
    header = build_header(tensors, alignment=4096)
    data = os.urandom(offset)
    path = directory / f"model-rank-{rank}-part-{number}.safetensors"
    path.write_bytes(header + data)
    digest = digester(algorithm, chunk_bytes)
    digests = tuple(
        digest(data[begin : begin + chunk_bytes]) for begin in range(0, offset, chunk_bytes)
    )
    size = len(header)
    return Part(rank, number, path.name, size + offset, size, offset, digests, tuple(tensors))


def part_data(directory: Path, part: Part) -> bytes:
    """The data section of a part, as it is on disk."""
    return (directory / part.file).read_bytes()[part.data_offset :]


def hold(path: Path) -> int:
    """Keep others from opening a file, until what is returned is closed or 45 s are over."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)  # by default, ignored
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    return descriptor


def shim(root: Path, code: str) -> dict[str, str]:
    """The environment of a loader whose processes run `code` before anything else."""
    directory = root / "shim"
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(directory)}


@dataclass(frozen=True)
class Answer:
    code: int
    text: str


class LoaderProcess:
    """`headrace-loader` as a process, with its own runtime directory and port."""

    def __init__(self, root: Path, checkpoint: Path, *arguments: str, **environment: str) -> None:
        self.root = root
        # Not below `root`, whose length may be beyond that of a socket's path (108 bytes).
        self._temporary = tempfile.TemporaryDirectory(prefix="headrace-")
        self.runtime = Path(self._temporary.name) / "runtime"
        self.termination_log = root / "termination-log"
        self.socket = self.runtime / "handover" / "handover.sock"
        self._command = ["--checkpoint", str(checkpoint), *arguments]
        self._environment = environment
        self._processes: list[subprocess.Popen[bytes]] = []
        self.log = root / "loader.log"
        root.mkdir(parents=True, exist_ok=True)
        self.start()

    def start(self) -> None:
        """Start it, or start it again in the same directories."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        common = ["--runtime-dir", str(self.runtime), "--backend", "host", "--port", str(self.port)]
        environment = os.environ | self._environment
        environment["HEADRACE_TERMINATION_LOG"] = str(self.termination_log)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "headrace_loader", *common, *self._command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        self._processes.append(self.process)

    def get(self, path: str) -> Answer:
        request = f"http://127.0.0.1:{self.port}{path}"
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return Answer(response.status, response.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.read().decode())

    def status(self) -> dict[str, Any]:
        return json.loads(self.get("/v1/status").text)

    def until(self, condition: Callable[[dict[str, Any]], object], seconds: float = 60) -> Any:
        """Wait until the status fulfils a condition; returns the status."""
        deadline = time.monotonic() + seconds
        status: dict[str, Any] = {}
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                status = self.status()
            except OSError:
                time.sleep(0.05)
                continue
            if condition(status):
                return status
            time.sleep(0.05)
        raise AssertionError(f"exit code {self.process.poll()}, {status}\n{self.log.read_text()}")

    def until_phase(self, phase: str) -> Any:
        return self.until(lambda status: status["phase"] == phase)

    def wait(self, seconds: float = 60) -> int:
        return self.process.wait(seconds)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def termination(self) -> dict[str, Any]:
        return json.loads(self.termination_log.read_text())

    def events(self) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait(30)
        self._temporary.cleanup()
