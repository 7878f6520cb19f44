"""What an operator asks of the API server, by its audit log, and who uses the CPUs."""

from __future__ import annotations

import json
import os
import resource
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .cluster import SYSTEM

if TYPE_CHECKING:
    from localkube import Cluster

_WRITES = ("create", "update", "patch", "delete", "deletecollection")
_TICKS = os.sysconf("SC_CLK_TCK")
_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived", "ResponseStarted"],
    "rules": [
        {"level": "Metadata", "users": [f"system:serviceaccount:{SYSTEM}:headrace"]},
        {"level": "None"},
    ],
}


class Audit:
    """Counts the operator's requests by verb and resource, whatever it is written in."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._log = directory / "audit.log"
        self._policy = directory / "audit-policy.yaml"
        self._policy.write_text(yaml.safe_dump(_POLICY))
        self._offset = 0
        self._counts: Counter[str] = Counter()

    @property
    def flags(self) -> dict[str, str]:
        """Flags of the API server. A log that grows too large would be renamed."""
        return {
            "audit-policy-file": str(self._policy),
            "audit-log-path": str(self._log),
            "audit-log-maxsize": "4000",
        }

    def counts(self) -> Counter[str]:
        """Return the requests so far, for example {"patch modeldeployments/status": 3}."""
        if self._log.exists():
            with self._log.open("rb") as log:
                log.seek(self._offset)
                for line in log:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    self._counts[_request(json.loads(line))] += 1
        return self._counts.copy()


def _request(event: Any) -> str:
    what = event.get("objectRef") or {}
    parts = (what.get("resource", event["requestURI"]), what.get("subresource"))
    return f"{event['verb']} {'/'.join(filter(None, parts))}"


def writes(counts: Counter[str]) -> int:
    return sum(n for request, n in counts.items() if request.split()[0] in _WRITES)


def reads(counts: Counter[str]) -> int:
    """Return gets and listings; watches that the API server ends are no news."""
    return sum(n for request, n in counts.items() if request.split()[0] in ("get", "list"))


def written(counts: Counter[str]) -> dict[str, int]:
    """Return the writes by verb and resource, most first."""
    return {r: n for r, n in counts.most_common() if r.split()[0] in _WRITES}


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def cpu_of_all(cluster: Cluster, operator: int) -> Counter[str]:
    """Return the CPU seconds of Kubernetes' components, the operator and this program."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    found = {name: cpu_seconds(pid) for name, pid in cluster.status().items()}
    return Counter(
        {**found, "operator": cpu_seconds(operator), "bench": own.ru_utime + own.ru_stime}
    )
