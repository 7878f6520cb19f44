"""How far a rollout is: what has proven itself, what has failed, how long the canary stood."""

from dataclasses import dataclass
from datetime import datetime
from math import ceil

from headrace_operator.api.spec import ModelDeploymentSpec
from headrace_operator.plan.names import (
    LOADER_IMAGE_ANNOTATION,
    ROLLED_BACK_ANNOTATION,
    SPEC_HASH_ANNOTATION,
    STABLE_ANNOTATION,
    TEMPLATE_VERSION_ANNOTATION,
)
from headrace_operator.plan.objects import (
    Object,
    condition_of,
    integer,
    is_true,
    mapping,
    parse_time,
    text,
)
from headrace_operator.plan.serving import serving_pods
from headrace_operator.plan.world import Observed


@dataclass(frozen=True, slots=True)
class Pin:
    """What a workload's template was made from, and what the rollouts before it came to.

    `spec_hash` names a template. `stable` is that of the last one all of whose replicas were
    ready, while this one has not come as far; `rolled_back` is that of the one which was given
    up for it.
    """

    version: str
    loader_image: str
    spec_hash: str
    stable: str = ""
    rolled_back: str = ""

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
        )

    def annotations(self) -> dict[str, str]:
        """Return the annotations to read the pin from."""
        return {
            SPEC_HASH_ANNOTATION: self.spec_hash,
            TEMPLATE_VERSION_ANNOTATION: self.version,
            LOADER_IMAGE_ANNOTATION: self.loader_image,
            # Written even when empty: an annotation left out of an apply counts as unchanged.
            STABLE_ANNOTATION: self.stable,
            ROLLED_BACK_ANNOTATION: self.rolled_back,
        }


def is_rolled_out(workload: Object | None, replicas: int) -> bool:
    """Whether all replicas of a workload are of its latest template, and no others exist."""
    counts = ("replicas", "updatedReplicas", "readyReplicas")
    return _is_observed(workload) and all(
        integer(workload, "status", count) == replicas for count in counts
    )


def has_old_pods(observed: Observed) -> bool:
    """Whether a LeaderWorkerSet has pods of another template than its own."""
    path = ("metadata", "annotations", SPEC_HASH_ANNOTATION)
    template = mapping(observed.deployment, "spec", "leaderWorkerTemplate", "workerTemplate")
    return bool(template) and any(
        text(pod, *path) != text(template, *path) for pod in serving_pods(observed)
    )


def has_failed(workload: Object | None) -> bool:
    """Whether no replica became ready within the deadline, as the Deployment controller has it."""
    progressing = condition_of(workload, "Progressing")
    return (
        _is_observed(workload)
        and text(progressing, "status") == "False"
        and text(progressing, "reason") == "ProgressDeadlineExceeded"
    )


def wants_history(workload: Object | None) -> bool:
    """Whether a failed rollout can be rolled back if the ReplicaSets are known."""
    pin = Pin.of(workload)
    return has_failed(workload) and pin.stable not in ("", pin.spec_hash)


def is_proven(workload: Object | None) -> bool:
    """Whether all replicas of the workload's template were ready at the same time."""
    replicas = integer(workload, "spec", "replicas")
    progressing = condition_of(workload, "Progressing")
    complete = (
        _is_observed(workload)
        and is_true(workload, "Progressing")
        and text(progressing, "reason") == "NewReplicaSetAvailable"
    )
    return complete or (replicas > 0 and is_rolled_out(workload, replicas))


def stable_hash(workload: Object | None, *, is_current: bool) -> str:
    """Return the template to go back to, for a new template or the current one.

    A current template that has proven itself needs none, so that the same spec ends in the same
    annotations whatever came before it.
    """
    pin = Pin.of(workload)
    if is_proven(workload):
        return "" if is_current else pin.spec_hash
    return pin.stable


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
    new = [p for p in pods if text(p, "metadata", "annotations", SPEC_HASH_ANNOTATION) == template]
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
    if "observedGeneration" not in status and "leaderWorkerTemplate" in mapping(workload, "spec"):
        # LeaderWorkerSet tells it since 0.9 only. Before, the pods have to tell (has_old_pods).
        return bool(status)
    return integer(workload, "status", "observedGeneration") >= integer(
        workload, "metadata", "generation"
    )
