"""The conditions of the serving pods: WeightsResident, Available, DirectPath."""

from collections import Counter
from dataclasses import dataclass

from headrace_operator.api.parts import LOADER_PORT
from headrace_operator.api.spec import ModelDeploymentSpec
from headrace_operator.plan.conditions import (
    UNKNOWN,
    Draft,
    holds,
    of_failure,
    of_rejection,
    problem,
    waiting,
)
from headrace_operator.plan.failures import Failure, failures_of
from headrace_operator.plan.names import COMPONENT_LABEL, KEY_ANNOTATION, SERVE, checkpoint_key
from headrace_operator.plan.objects import (
    Object,
    camel_case,
    condition_of,
    integer,
    is_deleting,
    items,
    mapping,
    name_of,
    text,
    uid_of,
)
from headrace_operator.plan.presets import PRESETS
from headrace_operator.plan.serving_pod import ENGINE, GPU_RESOURCE, LOADER
from headrace_operator.plan.world import Observed

GROUP_INDEX_LABEL = "leaderworkerset.sigs.k8s.io/group-index"
_WORKLOAD_KINDS = ("ResourceClaimTemplate", "Deployment", "LeaderWorkerSet", "PodDisruptionBudget")
SCALED_TO_ZERO = holds("ScaledToZero", "spec.replicas is 0")


@dataclass(frozen=True, slots=True)
class LoaderAddress:
    """Where a loader that holds its weights can be asked."""

    pod_uid: str
    container_id: str
    ip: str


def loader_addresses(observed: Observed) -> list[LoaderAddress]:
    """Return the loaders of the serving pods that hold their weights."""
    return [
        LoaderAddress(uid_of(pod), text(status, "containerID"), ip)
        for pod in serving_pods(observed)
        for status in _ready_loaders(pod)
        if (ip := text(pod, "status", "podIP"))
    ]


def serving_pods(observed: Observed) -> list[Object]:
    """Return the serving pods that are not on their way out."""
    return [
        pod
        for pod in observed.pods
        if text(pod, "metadata", "labels", COMPONENT_LABEL) == SERVE and not is_deleting(pod)
    ]


def failures(observed: Observed) -> list[Failure]:
    """Return the failures of all serving pods, the most telling first."""
    return sorted(
        failure
        for pod in serving_pods(observed)
        for failure in failures_of(pod, mapping(observed.warnings, uid_of(pod)))
    )


def refusal(spec: ModelDeploymentSpec, observed: Observed) -> Draft | None:
    """Return why no pod of the spec can run in this cluster, if that is known."""
    if spec.parallelism.nodes > 1 and observed.groups_served is False:
        return problem(
            "LeaderWorkerSetUnavailable",
            f"spec.parallelism.nodes: {spec.parallelism.nodes}: the cluster does not serve "
            "leaderworkerset.x-k8s.io/v1; install LeaderWorkerSet (sigs.k8s.io/lws)",
        )
    return _refused_gpus(spec, observed) or _refused_preset(spec)


def is_lasting(spec: ModelDeploymentSpec, refused: Draft) -> bool:
    """Whether only the spec can change a refusal: a preset says what its nodes have."""
    by_preset = ("NodeTooSmall", "PartialNodeWithoutDRA")
    return spec.gpu.preset is not None and refused.reason in by_preset


def _refused_gpus(spec: ModelDeploymentSpec, observed: Observed) -> Draft | None:
    if spec.gpu.sharing == "ResourceClaim" and observed.dra_served is False:
        return problem(
            "DraUnavailable",
            'spec.gpu.sharing: "ResourceClaim": the cluster does not serve resource.k8s.io/v1; '
            "use Kubernetes 1.34 or later with a DRA driver for GPUs, or WholeNode",
        )
    name, classes = spec.gpu.device_class_name, observed.device_classes
    if spec.gpu.sharing == "ResourceClaim" and classes is not None and name not in classes:
        return problem(
            "DeviceClassNotFound",
            f'spec.gpu.deviceClassName: "{name}": there is no such DeviceClass, only '
            f"{', '.join(sorted(classes)[:8]) or 'none'}; install a DRA driver for GPUs or "
            "correct the name",
        )
    gpus, sizes = spec.parallelism.gpus_per_node, observed.gpus_of_nodes
    preset = PRESETS.get(spec.gpu.preset or "")
    if preset is not None:
        sizes = frozenset({preset.gpus})
    if spec.gpu.sharing == "WholeNode" and sizes and gpus not in sizes:
        return problem(
            "PartialNodeWithoutDRA",
            f"spec.parallelism.tensorParallelSize: {spec.parallelism.tensor_parallel_size}: with "
            f"spec.gpu.sharing WholeNode a pod must take all {GPU_RESOURCE} of its node; this one "
            f"takes {gpus}, and the nodes have {', '.join(map(str, sorted(sizes)))}; use that "
            "size, or ResourceClaim",
        )
    return None


def _refused_preset(spec: ModelDeploymentSpec) -> Draft | None:
    preset, gpus = PRESETS.get(spec.gpu.preset or ""), spec.parallelism.gpus_per_node
    if preset is None or gpus <= preset.gpus:
        return None
    return problem(
        "NodeTooSmall",
        f'spec.gpu.preset: "{spec.gpu.preset}": its nodes have {preset.gpus} GPUs and a pod of '
        f"this replica takes {gpus}; raise spec.parallelism.nodes or choose another preset",
    )


