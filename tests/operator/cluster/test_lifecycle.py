"""The way of a ModelDeployment on a real API server: shard, serve, scale, change, delete."""

import json
import re
from typing import Any

import pytest

from headrace_operator.cluster.kinds import (
    CLAIM,
    CLAIM_TEMPLATE,
    DEPLOYMENT,
    DEVICE_CLASS,
    GROUP_SET,
    JOB,
    MODEL_DEPLOYMENT,
    NODE,
    POD,
    SERVICE,
    VOLUME,
)

pytestmark = pytest.mark.cluster
CONDITIONS = [
    "VolumeReady",
    "CheckpointReady",
    "WeightsResident",
    "Available",
    "Ready",
    "DirectPath",
    "Reconciling",
    "Stalled",
]
STATIC = {
    "fileSystemId": "fs-01234567",
    "dnsName": "fs-01234567.fsx.eu-central-1.amazonaws.com",
    "capacityGiB": 1200,
}


def serve(world: Any, kubelet: Any, count: int = 1, name: str = "tiny") -> list[Any]:
    """Bring a new ModelDeployment to Ready, with a kubelet's status written by the test."""
    (pod,) = world.wait_pods("shard", 1, name)
    kubelet.publish(pod)
    pods = world.wait_pods("serve", count, name)
    for pod in pods:
        kubelet.serving(pod)
    world.wait_condition("Ready", "True", "Serving", name)
    return pods


def row(cluster: Any, world: Any) -> list[str]:
    """What kubectl prints of tiny, without its age."""
    table = cluster.kubectl("get", "mdl", "tiny", "-n", world.namespace, "--no-headers")
    return list(table.split()[:-1])


def test_from_manifest_to_ready_with_the_status_a_kubelet_would_write(
    operator: Any, world: Any, kubelet: Any, cluster: Any
) -> None:
    world.create(engine={"image": "vllm:cpu", "resources": {"requests": {"cpu": "1000m"}}})
    world.wait_condition("Ready", "False", "ClaimNotFound")
    assert list(world.conditions()) == CONDITIONS
    world.add_claims("weights")
    world.wait_condition("VolumeReady", "True", "Bound")
    world.wait_condition("Ready", "False", "ShardJobStarting")
    assert world.deployment() is None

    (pod,) = world.wait_pods("shard")
    kubelet.write(pod, {"phase": "Running"})
    world.wait_condition("CheckpointReady", "False", "Sharding")
    assert row(cluster, world) == ["tiny", "0/1", "Sharding", "0%", "POSIX", "1"]
    kubelet.publish(pod, total_bytes=4096)
    world.wait_condition("CheckpointReady", "True", "Published")

    (pod,) = world.wait_pods("serve")
    kubelet.loading(pod)
    world.wait_condition("WeightsResident", "False", "Loading")
    kubelet.serving(pod, engine_ready=False)
    world.wait_condition("WeightsResident", "True", "Resident")
    world.wait_condition("Ready", "False", "EngineStarting")
    kubelet.serving(pod)
    world.wait_condition("Available", "True", "Serving")
    world.wait_condition("Ready", "True", "Serving")

    status = world.resource()["status"]
    assert status["replicas"] == status["readyReplicas"] == 1
    assert status["checkpoint"]["totalBytes"] == 4096
    assert status["volume"]["claimName"] == "weights"
    assert status["observedGeneration"] == 1
    for kind in (JOB, DEPLOYMENT, SERVICE):
        (child,) = world.kube.list(kind, world.namespace)
        assert child["metadata"]["ownerReferences"][0]["kind"] == "ModelDeployment"
        managers = {m["manager"]: m["operation"] for m in child["metadata"]["managedFields"]}
        assert managers["headrace-operator"] == "Apply"
    metadata = world.resource()["metadata"]
    assert "finalizers" not in metadata
    assert "annotations" not in metadata

    table = cluster.kubectl("get", "mdl", "-n", world.namespace).splitlines()
    assert table[0].split() == [
        *("NAME", "READY", "STATUS", "CHECKPOINT", "PATH", "TP", "AGE"),
    ]
    assert row(cluster, world) == ["tiny", "1/1", "Serving", "100%", "POSIX", "1"]
    described = cluster.kubectl("describe", "mdl", "tiny", "-n", world.namespace)
    assert re.search(r"Reason: +Serving\n +Status: +True\n +Type: +Ready\n", described)
    assert re.search(r"Warning +ClaimNotFound .*create it or correct the name", described)
    assert "tiny" in cluster.kubectl("get", "headrace", "-n", world.namespace)
    reasons = [(e["type"], e["reason"]) for e in world.events()]
    assert ("Warning", "ClaimNotFound") in reasons
    for reason in ("Bound", "Sharding", "Published", "Loading", "Resident", "Serving"):
        assert ("Normal", reason) in reasons
    assert all(e["count"] == 1 for e in world.events())


