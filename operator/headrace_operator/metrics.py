"""Prometheus metrics of the operator, served on their own port."""

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

disable_created_metrics()  # type: ignore[no-untyped-call]

_DURATIONS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_PHASES = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 3600)

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
    "headrace_cold_start_phase_seconds",
    "Duration of one phase of the start of one serving pod",
    ["phase"],
    buckets=_PHASES,
)
CONDITION = Gauge(
    "headrace_modeldeployment_condition",
    "Condition of a ModelDeployment: 1 True, 0 False, -1 Unknown",
    ["namespace", "name", "type"],
)
_VALUES = {"True": 1, "False": 0}


def report_conditions(namespace: str, name: str, conditions: Iterable[Mapping[str, Any]]) -> None:
    """Set the condition gauges of a ModelDeployment."""
    for condition in conditions:
        value = _VALUES.get(condition["status"], -1)
        CONDITION.labels(namespace, name, condition["type"]).set(value)


def forget_conditions(namespace: str, name: str) -> None:
    """Remove the condition gauges of a ModelDeployment that is gone."""
    CONDITION.remove_by_labels({"namespace": namespace, "name": name})
