"""Deletion of checkpoints that a ModelDeployment has used and nobody uses any more.

Only with spec.checkpoint.reclaimPolicy Delete. What is to be deleted is told by what exists: the
finished shard Jobs of earlier specs, and the current checkpoint of a ModelDeployment that is
being deleted, which a finalizer keeps until a Job of bounded time has tried. The Job deletes
nothing that a loader or writer holds on the volume.
"""

from dataclasses import dataclass
from typing import Any

from headrace_operator.api.spec import ModelDeploymentSpec
from headrace_operator.plan.checkpoint import deletion_of, is_record
from headrace_operator.plan.conditions import TRUE
from headrace_operator.plan.failures import most_telling
from headrace_operator.plan.names import (
    COMPONENT_LABEL,
    FINALIZER,
    KEY_ANNOTATION,
    PATH_ANNOTATION,
    RECLAIM,
    SERVE,
    checkpoint_path,
    child_name,
    digest,
    labels,
    metadata,
)
from headrace_operator.plan.objects import (
    Object,
    is_deleting,
    is_true,
    items,
    mapping,
    name_of,
    text,
    uid_of,
)
from headrace_operator.plan.pods import WEIGHTS_PATH
from headrace_operator.plan.shard_job import volume_pod
from headrace_operator.plan.world import Deletion, Desired, Observed, Settings, Transition

BACKOFF_LIMIT = 3
DEADLINE_SECONDS = 15 * 60
"""After which a deleted ModelDeployment goes even if its checkpoint stays."""


@dataclass(frozen=True, slots=True)
class Reclaim:
    """What to do about checkpoints of no more use; `finalizer` is whether ours has to be there."""

    apply: tuple[Desired, ...] = ()
    delete: tuple[Deletion, ...] = ()
    finalizer: bool = False
    transitions: tuple[Transition, ...] = ()


def has_finalizer(resource: Object) -> bool:
    """Whether our finalizer is on a ModelDeployment."""
    finalizers = mapping(resource, "metadata").get("finalizers")
    return isinstance(finalizers, list) and FINALIZER in finalizers


def plan_reclaim(
    owner: Object,
    spec: ModelDeploymentSpec,
    claim: str | None,
    observed: Observed,
    settings: Settings,
    *,
    is_settled: bool,
) -> Reclaim:
    """Decide about checkpoints of earlier specs, for a ModelDeployment that stays.

    Args:
        is_settled: whether no pod needs anything but the current checkpoint.
    """
    wanted = spec.checkpoint.reclaim_policy == "Delete"
    records = [job for job in observed.jobs if _path_of(job) and is_record(spec, job)]
    if not (wanted and claim and is_settled and records):
        return Reclaim(finalizer=wanted)
    used = observed.paths_in_use | {checkpoint_path(spec)}
    paths = sorted({_path_of(job) for job in records} - used)
    done = tuple(deletion_of(job) for job in records if _path_of(job) in used)
    if not paths:
        return Reclaim(delete=done, finalizer=True)
    name = _name(owner, paths)
    job = next((job for job in observed.jobs if name_of(job) == name), None)
    if job is None:
        body = _job(owner, spec, claim, settings, paths)
        return Reclaim((Desired(body, once=True),), done, finalizer=True)
    if not (is_true(job, "Complete") or is_true(job, "Failed")):
        return Reclaim(delete=done, finalizer=True)
    # The records go first: should the rest not be reached, it is tried again, which is harmless.
    gone = tuple(deletion_of(record) for record in records if _path_of(record) in paths)
    return Reclaim(
        delete=(*done, *gone, deletion_of(job)),
        finalizer=True,
        transitions=_outcome(owner, job, paths, observed),
    )