def test_replicas_follow_the_scale_subresource_to_two_to_zero_and_back(
    operator: Any, world: Any, kubelet: Any, cluster: Any
) -> None:
    world.add_claims("weights")
    # The API server writes these as 1 and 1Gi, which must not look like a difference for ever.
    resources = {"requests": {"cpu": "1000m", "memory": "1024Mi"}}
    world.create(engine={"image": "vllm:cpu", "resources": resources})
    begun = len(operator.entries())
    serve(world, kubelet)
    generation = world.deployment()["metadata"]["generation"]
    scale = ("scale", "mdl/tiny", "-n", world.namespace)
    cluster.kubectl(*scale, "--replicas=2")
    for pod in world.wait_pods("serve", 2):
        kubelet.serving(pod)
    world.wait_condition("Ready", "True", "Serving")
    found = world.kube.request("GET", MODEL_DEPLOYMENT.path(world.namespace, "tiny", "scale"))
    assert found["spec"]["replicas"] == found["status"]["replicas"] == 2
    selector = found["status"]["selector"]
    assert len(world.kube.list(POD, world.namespace, selector)) == 2
    cluster.kubectl(*scale, "--replicas=0")
    world.wait_condition("Ready", "True", "ScaledToZero")
    world.wait_pods("serve", 0)
    cluster.kubectl(*scale, "--replicas=1")  # as KEDA wakes it
    for pod in world.wait_pods("serve", 1):
        kubelet.serving(pod)
    world.wait_condition("Ready", "True", "Serving")
    # only the replicas have changed, three times
    assert world.deployment()["metadata"]["generation"] == generation + 3
    said = [entry["message"] for entry in operator.entries()[begun:]]
    assert said.count("applied Deployment tiny") <= 5
    assert len(world.jobs()) == 1


def test_a_changed_model_shards_first_and_rolls_after(
    operator: Any, world: Any, kubelet: Any, eventually: Any
) -> None:
    world.add_claims("weights")
    world.create()
    serve(world, kubelet)
    before = world.deployment()["spec"]["template"]
    (old_job,) = world.jobs()
    world.change({"spec": {"model": {"revision": "v2"}, "replicas": 2}})
    world.wait_condition("CheckpointReady", "False", "ShardJobStarting")
    new_job = eventually(
        lambda: [j for j in world.jobs() if j["metadata"]["uid"] != old_job["metadata"]["uid"]],
        "a Job for the new checkpoint",
    )
    for pod in world.wait_pods("serve", 2):
        kubelet.serving(pod)  # replicas follow while the template stays
    world.wait_condition("Available", "True", "Serving")
    assert world.deployment()["spec"]["template"] == before
    assert world.conditions()["Ready"]["status"] == "False"

    pods = eventually(
        lambda: [
            p
            for p in world.pods("shard")
            if p["metadata"]["labels"]["batch.kubernetes.io/controller-uid"]
            == new_job[0]["metadata"]["uid"]
        ],
        "the pod of the new Job",
    )
    kubelet.publish(pods[0])
    world.wait_condition("CheckpointReady", "True", "Published")
    eventually(lambda: world.deployment()["spec"]["template"] != before, "the roll")
    world.wait_condition("Ready", "False")
    strategy = world.deployment()["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxSurge": 0, "maxUnavailable": 1}

    def roll() -> bool:
        """Serve with every new pod, as kubelets would."""
        for pod in world.pods("serve"):
            if not any(c["type"] == "Ready" for c in pod["status"].get("conditions", [])):
                kubelet.serving(pod)
        return world.conditions()["Ready"]["status"] == "True"

    eventually(roll, "the end of the roll")
    assert len(world.jobs()) == 1


