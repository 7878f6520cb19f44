"""Stages of pods, progress of sharders, and phases of engines, from what clusters and logs show."""

import io
import json
import xml.etree.ElementTree as ET
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from headrace_cli.status import shard_progress, stage_of
from headrace_cli.status_command import render
from headrace_cli.timeline import draw
from headrace_cli.timeline.spans import (
    Span,
    engine_spans,
    pod_spans,
    shard_spans,
    trace_spans,
)

# What vLLM 0.32 and the plugin write, as the kubelet gives it with timestamps.
LOG = """\
2026-01-02T03:04:20.000000000Z INFO 01-02 03:04:20 [gpu_model_runner.py:5040] Starting to load
2026-01-02T03:04:21.500000000Z (Worker_TP0 pid=7) INFO headrace: attached rank=0 tensors=9 \
bytes=1024 seconds=0.025 mapping_seconds=0.0100
2026-01-02T03:04:22.000000000Z INFO [x.py:5150] Model loading took 101.5 GiB memory and 1.8 seconds
2026-01-02T03:04:40.000000000Z INFO [monitor.py:53] torch.compile took 15.25 s in total
2026-01-02T03:04:52Z INFO [x.py:6582] Graph capturing finished in 11 secs, took 0.50 GiB
2026-01-02T03:04:53Z INFO init engine (profile, create kv cache, warmup model) took 31.00 s \
(compilation: 15.25 s)
2026-01-02T03:04:55Z INFO:     Application startup complete.
no time here
"""


ROLLED = datetime(2026, 1, 2, 3, 3, 2, tzinfo=UTC).timestamp()


def condition(kind, second=None):
    when = f"2026-01-02T03:04:{second:02}Z" if second is not None else ""
    return {"type": kind, "status": "True" if when else "False", "lastTransitionTime": when}


def running(name, second):
    return {"name": name, "state": {"running": {"startedAt": f"2026-01-02T03:04:{second:02}Z"}}}


def serving_pod(**changes):
    status = {
        "phase": "Running",
        "conditions": [
            condition("PodScheduled", 1),
            condition("Initialized", 14),
            condition("Ready", 55),
        ],
        "initContainerStatuses": [running("loader", 4)],
        "containerStatuses": [running("engine", 15)],
    }
    return {
        "metadata": {
            "name": "p",
            "creationTimestamp": "2026-01-02T03:04:00Z",
            "labels": {"app.kubernetes.io/component": "serve"},
        },
        "status": status | changes,
    }


def test_phases_of_a_pod_are_those_of_the_operators_metrics():
    found = [(span.name, span.seconds) for span in pod_spans(serving_pod())]
    assert found == [("schedule", 1), ("prepare", 3), ("load", 10), ("engine", 41)]


def test_phases_that_have_not_ended_are_left_out():
    pod = serving_pod(conditions=[condition("PodScheduled", 1)])
    assert [span.name for span in pod_spans(pod)] == ["schedule", "prepare"]
    assert pod_spans({}) == []


def test_phases_of_an_engine_come_from_its_log():
    spans = engine_spans(serving_pod(), LOG)
    found = {span.name: round(span.seconds, 3) for span in spans}
    assert found == {
        "start process": 5.2,
        "attach weights": 0.025,
        "load model": 1.8,
        "compile": 15.25,
        "capture graphs": 11.0,
        "initialize engine": 31.0,
        "serving": 0.0,
    }


def test_engines_that_say_nothing_have_no_phases():
    assert engine_spans(serving_pod(), "starting\nnothing to see") == []


def test_shard_pods_that_failed_are_left_out():
    ended = {"startedAt": "2026-01-02T03:00:00Z", "finishedAt": "2026-01-02T03:03:00Z"}
    pods = [
        {"status": {"containerStatuses": [{"name": "shard", "state": {"terminated": state}}]}}
        for state in (ended | {"exitCode": 0}, ended | {"exitCode": 75}, {})
    ]
    assert [span.seconds for span in shard_spans(pods, ROLLED)] == [180]