def weights_resident(
    spec: ModelDeploymentSpec, observed: Observed, *, checkpoint_is_ready: bool
) -> Draft:
    """Return the condition WeightsResident: every replica's loader holds verified weights."""
    stopped = _stopped(spec, observed)
    if stopped is not None:
        return stopped
    if observed.deployment is None and not checkpoint_is_ready:
        return waiting("WaitingForCheckpoint", "the checkpoint is not ready")
    if observed.deployment is not None and spec.replicas == 0:
        return SCALED_TO_ZERO
    pods = _pods_of_checkpoint(spec, observed)
    resident = _resident_replicas(spec, pods)
    counts = f"{resident} of {spec.replicas} replicas hold the weights"
    if resident >= spec.replicas and observed.deployment is not None:
        return holds("Resident", counts)
    failure = next((f for f in failures(observed) if f.container != ENGINE), None)
    if failure is not None:
        return of_failure(failure)
    if not checkpoint_is_ready:
        return waiting("WaitingForCheckpoint", "the checkpoint is not ready")
    return pods_rejected(observed) or _on_the_way(pods, counts)


def available(spec: ModelDeploymentSpec, observed: Observed, *, resident: bool) -> Draft:
    """Return the condition Available: the Service has an engine that answers."""
    rejection = observed.rejection("Service")
    if rejection is not None:
        return of_rejection(rejection)
    if observed.deployment is not None and spec.replicas == 0:
        return SCALED_TO_ZERO
    ready = integer(observed.deployment, "status", "readyReplicas")
    if ready > 0:
        return holds("Serving", f"{ready} of {spec.replicas} replicas answer requests")
    failure = next((f for f in failures(observed) if f.container == ENGINE), None)
    if failure is not None:
        return of_failure(failure)
    if not resident:
        return waiting("WaitingForWeights", "no replica holds the weights yet")
    return waiting("EngineStarting", "the engine is starting")


def direct_path(spec: ModelDeploymentSpec, observed: Observed) -> Draft:
    """Return the condition DirectPath: weights come by GPUDirect Storage."""
    if not may_be_direct(spec):
        return Draft("False", "Off", "the direct path is off (spec.loading.path, spec.gpu.sharing)")
    unavailable = "DirectPathUnavailable"
    failure = next((f for f in failures(observed) if f.reason == unavailable), None)
    if failure is not None:
        return of_failure(failure)
    holding = [pod for pod in _pods_of_checkpoint(spec, observed) if _ready_loaders(pod)]
    told = {name_of(pod): observed.loaded_paths.get(uid_of(pod)) for pod in holding}
    for pod, path in told.items():
        if path is not None and not path.direct:
            reason = camel_case(path.reason, "FellBack")
            return problem(reason, f"pod {pod}: the weights took another path: {path.message}")
    silent = [pod for pod, path in told.items() if path is None]
    if silent:
        return Draft(
            UNKNOWN,
            "LoaderUnreachable",
            f"pod {silent[0]}: its loader did not tell its path; the operator must reach port "
            f"{LOADER_PORT} of the pods (NetworkPolicy)",
        )
    if told:
        return holds("GPUDirect", f"{len(told)} of {spec.replicas} replicas loaded by GPUDirect")
    return Draft(UNKNOWN, "NotReported", "no loader holds weights yet")


def may_be_direct(spec: ModelDeploymentSpec) -> bool:
    """Whether a loader of the spec tries GPUDirect Storage at all."""
    return spec.gpu.sharing != "None" and spec.loading.path != "Off"


def _stopped(spec: ModelDeploymentSpec, observed: Observed) -> Draft | None:
    refused = refusal(spec, observed)
    if refused is not None:
        return refused
    rejection = observed.rejection(*_WORKLOAD_KINDS)
    return None if rejection is None else of_rejection(rejection)


def pods_rejected(observed: Observed) -> Draft | None:
    """Return why the API server refuses pods of the Deployment, if it does."""
    failed_create = condition_of(observed.deployment, "ReplicaFailure")
    if text(failed_create, "status") != "True":
        return None
    return problem("PodsRejected", text(failed_create, "message") or "pods were refused")


def _on_the_way(pods: list[Object], counts: str) -> Draft:
    if any(_is_loading(pod) for pod in pods):
        return waiting("Loading", counts)
    return waiting("PodsStarting", counts)


def _pods_of_checkpoint(spec: ModelDeploymentSpec, observed: Observed) -> list[Object]:
    key = checkpoint_key(spec)
    return [
        pod
        for pod in serving_pods(observed)
        if text(pod, "metadata", "annotations", KEY_ANNOTATION) == key
    ]


def _resident_replicas(spec: ModelDeploymentSpec, pods: list[Object]) -> int:
    """Return the replicas whose loaders hold the weights on all of their nodes."""
    holding = [pod for pod in pods if _ready_loaders(pod)]
    if spec.parallelism.nodes == 1:
        return len(holding)
    groups = Counter(text(pod, "metadata", "labels", GROUP_INDEX_LABEL) for pod in holding)
    return sum(count == spec.parallelism.nodes for count in groups.values())


def _ready_loaders(pod: Object) -> list[Object]:
    return [
        status
        for status in items(pod, "status", "initContainerStatuses")
        if text(status, "name") == LOADER and status.get("ready") is True
    ]


def _is_loading(pod: Object) -> bool:
    return any(
        bool(mapping(status, "state", "running")) and status.get("ready") is not True
        for status in items(pod, "status", "initContainerStatuses")
        if text(status, "name") == LOADER
    )
