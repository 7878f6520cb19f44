"""The checkpoint: when the shard Job is made, replaced or trusted, and CheckpointReady."""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

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
    ATTEMPT_ANNOTATION,
    COMPONENT_LABEL,
    KEY_ANNOTATION,
    PATH_ANNOTATION,
    RECLAIM,
    REPLACES_ANNOTATION,
    SHARD,
    SPEC_HASH_ANNOTATION,
    checkpoint_key,
    checkpoint_path,
    source_parts,
)
from headrace_operator.plan.objects import (
    Object,
    camel_case,
    canonical_json,
    condition_of,
    integer,
    is_deleting,
    is_true,
    items,
    mapping,
    name_of,
    parse_time,
    text,
    uid_of,
)
from headrace_operator.plan.pods import WEIGHTS, WEIGHTS_PATH
from headrace_operator.plan.shard_job import BACKOFF_LIMIT, retry_hash, shard_job
from headrace_operator.plan.termination import Termination, termination_of
from headrace_operator.plan.volume import is_usable
from headrace_operator.plan.world import Deletion, Desired, Observed, Settings

CHECKPOINT_MISSING = "CheckpointMissing"
"""The loader's reason for a checkpoint that is not on the volume."""
MAX_ATTEMPTS = 3
"""Jobs in a row that make a checkpoint again which vanishes."""
_FORGET_AFTER = timedelta(hours=1)  # what lasted that long did not vanish because of the Job


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What to do about the checkpoint, and how far it is."""

    draft: Draft
    total_bytes: int | None = None
    job: Object | None = None
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
    jobs = [job for job in observed.jobs if _component(job) != RECLAIM]
    here = [j for j in jobs if _is_here(spec, claim, j) and not _is_older(j, observed.claim)]
    reclaim = next((job for job in observed.jobs if _deletes(job, spec, claim)), None)
    if reclaim is not None:
        return _wait_for(reclaim)
    job = _current(here)
    stale = tuple(
        Deletion.of(j) for j in jobs if j is not job and uid_of(j) and not is_record(spec, claim, j)
    )
    if job is not None:
        found = _of_job(owner, spec, job, observed, stale)
        lost = _lost(spec, claim, job, observed) if found.is_ready else None
        found = replace(found, job=job)
        if lost is None or claim is None:
            return found
        return _make_again(owner, spec, claim, job, lost, found, observed, settings)
    if claim is None or not is_usable(observed):
        return Checkpoint(waiting("WaitingForVolume", "the volume is not usable"), delete=stale)
    if _source_is_missing(spec, claim, observed):
        return Checkpoint(_missing_source(spec), delete=stale)
    # The same checkpoint in another place has a Job of the same name.
    namesake = next((uid_of(j) for j in jobs if _key_of(j) == checkpoint_key(spec)), "")
    body = shard_job(owner, spec, claim, settings, replaces=namesake)
    rejection = observed.rejection("Job")
    creating = waiting("ShardJobCreating", f"Job {name_of(body)} is being created")
    draft = creating if rejection is None else of_rejection(rejection)
    return Checkpoint(draft, apply=(Desired(body, once=True),), delete=stale)


def is_record(spec: ModelDeploymentSpec, claim: str | None, job: Object) -> bool:
    """Whether a Job is kept as the record of a checkpoint that has to be deleted some day."""
    deletes = spec.checkpoint.reclaim_policy == "Delete" and claim in (None, claim_of(job))
    return deletes and not _is_here(spec, claim, job) and is_true(job, "Complete")


def claim_of(job: Object) -> str:
    """Return the claim that a Job of ours writes to."""
    return _claim_of_pod(mapping(job, "spec", "template"))


def _claim_of_pod(pod: Object) -> str:
    mounted = (v for v in items(pod, "spec", "volumes") if text(v, "name") == WEIGHTS)
    return text(next(mounted, None), "persistentVolumeClaim", "claimName")


def reclaimed_by(job: Object) -> list[str]:
    """Return the paths that a reclaim Job deletes; none for any other Job."""
    paths = text(job, "metadata", "annotations", PATH_ANNOTATION)
    return paths.split(",") if paths and _component(job) == RECLAIM else []


def has_ended(job: Object | None) -> bool:
    """Whether a Job is complete or has failed."""
    return is_true(job, "Complete") or is_true(job, "Failed")


def _is_here(spec: ModelDeploymentSpec, claim: str | None, job: Object) -> bool:
    """Whether a Job is of the spec's checkpoint, on its volume and at its path."""
    path = checkpoint_path(spec)
    found = text(job, "metadata", "annotations", PATH_ANNOTATION) or path  # earlier Jobs lack it
    same = _key_of(job) == checkpoint_key(spec) and found == path
    return same and claim in (None, claim_of(job))


