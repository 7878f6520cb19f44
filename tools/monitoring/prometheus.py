"""A Prometheus process that scrapes operator and loaders as the chart's monitors say."""

from __future__ import annotations

import json
import socket
import subprocess
import urllib.parse
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import yaml

from demo.observe import wait_for
from workspace.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from localkube import Cluster

RULES = ROOT / "charts" / "headrace" / "files" / "alerts.yaml"
SCRAPE_SECONDS = 1
READY_SECONDS = 60.0
_POD = "__meta_kubernetes_pod_"

Result = list[dict[str, Any]]


class Prometheus:
    """Asks a running Prometheus."""

    def __init__(self, address: str) -> None:
        self._address = address

    def ask(self, path: str, **parameters: str | float) -> Any:  # noqa: ANN401  # its JSON
        """Return the data of an answer."""
        query = urllib.parse.urlencode(parameters)
        url = f"http://{self._address}/api/v1/{path}?{query}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]

    def at(self, expression: str, time: float) -> Result:
        """Return the values of an expression at a time."""
        result: Result = self.ask("query", query=expression, time=time)["result"]
        return result

    def over(self, expression: str, begin: float, end: float, step: float) -> Result:
        """Return the values of an expression over time."""
        span = {"start": begin, "end": end, "step": step}
        result: Result = self.ask("query_range", query=expression, **span)["result"]
        return result

    def is_ready(self) -> bool:
        """Whether it answers."""
        try:
            self.ask("query", query="1")
        except OSError:
            return False
        return True


@contextmanager
def running(program: Path, cluster: Cluster, directory: Path) -> Iterator[Prometheus]:
    """Run Prometheus with a cluster's pods as targets; it ends with the block."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = directory / "prometheus.yml"
    settings.write_text(yaml.safe_dump(_settings(str(cluster.kubeconfig))))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command: list[str | Path] = [
        program,
        f"--config.file={settings}",
        f"--web.listen-address={address}",
    ]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--storage.tsdb.path={directory / 'data'}"], stdout=log, stderr=log
        )
    try:
        prometheus = Prometheus(address)
        wait_for("Prometheus", prometheus.is_ready, timeout=READY_SECONDS)
        yield prometheus
    finally:
        process.terminate()
        process.wait(30)


def _settings(kubeconfig: str) -> dict[str, Any]:
    pods = [{"role": "pod", "kubeconfig_file": kubeconfig}]
    operator = _keep("headrace-operator;metrics", "label_app_kubernetes_io_name")
    loader = _keep("serve;loader", "label_app_kubernetes_io_component")
    added = {"namespace": "__meta_kubernetes_namespace", "pod": f"{_POD}name"}
    added["name"] = f"{_POD}label_headrace_dev_model_deployment"
    relabel = [
        {"source_labels": [source], "target_label": label} for label, source in added.items()
    ]
    return {
        "global": {
            "scrape_interval": f"{SCRAPE_SECONDS}s",
            "scrape_timeout": f"{SCRAPE_SECONDS}s",
            "evaluation_interval": "5s",
        },
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {
                "job_name": "operator",
                "honor_labels": True,
                "kubernetes_sd_configs": pods,
                "relabel_configs": [operator],
            },
            {
                "job_name": "models",
                "kubernetes_sd_configs": pods,
                "relabel_configs": [loader, *relabel],
            },
        ],
    }


def _keep(values: str, label: str) -> dict[str, Any]:
    source = [f"{_POD}{label}", f"{_POD}container_port_name"]
    return {"action": "keep", "regex": values, "source_labels": source}
