"""Prometheus metrics of the operator, served on their own port; docs/metrics.md explains them.

Those of one ModelDeployment carry its namespace and name, and go with it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

disable_created_metrics()  # type: ignore[no-untyped-call]

_DURATIONS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_PHASES = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 3600)
_JOBS = (1, 10, 30, 60, 120, 300, 600, 1200, 3600, 7200, 14400)
_OWNER = ("namespace", "name")

API_REQUESTS = Counter(
    "headrace_operator_api_requests",
    "Requests to the API server by method and status; none means no answer",
    ["method", "status"],
)
RECONCILE_SECONDS = Histogram(
    "headrace_operator_reconcile_duration_seconds",
    "Duration of one reconciliation of one ModelDeployment",
    buckets=_DURATIONS,
)
RECONCILE_ERRORS = Counter(
    "headrace_operator_reconcile_errors", "Failed reconciliations by reason", ["reason"]
)
QUEUE_DEPTH = Gauge("headrace_operator_queue_depth", "ModelDeployments waiting for reconciliation")
WATCH_LAG = Gauge(
    "headrace_operator_watch_behind",
    "1 when a listing has shown changes that the watch has not delivered",
    ["kind"],
)
COLD_START_SECONDS = Histogram(
    "headrace_cold_start_phase_duration_seconds",
    "Duration of one phase of the start of one serving pod",
    [*_OWNER, "phase"],
    buckets=_PHASES,
)
POD_COLD_START_SECONDS = Gauge(
    "headrace_pod_cold_start_phase_duration_seconds",
    "Duration of one phase of the start of a serving pod that is there and ready",
    [*_OWNER, "pod", "phase"],
)
CONDITION = Gauge(
    "headrace_modeldeployment_condition",
    "Condition of a ModelDeployment: 1 True, 0 False, -1 Unknown",
    [*_OWNER, "type"],
)
REPLICAS = Gauge("headrace_modeldeployment_replicas", "Replicas asked for", _OWNER)
READY_REPLICAS = Gauge(
    "headrace_modeldeployment_ready_replicas", "Replicas that answer requests", _OWNER
)
CHECKPOINT_BYTES = Gauge(
    "headrace_modeldeployment_checkpoint_bytes", "Bytes of the published checkpoint", _OWNER
)
CHECKPOINT_JOBS = Counter(
    "headrace_checkpoint_jobs", "Shard Jobs that ended: complete or failed", [*_OWNER, "result"]
)
CHECKPOINT_JOB_ACTIVE = Gauge(
    "headrace_checkpoint_jobs_active", "Shard Jobs that have not ended", _OWNER
)
CHECKPOINT_JOB_SECONDS = Histogram(
    "headrace_checkpoint_job_duration_seconds",
    "Duration of one complete shard Job",
    _OWNER,
    buckets=_JOBS,
)
GPUS = Gauge(
    "headrace_gpus",
    "GPUs that serving pods hold: serving where the pod is ready, else idle",
    [*_OWNER, "state"],
)
GPU_SECONDS = Counter(
    "headrace_gpu_seconds",
    "Time that serving pods held GPUs: serving where the pod was ready, else idle",
    [*_OWNER, "state"],
)

_OF_ONE = (
    *(COLD_START_SECONDS, POD_COLD_START_SECONDS, CONDITION, REPLICAS, READY_REPLICAS),
    *(CHECKPOINT_BYTES, CHECKPOINT_JOBS, CHECKPOINT_JOB_ACTIVE, CHECKPOINT_JOB_SECONDS),
    *(GPUS, GPU_SECONDS),
)
_VALUES = {"True": 1, "False": 0}


def report_status(namespace: str, name: str, replicas: int, status: Mapping[str, Any]) -> None:
    """Set the gauges that repeat a ModelDeployment's spec.replicas and status."""
    REPLICAS.labels(namespace, name).set(replicas)
    READY_REPLICAS.labels(namespace, name).set(status.get("readyReplicas") or 0)
    size = (status.get("checkpoint") or {}).get("totalBytes")
    if size is not None:
        CHECKPOINT_BYTES.labels(namespace, name).set(size)
    conditions: Iterable[Mapping[str, Any]] = status.get("conditions", ())
    for condition in conditions:
        value = _VALUES.get(condition["status"], -1)
        CONDITION.labels(namespace, name, condition["type"]).set(value)


def forget(namespace: str, name: str) -> None:
    """Remove what is told of a ModelDeployment that is gone."""
    for metric in _OF_ONE:
        metric.remove_by_labels({"namespace": namespace, "name": name})
