"""A cold start as spans of time, from what the cluster, the loader and the engine recorded.

Kubernetes' times have a resolution of one second. The loader's and the engine's are exact, but of
the node's clock; log lines carry the time at which the kubelet got them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from headrace_operator.plan.names import SHARD
from headrace_operator.plan.objects import (
    at,
    condition_of,
    items,
    mapping,
    name_of,
    parse_time,
    text,
)
from headrace_operator.plan.serving_pod import ENGINE, LOADER

_MICROSECONDS = 1e6
# After the last shard is written, the operator makes the pods in far less.
_ROLLS_WITHIN_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Span:
    """A phase in a lane; Unix times in seconds. An instant begins when it ends."""

    lane: str
    name: str
    begin: float
    end: float
    note: str = ""

    @property
    def seconds(self) -> float:
        """How long it took."""
        return max(0.0, self.end - self.begin)


def pod_spans(pod: Mapping[str, Any]) -> list[Span]:
    """Return the phases of a serving pod as Kubernetes saw them; those that have ended."""
    marks = (
        ("", _time(text(pod, "metadata", "creationTimestamp"))),
        ("schedule", _since(pod, "PodScheduled")),
        ("prepare", _started(pod, "initContainerStatuses", LOADER)),
        ("load", _since(pod, "Initialized")),
        ("engine", _since(pod, "Ready")),
    )
    spans = []
    begin = marks[0][1]
    for name, end in marks[1:]:
        if begin is None or end is None:
            break
        spans.append(Span("pod", name, begin, max(begin, end)))
        begin = max(begin, end)
    return spans


def shard_spans(pods: Iterable[Mapping[str, Any]], created: float) -> list[Span]:
    """Return the runs of shard pods that ended well, if a pod `created` then waited for them.

    One that came long after found the checkpoint there: nothing of its cold start is sharding.
    """
    spans = []
    for pod in pods:
        ended = _terminated(pod)
        begin, end = _time(text(ended, "startedAt")), _time(text(ended, "finishedAt"))
        if begin is not None and end is not None and at(ended, "exitCode") == 0:
            spans.append(Span("sharding", "shard", begin, end, name_of(pod)))
    last = max((span.end for span in spans), default=created)
    return spans if created - last <= _ROLLS_WITHIN_SECONDS else []


def created_at(pod: Mapping[str, Any]) -> float:
    """Return when a pod was made."""
    return _time(text(pod, "metadata", "creationTimestamp")) or 0.0


def trace_spans(trace: Mapping[str, Any]) -> list[Span]:
    """Return the spans of a loader's /v1/trace."""
    events = items(trace, "traceEvents")
    lanes = {e.get("tid"): text(e, "args", "name") for e in events if e.get("ph") == "M"}
    spans = []
    for event in events:
        begin, length = event.get("ts"), event.get("dur", 0)
        if event.get("ph") not in ("X", "i") or not isinstance(begin, int | float):
            continue
        if not isinstance(length, int | float):
            continue
        lane = lanes.get(event.get("tid")) or "loader"
        end = (begin + length) / _MICROSECONDS
        note = _note(mapping(event, "args"))
        spans.append(Span(lane, text(event, "name"), begin / _MICROSECONDS, end, note))
    return spans


def _note(facts: Mapping[str, Any]) -> str:
    parts = []
    if isinstance(rate := facts.get("gibPerSecond"), int | float):
        parts.append(f"{rate:.2f} GiB/s")
    parts += [str(facts[key]) for key in ("path", "pathReason") if facts.get(key)]
    return ", ".join(parts)


# What engines write when a phase has ended, with its seconds; vLLM 0.32.
_PHASES = (
    (
        "attach weights",
        re.compile(r"headrace: attached rank=(?P<rank>\d+).* seconds=(?P<s>[\d.]+)"),
    ),
    ("load model", re.compile(r"Model loading took .* and (?P<s>[\d.]+) seconds")),
    ("compile", re.compile(r"torch\.compile took (?P<s>[\d.]+) s in total")),
    ("capture graphs", re.compile(r"Graph capturing finished in (?P<s>\d+) secs")),
    ("initialize engine", re.compile(r"init engine .* took (?P<s>[\d.]+) s")),
)
_SERVING = re.compile(r"Application startup complete")


def engine_spans(pod: Mapping[str, Any], log: str) -> list[Span]:
    """Return the phases of an engine from its log, whose lines begin with their time."""
    spans = list(_phases(log))
    started = _started(pod, "containerStatuses", ENGINE)
    if started is not None and spans:
        first = min(span.begin for span in spans)
        spans.insert(0, Span("engine", "start process", started, max(started, first)))
    return spans


def _phases(log: str) -> Iterator[Span]:
    for line in log.splitlines():
        stamp, _, message = line.partition(" ")
        end = _time(stamp)
        if end is None:
            continue
        for name, pattern in _PHASES:
            if found := pattern.search(message):
                seconds = float(found["s"])
                rank = found.groupdict().get("rank")
                note = "" if rank is None else f"rank {rank}"
                yield Span("engine", name, end - seconds, end, note)
        if _SERVING.search(message):
            yield Span("engine", "serving", end, end)


def _time(stamp: str) -> float | None:
    parsed = parse_time(stamp)
    return None if parsed is None else parsed.timestamp()


def _since(pod: Mapping[str, Any], condition: str) -> float | None:
    found = condition_of(pod, condition)
    return _time(text(found, "lastTransitionTime")) if text(found, "status") == "True" else None


def _started(pod: Mapping[str, Any], field: str, container: str) -> float | None:
    for status in items(pod, "status", field):
        if text(status, "name") == container:
            return _time(text(status, "state", "running", "startedAt"))
    return None


def _terminated(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    for status in items(pod, "status", "containerStatuses"):
        if text(status, "name") == SHARD:
            return mapping(status, "state", "terminated")
    return {}
