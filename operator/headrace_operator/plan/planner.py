"""From one ModelDeployment and its observed children to what has to be done."""

from datetime import datetime
from typing import Any

from pydantic import ValidationError

from headrace_operator.api import API_VERSION, KIND
from headrace_operator.api.spec import ModelDeploymentSpec
from headrace_operator.api.status import ConditionType
from headrace_operator.plan.checkpoint import Checkpoint, has_ended, plan_checkpoint
from headrace_operator.plan.children import serving_selector
from headrace_operator.plan.conditions import (
    FALSE,
    TRUE,
    UNKNOWN,
    Draft,
    holds,
    merge,
    of_failure,
    of_rejection,
    problem,
    transitions,
    waiting,
)
from headrace_operator.plan.failures import STUCK_SECONDS
from headrace_operator.plan.names import (
    checkpoint_key,
    checkpoint_path,
    job_name,
    source_parts,
)
from headrace_operator.plan.objects import (
    Object,
    at,
    condition_of,
    integer,
    is_deleting,
    name_of,
    text,
)
from headrace_operator.plan.overrides import refused_overrides
from headrace_operator.plan.reclaim import (
    has_finalizer,
    needs_only,
    plan_last_reclaim,
    plan_reclaim,
)
from headrace_operator.plan.rollout import can_go_back, has_failed, is_rolled_out
from headrace_operator.plan.serving import (
    SCALED_TO_ZERO,
    available,
    direct_path,
    failures,
    is_lasting,
    may_be_direct,
    pods_rejected,
    refusal,
    weights_resident,
)
from headrace_operator.plan.volume import Volume, claim_name, plan_volume, volume_name
from headrace_operator.plan.workload import Workload, plan_workload
from headrace_operator.plan.world import NAME_CONFLICT, Needs, Observed, Plan, Settings

# No event tells that volumes, StorageClasses, DeviceClasses, nodes and the kinds that are served
# change, or that children of a deleted object which had the same name are gone.
_RECHECK_SECONDS = 5.0
# Nor that a quota, a permission or an admission policy no longer refuses a child, or that a loader
# can be reached.
_RETRY_SECONDS = 60.0
# Why these last is told only by events, which are looked up once it has lasted.
_STANDING = frozenset({"ShardJobStarting", "PodsStarting"})
# Problems of a volume that somebody else, or its owner, is expected to get over.
_PASSING = frozenset(
    {"ClaimNotFound", "ClaimStuck", "ClaimTerminating", "ProvisioningFailed", "VolumeMismatch"}
)

_SUMMARISED = (
    ConditionType.VOLUME_READY,
    ConditionType.CHECKPOINT_READY,
    ConditionType.WEIGHTS_RESIDENT,
    ConditionType.AVAILABLE,
)


def needs(resource: Object) -> Needs:
    """Return what has to be looked up by name before planning for a ModelDeployment."""
    spec = _parse(resource)
    if isinstance(spec, ValidationError):
        return Needs()
    return Needs(
        claim=claim_name(resource, spec),
        source_claim=source_parts(spec.model.source)[0] or None,
        volume=volume_name(resource) if spec.volume.static is not None else None,
        storage_class=spec.volume.dynamic.storage_class_name if spec.volume.dynamic else None,
        gpus_of_nodes=spec.gpu.sharing == "WholeNode",
        dra_served=spec.gpu.sharing == "ResourceClaim",
        device_classes=spec.gpu.sharing == "ResourceClaim",
        groups_served=spec.parallelism.nodes > 1,
        loaded_paths=may_be_direct(spec),
        paths_in_use=spec.checkpoint.reclaim_policy == "Delete" or has_finalizer(resource),
    )


def wants_history(resource: Object, observed: Observed, now: datetime) -> bool:
    """Whether a rollout has failed that can be rolled back if the earlier templates are known."""
    if not can_go_back(observed.deployment):
        return False
    spec = _parse(resource)
    return not isinstance(spec, ValidationError) and has_failed(resource, spec, observed, now)


