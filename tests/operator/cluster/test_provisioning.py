"""Volumes: provisioned, kept and given back; external-provisioner with a stand-in for FSx.

The provisioner is the real one and speaks CSI to a fake of the driver fsx.csi.aws.com, which
makes no file system (tools/kube/modules/fsx).
"""

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from headrace_operator.cluster.kinds import (
    CLAIM,
    DEPLOYMENT,
    JOB,
    MODEL_DEPLOYMENT,
    SERVICE,
    STORAGE_CLASS,
    VOLUME,
    Kind,
)
from localkube import Cluster, binaries

pytestmark = pytest.mark.cluster

NAMESPACE = Kind("Namespace", "", "v1", "namespaces", namespaced=False)
EFA = {
    "deploymentType": "PERSISTENT_2",
    "perUnitStorageThroughput": "1000",
    "metadataConfigurationMode": "AUTOMATIC",
    "efaEnabled": "true",
    "securityGroupIds": "sg-0123456789abcdef0",
}
STATIC = {
    "fileSystemId": "fs-01234567",
    "dnsName": "fs-01234567.fsx.eu-central-1.amazonaws.com",
    "capacityGiB": 1200,
}


@dataclass
class FakeFsx:
    """The stand-in for the FSx driver."""

    socket: Path
    log: Path

    def let_slow_ones_finish(self) -> None:
        Path(f"{self.socket}.done").touch()

    def calls(self, call: str) -> list[tuple[str, str]]:
        """Return (volume name, file system) of the calls so far."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return [(name, system) for what, name, system in lines if what == call]


@pytest.fixture(scope="session")
def fake_fsx(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeFsx]:
    """The real external-provisioner and a fake FSx driver, as processes."""
    programs = binaries.ensure(["fake-fsx-driver", "csi-provisioner"])
    logs = tmp_path_factory.mktemp("fsx")
    with tempfile.TemporaryDirectory(prefix="fsx-") as directory:  # socket paths must be short
        fake = FakeFsx(Path(directory) / "csi.sock", logs / "driver.log")
        with fake.log.open("wb") as output, (logs / "provisioner.log").open("wb") as log:
            driver = subprocess.Popen([programs["fake-fsx-driver"], fake.socket], stdout=output)
            provisioner = subprocess.Popen(
                [
                    programs["csi-provisioner"],
                    f"--csi-address=unix://{fake.socket}",
                    f"--kubeconfig={cluster.kubeconfig}",
                    "--retry-interval-start=500ms",
                    "--retry-interval-max=1s",
                ],
                stdout=log,
                stderr=log,
            )
            try:
                yield fake
            finally:
                for process in (provisioner, driver):
                    process.terminate()
                    process.wait(timeout=20)


@pytest.fixture
def storage_class(kube: Any, namespace: str) -> Iterator[Any]:
    """Make StorageClasses of the FSx driver; they go with the test."""
    made = []

    def make(name: str, policy: str = "Retain", **parameters: str) -> str:
        body = {
            "metadata": {"name": f"{namespace}-{name}"},
            "provisioner": "fsx.csi.aws.com",
            "reclaimPolicy": policy,
            "parameters": {**EFA, "subnetId": f"subnet-{name}", **parameters},
        }
        kube.create(STORAGE_CLASS, body)
        made.append(body["metadata"]["name"])
        return made[-1]

    yield make
    for name in made:
        kube.delete(STORAGE_CLASS, name)


def dynamic(storage_class: str, capacity: int = 4800, policy: str = "Retain") -> dict[str, Any]:
    asked = {"storageClassName": storage_class, "capacityGiB": capacity, "reclaimPolicy": policy}
    return {"model": {"source": "hf://o/m"}, "volume": {"dynamic": asked}}


def delete(kube: Any, world: Any, propagation: str) -> None:
    options = {"propagationPolicy": propagation}
    kube.request("DELETE", MODEL_DEPLOYMENT.path(world.namespace, "tiny"), options)


def test_a_slow_file_system_is_waited_for_and_made_once(
    operator: Any, world: Any, storage_class: Any, fake_fsx: FakeFsx, eventually: Any
) -> None:
    spec = dynamic(storage_class("slow"))
    world.create(**spec)
    condition = world.wait_condition("VolumeReady", "False", "Provisioning")
    eventually(
        lambda: "timed out" in world.conditions()["VolumeReady"]["message"],
        "the claim's event to reach the condition",
    )
    assert condition["status"] == "False"
    claim = world.kube.get(CLAIM, "tiny-weights", world.namespace)
    fake_fsx.let_slow_ones_finish()
    world.wait_condition("VolumeReady", "True", "Bound")
    (pod,) = world.wait_pods("shard")
    assert pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == "tiny-weights"
    uid = claim["metadata"]["uid"]
    (system,) = {s for name, s in fake_fsx.calls("CreateVolume") if name == f"pvc-{uid}"}
    status = world.resource()["status"]["volume"]
    assert status == {"claimName": "tiny-weights", "claimUID": uid, "volumeName": f"pvc-{uid}"}
    # Retain: the claim outlives the ModelDeployment, and the next one goes on with it
    delete(world.kube, world, "Background")
    eventually(lambda: not world.jobs(), "the Job to go")
    world.create(**spec)
    world.wait_condition("VolumeReady", "True", "Bound")
    again = world.kube.get(CLAIM, "tiny-weights", world.namespace)
    assert again["metadata"]["uid"] == uid
    volume = world.kube.get(VOLUME, f"pvc-{uid}")
    assert volume["spec"]["csi"]["volumeHandle"] == system
    assert volume["spec"]["persistentVolumeReclaimPolicy"] == "Retain"
    # a claim that someone deletes is not made again: that would be a second file system
    delete(world.kube, world, "Foreground")
    eventually(lambda: world.resource() is None, "the resource to go")
    world.create(**spec)
    world.wait_condition("VolumeReady", "True", "Bound")
    before = len(fake_fsx.calls("CreateVolume"))
    world.wait_pods("shard")
    world.kube.delete(CLAIM, "tiny-weights", world.namespace)
    world.wait_condition("VolumeReady", "False", "ClaimTerminating")
    (job,) = world.jobs()
    world.kube.request(
        "DELETE",
        JOB.path(world.namespace, job["metadata"]["name"]),
        {"propagationPolicy": "Background"},
    )
    world.wait_condition("VolumeReady", "False", "ClaimDeleted")
    assert len(fake_fsx.calls("CreateVolume")) == before


def test_a_refused_file_system_is_told_and_one_to_delete_goes(
    operator: Any, world: Any, storage_class: Any, fake_fsx: FakeFsx, eventually: Any
) -> None:
    world.create("full", **dynamic(storage_class("full")))
    # EFA file systems come in steps of 4800 GiB, and the driver would round 6000 to 7200
    roomy = storage_class("roomy", "Delete")
    world.create(**dynamic(roomy, 6000, "Delete"))
    condition = world.wait_condition("VolumeReady", "False", "CapacityInvalid")
    assert "spec.volume.dynamic.capacityGiB: 6000" in condition["message"]
    assert "use 9600" in condition["message"]
    assert world.kube.get(CLAIM, "tiny-weights", world.namespace) is None
    world.change({"spec": {"volume": {"dynamic": {"capacityGiB": 9600}}}})
    world.wait_condition("VolumeReady", "True", "Bound")
    name = world.resource()["status"]["volume"]["volumeName"]
    volume = world.kube.get(VOLUME, name)
    assert volume["spec"]["capacity"]["storage"] == "9600Gi"
    condition = world.wait_condition("VolumeReady", "False", "ProvisioningFailed", "full")
    assert "InsufficientSubnetCapacity" in condition["message"]
    assert any(e["reason"] == "ProvisioningFailed" for e in world.events("full"))
    delete(world.kube, world, "Background")
    handle = volume["spec"]["csi"]["volumeHandle"]
    eventually(
        lambda: ("-", handle) in fake_fsx.calls("DeleteVolume"), "the file system to be deleted"
    )


def test_names_at_their_limits_are_taken(operator: Any, world: Any, storage_class: Any) -> None:
    name = "m" * 63
    world.create(name, **dynamic(storage_class("x", subnetId="s"), 4800))
    condition = world.wait_condition("VolumeReady", "False", "StorageClassInvalid", name)
    assert 'subnetId: "s"' in condition["message"]
    world.create("long", volume={"existingClaim": {"name": "c" * 253}})
    condition = world.wait_condition("VolumeReady", "False", "ClaimNotFound", "long")
    assert "c" * 253 in condition["message"]
    claim = f"{name}-weights"
    world.create("static", volume={"static": STATIC})
    world.wait_condition("VolumeReady", "True", "Bound", "static")
    assert world.kube.get(CLAIM, claim, world.namespace) is None


def test_deletion_in_all_three_ways(
    operator: Any, world: Any, kubelet: Any, eventually: Any
) -> None:
    world.add_claims("weights")
    kube = world.kube
    for propagation in ("Foreground", "Orphan"):
        world.create()
        (pod,) = world.wait_pods("shard")
        kubelet.publish(pod)
        world.wait_pods("serve")
        world.child(SERVICE, "tiny")
        delete(kube, world, propagation)
        eventually(lambda: world.resource() is None, f"the resource to go ({propagation})")
        if propagation == "Foreground":
            assert world.deployment() is None  # it waited for what it owned
            eventually(lambda: not world.jobs() and not world.pods("serve"), "the rest to go")
    # orphans go on serving, and another ModelDeployment of the name does not take them
    (job,) = world.jobs()
    orphan = world.deployment()
    assert "ownerReferences" not in orphan["metadata"]
    world.create()
    condition = world.wait_condition("CheckpointReady", "False", "JobNameConflict")
    assert "left over from a ModelDeployment tiny" in condition["message"]
    assert world.deployment()["metadata"]["uid"] == orphan["metadata"]["uid"]
    kube.request(
        "DELETE",
        JOB.path(world.namespace, job["metadata"]["name"]),
        {"propagationPolicy": "Background"},
    )
    (pod,) = eventually(
        lambda: [p for p in world.pods("shard") if p["status"]["phase"] == "Pending"],
        "the pod of a Job of its own",
    )
    kubelet.publish(pod)
    condition = world.wait_condition("WeightsResident", "False", "DeploymentNameConflict")
    assert "Deployment tiny" in condition["message"]
    assert world.deployment()["metadata"]["generation"] == orphan["metadata"]["generation"]
    assert len(world.pods("serve")) == 1


@pytest.mark.parametrize("kind", [VOLUME, CLAIM], ids=["volume", "claim"])
def test_a_volume_or_claim_of_someone_else_is_left_alone(
    operator: Any, world: Any, kind: Kind
) -> None:
    meta = {"labels": {"app.kubernetes.io/managed-by": "Helm"}}
    spec = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    if kind is VOLUME:
        meta["name"] = f"{world.namespace}.tiny-weights"
        spec |= {"capacity": {"storage": "1Gi"}, "hostPath": {"path": "/nowhere"}}
    else:
        meta |= {"name": "tiny-weights", "namespace": world.namespace}
        spec |= {"resources": {"requests": {"storage": "1Gi"}}}
    made = world.kube.create(kind, {"metadata": meta, "spec": spec})
    try:
        world.create(volume={"static": STATIC})
        reason = f"{kind.name}NameConflict"
        condition = world.wait_condition("VolumeReady", "False", reason)
        assert "is managed by Helm" in condition["message"]
        live = world.kube.get(kind, meta["name"], meta.get("namespace"))
        assert live["metadata"]["uid"] == made["metadata"]["uid"]
        assert live["metadata"]["labels"] == meta["labels"]
        assert live["spec"] == made["spec"]
        assert world.jobs() == [] or kind is VOLUME
    finally:
        if kind is VOLUME:
            world.kube.delete(VOLUME, meta["name"])


def test_a_namespace_that_is_forced_away_ends_cleanly(
    operator: Any, world: Any, kube: Any, kubelet: Any, eventually: Any
) -> None:
    kube.create(NAMESPACE, {"metadata": {"name": f"{world.namespace}-forced"}})
    world.namespace = f"{world.namespace}-forced"
    world.create(volume={"static": STATIC}, model={"source": "hf://o/m"})
    world.wait_condition("VolumeReady", "True", "Bound")
    world.wait_pods("shard")
    start = len(operator.entries())
    hold = {"metadata": {"finalizers": ["example.com/hold"]}}
    world.change(hold)
    kube.delete(NAMESPACE, world.namespace)
    kube.delete(MODEL_DEPLOYMENT, "tiny", world.namespace)  # as its controller does, some time

    def is_forced_away() -> bool:
        # With an emptied list of finalizers a namespace goes while objects are still in it.
        body = kube.get(NAMESPACE, world.namespace)
        if body is not None:
            body["spec"]["finalizers"] = []
            # Refused where its controller has written it at the same time.
            with contextlib.suppress(kube.Refused):
                kube.request("PUT", NAMESPACE.path(None, world.namespace, "finalize"), body)
        return body is None

    eventually(is_forced_away, "the namespace to go")
    assert world.resource() is not None
    # Nothing in it can be written any more; what is left goes once it is there again.
    kube.create(NAMESPACE, {"metadata": {"name": world.namespace}})
    world.change({"metadata": {"finalizers": None}})
    eventually(lambda: world.resource() is None, "the resource to go")
    kube.delete(NAMESPACE, world.namespace)
    trouble = [e for e in operator.entries()[start:] if e["level"] in {"warning", "error"}]
    assert len(trouble) <= 3, trouble


def test_uninstalling_the_chart_leaves_everything_serving(
    operator: Any, cluster: Cluster, world: Any, kubelet: Any
) -> None:
    world.add_claims("weights")
    chart = Path(__file__).parents[3] / "charts/headrace"
    helm = cluster.bin("helm")
    cluster.run(
        [helm, "install", "other", chart, "-n", world.namespace, "--set=crds.install=false"]
    )
    world.create()
    (pod,) = world.wait_pods("shard")
    kubelet.publish(pod)
    (pod,) = world.wait_pods("serve")
    kubelet.serving(pod)
    world.wait_condition("Ready", "True", "Serving")
    cluster.run([helm, "uninstall", "other", "-n", world.namespace, "--wait"])
    assert world.kube.get(DEPLOYMENT, "other-headrace", world.namespace) is None
    (left,) = world.pods("serve")
    assert left["metadata"]["uid"] == pod["metadata"]["uid"]
    assert world.resource() is not None
    assert world.kube.get(SERVICE, "tiny", world.namespace) is not None
    assert "finalizers" not in world.resource()["metadata"]
