"""The operator as a process: killed, upgraded, stopped, sick, restricted to a namespace."""

import asyncio
import copy
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from headrace_operator.cluster.connection import connect
from headrace_operator.cluster.kinds import (
    DEPLOYMENT,
    JOB,
    MODEL_DEPLOYMENT,
    SERVICE,
    VOLUME,
    WATCHED,
)
from headrace_operator.cluster.store import Store
from headrace_operator.errors import NamespaceTerminating
from headrace_operator.handlers import watch
from headrace_operator.health import Health
from headrace_operator.queue import WorkQueue
from headrace_operator.resync import Resync

pytestmark = pytest.mark.cluster
KILLS = 16
VOLATILE = (
    "status",
    "ownerReferences",
    "clusterIP",
    "clusterIPs",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "managedFields",
    "deployment.kubernetes.io/revision",
)


class KubeletThread:
    """A kubelet that publishes with every shard pod and serves with every serving pod."""

    def __init__(self, world: Any, kubelet: Any) -> None:
        self._world, self._kubelet = world, kubelet
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.error: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        assert self.error is None, self.error

    def _run(self) -> None:
        while not self._stop.wait(0.15):
            for component, write in (
                ("shard", self._kubelet.publish),
                ("serve", self._kubelet.serving),
            ):
                for pod in self._world.pods(component):
                    self._step(pod, write)

    def _step(self, pod: Any, write: Any) -> None:
        if pod["status"]["phase"] != "Pending" or "nodeName" not in pod["spec"]:
            return
        try:
            write(pod)
        except Exception as error:  # noqa: BLE001  # told when the thread ends
            if getattr(error, "status", 0) not in (404, 409):  # it may be gone by now
                self.error = error


def steady(body: Any) -> Any:
    """Return what must be the same in two worlds that have come to the same end."""
    if isinstance(body, dict):
        return {
            k: steady(v)
            for k, v in body.items()
            if k not in VOLATILE
            and k not in ("status", "clusterIP", "clusterIPs", "ownerReferences")
            and not k.endswith("controller-uid")
        }
    return [steady(item) for item in body] if isinstance(body, list) else body


def children(world: Any) -> dict[str, Any]:
    found = {
        f"{kind.name}/{body['metadata']['name']}": steady(body)
        for kind in (JOB, DEPLOYMENT, SERVICE)
        for body in world.kube.list(kind, world.namespace)
    }
    text = repr(found).replace(world.namespace, "NAMESPACE")
    return {"children": sorted(found), "text": text}


def reasons(world: Any) -> dict[str, tuple[str, str]]:
    return {k: (c["status"], c["reason"]) for k, c in world.conditions().items()}


def test_killed_at_many_moments_of_rollouts_it_ends_in_the_same_world(
    operator: Any, world: Any, kube: Any, kubelet: Any, eventually: Any, cluster: Any
) -> None:
    """Each round changes model and replicas and kills the operator a little later."""
    world.add_claims("weights")
    with KubeletThread(world, kubelet):
        world.create()
        for n in range(KILLS):
            changes = {"model": {"revision": f"r{n}"}, "replicas": 1 + n % 2}
            world.change({"spec": changes})
            time.sleep(0.02 * n)
            assert operator.stop(signal.SIGKILL) == -signal.SIGKILL
            operator.start()
        world.wait_condition("Ready", "True", "Serving")
        eventually(lambda: len(world.jobs()) == 1, "the stale Jobs to go")
        killed = (children(world), reasons(world))
        kept = len([e for e in world.events() if e["count"] != 1])
        assert kept == 0

        # the same end without any kill: a new resource of the same name with the last spec
        spec = world.resource()["spec"]
        world.kube.delete(MODEL_DEPLOYMENT, "tiny", world.namespace)
        eventually(lambda: not world.jobs() and world.deployment() is None, "everything to go")
        world.create(**spec)
        world.wait_condition("Ready", "True", "Serving")
        assert (children(world), reasons(world)) == killed


