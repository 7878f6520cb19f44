"""Clusters for the tests of localkube, and what a pod needs to run the machine's own shell."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from localkube import Cluster, LocalkubeError, prerequisites

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="module")
def control_plane(tmp_path_factory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("control-plane")).up(kwok=2) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def can_run_node() -> None:
    try:
        prerequisites.check_node()
    except LocalkubeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def node_cluster(can_run_node, tmp_path_factory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("node")).up(node=True) as cluster:
        yield cluster


class Pods:
    """Makes pods that run the machine's own programs, confined as Headrace's containers are."""

    @staticmethod
    def container(name: str, script: str, **fields: object) -> dict[str, object]:
        mounts = [{"name": "usr", "mountPath": "/usr", "readOnly": True}]
        for folder in ("lib", "lib64", "bin"):
            mounts.append({**mounts[0], "mountPath": f"/{folder}", "subPath": folder})
        return {
            "name": name,
            "image": "localhost/pause:1",
            "imagePullPolicy": "Never",
            "command": ["/bin/sh", "-c", script],
            "env": [{"name": "PATH", "value": "/usr/bin:/bin"}],
            "volumeMounts": [*mounts, {"name": "tmp", "mountPath": "/tmp"}],
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 1000,
                "readOnlyRootFilesystem": True,
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            **fields,
        }

    @staticmethod
    def pod(name: str, main: dict[str, object], *init: dict[str, object]) -> dict[str, object]:
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": {"app": name}},
            "spec": {
                "terminationGracePeriodSeconds": 1,
                "dnsPolicy": "Default",
                "volumes": [
                    {"name": "usr", "hostPath": {"path": "/usr"}},
                    {"name": "tmp", "emptyDir": {}},
                ],
                "initContainers": list(init),
                "containers": [main],
            },
        }

    @staticmethod
    def apply(cluster: Cluster, *objects: dict[str, object]) -> None:
        manifest = {"apiVersion": "v1", "kind": "List", "items": objects}
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))

    @classmethod
    def run_to_end(cls, cluster: Cluster, name: str, script: str) -> str:
        """Run a pod of one container to its successful end and return what it logged."""
        pod = cls.pod(name, cls.container("main", script))
        pod["spec"]["restartPolicy"] = "Never"
        cls.apply(cluster, pod)
        phase = "--for=jsonpath={.status.phase}"
        cluster.kubectl("wait", f"pod/{name}", f"{phase}=Succeeded", "--timeout=30s")
        return cluster.kubectl("logs", name)


@pytest.fixture(scope="session")
def pods() -> Pods:
    return Pods()


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    def wait(condition: Callable[[], object], seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not reached within {seconds} s"
            time.sleep(0.1)

    return wait
