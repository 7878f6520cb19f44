"""The serving Deployment with its pin, its GPU claim template and the Service.

A Deployment's annotations pin what its template was made from. As long as the spec is the
same, the template stays what it is, whatever this operator's version would make of it; and
it stays while the checkpoint of a changed spec is not ready: shards first, rolls after.
"""

from dataclasses import dataclass
from typing import Any

from headrace_operator.api.spec import ModelDeploymentSpec
from headrace_operator.plan.names import (
    COMPONENT_LABEL,
    LOADER_IMAGE_ANNOTATION,
    OWNER_LABEL,
    SERVE,
    SPEC_HASH_ANNOTATION,
    TEMPLATE_VERSION_ANNOTATION,
    child_name,
    digest,
    metadata,
    spec_hash,
)
from headrace_operator.plan.objects import Object, integer, mapping, name_of, text, uid_of
from headrace_operator.plan.serving_pod import VERSION, serving_pod_template
from headrace_operator.plan.world import Deletion, Desired, Observed, Scale, Settings

# Longer than both startup probes together: what takes that long is stuck.
_PROGRESS_DEADLINE_SECONDS = 3 * 3600


@dataclass(frozen=True, slots=True)
class Pin:
    """What a Deployment's template was made from."""

    version: str
    loader_image: str
    spec_hash: str

    @classmethod
    def of(cls, deployment: Object | None) -> "Pin":
        """Read the pin of a Deployment; its parts are empty where it has none."""
        annotations = mapping(deployment, "metadata", "annotations")
        return cls(
            text(annotations, TEMPLATE_VERSION_ANNOTATION),
            text(annotations, LOADER_IMAGE_ANNOTATION),
            text(annotations, SPEC_HASH_ANNOTATION),
        )


def template_hash(spec: ModelDeploymentSpec, claim: str) -> str:
    """Return the digest of what the template depends on besides the operator's own settings."""
    own = spec_hash(spec, without=frozenset({"replicas", "sharding", "checkpoint"}))
    return digest([own, claim], 16)


def selector(owner: Object) -> dict[str, str]:
    """Return the labels that select the serving pods."""
    return {OWNER_LABEL: name_of(owner), COMPONENT_LABEL: SERVE}


@dataclass(frozen=True, slots=True)
class Workload:
    """What to do about the serving pods; `is_current` once the template is the spec's."""

    apply: tuple[Desired, ...] = ()
    scale: Scale | None = None
    delete: tuple[Deletion, ...] = ()
    is_current: bool = False


def plan_workload(
    owner: Object,
    spec: ModelDeploymentSpec,
    claim: str | None,
    observed: Observed,
    settings: Settings,
    *,
    may_roll: bool,
) -> Workload:
    """Decide about Deployment, Service and claim template.

    Args:
        may_roll: whether pods of the current spec could run, so that a new template may
            take the place of the old one.
    """
    pin = Pin.of(observed.deployment)
    wanted = template_hash(spec, claim or "")
    is_current = observed.deployment is not None and pin.spec_hash == wanted
    if claim is None or not (is_current or may_roll):
        return _keep_template(spec, observed, is_current=False)
    if is_current and pin.version != str(VERSION):
        return _keep_template(spec, observed, is_current=True)
    image = pin.loader_image if is_current and pin.loader_image else settings.loader_image
    pin = Pin(str(VERSION), image, wanted)
    claim_template = _claim_template(owner, spec)
    desired = [_deployment(owner, spec, claim, pin, claim_template), _service(owner)]
    if claim_template is not None:
        desired.insert(0, claim_template)
    return Workload(
        apply=tuple(Desired(body, once=body is claim_template) for body in desired),
        delete=_stale(observed, claim, claim_template) if is_current else (),
        is_current=is_current,
    )


def is_rolled_out(deployment: Object | None, replicas: int) -> bool:
    """Whether all replicas of a Deployment are of its latest template, and no others exist."""
    if integer(deployment, "status", "observedGeneration") < integer(
        deployment, "metadata", "generation"
    ):
        return False
    counts = ("replicas", "updatedReplicas", "readyReplicas")
    return all(integer(deployment, "status", count) == replicas for count in counts)


def _keep_template(spec: ModelDeploymentSpec, observed: Observed, *, is_current: bool) -> Workload:
    deployment = observed.deployment
    if deployment is None or integer(deployment, "spec", "replicas") == spec.replicas:
        return Workload(is_current=is_current)
    return Workload(scale=Scale(name_of(deployment), spec.replicas), is_current=is_current)


def _stale(observed: Observed, claim: str, claim_template: Object | None) -> tuple[Deletion, ...]:
    """Return what no pod of the Deployment needs any more, once no old pod is left."""
    replicas = integer(observed.deployment, "spec", "replicas")
    if not is_rolled_out(observed.deployment, replicas):
        return ()
    kept = {claim, name_of(claim_template)}
    stale = [("PersistentVolumeClaim", o) for o in observed.claims]
    stale += [("ResourceClaimTemplate", o) for o in observed.claim_templates]
    return tuple(
        Deletion(kind, name_of(o), text(o, "metadata", "namespace"), uid_of(o))
        for kind, o in stale
        if name_of(o) not in kept and uid_of(o)
    )


def _deployment(
    owner: Object,
    spec: ModelDeploymentSpec,
    claim: str,
    pin: Pin,
    claim_template: Object | None,
) -> dict[str, Any]:
    annotations = {
        SPEC_HASH_ANNOTATION: pin.spec_hash,
        TEMPLATE_VERSION_ANNOTATION: pin.version,
        LOADER_IMAGE_ANNOTATION: pin.loader_image,
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(owner, name_of(owner), component=SERVE, annotations=annotations),
        "spec": {
            "replicas": spec.replicas,
            "revisionHistoryLimit": 2,
            "progressDeadlineSeconds": _PROGRESS_DEADLINE_SECONDS,
            # There are no spare GPUs for a surge.
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1},
            },
            "selector": {"matchLabels": selector(owner)},
            "template": serving_pod_template(
                owner,
                spec,
                claim=claim,
                loader_image=pin.loader_image,
                claim_template=name_of(claim_template) or None,
            ),
        },
    }


def _service(owner: Object) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(owner, name_of(owner), component=SERVE),
        "spec": {
            "selector": selector(owner),
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": "http"}],
        },
    }


def _claim_template(owner: Object, spec: ModelDeploymentSpec) -> dict[str, Any] | None:
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
                    "count": spec.parallelism.tensor_parallel_size,
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