def test_an_upgraded_operator_leaves_the_pods_alone_until_the_spec_changes(
    operator: Any, world: Any, kubelet: Any, eventually: Any
) -> None:
    world.add_claims("weights")
    with KubeletThread(world, kubelet):
        world.create()
        world.wait_condition("Ready", "True", "Serving")
        before = world.deployment()
        pods = {p["metadata"]["uid"] for p in world.pods("serve")}
        operator.stop()
        operator.environment = {"HEADRACE_LOADER_IMAGE": "loader:2"}
        operator.start()
        world.change({"spec": {"replicas": 2}})
        eventually(lambda: len(world.pods("serve")) == 2, "another pod")
        world.wait_condition("Ready", "True", "Serving")
        after = world.deployment()
        assert after["spec"]["template"] == before["spec"]["template"]
        assert pods < {p["metadata"]["uid"] for p in world.pods("serve")}
        world.change({"spec": {"engine": {"args": ["--max-model-len", "64"]}}})

        def image() -> str:
            template = world.deployment()["spec"]["template"]
            return str(template["spec"]["initContainers"][0]["image"])

        eventually(lambda: image() == "loader:2", "the new loader image")
        world.wait_condition("Ready", "True", "Serving")
        assert [j["metadata"]["name"] for j in world.jobs()] == [
            world.resource()["status"]["checkpoint"]["job"]
        ]


def test_it_stops_at_once_when_asked_to(operator: Any, world: Any) -> None:
    world.create()
    world.wait_condition("Ready", "False", "ClaimNotFound")
    started = time.monotonic()
    assert operator.stop(signal.SIGTERM) == 0
    assert time.monotonic() - started < 10
    assert operator.entries()[-1]["message"] == "stopped"


def test_it_is_alive_and_has_metrics(operator: Any, world: Any) -> None:
    world.create()
    world.wait_condition("Ready", "False", "ClaimNotFound")
    assert operator.text(operator.liveness_port, "/healthz")[0] == 200
    status, text = operator.text(operator.metrics_port, "/metrics")
    assert status == 200
    labels = f'name="tiny",namespace="{world.namespace}",type="VolumeReady"'
    assert f"headrace_modeldeployment_condition{{{labels}}} 0.0" in text
    assert 'headrace_operator_api_requests_total{method="PATCH",status="200"}' in text
    assert "headrace_operator_reconcile_duration_seconds_count" in text
    assert (
        f'headrace_modeldeployment_replicas{{name="tiny",namespace="{world.namespace}"}} 1.0'
        in text
    )
    world.kube.delete(MODEL_DEPLOYMENT, "tiny", world.namespace)
    time.sleep(1)
    assert labels not in operator.text(operator.metrics_port, "/metrics")[1]


