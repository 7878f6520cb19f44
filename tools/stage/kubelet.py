"""Stands for a kubelet: pods are bound to nodes that only keep their leases."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headrace_operator.cluster.kinds import POD

if TYPE_CHECKING:
    from .client import Kube


def _time() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@dataclass
class Kubelet:
    """Writes the status a kubelet would write."""

    kube: Kube

    def write(self, pod: Any, status: dict[str, Any]) -> None:
        metadata = pod["metadata"]
        conditions = [c for c in pod["status"].get("conditions", []) if c["type"] == "PodScheduled"]
        body = {
            "status": {
                **status,
                "conditions": [*conditions, *status.get("conditions", [])],
                "startTime": _time(),
            }
        }
        self.kube.patch(POD, metadata["name"], metadata["namespace"], body, "status")

    def end_shard(self, pod: Any, exit_code: int, message: dict[str, Any] | None) -> None:
        """End the sharder's pod with its termination message."""
        ended = {"exitCode": exit_code, "reason": "Error" if exit_code else "Completed"}
        if message is not None:
            ended["message"] = json.dumps(message)
        status = self._container("shard", {"terminated": ended})
        phase = "Failed" if exit_code else "Succeeded"
        self.write(pod, {"phase": phase, "containerStatuses": [status]})

    def publish(self, pod: Any, total_bytes: int = 1024) -> None:
        message = {"reason": "Published", "message": "done", "totalBytes": total_bytes}
        self.end_shard(pod, 0, message)

    def waiting(self, pod: Any, container: str, reason: str, message: str) -> None:
        """Let a container wait for good."""
        state = {"waiting": {"reason": reason, "message": message}}
        field = "initContainerStatuses" if container == "loader" else "containerStatuses"
        self.write(pod, {"phase": "Pending", field: [self._container(container, state)]})

    def loading(self, pod: Any, **loader: Any) -> None:
        """The loader runs and holds no weights yet."""
        running = {"running": {"startedAt": _time()}}
        engine = self._container("engine", {"waiting": {"reason": "PodInitializing"}})
        status = {
            "phase": "Pending",
            "initContainerStatuses": [self._container("loader", running, **loader)],
            "containerStatuses": [engine],
        }
        self.write(pod, status)

    def serving(self, pod: Any, *, engine_ready: bool = True, **engine: Any) -> None:
        """The loader holds the weights; the engine runs."""
        running = {"running": {"startedAt": _time()}}
        now = {"lastTransitionTime": _time()}
        ready = {"type": "Ready", "status": "True" if engine_ready else "False", **now}
        status = {
            "phase": "Running",
            "conditions": [{"type": "Initialized", "status": "True", **now}, ready],
            "initContainerStatuses": [self._container("loader", running, ready=True, started=True)],
            "containerStatuses": [self._container("engine", running, ready=engine_ready, **engine)],
        }
        self.write(pod, status)

    def _container(self, name: str, state: dict[str, Any], **fields: Any) -> dict[str, Any]:
        base = {"name": name, "image": "x", "imageID": "", "ready": False, "restartCount": 0}
        return {**base, "state": state, **fields}
