"""The template of the serving pods: the loader as a native sidecar, and a stock engine.

`VERSION` is part of every Deployment's pin. Raise it with any change of what this module
renders: running Deployments then keep their template until their spec changes.
"""

from enum import Enum
from typing import Any

from headrace_operator.api.parts import LOADER_PORT, Engine
from headrace_operator.api.spec import ModelDeploymentSpec
from headrace_operator.plan.names import (
    KEY_ANNOTATION,
    SERVE,
    SPEC_HASH_ANNOTATION,
    checkpoint_key,
    checkpoint_path,
    engine_cache_key,
    engine_cache_path,
    labels,
)
from headrace_operator.plan.objects import Object, name_of
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
from headrace_operator.plan.presets import (
    EFA_RESOURCE,
    HUGE_PAGES_RESOURCE,
    INSTANCE_TYPE_LABEL,
    PRESETS,
    Preset,
)

VERSION = 3
LOADER = "loader"
ENGINE = "engine"
GPU_RESOURCE = "nvidia.com/gpu"
GPU_CLAIM = "gpu"
GDS_LABEL = "headrace.dev/gds"

_RUNTIME_PATH = "/run/headrace"
_SOCKET = f"{_RUNTIME_PATH}/handover/handover.sock"
_PLUGIN_PATH = "/headrace/plugin"
_CACHE = "engine-cache"
_CACHE_PATH = "/headrace/cache"
_CACHE_CONTENT = f"{_CACHE_PATH}/content"
_CACHE_STORE = "engine-cache-store"
_CACHE_STORE_PATH = "/headrace/cache-store"
# An hour: terabytes from a slow volume, or a first compilation, must not be killed half way.
_START_SECONDS = 3600
_ENGINE_PROBE_SECONDS = 2
_ONE_NODE_COMMAND = Engine(image="any").command
# The module of _ONE_NODE_COMMAND serves HTTP on every node; this one knows --headless.
_NODES_COMMAND = ["python3", "-m", "vllm.entrypoints.cli.main", "serve"]


class Role(Enum):
    """What a pod is of its replica: all of it, or the node that answers requests, or another."""

    WHOLE = "whole"
    LEADER = "leader"
    WORKER = "worker"


def serving_pod_template(
    owner: Object,
    spec: ModelDeploymentSpec,
    role: Role = Role.WHOLE,
    *,
    claim: str,
    loader_image: str,
    claim_template: str | None,
    template_hash: str,
) -> dict[str, Any]:
    """Return the pod template of the serving Deployment or LeaderWorkerSet."""
    return {
        "metadata": {
            "labels": {**spec.pod.labels, **labels(owner, SERVE)},
            "annotations": {
                **spec.pod.annotations,
                KEY_ANNOTATION: checkpoint_key(spec),
                SPEC_HASH_ANNOTATION: template_hash,
            },
        },
        "spec": {
            **common_pod_fields(spec.pod),
            **_placement(spec),
            **_claims(claim_template),
            "terminationGracePeriodSeconds": spec.pod.termination_grace_period_seconds,
            "initContainers": [_loader(spec, loader_image)],
            "containers": [_engine(owner, spec, role)],
            "volumes": [
                {"name": WEIGHTS, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}},
                {"name": "runtime", "emptyDir": {}},
                {"name": "plugin", "emptyDir": {}},
                {"name": "tmp", "emptyDir": {}},
                {"name": "loader-tmp", "emptyDir": {}},
                {"name": "dshm", "emptyDir": _shared_memory(spec)},
                *_cache_volumes(spec, claim),
            ],
        },
    }