@pytest.fixture
def administrator(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    return


async def test_a_sick_operator_fails_its_liveness_probe(
    kube: Any, administrator: None, operator: Any
) -> None:
    """In this process, since nothing can make the real one sick on purpose."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    health = Health()
    health.report("watch of pods", "the watch does not deliver")
    async with connect() as connection:
        task = asyncio.create_task(
            watch(
                connection, Store(WATCHED), WorkQueue(), health, namespaces=(), liveness_port=port
            )
        )
        try:
            for _ in range(50):
                await asyncio.sleep(0.1)
                try:
                    status, _ = await asyncio.to_thread(operator.text, port, "/healthz")
                except OSError:
                    continue
                break
            assert status == 500
        finally:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


async def test_a_watch_that_delivers_nothing_is_noticed(
    administrator: None, operator: Any, world: Any
) -> None:
    """Listings of a real API server, and a store that no watch feeds."""
    world.create()
    world.wait_condition("Ready", "False", "ClaimNotFound")
    health, store = Health(), Store(WATCHED)
    async with connect() as connection:
        resync = Resync(connection.api, store, WorkQueue(), health)
        await resync.cycle()
        assert health.problems() == []
        await resync.cycle()
    # Children that other tests left behind may be listed as well.
    missed = "watch of modeldeployments: the watch does not deliver what listings show"
    assert missed in health.problems()


async def test_a_namespace_that_is_gone_is_as_good_as_terminating(
    administrator: None, kube: Any
) -> None:
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim"}
    async with connect() as connection:
        with pytest.raises(NamespaceTerminating):
            await connection.api.apply(claim | {"metadata": {"name": "x", "namespace": "absent"}})


def test_without_the_crd_it_says_so_and_ends(without_crd: Any) -> None:
    assert without_crd.returncode == 1
    (line,) = without_crd.stderr.splitlines()
    assert "apply the CRD" in line
    assert "Traceback" not in line


def test_without_settings_or_credentials_it_says_so_and_ends(tmp_path: Path) -> None:
    import subprocess
    import sys

    missing = str(tmp_path / "absent")
    broken = tmp_path / "broken"
    broken.write_text("clusters: []")
    for environment, status, fragment in (
        ({}, 64, "HEADRACE_LOADER_IMAGE"),
        ({"HEADRACE_LOADER_IMAGE": "x", "KUBECONFIG": missing}, 1, "absent"),
        ({"HEADRACE_LOADER_IMAGE": "x", "KUBECONFIG": str(broken)}, 1, "KUBECONFIG"),
        ({"HEADRACE_LOADER_IMAGE": "x"}, 1, "service account"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "headrace_operator"],
            env={"HOME": str(tmp_path), **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == status
        assert fragment in done.stderr
        assert "Traceback" not in done.stderr


def forbidden(audit_log: Path) -> list[str]:
    """What the operator asked for and was refused, as the API server has it."""
    events = map(json.loads, audit_log.read_text().splitlines())
    decision = "authorization.k8s.io/decision"
    refused = (e for e in events if e.get("annotations", {}).get(decision) == "forbid")
    return [f"{event['verb']} {event['requestURI']}" for event in refused]


def test_with_a_role_in_two_namespaces_it_serves_those_alone(
    operator_process: Any, cluster: Any, world: Any, kube: Any, kubelet: Any, audit_log: Path
) -> None:
    """The chart's watchNamespaces: no permission outside but for volumes and nodes, then none."""
    from headrace_operator.cluster.kinds import Kind

    if operator_process.process is not None:
        operator_process.stop()
    cluster_roles = Kind(
        "ClusterRole", "rbac.authorization.k8s.io", "v1", "clusterroles", namespaced=False
    )
    role = kube.get(cluster_roles, "headrace")
    kube.delete(cluster_roles, "headrace")
    second = copy.copy(world)
    second.namespace = f"{world.namespace}-b"
    cluster.kubectl("create", "namespace", second.namespace)
    refused = forbidden(audit_log)
    chart = Path(__file__).parents[3] / "charts/headrace"
    served = f"{world.namespace},{second.namespace}"
    manifest = cluster.run(
        [
            *(cluster.bin("helm"), "template", "headrace", chart, "-n", "headrace-system"),
            *("--set", f"watchNamespaces={{{served}}}"),
            '--set-json=staticVolumes={"*": ["*"]}',
            "--show-only=templates/rbac.yaml",
        ]
    )
    try:
        cluster.kubectl("apply", "-f", "-", stdin=manifest)
        operator_process.environment = {"HEADRACE_WATCH_NAMESPACES": served}
        operator_process.start()
        other = copy.copy(world)
        other.namespace = "default"
        other.create("elsewhere")
        second.create()
        world.add_claims("weights")
        with KubeletThread(world, kubelet):
            world.create()
            world.wait_condition("Ready", "True", "Serving")
        second.wait_condition("Ready", "False", "ClaimNotFound")
        assert "status" not in other.resource("elsewhere")
        kube.delete(MODEL_DEPLOYMENT, "elsewhere", "default")
        assert kube.list(VOLUME)
        assert forbidden(audit_log) == refused

        operator_process.stop()
        # As with rbac.clusterResources=false.
        cluster.kubectl("delete", "clusterrolebinding", "headrace-cluster")
        operator_process.start()
        second.add_claims("weights")
        with KubeletThread(second, kubelet):
            second.wait_condition("Ready", "True", "Serving")
        asked = {request.split("?")[0] for request in set(forbidden(audit_log)) - set(refused)}
        assert asked == {"list /api/v1/persistentvolumes"}  # it goes without
    finally:
        if operator_process.process is not None:
            operator_process.stop()
        operator_process.environment = {}
        cluster.kubectl("apply", "-f", "-", stdin=manifest)
        kube.create(
            cluster_roles,
            {k: role[k] for k in ("rules",)}
            | {"metadata": {"name": "headrace", "labels": role["metadata"]["labels"]}},
        )
        cluster.kubectl("delete", "namespace", second.namespace, "--wait=false")
