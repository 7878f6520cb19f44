"""Replicas that span nodes, with LeaderWorkerSet's own definition on the real API server.

Its controller does not run: `GroupController` makes the pods and the status it would make.
"""

from dataclasses import dataclass
from typing import Any

import pytest

from headrace_operator.cluster.kinds import GROUP_SET, POD, SERVICE

pytestmark = pytest.mark.cluster
PREFIX = "leaderworkerset.sigs.k8s.io"


@dataclass
class GroupController:
    """What LeaderWorkerSet's controller would do, for groups that are made once."""

    world: Any

    def make_pods(self, group_set: Any) -> list[Any]:
        """Make the pods of all groups, as leader and worker templates have them."""
        spec = group_set["spec"]
        size = spec["leaderWorkerTemplate"]["size"]
        return [
            self._pod(group_set, group, worker)
            for group in range(spec["replicas"])
            for worker in range(size)
        ]

    def report(self, group_set: Any, ready: int) -> None:
        replicas = group_set["spec"]["replicas"]
        counts = {"replicas": replicas, "updatedReplicas": replicas, "readyReplicas": ready}
        observed = {"observedGeneration": group_set["metadata"]["generation"]}
        metadata = group_set["metadata"]
        self.world.kube.patch(
            GROUP_SET,
            metadata["name"],
            metadata["namespace"],
            {"status": counts | observed},
            "status",
        )

    def _pod(self, group_set: Any, group: int, worker: int) -> Any:
        role = "workerTemplate" if worker else "leaderTemplate"
        template = group_set["spec"]["leaderWorkerTemplate"][role]
        name = f"{group_set['metadata']['name']}-{group}" + (f"-{worker}" if worker else "")
        own = {f"{PREFIX}/group-index": str(group), f"{PREFIX}/worker-index": str(worker)}
        metadata = {
            "name": name,
            "namespace": self.world.namespace,
            "labels": {**template["metadata"]["labels"], **own},
            "annotations": template["metadata"]["annotations"],
        }
        return self.world.kube.create(POD, {"metadata": metadata, "spec": template["spec"]})


def test_a_replica_of_two_nodes_serves_when_both_hold_their_ranks(
    operator: Any, world: Any, kubelet: Any, eventually: Any
) -> None:
    world.add_claims("weights")
    world.create(
        replicas=2,
        parallelism={"tensorParallelSize": 4, "nodes": 2},
        sharding={"parallelism": 1},
    )
    (pod,) = world.wait_pods("shard")
    kubelet.publish(pod)
    group_set = world.child(GROUP_SET, "tiny-nodes")
    assert world.deployment() is None
    template = group_set["spec"]["leaderWorkerTemplate"]
    assert (template["size"], template["restartPolicy"]) == (2, "RecreateGroupOnPodRestart")
    strategy = group_set["spec"]["rolloutStrategy"]["rollingUpdateConfiguration"]
    assert strategy == {"maxSurge": 0, "maxUnavailable": 1, "partition": 0}

    controller = GroupController(world)
    pods = controller.make_pods(group_set)
    for pod in pods[:3]:
        kubelet.serving(pod)
    world.wait_condition("WeightsResident", "False", "PodsStarting")
    kubelet.serving(pods[3])
    controller.report(group_set, ready=2)
    world.wait_condition("Ready", "True", "Serving")
    selector = world.kube.get(SERVICE, "tiny", world.namespace)["spec"]["selector"]
    assert selector[f"{PREFIX}/worker-index"] == "0"

    world.change({"spec": {"replicas": 1, "rollout": {"paused": True}}})

    def scaled() -> bool:
        spec = world.kube.get(GROUP_SET, "tiny-nodes", world.namespace)["spec"]
        partition = spec["rolloutStrategy"]["rollingUpdateConfiguration"]["partition"]
        return bool((spec["replicas"], partition) == (1, 1))

    eventually(scaled, "the LeaderWorkerSet to follow")
