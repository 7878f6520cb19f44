"""Replicas that span nodes, as groups of pods that LeaderWorkerSet's own controller makes."""

import base64
import http.client
import json
import ssl
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace_operator.cluster.kinds import GROUP_SET, SERVICE, Kind
from localkube import Cluster
from localkube.pki import Authority
from localkube.sources import source

pytestmark = pytest.mark.cluster
PREFIX = "leaderworkerset.sigs.k8s.io"
LOCAL = "127.0.0.1"
PARTS = ("group", "worker")
ALL = ("0/0", "0/1", "1/0", "1/1")
STATEFUL_SET = Kind("StatefulSet", "apps", "v1", "statefulsets")


def configured(port: int, directory: Path) -> Path:
    """Write the controller's configuration: no second instance, certificates made here."""
    path = directory / "config.json"
    content = {
        "apiVersion": "config.lws.x-k8s.io/v1alpha1",
        "kind": "Configuration",
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {"enable": False},
        "webhook": {"host": LOCAL, "port": port, "certDir": str(directory)},
        "metrics": {"bindAddress": "0"},
        "health": {"healthProbeBindAddress": "0"},
    }
    path.write_text(json.dumps(content))
    return path


def webhooks(port: int, authority: Path) -> list[dict[str, Any]]:
    """Return LeaderWorkerSet's webhooks, called at an address in place of a Service."""
    manifest = source("sigs.k8s.io/lws", "lws") / "config/webhook/manifests.yaml"
    found = list(yaml.safe_load_all(manifest.read_text()))
    for configuration in found:
        for webhook in configuration["webhooks"]:
            path = webhook["clientConfig"]["service"]["path"]
            bundle = base64.b64encode(authority.read_bytes()).decode()
            webhook["clientConfig"] = {"url": f"https://{LOCAL}:{port}{path}", "caBundle": bundle}
            if "pods" in webhook["rules"][0]["resources"]:
                labelled = [{"key": f"{PREFIX}/name", "operator": "Exists"}]
                webhook["objectSelector"] = {"matchExpressions": labelled}
    return found


