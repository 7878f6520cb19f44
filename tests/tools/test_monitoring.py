"""What is asked of Prometheus for the pictures: every target of the chart's dashboards, its way."""

import json

import pytest

from dashboards.boards import PHASES
from headrace_loader.state import Phase
from monitoring.__main__ import ask_everything
from monitoring.pictures import BOARDS as FILES
from workspace.errors import ToolError
from workspace.steps import Steps


class Answering:
    """Stands for Prometheus; keeps what it was asked."""

    def __init__(self, result):
        self.result, self.asked = result, []

    def at(self, expression, time):
        self.asked.append(expression)
        return self.result

    def over(self, expression, begin, end, step):
        self.asked.append(expression)
        return self.result


def test_a_recording_answers_every_target_of_the_charts_dashboards():
    prometheus = Answering([{"metric": {}}])
    recording = ask_everything(Steps(total=1), prometheus, 10.0)
    targets = {"instant": set(), "range": set()}
    for path in FILES.glob("*.json"):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                targets["instant" if target["instant"] else "range"].add(target["expr"])
    assert {kind: set(recording[kind]) for kind in targets} == targets
    assert not [expression for expression in prometheus.asked if "$" in expression]


def test_a_query_without_data_is_named():
    with pytest.raises(ToolError, match=r"Headrace / Loader / Handovers: sum\(headrace"):
        ask_everything(Steps(total=1), Answering([]), 10.0)


def test_the_loaders_panel_knows_every_phase():
    assert {text for _, text, _ in PHASES} == set(Phase)