def plan_last_reclaim(
    owner: Object,
    spec: ModelDeploymentSpec,
    claim: str | None,
    observed: Observed,
    settings: Settings,
) -> Reclaim:
    """Decide what is left to do for a ModelDeployment that is being deleted."""
    if not has_finalizer(owner):
        return Reclaim()
    writers = [j for j in observed.jobs if not _is_reclaim(j) and not is_true(j, "Complete")]
    users = tuple(deletion_of(job) for job in writers if not is_deleting(job))
    if observed.deployment is not None and not is_deleting(observed.deployment):
        deployment = observed.deployment
        namespace = text(deployment, "metadata", "namespace")
        users += (Deletion("Deployment", name_of(deployment), namespace, uid_of(deployment)),)
    if users or observed.deployment is not None or writers or _are_at_work(observed):
        return Reclaim(delete=users, finalizer=True)
    known = {checkpoint_path(spec), *map(_path_of, observed.jobs)} - {""}
    paths = sorted(known - observed.paths_in_use)
    if not (paths and claim and observed.claim is not None) or is_deleting(observed.claim):
        return Reclaim()
    name = _name(owner, paths)
    job = next((job for job in observed.jobs if name_of(job) == name), None)
    if job is None:
        if observed.rejection("Job") is not None:
            return Reclaim()
        body = _job(owner, spec, claim, settings, paths)
        return Reclaim((Desired(body, once=True),), finalizer=True)
    if not (is_true(job, "Complete") or is_true(job, "Failed") or is_deleting(job)):
        return Reclaim(finalizer=True)
    return Reclaim(transitions=_outcome(owner, job, paths, observed))


def _are_at_work(observed: Observed) -> bool:
    """Whether pods that read or write a checkpoint still exist."""
    ended = {"Succeeded", "Failed"}
    return any(
        text(pod, "metadata", "labels", COMPONENT_LABEL) != RECLAIM
        and text(pod, "status", "phase") not in ended
        for pod in observed.pods
    )


def needs_only(spec_key: str, observed: Observed) -> bool:
    """Whether all serving pods are of the checkpoint with this key."""
    serving = (p for p in observed.pods if text(p, "metadata", "labels", COMPONENT_LABEL) == SERVE)
    keys = (mapping(pod, "metadata", "annotations").get(KEY_ANNOTATION) for pod in serving)
    return all(key == spec_key for key in keys)


def _is_reclaim(job: Object) -> bool:
    return text(job, "metadata", "labels", COMPONENT_LABEL) == RECLAIM


def _path_of(job: Object) -> str:
    return "" if _is_reclaim(job) else text(job, "metadata", "annotations", PATH_ANNOTATION)


def _name(owner: Object, paths: list[str]) -> str:
    return child_name(name_of(owner), f"{RECLAIM}-{digest(paths, 8)}")


def _job(
    owner: Object, spec: ModelDeploymentSpec, claim: str, settings: Settings, paths: list[str]
) -> dict[str, Any]:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(owner, _name(owner, paths), component=RECLAIM),
        "spec": {
            "backoffLimit": BACKOFF_LIMIT,
            "activeDeadlineSeconds": DEADLINE_SECONDS,
            "template": {
                "metadata": {"labels": labels(owner, RECLAIM)},
                "spec": volume_pod(spec, claim, settings, RECLAIM, "delete", *_on_volume(paths)),
            },
        },
    }


def _on_volume(paths: list[str]) -> list[str]:
    return [f"{WEIGHTS_PATH}/{path}" for path in paths]


def _outcome(
    owner: Object, job: Object, paths: list[str], observed: Observed
) -> tuple[Transition, ...]:
    """Report how it ended; the object it is about may be gone in a moment."""
    done = is_true(job, "Complete")
    pods = [p for p in observed.pods if text(p, "metadata", "labels", "job-name") == name_of(job)]
    failure = None if done else most_telling(pods, {})
    where = ", ".join(paths)
    failed = next(
        (c for c in items(job, "status", "conditions") if text(c, "type") == "Failed"), {}
    )
    why = failure.message if failure else text(failed, "message") or "the Job was deleted"
    message = f"{where}: deleted" if done else f"{where}: kept: Job {name_of(job)}: {why}"
    reason = "CheckpointDeleted" if done else "CheckpointKept"
    key = digest([uid_of(owner), uid_of(job), TRUE if done else ""], 16)
    return (Transition(key, "CheckpointReclaimed", reason, message, not done),)
