"""The Job that makes the checkpoint."""

from typing import Any

from headrace_operator.api.spec import ModelDeploymentSpec
from headrace_operator.plan.names import (
    ATTEMPT_ANNOTATION,
    KEY_ANNOTATION,
    PATH_ANNOTATION,
    REPLACES_ANNOTATION,
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
"""Retries of each index; nodes that are drained or lost do not count."""
MAX_DEFAULT_WORKERS = 8
_SOURCE = "source"
_SOURCE_PATH = "/mnt/source"
_TMP = "tmp"
_PERMANENT_EXIT_CODES = (64, 65)


def retry_hash(spec: ModelDeploymentSpec) -> str:
    """Return the digest whose change lets a failed Job run again."""
    return spec_hash(spec, without=frozenset({"replicas", "checkpoint"}))


def workers(spec: ModelDeploymentSpec) -> int:
    """Return how many pods share the work."""
    default = min(spec.parallelism.tensor_parallel_size, MAX_DEFAULT_WORKERS)
    return spec.sharding.parallelism or default


def shard_job(
    owner: Object,
    spec: ModelDeploymentSpec,
    claim: str,
    settings: Settings,
    *,
    replaces: str = "",
    attempt: int = 1,
) -> dict[str, Any]:
    """Return the Job that cuts the source into the checkpoint of the spec.

    Args:
        replaces: UID of an earlier Job whose checkpoint is gone from the volume.
        attempt: how many Jobs in a row have made it, this one included.
    """
    count = workers(spec)
    again = {REPLACES_ANNOTATION: replaces, ATTEMPT_ANNOTATION: str(attempt)} if replaces else {}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(
            owner,
            job_name(name_of(owner), spec, replaces),
            component=SHARD,
            annotations={
                KEY_ANNOTATION: checkpoint_key(spec),
                PATH_ANNOTATION: checkpoint_path(spec),
                SPEC_HASH_ANNOTATION: retry_hash(spec),
                **again,
            },
        ),
        "spec": {
            "completionMode": "Indexed",
            "completions": count,
            "parallelism": count,
            "backoffLimitPerIndex": BACKOFF_LIMIT,
            # Without one index there is no checkpoint, so the others need not go on.
            "maxFailedIndexes": 0,
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
                    # A drained, preempted or lost node says nothing about the model.
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
    pod = volume_pod(spec, claim, settings, SHARD, *_command(spec))
    (container,) = pod["containers"]
    container |= {
        "env": environment({"HOME": TMP_PATH}, spec.sharding.env),
        "resources": resources(spec.sharding.resources),
    }
    source_claim, _ = source_parts(spec.model.source)
    if source_claim:
        name = WEIGHTS if source_claim == claim else _SOURCE
        mount = {"name": name, "mountPath": _SOURCE_PATH, "readOnly": True}
        container["volumeMounts"].insert(1, mount)
        if name == _SOURCE:
            source = {"claimName": source_claim, "readOnly": True}
            pod["volumes"].append({"name": _SOURCE, "persistentVolumeClaim": source})
    return pod


def volume_pod(
    spec: ModelDeploymentSpec, claim: str, settings: Settings, name: str, *command: str
) -> dict[str, Any]:
    """Return the pod of a Job that runs a headrace command on the volume, on CPU nodes."""
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
                "name": name,
                "image": settings.loader_image,
                **pull_policy(spec.pod),
                "command": ["headrace", *command],
                "env": environment({"HOME": TMP_PATH}, ()),
                "securityContext": container_security(),
                "volumeMounts": [
                    {"name": WEIGHTS, "mountPath": WEIGHTS_PATH},
                    {"name": _TMP, "mountPath": TMP_PATH},
                ],
            }
        ],
        "volumes": [
            {"name": WEIGHTS, "persistentVolumeClaim": {"claimName": claim}},
            {"name": _TMP, "emptyDir": {}},
        ],
    }


def _command(spec: ModelDeploymentSpec) -> list[str]:
    words = [
        "shard",
        *_source(spec),
        "--output",
        f"{WEIGHTS_PATH}/{checkpoint_path(spec)}",
        "--tensor-parallel-size",
        str(spec.parallelism.tensor_parallel_size),
        "--workers",
        str(workers(spec)),
        "--dtype",
        spec.model.dtype,
        *_quantization(spec),
        "--layout",
        identity(spec)["layout"],
        "--identity",
        canonical_json(identity(spec)),
        "--engine-cache-store",
        f"{WEIGHTS_PATH}/{engine_cache_path(spec)}",
    ]
    # The kubelet would read $(NAME) as a variable.
    return [word.replace("$", "$$") for word in words]


def _quantization(spec: ModelDeploymentSpec) -> list[str]:
    """Nothing for none: what earlier versions have made keeps its Job."""
    chosen = spec.model.quantization
    return [] if chosen == "none" else ["--quantization", chosen]


def _source(spec: ModelDeploymentSpec) -> list[str]:
    claim, path = source_parts(spec.model.source)
    if claim:
        return ["--source", f"{_SOURCE_PATH}/{path}"]
    return ["--source", spec.model.source, "--revision", spec.model.revision]
