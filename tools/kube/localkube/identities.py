"""Who may talk to a cluster's API server: kubeconfigs with certificates of its authority."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import InvalidInputError
from .kubeconfig import write_kubeconfig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .layout import Layout
    from .pki import Authority

LONGEST_NAME = 64


class Identities:
    """Issues kubeconfigs for users of the API server at the URL `server`."""

    def __init__(self, layout: Layout, authority: Authority, server: str) -> None:
        self._layout = layout
        self._server = server
        self.authority = authority

    def kubeconfig(self, user: str, groups: Sequence[str] = (), *, prefix: str = "") -> Path:
        """Write a kubeconfig for `user` in `groups` and return its path.

        RBAC alone decides what they may do. `prefix` keeps file names apart. Raises
        InvalidInputError when a name is longer than a certificate can hold.
        """
        for name in (user, *groups):
            if not 0 < len(name) <= LONGEST_NAME:
                raise InvalidInputError(
                    f"user or group {name!r}: has {len(name)} characters; a certificate holds "
                    f"1 to {LONGEST_NAME}"
                )
        name = prefix + user.replace(":", "-").replace("/", "-")
        return write_kubeconfig(
            self._layout.config / f"{name}.kubeconfig",
            server=self._server,
            authority=self.authority.credential.certificate,
            credential=self.authority.issue(name, user, groups),
        )
