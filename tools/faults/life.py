"""Operators that can be killed, and the life they are disturbed in.

The operator here is the product's own store, informers, workers and resync in the
caller's event loop, with a client that goes through the fault proxy. What is missing is the
process and kopf, so that a kill costs milliseconds. The pods are
kwok's: every loader and engine is ready at once, every shard pod succeeds.
"""

import asyncio
import contextlib
import copy
import json
import ssl
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Self

import aiohttp
from kubernetes.aio.client import ApiClient, Configuration

from headrace_operator.cluster.api import Api
from headrace_operator.cluster.kinds import (
    CLAIM,
    CLAIM_TEMPLATE,
    DEPLOYMENT,
    DISRUPTION_BUDGET,
    JOB,
    MODEL_DEPLOYMENT,
    POD,
    SERVICE,
    VOLUME,
    WATCHED,
    Kind,
)
from headrace_operator.cluster.store import Store
from headrace_operator.errors import ApiError
from headrace_operator.health import Health
from headrace_operator.plan import Settings
from headrace_operator.reconcile import WORKERS, Reconciler
from headrace_operator.resync import PERIOD_SECONDS, Resync
from localkube import Cluster

from .proxy import Harm, Proxy, Request

REPLICA_SET = Kind("ReplicaSet", "apps", "v1", "replicasets")
NAMESPACE = Kind("Namespace", "", "v1", "namespaces", namespaced=False)
COUNTED = (JOB, DEPLOYMENT, SERVICE, REPLICA_SET)
CHILDREN = (*COUNTED, CLAIM, CLAIM_TEMPLATE, DISRUPTION_BUDGET, POD)
MERGE = "application/merge-patch+json"
WAIT_SECONDS = 420.0
LIFE_SECONDS = 600.0
FIRST_COMPLETED = asyncio.FIRST_COMPLETED
NAME = "tiny"
READY = "Ready"
WEIGHTS = (CLAIM.name, "weights")


