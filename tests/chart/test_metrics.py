"""docs/metrics.md lists the metrics of the code; dashboards and alerts ask for no others."""

import json
import re
import time
from pathlib import Path

import promql_parser
import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from dashboards.boards import BOARDS
from dashboards.grafana import as_json
from headrace_handover.server import Offer
from headrace_loader.backends import PathPolicy, PathReport
from headrace_loader.metrics import _StateCollector
from headrace_loader.state import LoaderState, RankState, Settings
from headrace_loader.worker_protocol import Progressed
from headrace_operator import metrics

ROOT = Path(__file__).parents[2]
FILES = ROOT / "charts/headrace/files"
ROW = re.compile(r"^\| `(headrace_\w+)` \| (\w+) \|(.*?)\| .+ \|$", re.MULTILINE)
ADDED = {"namespace", "name", "pod"}  # by the PodMonitor
RANGES = {"$__rate_interval": "1m", "$__range": "1h", "$provisioned": "90"}


def documented():
    text = (ROOT / "docs/metrics.md").read_text()
    return {
        name: (kind, set(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in ROW.findall(text)
    }


def operators():
    found = [
        (v.name, v.kind, v.labels)
        if isinstance(v, metrics.OfOne)
        else (v._name, v._type, v._labelnames)
        for v in vars(metrics).values()
        if isinstance(v, metrics.OfOne | MetricWrapperBase)
    ]
    return {
        name + ("_total" if kind == "counter" else ""): (kind, set(labels))
        for name, kind, labels in found
    }


def loaders():
    """Names, types and labels of a loader that has loaded, fallen back and refused."""
    path = PathReport("buffered", "NoDirectIo", direct=False, direct_reason="X", direct_message="")
    now = time.time()
    rank = RankState(
        0, 8, now, "host", path, Progressed(8, 8, now, now, now), now, Offer("host", ())
    )
    marks = dict.fromkeys(("manifestRead", "loadBegan", "resident"), now)
    state = LoaderState(Settings("host", PathPolicy.PREFER, 1), now, ranks=[rank], timeline=marks)
    state.refusals["WrongRank"] += 1
    families = list(_StateCollector(state).collect())
    assert all(family.samples for family in families)
    return {
        family.samples[0].name: (family.type, set(family.samples[0].labels)) for family in families
    }


def test_every_metric_is_documented_and_every_documented_one_is_there():
    assert documented() == operators() | loaders()


def queries():
    """Every PromQL expression with its place."""
    for name, board in BOARDS.items():
        for panel in board.panels:
            for number, query in enumerate(panel.queries):
                yield f"{name}/{panel.title}/{number}", query.expression
    for group in yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


QUERIES = dict(queries())


def selectors(node):
    """The vector selectors of a parsed expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for part in ("expr", "lhs", "rhs", "vector_selector", "param"):
        child = getattr(node, part, None)
        if isinstance(child, promql_parser.Expr):
            yield from selectors(child)
    for argument in getattr(node, "args", None) or ():
        yield from selectors(argument)


def base(name, known):
    """The metric that a sample belongs to."""
    family = re.sub(r"_(bucket|sum|count)$", "", name)
    return family if known.get(family, ("",))[0] in ("histogram", "summary") else name


@pytest.mark.parametrize("place", QUERIES)
def test_queries_use_documented_metrics_and_labels(place):
    expression = QUERIES[place]
    for variable, value in RANGES.items():
        expression = expression.replace(variable, value)
    found = list(selectors(promql_parser.parse(expression)))
    known = documented()
    assert found or expression.startswith("vector(")
    for selector in found:
        name = base(selector.name, known)
        assert name in known, f"{place}: {selector.name}"
        labels = {matcher.name for matcher in selector.matchers.matchers}
        allowed = known[name][1] | ADDED | {"le"}
        assert labels <= allowed, f"{place}: {labels - allowed}"


@pytest.mark.parametrize("name", BOARDS)
def test_dashboards_are_the_generated_ones(name):
    text = (FILES / "dashboards" / f"{name}.json").read_text()
    assert text == as_json(BOARDS[name])
    assert len(json.loads(text)["panels"]) == len(BOARDS[name].panels)
