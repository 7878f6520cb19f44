"""The bench's side of the cluster: its client, what it watches, and what it stands in for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import aiohttp

from headrace_operator.cluster.kinds import JOB, MODEL_DEPLOYMENT, POD, Kind
from headrace_operator.plan.names import OWNER_LABEL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from localkube import Cluster

ROOT = Path(__file__).parents[2]
SYSTEM = "headrace-system"
CONCURRENCY = 16
PER_NAMESPACE = 100
# What is known of pods and Jobs from their metadata does not need the rest of them, which is
# most of what an API server has to encode and this program to decode.
_METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"


class Kube:
    """The administrator's client."""

    def __init__(self, cluster: Cluster) -> None:
        context = ssl.create_default_context(cafile=str(cluster.authority))
        context.load_cert_chain(cluster.admin.certificate, cluster.admin.key)
        self._session = aiohttp.ClientSession(
            cluster.server,
            connector=aiohttp.TCPConnector(ssl=context, limit=4 * CONCURRENCY),
            timeout=aiohttp.ClientTimeout(total=None, sock_read=600),
            read_bufsize=2**21,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        content: str = "application/json",
        done: tuple[int, ...] = (),
    ) -> Any:
        """Return the answer; None also where the status is one of `done`."""
        for attempt in range(5):
            data = None if body is None else json.dumps(body)
            headers = {"Content-Type": content}
            async with self._session.request(method, path, data=data, headers=headers) as answer:
                found = await answer.json()
                if answer.status < 300:
                    return found
                if answer.status in done:
                    return None
                if answer.status not in (409, 429, 500) or attempt == 4:
                    raise SystemExit(f"{method} {path}: {answer.status}: {found.get('message')}")
            await asyncio.sleep(0.2 * 2**attempt)
        return None

    async def apply(self, body: dict[str, Any]) -> None:
        metadata = body["metadata"]
        path = MODEL_DEPLOYMENT.path(metadata["namespace"], metadata["name"])
        query = "?fieldManager=bench&force=true"
        await self.request("PATCH", path + query, body, "application/apply-patch+yaml")

    async def serves(self, kind: Kind) -> bool:
        async with self._session.get(kind.path() + "?limit=1") as answer:
            return answer.status == 200

    async def watch(
        self, kind: Kind, selector: str = "", accept: str = "application/json"
    ) -> AsyncIterator[tuple[str, Any]]:
        query = f"?watch=true&labelSelector={selector}"
        async with self._session.get(kind.path() + query, headers={"Accept": accept}) as answer:
            answer.raise_for_status()
            async for line in answer.content:
                event = json.loads(line)
                yield event["type"], event["object"]


@dataclass
class Seen:
    """What the watches have told: serving pods, when they came, and who is ready."""

    replicas: dict[str, int] = field(default_factory=dict)
    pods: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    complete_at: dict[str, float] = field(default_factory=dict)
    ready: set[str] = field(default_factory=set)

    def expect(self, key: str, replicas: int) -> None:
        self.replicas[key] = replicas
        self.complete_at.pop(key, None)
        self._check(key)

    def pod(self, event: str, pod: Any) -> None:
        metadata = pod["metadata"]
        key = f"{metadata['namespace']}/{metadata['labels'][OWNER_LABEL]}"
        if event == "DELETED":
            self.pods[key].discard(metadata["name"])
        elif metadata["name"] not in self.pods[key]:
            self.pods[key].add(metadata["name"])
            self._check(key)

    def resource(self, resource: Any) -> None:
        metadata = resource["metadata"]
        key = f"{metadata['namespace']}/{metadata['name']}"
        conditions = {c["type"]: c for c in resource.get("status", {}).get("conditions", [])}
        ready = conditions.get("Ready", {})
        current = ready.get("observedGeneration") == metadata["generation"]
        is_ready = current and ready.get("status") == "True"
        self.ready.add(key) if is_ready else self.ready.discard(key)

    def _check(self, key: str) -> None:
        if len(self.pods[key]) >= self.replicas.get(key, 1 << 30):
            self.complete_at.setdefault(key, time.monotonic())


