"""One cluster with a real node, real images and the operator installed by real helm."""

import json
import os
from pathlib import Path

import pytest

import imagebuild
from demo import setup
from demo.observe import Model
from localkube import Cluster, prerequisites

CLAIM = "models"
ENGINE = imagebuild.IMAGES["engine-cpu"].reference
LOADER = imagebuild.IMAGES["headrace-loader"].reference

# Starts at once and never answers: for tests that end before the engine matters.
IDLE_ENGINE = {"image": LOADER, "command": ["python3", "-c", "import time; time.sleep(3600)"]}
REAL_ENGINE = {
    "image": ENGINE,
    "args": ["--max-model-len=512", "--enforce-eager"],
    "env": [
        {"name": "VLLM_CPU_KVCACHE_SPACE", "value": "1"},
        {"name": "VLLM_CPU_OMP_THREADS_BIND", "value": "0-1"},
    ],
}


class Site:
    """The cluster, and the directory that its claim "models" exposes."""

    def __init__(self, cluster, volume):
        self.cluster = cluster
        self.volume = volume

    def make_model(self, name, *options):
        return setup.make_model(self.volume / name, *options)

    def spec(self, name, *, source=None, claim=CLAIM, engine=None, tensor_parallel_size=1, **spec):
        """A spec without a GPU; the source is a directory of the volume."""
        return {
            "model": {"source": f"pvc://{CLAIM}/{source or name}"},
            "parallelism": {"tensorParallelSize": tensor_parallel_size},
            "volume": {"existingClaim": {"name": claim}},
            "loading": {"path": "Off", **spec.pop("loading", {})},
            "gpu": {"sharing": "None"},
            "engine": engine or IDLE_ENGINE,
            **spec,
        }

    def deploy(self, name, **options):
        """Apply a ModelDeployment; the options are those of `spec`."""
        body = {"apiVersion": "headrace.dev/v1alpha1", "kind": "ModelDeployment"}
        self.apply(body | {"metadata": {"name": name}, "spec": self.spec(name, **options)})
        return Model(self.cluster, name)

    def helm(self, *arguments):
        return self.cluster.run([self.cluster.bin("helm"), *arguments], timeout=180)

    def install(self, name, **options):
        """Install a ModelDeployment as a release of its chart; the options are those of `spec`."""
        values = {"spec": self.spec(name, **options), "test": {"image": LOADER}}
        path = self.volume.with_name(f"{name}-values.yaml")
        path.write_text(json.dumps(values))
        self.helm("install", name, setup.ROOT / "charts/headrace-model", "-f", path)
        return Model(self.cluster, name)

    def apply(self, *objects):
        everything = {"apiVersion": "v1", "kind": "List", "items": objects}
        self.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(everything))

    def expose(self, directory, claim):
        """Make a directory a bound claim."""
        setup.make_volume(self.cluster, directory, claim)

    def delete(self, name):
        self.cluster.kubectl("delete", "modeldeployment", name, "--ignore-not-found")

    def kill(self, pod, container):
        """Kill a container's processes as the kernel would; returns the container's id."""
        statuses = pod["status"].get("initContainerStatuses", []) + pod["status"].get(
            "containerStatuses", []
        )
        found = next(status for status in statuses if status["name"] == container)
        identity = found["containerID"].removeprefix("containerd://")
        self.cluster.ctr("tasks", "kill", "--all", "--signal", "SIGKILL", identity)
        return identity


def restrict(cluster, *namespaces):
    """Let namespaces, made where they are missing, admit only pods of the restricted profile."""
    profile = {"pod-security.kubernetes.io/enforce": "restricted"}
    for name in namespaces:
        body = {"apiVersion": "v1", "kind": "Namespace"}
        body["metadata"] = {"name": name, "labels": profile}
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps(body))


@pytest.fixture(scope="session")
def real_engine():
    return REAL_ENGINE


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The cluster; $HEADRACE_NODE_CLUSTER is the directory of one kept for the next run."""
    prerequisites.check_node()
    archives = imagebuild.ensure()
    kept = os.environ.get("HEADRACE_NODE_CLUSTER")
    root = Path(kept) if kept else tmp_path_factory.mktemp("node")
    cluster = Cluster(root / "cluster")
    try:
        setup.prepare_node(cluster, archives.values())
        setup.make_volume(cluster, root / "volume", CLAIM)
        restrict(cluster, "default", setup.NAMESPACE)
        setup.install_operator(cluster)
        yield Site(cluster, root / "volume")
    finally:
        if not kept:
            cluster.down()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "node":
            item.add_marker(pytest.mark.node)
