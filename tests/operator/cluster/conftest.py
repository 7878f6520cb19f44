"""A real API server with the operator as a process of its own, under its real RBAC rules.

There is no kubelet: pods are bound to a node that only keeps its lease (kwok without pod
stages), and `Kubelet` writes what a kubelet would write into their status.
"""

import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest
import yaml

from faults.life import model_deployment
from headrace_operator.cluster.kinds import (
    CLAIM,
    DEPLOYMENT,
    EVENT,
    GROUP_SET,
    JOB,
    MODEL_DEPLOYMENT,
    POD,
    VOLUME,
    Kind,
)
from localkube import Cluster
from localkube.kwok import DEFAULT_STAGES
from localkube.sources import source

ROOT = Path(__file__).parents[3]
CRD = ROOT / "crds/modeldeployments.headrace.dev.yaml"
CHART = ROOT / "charts/headrace"
SYSTEM = "headrace-system"
MERGE = "application/merge-patch+json"
WAIT_SECONDS = 40.0
T = TypeVar("T")


class RefusedError(Exception):
    """The API server answered with an error; the text is its message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Kube:
    """The administrator's client."""

    Refused = RefusedError

    def __init__(self, cluster: Cluster) -> None:
        context = ssl.create_default_context(cafile=str(cluster.authority))
        context.load_cert_chain(cluster.admin.certificate, cluster.admin.key)
        self._context = context
        self._server = urlsplit(cluster.server)

    def request(
        self, method: str, path: str, body: Any = None, content_type: str = "application/json"
    ) -> Any:
        connection = http.client.HTTPSConnection(
            self._server.hostname or "", self._server.port, timeout=10, context=self._context
        )
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": content_type})
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        if response.status >= 400:
            raise RefusedError(response.status, answer.get("message", ""))
        return answer

    def create(self, kind: Kind, body: dict[str, Any], *, dry_run: bool = False) -> Any:
        path = kind.path(body["metadata"].get("namespace")) + "?fieldValidation=Strict"
        return self.request("POST", path + ("&dryRun=All" if dry_run else ""), body)

    def apply(self, kind: Kind, body: dict[str, Any]) -> Any:
        """Create an object, or make it so, as the test."""
        full = {"apiVersion": kind.api_version, "kind": kind.name, **body}
        path = kind.path(body["metadata"].get("namespace"), body["metadata"]["name"])
        query = "?fieldManager=test&force=true"
        return self.request("PATCH", path + query, full, "application/apply-patch+yaml")

    def get(self, kind: Kind, name: str, namespace: str | None = None) -> Any:
        """Return an object, or None."""
        try:
            return self.request("GET", kind.path(namespace, name))
        except RefusedError as error:
            if error.status == 404:
                return None
            raise

    def list(self, kind: Kind, namespace: str | None = None, selector: str = "") -> list[Any]:
        path = kind.path(namespace) + (f"?labelSelector={selector}" if selector else "")
        return list(self.request("GET", path)["items"])

    def patch(
        self,
        kind: Kind,
        name: str,
        namespace: str | None,
        changes: Any,
        subresource: str | None = None,
    ) -> Any:
        return self.request("PATCH", kind.path(namespace, name, subresource), changes, MERGE)

    def delete(self, kind: Kind, name: str, namespace: str | None = None) -> None:
        self.request("DELETE", kind.path(namespace, name))


