"""The serving children as the API server gets them: workload, Service, claim template, budget."""

from typing import Any

from headrace_operator.api.spec import ModelDeploymentSpec
from headrace_operator.plan.names import (
    COMPONENT_LABEL,
    OWNER_LABEL,
    SERVE,
    child_name,
    digest,
    metadata,
)
from headrace_operator.plan.objects import Object, at, integer, name_of
from headrace_operator.plan.rollout import Pin, canary_size, surges

WORKER_INDEX_LABEL = "leaderworkerset.sigs.k8s.io/worker-index"
_HISTORY = 10
# Workers of a group are a StatefulSet `<name>-<group>`; its pods carry that and a hash as a label.
_ROOM_FOR_GROUP = len("-19999") + len("-0123456789")


def selector(owner: Object) -> dict[str, str]:
    """Return the labels that select the serving pods."""
    return {OWNER_LABEL: name_of(owner), COMPONENT_LABEL: SERVE}


def serving_selector(owner: Object, spec: ModelDeploymentSpec) -> dict[str, str]:
    """Return the labels of the pods that answer requests, one per replica."""
    leaders = {WORKER_INDEX_LABEL: "0"} if spec.parallelism.nodes > 1 else {}
    return selector(owner) | leaders


def deployment(
    owner: Object,
    spec: ModelDeploymentSpec,
    pin: Pin,
    template: dict[str, Any],
    live: Object | None,
    *,
    canary: bool,
) -> dict[str, Any]:
    """Return the Deployment. While its canary stands it goes no further on its own.

    The Deployment controller replaces one batch of maxUnavailable (or maxSurge) pods and waits
    until they have been ready for minReadySeconds. So the first batch is the canary, also while
    no operator runs.
    """
    rollout = spec.rollout
    seconds = rollout.canary.seconds if rollout.canary else 0
    # One that is paused from its beginning never gets a pod: there has to be something to hold.
    paused = rollout.paused and integer(live, "status", "observedGeneration") > 0
    # The API server leaves out what is false or 0, so it is said only where that changes something.
    switches = {"paused": paused, "minReadySeconds": seconds if canary else 0}
    said = {name: v for name, v in switches.items() if v or at(live, "spec", name)}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(owner, name_of(owner), pin),
        "spec": {
            "replicas": spec.replicas,
            "revisionHistoryLimit": _HISTORY,
            **said,
            "progressDeadlineSeconds": rollout.progress_deadline_seconds + seconds,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": _batches(spec, canary=canary)},
            "selector": {"matchLabels": selector(owner)},
            "template": template,
        },
    }


def group_set(
    owner: Object,
    spec: ModelDeploymentSpec,
    pin: Pin,
    template: dict[str, Any],
    *,
    canary: bool,
) -> dict[str, Any]:
    """Return the LeaderWorkerSet: a group of pods per replica, one pod per node.

    Groups from `partition` on are replaced.
    """
    # Its controller makes a headless Service of the same name.
    name = child_name(name_of(owner), "nodes", room=_ROOM_FOR_GROUP)
    frozen = spec.replicas if spec.rollout.paused else 0
    partition = max(0, spec.replicas - canary_size(spec)) if canary else 0
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": _metadata(owner, name, pin),
        "spec": {
            "replicas": spec.replicas,
            "startupPolicy": "LeaderCreated",
            "rolloutStrategy": {
                "type": "RollingUpdate",
                "rollingUpdateConfiguration": {
                    "partition": max(frozen, partition),
                    "maxSurge": spec.rollout.max_surge,
                    "maxUnavailable": _unavailable_groups(spec),
                },
            },
            "leaderWorkerTemplate": template,
        },
    }


def group_template(
    spec: ModelDeploymentSpec, leader: dict[str, Any], worker: dict[str, Any]
) -> dict[str, Any]:
    """Return the template of a LeaderWorkerSet.

    A group lives and dies as one: a container that restarts restarts its group, as the ranks of
    the others wait for it in vain.
    """
    return {
        "size": spec.parallelism.nodes,
        "restartPolicy": "RecreateGroupOnPodRestart",
        "leaderTemplate": leader,
        "workerTemplate": worker,
    }


def service(owner: Object, spec: ModelDeploymentSpec) -> dict[str, Any]:
    """Return the Service in front of the engines."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(owner, name_of(owner), component=SERVE),
        "spec": {
            "selector": serving_selector(owner, spec),
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": "http"}],
        },
    }


def disruption_budget(owner: Object, spec: ModelDeploymentSpec) -> dict[str, Any]:
    """Return the PodDisruptionBudget of the serving pods."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(owner, name_of(owner), component=SERVE),
        "spec": {
            "maxUnavailable": spec.disruption_budget.max_unavailable,
            # A pod that does not serve protects nothing, and must not hold up a drain.
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": selector(owner)},
        },
    }


def claim_template(owner: Object, spec: ModelDeploymentSpec) -> dict[str, Any] | None:
    """Return the template of the pods' GPU claims; it is immutable, so its name has its digest."""
    if spec.gpu.sharing != "ResourceClaim":
        return None
    devices = {
        "requests": [
            {
                "name": "gpu",
                "exactly": {
                    "deviceClassName": spec.gpu.device_class_name,
                    "allocationMode": "ExactCount",
                    "count": spec.parallelism.gpus_per_node,
                },
            }
        ]
    }
    name = child_name(name_of(owner), f"gpu-{digest(devices, 8)}")
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": metadata(owner, name),
        "spec": {"spec": {"devices": devices}},
    }


def _metadata(owner: Object, name: str, pin: Pin) -> dict[str, Any]:
    return metadata(owner, name, component=SERVE, annotations=pin.annotations())


def _unavailable_groups(spec: ModelDeploymentSpec) -> int:
    """Return maxUnavailable as a number: a share of less than one group is one.

    So it is for Deployments. LeaderWorkerSet refuses it, and with it a scale-down to few groups.
    Source: ResolveFenceposts in k8s.io/kubernetes/pkg/controller/deployment/util.
    """
    share = spec.rollout.max_unavailable
    if isinstance(share, int):
        return share
    groups = spec.replicas * int(share.rstrip("%")) // 100
    return groups if surges(spec) else max(1, groups)


def _batches(spec: ModelDeploymentSpec, *, canary: bool) -> dict[str, Any]:
    rollout = spec.rollout
    if not canary or rollout.canary is None:
        return {"maxSurge": rollout.max_surge, "maxUnavailable": rollout.max_unavailable}
    share = f"{rollout.canary.percentage}%"
    if surges(spec):
        return {"maxSurge": share, "maxUnavailable": 0}
    return {"maxSurge": 0, "maxUnavailable": share}
