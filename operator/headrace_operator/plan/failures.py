"""The most telling failure among the pods of a Job or Deployment."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from headrace_operator.plan.objects import (
    Object,
    age_seconds,
    camel_case,
    condition_of,
    integer,
    is_deleting,
    items,
    mapping,
    name_of,
    one_line,
    text,
    uid_of,
)
from headrace_operator.plan.termination import termination_of

STUCK_SECONDS = 15.0
"""How long a pod may stand still before its events are looked up."""
CLAIM_SECONDS = 3.0
"""How long a claim may be pending before its events are looked up."""
_MAX_STUCK = 2
_STARTING = frozenset({"", "ContainerCreating", "PodInitializing"})
_PLAIN_EXITS = frozenset({"", "Error", "Completed"})
_CRASH_LOOP = "CrashLoopBackOff"

# The lower, the more telling: a cause named by our own code beats what the kubelet sees of it.
_OWN, _WAITING, _EXITED, _EVENT, _POD, _SCHEDULING = range(6)


@dataclass(frozen=True, slots=True, order=True)
class Failure:
    """Why a pod does not get on. `container` is empty when no container is to blame."""

    rank: int
    pod: str
    container: str
    reason: str
    message: str


def most_telling(pods: Iterable[Object], warnings: Mapping[str, Object]) -> Failure | None:
    """Return the most telling failure of the pods, the same one for the same pods."""
    found = [f for pod in pods for f in failures_of(pod, mapping(warnings, uid_of(pod)))]
    return min(found, default=None)


def failures_of(pod: Object, warning: Object) -> list[Failure]:
    """Return all failures of a pod that is not on its way out."""
    if is_deleting(pod):
        return []
    found = [_of_container(pod, status) for status in container_statuses(pod)]
    found.append(_of_phase(pod))
    found.append(_of_scheduling(pod))
    if text(warning, "reason"):
        reason = camel_case(text(warning, "reason"), "PodStuck")
        found.append(_failure(_EVENT, pod, "", reason, text(warning, "message")))
    return [failure for failure in found if failure is not None]


def container_statuses(pod: Object) -> list[Object]:
    """Return the statuses of all containers, init containers first."""
    return [
        *items(pod, "status", "initContainerStatuses"),
        *items(pod, "status", "containerStatuses"),
    ]


def stuck(pods: Iterable[Object], jobs: Iterable[Object], now: datetime) -> tuple[Object, ...]:
    """Return the few pods and Jobs that stand still for a reason only their events tell."""
    pods = list(pods)
    found = [p for p in pods if _is_waiting(p) and age_seconds(p, now) > STUCK_SECONDS]
    if not pods:
        found += [
            job
            for job in jobs
            if not integer(job, "status", "active")
            and not items(job, "status", "conditions")
            and age_seconds(job, now) > STUCK_SECONDS
        ]
    return tuple(sorted(found, key=name_of)[:_MAX_STUCK])


def stuck_claims(claim: Object | None, now: datetime) -> tuple[Object, ...]:
    """Return the claim if it has not been bound for longer than binding takes."""
    is_pending = claim is not None and text(claim, "status", "phase") == "Pending"
    is_old = age_seconds(claim, now) > CLAIM_SECONDS
    return (claim,) if claim is not None and is_pending and is_old else ()


def _is_waiting(pod: Object) -> bool:
    if is_deleting(pod) or text(pod, "status", "phase") != "Pending":
        return False
    scheduled = text(condition_of(pod, "PodScheduled"), "status") == "True"
    return scheduled and not any(mapping(s, "state", "running") for s in container_statuses(pod))


def _of_container(pod: Object, status: Object) -> Failure | None:
    if status.get("ready") is True:
        return None
    waiting = text(status, "state", "waiting", "reason")
    if waiting not in _STARTING and waiting != _CRASH_LOOP:
        reason = camel_case(waiting, "ContainerWaiting")
        message = text(status, "state", "waiting", "message")
        return _failure(_WAITING, pod, text(status, "name"), reason, message)
    return _of_exit(pod, status, waiting)


def _of_exit(pod: Object, status: Object, waiting: str) -> Failure | None:
    state = mapping(status, "state", "terminated") or mapping(status, "lastState", "terminated")
    if not state or integer(state, "exitCode") == 0:
        return None
    container = text(status, "name")
    own = termination_of(state)
    if own is not None:
        return _failure(_OWN, pod, container, own.reason, own.message)
    restarts = integer(status, "restartCount")
    kubelets = text(state, "reason")
    if kubelets not in _PLAIN_EXITS:
        reason = camel_case(kubelets, "ContainerFailed")
    elif waiting == _CRASH_LOOP or restarts > 1:
        reason = _CRASH_LOOP
    else:
        reason = camel_case(f"{container.capitalize()}Failed", "ContainerFailed")
    exit_code = integer(state, "exitCode")
    logs = f"kubectl logs {name_of(pod)} -c {container} --previous"
    message = f"exit code {exit_code}, {restarts} restarts; see `{logs}`"
    return _failure(_EXITED, pod, container, reason, message)


def _of_phase(pod: Object) -> Failure | None:
    reason = text(pod, "status", "reason")
    if text(pod, "status", "phase") != "Failed" or not reason:
        return None
    return _failure(_POD, pod, "", camel_case(reason, "PodFailed"), text(pod, "status", "message"))


def _of_scheduling(pod: Object) -> Failure | None:
    condition = condition_of(pod, "PodScheduled")
    if text(condition, "status") != "False":
        return None
    reason = camel_case(text(condition, "reason"), "Unschedulable")
    return _failure(_SCHEDULING, pod, "", reason, text(condition, "message"))


def _failure(rank: int, pod: Object, container: str, reason: str, message: str) -> Failure:
    where = f"pod {name_of(pod)}" + (f", container {container}" if container else "")
    return Failure(rank, name_of(pod), container, reason, one_line(f"{where}: {message or reason}"))
