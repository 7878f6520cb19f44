"""What loaders tell of themselves, asked through the API server.

A person's machine rarely reaches the pods' network, so the API server carries the request: by
the pod's `proxy` subresource, or where that is not allowed by `portforward`, which is what
`kubectl port-forward` needs.
"""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from headrace_cli.errors import CommandFailed, NoPermission, Unavailable
from headrace_cli.kube import Kube, Object
from headrace_operator.api.parts import LOADER_PORT
from headrace_operator.plan.objects import integer, items, mapping, name_of, text
from headrace_operator.plan.serving_pod import LOADER


async def ask_loader(kube: Kube, pod: Mapping[str, Any], path: str) -> Object:
    """Return the document that a pod's loader serves at `path`, such as /v1/status.

    Raises:
        CommandFailed: the loader does not run, does not answer, or may not be asked.
    """
    if not is_loader_running(pod):
        raise Unavailable(f"pod {name_of(pod)}: its loader does not run")
    try:
        content = await _by_proxy(kube, pod, path)
    except NoPermission as refused:
        content = await _by_forwarding(kube, pod, path, refused)
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise Unavailable(f"pod {name_of(pod)}: {path} is no document: is this a loader?")
    return answer


def is_loader_running(pod: Mapping[str, Any]) -> bool:
    """Whether a serving pod's loader container runs."""
    return any(
        text(status, "name") == LOADER and bool(mapping(status, "state", "running"))
        for status in items(pod, "status", "initContainerStatuses")
    )


def loader_port(pod: Mapping[str, Any]) -> int:
    """Return the port of a pod's loader."""
    containers = items(pod, "spec", "initContainers")
    loader = next((c for c in containers if text(c, "name") == LOADER), {})
    return next((integer(port, "containerPort") for port in items(loader, "ports")), LOADER_PORT)


async def _by_proxy(kube: Kube, pod: Mapping[str, Any], path: str) -> bytes:
    return await kube.read(f"{_path_of(pod)}:{loader_port(pod)}/proxy{path}")


async def _by_forwarding(
    kube: Kube, pod: Mapping[str, Any], path: str, refused: NoPermission
) -> bytes:
    port = loader_port(pod)
    request = f"GET {path} HTTP/1.0\r\nHost: {name_of(pod)}\r\n\r\n".encode()
    try:
        answer = await kube.forward(f"{_path_of(pod)}/portforward", port, request)
    except CommandFailed as error:
        raise NoPermission(
            f"pod {name_of(pod)}: its loader cannot be asked: {refused}; nor by port-forward: "
            f"{error}"
        ) from None
    head, _, body = answer.partition(b"\r\n\r\n")
    if f" {HTTPStatus.OK.value} ".encode() not in head.partition(b"\r\n")[0] + b" ":
        raise Unavailable(f"pod {name_of(pod)}: port {port} does not answer {path}")
    return body


def _path_of(pod: Mapping[str, Any]) -> str:
    namespace = quote(text(pod, "metadata", "namespace"), safe="")
    return f"/api/v1/namespaces/{namespace}/pods/{quote(name_of(pod), safe='')}"
