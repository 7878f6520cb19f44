"""The operator as a process of its own, with the rights that its chart gives it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .waiting import eventually, free_port

if TYPE_CHECKING:
    from localkube import Cluster

ROOT = Path(__file__).parents[2]
CRD = ROOT / "crds/modeldeployments.headrace.dev.yaml"
CHART = ROOT / "charts/headrace"
SYSTEM = "headrace-system"


@dataclass
class Operator:
    """The operator's process; `environment` is used at the next start."""

    kubeconfig: Path
    log: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.liveness_port = 0
        self.metrics_port = 0

    def start(self) -> None:
        assert self.process is None
        self.liveness_port, self.metrics_port = free_port(), free_port()
        environment = {
            **{k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH")},
            "KUBECONFIG": str(self.kubeconfig),
            "HEADRACE_LOADER_IMAGE": "loader:1",
            "HEADRACE_STATIC_VOLUMES": '{"*": ["*"]}',
            "HEADRACE_ALLOWED_POD_FIELDS": "serviceAccountName",
            "HEADRACE_LIVENESS_PORT": str(self.liveness_port),
            "HEADRACE_METRICS_PORT": str(self.metrics_port),
            **self.environment,
        }
        start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "headrace_operator"], env=environment, stderr=log
            )
        eventually(lambda: b"serving" in self.log.read_bytes()[start:], "start of the operator")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        assert self.process is not None
        self.process.send_signal(how)
        status = self.process.wait(timeout=30)
        self.process = None
        return status

    def text(self, port: int, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def entries(self) -> list[dict[str, Any]]:
        """Return the log records."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def install_rbac(cluster: Cluster, **values: str) -> None:
    """Install the chart's ServiceAccount and RBAC rules, and nothing else of it."""
    sets = [f"--set={name}={value}" for name, value in values.items()]
    sets.append('--set-json=staticVolumes={"*": ["*"]}')
    shown = [f"--show-only=templates/{name}.yaml" for name in ("rbac", "serviceaccount")]
    manifest = cluster.run(
        [cluster.bin("helm"), "template", "headrace", CHART, "-n", SYSTEM, *sets, *shown]
    )
    cluster.kubectl("apply", "-n", SYSTEM, "-f", "-", stdin=manifest)


def token_kubeconfig(cluster: Cluster, path: Path) -> Path:
    """Write a kubeconfig with a token of the operator's ServiceAccount."""
    return cluster.kubeconfig_of("headrace", SYSTEM, path)
