"""What the metrics tell of one ModelDeployment: cold starts, shard Jobs, GPUs, and its end."""

from datetime import UTC, datetime, timedelta
from typing import Any

from prometheus_client import REGISTRY

from headrace_operator import metrics
from headrace_operator.cluster.store import Key
from headrace_operator.coldstart import ColdStarts
from headrace_operator.usage import CheckpointJobs, Gpus, Remembered, gpus_of

NOON = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
RESOURCE = {"spec": {"parallelism": {"tensorParallelSize": 8}}}


def value(name: str, key: Key, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(
        f"headrace_{name}", {"namespace": key.namespace, "name": key.name, **labels}
    )


def pod(
    name: str = "pod", *, ready: bool = False, node: str = "node", **spec: Any
) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "uid": name, "labels": {"app.kubernetes.io/component": "serve"}},
        "spec": {"nodeName": node, **spec},
        "status": {"conditions": [{"type": "Ready", "status": str(ready)}]},
    }


def whole_node(gpus: int) -> dict[str, Any]:
    return {
        "containers": [{"name": "engine", "resources": {"limits": {"nvidia.com/gpu": str(gpus)}}}]
    }


def test_gpu_seconds_are_idle_from_the_binding_until_the_pod_is_ready() -> None:
    key, gpus = Key("ns", "idle"), Gpus()
    steps = [
        (0, [pod(node="", **whole_node(2))]),  # pending: no GPU is held
        (10, [pod(**whole_node(2))]),  # bound
        (25, [pod(ready=True, **whole_node(2))]),
        (55, [pod(**whole_node(2))]),  # its engine crashed
        (60, []),
        (90, []),
    ]
    for seconds, pods in steps:
        gpus.note(key, RESOURCE, pods, NOON + timedelta(seconds=seconds))
    assert value("gpu_seconds_total", key, state="idle") == 2 * (15 + 5)
    assert value("gpu_seconds_total", key, state="serving") == 2 * 30
    assert value("gpus", key, state="idle") == 0


def test_gpus_of_a_claim_are_those_of_the_spec_and_pods_without_any_hold_none() -> None:
    key, gpus = Key("ns", "claims"), Gpus()
    claimed = pod("claimed", resourceClaims=[{"name": "gpu"}], ready=True)
    ended = pod("ended", **whole_node(4)) | {"status": {"phase": "Failed"}}
    gpus.note(key, RESOURCE, [claimed, pod("cpu"), ended], NOON)
    groups = {"spec": {"parallelism": {"tensorParallelSize": 8, "nodes": 2}}}
    assert gpus_of(claimed, groups) == 4  # each node's pod has its part
    assert value("gpus", key, state="serving") == 8
    assert value("gpus", key, state="idle") == 0


def job(uid: str, end: str | None, minutes: int = 5) -> dict[str, Any]:
    at = (NOON + timedelta(minutes=minutes)).isoformat()
    conditions = [{"type": end, "status": "True", "lastTransitionTime": at}] if end else []
    status = {"startTime": NOON.isoformat(), "conditions": conditions}
    return {"metadata": {"uid": uid}, "status": status}


def test_every_shard_job_counts_once_by_its_end() -> None:
    key, jobs = Key("ns", "jobs"), CheckpointJobs(NOON)
    jobs.note(key, [job("a", None)])
    assert value("checkpoint_jobs_total", key, result="failed") == 0
    assert value("checkpoint_jobs_active", key) == 1
    for _ in range(2):
        jobs.note(key, [job("a", "Complete"), job("b", "Failed"), job("old", "Complete", -1)])
    assert value("checkpoint_jobs_total", key, result="complete") == 1
    assert value("checkpoint_jobs_total", key, result="failed") == 1
    assert value("checkpoint_jobs_active", key) == 0
    assert value("checkpoint_job_duration_seconds_sum", key) == 300


def started(name: str) -> dict[str, Any]:
    marks = {"PodScheduled": 2, "Initialized": 35, "Ready": 60}
    times = {k: (NOON + timedelta(seconds=s)).isoformat() for k, s in marks.items()}
    conditions = [
        {"type": k, "status": "True", "lastTransitionTime": time} for k, time in times.items()
    ]
    running = {"running": {"startedAt": (NOON + timedelta(seconds=5)).isoformat()}}
    made = pod(name)
    made["metadata"]["creationTimestamp"] = NOON.isoformat()
    loader = {"name": "loader", "state": running}
    made["status"] = {"conditions": conditions, "initContainerStatuses": [loader]}
    return made


def test_pods_that_are_gone_are_shown_no_longer() -> None:
    key, starts = Key("ns", "shown"), ColdStarts(NOON)
    name = "pod_cold_start_phase_duration_seconds"
    starts.note(key, [started("a"), started("b")])
    assert value(name, key, pod="a", phase="load") == 30
    starts.note(key, [started("b")])
    assert value(name, key, pod="a", phase="load") is None
    assert value(name, key, pod="b", phase="load") == 30


def test_a_pod_that_becomes_ready_again_is_shown_anew_and_counted_once() -> None:
    key, starts = Key("ns", "again"), ColdStarts(NOON)
    pods = [started("a")]
    starts.note(key, pods)
    (ready,) = (c for c in pods[0]["status"]["conditions"] if c["type"] == "Ready")
    ready["lastTransitionTime"] = (NOON + timedelta(seconds=90)).isoformat()
    starts.note(key, pods)
    assert value("pod_cold_start_phase_duration_seconds", key, pod="a", phase="total") == 90
    assert value("cold_start_phase_duration_seconds_count", key, phase="total") == 1
    assert value("cold_start_phase_duration_seconds_sum", key, phase="total") == 60


def test_nothing_is_told_of_a_model_deployment_that_is_gone() -> None:
    key = Key("ns", "gone")
    status = {"readyReplicas": 1, "checkpoint": {"totalBytes": 7}, "conditions": []}
    metrics.report_status(*key, 2, status)
    cold_starts = ColdStarts(NOON)
    cold_starts.note(key, [started("a")])
    CheckpointJobs(NOON).note(key, [job("gone", "Complete")])
    Gpus().note(key, RESOURCE, [], NOON)
    assert value("modeldeployment_checkpoint_bytes", key) == 7
    metrics.forget(*key)
    left = [s for f in REGISTRY.collect() for s in f.samples if s.labels.get("name") == "gone"]
    assert left == []
    # one of the same name that takes its pods over starts anew
    cold_starts.forget(key)
    cold_starts.note(key, [started("a")])
    assert value("pod_cold_start_phase_duration_seconds", key, pod="a", phase="total") is not None


def test_the_size_is_that_of_the_checkpoint_of_today() -> None:
    key = Key("ns", "sizes")
    for size, shown in (({"totalBytes": 7}, 7), ({}, None)):
        metrics.report_status(*key, 1, {"checkpoint": size})
        assert value("modeldeployment_checkpoint_bytes", key) == shown


def test_what_was_counted_is_remembered_within_bounds() -> None:
    remembered = Remembered()
    assert [remembered.is_new(uid) for uid in ("a", "b", "a")] == [True, True, False]
    for n in range(10_000):
        remembered.is_new(str(n))
    assert remembered.is_new("a")
