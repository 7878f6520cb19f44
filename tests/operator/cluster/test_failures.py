"""Bad input and failing children end in a condition that names the cause."""

from typing import Any

import pytest

from headrace_operator.cluster.kinds import DEPLOYMENT, JOB, SERVICE, Kind

pytestmark = pytest.mark.cluster

PERMANENT = [
    "SourceNotFound",
    "SourceForbidden",
    "ConfigInvalid",
    "ArchitectureUnsupported",
    "ParallelismInvalid",
    "SourceCorrupt",
    "TensorMissing",
    "VolumeReadOnly",
    "CheckpointConflict",
]
TRANSIENT = ["NoSpaceOnVolume", "StorageError", "Interrupted", "InternalError"]
LOADER = [
    "CheckpointMissing",
    "ManifestInvalid",
    "ParallelismMismatch",
    "DigestMismatch",
    "StorageError",
    "OutOfMemory",
]


def published(world: Any, kubelet: Any, name: str = "tiny", **spec: Any) -> Any:
    """Make a ModelDeployment whose checkpoint is published; return its serving pod."""
    world.create(name, **spec)
    (pod,) = world.wait_pods("shard", 1, name)
    kubelet.publish(pod)
    return world.wait_pods("serve", 1, name)[0]


def test_every_permanent_sharder_reason_ends_the_job_and_is_the_condition(
    operator: Any, world: Any, kubelet: Any, eventually: Any
) -> None:
    world.add_claims("weights")
    for reason in PERMANENT:
        world.create(reason.lower())
    for reason in PERMANENT:
        (pod,) = world.wait_pods("shard", 1, reason.lower())
        message = {"reason": reason, "message": f"config.json: x: {reason} was found"}
        kubelet.end_shard(pod, 65, message)
    for reason in PERMANENT:
        condition = world.wait_condition("CheckpointReady", "False", reason, reason.lower())
        assert f"config.json: x: {reason} was found" in condition["message"]
        assert f"pod {reason.lower()}-shard-" in condition["message"]
        assert "container shard" in condition["message"]
        eventually(
            lambda reason=reason: any(
                c["type"] == "Failed" and c["reason"] == "PodFailurePolicy"
                for j in world.jobs()
                if j["metadata"]["name"].startswith(reason.lower())
                for c in j["status"].get("conditions", [])
            ),
            "the Job to fail at its first pod",
        )
        world.wait_condition("Ready", "False", reason, reason.lower())
        events = [e["reason"] for e in world.events(reason.lower()) if e["type"] == "Warning"]
        assert reason in events


def test_a_transient_sharder_reason_is_shown_while_the_job_goes_on(
    operator: Any, world: Any, kubelet: Any
) -> None:
    world.add_claims("weights")
    for reason in TRANSIENT:
        world.create(reason.lower())
    for reason in TRANSIENT:
        (pod,) = world.wait_pods("shard", 1, reason.lower())
        kubelet.end_shard(pod, 75, {"reason": reason, "message": "the volume is full"})
    for reason in TRANSIENT:
        condition = world.wait_condition("CheckpointReady", "False", reason, reason.lower())
        assert "the volume is full" in condition["message"]
    conditions = [c for j in world.jobs() for c in j["status"].get("conditions", [])]
    assert conditions == []


def test_a_failed_job_is_tried_again_when_the_spec_changes(
    operator: Any, world: Any, kubelet: Any, eventually: Any
) -> None:
    world.add_claims("weights")
    world.create()
    (pod,) = world.wait_pods("shard")
    kubelet.end_shard(pod, 65, {"reason": "ConfigInvalid", "message": "no architectures"})
    world.wait_condition("CheckpointReady", "False", "ConfigInvalid")
    (job,) = world.jobs()
    world.change({"spec": {"replicas": 2}})
    world.wait_condition("CheckpointReady", "False", "ConfigInvalid")
    assert world.jobs()[0]["metadata"]["uid"] == job["metadata"]["uid"]
    world.change({"spec": {"sharding": {"resources": {"limits": {"memory": "1Gi"}}}}})
    eventually(
        lambda: [j for j in world.jobs() if j["metadata"]["uid"] != job["metadata"]["uid"]],
        "another Job",
    )
    world.wait_condition("CheckpointReady", "False", "ShardJobStarting")


@pytest.mark.parametrize(
    ("component", "container"), [("shard", "shard"), ("serve", "loader"), ("serve", "engine")]
)
def test_a_missing_image_is_named_with_pod_and_container(
    operator: Any, world: Any, kubelet: Any, component: str, container: str
) -> None:
    world.add_claims("weights")
    if component == "serve":
        pod = published(world, kubelet)
    else:
        world.create()
        (pod,) = world.wait_pods("shard")
    if container == "engine":
        kubelet.serving(pod, engine_ready=False)
        pod = world.pods("serve")[0]
    # the text is a kubelet's own
    text = 'Back-off pulling image "nowhere:1": ErrImagePull: not found'
    kubelet.waiting(pod, container, "ImagePullBackOff", text)
    kind = {"shard": "CheckpointReady", "loader": "WeightsResident", "engine": "Available"}
    condition = world.wait_condition(kind[container], "False", "ImagePullBackOff")
    where = f"pod {pod['metadata']['name']}, container {container}: {text}"
    assert where in condition["message"]
    world.wait_condition("Ready", "False", "ImagePullBackOff")


