"""The few requests that localkube itself makes to the API server."""

from __future__ import annotations

import http.client
import json
import ssl
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from pathlib import Path

    from .pki import Credential

REQUEST_SECONDS = 10.0
# Short, so that one who polls notices early that the server has died.
POLL_SECONDS = 2.0


class Api:
    """A client with the administrator's certificate."""

    def __init__(self, server: str, authority: Path, credential: Credential) -> None:
        self._context = ssl.create_default_context(cafile=str(authority))
        self._context.load_cert_chain(credential.certificate, credential.key)
        parts = urlsplit(server)
        self._host, self._port = parts.hostname or "", parts.port

    def request(
        self, method: str, path: str, body: object = None, *, timeout: float = REQUEST_SECONDS
    ) -> tuple[int, Any]:
        """Return the status and the answer, decoded when it is JSON.

        Raises OSError or http.client.HTTPException when the server does not answer in time.
        """
        connection = http.client.HTTPSConnection(
            self._host, self._port, timeout=timeout, context=self._context
        )
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read()
            is_json = "json" in response.headers.get("Content-Type", "")
            return response.status, json.loads(data) if is_json else data.decode()
        finally:
            connection.close()

    def get(self, path: str) -> Any | None:  # noqa: ANN401 - any JSON document
        """Return what is at `path`, or None while the server does not answer 200."""
        try:
            status, answer = self.request("GET", path, timeout=POLL_SECONDS)
        except (OSError, http.client.HTTPException):
            return None
        return answer if status == http.client.OK else None
