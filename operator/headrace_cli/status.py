"""The state of ModelDeployments as one document: conditions, pods, stages, loaders' progress."""

import asyncio
import json
from collections.abc import Iterable, Mapping
from typing import Any

from headrace_cli.errors import CommandFailed, KindMissing, NotFound, Unavailable
from headrace_cli.kube import Kube, Object
from headrace_cli.loaders import ask_loader, is_loader_running
from headrace_operator.cluster.kinds import MODEL_DEPLOYMENT, POD
from headrace_operator.plan.failures import failures_of
from headrace_operator.plan.names import COMPONENT_LABEL, OWNER_LABEL, SERVE, SHARD
from headrace_operator.plan.objects import (
    condition_of,
    integer,
    is_true,
    items,
    mapping,
    name_of,
    text,
)
from headrace_operator.plan.serving_pod import ENGINE

_ASKED_AT_A_TIME = 16
_LOG_LINES = 50
_NOT_INSTALLED = (
    "the cluster serves no ModelDeployments; install the chart: helm install headrace "
    "charts/headrace -n headrace-system --create-namespace"
)


async def model_deployments(kube: Kube, names: Iterable[str] = ()) -> list[Object]:
    """Return the named ModelDeployments of the namespace, or all.

    Raises:
        NotFound: one that was named is not there.
        CommandFailed: the cluster cannot be asked.
    """
    namespace = None if kube.target.all_namespaces else kube.namespace
    try:
        found = await kube.list(MODEL_DEPLOYMENT, namespace)
    except KindMissing:
        raise Unavailable(_NOT_INSTALLED) from None
    wanted = tuple(names)
    for name in wanted:
        if all(name_of(item) != name for item in found):
            where = "any namespace" if namespace is None else f"namespace {namespace}"
            raise NotFound(f"there is no ModelDeployment {name} in {where}; see headrace status -A")
    return [item for item in found if not wanted or name_of(item) in wanted]


async def status_document(kube: Kube, names: Iterable[str] = ()) -> Object:
    """Return the document of `headrace status --output json`."""
    models = await model_deployments(kube, names)
    pods = await _pods(kube) if models else []
    slots = asyncio.Semaphore(_ASKED_AT_A_TIME)
    described = await asyncio.gather(*(_pod(kube, pod, slots) for pod in pods))
    return {
        "modelDeployments": [
            _model(model, [d for pod, d in zip(pods, described, strict=True) if _owns(model, pod)])
            for model in models
        ]
    }


async def _pods(kube: Kube) -> list[Object]:
    namespace = None if kube.target.all_namespaces else kube.namespace
    return await kube.list(POD, namespace, OWNER_LABEL)


def _owns(model: Mapping[str, Any], pod: Mapping[str, Any]) -> bool:
    same = text(pod, "metadata", "namespace") == text(model, "metadata", "namespace")
    return same and text(pod, "metadata", "labels", OWNER_LABEL) == name_of(model)


def _model(model: Object, pods: list[Object]) -> Object:
    ready = condition_of(model, "Ready")
    is_ready = text(ready, "status") == "True"
    return {
        "namespace": text(model, "metadata", "namespace"),
        "name": name_of(model),
        "ready": is_ready,
        "reason": text(ready, "reason") or "NotObserved",
        "message": text(ready, "message")
        or "the operator has not looked at it yet; is it running? see headrace doctor",
        "replicas": integer(model, "spec", "replicas"),
        "readyReplicas": integer(model, "status", "readyReplicas"),
        "conditions": [
            {key: text(c, key) for key in ("type", "status", "reason", "message")}
            for c in items(model, "status", "conditions")
        ],
        "checkpoint": dict(mapping(model, "status", "checkpoint")) or None,
        "pods": sorted(pods, key=lambda pod: (pod["component"] != "shard", pod["name"])),
    }


async def _pod(kube: Kube, pod: Object, slots: asyncio.Semaphore) -> Object:
    component = text(pod, "metadata", "labels", COMPONENT_LABEL)
    failures = sorted(failures_of(pod, {}))
    document: Object = {
        "name": name_of(pod),
        "component": component,
        "node": text(pod, "spec", "nodeName") or None,
        "stage": stage_of(pod),
        "problem": f"{failures[0].reason}: {failures[0].message}" if failures else None,
        "loader": None,
        "loaderProblem": None,
        "sharding": None,
    }
    if document["stage"] == "shard":
        async with slots:
            document["sharding"] = await _sharding(kube, pod)
    if component == SERVE and is_loader_running(pod):
        try:
            async with slots:
                document["loader"] = await ask_loader(kube, pod, "/v1/status")
        except CommandFailed as error:
            document["loaderProblem"] = str(error)
    return document


async def _sharding(kube: Kube, pod: Object) -> Object | None:
    """Return how far a shard pod is, from its log; None where that cannot be read."""
    path = f"{POD.path(text(pod, 'metadata', 'namespace'), name_of(pod))}/log"
    query = {"container": SHARD, "tailLines": str(_LOG_LINES)}
    try:
        content = await kube.read(path, query)
    except CommandFailed:
        return None
    return shard_progress(content.decode(errors="replace"))


def shard_progress(log: str) -> Object | None:
    """Return the last report of a sharder's log that says how many bytes are done."""
    for line in reversed(log.splitlines()):
        try:
            report = json.loads(line)
        except ValueError:
            continue
        if integer(report, "totalBytes") and "bytes" in report:
            return {key: report.get(key) for key in ("bytes", "totalBytes", "mibPerSecond")}
    return None


def stage_of(pod: Mapping[str, Any]) -> str:
    """Return where a pod stands: the phases of a cold start, or how it ended."""
    phase = text(pod, "status", "phase")
    if text(pod, "metadata", "deletionTimestamp"):
        return "terminating"
    if phase in ("Succeeded", "Failed"):
        return phase.lower()
    if not is_true(pod, "PodScheduled"):
        return "schedule"
    if text(pod, "metadata", "labels", COMPONENT_LABEL) != SERVE:
        return "shard" if phase == "Running" else "prepare"
    if is_true(pod, "Ready"):
        return "ready"
    if _is_running(pod, ENGINE):
        return "engine"
    return "load" if is_loader_running(pod) else "prepare"


def _is_running(pod: Mapping[str, Any], container: str) -> bool:
    return any(
        text(status, "name") == container and bool(mapping(status, "state", "running"))
        for status in items(pod, "status", "containerStatuses")
    )