def eventually(check: Callable[[], T | None], what: str, seconds: float = WAIT_SECONDS) -> T:
    """Return the first true result of a check; AssertionErrors of the check count as not yet."""
    deadline = time.monotonic() + seconds
    last: object = None
    while time.monotonic() < deadline:
        try:
            last = result = check()
            if result:
                return result
        except AssertionError as error:
            last = error
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {seconds} s; last: {last}")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Operator:
    """The operator's process; `environment` is used at the next start."""

    kubeconfig: Path
    log: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.liveness_port = 0
        self.metrics_port = 0

    def start(self) -> None:
        assert self.process is None
        self.liveness_port, self.metrics_port = free_port(), free_port()
        environment = {
            **{k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH")},
            "KUBECONFIG": str(self.kubeconfig),
            "HEADRACE_LOADER_IMAGE": "loader:1",
            "HEADRACE_STATIC_VOLUMES": '{"*": ["*"]}',
            "HEADRACE_ALLOWED_POD_FIELDS": "serviceAccountName",
            "HEADRACE_LIVENESS_PORT": str(self.liveness_port),
            "HEADRACE_METRICS_PORT": str(self.metrics_port),
            **self.environment,
        }
        start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "headrace_operator"], env=environment, stderr=log
            )
        eventually(lambda: b"serving" in self.log.read_bytes()[start:], "start of the operator")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        assert self.process is not None
        self.process.send_signal(how)
        status = self.process.wait(timeout=30)
        self.process = None
        return status

    def text(self, port: int, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def entries(self) -> list[dict[str, Any]]:
        """Return the log records."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def node_stages(path: Path) -> Path:
    """Write kwok's stages for nodes, and the one that lets deleted pods go."""
    stages = [s for s in yaml.safe_load_all(DEFAULT_STAGES.read_text()) if s]
    kept = [
        s
        for s in stages
        if s["spec"]["resourceRef"]["kind"] == "Node" or s["metadata"]["name"] == "pod-delete"
    ]
    path.write_text(yaml.safe_dump_all(kept))
    return path


def install_rbac(cluster: Cluster, **values: str) -> None:
    """Install the chart's ServiceAccount and RBAC rules, and nothing else of it."""
    sets = [f"--set={name}={value}" for name, value in values.items()]
    sets.append('--set-json=staticVolumes={"*": ["*"]}')
    shown = [f"--show-only=templates/{name}.yaml" for name in ("rbac", "serviceaccount")]
    manifest = cluster.run(
        [cluster.bin("helm"), "template", "headrace", CHART, "-n", SYSTEM, *sets, *shown]
    )
    cluster.kubectl("apply", "-n", SYSTEM, "-f", "-", stdin=manifest)


def token_kubeconfig(cluster: Cluster, path: Path) -> Path:
    """Write a kubeconfig with a token of the operator's ServiceAccount."""
    return cluster.kubeconfig_of("headrace", SYSTEM, path)


@pytest.fixture(scope="session")
def audit_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the API server writes down each request of the operator."""
    return tmp_path_factory.mktemp("audit") / "requests.jsonl"


def audit_flags(log: Path) -> dict[str, str]:
    """Return the API server's flags for a log of what the operator's account does."""
    account = f"system:serviceaccount:{SYSTEM}:headrace"
    rules = [{"level": "Metadata", "users": [account]}, {"level": "None"}]
    policy = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": rules}
    path = log.with_name("policy.yaml")
    path.write_text(yaml.safe_dump(policy | {"omitStages": ["RequestReceived"]}))
    return {"audit-policy-file": str(path), "audit-log-path": str(log)}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, audit_log: Path) -> Iterator[Cluster]:
    """A cluster with the operator's account and rules, but without the CRD."""
    directory = tmp_path_factory.mktemp("cluster")
    stages = node_stages(tmp_path_factory.mktemp("kwok") / "stages.yaml")
    made = Cluster(directory).up(
        kwok=1,
        kwok_stages=stages,
        api_server=audit_flags(audit_log),
        controller_manager={"horizontal-pod-autoscaler-sync-period": "1s"},
    )
    with made as cluster:
        cluster.kubectl("create", "namespace", SYSTEM)
        install_rbac(cluster)
        yield cluster


@pytest.fixture(scope="session")
def kubeconfig(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_kubeconfig(cluster, tmp_path_factory.mktemp("operator") / "kubeconfig")


@pytest.fixture(scope="session")
def without_crd(cluster: Cluster, kubeconfig: Path) -> subprocess.CompletedProcess[str]:
    """How an operator ended that was started before the CRD was there."""
    environment = {"KUBECONFIG": str(kubeconfig), "HEADRACE_LOADER_IMAGE": "loader:1"}
    return subprocess.run(
        [sys.executable, "-m", "headrace_operator"],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="session")
def kube(cluster: Cluster, without_crd: object) -> Kube:
    """The administrator's client of the cluster with the CRD."""
    cluster.kubectl("apply", "--server-side", "-f", str(CRD))
    cluster.kubectl("apply", "--server-side", "-f", str(lws_crd()))
    condition = "--for=condition=Established"
    cluster.kubectl("wait", condition, "crd/modeldeployments.headrace.dev", "--timeout=20s")
    client = Kube(cluster)

    def is_served() -> bool:
        try:
            return all(client.request("GET", k.path()) for k in (MODEL_DEPLOYMENT, GROUP_SET))
        except (RefusedError, json.JSONDecodeError):  # a group that is unknown yet: plain text
            return False  # their storage is set up a moment after they are established

    eventually(is_served, "the CRDs to be served")
    return client


def lws_crd() -> Path:
    """LeaderWorkerSet's own definition, from its Go module."""
    crds = source("sigs.k8s.io/lws", "lws") / "config/crd/bases"
    return crds / "leaderworkerset.x-k8s.io_leaderworkersets.yaml"


@pytest.fixture(scope="session")
def operator_process(
    kube: Kube, kubeconfig: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Operator]:
    operator = Operator(kubeconfig, tmp_path_factory.mktemp("log") / "operator.log")
    yield operator
    if operator.process is not None:
        operator.stop()


@pytest.fixture
def operator(operator_process: Operator) -> Operator:
    """The running operator of the whole cluster, as it is after an installation."""
    if operator_process.process is not None and operator_process.environment:
        operator_process.stop()
    operator_process.environment = {}
    if operator_process.process is None:
        operator_process.start()
    return operator_process


@pytest.fixture
def namespace(kube: Kube, request: pytest.FixtureRequest) -> Iterator[str]:
    name = f"t-{time.monotonic_ns() % 10**10}"
    body = {"metadata": {"name": name}}
    namespaces = Kind("Namespace", "", "v1", "namespaces", namespaced=False)
    kube.create(namespaces, body)
    yield name
    kube.delete(namespaces, name)


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


@pytest.fixture
def world(kube: Kube, namespace: str) -> World:
    return World(kube, namespace)


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


@pytest.fixture(scope="session", name="free_port")
def free_port_fixture() -> Callable[[], int]:
    """Return the number of a port that nobody listens on."""
    return free_port


@pytest.fixture(scope="session", name="eventually")
def eventually_fixture() -> Callable[[Callable[[], Any], str], Any]:
    """Wait until a check gives something true, and return it."""
    return eventually


@pytest.fixture
def kubelet(kube: Kube) -> Kubelet:
    return Kubelet(kube)
