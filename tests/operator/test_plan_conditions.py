"""What users read of volume and checkpoint, state by state."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from headrace_operator.plan import Observed

RUNNING = {"startedAt": "2026-11-24T11:59:30Z"}
OOM = {"exitCode": 137, "reason": "OOMKilled"}
CRASH = {"exitCode": 1, "reason": "Error"}
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
DYNAMIC = {
    "volume": {"existingClaim": None, "dynamic": {"storageClassName": "x", "capacityGiB": 1200}}
}


def own(reason: str, message: str, exit_code: int = 65, **more: Any) -> dict[str, Any]:
    body = json.dumps({"reason": reason, "message": message, **more})
    return {"exitCode": exit_code, "reason": "Error", "message": body}


def expect(condition: dict[str, Any], status: str, reason: str, *fragments: str) -> None:
    assert (condition["status"], condition["reason"]) == (status, reason), condition
    for fragment in fragments:
        assert fragment in condition["message"], condition


@pytest.mark.parametrize(
    ("spec", "claim", "status", "reason", "fragment"),
    [
        ({}, None, "False", "ClaimNotFound", '"weights": there is no such claim in namespace ns'),
        ({}, {}, "True", "Bound", "claim weights is bound to pv"),
        ({}, {"phase": "Pending"}, "False", "ClaimPending", "not bound yet"),
        ({}, {"phase": "Lost"}, "False", "ClaimLost", "restore"),
        ({}, {"accessModes": ["ReadOnlyMany"]}, "False", "ClaimReadOnly", "ReadOnlyMany"),
        (DYNAMIC, None, "False", "StorageClassNotFound", '"x": there is no such StorageClass'),
        (STATIC, None, "False", "ClaimCreating", "tiny-weights"),
        (STATIC, {"name": "tiny-weights"}, "True", "Bound", "tiny-weights"),
    ],
)
def test_volume_ready(
    build: SimpleNamespace, spec: Any, claim: Any, status: str, reason: str, fragment: str
) -> None:
    observed = Observed(claim=None if claim is None else build.claim(**claim))
    conditions = build.conditions(build.resource(spec), observed)
    expect(conditions["VolumeReady"], status, reason, fragment)
    if status == "False":
        expect(conditions["Ready"], status, reason, fragment)


def test_a_pending_claim_gets_the_shard_job_that_its_storage_class_may_wait_for(
    build: SimpleNamespace,
) -> None:
    observed = Observed(claim=build.claim(phase="Pending"), source_claim=build.claim("models"))
    assert [d.body["kind"] for d in build.plan(build.resource(), observed).apply] == ["Job"]


def test_a_claim_that_is_missing_or_lost_gets_none(build: SimpleNamespace) -> None:
    for claim in (None, build.claim(phase="Lost"), build.claim(accessModes=["ReadOnlyMany"])):
        observed = Observed(claim=claim, source_claim=build.claim("models"))
        assert build.plan(build.resource(), observed).apply == ()


def test_a_missing_source_claim_is_named(build: SimpleNamespace) -> None:
    result = build.conditions(build.resource(), Observed(claim=build.claim()))
    expect(result["CheckpointReady"], "False", "SourceClaimNotFound", "models", "pvc://models/")


SHARDER_REASONS = [
    "SourceNotFound",
    "SourceForbidden",
    "ConfigInvalid",
    "ArchitectureUnsupported",
    "ParallelismInvalid",
    "SourceCorrupt",
    "TensorMissing",
    "NoSpaceOnVolume",
    "VolumeReadOnly",
    "StorageError",
    "CheckpointConflict",
    "Interrupted",
    "InternalError",
]


@pytest.mark.parametrize("reason", SHARDER_REASONS)
def test_the_reason_of_a_failed_shard_job_is_the_sharders(
    build: SimpleNamespace, reason: str
) -> None:
    resource = build.resource()
    failed = build.condition("Failed", reason="PodFailurePolicy", message="exit code 65")
    ended = build.container("shard", terminated=own(reason, "spec.x: 3: bad"))
    observed = build.world(
        resource, jobs=(build.job(resource, failed),), pods=(build.job_pod(ended, phase="Failed"),)
    )
    where = ("pod shard-a", "container shard", "spec.x: 3: bad", "delete the Job")
    conditions = build.conditions(resource, observed)
    expect(conditions["CheckpointReady"], "False", reason, *where)
    expect(conditions["Ready"], "False", reason, *where)
    assert build.plan(resource, observed).delete == ()


def test_the_cause_outlives_the_pods_of_the_failed_job(build: SimpleNamespace) -> None:
    resource = build.resource()
    job = build.job(resource, build.condition("Failed", reason="PodFailurePolicy"))
    ended = build.container("shard", terminated=own("ConfigInvalid", "no architectures"))
    first = build.plan(resource, build.world(resource, jobs=(job,), pods=(build.job_pod(ended),)))
    later = {**resource, "status": first.status["status"]}
    conditions = build.conditions(later, build.world(resource, jobs=(job,)))
    expect(conditions["CheckpointReady"], "False", "ConfigInvalid", "no architectures")
    fresh = build.conditions(resource, build.world(resource, jobs=(job,)))
    expect(fresh["CheckpointReady"], "False", "PodFailurePolicy")


@pytest.mark.parametrize(
    ("container", "fields", "reason", "fragment"),
    [
        ({"waiting": {"reason": "ErrImageNeverPull", "message": "absent"}}, {}, None, "absent"),
        ({"waiting": {"reason": "ImagePullBackOff"}}, {}, None, "container shard"),
        ({"waiting": {"reason": "CreateContainerConfigError"}}, {}, None, "container shard"),
        ({"terminated": OOM}, {}, "OOMKilled", "exit code 137"),
        ({"terminated": CRASH}, {}, "ShardFailed", "exit code 1"),
        ({"terminated": own("NoSpaceOnVolume", "full", 75)}, {}, "NoSpaceOnVolume", "2 of 4"),
        ({}, {"phase": "Failed", "reason": "Evicted"}, "Evicted", "pod shard-a"),
        (
            {},
            {
                "conditions": (
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "reason": "Unschedulable",
                        "message": "0/3 nodes are available",
                    },
                )
            },
            "Unschedulable",
            "0/3 nodes",
        ),
    ],
)
def test_failures_of_a_running_shard_job(
    build: SimpleNamespace, container: Any, fields: Any, reason: str | None, fragment: str
) -> None:
    resource = build.resource()
    fields = dict(fields)
    status_reason = fields.pop("reason", None)
    conditions = fields.pop("conditions", None)
    made = build.job_pod(build.container("shard", **container), **fields)
    if status_reason:
        made["status"]["reason"] = status_reason
    if conditions:
        made["status"]["conditions"] = list(conditions)
    observed = build.world(resource, jobs=(build.job(resource, failed=1),), pods=(made,))
    expected = reason or container["waiting"]["reason"]
    result = build.conditions(resource, observed)["CheckpointReady"]
    expect(result, "False", expected, fragment, "attempt 2 of 4")


def test_a_warning_event_tells_why_a_pod_stands_still(build: SimpleNamespace) -> None:
    resource = build.resource()
    waiting = build.container("shard", waiting={"reason": "ContainerCreating"})
    stuck = build.job_pod(waiting, phase="Pending")
    event = {"reason": "FailedMount", "message": "mount.lustre failed"}
    observed = build.world(
        resource,
        jobs=(build.job(resource),),
        pods=(stuck,),
        warnings={"uid-shard-a": event},
    )
    result = build.conditions(resource, observed)["CheckpointReady"]
    expect(result, "False", "FailedMount", "pod shard-a", "mount.lustre failed")


def test_a_warning_event_tells_why_a_job_has_no_pod(build: SimpleNamespace) -> None:
    resource = build.resource()
    event = {"reason": "FailedCreate", "message": "exceeded quota"}
    observed = build.world(resource, jobs=(build.job(resource),), warnings={"uid-job": event})
    expect(
        build.conditions(resource, observed)["CheckpointReady"],
        "False",
        "FailedCreate",
        "exceeded quota",
    )


@pytest.mark.parametrize(
    ("conditions", "phases", "status", "reason"),
    [
        ((), (), "False", "ShardJobStarting"),
        ((), ("Pending",), "False", "ShardJobStarting"),
        ((), ("Running",), "False", "Sharding"),
        ((), ("Succeeded",), "False", "Sharding"),
        (("Suspended",), (), "False", "ShardJobSuspended"),
        (("Complete",), (), "True", "Published"),
    ],
)
def test_progress_of_the_shard_job(
    build: SimpleNamespace, conditions: Any, phases: Any, status: str, reason: str
) -> None:
    resource = build.resource()
    job = build.job(resource, *map(build.condition, conditions))
    pods = tuple(
        build.job_pod(build.container("shard", running=RUNNING), phase=phase) for phase in phases
    )
    observed = build.world(resource, jobs=(job,), pods=pods)
    expect(build.conditions(resource, observed)["CheckpointReady"], status, reason)


def test_of_several_pods_the_one_that_published_tells(build: SimpleNamespace) -> None:
    resource = build.resource()
    pods = tuple(
        build.job_pod(build.container("shard", terminated=own(reason, "", 0)), phase="Succeeded")
        for reason in ("PartsWritten", "AlreadyPublished", "Published")
    )
    expect(
        build.conditions(resource, build.world(resource, pods=pods))["CheckpointReady"],
        "True",
        "Published",
    )


def test_a_published_checkpoint_has_its_size_and_keeps_it(build: SimpleNamespace) -> None:
    resource = build.resource()
    done = own("AlreadyPublished", "it is there", 0, totalBytes=123)
    finished = build.job_pod(build.container("shard", terminated=done), phase="Succeeded")
    first = build.plan(resource, build.world(resource, pods=(finished,))).status["status"]
    assert first["checkpoint"]["totalBytes"] == 123
    assert first["conditions"][1]["reason"] == "AlreadyPublished"
    later = build.plan({**resource, "status": first}, build.world(resource)).status["status"]
    assert later["checkpoint"]["totalBytes"] == 123
    other = build.resource({"model": {"revision": "other"}}, **first)
    changed = build.plan(other, build.world(other)).status["status"]
    assert "totalBytes" not in changed["checkpoint"]
