"""Small parts of the operator: settings, termination messages, health, cold starts, logs."""

import json
import logging
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from headrace_operator.cluster.store import Key
from headrace_operator.coldstart import ColdStarts, phases
from headrace_operator.errors import SettingsInvalid
from headrace_operator.health import STALE_SECONDS, Health
from headrace_operator.logs import JsonFormatter
from headrace_operator.metrics import COLD_START_QUANTILES
from headrace_operator.plan.names import child_name, source_parts
from headrace_operator.plan.objects import one_line
from headrace_operator.plan.termination import termination_of
from headrace_operator.settings import ProcessSettings


def test_settings_have_defaults() -> None:
    settings = ProcessSettings.from_environment({"HEADRACE_LOADER_IMAGE": "loader:1"})
    assert settings == ProcessSettings("loader:1", (), {}, 9402, 8080)


def test_namespaces_are_listed() -> None:
    environment = {"HEADRACE_LOADER_IMAGE": "x", "HEADRACE_WATCH_NAMESPACES": " b, a,b, "}
    assert ProcessSettings.from_environment(environment).namespaces == ("b", "a")


@pytest.mark.parametrize(
    ("variable", "value", "fragment"),
    [
        ("HEADRACE_LOADER_IMAGE", "", "image reference"),
        ("HEADRACE_LOADER_IMAGE", "a b", '"a b"'),
        ("HEADRACE_METRICS_PORT", "0", "1 to 65535"),
        ("HEADRACE_METRICS_PORT", "65536", "1 to 65535"),
        ("HEADRACE_LIVENESS_PORT", "http", '"http"'),
        ("HEADRACE_LIVENESS_PORT", "²", "1 to 65535"),
        ("HEADRACE_WATCH_NAMESPACES", "a,Team_B", '"Team_B"'),
        ("HEADRACE_STATIC_VOLUMES", "fs-01234567", "JSON object of lists"),
        ("HEADRACE_STATIC_VOLUMES", '["fs-01234567"]', "JSON object of lists"),
        ("HEADRACE_STATIC_VOLUMES", '{"a": "fs-01234567"}', "JSON object of lists"),
        ("HEADRACE_STATIC_VOLUMES", '{"a": [1]}', "JSON object of lists"),
    ],
)
def test_wrong_settings_are_named(variable: str, value: str, fragment: str) -> None:
    environment = {"HEADRACE_LOADER_IMAGE": "loader:1", variable: value}
    with pytest.raises(SettingsInvalid, match=variable) as error:
        ProcessSettings.from_environment(environment)
    assert fragment in str(error.value)


def test_a_termination_message_is_read() -> None:
    message = '{"reason":"Published","message":"a\\nb","totalBytes":5,"seconds":1}'
    found = termination_of({"message": message})
    assert found is not None
    assert (found.reason, found.message, found.total_bytes) == ("Published", "a b", 5)


def test_a_message_longer_than_the_kubelet_keeps_is_none_of_ours() -> None:
    message = json.dumps({"reason": "Published", "message": "x" * 4096})
    assert termination_of({"message": message}) is None


@given(st.text() | st.recursive(st.integers() | st.text(), st.lists).map(json.dumps))
def test_other_termination_messages_are_none(message: str) -> None:
    assert termination_of({"message": message}) is None


@given(st.text())
def test_a_condition_message_is_one_bounded_line(message: str) -> None:
    flat = one_line(message * 300)
    assert len(flat) <= 1024
    assert len(flat.splitlines()) <= 1


@given(st.text(alphabet="abc-", min_size=1, max_size=80), st.text(alphabet="xyz", max_size=20))
def test_child_names_are_labels_and_keep_owner_and_suffix_apart(owner: str, suffix: str) -> None:
    name = child_name(owner, suffix)
    assert len(name) <= 63
    assert name.endswith(f"-{suffix}")


