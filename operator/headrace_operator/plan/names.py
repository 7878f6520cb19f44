"""Names, labels and keys: deterministic, so that applying twice makes nothing twice."""

import hashlib
import re
from functools import lru_cache
from typing import Any

from headrace_operator.api import API_VERSION, KIND
from headrace_operator.api.spec import ModelDeploymentSpec
from headrace_operator.plan.objects import Object, canonical_json, name_of, text, uid_of

OWNER_LABEL = "headrace.dev/model-deployment"
NAMESPACE_LABEL = "headrace.dev/namespace"
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
COMPONENT_LABEL = "app.kubernetes.io/component"
MANAGED_BY = "headrace"
SHARD = "shard"
RECLAIM = "reclaim"
SERVE = "serve"

KEY_ANNOTATION = "headrace.dev/checkpoint-key"
PATH_ANNOTATION = "headrace.dev/checkpoint-path"
ATTEMPT_ANNOTATION = "headrace.dev/attempt"
REPLACES_ANNOTATION = "headrace.dev/replaces"
FINALIZER = "headrace.dev/reclaim-checkpoint"
SPEC_HASH_ANNOTATION = "headrace.dev/spec-hash"
TEMPLATE_VERSION_ANNOTATION = "headrace.dev/template-version"
LOADER_IMAGE_ANNOTATION = "headrace.dev/loader-image"
STABLE_ANNOTATION = "headrace.dev/stable-spec-hash"
STABLE_VERSION_ANNOTATION = "headrace.dev/stable-template-version"
ROLLED_BACK_ANNOTATION = "headrace.dev/rolled-back-spec-hash"

CHECKPOINT_FORMAT_VERSION = 1
CHECKPOINT_LAYOUT = "vllm"
_MAX_LABEL = 63
_ROOM_FOR_INDEX = len("-63")
_SOURCE = re.compile(r"pvc://([^/]+)/(.+)", re.DOTALL)


def digest(value: object, length: int) -> str:
    """Return the first hex digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


def child_name(owner: str, suffix: str, *, room: int = 0) -> str:
    """Return `<owner>-<suffix>`, shortened to a DNS label with a digest if it is too long.

    `room` is the number of characters that others append to it and that must fit as well.
    """
    full, longest = f"{owner}-{suffix}", _MAX_LABEL - room
    if len(full) <= longest:
        return full
    tail = f"{digest(full, 8)}-{suffix}"
    return f"{owner[: longest - 1 - len(tail)]}-{tail}"


def labels(owner: Object, component: str | None = None) -> dict[str, str]:
    """Return the labels of a child."""
    name = name_of(owner)
    common = {
        MANAGED_BY_LABEL: MANAGED_BY,
        "app.kubernetes.io/name": "headrace",
        "app.kubernetes.io/instance": name,
        OWNER_LABEL: name,
    }
    return common if component is None else {**common, COMPONENT_LABEL: component}


def metadata(
    owner: Object,
    name: str,
    *,
    component: str | None = None,
    annotations: dict[str, str] | None = None,
    owned: bool = True,
) -> dict[str, Any]:
    """Return the metadata of a namespaced child, owned by the ModelDeployment or outliving it."""
    reference = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": name_of(owner),
        "uid": uid_of(owner),
        "controller": True,
        "blockOwnerDeletion": True,
    }
    return {
        "name": name,
        "namespace": text(owner, "metadata", "namespace"),
        "labels": labels(owner, component),
        **({"ownerReferences": [reference]} if owned else {}),
        **({"annotations": annotations} if annotations else {}),
    }


def source_parts(source: str) -> tuple[str, str]:
    """Split pvc://<claim>/<path> into claim and path; both are empty for another source."""
    match = _SOURCE.fullmatch(source)
    return (match[1], match[2].strip("/")) if match else ("", "")


def identity(spec: ModelDeploymentSpec) -> dict[str, Any]:
    """Return what makes two checkpoints the same one."""
    return {
        "source": spec.model.source,
        "revision": spec.model.revision,
        "dtype": spec.model.dtype,
        "quantization": spec.model.quantization,
        "tensor": spec.parallelism.tensor_parallel_size,
        "pipeline": spec.parallelism.pipeline_parallel_size,
        "expert": spec.parallelism.expert_parallel_size,
        "layout": CHECKPOINT_LAYOUT,
        "formatVersion": CHECKPOINT_FORMAT_VERSION,
    }


def checkpoint_key(spec: ModelDeploymentSpec) -> str:
    """Return the key of the checkpoint: 16 hex digits."""
    return _key_of(tuple(identity(spec).items()))


@lru_cache(maxsize=256)  # one plan asks a dozen times
def _key_of(identity: tuple[tuple[str, Any], ...]) -> str:
    return digest(dict(identity), 16)


def checkpoint_path(spec: ModelDeploymentSpec) -> str:
    """Return the checkpoint's directory, relative to the volume's root."""
    last = spec.model.source.rstrip("/").rpartition("/")[2]
    slug = re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")[:_MAX_LABEL] or "model"
    return f"{spec.volume.root}/{slug}/{checkpoint_key(spec)}"


def engine_cache_path(spec: ModelDeploymentSpec) -> str:
    """Return the directory of what engines of the model compiled, relative to the volume's root."""
    return f"{checkpoint_path(spec).rpartition('/')[0]}/compiled"


def engine_cache_key(spec: ModelDeploymentSpec) -> str:
    """Return the name under which an engine finds what another one of its kind compiled."""
    ignored = {"resources", "port", "compiled_code"}
    engine = spec.engine.model_dump(mode="json", exclude=ignored, exclude_defaults=True)
    return digest({"checkpoint": checkpoint_key(spec), "engine": engine}, 16)


def job_name(owner: str, spec: ModelDeploymentSpec, replaces: str = "") -> str:
    """Return the name of the Job that makes the checkpoint of the spec, again after `replaces`."""
    again = f"-{digest(replaces, 4)}" if replaces else ""
    suffix = f"{SHARD}-{checkpoint_key(spec)[:8]}{again}"
    return child_name(owner, suffix, room=_ROOM_FOR_INDEX)


def spec_hash(spec: ModelDeploymentSpec, *, without: frozenset[str]) -> str:
    """Return a digest of the spec without some of its parts.

    Defaults do not count, so that a field which a newer version adds with a default does not
    change the digest of specs that do not use it.
    """
    dump = spec.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude=set(without))
    return digest(dump, 16)
