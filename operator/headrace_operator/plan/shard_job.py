"""The Job that makes the checkpoint."""

from typing import Any

from headrace_operator.api.spec import ModelDeploymentSpec
from headrace_operator.plan.names import (
    KEY_ANNOTATION,
    SHARD,
    SPEC_HASH_ANNOTATION,
    checkpoint_key,
    checkpoint_path,
    engine_cache_path,
    identity,
    job_name,
    labels,
    metadata,
    source_parts,
    spec_hash,
)
from headrace_operator.plan.objects import Object, canonical_json, name_of
from headrace_operator.plan.pods import (
    TMP_PATH,
    WEIGHTS,
    WEIGHTS_PATH,
    common_pod_fields,
    container_security,
    environment,
    pull_policy,
    resources,
)
from headrace_operator.plan.world import Settings

BACKOFF_LIMIT = 3
_SOURCE = "source"
_SOURCE_PATH = "/mnt/source"
_TMP = "tmp"
_PERMANENT_EXIT_CODES = (64, 65)


def retry_hash(spec: ModelDeploymentSpec) -> str:
    """Return the digest whose change lets a failed Job run again: all but the replicas."""
    return spec_hash(spec, without=frozenset({"replicas"}))


def shard_job(
    owner: Object, spec: ModelDeploymentSpec, claim: str, settings: Settings
) -> dict[str, Any]:
    """Return the Job that cuts the source into the checkpoint of the spec."""
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(
            owner,
            job_name(name_of(owner), spec),
            component=SHARD,
            annotations={
                KEY_ANNOTATION: checkpoint_key(spec),
                SPEC_HASH_ANNOTATION: retry_hash(spec),
            },
        ),
        "spec": {
            "backoffLimit": BACKOFF_LIMIT,
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "FailJob",
                        "onExitCodes": {
                            "containerName": SHARD,
                            "operator": "In",
                            "values": list(_PERMANENT_EXIT_CODES),
                        },
                    },
                    # A drained or preempted node says nothing about the model.
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
                ]
            },
            "template": {
                "metadata": {"labels": labels(owner, SHARD)},
                "spec": _pod(spec, claim, settings),
            },
        },
    }


def _pod(spec: ModelDeploymentSpec, claim: str, settings: Settings) -> dict[str, Any]:
    volumes = [
        {"name": WEIGHTS, "persistentVolumeClaim": {"claimName": claim}},
        {"name": _TMP, "emptyDir": {}},
    ]
    mounts: list[dict[str, Any]] = [
        {"name": WEIGHTS, "mountPath": WEIGHTS_PATH},
        {"name": _TMP, "mountPath": TMP_PATH},
    ]
    source_claim, _ = source_parts(spec.model.source)
    if source_claim:
        name = WEIGHTS if source_claim == claim else _SOURCE
        mounts.insert(1, {"name": name, "mountPath": _SOURCE_PATH, "readOnly": True})
        if name == _SOURCE:
            source = {"claimName": source_claim, "readOnly": True}
            volumes.append({"name": _SOURCE, "persistentVolumeClaim": source})
    placement = {
        "nodeSelector": dict(spec.sharding.node_selector),
        "tolerations": list(spec.sharding.tolerations),
    }
    return {
        **common_pod_fields(spec.pod),
        "restartPolicy": "Never",
        **{name: value for name, value in placement.items() if value},
        "containers": [
            {
                "name": SHARD,
                "image": settings.loader_image,
                **pull_policy(spec.pod),
                "command": _command(spec),
                "env": environment({"HOME": TMP_PATH}, spec.sharding.env),
                "resources": resources(spec.sharding.resources),
                "securityContext": container_security(),
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }


def _command(spec: ModelDeploymentSpec) -> list[str]:
    return [
        "headrace",
        "shard",
        *_source(spec),
        "--output",
        f"{WEIGHTS_PATH}/{checkpoint_path(spec)}",
        "--tensor-parallel-size",
        str(spec.parallelism.tensor_parallel_size),
        "--dtype",
        spec.model.dtype,
        "--layout",
        identity(spec)["layout"],
        "--identity",
        canonical_json(identity(spec)),
        "--engine-cache-store",
        f"{WEIGHTS_PATH}/{engine_cache_path(spec)}",
    ]


def _source(spec: ModelDeploymentSpec) -> list[str]:
    claim, path = source_parts(spec.model.source)
    if claim:
        return ["--source", f"{_SOURCE_PATH}/{path}"]
    return ["--source", spec.model.source, "--revision", spec.model.revision]
