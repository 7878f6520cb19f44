"""Collects the phases of a cold start from what the cluster and the loader recorded."""

from __future__ import annotations

import json
import re
import urllib.request
from datetime import datetime
from typing import TYPE_CHECKING

from workspace.errors import ToolError

from .timeline import Span

if TYPE_CHECKING:
    from .completion import Completion
    from .observe import Model, Object

LOADER_PORT = 9400
STATUS_SECONDS = 10.0
ATTACHED = re.compile(r"^(\S+) .*headrace: attached rank=(\d+).* bytes=(\d+) seconds=([\d.]+)")


def cold_start(model: Model, answer: Completion) -> list[Span]:
    """Return the spans from the ModelDeployment's creation to the first token.

    Times of Kubernetes objects have a resolution of one second; those of the loader and of
    log lines are exact.
    """
    created = _time(model.read()["metadata"]["creationTimestamp"])
    volume = _time(model.conditions()["VolumeReady"]["lastTransitionTime"])
    pod = model.children("pods", "serve")[-1]
    loader = loader_status(pod)
    engine = _time(_container(pod, "engine")["state"]["running"]["startedAt"])
    ready = _since(pod, "Ready")
    return [
        Span("volume", created, volume, model.conditions()["VolumeReady"]["reason"]),
        _sharding(model.children("pods", "shard")[0]),
        Span("scheduled", _time(pod["metadata"]["creationTimestamp"]), _since(pod, "PodScheduled")),
        _load(loader),
        *_engine(model, pod["metadata"]["name"], engine, ready),
        Span("first token", answer.asked, answer.first_token),
    ]


def loader_status(pod: Object) -> Object:
    """Return what the loader of a serving pod says of itself."""
    url = f"http://{pod['status']['podIP']}:{LOADER_PORT}/v1/status"
    with urllib.request.urlopen(url, timeout=STATUS_SECONDS) as response:
        result: Object = json.load(response)
        return result


def attached_lines(log: str) -> list[tuple[float, int, int, float]]:
    """Return (time, rank, bytes, seconds) of each handover in an engine's timestamped log."""
    found = filter(None, map(ATTACHED.match, log.splitlines()))
    return [(_time(m[1]), int(m[2]), int(m[3]), float(m[4])) for m in found]


def _sharding(pod: Object) -> Span:
    ended = _container(pod, "shard")["state"]["terminated"]
    report = json.loads(ended.get("message") or "{}")
    note = f"{report.get('reason')}, {_size(report.get('totalBytes', 0))}"
    return Span("sharding", _time(ended["startedAt"]), _time(ended["finishedAt"]), note)


def _load(loader: Object) -> Span:
    marks = loader["timeline"]
    note = f"{_size(loader['totalBytes'])} verified, {len(loader['ranks'])} ranks"
    return Span("load", marks["processStarted"], marks["resident"], note)


def _engine(model: Model, pod: str, started: float, ready: float) -> list[Span]:
    command = ("logs", "-n", model.namespace, pod, "-c", "engine", "--timestamps")
    handovers = attached_lines(model.cluster.kubectl(*command))
    if not handovers:
        raise ToolError(f"pod {pod}: the engine's log has no line about attached weights")
    began = min(time - seconds for time, _, _, seconds in handovers)
    done = max(time for time, _, _, _ in handovers)
    total = sum(count for _, _, count, _ in handovers)
    slowest = max(seconds for _, _, _, seconds in handovers)
    note = f"{_size(total)} mapped, slowest rank {slowest * 1000:.0f} ms"
    return [
        Span("engine start", started, began),
        Span("attach", began, done, note),
        Span("engine ready", done, ready),
    ]


def _container(pod: Object, name: str) -> Object:
    statuses: list[Object] = pod["status"]["containerStatuses"]
    return next(status for status in statuses if status["name"] == name)


def _since(pod: Object, condition: str) -> float:
    found = (c for c in pod["status"]["conditions"] if c["type"] == condition)
    return _time(next(found)["lastTransitionTime"])


def _time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