def test_deleted_and_changed_children_come_back(
    operator: Any, world: Any, kubelet: Any, eventually: Any
) -> None:
    world.add_claims("weights")
    world.create()
    serve(world, kubelet)
    image = [{"name": "engine", "image": "other:1"}]
    strategic = "application/strategic-merge-patch+json"
    path = DEPLOYMENT.path(world.namespace, "tiny")
    body = {"spec": {"replicas": 5, "template": {"spec": {"containers": image}}}}
    world.kube.request("PATCH", path, body, strategic)

    def engine_image() -> str:
        spec = world.deployment()["spec"]
        assert spec["replicas"] in (1, 5)
        return str(spec["template"]["spec"]["containers"][0]["image"])

    eventually(lambda: engine_image() == "vllm:cpu", "the engine's image to come back")
    eventually(lambda: world.deployment()["spec"]["replicas"] == 1, "the replicas to come back")
    world.kube.patch(SERVICE, "tiny", world.namespace, {"spec": {"selector": {"a": "b"}}})
    world.kube.delete(SERVICE, "tiny", world.namespace)
    world.child(SERVICE, "tiny")
    (job,) = world.jobs()
    labels = {"metadata": {"labels": {"headrace.dev/model-deployment": None}}}
    world.kube.patch(JOB, job["metadata"]["name"], world.namespace, labels)
    eventually(
        lambda: "headrace.dev/model-deployment" in world.jobs()[0]["metadata"]["labels"],
        "the label of the Job to come back",
    )
    world.wait_condition("Ready", "True")
    world.kube.delete(JOB, job["metadata"]["name"], world.namespace)
    eventually(
        lambda: [j for j in world.jobs() if j["metadata"]["uid"] != job["metadata"]["uid"]],
        "the Job to come back",
    )
    (pod,) = eventually(
        lambda: [p for p in world.pods("shard") if p["status"]["phase"] == "Pending"],
        "the pod of the Job",
    )
    kubelet.end_shard(pod, 0, {"reason": "AlreadyPublished", "message": "it is there"})
    world.wait_condition("CheckpointReady", "True", "AlreadyPublished")


def test_a_status_that_others_patch_is_corrected(
    operator: Any, world: Any, eventually: Any
) -> None:
    world.create()
    world.wait_condition("Ready", "False", "ClaimNotFound")
    wrong = {
        "type": "Ready",
        "status": "True",
        "reason": "Fine",
        "message": "",
        "lastTransitionTime": "2020-01-01T00:00:00Z",
    }
    for _ in range(5):
        changes = {"status": {"conditions": [wrong], "replicas": 7}}
        world.kube.patch(MODEL_DEPLOYMENT, "tiny", world.namespace, changes, "status")
    world.wait_condition("Ready", "False", "ClaimNotFound")
    eventually(lambda: list(world.conditions()) == CONDITIONS, "all conditions to come back")
    assert world.resource()["status"]["replicas"] == 0


def test_a_deleted_resource_takes_its_children_along_while_sharding(
    operator: Any, world: Any, kubelet: Any, eventually: Any
) -> None:
    world.add_claims("weights")
    world.create()
    (pod,) = world.wait_pods("shard")
    kubelet.write(pod, {"phase": "Running"})
    world.wait_condition("CheckpointReady", "False", "Sharding")
    world.kube.delete(MODEL_DEPLOYMENT, "tiny", world.namespace)
    eventually(lambda: world.resource() is None, "the resource to go at once")
    eventually(lambda: not world.jobs() and not world.pods("shard"), "the children to go")
    assert world.kube.get(CLAIM, "weights", world.namespace) is not None


