"""One cluster for all faults, operators that can be killed, and the life they are disturbed in.

The operator in these tests is the product's own store, informers, workers and resync in the
test's event loop, with a client that goes through the fault proxy. What is missing is the
process and kopf, which test_processes.py has; so a kill costs milliseconds. The pods are
kwok's: every loader and engine is ready at once, every shard pod succeeds.
"""

import asyncio
import contextlib
import importlib.util
import json
import ssl
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from faultproxy import Harm, Proxy, Request
from kubernetes.aio.client import ApiClient, Configuration

from headrace_operator.cluster.api import Api
from headrace_operator.cluster.kinds import (
    CLAIM,
    CLAIM_TEMPLATE,
    DEPLOYMENT,
    JOB,
    MODEL_DEPLOYMENT,
    POD,
    SERVICE,
    VOLUME,
    WATCHED,
    Kind,
)
from headrace_operator.cluster.store import Store
from headrace_operator.health import Health
from headrace_operator.plan import Settings
from headrace_operator.reconcile import WORKERS, Reconciler
from headrace_operator.resync import Resync
from localkube import Cluster

REPLICA_SET = Kind("ReplicaSet", "apps", "v1", "replicasets")
NAMESPACE = Kind("Namespace", "", "v1", "namespaces", namespaced=False)
CHILDREN = (JOB, DEPLOYMENT, SERVICE, CLAIM, CLAIM_TEMPLATE, POD, REPLICA_SET)
MERGE = "application/merge-patch+json"
WAIT_SECONDS = 90.0
NAME = "tiny"


def _cluster_tests() -> Any:
    """The module of the fixtures beside this directory."""
    path = Path(__file__).parents[1] / "cluster/conftest.py"
    spec = importlib.util.spec_from_file_location("operator_cluster_conftest", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


beside = _cluster_tests()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("faults")).up(kwok=2) as cluster:
        cluster.kubectl("create", "namespace", beside.SYSTEM)
        beside.install_rbac(cluster)
        cluster.kubectl("apply", "--server-side", "-f", str(beside.CRD))
        condition = "--for=condition=Established"
        cluster.kubectl("wait", condition, "crd/modeldeployments.headrace.dev", "--timeout=20s")
        yield cluster


@pytest.fixture(scope="session")
def token(cluster: Cluster) -> str:
    """A token of the operator's ServiceAccount."""
    return cluster.kubectl("create", "token", "headrace", "-n", beside.SYSTEM).strip()


@dataclass
class Kube:
    """The administrator's client, and a watch that tells who waits for what."""

    cluster: Cluster
    resources: dict[str, Any] = field(default_factory=dict)
    made: dict[str, list[tuple[str, str, str]]] = field(default_factory=lambda: defaultdict(list))

    async def __aenter__(self) -> "Kube":
        context = ssl.create_default_context(cafile=str(self.cluster.authority))
        context.load_cert_chain(self.cluster.admin.certificate, self.cluster.admin.key)
        self._session = aiohttp.ClientSession(
            self.cluster.server,
            connector=aiohttp.TCPConnector(ssl=context, limit=64),
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=2**21,
        )
        self._changed = asyncio.Condition()
        kinds = (MODEL_DEPLOYMENT, JOB, DEPLOYMENT, SERVICE, REPLICA_SET)
        self._tasks = [asyncio.create_task(self._follow(kind)) for kind in kinds]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._session.close()

    async def request(
        self, method: str, path: str, body: Any = None, content: str = "application/json"
    ) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": content}
        for _ in range(100):
            try:
                async with self._session.request(
                    method, path, data=data, headers=headers
                ) as answer:
                    if answer.status < 500:
                        return answer.status, await answer.json()
            except (aiohttp.ClientError, OSError):
                pass
            await asyncio.sleep(0.1)
        raise AssertionError(f"{method} {path}: the API server does not come back")

    async def create(self, kind: Kind, body: dict[str, Any], query: str = "") -> tuple[int, Any]:
        return await self.request("POST", kind.path(body["metadata"].get("namespace")) + query, body)

    async def list(self, kind: Kind, namespace: str | None = None) -> list[Any]:
        _, answer = await self.request("GET", kind.path(namespace))
        return list(answer["items"])

    async def change(self, namespace: str, spec: dict[str, Any]) -> None:
        path = MODEL_DEPLOYMENT.path(namespace, NAME)
        status, answer = await self.request("PATCH", path, {"spec": spec}, MERGE)
        assert status == 200, answer

    async def wait(self, check: Callable[[], object], what: str) -> None:
        """Wait for a check, which is asked again at every change of anything followed."""
        try:
            async with asyncio.timeout(WAIT_SECONDS), self._changed:
                await self._changed.wait_for(check)
        except TimeoutError:
            raise AssertionError(f"{what}: not within {WAIT_SECONDS} s") from None

    async def _follow(self, kind: Kind) -> None:
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError, ValueError):
                async with self._session.get(kind.path() + "?watch=true") as answer:
                    answer.raise_for_status()
                    async for line in answer.content:
                        await self._take(kind, json.loads(line))
            await asyncio.sleep(0.2)

    async def _take(self, kind: Kind, event: dict[str, Any]) -> None:
        metadata = event["object"].get("metadata", {})
        namespace = metadata.get("namespace", "")
        if kind is not MODEL_DEPLOYMENT:
            entry = (kind.name, metadata.get("name", ""), metadata.get("uid", ""))
            if event["type"] == "ADDED" and entry not in self.made[namespace]:
                self.made[namespace].append(entry)
            return
        async with self._changed:
            if event["type"] == "DELETED":
                self.resources.pop(namespace, None)
            elif event["type"] != "ERROR":
                self.resources[namespace] = event["object"]
            self._changed.notify_all()

    def is_ready(self, namespace: str, generation: int) -> bool:
        resource = self.resources.get(namespace, {})
        conditions = {c["type"]: c for c in resource.get("status", {}).get("conditions", [])}
        ready = conditions.get("Ready", {})
        return ready.get("status") == "True" and ready.get("observedGeneration") == generation


