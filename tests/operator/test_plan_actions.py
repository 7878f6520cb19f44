"""What is applied, scaled and deleted: shards first, rolls after, and nothing by accident."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from headrace_operator.plan import Deletion, Observed, Scale, Settings, needs, plan
from headrace_operator.plan.serving_pod import VERSION
from headrace_operator.plan.volume import is_orphan

STATIC = {
    "volume": {
        "existingClaim": None,
        "static": {
            "fileSystemId": "fs-01234567",
            "dnsName": "fs-01234567.fsx.eu-central-1.amazonaws.com",
            "capacityGiB": 1,
        },
    }
}
GPU = {"gpu": {"sharing": "ResourceClaim"}, "loading": {"path": "Prefer"}}


def kinds(result: Any) -> list[str]:
    return [desired.body["kind"] for desired in result.apply]


def of_kind(result: Any, kind: str) -> dict[str, Any]:
    (body,) = (d.body for d in result.apply if d.body["kind"] == kind)
    return dict(body)


def test_a_new_deployment_waits_for_the_checkpoint(build: SimpleNamespace) -> None:
    resource = build.resource()
    nothing = Observed(claim=build.claim(), source_claim=build.claim("models"))
    assert kinds(build.plan(resource, nothing)) == ["Job"]
    running = build.world(resource, jobs=(build.job(resource),))
    assert kinds(build.plan(resource, running)) == []
    assert kinds(build.plan(resource, build.world(resource))) == ["Deployment", "Service"]


def test_a_remote_source_needs_no_claim_and_takes_its_credentials_from_a_secret(
    build: SimpleNamespace,
) -> None:
    token = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
    resource = build.resource(
        {
            "model": {"source": "hf://meta-llama/Llama-3.1-8B", "revision": "v1"},
            "sharding": {"env": [token]},
        }
    )
    assert needs(resource).source_claim is None
    job = of_kind(build.plan(resource, Observed(claim=build.claim())), "Job")
    pod = job["spec"]["template"]["spec"]
    (shard,) = pod["containers"]
    assert [volume["name"] for volume in pod["volumes"]] == ["weights", "tmp"]
    assert [mount["name"] for mount in shard["volumeMounts"]] == ["weights", "tmp"]
    assert shard["env"] == [{"name": "HOME", "value": "/tmp"}, token]
    source = ["--source", "hf://meta-llama/Llama-3.1-8B", "--revision", "v1"]
    assert shard["command"][2:6] == source
    output = shard["command"][shard["command"].index("--output") + 1]
    assert output.startswith("/mnt/weights/headrace/llama-3-1-8b/")


def test_a_changed_model_shards_first_and_keeps_the_old_template(build: SimpleNamespace) -> None:
    old = build.resource()
    live = build.deployment(old)
    new = build.resource({"model": {"revision": "v2"}, "replicas": 3})
    observed = build.world(new, deployment=live, jobs=(build.done(old),))
    result = build.plan(new, observed)
    assert kinds(result) == ["Job", "Service", "PodDisruptionBudget"]
    assert result.scale == Scale("Deployment", "tiny", {"replicas": 3})
    # the Job of the old checkpoint is done with
    assert [(d.kind, d.name) for d in result.delete] == [("Job", build.job_name(old))]
    published = replace(observed, jobs=(build.done(new),))
    result = build.plan(new, published)
    assert kinds(result) == ["Deployment", "Service", "PodDisruptionBudget"]
    assert result.scale is None
    assert of_kind(result, "Deployment")["spec"]["replicas"] == 3


def test_a_failed_shard_job_keeps_the_old_pods_serving(build: SimpleNamespace) -> None:
    live = build.deployment(build.resource())
    new = build.resource({"model": {"revision": "v2"}})
    failed = build.job(new, build.condition("Failed"))
    pod = build.serving_pod(
        build.resource(),
        build.container("loader", ready=True),
        build.container("engine", ready=True),
    )
    observed = build.world(new, deployment=live, jobs=(failed,), pods=(pod,))
    assert kinds(build.plan(new, observed)) == ["Service"]
    conditions = build.conditions(new, observed)
    assert conditions["Available"]["status"] == "True"
    assert conditions["Ready"]["reason"] == conditions["CheckpointReady"]["reason"]


def test_a_failed_job_is_tried_again_when_the_spec_changes_but_not_its_replicas(
    build: SimpleNamespace,
) -> None:
    resource = build.resource()
    failed = build.job(resource, build.condition("Failed"))
    for change, retried in (
        ({"replicas": 5}, False),
        ({"sharding": {"resources": {"limits": {"memory": "64Gi"}}}}, True),
        ({"engine": {"args": ["--x"]}}, True),
    ):
        changed = build.resource(change)
        result = build.plan(changed, build.world(changed, jobs=(failed,)))
        job = Deletion("Job", build.job_name(resource), "ns", "uid-job")
        assert result.delete == ((job,) if retried else ())
        assert kinds(result) == []


def test_a_job_that_has_not_begun_gives_way_to_one_of_the_changed_spec(
    build: SimpleNamespace,
) -> None:
    """It may wait for a node or an image that will never be there."""
    changed = build.resource({"sharding": {"nodeSelector": {"pool": "cpu"}}})
    pending = build.job_pod(build.container("shard"), phase="Pending")
    running = build.job_pod(build.container("shard"), phase="Running")
    for status, pods, replaced in (
        ({}, (pending,), True),
        ({}, (), True),
        ({}, (running,), False),
        ({"failed": 1}, (pending,), False),
    ):
        job = build.job(build.resource(), **status)
        observed = build.world(changed, jobs=(job,), pods=pods)
        result = build.plan(changed, observed)
        assert [deletion.uid for deletion in result.delete] == (["uid-job"] if replaced else [])
        same = build.plan(build.resource(), observed)
        assert same.delete == ()


def test_no_part_of_a_source_is_taken_for_a_variable(build: SimpleNamespace) -> None:
    resource = build.resource({"model": {"source": "pvc://models/a$(HOME)$$b"}})
    observed = Observed(claim=build.claim(), source_claim=build.claim("models"))
    job = of_kind(build.plan(resource, observed), "Job")
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[command.index("--source") + 1] == "/mnt/source/a$$(HOME)$$$$b"
    assert "a$$(HOME)$$$$b" in command[command.index("--identity") + 1]


def test_only_a_quantization_that_is_made_is_an_argument_of_the_job(build: SimpleNamespace) -> None:
    """The Jobs of earlier versions stay as they are; the key differs in any case."""
    names = set()
    for quantization, arguments in (("none", []), ("fp8", ["--quantization", "fp8"])):
        resource = build.resource({"model": {"quantization": quantization}})
        observed = Observed(claim=build.claim(), source_claim=build.claim("models"))
        job = of_kind(build.plan(resource, observed), "Job")
        command = job["spec"]["template"]["spec"]["containers"][0]["command"]
        at = command.index("--layout")
        assert command[at - len(arguments) : at] == arguments
        assert ("--quantization" in command) == bool(arguments)
        names.add(build.job_name(resource))
    assert len(names) == 2


def test_a_deleted_job_is_made_again_and_one_being_deleted_is_awaited(
    build: SimpleNamespace,
) -> None:
    resource = build.resource()
    live = build.deployment(resource)
    gone = build.world(resource, jobs=(), deployment=live)
    assert kinds(build.plan(resource, gone)) == ["Job", "Deployment", "Service"]
    going = build.job(resource, build.condition("Failed"))
    going["metadata"]["deletionTimestamp"] = "2026-11-24T12:00:00Z"
    observed = build.world(resource, jobs=(going,))
    result = build.plan(resource, observed)
    assert (kinds(result), result.delete) == ([], ())
    condition = build.conditions(resource, observed)["CheckpointReady"]
    assert condition["reason"] == "ShardJobReplacing"


def test_an_operator_with_another_loader_image_changes_no_template(build: SimpleNamespace) -> None:
    resource = build.resource()
    observed = build.world(resource, deployment=build.deployment(resource))
    newer = Settings(loader_image="loader:2")
    before = of_kind(plan(resource, observed, build.settings, build.now), "Deployment")
    assert of_kind(plan(resource, observed, newer, build.now), "Deployment") == before
    changed = build.resource({"engine": {"args": ["--x"]}})
    after = of_kind(plan(changed, observed, newer, build.now), "Deployment")
    loader = after["spec"]["template"]["spec"]["initContainers"][0]
    assert loader["image"] == "loader:2"


def test_an_operator_with_another_template_leaves_the_deployment_alone_but_scales_it(
    build: SimpleNamespace,
) -> None:
    resource = build.resource()
    live = build.deployment(resource)
    live["metadata"]["annotations"]["headrace.dev/template-version"] = "0"
    observed = build.world(resource, deployment=live)
    result = build.plan(resource, observed)
    assert (kinds(result), result.scale) == (["Service"], None)
    scaled = build.resource({"replicas": 4})
    assert build.plan(scaled, observed).scale == Scale("Deployment", "tiny", {"replicas": 4})
    # scaling is no change of the spec that the template depends on
    assert kinds(build.plan(scaled, observed)) == ["Service", "PodDisruptionBudget"]
    changed = build.resource({"engine": {"args": ["--x"]}})
    body = of_kind(build.plan(changed, observed), "Deployment")
    assert body["metadata"]["annotations"]["headrace.dev/template-version"] == str(VERSION)


def test_a_field_with_a_default_that_is_spelled_out_changes_no_template(
    build: SimpleNamespace,
) -> None:
    live = build.deployment(build.resource())
    explicit = build.resource({"model": {"revision": "main"}, "pod": {"fsGroup": 1000}})
    newer = Settings(loader_image="loader:2")
    observed = build.world(explicit, deployment=live)
    body = of_kind(plan(explicit, observed, newer, build.now), "Deployment")
    assert body["metadata"]["annotations"]["headrace.dev/loader-image"] == "loader:1"


@pytest.mark.parametrize(
    ("change", "rolls"),
    [
        ({"sharding": {"nodeSelector": {"a": "b"}}}, False),
        ({"replicas": 7}, False),
        ({"pod": {"annotations": {"a": "b"}}}, True),
        ({"engine": {"image": "vllm:2"}}, True),
        ({"loading": {"gate": "Overlap"}}, True),
        ({"volume": {"existingClaim": {"name": "other"}}}, True),
    ],
)
def test_what_rolls_the_pods(build: SimpleNamespace, change: Any, rolls: bool) -> None:
    live = build.deployment(build.resource())
    changed = build.resource(change)
    name = changed["spec"]["volume"]["existingClaim"]["name"]
    observed = build.world(changed, claim=build.claim(name), deployment=live)
    template = of_kind(build.plan(changed, observed), "Deployment")["spec"]["template"]
    assert (template != live["spec"]["template"]) is rolls


def test_a_static_volume_is_made_before_the_job(build: SimpleNamespace) -> None:
    resource = build.resource(STATIC)
    assert needs(resource).volume == "ns.tiny-weights"
    assert kinds(build.plan(resource, Observed())) == ["PersistentVolumeClaim", "PersistentVolume"]
    bound = Observed(claim=build.claim("tiny-weights"), source_claim=build.claim("models"))
    expected = ["PersistentVolumeClaim", "PersistentVolume", "Job"]
    assert kinds(build.plan(resource, bound)) == expected


def test_a_released_volume_is_replaced(build: SimpleNamespace) -> None:
    resource = build.resource(STATIC)
    volume = of_kind(build.plan(resource, Observed()), "PersistentVolume")
    volume["metadata"] |= {"uid": "uid-pv"}
    volume["status"] = {"phase": "Released"}
    result = build.plan(resource, Observed(volume=volume))
    assert result.delete == (Deletion("PersistentVolume", "ns.tiny-weights", None, "uid-pv"),)
    assert kinds(result) == []


def orphan() -> dict[str, Any]:
    return {
        "metadata": {
            "name": "ns.tiny-weights",
            "labels": {
                "app.kubernetes.io/managed-by": "headrace",
                "headrace.dev/namespace": "ns",
                "headrace.dev/model-deployment": "tiny",
            },
        },
        "spec": {
            "persistentVolumeReclaimPolicy": "Retain",
            "csi": {"driver": "fsx.csi.aws.com"},
        },
        "status": {"phase": "Released"},
    }


def test_only_a_released_volume_of_ours_that_keeps_its_data_is_an_orphan() -> None:
    assert is_orphan(orphan(), is_wanted=False)
    assert is_orphan(orphan() | {"status": {"phase": "Available"}}, is_wanted=False)
    assert not is_orphan(orphan(), is_wanted=True)
    for path, value in (
        (("metadata", "name"), "other"),
        (("metadata", "labels", "app.kubernetes.io/managed-by"), "someone"),
        (("spec", "persistentVolumeReclaimPolicy"), "Delete"),
        (("spec", "csi", "driver"), "ebs.csi.aws.com"),
        (("status", "phase"), "Bound"),
        (("metadata", "deletionTimestamp"), "2026-11-24T12:00:00Z"),
    ):
        changed: Any = orphan()
        part = changed
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        assert not is_orphan(changed, is_wanted=False), path


def test_stale_children_go_only_after_the_rollout(build: SimpleNamespace) -> None:
    resource = build.resource(GPU)
    template = {"metadata": {"name": "tiny-gpu-old", "namespace": "ns", "uid": "uid-old"}}
    wanted = of_kind(build.plan(resource, build.world(resource)), "ResourceClaimTemplate")
    current = {"metadata": {**wanted["metadata"], "uid": "uid-current"}}
    for updated, expected in ((0, ()), (1, ("tiny-gpu-old",))):
        observed = build.world(
            resource,
            deployment=build.deployment(resource, updatedReplicas=updated),
            claim_templates=(template, current),
        )
        assert tuple(d.name for d in build.plan(resource, observed).delete) == expected


def test_long_names_stay_names_and_differ(build: SimpleNamespace) -> None:
    names = set()
    for suffix in ("a", "b"):
        resource = build.resource()
        resource["metadata"]["name"] = "x" * 62 + suffix
        result = build.plan(
            resource, Observed(claim=build.claim(), source_claim=build.claim("models"))
        )
        name = of_kind(result, "Job")["metadata"]["name"]
        assert len(name) <= 63
        names.add(name)
    assert len(names) == 2


def test_the_identity_given_to_the_sharder_names_the_directory(build: SimpleNamespace) -> None:
    import hashlib

    resource = build.resource()
    observed = Observed(claim=build.claim(), source_claim=build.claim("models"))
    job = of_kind(build.plan(resource, observed), "Job")
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    identity = command[command.index("--identity") + 1]
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    output = command[command.index("--output") + 1]
    assert output == f"/mnt/weights/headrace/tiny-llama-1/{key}"
    assert command[command.index("--source") + 1] == "/mnt/source/llama/Tiny Llama_1"


def test_transitions_are_reported_once_and_named_alike_after_a_crash(
    build: SimpleNamespace,
) -> None:
    resource = build.resource()
    observed = Observed()
    first = build.plan(resource, observed)
    assert [(t.condition, t.reason, t.warning) for t in first.transitions] == [
        ("VolumeReady", "ClaimNotFound", True)
    ]
    again = plan(resource, observed, build.settings, build.now.replace(hour=13))
    assert [t.key for t in again.transitions] == [t.key for t in first.transitions]
    written = {**resource, "status": first.status["status"]}
    assert build.plan(written, observed).transitions == ()
    fixed = build.world(resource, jobs=(build.job(resource),))
    changes = [(t.condition, t.reason) for t in build.plan(written, fixed).transitions]
    assert changes == [("VolumeReady", "Bound"), ("CheckpointReady", "ShardJobStarting")]


def test_what_only_repeats_other_conditions_is_no_event(build: SimpleNamespace) -> None:
    resource = build.resource()
    pod = build.serving_pod(
        resource, build.container("loader", ready=True), build.container("engine", ready=True)
    )
    observed = build.world(resource, deployment=build.deployment(resource), pods=(pod,))
    written = {**resource, "status": build.plan(resource, observed).status["status"]}
    scaled = {**written, "spec": {**written["spec"], "replicas": 2}}
    news = build.plan(scaled, observed).transitions
    assert [str(t.condition) for t in news] == ["WeightsResident", "Ready"]


def test_claims_that_are_not_watched_are_looked_at_again(build: SimpleNamespace) -> None:
    resource = build.resource()
    assert build.plan(resource, Observed()).requeue_seconds == 5.0
    assert build.plan(resource, build.world(resource)).requeue_seconds == 16.0
    done = build.world(resource, deployment=build.deployment(resource))
    pod = build.serving_pod(
        resource, build.container("loader", ready=True), build.container("engine", ready=True)
    )
    assert build.plan(resource, replace(done, pods=(pod,))).requeue_seconds is None
