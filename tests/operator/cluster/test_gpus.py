"""GPUs of ResourceClaims, allocated for real by the scheduler from published ResourceSlices.

No driver prepares them: the node is a simulated one.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from headrace_operator.cluster.kinds import CLAIM_TEMPLATE, DEPLOYMENT, DEVICE_CLASS, Kind

pytestmark = pytest.mark.cluster
DRIVER = "gpu.example.com"
RESOURCE_SLICE = Kind("ResourceSlice", "resource.k8s.io", "v1", "resourceslices", namespaced=False)
RESOURCE_CLAIM = Kind("ResourceClaim", "resource.k8s.io", "v1", "resourceclaims")


@pytest.fixture
def four_gpus(kube: Any) -> Iterator[None]:
    """Four devices of a driver on the simulated node, and their class."""
    selectors = [{"cel": {"expression": f"device.driver == '{DRIVER}'"}}]
    kube.apply(DEVICE_CLASS, {"metadata": {"name": DRIVER}, "spec": {"selectors": selectors}})
    devices = [{"name": f"gpu-{index}"} for index in range(4)]
    pool = {"name": "kwok-0", "generation": 1, "resourceSliceCount": 1}
    spec = {"driver": DRIVER, "nodeName": "kwok-0", "pool": pool, "devices": devices}
    kube.apply(RESOURCE_SLICE, {"metadata": {"name": "kwok-0-gpus"}, "spec": spec})
    yield
    kube.delete(RESOURCE_SLICE, "kwok-0-gpus")
    kube.delete(DEVICE_CLASS, DRIVER)


def test_loader_and_engine_share_the_devices_of_one_claim(
    operator: Any, world: Any, kubelet: Any, eventually: Any, four_gpus: None
) -> None:
    world.add_claims("weights")
    world.create(
        replicas=2,
        gpu={"sharing": "ResourceClaim", "deviceClassName": DRIVER},
        loading={"path": "Prefer"},
        parallelism={"tensorParallelSize": 2},
        sharding={"parallelism": 1},
    )
    (pod,) = world.wait_pods("shard")
    kubelet.publish(pod)
    world.child(DEPLOYMENT, "tiny")
    spec = world.deployment()["spec"]["template"]["spec"]
    (template,) = world.kube.list(CLAIM_TEMPLATE, world.namespace)
    name = template["metadata"]["name"]
    assert spec["resourceClaims"] == [{"name": "gpu", "resourceClaimTemplateName": name}]
    for container in (spec["initContainers"][0], spec["containers"][0]):
        assert container["resources"]["claims"] == [{"name": "gpu"}]

    def bound() -> list[Any] | None:
        pods = [pod for pod in world.pods("serve") if pod["spec"].get("nodeName")]
        return pods if len(pods) == 2 else None

    for pod in eventually(bound, "two scheduled pods"):
        assert pod["spec"]["nodeName"] == "kwok-0"
    claims = world.kube.list(RESOURCE_CLAIM, world.namespace)
    results = [c["status"]["allocation"]["devices"]["results"] for c in claims]
    assert [len(result) for result in results] == [2, 2]
    devices = {device["device"] for result in results for device in result}
    assert devices == {"gpu-0", "gpu-1", "gpu-2", "gpu-3"}

    world.change({"spec": {"replicas": 3}})
    condition = world.wait_condition("WeightsResident", "False", "Unschedulable")
    assert "cannot allocate all claims" in condition["message"]


def test_a_missing_device_class_is_named_and_waited_for(
    operator: Any, world: Any, kubelet: Any, eventually: Any
) -> None:
    world.add_claims("weights")
    world.create(
        gpu={"sharing": "ResourceClaim", "deviceClassName": "missing.example.com"},
        loading={"path": "Prefer"},
    )
    (pod,) = world.wait_pods("shard")
    kubelet.publish(pod)
    condition = world.wait_condition("WeightsResident", "False", "DeviceClassNotFound")
    assert '"missing.example.com"' in condition["message"]
    assert world.deployment() is None