def test_every_loader_reason_is_the_condition(operator: Any, world: Any, kubelet: Any) -> None:
    import json

    world.add_claims("weights")
    pods = {reason: published(world, kubelet, reason.lower()) for reason in LOADER}
    for reason, pod in pods.items():
        message = json.dumps({"reason": reason, "message": f"part 0: {reason} was found"})
        ended = {"terminated": {"exitCode": 1, "reason": "Error", "message": message}}
        kubelet.loading(pod, lastState=ended, restartCount=1)
    for reason in LOADER:
        condition = world.wait_condition("WeightsResident", "False", reason, reason.lower())
        assert f"part 0: {reason} was found" in condition["message"]
        assert "container loader" in condition["message"]


def test_a_killed_loader_and_a_killed_engine_are_told_apart(
    operator: Any, world: Any, kubelet: Any
) -> None:
    world.add_claims("weights")
    pod = published(world, kubelet)
    killed = {"terminated": {"exitCode": 137, "reason": "Error"}}
    kubelet.loading(pod, lastState=killed, restartCount=1)
    world.wait_condition("WeightsResident", "False", "LoaderFailed")
    kubelet.serving(pod)
    world.wait_condition("Ready", "True", "Serving")
    kubelet.serving(pod, engine_ready=False, lastState=killed, restartCount=1)
    condition = world.wait_condition("Available", "False", "EngineFailed")
    assert "exit code 137" in condition["message"]
    # the weights have stayed where they were
    assert world.conditions()["WeightsResident"]["status"] == "True"
    kubelet.serving(pod)
    world.wait_condition("Ready", "True", "Serving")


def test_a_missing_source_claim_is_named(operator: Any, world: Any) -> None:
    world.add_claims("weights")
    world.create(model={"source": "pvc://models/llama"})
    condition = world.wait_condition("Ready", "False", "SourceClaimNotFound")
    assert "models" in condition["message"]
    assert world.jobs() == []
    world.add_claims("models")
    world.wait_condition("CheckpointReady", "False", "ShardJobStarting")


@pytest.mark.parametrize(
    ("pod", "fragment"),
    [
        ({"tolerations": [{"key": "a", "operator": "Sometimes"}]}, "Sometimes"),
        ({"tolerations": [{"kee": "a"}]}, "kee"),
        ({"affinity": {"nodeAffinity": {"unknown": 1}}}, "unknown"),
    ],
)
def test_what_the_api_server_refuses_in_a_child_is_a_condition(
    operator: Any, world: Any, kubelet: Any, eventually: Any, pod: Any, fragment: str
) -> None:
    world.add_claims("weights")
    world.create(pod=pod)
    (shard,) = world.wait_pods("shard")
    kubelet.publish(shard)
    condition = world.wait_condition("WeightsResident", "False", "DeploymentInvalid")
    assert fragment in condition["message"]
    world.wait_condition("Ready", "False", "DeploymentInvalid")
    world.change({"spec": {"pod": {"tolerations": None, "affinity": None}}})
    world.child(DEPLOYMENT, "tiny")
    world.wait_condition("WeightsResident", "False", "PodsStarting")


@pytest.mark.parametrize("kind", [DEPLOYMENT, SERVICE], ids=lambda k: k.name)
def test_an_object_of_someone_else_with_a_childs_name_is_left_alone(
    operator: Any, world: Any, kubelet: Any, kind: Kind
) -> None:
    labels = {"app": "mine"}
    template = {
        "metadata": {"labels": labels},
        "spec": {"containers": [{"name": "c", "image": "mine:1"}]},
    }
    specs = {
        DEPLOYMENT: {"replicas": 0, "selector": {"matchLabels": labels}, "template": template},
        SERVICE: {"selector": labels, "ports": [{"port": 1234}]},
    }
    metadata = {"name": "tiny", "namespace": world.namespace}
    mine = world.kube.create(kind, {"metadata": metadata, "spec": specs[kind]})
    world.add_claims("weights")
    world.create()
    (shard,) = world.wait_pods("shard")
    kubelet.publish(shard)
    aspect = "Available" if kind is SERVICE else "WeightsResident"
    condition = world.wait_condition(aspect, "False", f"{kind.name}NameConflict")
    assert f"{kind.name} tiny" in condition["message"]
    assert world.kube.get(kind, "tiny", world.namespace)["spec"] == mine["spec"]
    world.kube.delete(kind, "tiny", world.namespace)
    world.wait_condition("WeightsResident", "False", "PodsStarting")


def test_pods_that_a_quota_forbids_are_explained(operator: Any, world: Any, kubelet: Any) -> None:
    quota = Kind("ResourceQuota", "", "v1", "resourcequotas")
    world.kube.create(
        quota,
        {
            "metadata": {"name": "none", "namespace": world.namespace},
            "spec": {"hard": {"count/pods": "1"}},
        },
    )
    world.add_claims("weights")
    world.create()
    (shard,) = world.wait_pods("shard")  # the one that is allowed; it stays when it is done
    kubelet.publish(shard)
    condition = world.wait_condition("WeightsResident", "False", "PodsRejected")
    assert "exceeded quota" in condition["message"]


def test_an_event_explains_a_job_without_a_pod(operator: Any, world: Any, kubelet: Any) -> None:
    quota = Kind("ResourceQuota", "", "v1", "resourcequotas")
    body = {
        "metadata": {"name": "none", "namespace": world.namespace},
        "spec": {"hard": {"count/pods": "0"}},
    }
    world.kube.create(quota, body)
    world.add_claims("weights")
    world.create()
    world.wait_condition("CheckpointReady", "False", "ShardJobStarting")
    # events are looked up only after the Job has stood still for a while
    condition = world.wait_condition("CheckpointReady", "False", "FailedCreate")
    assert "exceeded quota" in condition["message"]
    assert world.kube.list(JOB, world.namespace)
