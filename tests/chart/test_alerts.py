"""The alerts: tested by promtool where it is built, and explained one by one."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from localkube import binaries

ROOT = Path(__file__).parents[2]
RULES = ROOT / "charts/headrace/files/alerts.yaml"
TESTS = Path(__file__).with_name("alerts-test.yaml")
ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


@pytest.fixture
def promtool():
    program = binaries.find("promtool")
    if program is None:
        pytest.skip("promtool takes minutes to build; `make check-alerts` does")

    def run(*arguments, **options):
        return subprocess.run(
            [program, *arguments],
            **{"capture_output": True, "text": True, "timeout": 60, "check": False} | options,
        )

    return run


def test_rules_are_valid(promtool):
    result = promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)
    assert result.returncode == 0, result.stdout + result.stderr


def test_alerts_fire_when_they_should_and_only_then(promtool):
    result = promtool("test", "rules", TESTS)
    assert result.returncode == 0, result.stdout + result.stderr


def test_operators_metrics_keep_to_the_conventions(promtool):
    """Names, units and help texts, as promtool judges them."""
    from prometheus_client import generate_latest

    from headrace_operator import metrics

    metrics.report_status("ns", "conventions", 1, {"conditions": []})
    text = generate_latest().decode()
    own = "".join(line for line in text.splitlines(keepends=True) if "headrace_" in line)
    result = promtool("check", "metrics", input=own)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_is_tested_for_firing_and_for_silence():
    tests = yaml.safe_load(TESTS.read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for alert in ALERTS:
        of_this = [case for case in cases if case["alertname"] == alert["alert"]]
        assert any(case.get("exp_alerts") for case in of_this), alert["alert"]
        assert any(not case.get("exp_alerts") for case in of_this), alert["alert"]


def test_every_alert_has_its_section_and_every_section_its_alert():
    sections = set(re.findall(r"^## (\w+)$", (ROOT / "docs/alerts.md").read_text(), re.MULTILINE))
    assert sections == {alert["alert"] for alert in ALERTS}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_alerts_have_severity_and_summary(alert):
    assert alert["labels"]["severity"] in {"critical", "warning", "info"}
    assert alert["annotations"]["summary"]
