"""Tells the cluster what was verified: labels of the Node, and a NodeFeature where there are any.

By server-side apply with a field manager of its own, so it owns these labels and no others. The
token is the pod's; the standard library suffices for two requests.
"""

import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any

from headrace_node.errors import PublishFailed
from headrace_node.facts import Facts

GDS_LABEL = "headrace.dev/gds"
EFA_LABEL = "headrace.dev/efa-interfaces"
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_MANAGER = "headrace-node"
_SECONDS = 10.0
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where the API server is, and what to show there."""

    server: str
    token: str
    authority: str
    namespace: str

    @classmethod
    def of_pod(cls, environment: Mapping[str, str] = os.environ) -> "Cluster":
        """Return the cluster that this pod runs in; raises PublishFailed outside of one."""
        host, port = (environment.get(f"KUBERNETES_SERVICE_{key}", "") for key in ("HOST", "PORT"))
        try:
            token = (_ACCOUNT / "token").read_text().strip()
            namespace = (_ACCOUNT / "namespace").read_text().strip()
        except OSError as error:
            raise PublishFailed(f"--publish: {error}; run it in a pod with a token") from None
        host = f"[{host}]" if ":" in host else host
        return cls(f"https://{host}:{port}", token, str(_ACCOUNT / "ca.crt"), namespace)


def labels(facts: Facts) -> dict[str, str]:
    """Return the labels that say what was verified."""
    word = facts.gds if facts.is_supported else "unsupported"
    return {GDS_LABEL: word, EFA_LABEL: str(len(facts.efa_nids))}


def publish(cluster: Cluster, node: str, facts: Facts) -> None:
    """Label the node, and apply its NodeFeature.

    Raises:
        PublishFailed: the API server refuses or cannot be reached.
    """
    found = labels(facts)
    metadata = {"name": node, "labels": found}
    body: dict[str, Any] = {"apiVersion": "v1", "kind": "Node", "metadata": metadata}
    _apply(cluster, f"/api/v1/nodes/{node}", body)
    _node_feature(cluster, node, found)


def _node_feature(cluster: Cluster, node: str, found: Mapping[str, str]) -> None:
    name, group = f"headrace-{node}", "nfd.k8s-sigs.io/v1alpha1"
    own = {"nfd.node.kubernetes.io/node-name": node}
    body = {
        "apiVersion": group,
        "kind": "NodeFeature",
        "metadata": {"name": name, "namespace": cluster.namespace, "labels": own},
        "spec": {"labels": dict(found)},
    }
    path = f"/apis/{group}/namespaces/{cluster.namespace}/nodefeatures/{name}"
    try:
        _apply(cluster, path, body)
    except _KindMissing:
        return


class _KindMissing(PublishFailed):
    """The cluster has no such kind."""


def _apply(cluster: Cluster, path: str, body: Mapping[str, Any]) -> None:
    request = urllib.request.Request(  # noqa: S310 - https alone, from the pod's environment
        f"{cluster.server}{path}?fieldManager={_MANAGER}&force=true",
        data=json.dumps(body).encode(),
        method="PATCH",
        headers={
            "Authorization": f"Bearer {cluster.token}",
            "Content-Type": "application/apply-patch+yaml",
        },
    )
    try:
        context = ssl.create_default_context(cafile=cluster.authority)
        with urllib.request.urlopen(request, timeout=_SECONDS, context=context) as response:  # noqa: S310
            response.read(_MAX_BYTES)
    except urllib.error.HTTPError as error:
        raise _refused(path, error) from None
    except (OSError, ValueError, HTTPException) as error:
        raise PublishFailed(f"PATCH {path}: {error}; check the network to the API server") from None


def _refused(path: str, error: urllib.error.HTTPError) -> PublishFailed:
    with error:
        content = error.read(_MAX_BYTES)
    try:
        message = str(json.loads(content)["message"])
    except (ValueError, KeyError, TypeError):
        message = content[:200].decode(errors="replace").strip()
    if error.code == HTTPStatus.NOT_FOUND and b'"Status"' not in content:
        return _KindMissing(path)
    return PublishFailed(f"PATCH {path}: {error.code}: {message}")
