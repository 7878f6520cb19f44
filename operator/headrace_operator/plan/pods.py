"""What the pods of the shard Job and of the engine have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

from headrace_operator.api.parts import EnvVar, PodOverrides, Resources

WEIGHTS = "weights"
WEIGHTS_PATH = "/mnt/weights"
TMP_PATH = "/tmp"  # noqa: S108  # an emptyDir of the container, not the host's directory


def pod_security(pod: PodOverrides) -> dict[str, Any]:
    """Return the pod's security context: one non-root user for all containers."""
    return {
        "runAsNonRoot": True,
        "runAsUser": pod.run_as_user,
        "runAsGroup": pod.fs_group,
        "fsGroup": pod.fs_group,
        # Walking through a file system of terabytes to change owners would take hours.
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> dict[str, Any]:
    """Return the security context of every container."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }


def environment(own: Mapping[str, str], given: Sequence[EnvVar]) -> list[dict[str, Any]]:
    """Return a container's environment: the operator's variables give way to the user's."""
    named = {
        variable.name: variable.model_dump(mode="json", by_alias=True, exclude_none=True)
        for variable in given
    }
    return [*({"name": n, "value": v} for n, v in own.items() if n not in named), *named.values()]


def resources(given: Resources) -> dict[str, Any]:
    """Return a container's resources."""
    return given.model_dump(mode="json", by_alias=True, exclude_defaults=True)


def common_pod_fields(pod: PodOverrides) -> dict[str, Any]:
    """Return the fields that both kinds of pods take from the overrides."""
    fields: dict[str, Any] = {
        "automountServiceAccountToken": False,
        # Variables made of Service names can clash with the engine's own, as VLLM_PORT does.
        "enableServiceLinks": False,
        "securityContext": pod_security(pod),
    }
    optional = {
        "serviceAccountName": pod.service_account_name,
        "imagePullSecrets": list(pod.image_pull_secrets),
    }
    return fields | {name: value for name, value in optional.items() if value}


def pull_policy(pod: PodOverrides) -> dict[str, str]:
    """Return the containers' pull policy, if one is given."""
    return {"imagePullPolicy": pod.image_pull_policy} if pod.image_pull_policy else {}
