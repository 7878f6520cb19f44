"""How far a rollout is: what has proven itself, what has failed, how long the canary stood.

The Deployment controller says when a rollout is complete and when it has failed. LeaderWorkerSet
says neither, so of groups both are read from their pods, and the status of the ModelDeployment
keeps since when no further group became ready, as that of a Deployment does.
"""

from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from math import ceil
from typing import Any

from headrace_operator.api.spec import ModelDeploymentSpec
from headrace_operator.plan.names import (
    LOADER_IMAGE_ANNOTATION,
    ROLLED_BACK_ANNOTATION,
    SPEC_HASH_ANNOTATION,
    STABLE_ANNOTATION,
    STABLE_VERSION_ANNOTATION,
    TEMPLATE_VERSION_ANNOTATION,
)
from headrace_operator.plan.objects import (
    Object,
    condition_of,
    format_time,
    integer,
    is_true,
    mapping,
    parse_time,
    text,
)
from headrace_operator.plan.serving import GROUP_INDEX_LABEL, serving_pods
from headrace_operator.plan.world import Observed

_HASH = ("metadata", "annotations", SPEC_HASH_ANNOTATION)


@dataclass(frozen=True, slots=True)
class Pin:
    """What a workload's template was made from, and what the rollouts before it came to.

    `spec_hash` names a template. `stable` is that of the last one all of whose replicas were
    ready, while this one has not come as far; of a LeaderWorkerSet, whose controller does not
    remember it, it is this one's own once it has. `rolled_back` is that of the one which was
    given up for it. `stable_version` is the version of the stable template, where the history
    does not tell it: that of a LeaderWorkerSet has no annotations.
    """

    version: str
    loader_image: str
    spec_hash: str
    stable: str = ""
    rolled_back: str = ""
    stable_version: str = ""

    @classmethod
    def of(cls, workload: Object | None) -> "Pin":
        """Read the pin of a workload or of its ReplicaSet; missing parts are empty."""
        annotations = mapping(workload, "metadata", "annotations")
        return cls(
            text(annotations, TEMPLATE_VERSION_ANNOTATION),
            text(annotations, LOADER_IMAGE_ANNOTATION),
            text(annotations, SPEC_HASH_ANNOTATION),
            text(annotations, STABLE_ANNOTATION),
            text(annotations, ROLLED_BACK_ANNOTATION),
            text(annotations, STABLE_VERSION_ANNOTATION),
        )

    def annotations(self) -> dict[str, str]:
        """Return the annotations to read the pin from."""
        known = self.stable_version
        return {
            **({STABLE_VERSION_ANNOTATION: known} if known else {}),
            SPEC_HASH_ANNOTATION: self.spec_hash,
            TEMPLATE_VERSION_ANNOTATION: self.version,
            LOADER_IMAGE_ANNOTATION: self.loader_image,
            # Written even when empty: an annotation left out of an apply counts as unchanged.
            STABLE_ANNOTATION: self.stable,
            ROLLED_BACK_ANNOTATION: self.rolled_back,
        }


def is_group_set(workload: Object | None) -> bool:
    """Whether a workload is a LeaderWorkerSet."""
    return bool(mapping(workload, "spec", "leaderWorkerTemplate"))


def is_rolled_out(observed: Observed, replicas: int) -> bool:
    """Whether all replicas of a workload are of its latest template, and no others exist."""
    workload = observed.deployment
    counts = ("replicas", "updatedReplicas", "readyReplicas")
    return (
        _is_observed(workload)
        and all(integer(workload, "status", count) == replicas for count in counts)
        and (not is_group_set(workload) or _has_only_ready_groups(observed, replicas))
    )


def _has_only_ready_groups(observed: Observed, replicas: int) -> bool:
    """Whether the pods are those of so many ready groups of the template.

    The status of a LeaderWorkerSet may be about an earlier template (see _is_observed).
    """
    template = _group_template(observed)
    is_new = all(text(pod, *_HASH) == template for pod in serving_pods(observed))
    return is_new and _ready_groups(observed) == replicas


def _ready_groups(observed: Observed) -> int:
    """Return the groups of a LeaderWorkerSet's own template all of whose pods are ready."""
    template = _group_template(observed)
    ready = Counter(
        text(pod, "metadata", "labels", GROUP_INDEX_LABEL)
        for pod in serving_pods(observed)
        if text(pod, *_HASH) == template and is_true(pod, "Ready")
    )
    size = integer(observed.deployment, "spec", "leaderWorkerTemplate", "size")
    return sum(count >= size for count in ready.values())


def _group_template(observed: Observed) -> str:
    template = mapping(observed.deployment, "spec", "leaderWorkerTemplate", "workerTemplate")
    return text(template, *_HASH)


@dataclass(frozen=True, slots=True)
class Progress:
    """A rollout of groups: how many of them got ready, since when no further one did.

    `seconds` are left until the rollout has failed.
    """

    template: str
    ready: int
    since: str
    seconds: float

    def status(self) -> dict[str, Any]:
        """Return what the next visit has to know."""
        return {
            "template": self.template,
            "readyReplicas": self.ready,
            "progressedAt": self.since,
        }


