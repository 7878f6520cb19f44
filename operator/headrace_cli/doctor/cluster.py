"""Checks of a cluster: what Headrace needs of it, with the rights of whoever asks."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from headrace_cli.doctor.finding import Finding, Grade
from headrace_cli.errors import CommandFailed, KindMissing, NoPermission, NotFound
from headrace_cli.kube import Kube
from headrace_cli.sizing.hardware import TIERS, capacity_fault
from headrace_operator.api import API_VERSION, GROUP, PLURAL
from headrace_operator.cluster.kinds import (
    CLAIM,
    CLAIM_TEMPLATE,
    DEPLOYMENT,
    MODEL_DEPLOYMENT,
    NODE,
    POD,
    VOLUME,
    Kind,
)
from headrace_operator.plan.failures import most_telling
from headrace_operator.plan.fsx import DRIVER
from headrace_operator.plan.objects import (
    condition_of,
    integer,
    items,
    mapping,
    name_of,
    text,
)
from headrace_operator.plan.serving_pod import GPU_RESOURCE

CRD = Kind(
    "CustomResourceDefinition",
    "apiextensions.k8s.io",
    "v1",
    "customresourcedefinitions",
    namespaced=False,
)
STORAGE_CLASS = Kind("StorageClass", "storage.k8s.io", "v1", "storageclasses", namespaced=False)
CSI_DRIVER = Kind("CSIDriver", "storage.k8s.io", "v1", "csidrivers", namespaced=False)
DEVICE_CLASS = Kind("DeviceClass", "resource.k8s.io", "v1", "deviceclasses", namespaced=False)

_OPERATOR = "app.kubernetes.io/name=headrace-operator"
_MIN_MINOR = 33
_RIGHTS = (
    ("create", GROUP, PLURAL, "to serve a model"),
    ("list", GROUP, PLURAL, "for status"),
    ("list", "", "pods", "for status"),
    ("get", "", "pods/log", "for timeline"),
)
_ASK_LOADERS = (("get", "", "pods/proxy"), ("create", "", "pods/portforward"))

Check = Callable[[Kube], Awaitable[list[Finding]]]


async def check_cluster(kube: Kube) -> list[Finding]:
    """Run all checks; one that may not look is Unknown, and the others go on.

    Raises:
        CommandFailed: the cluster cannot be reached, or does not accept the credentials.
    """
    first = await _version(kube)
    rest = await asyncio.gather(*(_guarded(check, kube) for check in _CHECKS))
    return [*first, *(finding for found in rest for finding in found)]


async def _guarded(check: Check, kube: Kube) -> list[Finding]:
    name = check.__name__.strip("_").replace("_", " ")
    try:
        return await check(kube)
    except NoPermission as error:
        return [Finding(name, Grade.UNKNOWN, str(error))]
    except CommandFailed as error:
        return [Finding(name, Grade.UNKNOWN, str(error), "run headrace doctor again")]


async def _version(kube: Kube) -> list[Finding]:
    answer = await kube.get("/version")
    version = text(answer, "gitVersion")
    digits = re.match(r"\d+", text(answer, "minor"))
    if digits is None or int(digits[0]) >= _MIN_MINOR:
        return [Finding("kubernetes", Grade.OK, f"Kubernetes {version}")]
    fix = f"upgrade the cluster to 1.{_MIN_MINOR} or later, which has native sidecars"
    return [Finding("kubernetes", Grade.PROBLEM, f"Kubernetes {version} is too old", fix)]


async def _custom_resource(kube: Kube) -> list[Finding]:
    name = f"{PLURAL}.{GROUP}"
    helm = "helm upgrade --install headrace charts/headrace -n headrace-system --create-namespace"
    try:
        found = await kube.get(CRD.path(name=name))
    except NotFound:
        return [Finding("CRD", Grade.PROBLEM, f"{name} is not installed", helm)]
    established = text(condition_of(found, "Established"), "status") == "True"
    versions = [text(v, "name") for v in items(found, "spec", "versions") if v.get("served")]
    if not established or API_VERSION.rpartition("/")[2] not in versions:
        message = f"{name} does not serve {API_VERSION}"
        return [Finding("CRD", Grade.PROBLEM, message, "apply the CRD of this version: " + helm)]
    return [Finding("CRD", Grade.OK, f"{name} serves {', '.join(versions)}")]


async def _operator(kube: Kube) -> list[Finding]:
    """Look in all namespaces, else in the own one and the usual one."""
    found: list[Any] = []
    for namespace in (None, kube.namespace, "headrace-system"):
        try:
            found = await kube.list(DEPLOYMENT, namespace, _OPERATOR)
        except NoPermission:
            continue
        if found or namespace is None:
            break
    else:
        return [Finding("operator", Grade.UNKNOWN, "its Deployment may not be listed")]
    if not found:
        helm = "helm install headrace charts/headrace -n headrace-system --create-namespace"
        return [Finding("operator", Grade.PROBLEM, "there is no operator", helm)]
    return [await _operator_state(kube, deployment) for deployment in found]


async def _operator_state(kube: Kube, deployment: Mapping[str, Any]) -> Finding:
    where = f"{text(deployment, 'metadata', 'namespace')}/{name_of(deployment)}"
    if integer(deployment, "status", "readyReplicas") > 0:
        return Finding("operator", Grade.OK, f"{where} is ready")
    namespace, name = where.split("/")
    try:
        failure = most_telling(await kube.list(POD, namespace, _OPERATOR), {})
    except NoPermission:
        failure = None
    condition = text(condition_of(deployment, "Available"), "message")
    why = condition if failure is None else f"{failure.reason}: {failure.message}"
    return Finding(
        "operator",
        Grade.PROBLEM,
        f"{where} is not ready: {why}".rstrip(": "),
        f"kubectl describe pods -n {namespace}; kubectl logs -n {namespace} deployment/{name}",
    )


async def _permissions(kube: Kube) -> list[Finding]:
    asked = [*_RIGHTS, *((*right, "to ask loaders") for right in _ASK_LOADERS)]
    allowed = await asyncio.gather(
        *(kube.can_i(verb, group, kind, kube.namespace) for verb, group, kind, _ in asked)
    )
    may = {
        (verb, group, kind): ok for (verb, group, kind, _), ok in zip(asked, allowed, strict=True)
    }
    found = [
        Finding(
            "permissions",
            Grade.WARNING,
            f"you may not {verb} {kind} in namespace {kube.namespace}, needed {purpose}",
            f"ask for a Role with verb {verb} on {kind}" + (f" of {group}" if group else ""),
        )
        for verb, group, kind, purpose in _RIGHTS
        if not may[verb, group, kind]
    ]
    if not any(may[right] for right in _ASK_LOADERS):
        message = "you may neither get pods/proxy nor create pods/portforward: no load progress"
        fix = "ask for a Role with verb get on pods/proxy"
        found.append(Finding("permissions", Grade.WARNING, message, fix))
    return found or [Finding("permissions", Grade.OK, f"all needed ones in {kube.namespace}")]


async def _nodes(kube: Kube) -> list[Finding]:
    nodes = await kube.list(NODE)
    gpus = {
        name_of(node): int(count)
        for node in nodes
        if (count := text(mapping(node, "status", "allocatable"), GPU_RESOURCE)).isdigit()
    }
    with_gpus = {name: count for name, count in gpus.items() if count}
    if not with_gpus:
        return [
            Finding(
                "GPU nodes",
                Grade.WARNING,
                f"none of {len(nodes)} nodes has {GPU_RESOURCE}",
                "install NVIDIA's device plugin or DRA driver, or add GPU nodes; models with "
                "spec.gpu.sharing None need none",
            )
        ]
    found = [Finding("GPU nodes", Grade.OK, f"{len(with_gpus)} of {len(nodes)} nodes")]
    return [*found, *_prepared([node for node in nodes if name_of(node) in with_gpus])]


def _prepared(nodes: list[Any]) -> list[Finding]:
    """Report what headrace-node has written on the GPU nodes."""
    states: dict[str, list[str]] = {}
    for node in nodes:
        gds = text(mapping(node, "metadata", "labels"), "headrace.dev/gds")
        states.setdefault(gds or "not checked", []).append(name_of(node))
    found = []
    for state, names in sorted(states.items()):
        shown = ", ".join(sorted(names)[:5]) + (", …" if len(names) > 5 else "")
        if state == "verified":
            found.append(Finding("GPUDirect", Grade.OK, f"verified on {shown}"))
            continue
        fix = "set nodePreparation.enabled in the chart, or run headrace doctor --node there"
        if state != "not checked":
            fix = "run headrace doctor --node there; it says which part is missing"
        found.append(Finding("GPUDirect", Grade.WARNING, f"{state} on {shown}", fix))
    return found


async def _gpu_sharing(kube: Kube) -> list[Finding]:
    try:
        await kube.get(CLAIM_TEMPLATE.path(kube.namespace), {"limit": "1"})
    except KindMissing:
        message = "resource.k8s.io/v1 is not served: spec.gpu.sharing ResourceClaim cannot work"
        fix = "use Kubernetes 1.34 with a DRA driver, or spec.gpu.sharing WholeNode"
        return [Finding("DRA", Grade.WARNING, message, fix)]
    classes = [name_of(found) for found in await kube.list(DEVICE_CLASS)]
    if "gpu.nvidia.com" in classes:
        return [Finding("DRA", Grade.OK, "DeviceClass gpu.nvidia.com")]
    message = "there is no DeviceClass gpu.nvidia.com: spec.gpu.sharing ResourceClaim cannot work"
    fix = "install NVIDIA's DRA driver with GPU allocation, or use spec.gpu.sharing WholeNode"
    return [Finding("DRA", Grade.WARNING, message, fix)]


async def _storage(kube: Kube) -> list[Finding]:
    found = []
    if await kube.find(CSI_DRIVER, DRIVER) is None:
        message = f"the CSI driver {DRIVER} is not installed"
        fix = "install the aws-fsx-csi-driver; only volumes of other drivers work without"
        found.append(Finding("storage", Grade.WARNING, message, fix))
    classes = await kube.list(STORAGE_CLASS)
    ours = [c for c in classes if text(c, "provisioner") == DRIVER]
    found += [finding for c in ours for finding in _storage_class(c)]
    return found or [Finding("storage", Grade.OK, f"CSI driver {DRIVER}")]


def _storage_class(found: Mapping[str, Any]) -> list[Finding]:
    name, parameters = f"StorageClass {name_of(found)}", mapping(found, "parameters")
    wrong = []
    if text(parameters, "efaEnabled") != "true":
        wrong.append(("no EFA: loads go over TCP", 'set parameters.efaEnabled: "true"'))
    elif text(parameters, "deploymentType") != "PERSISTENT_2":
        wrong.append(("EFA needs deploymentType PERSISTENT_2", "set it in parameters"))
    elif not text(parameters, "metadataConfigurationMode"):
        wrong.append(
            ("EFA needs a metadata configuration", "set metadataConfigurationMode: AUTOMATIC")
        )
    if text(parameters, "s3ImportPath") and text(parameters, "deploymentType") == "PERSISTENT_2":
        fix = "link the bucket by a data repository association (infra/fsx.yaml)"
        wrong.append(("PERSISTENT_2 cannot be linked to S3 by the StorageClass", fix))
    fix = "make a new StorageClass: parameters cannot be changed; "
    return [Finding("storage", Grade.WARNING, f"{name}: {m}", fix + f) for m, f in wrong] or [
        Finding("storage", Grade.OK, f"{name}: PERSISTENT_2 with EFA")
    ]


async def _volumes(kube: Kube) -> list[Finding]:
    """Look at the claims that ModelDeployments of the namespace name."""
    try:
        models = await kube.list(MODEL_DEPLOYMENT, kube.namespace)
    except KindMissing:
        return []
    names = {text(m, "status", "volume", "claimName") for m in models} | {
        text(m, "spec", "volume", "existingClaim", "name") for m in models
    }
    return [
        finding for name in sorted(filter(None, names)) for finding in await _volume(kube, name)
    ]


async def _volume(kube: Kube, name: str) -> list[Finding]:
    claim = await kube.find(CLAIM, name, kube.namespace)
    check = f"claim {name}"
    if claim is None:
        return [Finding(check, Grade.PROBLEM, "does not exist", "create it, or correct the spec")]
    phase, volume_name = text(claim, "status", "phase"), text(claim, "spec", "volumeName")
    if phase != "Bound":
        fix = f"kubectl describe pvc -n {kube.namespace} {name}"
        return [Finding(check, Grade.PROBLEM, f"is {phase or 'not observed'}", fix)]
    try:
        volume = await kube.find(VOLUME, volume_name)
    except NoPermission:
        volume = None
    return [_volume_state(check, volume_name, volume)]


def _volume_state(check: str, name: str, volume: Mapping[str, Any] | None) -> Finding:
    bound = f"is bound to {name}"
    if text(volume, "spec", "csi", "driver") != DRIVER:
        return Finding(check, Grade.OK, bound)
    capacity = text(volume, "spec", "capacity", "storage")
    size = int(capacity[:-2]) if re.fullmatch(r"\d+Gi", capacity) else 0
    faults = [capacity_fault(size, tier, efa=True) for tier in TIERS]
    if all(faults):
        message = f"{bound}; {capacity} is no size of a file system with EFA: {faults[-1]}"
        fix = "correct spec.volume.static.capacityGiB, or expect loads over TCP"
        return Finding(check, Grade.WARNING, message, fix)
    return Finding(check, Grade.OK, f"{bound}, {capacity} of FSx")


async def _models(kube: Kube) -> list[Finding]:
    try:
        models = await kube.list(MODEL_DEPLOYMENT, kube.namespace)
    except KindMissing:
        return []
    return [_model_state(kube.namespace, model) for model in models]


def _model_state(namespace: str, model: Mapping[str, Any]) -> Finding:
    ready = condition_of(model, "Ready")
    check = f"model {name_of(model)}"
    if text(ready, "status") == "True":
        return Finding(check, Grade.OK, text(ready, "reason"))
    if not ready:
        fix = "see the operator's log; it may watch another namespace"
        return Finding(check, Grade.PROBLEM, "the operator has not looked at it", fix)
    reason = text(ready, "reason")
    fix = f"docs/troubleshooting.md has what to do about {reason}; headrace status -n {namespace}"
    message = f"{reason}: {text(ready, 'message')}"
    return Finding(check, Grade.WARNING, message, fix)


_CHECKS: tuple[Check, ...] = (
    _custom_resource,
    _operator,
    _permissions,
    _nodes,
    _gpu_sharing,
    _storage,
    _volumes,
    _models,
)
