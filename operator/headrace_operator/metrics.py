"""Prometheus metrics of the operator, served on their own port; docs/metrics.md explains them.

Those of one ModelDeployment carry its namespace and name, and go with it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

disable_created_metrics()  # type: ignore[no-untyped-call]

_DURATIONS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_PHASES = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 3600)
_OWNER = ("namespace", "name")

_Owner: TypeAlias = tuple[str, str]


class OfOne(Collector):
    """A metric of single ModelDeployments, by namespace, name and more labels.

    The library's labelled children take 0.7 kB for each number, and there are some forty
    numbers per ModelDeployment; these take a fifth of that, and all of one go at once.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str] = (),
        *,
        kind: Literal["gauge", "counter", "summary"] = "gauge",
    ) -> None:
        self.name, self.kind = name, kind
        self.labels = (*_OWNER, *labels)
        self._documentation = documentation
        # By the sample's suffix and the values of the labels after namespace and name.
        self._owners: dict[_Owner, dict[tuple[str, ...], float]] = {}
        REGISTRY.register(self)

    def set(self, owner: _Owner, value: float, *labels: str) -> None:
        """Set a gauge."""
        self._owners.setdefault(owner, {})["", *labels] = value

    def inc(self, owner: _Owner, amount: float, *labels: str) -> None:
        """Add to a counter; by 0 it is there before it counts, without which nothing increases."""
        self._add(owner, amount, "_total", *labels)

    def observe(self, owner: _Owner, value: float, *labels: str) -> None:
        """Add a value to a summary: to its sum and its count."""
        self._add(owner, value, "_sum", *labels)
        self._add(owner, 1, "_count", *labels)

    def forget(self, owner: _Owner, *first: str) -> None:
        """Remove what is told of a ModelDeployment, or only what has these `first` labels."""
        values = self._owners.get(owner, {})
        for key in [key for key in values if key[1 : 1 + len(first)] == first]:
            del values[key]
        if not values:
            self._owners.pop(owner, None)

    def collect(self) -> Iterable[Metric]:
        """Yield the metric, in the thread of the one who scrapes."""
        metric = Metric(self.name, self._documentation, self.kind)
        # Copies are made in one step of the interpreter, so the event loop may go on writing.
        for owner, values in self._owners.copy().items():
            for (suffix, *labels), value in values.copy().items():
                named = dict(zip(self.labels, (*owner, *labels), strict=True))
                metric.add_sample(self.name + suffix, named, value)
        yield metric

    def _add(self, owner: _Owner, amount: float, *key: str) -> None:
        values = self._owners.setdefault(owner, {})
        values[key] = values.get(key, 0) + amount


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
COLD_START_SECONDS = OfOne(
    "headrace_cold_start_phase_duration_seconds",
    "Duration of one phase of the starts of serving pods",
    ["phase"],
    kind="summary",
)
COLD_START_QUANTILES = Histogram(
    "headrace_operator_cold_start_phase_duration_seconds",
    "Duration of one phase of the starts of all serving pods",
    ["phase"],
    buckets=_PHASES,
)
POD_COLD_START_SECONDS = OfOne(
    "headrace_pod_cold_start_phase_duration_seconds",
    "Duration of one phase of the start of a serving pod that is there and ready",
    ["pod", "phase"],
)
CONDITION = OfOne(
    "headrace_modeldeployment_condition",
    "Condition of a ModelDeployment: 1 True, 0 False, -1 Unknown",
    ["type"],
)
REPLICAS = OfOne("headrace_modeldeployment_replicas", "Replicas asked for")
READY_REPLICAS = OfOne("headrace_modeldeployment_ready_replicas", "Replicas that answer requests")
CHECKPOINT_BYTES = OfOne(
    "headrace_modeldeployment_checkpoint_bytes", "Bytes of the published checkpoint"
)
CHECKPOINT_JOBS = OfOne(
    "headrace_checkpoint_jobs",
    "Shard Jobs that ended: complete or failed",
    ["result"],
    kind="counter",
)
CHECKPOINT_JOB_ACTIVE = OfOne("headrace_checkpoint_jobs_active", "Shard Jobs that have not ended")
CHECKPOINT_JOB_SECONDS = OfOne(
    "headrace_checkpoint_job_duration_seconds", "Duration of complete shard Jobs", kind="summary"
)
GPUS = OfOne(
    "headrace_gpus",
    "GPUs that serving pods hold: serving where the pod is ready, else idle",
    ["state"],
)
GPU_SECONDS = OfOne(
    "headrace_gpu_seconds",
    "Time that serving pods held GPUs: serving where the pod was ready, else idle",
    ["state"],
    kind="counter",
)

_OF_ONE = (
    *(COLD_START_SECONDS, POD_COLD_START_SECONDS, CONDITION, REPLICAS, READY_REPLICAS),
    *(CHECKPOINT_BYTES, CHECKPOINT_JOBS, CHECKPOINT_JOB_ACTIVE, CHECKPOINT_JOB_SECONDS),
    *(GPUS, GPU_SECONDS),
)
_VALUES = {"True": 1, "False": 0}


def report_status(namespace: str, name: str, replicas: int, status: Mapping[str, Any]) -> None:
    """Set the gauges that repeat a ModelDeployment's spec.replicas and status."""
    key = (namespace, name)
    REPLICAS.set(key, replicas)
    READY_REPLICAS.set(key, status.get("readyReplicas") or 0)
    size = (status.get("checkpoint") or {}).get("totalBytes")
    if size is None:
        CHECKPOINT_BYTES.forget(key)
    else:
        CHECKPOINT_BYTES.set(key, size)
    conditions: Iterable[Mapping[str, Any]] = status.get("conditions", ())
    for condition in conditions:
        value = _VALUES.get(condition["status"], -1)
        CONDITION.set(key, value, str(condition["type"]))


def forget(namespace: str, name: str) -> None:
    """Remove what is told of a ModelDeployment that is gone."""
    for metric in _OF_ONE:
        metric.forget((namespace, name))
