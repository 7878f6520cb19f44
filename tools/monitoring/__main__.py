"""The run itself: python -m monitoring [--write].

A model is served on a real node; Prometheus scrapes operator and loader once a second. Every
query of the dashboards must return data and every alert must be evaluated. The engine is a
stand-in that takes the weights and answers its health check: no panel shows an engine's own
metrics.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

import imagebuild
from dashboards.boards import BOARDS
from demo import setup
from demo.observe import Model, wait_for
from demo.once import on_a_cluster
from demo.pictures import SIZE
from localkube import Cluster, binaries, prerequisites
from workspace.errors import ToolError
from workspace.paths import ROOT
from workspace.steps import Steps

from . import pictures
from .prometheus import SCRAPE_SECONDS, Prometheus, running

if TYPE_CHECKING:
    from dashboards.boards import Panel, Query

    from .prometheus import Result

NAME, CLAIM = "tiny-llama", "models"
READY_SECONDS = 240.0
SETTLE_SECONDS = 20.0
VARIABLES = {"$__rate_interval": "15s", "$__range": "10m", "$provisioned": "1"}
VARIABLES |= {"$namespace": ".*", "$name": ".*"}
EMPTY = {
    "headrace_operator_reconcile_errors_total": "no reconciliation fails here",
    "headrace_loader_direct_path_fallbacks_total": "without a GPU nothing prefers GPUDirect",
}
ENGINE = """
import http.server, os
from headrace_handover.client import attach
from headrace_handover.errors import Refused
socket = os.environ["HEADRACE_SOCKET"]
try:
    attach(socket, rank=9, device="host", timeout=10)
except Refused as error:
    print(error)
held = [attach(socket, rank=rank, device="host", timeout=60) for rank in range(2)]
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.ThreadingHTTPServer(("", 8000), Healthy).serve_forever()
"""


def manifest() -> str:
    """Return the ModelDeployment: two ranks in host memory, and the stand-in engine."""
    image = imagebuild.IMAGES["headrace-loader"].reference
    spec = {
        "model": {"source": f"pvc://{CLAIM}/{NAME}"},
        "parallelism": {"tensorParallelSize": 2},
        "volume": {"existingClaim": {"name": CLAIM}},
        "loading": {"path": "Off"},
        "gpu": {"sharing": "None"},
        "engine": {"image": image, "command": ["python3", "-c", ENGINE]},
    }
    head = {"apiVersion": "headrace.dev/v1alpha1", "kind": "ModelDeployment"}
    return json.dumps({**head, "metadata": {"name": NAME}, "spec": spec})


def run(steps: Steps, cluster: Cluster, *, write: bool) -> None:
    """Do everything but the teardown. Raises ToolError or LocalkubeError."""
    directory = cluster.directory.parent
    with steps.step("binaries and images"):
        prerequisites.install_packages()
        program = binaries.ensure(["prometheus", *binaries.NODE])["prometheus"]
        archives = imagebuild.ensure(report=steps.say)
    with steps.step("a cluster with a real node, operator and model"):
        setup.prepare_node(cluster, archives.values())
        setup.make_volume(cluster, directory / "volume", CLAIM)
        setup.make_model(directory / "volume" / NAME, *SIZE)
        setup.install_operator(cluster)
    model = Model(cluster, NAME)
    with running(program, cluster, directory / "prometheus") as prometheus:
        begin = time.time()
        with steps.step("the model is served, then scaled to two replicas"):
            time.sleep(5 * SCRAPE_SECONDS)
            cluster.kubectl("apply", "-f", "-", stdin=manifest())
            model.wait_true("Ready", timeout=READY_SECONDS, say=steps.say)
            cluster.kubectl("scale", "modeldeployment", NAME, "--replicas=2")
            wait_for("two replicas", lambda: _replicas(model) == 2, timeout=READY_SECONDS)
            time.sleep(SETTLE_SECONDS)
        with steps.step("every alert is evaluated, every query returns data"):
            _check_rules(steps, prometheus)
            recording = ask_everything(steps, prometheus, begin)
    pictures.RECORDING.write_text(json.dumps(recording))
    if write:
        with steps.step("Grafana's components draw the answers"):
            for path in pictures.draw(ROOT / "docs"):
                steps.say(f"docs/{path.name}")


def _replicas(model: Model) -> int:
    count: int = model.read()["status"].get("readyReplicas", 0)
    return count


def _check_rules(steps: Steps, prometheus: Prometheus) -> None:
    rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    sick = [f"{rule['name']}: {rule.get('lastError')}" for rule in rules if rule["health"] != "ok"]
    if sick or not rules:
        raise ToolError("rules were not evaluated: " + ("; ".join(sick) or "none are loaded"))
    firing = [rule["name"] for rule in rules if rule["state"] == "firing"]
    steps.say(f"{len(rules)} alerts evaluated, firing: {', '.join(firing) or 'none'}")


def ask_everything(steps: Steps, prometheus: Prometheus, begin: float) -> dict[str, Any]:
    """Ask every query as its panel does; return the answers by expression."""
    answers: dict[str, dict[str, Result]] = {"range": {}, "instant": {}}
    empty, end = [], time.time()
    for board in BOARDS.values():
        for panel in board.panels:
            for query in panel.queries:
                found = _ask(prometheus, panel, expand(query), begin, end)
                answers["instant" if panel.is_instant else "range"][query.expression] = found
                if not found and not any(metric in query.expression for metric in EMPTY):
                    empty.append(f"{board.title} / {panel.title}: {query.expression}")
    if empty:
        raise ToolError("no data for\n" + "\n".join(empty))
    steps.say("every query has data but those of " + ", ".join(EMPTY))
    return {**answers, "begin": begin, "end": end, "step": SCRAPE_SECONDS}


def _ask(prometheus: Prometheus, panel: Panel, expression: str, begin: float, end: float) -> Result:
    if panel.is_instant:
        return prometheus.at(expression, end)
    return prometheus.over(expression, begin, end, SCRAPE_SECONDS)


def expand(query: Query) -> str:
    """Return a query with the dashboard's variables replaced."""
    text = query.expression
    for variable, value in VARIABLES.items():
        text = text.replace(variable, value)
    return text


def main() -> int:
    """Run and tear everything down."""
    parser = argparse.ArgumentParser(prog="monitoring", description=__doc__)
    parser.add_argument("--write", action="store_true", help="draw docs/dashboard-*.png")
    options = parser.parse_args()
    return on_a_cluster(
        "monitoring",
        lambda cluster, _: run(Steps(total=4 + options.write), cluster, write=options.write),
    )


if __name__ == "__main__":
    sys.exit(main())