def plan(resource: Object, observed: Observed, settings: Settings, now: datetime) -> Plan:
    """Decide what to do for a ModelDeployment, given its observed children.

    For an object that is being deleted only its checkpoint may need anything: its children
    follow by their owner references.
    """
    spec = _parse(resource)
    if is_deleting(resource):
        return _plan_of_deleted(resource, spec, observed, settings, now)
    if isinstance(spec, ValidationError):
        return _plan_of_invalid(resource, spec, now)
    volume = plan_volume(resource, spec, observed, settings)
    claim = volume.claim
    denied = refused_overrides(spec, settings)
    if denied is None:
        checkpoint = plan_checkpoint(resource, spec, claim, observed, settings)
    else:
        checkpoint = Checkpoint(denied)
    may_roll = checkpoint.is_ready and refusal(spec, observed) is None
    workload = plan_workload(resource, spec, claim, observed, settings, now, may_roll=may_roll)
    drafts = _drafts(resource, spec, observed, volume, checkpoint, workload)
    drafts |= _progress(spec, observed, drafts, checkpoint, workload, is_denied=denied is not None)
    settled = drafts[ConditionType.READY].holds and needs_only(checkpoint_key(spec), observed)
    reclaim = plan_reclaim(resource, spec, claim, observed, settings, is_settled=settled)
    status = _status(resource, spec, volume, observed, checkpoint, drafts, workload)
    if workload.progress is not None:
        status["rollout"] = workload.progress.status()
    return Plan(
        apply=(*volume.apply, *checkpoint.apply, *workload.apply, *reclaim.apply),
        delete=(*volume.delete, *checkpoint.delete, *workload.delete, *reclaim.delete),
        scale=workload.scale,
        status=_document(resource, status, drafts, now),
        transitions=(*transitions(resource, drafts), *reclaim.transitions),
        requeue_seconds=_requeue_seconds(spec, drafts, observed, workload),
        finalizer=reclaim.finalizer,
    )


def _plan_of_deleted(
    resource: Object,
    spec: ModelDeploymentSpec | ValidationError,
    observed: Observed,
    settings: Settings,
    now: datetime,
) -> Plan:
    if isinstance(spec, ValidationError):
        return Plan(finalizer=False)
    claim = claim_name(resource, spec)
    reclaim = plan_last_reclaim(resource, spec, claim, observed, settings, now)
    return Plan(
        apply=reclaim.apply,
        delete=reclaim.delete,
        transitions=reclaim.transitions,
        finalizer=reclaim.finalizer,
    )


def path_in_use(resource: Object) -> str:
    """Return the path of the checkpoint that a ModelDeployment uses; empty where there is none."""
    spec = _parse(resource)
    return (
        "" if isinstance(spec, ValidationError) or is_deleting(resource) else checkpoint_path(spec)
    )


def _parse(resource: Object) -> ModelDeploymentSpec | ValidationError:
    try:
        return ModelDeploymentSpec.model_validate(at(resource, "spec"))
    except ValidationError as error:
        return error


