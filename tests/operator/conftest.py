"""Builders of API objects for the unit tests; the cluster's fixtures are below them."""

import copy
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from headrace_operator.plan import Observed, Settings, plan
from headrace_operator.plan.names import checkpoint_key, job_name, labels
from headrace_operator.plan.overrides import DENIED_FIELDS

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
SPEC: dict[str, Any] = {
    "replicas": 1,
    "model": {"source": "pvc://models/llama/Tiny Llama_1"},
    "volume": {"existingClaim": {"name": "weights"}},
    "loading": {"path": "Off"},
    "gpu": {"sharing": "None"},
    "engine": {"image": "vllm:cpu"},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `base` with nested changes; None removes a field."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


def model_deployment(spec: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    return {
        "apiVersion": "headrace.dev/v1alpha1",
        "kind": "ModelDeployment",
        "metadata": {"name": "tiny", "namespace": "ns", "uid": "uid-cr", "generation": 3},
        "spec": merged(SPEC, spec or {}),
        **({"status": status} if status else {}),
    }


def claim(name: str = "weights", phase: str = "Bound", **spec: Any) -> dict[str, Any]:
    """A claim; tiny-weights is the one that is made for the ModelDeployment tiny."""
    made, volume = {}, "pv"
    if name == "tiny-weights":
        owner = {"uid": "uid-cr", "controller": True}
        made = {"labels": labels(model_deployment()), "ownerReferences": [owner]}
        volume = "ns.tiny-weights"
    return {
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": "ns", "uid": f"uid-{name}", **made},
        "spec": {"accessModes": ["ReadWriteMany"], "volumeName": volume, **spec},
        "status": {"phase": phase},
    }


def condition(kind: str, status: str = "True", **fields: str) -> dict[str, str]:
    return {"type": kind, "status": status, **fields}


def container(
    name: str, *, ready: bool = False, restarts: int = 0, **states: Any
) -> dict[str, Any]:
    """A container status; states are running=, waiting=, terminated=, last=."""
    last = states.pop("last", None)
    return {
        "name": name,
        "ready": ready,
        "restartCount": restarts,
        "state": states,
        "lastState": {"terminated": last} if last else {},
    }


def pod(
    name: str,
    component: str,
    *containers: dict[str, Any],
    inits: tuple[dict[str, Any], ...] = (),
    phase: str = "Running",
    annotations: dict[str, str] | None = None,
    conditions: tuple[dict[str, str], ...] = (),
    **more_labels: str,
) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "namespace": "ns",
            "uid": f"uid-{name}",
            "labels": {**labels(model_deployment(), component), **more_labels},
            "annotations": annotations or {},
            "creationTimestamp": "2026-11-24T11:59:00Z",
        },
        "status": {
            "phase": phase,
            "conditions": [condition("PodScheduled"), *conditions],
            "initContainerStatuses": list(inits),
            "containerStatuses": list(containers),
        },
    }


class Builders(SimpleNamespace):
    """Named functions, with a short name of its own in reports."""

    def __repr__(self) -> str:
        return "build"


@pytest.fixture
def build() -> SimpleNamespace:
    """Functions that build API objects, and the settings and time of all plans."""
    from headrace_operator.api.spec import ModelDeploymentSpec

    def spec_of(resource: dict[str, Any]) -> ModelDeploymentSpec:
        return ModelDeploymentSpec.model_validate(resource["spec"])

    def job(resource: dict[str, Any], *conditions: dict[str, str], **status: Any) -> dict[str, Any]:
        from headrace_operator.plan.shard_job import shard_job
        from headrace_operator.plan.volume import claim_name

        spec = spec_of(resource)
        made = shard_job(resource, spec, claim_name(resource, spec), settings)
        made["metadata"] |= {"uid": "uid-job", "creationTimestamp": "2026-11-24T11:59:00Z"}
        return {**made, "status": {"conditions": list(conditions), **status}}

    def job_pod(*statuses: dict[str, Any], name: str = "shard-a", **fields: Any) -> dict[str, Any]:
        controller = {"batch.kubernetes.io/controller-uid": "uid-job"}
        return pod(name, "shard", *statuses, **fields, **controller)

    def serving_pod(
        resource: dict[str, Any],
        loader: dict[str, Any],
        engine: dict[str, Any],
        name: str = "serve-a",
        **fields: Any,
    ) -> dict[str, Any]:
        key = {"headrace.dev/checkpoint-key": checkpoint_key(spec_of(resource))}
        fields.setdefault("annotations", key)
        return pod(name, "serve", engine, inits=(loader,), **fields)

    def deployment(
        resource: dict[str, Any], ready: int | None = None, **status: Any
    ) -> dict[str, Any]:
        """The Deployment as planned for a resource, with all replicas ready unless told."""
        replicas = resource["spec"]["replicas"]
        count = replicas if ready is None else ready
        world = Observed(claim=claim(), source_claim=claim("models"), jobs=(done(resource),))
        bodies = [d.body for d in plan(resource, world, settings, NOW).apply]
        (made,) = (body for body in bodies if body["kind"] == "Deployment")
        made = copy.deepcopy(dict(made))
        made["metadata"] |= {"uid": "uid-deployment", "generation": 1}
        made["status"] = {
            "observedGeneration": 1,
            "replicas": replicas,
            "updatedReplicas": replicas,
            "readyReplicas": count,
            **status,
        }
        return made

    def done(resource: dict[str, Any]) -> dict[str, Any]:
        return job(resource, condition("Complete"))

    def world(resource: dict[str, Any], **fields: Any) -> Observed:
        """A world in which the checkpoint is published and nothing serves yet."""
        base = {
            "claim": claim(),
            "source_claim": claim("models"),
            "jobs": (done(resource),),
        }
        return Observed(**{**base, **fields})

    def conditions_of(resource: dict[str, Any], observed: Observed) -> dict[str, dict[str, Any]]:
        status = plan(resource, observed, settings, NOW).status
        assert status is not None
        return {c["type"]: c for c in status["status"]["conditions"]}

    settings = Settings("loader:1", {"*": frozenset({"*"})}, frozenset(DENIED_FIELDS))
    return Builders(
        now=NOW,
        settings=settings,
        resource=model_deployment,
        merged=merged,
        claim=claim,
        condition=condition,
        container=container,
        pod=pod,
        job=job,
        job_name=lambda resource: job_name("tiny", spec_of(resource)),
        job_pod=job_pod,
        done=done,
        serving_pod=serving_pod,
        deployment=deployment,
        world=world,
        conditions=conditions_of,
        spec_of=spec_of,
        plan=lambda resource, observed: plan(resource, observed, settings, NOW),
    )