def test_long_child_names_are_shortened_and_stay_different() -> None:
    names = {child_name(owner, "shard-01234567") for owner in ("x" * 62 + "a", "x" * 62 + "b")}
    assert len(names) == 2
    assert {len(name) for name in names} == {63}
    assert all(name.endswith("-shard-01234567") for name in names)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("pvc://c/a/b/", ("c", "a/b")),
        ("pvc://c", ("", "")),
        ("s3://c/a", ("", "")),
        ("hf://c/a", ("", "")),
        ("", ("", "")),
    ],
)
def test_sources_are_split(source: str, expected: tuple[str, str]) -> None:
    assert source_parts(source) == expected


def test_health_names_stale_loops_and_broken_parts() -> None:
    now = SimpleNamespace(value=0.0)
    health = Health(clock=lambda: now.value)
    health.beat("worker 0")
    now.value = STALE_SECONDS
    assert health.problems() == []
    now.value += 1
    assert health.problems() == ["worker 0 has not turned for 181 s"]
    health.beat("worker 0")
    health.report("watch of pods", "broken")
    assert health.problems() == ["watch of pods: broken"]
    health.report("watch of pods", None)
    assert health.problems() == []


KEY = Key("ns", "tiny")
OWNER = {"namespace": "ns", "name": "tiny"}


def ready_pod(uid: str = "uid", **changes: str) -> dict[str, Any]:
    times = {
        "PodScheduled": "2026-11-24T12:00:02Z",
        "Initialized": "2026-11-24T12:00:35Z",
        "Ready": "2026-11-24T12:01:00Z",
        **changes,
    }
    return {
        "metadata": {
            "uid": uid,
            "creationTimestamp": "2026-11-24T12:00:00Z",
            "labels": {"app.kubernetes.io/component": "serve"},
        },
        "status": {
            "conditions": [
                {"type": kind, "status": "True", "lastTransitionTime": time}
                for kind, time in times.items()
            ],
            "initContainerStatuses": [
                {"name": "loader", "state": {"running": {"startedAt": "2026-11-24T12:00:05Z"}}}
            ],
        },
    }


def test_the_phases_of_a_cold_start() -> None:
    expected = {"schedule": 2, "prepare": 3, "load": 30, "engine": 25, "total": 60}
    assert phases(ready_pod()) == expected
    assert phases(ready_pod(Initialized="2026-11-24T11:00:00Z")) == {}
    assert phases(ready_pod(Ready="")) == {}
    assert phases({}) == {}


def test_every_cold_start_counts_once_and_old_ones_not_at_all() -> None:
    def count() -> float:
        name = "headrace_cold_start_phase_duration_seconds_count"
        return REGISTRY.get_sample_value(name, {**OWNER, "phase": "total"}) or 0.0

    before = count()
    starts = ColdStarts(datetime(2026, 11, 24, 12, 0, tzinfo=UTC))
    for _ in range(2):
        starts.note(KEY, [ready_pod("a"), ready_pod("b")])
    assert count() == before + 2
    later = ColdStarts(datetime(2026, 11, 24, 12, 1, 1, tzinfo=UTC))
    later.note(KEY, [ready_pod("ready before the operator started")])
    assert count() == before + 2


def test_the_first_cold_start_is_an_increase() -> None:
    COLD_START_QUANTILES.clear()
    ColdStarts(datetime(2026, 11, 24, 12, 0, tzinfo=UTC))
    name = "headrace_operator_cold_start_phase_duration_seconds_count"
    counts = {
        phase: REGISTRY.get_sample_value(name, {"phase": phase}) for phase in phases(ready_pod())
    }
    assert set(counts.values()) == {0.0}


def test_log_lines_are_json_with_the_object_named() -> None:
    record = logging.makeLogRecord(
        {"msg": "not %s", "args": ("done",), "levelname": "WARNING", "name": "x"}
    )
    record.object, record.seconds = ("ns", "tiny"), 1.5
    entry = json.loads(JsonFormatter().format(record))
    assert {"message": "not done", "level": "warning", "name": "tiny"}.items() <= entry.items()
    assert (entry["namespace"], entry["seconds"]) == ("ns", 1.5)
