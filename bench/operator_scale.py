"""How soon, how cheaply and how quietly does the operator serve thousands of ModelDeployments?

    make bench-operator ARGS="--deployments 1000 --replicas 4"
    make bench-operator ARGS="--deployments 5000 --replicas 4"      # 20,000 pods

A real etcd, API server, controller-manager and scheduler; the nodes are kwok's, which calls
every pod ready at once. Two things are stood in for, so that the operator is measured and not
Kubernetes' Job controller, which waits a second on purpose: that controller is switched off,
and this program marks each shard Job complete when it sees it. The claims exist and are bound
by hand. The operator is a process of its own, as in its container, with its own RBAC rules.

1. `fill`: all ModelDeployments but the samples, as fast as they can be created.
2. `samples`: with those standing, one is applied every 1/RATE seconds. Its time runs from
   sending the apply until a watch has told of the last of its serving pods, so it includes the
   shard Job, the Deployment and Kubernetes' own Deployment and ReplicaSet controllers.
   `scale_to_pods` is the same for a change of spec.replicas.
3. `idle`: nothing changes; CPU time, writes and reads of the operator.
4. `restart`: SIGKILL; meanwhile ten ModelDeployments are scaled. Until the new process has
   visited every ModelDeployment and the ten have their pods.

The last line is JSON. A write is a PATCH, POST, PUT or DELETE, as the operator counts them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from headrace_operator.cluster.kinds import JOB, MODEL_DEPLOYMENT, POD, Kind
from headrace_operator.plan.names import OWNER_LABEL
from localkube import Cluster
from localkube.controlplane import free_port
from workspace.steps import Steps

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

ROOT = Path(__file__).parents[1]
SYSTEM = "headrace-system"
WRITES = ("PATCH", "POST", "PUT", "DELETE")
CONCURRENCY = 16
NAMESPACES = 10
RESTART_CHANGES = 10
TICKS = os.sysconf("SC_CLK_TCK")
MIB = 2**20


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options = parse()
    with tempfile.TemporaryDirectory(prefix="bench-operator-") as root:
        cluster = Cluster(Path(root, "cluster")).up(
            kwok=options.nodes, controller_manager={"controllers": "*,-job-controller"}
        )
        with cluster:
            result = asyncio.run(measure(options, cluster, Path(root)))
    print(json.dumps({**result, **surroundings()}), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deployments", type=int, default=1000)
    parser.add_argument("--replicas", type=int, default=4, help="pods of each")
    parser.add_argument("--samples", type=int, default=100, help="of them timed one by one")
    parser.add_argument("--rate", type=float, default=2.0, help="samples applied per second")
    parser.add_argument("--idle-seconds", type=float, default=180.0)
    parser.add_argument("--nodes", type=int, default=50)
    parser.add_argument("--profile", type=Path, help="write the operator's cProfile here")
    options = parser.parse_args()
    if not RESTART_CHANGES <= options.samples < options.deployments:
        parser.error(f"--samples: from {RESTART_CHANGES} to less than --deployments")
    return options


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
        self, method: str, path: str, body: Any = None, content: str = "application/json"
    ) -> Any:
        for attempt in range(5):
            data = None if body is None else json.dumps(body)
            headers = {"Content-Type": content}
            async with self._session.request(method, path, data=data, headers=headers) as answer:
                found = await answer.json()
                if answer.status < 300:
                    return found
                if answer.status not in (409, 429, 500) or attempt == 4:
                    raise SystemExit(f"{method} {path}: {answer.status}: {found.get('message')}")
            await asyncio.sleep(0.2 * 2**attempt)
        return None

    async def apply(self, body: dict[str, Any]) -> None:
        metadata = body["metadata"]
        path = MODEL_DEPLOYMENT.path(metadata["namespace"], metadata["name"])
        query = "?fieldManager=bench&force=true"
        await self.request("PATCH", path + query, body, "application/apply-patch+yaml")

    async def watch(self, kind: Kind, selector: str = "") -> AsyncIterator[tuple[str, Any]]:
        query = f"?watch=true&labelSelector={selector}"
        async with self._session.get(kind.path() + query) as answer:
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


@dataclass
class Operator:
    """The operator's process."""

    kubeconfig: Path
    log: Path
    profile: Path | None
    metrics_port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start it and return the time."""
        self.metrics_port = free_port("127.0.0.1")
        environment = {
            **os.environ,
            "KUBECONFIG": str(self.kubeconfig),
            "HEADRACE_LOADER_IMAGE": "loader:1",
            "HEADRACE_METRICS_PORT": str(self.metrics_port),
            "HEADRACE_LIVENESS_PORT": str(free_port("127.0.0.1")),
        }
        profiler = ["-m", "cProfile", "-o", str(self.profile)] if self.profile else []
        command = [sys.executable, *profiler, "-m", "headrace_operator"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stderr=log)
        return time.monotonic()

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(60)
            self.process = None

    async def numbers(self) -> dict[str, float]:
        """Return sums of the operator's metrics; empty before it serves them."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        try:
            async with aiohttp.ClientSession() as session, session.get(url) as answer:
                text = await answer.text()
        except aiohttp.ClientError:
            return {}
        found: dict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] += sample.value
                if sample.name == "headrace_operator_api_requests_total":
                    found[sample.labels["method"]] += sample.value
        return found

    async def writes(self) -> int:
        numbers = await self.numbers()
        return int(sum(numbers.get(method, 0) for method in WRITES))

    def cpu_seconds(self) -> float:
        fields = self._proc("stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def rss_mib(self, row: str = "VmRSS") -> float:
        line = next(line for line in self._proc("status").splitlines() if line.startswith(row))
        return int(line.split()[1]) * 1024 / MIB

    def _proc(self, name: str) -> str:
        assert self.process is not None
        return Path(f"/proc/{self.process.pid}/{name}").read_text()


async def measure(options: argparse.Namespace, cluster: Cluster, root: Path) -> dict[str, Any]:
    steps = Steps(total=6)
    operator = Operator(root / "kubeconfig", root / "operator.log", options.profile)
    async with Kube(cluster) as kube:
        with steps.step("CRD, RBAC, claims"):
            prepare(cluster, operator.kubeconfig)
            await add_claims(kube)
        seen = Seen()
        tasks = [asyncio.create_task(job) for job in followers(kube, seen)]
        operator.start()
        try:
            return await phases(options, kube, operator, seen, steps)
        except BaseException:
            print(operator.log.read_text()[-4000:], file=sys.stderr)
            raise
        finally:
            operator.kill(signal.SIGTERM if options.profile else signal.SIGKILL)
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)