@pytest.fixture(scope="module")
def controller(
    cluster: Cluster,
    kube: Any,
    eventually: Any,
    free_port: Callable[[], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[None]:
    """LeaderWorkerSet's controller as a process, and its webhooks."""
    directory = tmp_path_factory.mktemp("lws")
    authority = Authority(directory)
    authority.issue("tls", "webhook", hosts=[LOCAL])
    port, bundle = free_port(), authority.credential.certificate
    manifest = yaml.safe_dump_all(webhooks(port, bundle))
    flags = {"config": configured(port, directory), "kubeconfig": cluster.kubeconfig}
    command = [cluster.bin("lws-manager"), *(f"--{name}={flags[name]}" for name in flags)]
    with (directory / "controller.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            eventually(lambda: is_served(port, bundle), "the controller's webhooks")
            cluster.kubectl("apply", "-f", "-", stdin=manifest)
            yield
        finally:
            cluster.kubectl("delete", "--ignore-not-found", "-f", "-", stdin=manifest)
            process.terminate()
            process.wait(timeout=20)


def is_served(port: int, authority: Path) -> bool:
    """Whether the last webhook that the controller registers is there."""
    context = ssl.create_default_context(cafile=str(authority))
    connection = http.client.HTTPSConnection(LOCAL, port, timeout=5, context=context)
    try:
        connection.request("POST", "/validate--v1-pod")
        return connection.getresponse().status != 404
    except OSError:
        return False
    finally:
        connection.close()


@dataclass
class Groups:
    """The serving pods of two groups of two, and what a kubelet writes about them."""

    world: Any
    kubelet: Any
    eventually: Any
    name: str = "tiny"

    def wait(self, what: str, check: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until the pods, by group and index within it, satisfy `check`."""

        def pods() -> dict[str, Any] | None:
            pods = self.world.pods("serve", self.name)
            found = {
                "/".join(pod["metadata"]["labels"][f"{PREFIX}/{part}-index"] for part in PARTS): pod
                for pod in pods
                if not self._is_left_over(pod, pods)
            }
            return found if check(found) else None

        return dict(self.eventually(pods, what))

    def _is_left_over(self, pod: Any, pods: list[Any]) -> bool:
        """Whether it is a worker that the StatefulSet of an earlier leader made before it went."""
        (owner,) = pod["metadata"]["ownerReferences"]
        if pod["metadata"]["labels"][f"{PREFIX}/worker-index"] == "0":
            return False
        made_by = self.world.kube.get(STATEFUL_SET, owner["name"], self.world.namespace)
        if made_by is None or made_by["metadata"]["uid"] != owner["uid"]:
            return True
        leaders = {pod["metadata"]["uid"] for pod in pods}
        return not leaders & {of["uid"] for of in made_by["metadata"]["ownerReferences"]}

    def serve(self, pods: dict[str, Any], *places: str) -> None:
        for place in places:
            self.kubelet.serving(pods[place])


def are(pods: dict[str, Any], *places: str) -> bool:
    return sorted(pods) == sorted(places)


def uids(pods: dict[str, Any], group: int) -> set[str]:
    return {pod["metadata"]["uid"] for place, pod in pods.items() if place[0] == str(group)}


def test_a_replica_of_two_nodes_serves_rolls_and_restarts_as_one_group(
    operator: Any, world: Any, kubelet: Any, eventually: Any, controller: None
) -> None:
    world.add_claims("weights")
    world.create(
        replicas=2,
        parallelism={"tensorParallelSize": 4, "nodes": 2},
        sharding={"parallelism": 1},
    )
    (pod,) = world.wait_pods("shard")
    kubelet.publish(pod)
    groups = Groups(world, kubelet, eventually)
    pods = groups.wait("two groups", lambda found: are(found, *ALL))
    assert world.deployment() is None
    for place, pod in pods.items():
        loader = pod["spec"]["initContainers"][0]
        told = {variable["name"]: variable.get("value") for variable in loader["env"]}
        assert told["LWS_WORKER_INDEX"] == place[-1]
        assert told["LWS_LEADER_ADDRESS"].startswith(f"tiny-nodes-{place[0]}.tiny-nodes.")
    groups.serve(pods, "0/0", "0/1", "1/0")
    world.wait_condition("WeightsResident", "False", "PodsStarting")
    groups.serve(pods, "1/1")
    world.wait_condition("Ready", "True", "Serving")
    selector = world.kube.get(SERVICE, "tiny", world.namespace)["spec"]["selector"]
    assert selector[f"{PREFIX}/worker-index"] == "0"

    # One group after the other, the last first.
    world.change({"spec": {"engine": {"env": [{"name": "CHANGED", "value": "yes"}]}}})
    first = groups.wait(
        "the second group to be replaced",
        lambda found: are(found, *ALL) and not uids(found, 1) & uids(pods, 1),
    )
    assert uids(first, 0) == uids(pods, 0)
    world.wait_condition("Ready", "False")
    assert world.conditions()["Available"]["status"] == "True"
    groups.serve(first, "1/0", "1/1")
    second = groups.wait(
        "the first group to be replaced",
        lambda found: are(found, *ALL) and not uids(found, 0) & uids(pods, 0),
    )
    assert uids(second, 1) == uids(first, 1)
    groups.serve(second, "0/0", "0/1")
    world.wait_condition("Ready", "True", "Serving")

    kubelet.serving(second["1/1"], restartCount=1)
    third = groups.wait(
        "the group of a restarted container to be replaced",
        lambda found: are(found, *ALL) and not uids(found, 1) & uids(second, 1),
    )
    assert uids(third, 0) == uids(second, 0)
    groups.serve(third, "1/0", "1/1")
    world.wait_condition("Ready", "True", "Serving")

    world.change({"spec": {"replicas": 1, "rollout": {"paused": True}}})
    groups.wait("one group less", lambda found: are(found, "0/0", "0/1"))
    group_set = world.kube.get(GROUP_SET, "tiny-nodes", world.namespace)
    strategy = group_set["spec"]["rolloutStrategy"]["rollingUpdateConfiguration"]
    assert strategy == {"maxSurge": 0, "maxUnavailable": 1, "partition": 1}


def test_groups_of_the_longest_name_that_do_not_become_ready_are_rolled_back(
    operator: Any, world: Any, kubelet: Any, eventually: Any, controller: None
) -> None:
    name = "n" * 63
    world.add_claims("weights")
    world.create(
        name,
        replicas=2,
        parallelism={"tensorParallelSize": 4, "nodes": 2},
        sharding={"parallelism": 1},
        rollout={"maxUnavailable": "25%"},  # less than one, which is one
    )
    (pod,) = world.wait_pods("shard", name=name)
    kubelet.publish(pod)
    groups = Groups(world, kubelet, eventually, name)
    pods = groups.wait("two groups", lambda found: are(found, *ALL))
    groups.serve(pods, *ALL)
    world.wait_condition("Ready", "True", "Serving", name)

    world.change({"spec": {"engine": {"image": "vllm:broken"}}}, name)
    broken = groups.wait(
        "a group of the broken template",
        lambda found: are(found, *ALL) and not uids(found, 1) & uids(pods, 1),
    )
    kubelet.waiting(broken["1/0"], "loader", "ImagePullBackOff", "no such image")
    world.wait_condition("WeightsResident", "False", "ImagePullBackOff", name)
    world.change({"spec": {"rollout": {"progressDeadlineSeconds": 2}}}, name)
    condition = world.wait_condition("Ready", "False", "RolledBack", name)
    assert "no such image" in condition["message"]
    world.wait_condition("Stalled", "True", "RolledBack", name)
    back = groups.wait(
        "the earlier template to come back",
        lambda found: are(found, *ALL) and not uids(found, 1) & uids(broken, 1),
    )
    assert {pod["spec"]["containers"][0]["image"] for pod in back.values()} == {"vllm:cpu"}
    groups.serve(back, "1/0", "1/1")

    # The spec that was: no group rolls for it, nor was the first one ever replaced.
    world.change({"spec": {"engine": {"image": "vllm:cpu"}}}, name)
    world.wait_condition("Ready", "True", "Serving", name)
    last = groups.wait("the same groups", lambda found: are(found, *ALL))
    assert uids(last, 0) == uids(pods, 0)
    assert uids(last, 1) == uids(back, 1)