async def prepare(cluster: Cluster, kube: Kube, kubeconfig: Path, deployments: int) -> None:
    """Install CRD and RBAC rules, write the kubeconfig of the operator, make the claims."""
    cluster.kubectl("create", "namespace", SYSTEM)
    shown = [f"--show-only=templates/{name}.yaml" for name in ("rbac", "serviceaccount")]
    chart = ROOT / "charts/headrace"
    manifest = cluster.run(
        [cluster.bin("helm"), "template", "headrace", chart, "-n", SYSTEM, *shown]
    )
    cluster.kubectl("apply", "-n", SYSTEM, "-f", "-", stdin=manifest)
    cluster.kubectl("apply", "--server-side", "-f", str(ROOT / "crds"))
    cluster.kubeconfig_of("headrace", SYSTEM, kubeconfig, duration="24h")
    await until(lambda: kube.serves(MODEL_DEPLOYMENT), 30, lambda: "the CRD is not served")
    await _add_claims(kube, 1 + deployments // PER_NAMESPACE)


async def _add_claims(kube: Kube, namespaces: int) -> None:
    """Make the namespaces, and in each a claim and a volume that bind."""
    for number in range(namespaces):
        namespace = f"bench-{number}"
        await kube.request("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
        spec = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
        volume = {
            "metadata": {"name": namespace},
            "spec": {
                **spec,
                "capacity": {"storage": "1Gi"},
                "hostPath": {"path": "/nowhere"},
                "claimRef": {"namespace": namespace, "name": "weights"},
            },
        }
        claim = {
            "metadata": {"name": "weights"},
            "spec": {**spec, "resources": {"requests": {"storage": "1Gi"}}},
        }
        await kube.request("POST", "/api/v1/persistentvolumes", volume)
        await kube.request("POST", f"/api/v1/namespaces/{namespace}/persistentvolumeclaims", claim)


@contextlib.asynccontextmanager
async def followed(kube: Kube, seen: Seen) -> AsyncIterator[None]:
    """Follow pods and ModelDeployments, and complete Jobs, while the block runs."""
    tasks = [asyncio.create_task(_forever(follow)) for follow in _followers(kube, seen)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _followers(kube: Kube, seen: Seen) -> list[Callable[[], Any]]:
    async def pods() -> None:
        serving = "app.kubernetes.io/component=serve"
        async for event, pod in kube.watch(POD, serving, _METADATA_ONLY):
            seen.pod(event, pod)

    async def resources() -> None:
        async for _, resource in kube.watch(MODEL_DEPLOYMENT):
            seen.resource(resource)

    async def jobs() -> None:
        running: set[asyncio.Task[Any]] = set()
        async for event, job in kube.watch(JOB, "", _METADATA_ONLY):
            if event == "ADDED":
                task = asyncio.create_task(_complete(kube, job))
                running.add(task)
                task.add_done_callback(running.discard)

    return [pods, resources, jobs]


async def _forever(follow: Callable[[], Any]) -> None:
    """Follow again whenever the API server ends a watch."""
    while True:
        with contextlib.suppress(aiohttp.ClientError):
            await follow()
        await asyncio.sleep(0.2)


async def _complete(kube: Kube, job: Any) -> None:
    """Write what the Job controller writes when the pod of a Job has succeeded."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    fields = {"status": "True", "lastTransitionTime": now, "lastProbeTime": now}
    status = {
        "startTime": now,
        "completionTime": now,
        "succeeded": 1,
        "ready": 0,
        "uncountedTerminatedPods": {},
        "conditions": [{"type": t, **fields} for t in ("SuccessCriteriaMet", "Complete")],
    }
    metadata = job["metadata"]
    path = JOB.path(metadata["namespace"], metadata["name"], "status")
    # A watch that begins again may tell of a Job as it was before this.
    await kube.request("PATCH", path, {"status": status}, "application/merge-patch+json", (422,))


def manifest(number: int, replicas: int) -> dict[str, Any]:
    return {
        "apiVersion": MODEL_DEPLOYMENT.api_version,
        "kind": MODEL_DEPLOYMENT.name,
        "metadata": {"name": f"model-{number}", "namespace": f"bench-{number // PER_NAMESPACE}"},
        "spec": {
            "replicas": replicas,
            "model": {"source": f"pvc://weights/model-{number}"},
            "volume": {"existingClaim": {"name": "weights"}},
            "loading": {"path": "Off"},
            "gpu": {"sharing": "None"},
            "engine": {"image": "vllm:cpu"},
        },
    }


async def until(
    check: Callable[[], Any], seconds: float, progress: Callable[[], str] = lambda: ""
) -> None:
    """Wait until `check`, which may be awaitable, returns something true."""
    deadline = time.monotonic() + seconds
    while True:
        found = check()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {seconds:g} s: {progress()}")
        await asyncio.sleep(0.05)