async def phases(
    options: argparse.Namespace, kube: Kube, operator: Operator, seen: Seen, steps: Steps
) -> dict[str, Any]:
    count, filled = options.deployments, options.deployments - options.samples
    await until(lambda: operator.process.poll() is None, 5)
    with steps.step(f"fill: {filled} ModelDeployments of {options.replicas} replicas"):
        begun = time.monotonic()
        await fill(kube, seen, filled, options.replicas)
        await until(lambda: len(seen.ready) == filled, 7200, lambda: f"{len(seen.ready)} ready")
        fill_seconds = time.monotonic() - begun
        steps.say(f"all ready after {fill_seconds:.1f} s")
    with steps.step(f"{options.samples} applied one by one, {options.rate:g} per second"):
        names = range(filled, count)
        applied = await paced(kube, seen, names, options.replicas, options.rate)
        await until(lambda: len(seen.ready) == count, 600, lambda: f"{len(seen.ready)} ready")
        writes = await operator.writes()
        steps.say(f"apply to pods: {quantiles(applied)}; {writes / count:.1f} writes each")
    with steps.step("the same ones scaled"):
        scaled = await paced(kube, seen, names, options.replicas + 1, options.rate)
        await until(lambda: len(seen.ready) == count, 600, lambda: f"{len(seen.ready)} ready")
        steps.say(f"scale to pods: {quantiles(scaled)}")
    with steps.step(f"idle for {options.idle_seconds:g} s"):
        idle = await idling(operator, options.idle_seconds)
        steps.say(json.dumps(idle))
    with steps.step("restart"):
        restart, restart_writes = await restarting(kube, operator, seen, options)
        steps.say(f"{restart:.1f} s, {restart_writes} writes")
    peak = operator.rss_mib("VmHWM")
    return {
        "deployments": count,
        "pods": sum(map(len, seen.pods.values())),
        **rounded("apply_to_pods", applied),
        **rounded("scale_to_pods", scaled),
        "fill_seconds": round(fill_seconds, 1),
        "writes_per_deployment": round(writes / count, 2),
        **idle,
        "restart_converge_s": round(restart, 1),
        "restart_writes": restart_writes,
        "rss_mib": round(max(peak, idle["peak_rss_mib"])),
    }