def _is_older(job: Object, claim: Object | None) -> bool:
    """Whether a Job was complete before its claim was made: it wrote to another of the name."""
    ended = parse_time(text(job, "status", "completionTime"))
    made = parse_time(text(claim, "metadata", "creationTimestamp"))
    return ended is not None and made is not None and ended < made


def _key_of(job: Object) -> str:
    return text(job, "metadata", "annotations", KEY_ANNOTATION)


def _deletes(job: Object, spec: ModelDeploymentSpec, claim: str | None) -> bool:
    """Whether a Job deletes the spec's checkpoint; the same path on another claim is another."""
    return checkpoint_path(spec) in reclaimed_by(job) and claim in (None, claim_of(job))


def _wait_for(reclaim: Object) -> Checkpoint:
    """Wait for a Job that deletes what the spec asks for once more; its records go with it."""
    message = f"Job {name_of(reclaim)} deletes this checkpoint for an earlier spec; it has to end"
    return Checkpoint(waiting("ShardJobReplacing", message))


def _component(job: Object) -> str:
    return text(job, "metadata", "labels", COMPONENT_LABEL)


def _current(jobs: list[Object]) -> Object | None:
    """Return the Job of several for the same checkpoint that no other replaces."""
    replaced = {text(j, "metadata", "annotations", REPLACES_ANNOTATION) for j in jobs}
    last = [j for j in jobs if uid_of(j) not in replaced]
    return min(last, key=name_of, default=None)


def _is_reader(spec: ModelDeploymentSpec, claim: str | None, pod: Object) -> bool:
    """Whether a pod looks for the spec's checkpoint where the spec has it."""
    loaders = items(pod, "spec", "initContainers")
    path = f"{WEIGHTS_PATH}/{checkpoint_path(spec)}"
    is_same = _key_of(pod) == checkpoint_key(spec) and _claim_of_pod(pod) in ("", claim)
    return is_same and (not loaders or canonical_json(path) in canonical_json(loaders))


def _lost(
    spec: ModelDeploymentSpec, claim: str | None, job: Object, observed: Observed
) -> datetime | None:
    """Return when a loader that started after the Job's end did not find the checkpoint."""
    completed = parse_time(text(job, "status", "completionTime"))
    if completed is None:
        return None
    found = []
    for pod in observed.pods:
        for status in items(pod, "status", "initContainerStatuses"):
            for field in ("state", "lastState"):
                state = mapping(status, field, "terminated")
                ended, started = termination_of(state), parse_time(text(state, "startedAt"))
                if ended is None or started is None:
                    continue
                is_missing = ended.reason == CHECKPOINT_MISSING and started > completed
                if is_missing and _is_reader(spec, claim, pod):
                    found.append(started)
    return min(found, default=None)


