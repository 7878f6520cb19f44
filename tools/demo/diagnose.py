"""What a person needs when the demonstration fails: states, events, the operator's log."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from localkube import LocalkubeError

from .setup import NAMESPACE, RELEASE

if TYPE_CHECKING:
    from localkube import Cluster

QUESTIONS = (
    ("models", ("get", "modeldeployments", "-A", "-o", "wide")),
    ("conditions", ("describe", "modeldeployments", "-A")),
    ("pods", ("get", "pods", "-A", "-o", "wide")),
    ("jobs and deployments", ("get", "jobs,deployments,services", "-A")),
    ("events", ("get", "events", "-A", "--sort-by=.lastTimestamp")),
    ("operator", ("logs", "-n", NAMESPACE, f"deployment/{RELEASE}", "--tail=60")),
    ("engine", ("logs", "-l", "app.kubernetes.io/component=serve", "-c", "engine", "--tail=40")),
    ("loader", ("logs", "-l", "app.kubernetes.io/component=serve", "-c", "loader", "--tail=20")),
    ("sharder", ("logs", "-l", "app.kubernetes.io/component=shard", "--tail=20")),
)
SECONDS = 20.0


def diagnose(cluster: Cluster) -> str:
    """Return what the cluster tells about itself; parts that do not answer are left out."""
    if not cluster.kubeconfig.exists():
        return "the cluster is not up"
    parts = []
    for title, command in QUESTIONS:
        try:
            parts.append(f"--- {title}\n{cluster.kubectl(*command, timeout=SECONDS)}")
        except (LocalkubeError, subprocess.TimeoutExpired) as error:
            parts.append(f"--- {title}: {error}")
    return "\n".join(parts)