@dataclass
class Kube:
    """The administrator's client, and watches of all that is there, which wake those who wait."""

    cluster: Cluster
    resources: dict[str, Any] = field(default_factory=dict)
    children: dict[str, dict[tuple[str, str], Any]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    made: dict[str, set[tuple[str, str, str]]] = field(default_factory=lambda: defaultdict(set))
    taken_back: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    async def __aenter__(self) -> Self:
        context = ssl.create_default_context(cafile=str(self.cluster.authority))
        context.load_cert_chain(self.cluster.admin.certificate, self.cluster.admin.key)
        self._session = aiohttp.ClientSession(
            self.cluster.server,
            connector=aiohttp.TCPConnector(ssl=context, limit=64),
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=2**21,
        )
        self._changed: dict[str, asyncio.Condition] = defaultdict(asyncio.Condition)
        kinds = (MODEL_DEPLOYMENT, *CHILDREN)
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
        return await self.request(
            "POST", kind.path(body["metadata"].get("namespace")) + query, body
        )

    async def list(self, kind: Kind, namespace: str | None = None) -> list[Any]:
        _, answer = await self.request("GET", kind.path(namespace))
        return list(answer["items"])

    async def change(self, namespace: str, spec: dict[str, Any]) -> None:
        path = MODEL_DEPLOYMENT.path(namespace, NAME)
        status, answer = await self.request("PATCH", path, {"spec": spec}, MERGE)
        assert status == 200, answer

    async def wait(self, namespace: str, check: Callable[[], object], what: str) -> None:
        """Wait for a check, which is asked again at every change of what is followed there."""
        changed = self._changed[namespace]
        try:
            async with asyncio.timeout(WAIT_SECONDS), changed:
                await changed.wait_for(check)
        except TimeoutError:
            raise AssertionError(f"{what}: not within {WAIT_SECONDS} s") from None

    async def _follow(self, kind: Kind) -> None:
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError, ValueError):
                async with self._session.get(kind.path() + "?watch=true") as answer:
                    answer.raise_for_status()
                    await self._forget(kind)
                    async for line in answer.content:
                        await self._take(kind, json.loads(line))
            await asyncio.sleep(0.2)

    async def _forget(self, kind: Kind) -> None:
        """A watch begins with all there is, and does not tell what went while there was none."""
        for namespace, there in list(self.children.items()):
            async with self._changed[namespace]:
                for key in [key for key in there if key[0] == kind.name]:
                    del there[key]
                self._changed[namespace].notify_all()

    async def _take(self, kind: Kind, event: dict[str, Any]) -> None:
        metadata = event["object"].get("metadata", {})
        namespace, name = metadata.get("namespace", ""), metadata.get("name", "")
        if event["type"] == "ERROR":
            return
        async with self._changed[namespace]:
            if kind is MODEL_DEPLOYMENT:
                self._take_resource(namespace, event)
            elif event["type"] == "DELETED":
                self.children[namespace].pop((kind.name, name), None)
            else:
                self.children[namespace][kind.name, name] = metadata
                if kind in COUNTED:
                    self.made[namespace].add((kind.name, name, metadata["uid"]))
            self._changed[namespace].notify_all()

    def _take_resource(self, namespace: str, event: dict[str, Any]) -> None:
        if event["type"] == "DELETED":
            self.resources.pop(namespace, None)
            return
        generation = event["object"]["metadata"]["generation"]
        was_ready = self.is_ready(namespace, generation)
        self.resources[namespace] = event["object"]
        if was_ready and not self.is_ready(namespace, generation):
            conditions = event["object"]["status"]["conditions"]
            self.taken_back[namespace] += [json.dumps(c) for c in conditions if c["type"] == READY]

    def is_ready(self, namespace: str, generation: int) -> bool:
        """Whether it is Ready, and said so of that generation of the spec."""
        return self._holds(namespace, READY, "True", generation)

    def is_settled(self, namespace: str, generation: int) -> bool:
        """Whether it is Ready, nothing is to do, nothing is going, nothing outlived its owner."""
        there = self.children[namespace].values()
        uids = {metadata["uid"] for metadata in there}
        uids.add(self.resources.get(namespace, {}).get("metadata", {}).get("uid"))
        return (
            self.is_ready(namespace, generation)
            and self._holds(namespace, "Reconciling", "False", generation)
            and all("deletionTimestamp" not in metadata for metadata in there)
            and all(o["uid"] in uids for m in there for o in m.get("ownerReferences", ()))
        )

    def _holds(self, namespace: str, kind: str, status: str, generation: int) -> bool:
        conditions = self.resources.get(namespace, {}).get("status", {}).get("conditions", [])
        found: dict[str, Any] = next((c for c in conditions if c["type"] == kind), {})
        return (found.get("status"), found.get("observedGeneration")) == (status, generation)

    def report(self, namespace: str) -> str:
        """Say what there is in a namespace, for a life that does not go on."""
        resource = self.resources.get(namespace, {})
        told = {"status": resource.get("status"), "generation": None, "deletionTimestamp": None}
        told |= {k: v for k, v in resource.get("metadata", {}).items() if k in told}
        going = {k: "deletionTimestamp" in m for k, m in self.children[namespace].items()}
        there = [f"{' '.join(k)}{' (going)' * going[k]}" for k in sorted(going)]
        return json.dumps({**told, "children": there})


def _now() -> datetime:
    return datetime.now(UTC)


def connect(proxy: Proxy, token: str) -> ApiClient:
    """Return a client that goes through a proxy."""
    configuration = Configuration(host=proxy.url)
    configuration.api_key["BearerToken"] = token
    configuration.api_key_prefix["BearerToken"] = "Bearer"
    # The proxy speaks plain HTTP, but without it each start reads all of the system's.
    configuration.ssl_ca_cert = str(proxy.authority)
    return ApiClient(configuration)


