"""One namespace, and what tests do there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from faults.life import model_deployment
from headrace_operator.cluster.kinds import (
    CLAIM,
    DEPLOYMENT,
    EVENT,
    JOB,
    MODEL_DEPLOYMENT,
    POD,
    VOLUME,
    Kind,
)

from .waiting import eventually

if TYPE_CHECKING:
    from .client import Kube


@dataclass
class World:
    """One namespace, with shortcuts for what tests do there."""

    kube: Kube
    namespace: str

    def add_claims(self, *names: str) -> None:
        """Make claims and volumes that bind."""
        for name in names:
            volume = f"{self.namespace}-{name}"
            spec = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
            reference = {"namespace": self.namespace, "name": name}
            self.kube.create(
                VOLUME,
                {
                    "metadata": {"name": volume},
                    "spec": {
                        **spec,
                        "capacity": {"storage": "1Gi"},
                        "hostPath": {"path": "/nowhere"},
                        "claimRef": reference,
                        "persistentVolumeReclaimPolicy": "Retain",
                    },
                },
            )
            self.kube.create(
                CLAIM,
                {
                    "metadata": {"name": name, "namespace": self.namespace},
                    "spec": {**spec, "resources": {"requests": {"storage": "1Gi"}}},
                },
            )

    def manifest(self, name: str = "tiny", **spec: Any) -> dict[str, Any]:
        return model_deployment(self.namespace, name, **spec)

    def create(self, name: str = "tiny", **spec: Any) -> Any:
        return self.kube.create(MODEL_DEPLOYMENT, self.manifest(name, **spec))

    def change(self, changes: Any, name: str = "tiny") -> Any:
        return self.kube.patch(MODEL_DEPLOYMENT, name, self.namespace, changes)

    def resource(self, name: str = "tiny") -> Any:
        return self.kube.get(MODEL_DEPLOYMENT, name, self.namespace)

    def conditions(self, name: str = "tiny") -> dict[str, dict[str, Any]]:
        status = self.resource(name).get("status", {})
        return {c["type"]: c for c in status.get("conditions", [])}

    def wait_condition(
        self, kind: str, status: str, reason: str | None = None, name: str = "tiny"
    ) -> dict[str, Any]:
        """Wait until a condition is about the current spec and has a status (and reason)."""

        def check() -> dict[str, Any] | None:
            resource = self.resource(name)
            found = {c["type"]: c for c in resource.get("status", {}).get("conditions", [])}
            condition = found.get(kind, {})
            assert condition.get("status") == status, found
            assert reason in (None, condition["reason"]), found
            assert condition["observedGeneration"] == resource["metadata"]["generation"], found
            return condition

        return eventually(check, f"{kind}={status} of {name}")

    def child(self, kind: Kind, name: str) -> Any:
        """Wait for a child."""
        return eventually(lambda: self.kube.get(kind, name, self.namespace), f"{kind.name} {name}")

    def jobs(self) -> list[Any]:
        return self.kube.list(JOB, self.namespace)

    def pods(self, component: str, name: str = "tiny") -> list[Any]:
        selector = f"headrace.dev/model-deployment={name},app.kubernetes.io/component={component}"
        pods = self.kube.list(POD, self.namespace, selector)
        return [p for p in pods if "deletionTimestamp" not in p["metadata"]]

    def wait_pods(self, component: str, count: int = 1, name: str = "tiny") -> list[Any]:
        def check() -> tuple[list[Any]] | None:
            pods = self.pods(component, name)
            return (pods,) if len(pods) == count else None

        return eventually(check, f"{count} {component} pods of {name}")[0]

    def events(self, name: str = "tiny") -> list[dict[str, Any]]:
        events = self.kube.list(EVENT, self.namespace)
        ours = (MODEL_DEPLOYMENT.name, name)
        return [
            e for e in events if (e["involvedObject"]["kind"], e["involvedObject"]["name"]) == ours
        ]

    def deployment(self, name: str = "tiny") -> Any:
        return self.kube.get(DEPLOYMENT, name, self.namespace)
