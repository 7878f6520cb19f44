"""What the metrics tell of a ModelDeployment's GPUs and shard Jobs.

A serving pod holds its GPUs from its binding to a node to its end. They serve while the pod is
Ready and are idle before, between and after: pulling, loading, compiling, crashing. Seconds
are added up at every reconciliation, at least at every resync.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from headrace_operator.cluster.store import Key
from headrace_operator.metrics import (
    CHECKPOINT_JOB_ACTIVE,
    CHECKPOINT_JOB_SECONDS,
    CHECKPOINT_JOBS,
    GPU_SECONDS,
    GPUS,
)
from headrace_operator.plan.names import COMPONENT_LABEL, SERVE
from headrace_operator.plan.objects import (
    at,
    condition_of,
    integer,
    is_true,
    items,
    parse_time,
    text,
    uid_of,
)
from headrace_operator.plan.serving_pod import GPU_RESOURCE

_MAX_REMEMBERED = 10_000
_ENDS = {"Complete": "complete", "Failed": "failed"}


class Remembered:
    """Which objects were counted: the latest ten thousand."""

    def __init__(self) -> None:
        self._uids: dict[str, None] = {}

    def is_new(self, uid: str) -> bool:
        """Whether a UID comes for the first time."""
        if uid in self._uids:
            return False
        self._uids[uid] = None
        if len(self._uids) > _MAX_REMEMBERED:
            del self._uids[next(iter(self._uids))]
        return True


@dataclass(frozen=True, slots=True)
class _Held:
    """GPUs by state at a time."""

    at: datetime
    gpus: Mapping[str, int]


class Gpus:
    """Adds up how long pods hold GPUs, and whether they serve with them."""

    def __init__(self) -> None:
        self._held: dict[Key, _Held] = {}

    def note(
        self, key: Key, resource: object, pods: Iterable[Mapping[str, Any]], now: datetime
    ) -> None:
        """Add the time since the last call, and take over what the pods hold now."""
        before = self._held.get(key)
        held = {"serving": 0, "idle": 0}
        for pod in pods:
            if holds_gpus(pod):
                state = "serving" if is_true(pod, "Ready") else "idle"
                held[state] += gpus_of(pod, resource)
        for state, count in held.items():
            GPUS.set(key, count, state)
            passed = 0.0 if before is None else max(0.0, (now - before.at).total_seconds())
            GPU_SECONDS.inc(key, passed * (before.gpus[state] if before else 0), state)
        self._held[key] = _Held(now, held)

    def forget(self, key: Key) -> None:
        """Forget a ModelDeployment that is gone."""
        self._held.pop(key, None)


def holds_gpus(pod: Mapping[str, Any]) -> bool:
    """Whether a pod is a serving pod that is bound to a node and has not ended."""
    is_serving = text(pod, "metadata", "labels", COMPONENT_LABEL) == SERVE
    ended = text(pod, "status", "phase") in ("Succeeded", "Failed")
    return is_serving and bool(text(pod, "spec", "nodeName")) and not ended


def gpus_of(pod: Mapping[str, Any], resource: object) -> int:
    """Return the GPUs of a serving pod: its limits, or with a claim those of the spec."""
    limits = (
        text(c, "resources", "limits", GPU_RESOURCE) for c in items(pod, "spec", "containers")
    )
    count = sum(int(limit) for limit in limits if limit.isdigit())
    if count or not items(pod, "spec", "resourceClaims"):
        return count
    parallelism = at(resource, "spec", "parallelism")
    nodes = integer(parallelism, "nodes") or 1
    return (integer(parallelism, "tensorParallelSize") or 1) // nodes


class CheckpointJobs:
    """Counts every shard Job once, of those that ended since `since`."""

    def __init__(self, since: datetime) -> None:
        self._since = since
        self._counted = Remembered()

    def note(self, key: Key, jobs: Iterable[Mapping[str, Any]]) -> None:
        """Count the Jobs of a ModelDeployment that have ended."""
        active = 0
        for result in _ENDS.values():
            CHECKPOINT_JOBS.inc(key, 0, result)
        for job in jobs:
            end = next((kind for kind in _ENDS if is_true(job, kind)), None)
            if end is None:
                active += 1
                continue
            ended = parse_time(text(condition_of(job, end), "lastTransitionTime"))
            if ended is None or ended < self._since or not self._counted.is_new(uid_of(job)):
                continue
            CHECKPOINT_JOBS.inc(key, 1, _ENDS[end])
            began = parse_time(text(job, "status", "startTime"))
            if began is not None and end == "Complete":
                CHECKPOINT_JOB_SECONDS.observe(key, (ended - began).total_seconds())
        CHECKPOINT_JOB_ACTIVE.set(key, active)