@pytest.fixture
async def kube(cluster: Cluster) -> AsyncIterator[Kube]:
    async with Kube(cluster) as client:
        yield client


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass
class Operator:
    """The operator of one namespace, in this event loop, behind a proxy."""

    proxy: Proxy
    token: str
    namespace: str | None
    clock: Callable[[], datetime] = _now
    starts: int = 0
    _tasks: list[asyncio.Task[Any]] = field(default_factory=list)

    async def start(self) -> None:
        """Start as the process does: list everything, then watch and work."""
        self.starts += 1
        self.proxy.is_dead = False
        configuration = Configuration(host=self.proxy.url)
        configuration.api_key["BearerToken"] = self.token
        configuration.api_key_prefix["BearerToken"] = "Bearer"
        self._client = ApiClient(configuration)
        api, store, self.health = Api(self._client), Store(WATCHED), Health()
        reconciler = Reconciler(api, store, Settings("loader:1"), self.health, clock=self.clock)
        self.resync = Resync(api, store, reconciler.queue, self.health, self.namespace)
        await self.resync.list_all()
        loops = [reconciler.work(n) for n in range(WORKERS)]
        loops += [informer.run() for informer in self.resync.informers]
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    async def kill(self) -> None:
        """End without another request; what it knew is lost."""
        self.proxy.is_dead = True
        self.proxy.cut()
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await self._client.close()
        broken = [r for r in results if isinstance(r, Exception)]
        assert not broken, broken

    async def keep_alive(self) -> None:
        """Start it, and start it again whenever `deaths` says so, as a kubelet would."""
        while True:
            died = asyncio.Event()
            self.died = died
            try:
                await self.start()
                await died.wait()
            except Exception as error:  # noqa: BLE001 - the process would end and start again
                if not isinstance(error, RuntimeError) and "headrace" not in type(error).__module__:
                    raise
            finally:
                await self.kill()

    def die(self) -> None:
        """End within the current request."""
        self.proxy.is_dead = True
        self.died.set()


