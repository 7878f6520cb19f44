"""The serving pods' workload: when its template changes, stays, or goes back.

The annotations of a Deployment (or LeaderWorkerSet, where replicas span nodes) pin what its
template was made from. As long as the spec is the same, the template stays what it is, whatever
this operator's version would make of it; and it stays while the checkpoint of a changed spec is
not ready: shards first, rolls after. A template whose pods do not become ready in time gives way
to the last one whose pods did, and is not tried again until the spec changes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from headrace_operator.api.spec import ModelDeploymentSpec
from headrace_operator.plan.children import (
    claim_template,
    deployment,
    disruption_budget,
    group_set,
    group_template,
    service,
)
from headrace_operator.plan.names import SPEC_HASH_ANNOTATION, digest, spec_hash
from headrace_operator.plan.objects import (
    Object,
    at,
    integer,
    items,
    mapping,
    name_of,
    text,
    uid_of,
)
from headrace_operator.plan.rollout import (
    CanaryState,
    Pin,
    Progress,
    can_go_back,
    canary_state,
    has_failed,
    is_group_set,
    is_rolled_out,
    next_pin,
    progress_of,
)
from headrace_operator.plan.serving_pod import LOADER, VERSION, Role, serving_pod_template
from headrace_operator.plan.world import Deletion, Desired, Observed, Scale, Settings

# Changes of these parts replace no pods.
_NOT_IN_TEMPLATE = frozenset({"replicas", "sharding", "checkpoint", "rollout", "disruption_budget"})


def template_hash(spec: ModelDeploymentSpec, claim: str) -> str:
    """Return the digest of what the template depends on besides the operator's own settings."""
    own = spec_hash(spec, without=_NOT_IN_TEMPLATE)
    return digest([own, claim], 16)


@dataclass(frozen=True, slots=True)
class Workload:
    """What to do about the serving pods.

    `is_current` once the template is the spec's, `is_settling` while what is pinned of it is about
    to change, `is_rolled_back` while the spec's was given up, `has_failed` when its pods did not
    become ready in time and nothing is there to go back to. `progress` is that of a rollout of
    groups.
    """

    apply: tuple[Desired, ...] = ()
    scale: Scale | None = None
    delete: tuple[Deletion, ...] = ()
    is_current: bool = False
    is_settling: bool = False
    is_rolled_back: bool = False
    has_failed: bool = False
    canary: CanaryState | None = None
    progress: Progress | None = None


def plan_workload(
    owner: Object,
    spec: ModelDeploymentSpec,
    claim: str | None,
    observed: Observed,
    settings: Settings,
    now: datetime,
    *,
    may_roll: bool,
) -> Workload:
    """Decide about Deployment or LeaderWorkerSet, Service, claim template and budget.

    Args:
        may_roll: whether pods of the current spec could run, so that a new template may
            take the place of the old one.
    """
    planned = _plan_template(owner, spec, claim, observed, settings, now, may_roll=may_roll)
    planned = replace(planned, progress=progress_of(owner, spec, observed, now))
    if observed.deployment is None and not planned.apply:
        return planned
    planned = replace(planned, apply=(*planned.apply, Desired(service(owner, spec))))
    if spec.replicas > 1:
        budget = Desired(disruption_budget(owner, spec))
        return replace(planned, apply=(*planned.apply, budget))
    needless = _deletions("PodDisruptionBudget", observed.disruption_budget)
    return replace(planned, delete=(*planned.delete, *needless))


def _plan_template(
    owner: Object,
    spec: ModelDeploymentSpec,
    claim: str | None,
    observed: Observed,
    settings: Settings,
    now: datetime,
    *,
    may_roll: bool,
) -> Workload:
    live = observed.deployment
    pin = Pin.of(live)
    wanted = template_hash(spec, claim or "")
    is_current = live is not None and pin.spec_hash == wanted
    if live is not None and pin.rolled_back == wanted and not is_current:
        return Workload(scale=_kept(spec, live), is_rolled_back=True)
    # A paused rollout does not begin either.
    may_begin = may_roll and (live is None or not spec.rollout.paused)
    if claim is None or not (is_current or may_begin):
        return Workload(scale=_kept(spec, live))
    failed = is_current and has_failed(owner, spec, observed, now)
    if failed:
        back = _rolled_back(owner, spec, observed, wanted)
        if back is not None:
            return Workload(apply=(Desired(back),), is_rolled_back=True)
    if is_current and pin.version != str(VERSION):
        return Workload(scale=_kept(spec, live), is_current=True, has_failed=failed)
    image = pin.loader_image if is_current and pin.loader_image else settings.loader_image
    pin = next_pin(observed, str(VERSION), image, wanted, is_current=is_current)
    canary = canary_state(spec, wanted, observed, now) if live is not None else None
    # Of groups the pods tell the end, and annotations begin no new generation.
    is_settling = is_current and pin != Pin.of(live) and not is_group_set(live)
    return replace(
        _rendered(owner, spec, claim, pin, live, canary),
        delete=_stale(owner, spec, observed, claim) if is_current else (),
        is_current=is_current,
        is_settling=is_settling,
        has_failed=failed,
    )


