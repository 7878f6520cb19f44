"""The operators' processes: Headrace, and its peer in Go (tools/kube/modules/peer)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from localkube import binaries
from localkube.controlplane import free_port

from .bodies import LOADER_IMAGE, peer_bodies

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MIB = 2**20


class Operator:
    """A process that is started, killed and measured.

    `visits` is the metric that counts visits of ModelDeployments, `waiting` the one of those
    that wait for a visit.
    """

    prefix: str
    visits: str
    waiting: str

    def __init__(self, directory: Path, profile: Path | None = None) -> None:
        self.kubeconfig = directory / "kubeconfig"
        self._directory = directory
        self._profile = profile
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._metrics_port = 0

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> float:
        """Start it and return the time."""
        self._metrics_port = free_port("127.0.0.1")
        self._starts += 1
        environment = {**os.environ, "KUBECONFIG": str(self.kubeconfig), **self._environment()}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command(), env=environment, stderr=log)
        return time.monotonic()

    def kill(self) -> None:
        """Kill it; a profiled one ends well, so that the profile is written."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM if self._profile else signal.SIGKILL)
            self._process.wait(120)
            self._process = None

    def log_tail(self) -> str:
        return self._log.read_text()[-4000:] if self._log.exists() else ""

    async def visited(self) -> int:
        """Return how many visits are done, 0 while any waits or before metrics are served."""
        # All metrics would be megabytes with thousands of ModelDeployments.
        query = "&".join(f"name[]={name}" for name in (self.waiting, self.visits))
        try:
            text = await self.metrics(query)
        except aiohttp.ClientError:
            return 0
        found: dict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] += sample.value
        return 0 if found.get(self.waiting, 1) else int(found[self.visits])

    async def metrics(self, query: str = "") -> str:
        url = f"http://127.0.0.1:{self._metrics_port}/metrics?{query}"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            return await answer.text()

    def rss_mib(self, row: str = "VmRSS") -> float:
        status = Path(f"/proc/{self.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith(row))
        return int(line.split()[1]) * 1024 / MIB

    @property
    def _log(self) -> Path:
        return self._directory / "operator.log"

    def _command(self) -> Sequence[str | Path]:
        raise NotImplementedError

    def _environment(self) -> Mapping[str, str]:
        raise NotImplementedError


class Headrace(Operator):
    """The operator of this repository."""

    prefix = ""
    visits = "headrace_operator_reconcile_duration_seconds_count"
    waiting = "headrace_operator_queue_depth"

    def _command(self) -> Sequence[str | Path]:
        profiler = ["-m", "cProfile", "-o", f"{self._profile}.{self._starts}"]
        return [sys.executable, *(profiler if self._profile else ()), "-m", "headrace_operator"]

    def _environment(self) -> Mapping[str, str]:
        return {
            "HEADRACE_LOADER_IMAGE": LOADER_IMAGE,
            "HEADRACE_METRICS_PORT": str(self._metrics_port),
            "HEADRACE_LIVENESS_PORT": str(free_port("127.0.0.1")),
        }


class Peer(Operator):
    """The same shape of work on controller-runtime, in Go."""

    prefix = "go_"
    visits = "controller_runtime_reconcile_total"
    waiting = "workqueue_depth"

    def _command(self) -> Sequence[str | Path]:
        return [binaries.ensure(["peer"])["peer"]]

    def _environment(self) -> Mapping[str, str]:
        bodies = self._directory / "bodies.json"
        bodies.write_text(json.dumps(peer_bodies()))
        return {"PEER_BODIES": str(bodies), "PEER_METRICS_PORT": str(self._metrics_port)}


OPERATORS: dict[str, type[Operator]] = {"headrace": Headrace, "go": Peer}
