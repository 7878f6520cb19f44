"""Kubeconfig files. JSON is YAML, so the standard library is enough to write them."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

from .files import write_private

if TYPE_CHECKING:
    from pathlib import Path

    from .pki import Credential


def write_kubeconfig(
    path: Path, *, server: str, authority: Path, credential: Credential | str
) -> Path:
    """Write a kubeconfig with everything embedded and return `path`.

    `credential` is a client certificate, or a bearer token.
    """

    def embedded(file: Path) -> str:
        return base64.b64encode(file.read_bytes()).decode()

    if isinstance(credential, str):
        user = {"token": credential}
    else:
        user = {
            "client-certificate-data": embedded(credential.certificate),
            "client-key-data": embedded(credential.key),
        }
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": "localkube",
                "cluster": {"server": server, "certificate-authority-data": embedded(authority)},
            }
        ],
        "users": [{"name": "localkube", "user": user}],
        "contexts": [
            {"name": "localkube", "context": {"cluster": "localkube", "user": "localkube"}}
        ],
        "current-context": "localkube",
    }
    write_private(path, json.dumps(config, indent=2))
    return path