def _rendered(
    owner: Object,
    spec: ModelDeploymentSpec,
    claim: str,
    pin: Pin,
    live: Object | None,
    canary: CanaryState | None,
) -> Workload:
    claims = claim_template(owner, spec)

    def template(role: Role) -> dict[str, Any]:
        return serving_pod_template(
            owner,
            spec,
            role,
            claim=claim,
            loader_image=pin.loader_image,
            claim_template=name_of(claims) or None,
            template_hash=pin.spec_hash,
        )

    if spec.parallelism.nodes > 1:
        leader, worker = template(Role.LEADER), template(Role.WORKER)
        groups = group_template(spec, leader, worker)
        body = group_set(owner, spec, pin, groups, canary=canary is not None)
    else:
        whole = template(Role.WHOLE)
        body = deployment(owner, spec, pin, whole, live, canary=canary is not None)
    desired = [Desired(body)]
    if claims is not None:
        desired.insert(0, Desired(claims, once=True))
    return Workload(apply=tuple(desired), canary=canary)


def _rolled_back(
    owner: Object, spec: ModelDeploymentSpec, observed: Observed, given_up: str
) -> dict[str, Any] | None:
    """Return the workload with the last template whose pods were ready, if it is kept."""
    if not can_go_back(observed.deployment):
        return None
    if is_group_set(observed.deployment):
        return _groups_rolled_back(owner, spec, observed, given_up)
    stable = Pin.of(observed.deployment).stable
    for replica_set in observed.history:
        pin = Pin.of(replica_set)
        template = mapping(replica_set, "spec", "template")
        if pin.spec_hash == stable and template:
            pin = Pin(pin.version, pin.loader_image, stable, stable, rolled_back=given_up)
            body = _without_hash(template)
            return deployment(owner, spec, pin, body, observed.deployment, canary=False)
    return None


def _groups_rolled_back(
    owner: Object, spec: ModelDeploymentSpec, observed: Observed, given_up: str
) -> dict[str, Any] | None:
    """Return the LeaderWorkerSet with its last template whose pods were ready.

    Its controller keeps a ControllerRevision of each template until one has all of its groups
    ready. The same content gives the same revision, so groups that still have it stay.
    Source: getPatch, TruncateRevisions in sigs.k8s.io/lws/pkg/utils/revision.
    """
    pin = Pin.of(observed.deployment)
    for revision in observed.history:
        template = mapping(revision, "data", "spec", "leaderWorkerTemplate")
        pod = mapping(template, "workerTemplate")
        if text(pod, "metadata", "annotations", SPEC_HASH_ANNOTATION) != pin.stable:
            continue
        loaders = items(pod, "spec", "initContainers")
        image = next((text(c, "image") for c in loaders if text(c, "name") == LOADER), "")
        known = pin.stable_version
        back = Pin(known, image, pin.stable, pin.stable, given_up, known)
        return group_set(owner, spec, back, _without_directives(template), canary=False)
    return None


def _without_directives(template: Object) -> dict[str, Any]:
    """Return the template of a revision, which is a strategic merge patch, as it was applied."""
    return {key: _without_nulls(v) for key, v in template.items() if key != "$patch"}


def _without_nulls(value: object) -> object:
    """Leave out what Go writes of fields that were not set."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _without_hash(template: Object) -> dict[str, Any]:
    """Return a ReplicaSet's pod template as its Deployment had it."""
    labels = mapping(template, "metadata", "labels")
    metadata = {
        "labels": {k: v for k, v in labels.items() if k != "pod-template-hash"},
        "annotations": dict(mapping(template, "metadata", "annotations")),
    }
    return {"metadata": metadata, "spec": dict(mapping(template, "spec"))}


def _kept(spec: ModelDeploymentSpec, live: Object | None) -> Scale | None:
    """Return what has to change of a workload that keeps its template."""
    if live is None:
        return None
    kind = "LeaderWorkerSet" if is_group_set(live) else "Deployment"
    wanted: dict[str, Any] = {}
    if integer(live, "spec", "replicas") != spec.replicas:
        wanted["replicas"] = spec.replicas
    if kind == "Deployment" and (at(live, "spec", "paused") is True) != spec.rollout.paused:
        wanted["paused"] = spec.rollout.paused
    return Scale(kind, name_of(live), wanted) if wanted else None


def _stale(
    owner: Object, spec: ModelDeploymentSpec, observed: Observed, claim: str
) -> tuple[Deletion, ...]:
    """Return what no pod needs any more, once no old pod is left."""
    replicas = integer(observed.deployment, "spec", "replicas")
    if not is_rolled_out(observed, replicas):
        return ()
    stale = (
        *_deletions("PersistentVolumeClaim", *observed.claims),
        *_deletions("ResourceClaimTemplate", *observed.claim_templates),
    )
    kept = {claim, name_of(claim_template(owner, spec))}
    return tuple(deletion for deletion in stale if deletion.name not in kept)


def _deletions(kind: str, *objects: Object | None) -> tuple[Deletion, ...]:
    return tuple(
        Deletion(kind, name_of(o), text(o, "metadata", "namespace"), uid_of(o))
        for o in objects
        if uid_of(o)
    )
