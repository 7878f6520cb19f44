"""The administrator's client of the API server."""

from __future__ import annotations

import http.client
import json
import ssl
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from headrace_operator.cluster.kinds import Kind
    from localkube import Cluster

MERGE = "application/merge-patch+json"


class RefusedError(Exception):
    """The API server answered with an error; the text is its message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Kube:
    """The administrator's client."""

    Refused = RefusedError

    def __init__(self, cluster: Cluster) -> None:
        context = ssl.create_default_context(cafile=str(cluster.authority))
        context.load_cert_chain(cluster.admin.certificate, cluster.admin.key)
        self._context = context
        self._server = urlsplit(cluster.server)

    def request(
        self, method: str, path: str, body: Any = None, content_type: str = "application/json"
    ) -> Any:
        connection = http.client.HTTPSConnection(
            self._server.hostname or "", self._server.port, timeout=10, context=self._context
        )
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": content_type})
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        if response.status >= 400:
            raise RefusedError(response.status, answer.get("message", ""))
        return answer

    def create(self, kind: Kind, body: dict[str, Any], *, dry_run: bool = False) -> Any:
        path = kind.path(body["metadata"].get("namespace")) + "?fieldValidation=Strict"
        return self.request("POST", path + ("&dryRun=All" if dry_run else ""), body)

    def apply(self, kind: Kind, body: dict[str, Any]) -> Any:
        """Create an object, or make it so, as the test."""
        full = {"apiVersion": kind.api_version, "kind": kind.name, **body}
        path = kind.path(body["metadata"].get("namespace"), body["metadata"]["name"])
        query = "?fieldManager=test&force=true"
        return self.request("PATCH", path + query, full, "application/apply-patch+yaml")

    def get(self, kind: Kind, name: str, namespace: str | None = None) -> Any:
        """Return an object, or None."""
        try:
            return self.request("GET", kind.path(namespace, name))
        except RefusedError as error:
            if error.status == 404:
                return None
            raise

    def list(self, kind: Kind, namespace: str | None = None, selector: str = "") -> list[Any]:
        path = kind.path(namespace) + (f"?labelSelector={selector}" if selector else "")
        return list(self.request("GET", path)["items"])

    def patch(
        self,
        kind: Kind,
        name: str,
        namespace: str | None,
        changes: Any,
        subresource: str | None = None,
    ) -> Any:
        return self.request("PATCH", kind.path(namespace, name, subresource), changes, MERGE)

    def delete(self, kind: Kind, name: str, namespace: str | None = None) -> None:
        self.request("DELETE", kind.path(namespace, name))
