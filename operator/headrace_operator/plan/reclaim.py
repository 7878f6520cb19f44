"""Deletion of checkpoints that a ModelDeployment has used and nobody uses any more.

Only with spec.checkpoint.reclaimPolicy Delete. What is to be deleted is told by what exists: the
finished shard Jobs of earlier specs, and the current checkpoint of a ModelDeployment that is
being deleted, which a finalizer keeps until a Job of bounded time has tried. The Job deletes
nothing that a loader or writer holds on the volume.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from headrace_operator.api.spec import ModelDeploymentSpec
from headrace_operator.plan.checkpoint import claim_of, has_ended, is_record, reclaimed_by
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
    parse_time,
    text,
    uid_of,
)
from headrace_operator.plan.pods import WEIGHTS_PATH
from headrace_operator.plan.shard_job import volume_pod
from headrace_operator.plan.world import Deletion, Desired, Observed, Settings, Transition

BACKOFF_LIMIT = 3
DEADLINE_SECONDS = 15 * 60
"""How long one Job tries."""
GIVE_UP_SECONDS = 2 * DEADLINE_SECONDS
"""After which a deleted ModelDeployment goes even if its checkpoint stays: a pod on a node that
is lost, or a Job that is never admitted, must not hold it for ever."""
# A Job that nobody waits for any more has no owner to go with. Its records have to go first, also
# when the operator comes back from a long weekend: they would pass for checkpoints.
_KEPT_SECONDS = 7 * 24 * 3600
_RESOURCES = {
    "requests": {"cpu": "100m", "memory": "128Mi"},
    "limits": {"cpu": "1", "memory": "512Mi"},
}
_ORPHAN = "orphan"  # the garbage collector's finalizer: the children are to stay and to serve


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
    ended = [job for job in observed.jobs if _is_reclaim(job) and has_ended(job)]
    records = [job for job in observed.jobs if _path_of(job) and is_record(spec, claim, job)]
    if not (claim and is_settled):
        records = []
    needless = [job for job in records if _path_of(job) in observed.paths_in_use]
    # The records go first: should the rest not be reached, it is tried again, which is harmless.
    gone = [job for job in observed.jobs if any(_has_deleted(by, job) for by in ended)]
    done = tuple(dict.fromkeys(Deletion.of(job) for job in (*needless, *gone, *ended)))
    told = [_outcome(owner, job, reclaimed_by(job), observed) for job in ended]
    if wanted:
        told += _on_other_claims(owner, claim, observed)
    taken = {p for j in observed.jobs if claim_of(j) == claim for p in reclaimed_by(j)}
    paths = sorted({_path_of(job) for job in records} - observed.paths_in_use - taken)
    if not paths or not claim:
        return Reclaim((), done, wanted, tuple(told))
    body = _job(owner, spec, claim, settings, paths)
    refused = (r.message for r in observed.rejections if r.name == name_of(body))
    told += [_told(owner, name_of(body), paths, message) for message in refused]
    return Reclaim((Desired(body, once=True),), done, wanted, tuple(told))


def plan_last_reclaim(
    owner: Object,
    spec: ModelDeploymentSpec,
    claim: str | None,
    observed: Observed,
    settings: Settings,
    now: datetime,
) -> Reclaim:
    """Decide what is left to do for a ModelDeployment that is being deleted."""
    if not has_finalizer(owner) or _ORPHAN in mapping(owner, "metadata")["finalizers"]:
        return Reclaim()
    known = {checkpoint_path(spec), *(_path_of(j) for j in observed.jobs if claim_of(j) == claim)}
    paths = sorted(known - {""} - observed.paths_in_use)
    if not (paths and claim and observed.claim is not None) or is_deleting(observed.claim):
        return Reclaim()
    since = parse_time(text(owner, "metadata", "deletionTimestamp"))
    if since is not None and (now - since).total_seconds() > GIVE_UP_SECONDS:
        why = f"it was in use, or could not be deleted, for {GIVE_UP_SECONDS} s"
        return Reclaim(transitions=(_told(owner, "late", paths, why),))
    writers = [j for j in observed.jobs if not _is_reclaim(j) and not is_true(j, "Complete")]
    users = [*writers, *([] if observed.deployment is None else [observed.deployment])]
    if users or _are_at_work(observed):
        going = tuple(Deletion.of(user) for user in users if not is_deleting(user))
        return Reclaim(delete=going, finalizer=True)
    same = (j for j in observed.jobs if reclaimed_by(j) == paths and claim_of(j) == claim)
    job = next(same, None)
    if job is None:
        body = _job(owner, spec, claim, settings, paths)
        refused = observed.rejection("Job")
        if refused is not None:
            return Reclaim(transitions=(_told(owner, name_of(body), paths, refused.message),))
        return Reclaim((Desired(body, once=True),), finalizer=True)
    if not (has_ended(job) or is_deleting(job)):
        return Reclaim(finalizer=True)
    gone = (Deletion.of(job),)
    return Reclaim(delete=gone, transitions=(_outcome(owner, job, paths, observed),))


def _on_other_claims(
    owner: Object, claim: str | None, observed: Observed
) -> tuple[Transition, ...]:
    """Report the checkpoints that are left on claims which the spec no longer names."""
    left = [
        job
        for job in observed.jobs
        if _path_of(job) and is_true(job, "Complete") and claim not in (None, claim_of(job))
    ]
    why = "the spec no longer names its claim"
    return tuple(_told(owner, uid_of(j), [_path_of(j)], f"{why} {claim_of(j)}") for j in left)


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


def _has_deleted(by: Object, job: Object) -> bool:
    """Whether a reclaim Job was about the checkpoint that another Job is the record of."""
    return _path_of(job) in reclaimed_by(by) and claim_of(job) == claim_of(by)


def _name(owner: Object, claim: str, paths: list[str]) -> str:
    return child_name(name_of(owner), f"{RECLAIM}-{digest([claim, *paths], 8)}")


def _job(
    owner: Object, spec: ModelDeploymentSpec, claim: str, settings: Settings, paths: list[str]
) -> dict[str, Any]:
    pod = volume_pod(spec, claim, settings, RECLAIM, "delete", *_on_volume(paths))
    pod["containers"][0]["resources"] = _RESOURCES
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(
            owner,
            _name(owner, claim, paths),
            component=RECLAIM,
            annotations={PATH_ANNOTATION: ",".join(paths)},
            # Deleted in the foreground, the owner would take the Job along before it has run.
            owned=False,
        ),
        "spec": {
            "backoffLimit": BACKOFF_LIMIT,
            "activeDeadlineSeconds": DEADLINE_SECONDS,
            "ttlSecondsAfterFinished": _KEPT_SECONDS,
            "template": {"metadata": {"labels": labels(owner, RECLAIM)}, "spec": pod},
        },
    }


def _on_volume(paths: list[str]) -> list[str]:
    return [f"{WEIGHTS_PATH}/{path}" for path in paths]


def _outcome(owner: Object, job: Object, paths: list[str], observed: Observed) -> Transition:
    """Report how it ended; the object it is about may be gone in a moment."""
    if is_true(job, "Complete"):
        return _told(owner, uid_of(job), paths)
    pods = [p for p in observed.pods if text(p, "metadata", "labels", "job-name") == name_of(job)]
    failure = most_telling(pods, {})
    failed = next(
        (c for c in items(job, "status", "conditions") if text(c, "type") == "Failed"), {}
    )
    why = failure.message if failure else text(failed, "message") or "the Job was deleted"
    return _told(owner, uid_of(job), paths, f"Job {name_of(job)}: {why}")


def _told(owner: Object, cause: str, paths: list[str], why_kept: str = "") -> Transition:
    where = ", ".join(paths)
    message = f"{where}: kept: {why_kept}" if why_kept else f"{where}: deleted"
    reason = "CheckpointKept" if why_kept else "CheckpointDeleted"
    key = digest([uid_of(owner), cause, reason], 16)
    return Transition(key, "CheckpointReclaimed", reason, message, bool(why_kept))