@dataclass
class Life:
    """A whole life: create, shard, serve, scale, roll, shard and roll, delete.

    `steps` are the changes of the spec after the first; `snapshot` is what there is before
    the deletion.
    """

    kube: Kube
    namespace: str
    steps: tuple[dict[str, Any], ...] = (
        {"replicas": 2, "engine": {"args": ["--max-model-len", "128"]}},
        {"model": {"revision": "v2"}, "replicas": 1},
    )
    snapshot: Any = None
    made: Any = None

    async def prepare(self) -> None:
        await self.kube.create(NAMESPACE, {"metadata": {"name": self.namespace}})
        spec = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
        reference = {"namespace": self.namespace, "name": "weights"}
        volume = {
            **spec,
            "capacity": {"storage": "1Gi"},
            "hostPath": {"path": "/nowhere"},
            "claimRef": reference,
        }
        await self.kube.create(VOLUME, {"metadata": {"name": self.namespace}, "spec": volume})
        claim = {**spec, "resources": {"requests": {"storage": "1Gi"}}}
        await self.kube.create(CLAIM, {"metadata": reference, "spec": claim})

    async def run(self) -> None:
        status, answer = await self.kube.create(MODEL_DEPLOYMENT, self.manifest())
        assert status == 201, answer
        await self.ready(1)
        for generation, change in enumerate(self.steps, start=2):
            await self.kube.change(self.namespace, change)
            await self.ready(generation)
        await self.settle()
        await self.kube.request("DELETE", MODEL_DEPLOYMENT.path(self.namespace, NAME))
        await self.gone()

    async def ready(self, generation: int) -> None:
        what = f"{self.namespace}: generation {generation} Ready"
        try:
            await self.kube.wait(lambda: self.kube.is_ready(self.namespace, generation), what)
        except AssertionError as error:
            status = self.kube.resources.get(self.namespace, {}).get("status")
            raise AssertionError(f"{error}: {json.dumps(status)}") from None

    async def settle(self) -> None:
        """Take the snapshot once stale children are gone: it has to be the same twice."""
        before = None
        for _ in range(100):
            self.snapshot = await self.take()
            if self.snapshot == before:
                break
            before = self.snapshot
            await asyncio.sleep(0.3)
        self.made = sorted((kind, name) for kind, name, _ in self.kube.made[self.namespace])

    async def take(self) -> Any:
        children = {}
        for kind in CHILDREN:
            found = [normal(kind, o) for o in await self.kube.list(kind, self.namespace)]
            children[kind.name] = sorted(found, key=json.dumps)
        status = self.kube.resources[self.namespace]["status"]
        conditions = [
            {k: c[k] for k in ("type", "status", "reason", "observedGeneration")}
            for c in status["conditions"]
        ]
        return {**children, "status": {**status, "conditions": conditions}}

    async def gone(self) -> None:
        """Wait until nothing is left but the claim, which was there before."""
        left: Any = None
        for _ in range(int(WAIT_SECONDS / 0.3)):
            left = [
                (kind.name, o["metadata"]["name"])
                for kind in CHILDREN
                for o in await self.kube.list(kind, self.namespace)
            ]
            if left == [("PersistentVolumeClaim", "weights")]:
                return
            await asyncio.sleep(0.3)
        raise AssertionError(f"{self.namespace}: left over: {left}")

    def manifest(self) -> dict[str, Any]:
        return {
            "apiVersion": MODEL_DEPLOYMENT.api_version,
            "kind": MODEL_DEPLOYMENT.name,
            "metadata": {"name": NAME, "namespace": self.namespace},
            "spec": {
                "model": {"source": "pvc://weights/llama"},
                "volume": {"existingClaim": {"name": "weights"}},
                "loading": {"path": "Off"},
                "gpu": {"sharing": "None"},
                "engine": {"image": "vllm:cpu"},
            },
        }


def normal(kind: Kind, body: Any) -> Any:
    """What of a child has to be the same after every fault."""
    metadata = body["metadata"]
    volatile = ("controller-uid", "batch.kubernetes.io/controller-uid", "job-name")
    labels = {k: v for k, v in metadata.get("labels", {}).items() if k not in volatile}
    named = {} if kind is POD else {"name": metadata["name"]}
    kept = {"labels": labels, "annotations": metadata.get("annotations", {}), **named}
    if kind is DEPLOYMENT:
        return {**kept, "spec": body["spec"], "replicas": body["status"].get("readyReplicas")}
    if kind is POD:
        return {**kept, "phase": body["status"]["phase"]}
    if kind is JOB:
        return {**kept, "succeeded": body["status"].get("succeeded")}
    return kept


@dataclass
class Disturbance:
    """Runs lives side by side, each in a namespace and with a proxy and an operator of its own."""

    kube: Kube
    cluster: Cluster
    token: str
    count: int = 0

    async def live(
        self,
        name: str,
        harm: Callable[[Operator, Request], Harm | None] = lambda *_: None,
        events: Callable[[Operator, Request, Any], list[Any]] = lambda _o, _r, event: [event],
        operators: int = 1,
        clock: Callable[[], datetime] = _now,
        meanwhile: Callable[[Operator], Any] | None = None,
    ) -> tuple[Life, list[Operator]]:
        self.count += 1
        life = Life(self.kube, f"{name}-{self.count}")
        await life.prepare()
        async with contextlib.AsyncExitStack() as stack:
            made: list[Operator] = []
            for _ in range(operators):
                proxy = Proxy(self.cluster.server, self.cluster.authority)
                await stack.enter_async_context(proxy)
                operator = Operator(proxy, self.token, life.namespace, clock)
                proxy.harm = lambda request, operator=operator: harm(operator, request)
                proxy.events = lambda request, event, operator=operator: events(
                    operator, request, event
                )
                made.append(operator)
            tasks = [asyncio.create_task(operator.keep_alive()) for operator in made]
            if meanwhile is not None:
                tasks += [asyncio.create_task(meanwhile(operator)) for operator in made]
            living = asyncio.create_task(life.run())
            try:
                await asyncio.wait([living, *tasks], return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    if task.done():
                        task.result()
                await living
            finally:
                for task in (living, *tasks):
                    task.cancel()
                await asyncio.gather(living, *tasks, return_exceptions=True)
        return life, made


@pytest.fixture
async def disturbance(kube: Kube, cluster: Cluster, token: str) -> Disturbance:
    return Disturbance(kube, cluster, token)