def _plan_of_invalid(resource: Object, error: ValidationError, now: datetime) -> Plan:
    """Plan for a spec that this version cannot read, which the CRD's schema should refuse."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(["spec", *map(str, first["loc"])])
    message = f"{field}: {first['msg']}; update the CRD and the object"
    drafts = {kind: Draft(UNKNOWN, "SpecInvalid", "the spec is invalid") for kind in ConditionType}
    drafts[ConditionType.READY] = problem("SpecInvalid", message)
    drafts[ConditionType.RECONCILING] = Draft(FALSE, "Stalled", "the spec is invalid")
    drafts[ConditionType.STALLED] = Draft(TRUE, "SpecInvalid", message, problem=True)
    return Plan(
        status=_document(resource, {}, drafts, now), transitions=transitions(resource, drafts)
    )


def _drafts(
    resource: Object,
    spec: ModelDeploymentSpec,
    observed: Observed,
    volume: Volume,
    checkpoint: Checkpoint,
    workload: Workload,
) -> dict[ConditionType, Draft]:
    resident = weights_resident(spec, observed, checkpoint_is_ready=checkpoint.is_ready)
    drafts = {
        ConditionType.VOLUME_READY: volume.draft,
        ConditionType.CHECKPOINT_READY: checkpoint.draft,
        ConditionType.WEIGHTS_RESIDENT: resident,
        ConditionType.AVAILABLE: available(spec, observed, resident=resident.holds),
    }
    if workload.is_rolled_back and not resident.holds:
        drafts[ConditionType.WEIGHTS_RESIDENT] = _gave_up(resource, observed)
    drafts[ConditionType.READY] = _ready(resource, spec, observed, drafts, workload)
    drafts[ConditionType.DIRECT_PATH] = direct_path(spec, observed)
    return drafts


def _ready(
    resource: Object,
    spec: ModelDeploymentSpec,
    observed: Observed,
    drafts: dict[ConditionType, Draft],
    workload: Workload,
) -> Draft:
    """Summarise: everything is as specified, or the first thing that is not."""
    if workload.is_rolled_back:
        return _gave_up(resource, observed)
    missing = [drafts[kind] for kind in _SUMMARISED if not drafts[kind].holds]
    halted = _halted(spec, observed, workload)
    resident = drafts[ConditionType.WEIGHTS_RESIDENT]
    # Weights of a new checkpoint that no more replicas load for now are not what is waited for.
    is_halted = halted is not None and missing == [resident] and not resident.problem
    if missing and not is_halted:
        return Draft(FALSE, missing[0].reason, missing[0].message, missing[0].problem)
    # A change of annotations begins a new generation of a Deployment, which is not observed at
    # once: Ready before it would be taken back for a moment.
    is_final = workload.is_current and not workload.is_settling
    if is_final and is_rolled_out(observed, spec.replicas):
        done = holds("Serving", f"{spec.replicas} of {spec.replicas} replicas answer requests")
        return done if spec.replicas else SCALED_TO_ZERO
    failure = next(iter(failures(observed)), None)
    if failure is not None:
        return of_failure(failure)
    if halted is not None:
        return halted
    return pods_rejected(observed) or waiting("RollingOut", _stand(spec, observed, workload))


def _stand(spec: ModelDeploymentSpec, observed: Observed, workload: Workload) -> str:
    """Say how far the replicas are from what the spec says."""
    if not spec.replicas:
        existing = integer(observed.deployment, "status", "replicas")
        return f"{existing} replicas still exist, spec.replicas is 0"
    ready = integer(observed.deployment, "status", "readyReplicas")
    return f"{_counts(spec, observed, workload)}, {ready} of {spec.replicas} answer requests"


def _counts(spec: ModelDeploymentSpec, observed: Observed, workload: Workload) -> str:
    return f"{_updated(observed, workload)} of {spec.replicas} replicas are new"


def _halted(spec: ModelDeploymentSpec, observed: Observed, workload: Workload) -> Draft | None:
    """Say what keeps old replicas from being replaced, if anything does."""
    if observed.deployment is None:
        return None
    counts = _counts(spec, observed, workload)
    existing = integer(observed.deployment, "status", "replicas")
    is_over = workload.is_current and _updated(observed, workload) >= existing
    if spec.rollout.paused and not is_over:
        return waiting("RolloutPaused", f"{counts}; set spec.rollout.paused to false to go on")
    if workload.canary is not None:
        canary = workload.canary
        stand = f"{canary.standing} of {canary.wanted} canary replicas have stood long enough"
        return waiting("CanaryStanding", f"{counts}; {stand}")
    return None


def _updated(observed: Observed, workload: Workload) -> int:
    """Return the replicas of the spec's template; the workload counts those of its own."""
    return integer(observed.deployment, "status", "updatedReplicas") if workload.is_current else 0


def _gave_up(resource: Object, observed: Observed) -> Draft:
    """Say that the template of the spec was given up, and what was wrong with its pods."""
    known = condition_of(resource, "Ready")
    if text(known, "reason") == "RolledBack" and text(known, "message"):
        return problem("RolledBack", text(known, "message"))
    failure = next(iter(failures(observed)), None)
    why = f": {failure.message}" if failure is not None else ""
    return problem(
        "RolledBack",
        "no new replica became ready within spec.rollout.progressDeadlineSeconds, so the last "
        f"template whose replicas were ready is back; change the spec to try again{why}",
    )