def progress_of(
    owner: Object, spec: ModelDeploymentSpec, observed: Observed, now: datetime
) -> Progress | None:
    """Return how far the rollout of a LeaderWorkerSet is, given what the last visit wrote.

    None where nothing is due: at the end, paused, or scaled to zero. As with a Deployment, each
    further ready replica begins the deadline anew, going on after a pause does, and a canary
    that has to stand extends it.
    Source: DeploymentProgressing and DeploymentTimedOut in
    k8s.io/kubernetes/pkg/controller/deployment/util.
    """
    pin = Pin.of(observed.deployment)
    is_due = spec.replicas > 0 and not spec.rollout.paused and pin.stable != pin.spec_hash
    if not is_group_set(observed.deployment) or not is_due or is_proven(observed):
        return None
    known = mapping(owner, "status", "rollout")
    ready, told = _ready_groups(observed), text(known, "progressedAt")
    is_same = text(known, "template") == pin.spec_hash
    since = parse_time(told)
    if not is_same or since is None or since > now or ready > integer(known, "readyReplicas"):
        since, told = now, format_time(now)
    canary = spec.rollout.canary.seconds if spec.rollout.canary else 0
    deadline = spec.rollout.progress_deadline_seconds + canary
    return Progress(pin.spec_hash, ready, told, deadline - (now - since).total_seconds())


def has_failed(owner: Object, spec: ModelDeploymentSpec, observed: Observed, now: datetime) -> bool:
    """Whether no further replica became ready within the deadline."""
    workload = observed.deployment
    if is_group_set(workload):
        progress = progress_of(owner, spec, observed, now)
        return progress is not None and progress.seconds <= 0
    progressing = condition_of(workload, "Progressing")
    return (
        _is_observed(workload)
        and text(progressing, "status") == "False"
        and text(progressing, "reason") == "ProgressDeadlineExceeded"
    )


def can_go_back(workload: Object | None) -> bool:
    """Whether another template than the workload's own was the last that proved itself."""
    pin = Pin.of(workload)
    return pin.stable not in ("", pin.spec_hash)


def is_proven(observed: Observed) -> bool:
    """Whether all replicas of the workload's template were ready at the same time."""
    workload = observed.deployment
    replicas = integer(workload, "spec", "replicas")
    progressing = condition_of(workload, "Progressing")
    complete = (
        _is_observed(workload)
        and is_true(workload, "Progressing")
        and text(progressing, "reason") == "NewReplicaSetAvailable"
    )
    return complete or (replicas > 0 and is_rolled_out(observed, replicas))


def next_pin(
    observed: Observed, version: str, loader_image: str, template: str, *, is_current: bool
) -> Pin:
    """Return the pin of a new template, or of the current one, with the one to go back to.

    A current template that has proven itself needs none, so that the same spec ends in the same
    annotations whatever came before it.
    """
    pin = Pin.of(observed.deployment)
    stable, stable_version = pin.stable, pin.stable_version
    if is_proven(observed):
        keeps = is_group_set(observed.deployment)
        stable = pin.spec_hash if keeps or not is_current else ""
        stable_version = pin.version if keeps else ""
    return Pin(version, loader_image, template, stable, stable_version=stable_version)


@dataclass(frozen=True, slots=True)
class CanaryState:
    """A rollout that waits for its first replicas; `seconds` until one of them has stood enough."""

    wanted: int
    standing: int
    seconds: float | None = None


def canary_state(
    spec: ModelDeploymentSpec, template: str, observed: Observed, now: datetime
) -> CanaryState | None:
    """Return how far the canary is; None when there is none, or it has stood long enough."""
    canary = spec.rollout.canary
    pods = serving_pods(observed)
    new = [p for p in pods if text(p, *_HASH) == template]
    if canary is None or len(new) == len(pods):
        return None
    left = sorted(canary.seconds - age for p in new if (age := _ready_seconds(p, now)) is not None)
    standing = sum(seconds <= 0 for seconds in left) // spec.parallelism.nodes
    wanted = canary_size(spec)
    if standing >= wanted:
        return None
    return CanaryState(wanted, standing, next((s for s in left if s > 0), None))


def canary_size(spec: ModelDeploymentSpec) -> int:
    """Return the replicas of the canary, as the Deployment controller rounds percentages."""
    if spec.rollout.canary is None:
        return 0
    share = spec.replicas * spec.rollout.canary.percentage / 100
    return max(1, ceil(share) if surges(spec) else int(share))


def surges(spec: ModelDeploymentSpec) -> bool:
    """Whether new replicas come before old ones go."""
    return spec.rollout.max_surge not in (0, "0%")


def _ready_seconds(pod: Object, now: datetime) -> float | None:
    ready = condition_of(pod, "Ready")
    since = parse_time(text(ready, "lastTransitionTime"))
    if text(ready, "status") != "True" or since is None:
        return None
    return (now - since).total_seconds()


def _is_observed(workload: Object | None) -> bool:
    status = mapping(workload, "status")
    if "observedGeneration" not in status and is_group_set(workload):
        # LeaderWorkerSet tells it since 0.9 only. Before, the pods have to tell.
        return bool(status)
    return integer(workload, "status", "observedGeneration") >= integer(
        workload, "metadata", "generation"
    )
