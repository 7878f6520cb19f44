"""Reads a ModelDeployment and its pods, and waits for them with the progress shown."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workspace.errors import ToolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from localkube import Cluster

POLL_SECONDS = 1.0
LABEL = "headrace.dev/model-deployment"

Object = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """One ModelDeployment on a cluster."""

    cluster: Cluster
    name: str
    namespace: str = "default"

    def get(self, kind: str, name: str) -> Object:
        """Return one object of the model's namespace."""
        result: Object = json.loads(
            self.cluster.kubectl("get", kind, name, "-n", self.namespace, "-o", "json")
        )
        return result

    def read(self) -> Object:
        """Return the ModelDeployment."""
        return self.get("modeldeployment", self.name)

    def children(self, kind: str, component: str = "") -> list[Object]:
        """Return the model's children of a kind, "shard" or "serve" or both, oldest first."""
        selector = f"{LABEL}={self.name}"
        if component:
            selector += f",app.kubernetes.io/component={component}"
        command = ("get", kind, "-n", self.namespace, "-l", selector, "-o", "json")
        items: list[Object] = json.loads(self.cluster.kubectl(*command))["items"]
        return sorted(items, key=lambda item: item["metadata"]["creationTimestamp"])

    def conditions(self) -> dict[str, Object]:
        """Return the conditions by type; empty before the operator's first visit."""
        found = self.read().get("status", {}).get("conditions", ())
        return {condition["type"]: condition for condition in found}

    def wait(
        self,
        what: str,
        reached: Callable[[dict[str, Object]], bool],
        *,
        timeout: float,
        say: Callable[[str], None] = lambda _: None,
    ) -> dict[str, Object]:
        """Wait until the conditions satisfy `reached`; each change of one is said.

        Returns the conditions. Raises ToolError after `timeout` seconds, with the conditions.
        """
        deadline = time.monotonic() + timeout
        seen: dict[str, str] = {}
        while True:
            conditions = self.conditions()
            for kind, condition in conditions.items():
                line = f"{kind} {condition['status']} {condition['reason']}: {condition['message']}"
                if seen.get(kind) != line and not _repeats(kind, condition, conditions):
                    say(line)
                seen[kind] = line
            if reached(conditions):
                return conditions
            if time.monotonic() > deadline:
                lines = "\n".join(seen.values()) or "no conditions: the operator never came by"
                raise ToolError(f"{self.name}: {what} not reached in {timeout:g} s\n{lines}")
            time.sleep(POLL_SECONDS)

    def wait_true(self, kind: str, *, timeout: float, say: Callable[[str], None] = print) -> None:
        """Wait until a condition is True for the current generation."""

        def reached(conditions: dict[str, Object]) -> bool:
            return conditions.get(kind, {}).get("status") == "True"

        self.wait(f"{kind}=True", reached, timeout=timeout, say=say)


def wait_for(what: str, reached: Callable[[], bool], *, timeout: float) -> None:
    """Wait until `reached` tells so; raises ToolError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not reached():
        if time.monotonic() > deadline:
            raise ToolError(f"{what}: not reached in {timeout:g} s")
        time.sleep(POLL_SECONDS)


def _repeats(kind: str, condition: Object, conditions: dict[str, Object]) -> bool:
    """Tell whether this is the summary, which has not come true and quotes its cause."""
    others = (other["message"] for name, other in conditions.items() if name != kind)
    return kind == "Ready" and condition["status"] != "True" and condition["message"] in others
