"""A real Kubernetes cluster on one Linux machine, from binaries built of pinned sources."""

from __future__ import annotations

from .cluster import Cluster
from .errors import LocalkubeError

__all__ = ["Cluster", "LocalkubeError"]