def test_a_pod_that_came_long_after_the_sharding_did_not_wait_for_it():
    ended = {"startedAt": "2026-01-02T03:00:00Z", "finishedAt": "2026-01-02T03:03:00Z"}
    state = {"terminated": ended | {"exitCode": 0}}
    pod = {"status": {"containerStatuses": [{"name": "shard", "state": state}]}}
    assert shard_spans([pod], ROLLED + 3600) == []


@pytest.mark.parametrize("trace", [{}, {"traceEvents": 7}, {"traceEvents": [{"ph": "X"}, 3]}])
def test_traces_that_are_none_have_no_spans(trace):
    assert trace_spans(trace) == []


@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({}, "ready"),
        ({"conditions": [condition("PodScheduled")]}, "schedule"),
        ({"conditions": [condition("PodScheduled", 1)]}, "engine"),
        ({"conditions": [condition("PodScheduled", 1)], "containerStatuses": []}, "load"),
        (
            {
                "conditions": [condition("PodScheduled", 1)],
                "containerStatuses": [],
                "initContainerStatuses": [],
            },
            "prepare",
        ),
        ({"phase": "Failed"}, "failed"),
    ],
)
def test_stages_of_a_pod(changes, stage):
    assert stage_of(serving_pod(**changes)) == stage


def test_progress_of_a_sharder_is_its_last_report():
    report = {"event": "progress", "bytes": 5, "totalBytes": 10, "mibPerSecond": 1.5}
    log = "\n".join(["{", json.dumps(report | {"bytes": 1}), json.dumps(report), "plain", "[]"])
    assert shard_progress(log) == {"bytes": 5, "totalBytes": 10, "mibPerSecond": 1.5}
    assert shard_progress("nothing") is None


def test_a_sharder_has_a_bar():
    pod = {"name": "s", "component": "shard", "stage": "shard", "node": None, "problem": None}
    pod |= {"loader": None, "loaderProblem": None}
    pod["sharding"] = {"bytes": 5 * 10**9, "totalBytes": 10**10, "mibPerSecond": 100.0}
    model = {"namespace": "n", "name": "m", "ready": False, "reason": "Sharding", "message": "x"}
    model |= {"replicas": 1, "readyReplicas": 0, "conditions": [], "pods": [pod]}
    to = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    with to.file:
        to.print(render({"modelDeployments": [model]}))
    assert "50 % 5.0 GB of 10.0 GB 104.9 MB/s" in to.export_text()


def test_what_is_not_stalled_gets_no_cross():
    def drawn(**statuses):
        conditions = [
            {"type": kind, "status": status, "reason": "R", "message": "m"}
            for kind, status in statuses.items()
        ]
        model = {"namespace": "n", "name": "m", "ready": False, "reason": "R", "message": "m"}
        model |= {"replicas": 1, "readyReplicas": 0, "conditions": conditions, "pods": []}
        to = Console(width=120, record=True, file=io.StringIO())
        to.print(render({"modelDeployments": [model]}))
        return to.export_text()

    assert "✘" not in drawn(Ready="True", Reconciling="False", Stalled="False")
    assert "… Reconciling" in drawn(Ready="False", Reconciling="True", Stalled="False")
    assert "✘ Stalled" in drawn(Ready="False", Reconciling="False", Stalled="True")


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(max_size=9), st.text(max_size=9), st.floats(0, 1e9), st.floats(0, 1e6)),
        min_size=1,
        max_size=9,
    )
)
def test_every_drawing_is_well_formed(rows):
    spans = [Span(lane, name, begin, begin + length) for lane, name, begin, length in rows]
    safe = [s for s in spans if all(c.isprintable() for c in s.lane + s.name)]
    if not safe:
        return
    ET.fromstring(draw.svg("title <&>", safe))
    assert "<script" not in draw.html("<script>", safe).replace("&lt;script", "")
    assert len(draw.lines(safe).splitlines()) == len(safe)
    events = draw.chrome_trace(safe)["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == len(safe)