def surroundings() -> dict[str, Any]:
    commit = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(commit, cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "load_average": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": found.stdout.strip(),
    }


def prepare(cluster: Cluster, kubeconfig: Path) -> None:
    """Install CRD and RBAC rules; write the kubeconfig of the operator's ServiceAccount."""
    cluster.kubectl("create", "namespace", SYSTEM)
    shown = [f"--show-only=templates/{name}.yaml" for name in ("rbac", "serviceaccount")]
    chart = ROOT / "charts/headrace"
    manifest = cluster.run(
        [cluster.bin("helm"), "template", "headrace", chart, "-n", SYSTEM, *shown]
    )
    cluster.kubectl("apply", "-n", SYSTEM, "-f", "-", stdin=manifest)
    cluster.kubectl("apply", "--server-side", "-f", str(ROOT / "crds"))
    crd = "crd/modeldeployments.headrace.dev"
    cluster.kubectl("wait", "--for=condition=Established", crd, "--timeout=20s")
    cluster.kubeconfig_of("headrace", SYSTEM, kubeconfig, duration="24h")


async def add_claims(kube: Kube) -> None:
    """Make the namespaces, and in each a claim and a volume that bind."""
    for number in range(NAMESPACES):
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


def followers(kube: Kube, seen: Seen) -> list[Any]:
    async def pods() -> None:
        async for event, pod in kube.watch(POD, "app.kubernetes.io/component=serve"):
            seen.pod(event, pod)

    async def resources() -> None:
        async for _, resource in kube.watch(MODEL_DEPLOYMENT):
            seen.resource(resource)

    async def jobs() -> None:
        running: set[asyncio.Task[Any]] = set()
        async for event, job in kube.watch(JOB):
            if event == "ADDED":
                task = asyncio.create_task(complete(kube, job))
                running.add(task)
                task.add_done_callback(running.discard)

    return [forever(follow) for follow in (pods, resources, jobs)]


async def forever(follow: Callable[[], Any]) -> None:
    """Follow again whenever the API server ends a watch, or does not serve it yet."""
    while True:
        with contextlib.suppress(aiohttp.ClientError):
            await follow()
        await asyncio.sleep(0.2)


async def complete(kube: Kube, job: Any) -> None:
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
    await kube.request("PATCH", path, {"status": status}, "application/merge-patch+json")


def manifest(number: int, replicas: int) -> dict[str, Any]:
    return {
        "apiVersion": MODEL_DEPLOYMENT.api_version,
        "kind": MODEL_DEPLOYMENT.name,
        "metadata": {"name": f"model-{number}", "namespace": f"bench-{number % NAMESPACES}"},
        "spec": {
            "replicas": replicas,
            "model": {"source": f"pvc://weights/model-{number}"},
            "volume": {"existingClaim": {"name": "weights"}},
            "loading": {"path": "Off"},
            "gpu": {"sharing": "None"},
            "engine": {"image": "vllm:cpu"},
        },
    }


