"""Rollouts by the real Deployment controller: canary, pause, going back, and a drain's budget."""

from typing import Any

import pytest

from headrace_operator.cluster.kinds import DISRUPTION_BUDGET

pytestmark = pytest.mark.cluster
ANNOTATION = "headrace.dev/spec-hash"


def kstatus(resource: Any) -> str:
    """What `kubectl wait`-like tools make of a custom resource.

    After the generic rules of sigs.k8s.io/cli-utils (pkg/kstatus/status): the generation that
    was observed, then Reconciling, then Stalled, then Ready.
    """
    status = resource.get("status", {})
    found = {c["type"]: c["status"] for c in status.get("conditions", [])}
    if status.get("observedGeneration") != resource["metadata"]["generation"]:
        return "InProgress"
    if found.get("Reconciling") == "True":
        return "InProgress"
    if found.get("Stalled") == "True":
        return "Failed"
    return "Current" if found.get("Ready", "True") == "True" else "InProgress"


def engine_image(pod: Any) -> str:
    return str(pod["spec"]["containers"][0]["image"])


def is_ready(pod: Any) -> bool:
    conditions = pod["status"].get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def serve(world: Any, kubelet: Any, replicas: int, **spec: Any) -> None:
    world.add_claims("weights")
    world.create(replicas=replicas, **spec)
    (pod,) = world.wait_pods("shard")
    kubelet.publish(pod)
    for pod in world.wait_pods("serve", replicas):
        kubelet.serving(pod)
    world.wait_condition("Ready", "True", "Serving")


def serve_all(world: Any, kubelet: Any) -> None:
    for pod in world.pods("serve"):
        if not is_ready(pod):
            kubelet.serving(pod)


def test_what_does_not_become_ready_is_rolled_back_and_not_tried_again(
    operator: Any, world: Any, kubelet: Any, cluster: Any, eventually: Any
) -> None:
    serve(world, kubelet, 2, rollout={"progressDeadlineSeconds": 3})
    assert kstatus(world.resource()) == "Current"
    world.change({"spec": {"engine": {"image": "vllm:broken"}}})
    assert kstatus(world.resource()) == "InProgress"

    def crashing() -> bool:
        pods = world.pods("serve")
        broken = [pod for pod in pods if engine_image(pod) == "vllm:broken"]
        assert sum(map(is_ready, pods)) >= 1  # the other replica serves on
        if broken and "containerStatuses" not in broken[0]["status"]:
            kubelet.waiting(broken[0], "engine", "ImagePullBackOff", "no such image")
        return bool(broken)

    eventually(crashing, "a pod of the broken template")
    condition = world.wait_condition("Ready", "False", "RolledBack")
    assert "no such image" in condition["message"]
    world.wait_condition("Stalled", "True", "RolledBack")
    assert kstatus(world.resource()) == "Failed"

    def back() -> bool:
        serve_all(world, kubelet)
        pods = world.pods("serve")
        return len(pods) == 2 and all(engine_image(p) == "vllm:cpu" and is_ready(p) for p in pods)

    eventually(back, "the old template to come back")
    world.change({"spec": {"replicas": 3}})
    world.wait_pods("serve", 3)
    assert {engine_image(pod) for pod in world.pods("serve")} == {"vllm:cpu"}
    world.wait_condition("Ready", "False", "RolledBack")

    world.change({"spec": {"engine": {"image": "vllm:2"}}})

    def rolled() -> bool:
        serve_all(world, kubelet)
        return bool(world.conditions()["Ready"]["status"] == "True")

    eventually(rolled, "the next template to roll out")
    assert {engine_image(pod) for pod in world.pods("serve")} == {"vllm:2"}
    eventually(lambda: kstatus(world.resource()) == "Current", "the status to be current")
    wait = ("wait", "mdl/tiny", "-n", world.namespace, "--for=condition=Ready", "--timeout=5s")
    assert "condition met" in cluster.kubectl(*wait)


def test_a_canary_stands_before_the_others_follow_also_while_replicas_change(
    operator: Any, world: Any, kubelet: Any, eventually: Any
) -> None:
    serve(world, kubelet, 4, rollout={"canary": {"percentage": 50, "seconds": 4}})
    world.change({"spec": {"engine": {"image": "vllm:2"}}})

    def new() -> list[Any]:
        return [pod for pod in world.pods("serve") if engine_image(pod) == "vllm:2"]

    eventually(lambda: len(new()) == 2, "two canary pods")
    serve_all(world, kubelet)
    world.wait_condition("Ready", "False", "CanaryStanding")
    assert len(new()) == 2
    assert world.deployment()["spec"]["minReadySeconds"] == 4

    def rolled() -> bool:
        serve_all(world, kubelet)
        return bool(world.conditions()["Ready"]["status"] == "True")

    eventually(rolled, "the others to follow")
    assert len(new()) == 4
    assert "minReadySeconds" not in world.deployment()["spec"]


def test_a_paused_rollout_stands_still_and_scales(
    operator: Any, world: Any, kubelet: Any, eventually: Any
) -> None:
    serve(world, kubelet, 2)
    world.change({"spec": {"engine": {"image": "vllm:2"}}})

    def new() -> list[Any]:
        return [pod for pod in world.pods("serve") if engine_image(pod) == "vllm:2"]

    eventually(lambda: len(new()) == 1, "the first new pod")
    world.change({"spec": {"rollout": {"paused": True}}})
    eventually(lambda: world.deployment()["spec"].get("paused"), "the pause")
    serve_all(world, kubelet)
    world.wait_condition("Ready", "False", "RolloutPaused")
    world.change({"spec": {"replicas": 4}})
    world.wait_pods("serve", 4)
    serve_all(world, kubelet)
    old = [pod for pod in world.pods("serve") if engine_image(pod) == "vllm:cpu"]
    assert old
    world.change({"spec": {"rollout": {"paused": False}}})

    def rolled() -> bool:
        serve_all(world, kubelet)
        return bool(world.conditions()["Ready"]["status"] == "True")

    eventually(rolled, "the rest of the rollout")
    assert len(new()) == 4


def test_a_drain_takes_one_replica_at_a_time(
    operator: Any, world: Any, kubelet: Any, eventually: Any
) -> None:
    serve(world, kubelet, 2)
    budget = world.child(DISRUPTION_BUDGET, "tiny")
    assert budget["spec"]["maxUnavailable"] == 1

    def allowed() -> bool:
        status = world.kube.get(DISRUPTION_BUDGET, "tiny", world.namespace).get("status", {})
        return bool(status.get("disruptionsAllowed") == 1)

    eventually(allowed, "one disruption to be allowed")
    world.change({"spec": {"replicas": 1}})
    eventually(
        lambda: world.kube.get(DISRUPTION_BUDGET, "tiny", world.namespace) is None,
        "the budget to go with the second replica",
    )