def _make_again(
    owner: Object,
    spec: ModelDeploymentSpec,
    claim: str,
    job: Object,
    lost: datetime,
    found: Checkpoint,
    observed: Observed,
    settings: Settings,
) -> Checkpoint:
    """Plan the Job that makes a checkpoint which is gone once more, unless it keeps vanishing."""
    completed = parse_time(text(job, "status", "completionTime"))
    given = text(job, "metadata", "annotations", ATTEMPT_ANNOTATION)
    attempt = int(given) if given.isdecimal() else 1
    if completed is not None and lost - completed > _FORGET_AFTER:
        attempt = 0
    if attempt >= MAX_ATTEMPTS:
        return replace(
            found,
            draft=problem(
                CHECKPOINT_MISSING,
                f"{checkpoint_path(spec)}: made {attempt} times and gone again each time; see who "
                f"removes it from the volume, then delete Job {name_of(job)} to make it once more",
            ),
        )
    body = shard_job(owner, spec, claim, settings, replaces=uid_of(job), attempt=attempt + 1)
    rejection = observed.rejection("Job")
    message = f"the checkpoint is gone from the volume; Job {name_of(body)} makes it again"
    draft = waiting("CheckpointMissing", message) if rejection is None else of_rejection(rejection)
    return replace(found, draft=draft, apply=(Desired(body, once=True),))


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
        done = _publication(pods)
        total = done.total_bytes if done and done.total_bytes else _known_total(owner, spec)
        reason = done.reason if done else "Published"
        message = f"Job {name_of(job)} has published the checkpoint"
        return Checkpoint(holds(reason, message), total, delete=stale)
    if is_true(job, "Failed"):
        return _of_failed_job(owner, spec, job, pods, stale)
    if _is_outdated(spec, job) and not _has_begun(job, pods):
        draft = waiting("ShardJobReplacing", f"Job {name_of(job)} of an older spec has not begun")
        return Checkpoint(draft, delete=(*stale, Deletion.of(job)))
    return Checkpoint(_of_running_job(job, pods, observed), delete=stale)


def _of_failed_job(
    owner: Object,
    spec: ModelDeploymentSpec,
    job: Object,
    pods: list[Object],
    stale: tuple[Deletion, ...],
) -> Checkpoint:
    if _is_outdated(spec, job):
        draft = waiting("ShardJobReplacing", f"Job {name_of(job)} failed for an older spec")
        return Checkpoint(draft, delete=(*stale, Deletion.of(job)))
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


def _is_outdated(spec: ModelDeploymentSpec, job: Object) -> bool:
    return text(job, "metadata", "annotations", SPEC_HASH_ANNOTATION) != retry_hash(spec)


def _has_begun(job: Object, pods: list[Object]) -> bool:
    """Whether a pod of a Job has ever run: work that need not be thrown away."""
    ended = integer(job, "status", "succeeded") + integer(job, "status", "failed")
    return ended > 0 or any(text(pod, "status", "phase") != "Pending" for pod in pods)


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
        one = integer(job, "spec", "completions") < 2
        of_many = f"; {failed} failed, each index has {BACKOFF_LIMIT + 1} attempts"
        retry = f"; attempt {failed + 1} of {BACKOFF_LIMIT + 1}" if one else of_many
        retry = retry if failed else ""
        return problem(draft.reason, f"Job {name}, {draft.message}{retry}")
    warning = mapping(observed.warnings, uid_of(job))
    if not pods and text(warning, "reason"):
        reason = camel_case(text(warning, "reason"), "ShardJobStuck")
        return problem(reason, f"Job {name}: {text(warning, 'message')}")
    # A pod that has succeeded is ahead of its Job's completion by a second or two.
    if any(text(pod, "status", "phase") in {"Running", "Succeeded"} for pod in pods):
        count, done = integer(job, "spec", "completions"), integer(job, "status", "succeeded")
        far = f"; {done} of {count} pods have done their share" if count > 1 else ""
        return waiting("Sharding", f"Job {name} is writing the checkpoint{far}")
    return waiting("ShardJobStarting", f"Job {name} waits for its pods")


def _pods_of(job: Object, observed: Observed) -> list[Object]:
    uid = uid_of(job)
    return [pod for pod in observed.pods if uid and _controller_label(pod) == uid]


def _controller_label(pod: Object) -> str:
    return text(pod, "metadata", "labels", "batch.kubernetes.io/controller-uid")


def _publication(pods: list[Object]) -> Termination | None:
    """Return how the pod ended that published, or else one that found the checkpoint there."""
    states = [
        mapping(status, "state", "terminated")
        for pod in pods
        for status in items(pod, "status", "containerStatuses")
        if text(status, "name") == SHARD
    ]
    ended = [termination_of(state) for state in states if integer(state, "exitCode") == 0]
    done = [end for end in ended if end is not None and end.reason != "PartsWritten"]
    return min(done, key=lambda end: end.reason != "Published", default=None)


def _known_total(owner: Object, spec: ModelDeploymentSpec) -> int | None:
    known = mapping(owner, "status", "checkpoint")
    same = text(known, "key") == checkpoint_key(spec)
    return (integer(known, "totalBytes") or None) if same else None
