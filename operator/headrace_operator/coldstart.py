"""Phases of a serving pod's start, read from the times its status carries.

    schedule  created -> bound to a node
    prepare   bound -> loader started: volumes attached and mounted, image pulled
    load      loader started -> pod initialised: weights resident and verified
    engine    pod initialised -> ready: engine started, attached and warmed up
    total     created -> ready

With the gate Overlap the engine starts during the load, and `load` ends with the loader's
start. Times have a resolution of one second.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from headrace_operator.cluster.store import Key
from headrace_operator.metrics import (
    COLD_START_QUANTILES,
    COLD_START_SECONDS,
    POD_COLD_START_SECONDS,
)
from headrace_operator.plan.names import COMPONENT_LABEL, SERVE
from headrace_operator.plan.objects import condition_of, items, name_of, parse_time, text, uid_of
from headrace_operator.plan.serving_pod import LOADER
from headrace_operator.usage import Remembered

PHASES = ("schedule", "prepare", "load", "engine")


def phases(pod: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of every phase of a ready pod; empty when it is not ready or lacks one."""
    if text(condition_of(pod, "Ready"), "status") != "True":
        return {}
    marks = [
        parse_time(text(pod, "metadata", "creationTimestamp")),
        _since(pod, "PodScheduled"),
        _loader_started(pod),
        _since(pod, "Initialized"),
        _since(pod, "Ready"),
    ]
    times = [mark for mark in marks if mark is not None]
    if len(times) != len(marks) or times != sorted(times):
        return {}
    result = {
        name: (end - start).total_seconds()
        for name, start, end in zip(PHASES, times, times[1:], strict=False)
    }
    return {**result, "total": (times[-1] - times[0]).total_seconds()}


class ColdStarts:
    """Counts the start of every pod once, of those that became ready since `since`."""

    def __init__(self, since: datetime) -> None:
        self._since = since
        self._counted = Remembered()
        # By pod, when it became ready: a pod that has not changed since is not looked at again.
        self._shown: dict[Key, dict[str, str]] = {}
        for phase in (*PHASES, "total"):
            # There from 0: rate() and increase() do not see the first value of a series.
            COLD_START_QUANTILES.labels(phase)

    def note(self, key: Key, pods: Iterable[Mapping[str, Any]]) -> None:
        """Count the pods of a ModelDeployment that have become ready, and show all that are."""
        before = self._shown.pop(key, {})
        shown: dict[str, str] = {}
        for pod in pods:
            ready = condition_of(pod, "Ready")
            if (
                text(pod, "metadata", "labels", COMPONENT_LABEL) != SERVE
                or text(ready, "status") != "True"
            ):
                continue
            mark = f"{uid_of(pod)} {text(ready, 'lastTransitionTime')}"
            if before.get(name_of(pod)) == mark or self._show(key, pod):
                shown[name_of(pod)] = mark
        for gone in before.keys() - shown.keys():
            POD_COLD_START_SECONDS.forget(key, gone)
        if shown:
            self._shown[key] = shown

    def forget(self, key: Key) -> None:
        """Forget a ModelDeployment that is gone."""
        self._shown.pop(key, None)

    def _show(self, key: Key, pod: Mapping[str, Any]) -> bool:
        seconds = phases(pod)
        for phase, value in seconds.items():
            POD_COLD_START_SECONDS.set(key, value, name_of(pod), phase)
        ready = _since(pod, "Ready")
        is_old = ready is None or ready < self._since
        if seconds and not is_old and self._counted.is_new(uid_of(pod)):
            for phase, value in seconds.items():
                COLD_START_SECONDS.observe(key, value, phase)
                COLD_START_QUANTILES.labels(phase).observe(value)
        return bool(seconds)


def _since(pod: Mapping[str, Any], condition: str) -> datetime | None:
    found = condition_of(pod, condition)
    if text(found, "status") != "True":
        return None
    return parse_time(text(found, "lastTransitionTime"))


def _loader_started(pod: Mapping[str, Any]) -> datetime | None:
    statuses = items(pod, "status", "initContainerStatuses")
    started = (
        text(s, "state", "running", "startedAt") for s in statuses if text(s, "name") == LOADER
    )
    return parse_time(next(started, ""))