def test_a_resource_made_again_at_once_starts_anew(
    operator: Any, world: Any, kubelet: Any, eventually: Any
) -> None:
    world.add_claims("weights")
    world.create()
    serve(world, kubelet)
    world.kube.delete(MODEL_DEPLOYMENT, "tiny", world.namespace)
    uid = world.create()["metadata"]["uid"]

    def ours() -> bool:
        jobs = world.jobs()
        return bool(jobs) and all(j["metadata"]["ownerReferences"][0]["uid"] == uid for j in jobs)

    eventually(ours, "a Job of the new resource alone")
    (pod,) = eventually(
        lambda: [p for p in world.pods("shard") if p["status"]["phase"] == "Pending"],
        "the pod of the new Job",
    )
    kubelet.publish(pod)
    eventually(
        lambda: (
            world.deployment()
            and world.deployment()["metadata"]["ownerReferences"][0]["uid"] == uid
        ),
        "a Deployment of the new resource",
    )


def test_a_static_volume_is_made_bound_and_collected(
    operator: Any, world: Any, kubelet: Any, eventually: Any
) -> None:
    name = f"{world.namespace}.tiny-weights"
    world.add_claims("models")
    spec = {"model": {"source": "pvc://models/llama"}, "volume": {"static": STATIC}}
    world.create(**spec)
    world.wait_condition("VolumeReady", "True", "Bound")
    volume = world.kube.get(VOLUME, name)
    assert volume["spec"]["csi"]["volumeHandle"] == STATIC["fileSystemId"]
    assert volume["spec"]["persistentVolumeReclaimPolicy"] == "Retain"
    claim = world.kube.get(CLAIM, "tiny-weights", world.namespace)
    assert claim["spec"]["volumeName"] == name
    world.wait_pods("shard")
    world.kube.delete(MODEL_DEPLOYMENT, "tiny", world.namespace)

    def released() -> bool:
        volume = world.kube.get(VOLUME, name)
        return volume is None or volume["status"]["phase"] == "Released"

    eventually(released, "the volume to be released")
    # made again before the collection: the released volume is replaced by one that binds
    world.create(**spec)
    world.wait_condition("VolumeReady", "True", "Bound")
    world.kube.delete(MODEL_DEPLOYMENT, "tiny", world.namespace)
    eventually(lambda: world.kube.get(VOLUME, name) is None, "the volume to be collected")


def test_what_a_changed_spec_no_longer_needs_is_deleted(
    operator: Any, world: Any, kubelet: Any, eventually: Any
) -> None:
    for name in ("one.example.com", "other.example.com"):
        world.kube.apply(DEVICE_CLASS, {"metadata": {"name": name}, "spec": {}})
    world.add_claims("models", "weights")
    world.create(
        model={"source": "pvc://models/llama"},
        volume={"static": STATIC},
        gpu={"sharing": "ResourceClaim", "deviceClassName": "one.example.com"},
        loading={"path": "Prefer"},
        replicas=0,
    )
    (pod,) = world.wait_pods("shard")
    kubelet.publish(pod)
    (old,) = eventually(
        lambda: world.kube.list(CLAIM_TEMPLATE, world.namespace), "a claim template"
    )
    world.change({"spec": {"gpu": {"deviceClassName": "other.example.com"}}})

    def replaced() -> bool:
        names = [t["metadata"]["name"] for t in world.kube.list(CLAIM_TEMPLATE, world.namespace)]
        return len(names) == 1 and names != [old["metadata"]["name"]]

    eventually(replaced, "the old claim template to go")
    world.change({"spec": {"volume": {"static": None, "existingClaim": {"name": "weights"}}}})
    (pod,) = eventually(
        lambda: [p for p in world.pods("shard") if p["status"]["phase"] == "Pending"],
        "the checkpoint to be made on the other claim",
    )
    kubelet.publish(pod)

    def gone() -> bool:
        claim = world.kube.get(CLAIM, "tiny-weights", world.namespace)
        return claim is None or "deletionTimestamp" in claim["metadata"]

    eventually(gone, "the old claim to go")
    assert world.kube.get(CLAIM, "weights", world.namespace) is not None


