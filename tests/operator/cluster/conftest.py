"""A real API server with the operator as a process of its own, under its real RBAC rules.

There is no kubelet: pods are bound to a node that only keeps its lease (kwok without pod
stages), and `stage.kubelet` writes what a kubelet would write into their status.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace_operator.cluster.kinds import GROUP_SET, MODEL_DEPLOYMENT, Kind
from localkube import Cluster
from localkube.kwok import DEFAULT_STAGES
from localkube.sources import source
from stage.client import Kube, RefusedError
from stage.kubelet import Kubelet
from stage.operator import CRD, SYSTEM, Operator, install_rbac, token_kubeconfig
from stage.waiting import eventually, free_port
from stage.world import World


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


@pytest.fixture
def world(kube: Kube, namespace: str) -> World:
    return World(kube, namespace)


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
