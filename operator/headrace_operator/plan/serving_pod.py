"""The template of the serving pods: the loader as a native sidecar, and a stock engine.

`VERSION` is part of every Deployment's pin. Raise it with any change of what this module
renders: running Deployments then keep their template until their spec changes.
"""

from typing import Any

from headrace_operator.api.parts import LOADER_PORT
from headrace_operator.api.spec import ModelDeploymentSpec
from headrace_operator.plan.names import (
    KEY_ANNOTATION,
    SERVE,
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

VERSION = 2
LOADER = "loader"
ENGINE = "engine"
GPU_RESOURCE = "nvidia.com/gpu"
GPU_CLAIM = "gpu"

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


def serving_pod_template(
    owner: Object,
    spec: ModelDeploymentSpec,
    *,
    claim: str,
    loader_image: str,
    claim_template: str | None,
) -> dict[str, Any]:
    """Return the pod template of the serving Deployment."""
    return {
        "metadata": {
            "labels": {**spec.pod.labels, **labels(owner, SERVE)},
            "annotations": {**spec.pod.annotations, KEY_ANNOTATION: checkpoint_key(spec)},
        },
        "spec": {
            **common_pod_fields(spec.pod),
            **_placement(spec),
            **_claims(claim_template),
            "terminationGracePeriodSeconds": spec.pod.termination_grace_period_seconds,
            "initContainers": [_loader(spec, loader_image)],
            "containers": [_engine(owner, spec)],
            "volumes": [
                {"name": WEIGHTS, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}},
                {"name": "runtime", "emptyDir": {}},
                {"name": "plugin", "emptyDir": {}},
                {"name": "tmp", "emptyDir": {}},
                {"name": "loader-tmp", "emptyDir": {}},
                {"name": "dshm", "emptyDir": {"medium": "Memory"}},
                *_cache_volumes(spec, claim),
            ],
        },
    }


def _placement(spec: ModelDeploymentSpec) -> dict[str, Any]:
    tolerations = [dict(toleration) for toleration in spec.pod.tolerations]
    if spec.gpu.sharing != "None":
        # DRA does not add it as the device plugin's admission does.
        tolerations.append({"key": GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"})
    optional = {
        "nodeSelector": dict(spec.pod.node_selector),
        "tolerations": tolerations,
        "affinity": spec.pod.affinity,
        "topologySpreadConstraints": list(spec.pod.topology_spread_constraints),
        "priorityClassName": spec.pod.priority_class_name,
        "schedulerName": spec.pod.scheduler_name,
        "runtimeClassName": spec.pod.runtime_class_name,
    }
    return {name: value for name, value in optional.items() if value}


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


def _engine(owner: Object, spec: ModelDeploymentSpec) -> dict[str, Any]:
    health = {"httpGet": {"path": "/health", "port": "http"}, "timeoutSeconds": 5}
    return {
        "name": ENGINE,
        "image": spec.engine.image,
        **pull_policy(spec.pod),
        "command": list(spec.engine.command),
        "args": [*_engine_arguments(owner, spec), *spec.engine.args],
        "env": _engine_env(spec),
        "ports": [{"name": "http", "containerPort": spec.engine.port}],
        "startupProbe": {
            **health,
            "periodSeconds": _ENGINE_PROBE_SECONDS,
            "failureThreshold": _START_SECONDS // _ENGINE_PROBE_SECONDS,
        },
        "readinessProbe": {**health, "periodSeconds": _ENGINE_PROBE_SECONDS},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "resources": _with_claim(spec, _engine_resources(spec)),
        "securityContext": container_security(),
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
    if spec.gpu.sharing != "WholeNode":
        return given
    gpus = {GPU_RESOURCE: str(spec.parallelism.tensor_parallel_size)}
    return {**given, "limits": {**given.get("limits", {}), **gpus}}


def _with_claim(spec: ModelDeploymentSpec, given: dict[str, Any]) -> dict[str, Any]:
    if spec.gpu.sharing != "ResourceClaim":
        return given
    return {**given, "claims": [{"name": GPU_CLAIM}]}