def _progress(
    spec: ModelDeploymentSpec,
    observed: Observed,
    drafts: dict[ConditionType, Draft],
    checkpoint: Checkpoint,
    workload: Workload,
    *,
    is_denied: bool,
) -> dict[ConditionType, Draft]:
    """Return Reconciling and Stalled, as kstatus reads them: both only when it is not Ready."""
    ready, volume = drafts[ConditionType.READY], drafts[ConditionType.VOLUME_READY]
    stalled: Draft | None = None
    if ready.holds:
        return {
            ConditionType.RECONCILING: Draft(FALSE, "Settled", "everything is as specified"),
            ConditionType.STALLED: Draft(FALSE, "Settled", "everything is as specified"),
        }
    if workload.has_failed:
        seconds = spec.rollout.progress_deadline_seconds
        message = f"no replica became ready in {seconds} s, and there is no earlier template"
        stalled = problem("ProgressDeadlineExceeded", f"{message}; {ready.message}")
    elif workload.is_rolled_back or is_denied or refusal(spec, observed) is not None:
        stalled = ready
    elif volume.problem and volume.reason not in _PASSING:
        stalled = volume
    elif checkpoint.draft.problem and has_ended(checkpoint.job):
        stalled = checkpoint.draft
    elif observed.rejections:
        stalled = of_rejection(observed.rejections[0])
    if stalled is not None:
        return {
            ConditionType.RECONCILING: Draft(FALSE, "Stalled", ready.message),
            ConditionType.STALLED: Draft(TRUE, stalled.reason, stalled.message, problem=True),
        }
    return {
        ConditionType.RECONCILING: Draft(TRUE, ready.reason, ready.message),
        ConditionType.STALLED: Draft(FALSE, "Progressing", ready.message),
    }


def _status(
    resource: Object,
    spec: ModelDeploymentSpec,
    volume: Volume,
    observed: Observed,
    checkpoint: Checkpoint,
    drafts: dict[ConditionType, Draft],
    workload: Workload,
) -> dict[str, Any]:
    total = {} if checkpoint.total_bytes is None else {"totalBytes": checkpoint.total_bytes}
    labels = serving_selector(resource, spec)
    direct = drafts[ConditionType.DIRECT_PATH]
    path = {TRUE: {"path": "GDS"}, FALSE: {"path": "POSIX"}}.get(direct.status, {})
    ready = integer(observed.deployment, "status", "readyReplicas")
    return {
        "replicas": integer(observed.deployment, "status", "replicas"),
        "readyReplicas": ready,
        "updatedReplicas": _updated(observed, workload),
        "ready": f"{ready}/{spec.replicas}",
        **path,
        "selector": ",".join(f"{key}={labels[key]}" for key in sorted(labels)),
        "checkpoint": {
            "key": checkpoint_key(spec),
            "path": checkpoint_path(spec),
            "job": name_of(checkpoint.job) or job_name(name_of(resource), spec),
            **_shares_done(checkpoint.job),
            "progress": _sharded(checkpoint),
            **total,
        },
        "volume": volume.status,
    }


def _shares_done(job: Object | None) -> dict[str, Any]:
    """Which of the shard Job's pods have done their share."""
    done = text(job, "status", "completedIndexes")
    workers = integer(job, "spec", "completions")
    return {
        **({"workers": workers} if workers else {}),
        **({"completedIndexes": done} if done else {}),
    }


def _sharded(checkpoint: Checkpoint) -> str:
    """Return the part of the shard Job's pods that are done: one step per pod, so few writes."""
    job = checkpoint.job
    done = integer(job, "status", "succeeded") / max(1, integer(job, "spec", "completions"))
    return "100%" if checkpoint.is_ready else f"{min(99, max(0, int(100 * done)))}%"


def _document(
    resource: Object, status: dict[str, Any], drafts: dict[ConditionType, Draft], now: datetime
) -> dict[str, Any]:
    generation = integer(resource, "metadata", "generation")
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {
            "name": name_of(resource),
            "namespace": text(resource, "metadata", "namespace"),
        },
        "status": {
            "observedGeneration": generation,
            **status,
            "conditions": merge(resource, drafts, generation, now),
        },
    }


def _requeue_seconds(
    spec: ModelDeploymentSpec,
    drafts: dict[ConditionType, Draft],
    observed: Observed,
    workload: Workload,
) -> float | None:
    waits = [
        _RECHECK_SECONDS if rejection.reason == NAME_CONFLICT else _RETRY_SECONDS
        for rejection in observed.rejections
    ]
    refused = refusal(spec, observed)
    may_pass = refused is not None and not is_lasting(spec, refused)
    if may_pass or not drafts[ConditionType.VOLUME_READY].holds:
        waits.append(_RECHECK_SECONDS)
    reasons = {draft.reason for draft in drafts.values()}
    if not reasons.isdisjoint(_STANDING):
        waits.append(STUCK_SECONDS + 1)
    if "LoaderUnreachable" in reasons:
        waits.append(_RETRY_SECONDS)
    if workload.canary is not None and workload.canary.seconds is not None:
        waits.append(workload.canary.seconds + 1)
    if workload.progress is not None and workload.progress.seconds > 0:
        waits.append(workload.progress.seconds + 1)
    return min(waits, default=None)
