"""The checkpoint: when the shard Job is made, replaced or trusted, and CheckpointReady."""

from dataclasses import dataclass

from headrace_operator.api.spec import ModelDeploymentSpec
from headrace_operator.plan.conditions import (
    Draft,
    holds,
    of_failure,
    of_rejection,
    problem,
    waiting,
)
from headrace_operator.plan.failures import most_telling
from headrace_operator.plan.names import (
    SHARD,
    SPEC_HASH_ANNOTATION,
    checkpoint_key,
    job_name,
    source_parts,
)
from headrace_operator.plan.objects import (
    Object,
    camel_case,
    condition_of,
    integer,
    is_deleting,
    is_true,
    items,
    mapping,
    name_of,
    text,
    uid_of,
)
from headrace_operator.plan.shard_job import BACKOFF_LIMIT, retry_hash, shard_job
from headrace_operator.plan.termination import Termination, termination_of
from headrace_operator.plan.volume import is_usable
from headrace_operator.plan.world import Deletion, Desired, Observed, Settings


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What to do about the checkpoint, and how far it is."""

    draft: Draft
    total_bytes: int | None = None
    apply: tuple[Desired, ...] = ()
    delete: tuple[Deletion, ...] = ()

    @property
    def is_ready(self) -> bool:
        """Whether the checkpoint of the current spec is published."""
        return self.draft.holds


def plan_checkpoint(
    owner: Object,
    spec: ModelDeploymentSpec,
    claim: str | None,
    observed: Observed,
    settings: Settings,
) -> Checkpoint:
    """Decide about the shard Job and derive CheckpointReady."""
    current = job_name(name_of(owner), spec)
    job = next((job for job in observed.jobs if name_of(job) == current), None)
    stale = tuple(_deletion(j) for j in observed.jobs if name_of(j) != current and uid_of(j))
    if job is not None:
        return _of_job(owner, spec, job, observed, stale)
    if claim is None or not is_usable(observed):
        return Checkpoint(waiting("WaitingForVolume", "the volume is not usable"), delete=stale)
    if _source_is_missing(spec, claim, observed):
        return Checkpoint(_missing_source(spec), delete=stale)
    rejection = observed.rejection("Job")
    creating = waiting("ShardJobCreating", f"Job {current} is being created")
    desired = Desired(shard_job(owner, spec, claim, settings), once=True)
    draft = creating if rejection is None else of_rejection(rejection)
    return Checkpoint(draft, apply=(desired,), delete=stale)


def _source_is_missing(spec: ModelDeploymentSpec, claim: str, observed: Observed) -> bool:
    source_claim, _ = source_parts(spec.model.source)
    return source_claim not in ("", claim) and observed.source_claim is None


def _missing_source(spec: ModelDeploymentSpec) -> Draft:
    name = source_parts(spec.model.source)[0]
    return problem(
        "SourceClaimNotFound",
        f'spec.model.source: "{spec.model.source}": there is no claim {name} in the namespace; '
        "create it or correct the source",
    )


def _of_job(
    owner: Object,
    spec: ModelDeploymentSpec,
    job: Object,
    observed: Observed,
    stale: tuple[Deletion, ...],
) -> Checkpoint:
    if is_deleting(job):
        return Checkpoint(
            waiting("ShardJobReplacing", f"Job {name_of(job)} is being deleted"), delete=stale
        )
    pods = _pods_of(job, observed)
    if is_true(job, "Complete"):
        done = _last_termination(pods)
        total = done.total_bytes if done and done.total_bytes else _known_total(owner, spec)
        reason = done.reason if done else "Published"
        message = f"Job {name_of(job)} has published the checkpoint"
        return Checkpoint(holds(reason, message), total, delete=stale)
    if is_true(job, "Failed"):
        return _of_failed_job(owner, spec, job, pods, stale)
    return Checkpoint(_of_running_job(job, pods, observed), delete=stale)


def _of_failed_job(
    owner: Object,
    spec: ModelDeploymentSpec,
    job: Object,
    pods: list[Object],
    stale: tuple[Deletion, ...],
) -> Checkpoint:
    if mapping(job, "metadata", "annotations").get(SPEC_HASH_ANNOTATION) != retry_hash(spec):
        draft = waiting("ShardJobReplacing", f"Job {name_of(job)} failed for an older spec")
        return Checkpoint(draft, delete=(*stale, _deletion(job)))
    failure = most_telling(pods, {})
    fix = "change the spec, or correct the cause and delete the Job, to try again"
    if failure is not None:
        message = f"Job {name_of(job)}, {failure.message}; {fix}"
        return Checkpoint(problem(failure.reason, message), delete=stale)
    known = _known_failure(owner, job)
    if known is not None:
        return Checkpoint(known, delete=stale)
    condition = condition_of(job, "Failed")
    reason = camel_case(text(condition, "reason"), "ShardingFailed")
    message = f"Job {name_of(job)}: {text(condition, 'message') or reason}; {fix}"
    return Checkpoint(problem(reason, message), delete=stale)


def _known_failure(owner: Object, job: Object) -> Draft | None:
    """Return what the status said of this failed Job, now that its pods are gone."""
    known = condition_of(owner, "CheckpointReady")
    message = text(known, "message")
    if text(known, "status") == "False" and message.startswith(f"Job {name_of(job)}, pod "):
        return problem(camel_case(text(known, "reason"), "ShardingFailed"), message)
    return None


def _of_running_job(job: Object, pods: list[Object], observed: Observed) -> Draft:
    name = name_of(job)
    if is_true(job, "Suspended"):
        return waiting("ShardJobSuspended", f"Job {name} is suspended; resume it to go on")
    failed = integer(job, "status", "failed")
    failure = most_telling(pods, observed.warnings)
    if failure is not None:
        draft = of_failure(failure)
        retry = f"; attempt {failed + 1} of {BACKOFF_LIMIT + 1}" if failed else ""
        return problem(draft.reason, f"Job {name}, {draft.message}{retry}")
    warning = mapping(observed.warnings, uid_of(job))
    if not pods and text(warning, "reason"):
        reason = camel_case(text(warning, "reason"), "ShardJobStuck")
        return problem(reason, f"Job {name}: {text(warning, 'message')}")
    # A pod that has succeeded is ahead of its Job's completion by a second or two.
    if any(text(pod, "status", "phase") in {"Running", "Succeeded"} for pod in pods):
        return waiting("Sharding", f"Job {name} is writing the checkpoint")
    return waiting("ShardJobStarting", f"Job {name} waits for its pod")


def _pods_of(job: Object, observed: Observed) -> list[Object]:
    uid = uid_of(job)
    return [pod for pod in observed.pods if uid and _controller_label(pod) == uid]


def _controller_label(pod: Object) -> str:
    return text(pod, "metadata", "labels", "batch.kubernetes.io/controller-uid")


def _last_termination(pods: list[Object]) -> Termination | None:
    for pod in pods:
        for status in items(pod, "status", "containerStatuses"):
            state = mapping(status, "state", "terminated")
            done = termination_of(state)
            if text(status, "name") == SHARD and done and integer(state, "exitCode") == 0:
                return done
    return None


def _known_total(owner: Object, spec: ModelDeploymentSpec) -> int | None:
    known = mapping(owner, "status", "checkpoint")
    same = text(known, "key") == checkpoint_key(spec)
    return (integer(known, "totalBytes") or None) if same else None


def _deletion(job: Object) -> Deletion:
    return Deletion("Job", name_of(job), text(job, "metadata", "namespace"), uid_of(job))
