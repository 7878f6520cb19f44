"""Today's operator takes over what an operator of template version 2 made.

No such release was published, so what stands for it is the golden file of its templates, applied
under the operator's field manager. All else is real: the API server, the ReplicaSet and the
pods that Kubernetes' controllers make of it, and the operator's process that starts afterwards.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace_operator.api.spec import ModelDeploymentSpec
from headrace_operator.cluster.kinds import DEPLOYMENT, JOB, REPLICA_SET, SERVICE
from headrace_operator.plan.names import checkpoint_key, engine_cache_key
from headrace_operator.plan.serving_pod import VERSION
from headrace_operator.plan.shard_job import retry_hash
from headrace_operator.plan.workload import template_hash

pytestmark = pytest.mark.cluster
EARLIER = 2
GOLDEN = Path(__file__).parents[1] / f"golden/template-v{EARLIER}-host.yaml"
SOURCE = "pvc://models/llama/Tiny-Llama_1"  # the file's has a space, which the CRD refuses
VERSION_ANNOTATION = "headrace.dev/template-version"


def facts(spec: ModelDeploymentSpec) -> list[str]:
    """What of a spec stands in the children, as both versions compute it."""
    parts = spec.model.source.removeprefix("pvc://models/"), template_hash(spec, "weights")
    key = checkpoint_key(spec)
    return [*parts, key, key[:8], retry_hash(spec), engine_cache_key(spec)]


def earlier_children(build: Any) -> list[Any]:
    """The children of the golden file, for a source that the CRD takes."""
    resource = build.resource()
    theirs = facts(build.spec_of(resource))
    ours = facts(build.spec_of(build.merged(resource, {"spec": {"model": {"source": SOURCE}}})))
    text = json.dumps(list(yaml.safe_load_all(GOLDEN.read_text())))
    for old, new in zip(theirs, ours, strict=True):
        assert old in text
        text = text.replace(old, new)
    return list(json.loads(text))


def apply_as_the_earlier_operator(world: Any, body: Any) -> None:
    """Apply a child as server-side apply of that operator left it."""
    made = copy.deepcopy(body)
    made["metadata"]["namespace"] = world.namespace
    made["metadata"]["ownerReferences"][0]["uid"] = world.resource()["metadata"]["uid"]
    kind = {k.name: k for k in (JOB, DEPLOYMENT, SERVICE)}[body["kind"]]
    path = kind.path(world.namespace, made["metadata"]["name"])
    query = "?fieldManager=headrace-operator&force=true&fieldValidation=Strict"
    world.kube.request("PATCH", path + query, made, "application/apply-patch+yaml")


def uids(items: list[Any]) -> set[str]:
    return {item["metadata"]["uid"] for item in items}


def test_a_deployment_of_template_version_2_is_not_rolled_before_its_spec_changes(
    operator: Any, world: Any, kubelet: Any, eventually: Any, build: Any
) -> None:
    job, deployment, service = earlier_children(build)
    assert deployment["metadata"]["annotations"][VERSION_ANNOTATION] == str(EARLIER)
    operator.stop()
    world.create(model={"source": SOURCE})
    world.add_claims("weights", "models")
    apply_as_the_earlier_operator(world, job)
    kubelet.publish(*world.wait_pods("shard"))
    apply_as_the_earlier_operator(world, deployment)
    apply_as_the_earlier_operator(world, service)
    (pod,) = world.wait_pods("serve")
    kubelet.serving(pod)

    def ready() -> Any:
        found = world.deployment()
        return found if found["status"].get("readyReplicas") == 1 else None

    before = eventually(ready, "the earlier operator's Deployment to be ready")
    replica_sets = uids(world.kube.list(REPLICA_SET, world.namespace))

    operator.start()
    world.wait_condition("Ready", "True", "Serving")
    world.change({"spec": {"replicas": 2}})
    for new in world.wait_pods("serve", 2):
        kubelet.serving(new)
    world.wait_condition("Ready", "True", "Serving")
    after = world.deployment()
    assert after["spec"]["template"] == before["spec"]["template"]
    assert after["metadata"]["annotations"][VERSION_ANNOTATION] == str(EARLIER)
    assert uids(world.kube.list(REPLICA_SET, world.namespace)) == replica_sets
    assert pod["metadata"]["uid"] in uids(world.pods("serve"))
    assert [found["metadata"]["name"] for found in world.jobs()] == [job["metadata"]["name"]]

    world.change({"spec": {"engine": {"args": ["--seed", "1"]}}})

    def rolled() -> bool:
        for new in world.pods("serve"):
            if new["status"]["phase"] == "Pending" and "nodeName" in new["spec"]:
                kubelet.serving(new)
        return pod["metadata"]["uid"] not in uids(world.pods("serve"))

    eventually(rolled, "the roll to today's template")
    metadata = world.deployment()["metadata"]
    assert metadata["annotations"][VERSION_ANNOTATION] == str(VERSION)
    assert len(world.kube.list(REPLICA_SET, world.namespace)) == 2