async def apply(kube: Kube, seen: Seen, number: int, replicas: int) -> tuple[str, float]:
    """Apply one; return its key and when it was sent."""
    body = manifest(number, replicas)
    key = f"{body['metadata']['namespace']}/{body['metadata']['name']}"
    seen.ready.discard(key)
    seen.expect(key, replicas)
    sent = time.monotonic()
    await kube.apply(body)
    return key, sent


async def fill(kube: Kube, seen: Seen, count: int, replicas: int) -> None:
    numbers = iter(range(count))

    async def create() -> None:
        for number in numbers:
            await apply(kube, seen, number, replicas)

    await asyncio.gather(*(create() for _ in range(CONCURRENCY)))


async def paced(kube: Kube, seen: Seen, numbers: range, replicas: int, rate: float) -> list[float]:
    """Apply at a steady rate, whatever comes of it; return the seconds to the last pod of each."""
    begun, pending = time.monotonic(), []
    for index, number in enumerate(numbers):
        await asyncio.sleep(begun + index / rate - time.monotonic())
        pending.append(asyncio.create_task(apply(kube, seen, number, replicas)))
    sent = await asyncio.gather(*pending)
    await until(lambda: all(key in seen.complete_at for key, _ in sent), 600)
    return [seen.complete_at[key] - at for key, at in sent]


async def idling(operator: Operator, seconds: float) -> dict[str, Any]:
    """Wait until the last writes are done, then measure."""
    before = -1
    while before != (now := await operator.writes()):
        before = now
        await asyncio.sleep(5)
    numbers, cpu, begun = await operator.numbers(), operator.cpu_seconds(), time.monotonic()
    await asyncio.sleep(seconds)
    cpu, seconds = operator.cpu_seconds() - cpu, time.monotonic() - begun
    after = await operator.numbers()
    return {
        "idle_seconds": round(seconds),
        "idle_writes": int(sum(after[m] - numbers[m] for m in WRITES)),
        "idle_reads": int(after["GET"] - numbers["GET"]),
        "idle_core_percent": round(100 * cpu / seconds, 2),
        "idle_rss_mib": round(operator.rss_mib()),
        "peak_rss_mib": round(operator.rss_mib("VmHWM")),
    }


async def restarting(
    kube: Kube, operator: Operator, seen: Seen, options: argparse.Namespace
) -> tuple[float, int]:
    operator.kill(signal.SIGTERM if options.profile else signal.SIGKILL)
    last = range(options.deployments - RESTART_CHANGES, options.deployments)
    keys = [(await apply(kube, seen, n, options.replicas + 2))[0] for n in last]
    begun = operator.start()

    async def visited() -> int:
        numbers = await operator.numbers()
        if numbers.get("headrace_operator_queue_depth", 1):
            return 0
        return int(numbers["headrace_operator_reconcile_duration_seconds_count"])

    while await visited() < options.deployments or not all(k in seen.complete_at for k in keys):
        await asyncio.sleep(0.1)
        if time.monotonic() - begun > 1800:
            raise SystemExit("restart: not converged after 1800 s")
    return time.monotonic() - begun, await operator.writes()


async def until(
    check: Callable[[], bool], seconds: float, progress: Callable[[], str] = lambda: ""
) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {seconds:g} s: {progress()}")
        await asyncio.sleep(0.05)


def quantiles(values: list[float]) -> str:
    p50, p99 = (quantile(values, q) for q in (50, 99))
    return f"p50 {p50:.3f} s, p99 {p99:.3f} s, max {max(values):.3f} s"


def quantile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def rounded(name: str, values: list[float]) -> dict[str, float]:
    return {f"{name}_p{q}_s": round(quantile(values, q), 3) for q in (50, 99)}


if __name__ == "__main__":
    main()