async def end(*tasks: asyncio.Task[Any]) -> list[Any]:
    """Cancel tasks until they have ended, and return what became of them.

    A cancellation that meets the end of a wait with a time limit can be lost (asyncio.wait_for
    before Python 3.12, in libraries); a process that is killed has no such choice.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=1)
    return await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class Operator:
    """The operator of one namespace, in this event loop, behind a proxy."""

    proxy: Proxy
    token: str
    namespace: str
    clock: Callable[[], datetime] = _now
    period: float = PERIOD_SECONDS
    starts: int = 0
    first_request: int = 0
    _tasks: list[asyncio.Task[Any]] = field(default_factory=list)
    _client: ApiClient | None = None

    async def start(self) -> None:
        """Start as the process does: list everything, then watch and work."""
        self.starts += 1
        self.first_request = len(self.proxy.requests)
        self.proxy.is_dead = False
        self._client = connect(self.proxy, self.token)
        api, store, self.health = Api(self._client), Store(WATCHED), Health()
        reconciler = Reconciler(api, store, Settings("loader:1"), self.health, clock=self.clock)
        self.resync = Resync(api, store, reconciler.queue, self.health, (self.namespace,))
        await self.resync.list_all()
        loops = [reconciler.work(n) for n in range(WORKERS)]
        loops += [informer.run(self.namespace) for informer in self.resync.informers]
        loops.append(self._resync())
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    async def _resync(self) -> None:
        while True:
            await asyncio.sleep(self.period)
            with contextlib.suppress(ApiError):
                await self.resync.cycle()

    async def kill(self) -> None:
        """End without another request; what it knew is lost."""
        self.proxy.is_dead = True
        self.proxy.cut()
        results = await end(*self._tasks)
        self._tasks = []
        if self._client is not None:
            await self._client.close()  # type: ignore[no-untyped-call]
            self._client = None
        broken = [r for r in results if isinstance(r, Exception)]
        assert not broken, broken

    async def keep_alive(self) -> None:
        """Start it, and start it again whenever it dies, as a kubelet would."""
        while True:
            self.died = asyncio.Event()
            starting = asyncio.create_task(self.start())
            dying = asyncio.create_task(self.died.wait())
            try:
                await asyncio.wait([starting, dying], return_when=FIRST_COMPLETED)
                if not self.died.is_set():
                    starting.result()
                await dying
            except ApiError:
                await asyncio.sleep(0.1)  # the process would end and be started again
            finally:
                await end(starting, dying)
            await self.kill()

    def die(self, *_: object) -> bool:
        """End within the current request."""
        self.proxy.is_dead = True
        self.died.set()
        return False


@dataclass
class Life:
    """A whole life: create, shard, serve, scale, roll, shard and roll, delete.

    `steps` are the changes of the spec after the first; `snapshot` is what there is before
    the deletion; `taken_back` are the conditions by which a ModelDeployment that was Ready no
    longer was, without a change of its spec.
    """

    kube: Kube
    namespace: str
    steps: tuple[dict[str, Any], ...] = (
        {"replicas": 2, "engine": {"args": ["--max-model-len", "128"]}},
        {"model": {"revision": "v2"}, "replicas": 1},
    )
    phase: str = "not created"
    snapshot: Any = None
    made: Any = None
    taken_back: Any = None

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
        status, answer = await self.kube.create(MODEL_DEPLOYMENT, model_deployment(self.namespace))
        assert status == 201, answer
        await self.ready(1)
        for generation, change in enumerate(self.steps, start=2):
            await self.kube.change(self.namespace, change)
            await self.ready(generation)
        await self.settle(len(self.steps) + 1)
        await self.kube.request("DELETE", MODEL_DEPLOYMENT.path(self.namespace, NAME))
        await self.gone()
        self.taken_back = self.kube.taken_back[self.namespace]
        self.phase = "gone"

    async def ready(self, generation: int) -> None:
        self.phase = f"generation {generation} not Ready"
        await self._wait(lambda: self.kube.is_ready(self.namespace, generation))

    async def settle(self, generation: int) -> None:
        """Take the snapshot once all that is stale is gone: it has to be the same twice."""
        self.phase, before = "not settled", None
        for _ in range(100):
            await self._wait(lambda: self.kube.is_settled(self.namespace, generation))
            self.snapshot = await self.take()
            if self.snapshot == before:
                break
            before = self.snapshot
            await asyncio.sleep(0.3)
        self.made = sorted((kind, name) for kind, name, _ in self.kube.made[self.namespace])

    async def _wait(self, check: Callable[[], object]) -> None:
        await self.kube.wait(self.namespace, check, f"{self.namespace}: {self.phase}")

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
        # Which claim and volume it is differs from namespace to namespace.
        volume = {"claimName": status["volume"]["claimName"]}
        return {**children, "status": {**status, "conditions": conditions, "volume": volume}}

    async def gone(self) -> None:
        """Wait until nothing is left but the claim, which was there before."""
        self.phase = "not gone"
        there = self.kube.children[self.namespace]
        while True:
            await self._wait(lambda: there.keys() <= {WEIGHTS})
            left = [
                (kind.name, o["metadata"]["name"])
                for kind in CHILDREN
                for o in await self.kube.list(kind, self.namespace)
            ]
            if left == [WEIGHTS]:
                return
            await asyncio.sleep(0.3)


def model_deployment(namespace: str, name: str = NAME, **spec: Any) -> dict[str, Any]:
    """Return a ModelDeployment without GPUs that uses a claim "weights", with more of the spec."""
    return {
        "apiVersion": MODEL_DEPLOYMENT.api_version,
        "kind": MODEL_DEPLOYMENT.name,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "model": {"source": "pvc://weights/llama"},
            "volume": {"existingClaim": {"name": "weights"}},
            "loading": {"path": "Off"},
            "gpu": {"sharing": "None"},
            "engine": {"image": "vllm:cpu"},
            **copy.deepcopy(spec),
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
class Scenario:
    """What goes wrong in a life. The functions get the operator concerned."""

    harm: Callable[[Operator, Request], Harm | None] = lambda *_: None
    events: Callable[[Operator, Request, Any], Awaitable[list[Any]]] | None = None
    operators: int = 1
    clock: Callable[[], datetime] = _now
    period: float = PERIOD_SECONDS
    meanwhile: Callable[[Operator], Any] | None = None


@dataclass
class Outcome:
    """How a life went: its end, or why there was none."""

    life: Life
    operators: list[Operator]
    error: BaseException | None = None


async def live(kube: Kube, token: str, name: str, scenario: Scenario) -> Outcome:
    """Live a life in a namespace of its own, each operator behind a proxy of its own."""
    outcome = Outcome(Life(kube, name), [])
    await outcome.life.prepare()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(scenario.operators):
            proxy = Proxy(kube.cluster.server, kube.cluster.authority)
            await stack.enter_async_context(proxy)
            operator = Operator(proxy, token, name, scenario.clock, scenario.period)
            proxy.harm = partial(scenario.harm, operator)
            if scenario.events is not None:
                proxy.events = partial(scenario.events, operator)
            outcome.operators.append(operator)
        tasks = [asyncio.create_task(o.keep_alive()) for o in outcome.operators]
        if scenario.meanwhile is not None:
            tasks += [asyncio.create_task(scenario.meanwhile(o)) for o in outcome.operators]
        living = asyncio.create_task(outcome.life.run())
        waited = asyncio.wait([living, *tasks], timeout=LIFE_SECONDS, return_when=FIRST_COMPLETED)
        done, _ = await waited
        if not done:
            outcome.error = AssertionError(f"{name}: still {outcome.life.phase}")
        for task in (living, *tasks):
            if task.done():
                outcome.error = outcome.error or task.exception()
            task.cancel()
        if outcome.error is not None:
            outcome.error.add_note(kube.report(name))
            for operator in outcome.operators:
                last = [f"{r.method} {r.path}" for r in operator.proxy.requests[-5:]]
                outcome.error.add_note(f"starts: {operator.starts}, last requests: {last}")
        await asyncio.gather(living, *tasks, return_exceptions=True)
        for operator in outcome.operators:
            await operator.kill()
    return outcome