def test_a_part_of_a_node_without_dra_is_refused(
    operator: Any, world: Any, kubelet: Any, eventually: Any
) -> None:
    gpus = {"status": {"allocatable": {"nvidia.com/gpu": "8"}, "capacity": {"nvidia.com/gpu": "8"}}}
    world.kube.create(NODE, {"metadata": {"name": "gpu-node"}})
    try:
        world.kube.patch(NODE, "gpu-node", None, gpus, "status")
        world.add_claims("weights")
        world.create(
            gpu={"sharing": "WholeNode"},
            loading={"path": "Prefer"},
            parallelism={"tensorParallelSize": 4},
            sharding={"parallelism": 1},
        )
        (pod,) = world.wait_pods("shard")
        kubelet.publish(pod)
        condition = world.wait_condition("WeightsResident", "False", "PartialNodeWithoutDRA")
        assert "spec.parallelism.tensorParallelSize: 4" in condition["message"]
        assert world.deployment() is None
        world.change({"spec": {"parallelism": {"tensorParallelSize": 8}}})
        (pod,) = eventually(
            lambda: [p for p in world.pods("shard") if p["status"]["phase"] == "Pending"],
            "the pod of the new Job",
        )
        kubelet.publish(pod)
        world.child(DEPLOYMENT, "tiny")
        engine = world.deployment()["spec"]["template"]["spec"]["containers"][0]
        assert engine["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    finally:
        world.kube.delete(NODE, "gpu-node")


def test_the_operator_reads_no_secrets_and_was_forbidden_nothing(
    operator: Any, world: Any, cluster: Any
) -> None:
    account = "--as=system:serviceaccount:headrace-system:headrace"
    for verb, what in (("get", "secrets"), ("delete", "services"), ("get", "pods/log")):
        assert cluster.kubectl("auth", "can-i", verb, what, account, check=False).strip() == "no"
    assert cluster.kubectl("auth", "can-i", "create", "jobs.batch", account).strip() == "yes"
    text = operator.log.read_text()
    assert " is forbidden" not in text
    assert "token" not in json.dumps(operator.entries()).lower()
    assert [e for e in operator.entries() if e["level"] in {"error", "critical"}] == []


def test_a_deleted_resource_takes_its_checkpoint_along(
    operator: Any, world: Any, kubelet: Any, eventually: Any
) -> None:
    """The Job that deletes it runs for real up to its container, which the test completes.

    Also for groups, and in the foreground, where the children go before their owner.
    """
    world.add_claims("weights")
    groups = {"parallelism": {"tensorParallelSize": 2, "nodes": 2}, "sharding": {"parallelism": 1}}
    cases = {"tiny": {}, "groups": groups, "front": {}}
    for name, more in cases.items():
        # A source of its own: the same path of another one would be in use.
        model = {"source": f"pvc://weights/reclaimed-{name}"}
        checkpoint = {"reclaimPolicy": "Delete"}
        world.create(name, replicas=0, model=model, checkpoint=checkpoint, **more)
    for name in cases:
        (pod,) = world.wait_pods("shard", name=name)
        kubelet.publish(pod)
    for kind, name in ((DEPLOYMENT, "tiny"), (GROUP_SET, "groups-nodes"), (DEPLOYMENT, "front")):
        world.child(kind, name)
    assert world.resource()["metadata"]["finalizers"] == ["headrace.dev/reclaim-checkpoint"]
    for name in cases:
        how = {"propagationPolicy": "Foreground" if name == "front" else "Background"}
        world.kube.request("DELETE", MODEL_DEPLOYMENT.path(world.namespace, name), how)
    for name in cases:
        (pod,) = world.wait_pods("reclaim", name=name)
        assert world.resource(name)["metadata"]["deletionTimestamp"]
        kubelet.write(pod, {"phase": "Succeeded", "containerStatuses": []})
    for name in cases:
        eventually(
            lambda name=name: "CheckpointDeleted" in {e["reason"] for e in world.events(name)},
            f"the checkpoint of {name} to go",
        )
    eventually(lambda: world.resource() is None, "the resource to go")
    selector = "app.kubernetes.io/component=reclaim"
    eventually(
        lambda: world.kube.list(JOB, world.namespace, selector) == [], "the Jobs to go as well"
    )