def _placement(spec: ModelDeploymentSpec) -> dict[str, Any]:
    tolerations = [dict(toleration) for toleration in spec.pod.tolerations]
    if spec.gpu.sharing != "None":
        # DRA does not add it as the device plugin's admission does.
        tolerations.append({"key": GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"})
    preset = _preset(spec)
    selected = {} if preset is None else {"kubernetes.io/arch": preset.architecture}
    if preset is not None and len(preset.instance_types) == 1:
        selected[INSTANCE_TYPE_LABEL] = preset.instance_types[0]
    if spec.loading.path == "Require":
        # What node preparation says of a node; a loader elsewhere could only fail.
        selected[GDS_LABEL] = "verified"
    optional = {
        "nodeSelector": {**selected, **spec.pod.node_selector},
        "tolerations": tolerations,
        "affinity": spec.pod.affinity,
        "topologySpreadConstraints": list(spec.pod.topology_spread_constraints),
        "priorityClassName": spec.pod.priority_class_name,
        "schedulerName": spec.pod.scheduler_name,
        "runtimeClassName": spec.pod.runtime_class_name,
    }
    return {name: value for name, value in optional.items() if value}


def _preset(spec: ModelDeploymentSpec) -> Preset | None:
    return PRESETS.get(spec.gpu.preset or "")


def _shared_memory(spec: ModelDeploymentSpec) -> dict[str, str]:
    preset = _preset(spec)
    limit = {} if preset is None else {"sizeLimit": preset.shared_memory}
    return {"medium": "Memory", **limit}


def _claims(claim_template: str | None) -> dict[str, Any]:
    if claim_template is None:
        return {}
    claim = {"name": GPU_CLAIM, "resourceClaimTemplateName": claim_template}
    return {"resourceClaims": [claim]}


def _loader(spec: ModelDeploymentSpec, image: str) -> dict[str, Any]:
    env = {"HOME": TMP_PATH}
    if spec.gpu.sharing == "WholeNode":
        env |= {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}
    gate = "/readyz" if spec.loading.gate == "Loaded" else "/healthz"
    return {
        "name": LOADER,
        "image": image,
        **pull_policy(spec.pod),
        "restartPolicy": "Always",
        "command": [
            "headrace-loader",
            "--checkpoint",
            f"{WEIGHTS_PATH}/{checkpoint_path(spec)}",
            "--tensor-parallel-size",
            str(spec.parallelism.tensor_parallel_size),
            *_node_of_loader(spec),
            "--backend",
            "host" if spec.gpu.sharing == "None" else "cuda",
            "--path",
            spec.loading.path,
            "--runtime-dir",
            _RUNTIME_PATH,
            "--port",
            str(LOADER_PORT),
            "--plugin-dir",
            _PLUGIN_PATH,
            *_cache_arguments(spec),
        ],
        "env": [{"name": name, "value": value} for name, value in env.items()],
        "ports": [{"name": LOADER, "containerPort": LOADER_PORT}],
        "startupProbe": {
            "httpGet": {"path": gate, "port": LOADER},
            "periodSeconds": 1,
            "failureThreshold": _START_SECONDS,
        },
        "readinessProbe": {"httpGet": {"path": "/readyz", "port": LOADER}, "periodSeconds": 2},
        "resources": _with_claim(spec, resources(spec.loading.resources)),
        "securityContext": container_security(),
        "volumeMounts": [
            {"name": WEIGHTS, "mountPath": WEIGHTS_PATH, "readOnly": True},
            {"name": "runtime", "mountPath": _RUNTIME_PATH},
            {"name": "plugin", "mountPath": _PLUGIN_PATH},
            {"name": "loader-tmp", "mountPath": TMP_PATH},
            *_cache_mounts(spec, store=True),
        ],
    }


def _node_of_loader(spec: ModelDeploymentSpec) -> list[str]:
    if spec.parallelism.nodes == 1:
        return []
    return ["--nodes", str(spec.parallelism.nodes), "--node-rank", "$(LWS_WORKER_INDEX)"]


def _engine(owner: Object, spec: ModelDeploymentSpec, role: Role) -> dict[str, Any]:
    command = list(spec.engine.command)
    if role is not Role.WHOLE and command == _ONE_NODE_COMMAND:
        command = list(_NODES_COMMAND)
    return {
        "name": ENGINE,
        "image": spec.engine.image,
        **pull_policy(spec.pod),
        "command": command,
        "args": [*_engine_arguments(owner, spec), *_node_of_engine(spec, role), *spec.engine.args],
        "env": _engine_env(spec),
        "ports": [{"name": "http", "containerPort": spec.engine.port}],
        # Only the leader answers requests; the others are ready when their loader is.
        **({} if role is Role.WORKER else _engine_probes()),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "resources": _with_claim(spec, _engine_resources(spec)),
        "securityContext": _engine_security(spec),
        "volumeMounts": [
            {"name": WEIGHTS, "mountPath": WEIGHTS_PATH, "readOnly": True},
            {"name": "runtime", "mountPath": _RUNTIME_PATH},
            {"name": "plugin", "mountPath": _PLUGIN_PATH, "readOnly": True},
            {"name": "tmp", "mountPath": TMP_PATH},
            {"name": "dshm", "mountPath": "/dev/shm"},  # noqa: S108  # the pod's own
            *_cache_mounts(spec, store=False),
        ],
    }


def _cache_volumes(spec: ModelDeploymentSpec, claim: str) -> list[dict[str, Any]]:
    if spec.engine.compiled_code == "PerPod":
        return []
    return [
        {"name": _CACHE, "emptyDir": {}},
        # The claim once more, as the one above cannot be written to.
        {"name": _CACHE_STORE, "persistentVolumeClaim": {"claimName": claim}},
    ]


def _cache_mounts(spec: ModelDeploymentSpec, *, store: bool) -> list[dict[str, Any]]:
    """Return the mounts of compiled code; only the loader writes to the volume."""
    if spec.engine.compiled_code == "PerPod":
        return []
    mounts: list[dict[str, Any]] = [{"name": _CACHE, "mountPath": _CACHE_PATH}]
    if store:
        path = engine_cache_path(spec)
        mounts.append({"name": _CACHE_STORE, "mountPath": _CACHE_STORE_PATH, "subPath": path})
    return mounts


def _cache_arguments(spec: ModelDeploymentSpec) -> list[str]:
    if spec.engine.compiled_code == "PerPod":
        return []
    return [
        "--engine-cache-dir",
        _CACHE_PATH,
        "--engine-cache-store",
        _CACHE_STORE_PATH,
        "--engine-cache-key",
        engine_cache_key(spec),
        "--engine-port",
        str(spec.engine.port),
    ]


def _engine_probes() -> dict[str, Any]:
    health = {"httpGet": {"path": "/health", "port": "http"}, "timeoutSeconds": 5}
    return {
        "startupProbe": {
            **health,
            "periodSeconds": _ENGINE_PROBE_SECONDS,
            "failureThreshold": _START_SECONDS // _ENGINE_PROBE_SECONDS,
        },
        "readinessProbe": {**health, "periodSeconds": _ENGINE_PROBE_SECONDS},
    }


def _node_of_engine(spec: ModelDeploymentSpec, role: Role) -> list[str]:
    """Return vLLM's arguments for a replica of several nodes, each with its part of the ranks."""
    if role is Role.WHOLE:
        return []
    arguments = [
        *("--nnodes", str(spec.parallelism.nodes)),
        *("--node-rank", "$(LWS_WORKER_INDEX)"),
        *("--master-addr", "$(LWS_LEADER_ADDRESS)"),
    ]
    return [*arguments, "--headless"] if role is Role.WORKER else arguments


def _engine_security(spec: ModelDeploymentSpec) -> dict[str, Any]:
    security = container_security()
    if not _uses_efa(spec):
        return security
    # EFA registers memory that must not be swapped, beyond the limit of an ordinary user.
    return {**security, "capabilities": {"drop": ["ALL"], "add": ["IPC_LOCK"]}}


def _uses_efa(spec: ModelDeploymentSpec) -> bool:
    """Whether pods talk to each other: reading a file system over EFA is the node's business."""
    return _preset(spec) is not None and spec.parallelism.nodes > 1


def _engine_arguments(owner: Object, spec: ModelDeploymentSpec) -> list[str]:
    arguments = {
        "--model": f"{WEIGHTS_PATH}/{checkpoint_path(spec)}",
        "--load-format": "headrace",
        "--tensor-parallel-size": str(spec.parallelism.tensor_parallel_size),
        "--served-model-name": name_of(owner),
        "--host": "0.0.0.0",  # noqa: S104  # the Service reaches the pod's address
        "--port": str(spec.engine.port),
    }
    if spec.model.dtype != "auto":
        # config.json is the source's own and still names the source's type.
        arguments["--dtype"] = spec.model.dtype
    chosen = {
        "--max-model-len": spec.engine.max_model_len,
        "--max-num-seqs": spec.engine.max_num_seqs,
        "--kv-cache-dtype": spec.engine.kv_cache_dtype,
    }
    arguments |= {flag: str(value) for flag, value in chosen.items() if value is not None}
    return [word for pair in arguments.items() for word in pair]


def _engine_env(spec: ModelDeploymentSpec) -> list[dict[str, Any]]:
    own = {
        "HEADRACE_SOCKET": _SOCKET,
        "PYTHONPATH": _PLUGIN_PATH,
        "HOME": TMP_PATH,
        # torch asks for the user's name, and the user has no entry in the image's passwd.
        "USER": "headrace",
        # Everything the engine needs is on the volume.
        "HF_HUB_OFFLINE": "1",
    }
    if spec.engine.compiled_code == "Shared":
        own |= {
            "VLLM_CACHE_ROOT": f"{_CACHE_CONTENT}/vllm",
            "TORCHINDUCTOR_CACHE_DIR": f"{_CACHE_CONTENT}/inductor",
            "TRITON_CACHE_DIR": f"{_CACHE_CONTENT}/triton",
        }
    return environment(own, spec.engine.env)


def _engine_resources(spec: ModelDeploymentSpec) -> dict[str, Any]:
    given = resources(spec.engine.resources)
    preset = _preset(spec)
    own: dict[str, str] = {}
    if spec.gpu.sharing == "WholeNode":
        own[GPU_RESOURCE] = str(spec.parallelism.gpus_per_node)
    if preset is not None and _uses_efa(spec):
        own[EFA_RESOURCE] = str(preset.efa_interfaces)
        own[HUGE_PAGES_RESOURCE] = preset.huge_pages
        # Huge pages are refused without a request for CPU or memory.
        given = {**given, "requests": {"cpu": "1", **given.get("requests", {})}}
    return {**given, "limits": {**given.get("limits", {}), **own}} if own else given


def _with_claim(spec: ModelDeploymentSpec, given: dict[str, Any]) -> dict[str, Any]:
    if spec.gpu.sharing != "ResourceClaim":
        return given
    return {**given, "claims": [{"name": GPU_CLAIM}]}
