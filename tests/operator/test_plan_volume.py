"""Volumes: what FSx would refuse is refused before, and a claim is provisioned once."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from headrace_operator.plan import Observed, Settings, needs, plan
from headrace_operator.plan.fsx import judge
from headrace_operator.plan.provisioning import of_warning

FAST = {
    "deploymentType": "PERSISTENT_2",
    "perUnitStorageThroughput": "1000",
    "fileSystemTypeVersion": "2.15",
    "metadataConfigurationMode": "AUTOMATIC",
    "efaEnabled": "true",
    "subnetId": "subnet-0123456789abcdef0",
    "securityGroupIds": "sg-0123456789abcdef0",
}
HDD = {"deploymentType": "PERSISTENT_1", "storageType": "HDD", "driveCacheType": "NONE"}
TIERING = {"storageType": "INTELLIGENT_TIERING", "throughputCapacity": "4000"}
DYNAMIC = {"storageClassName": "fast", "capacityGiB": 4800}
STATIC = {
    "fileSystemId": "fs-01234567",
    "dnsName": "fs-01234567.fsx.eu-central-1.amazonaws.com",
    "capacityGiB": 4800,
}


def storage_class(policy: str = "Retain", **parameters: str | None) -> dict[str, Any]:
    """The StorageClass `fast` with changed parameters; None removes one."""
    return {
        "metadata": {"name": "fast"},
        "provisioner": "fsx.csi.aws.com",
        "reclaimPolicy": policy,
        "parameters": {k: v for k, v in {**FAST, **parameters}.items() if v is not None},
    }


def plain(**parameters: str) -> dict[str, Any]:
    """A StorageClass with a subnet and these parameters alone."""
    dropped = dict.fromkeys(FAST, None) | {"subnetId": FAST["subnetId"]}
    return storage_class(**{**dropped, **parameters})


def of(build: SimpleNamespace, **volume: Any) -> Any:
    return build.resource({"volume": {"existingClaim": None, **volume}})


def kinds(result: Any) -> list[str]:
    return [desired.body["kind"] for desired in result.apply]


def volume_ready(result: Any) -> dict[str, Any]:
    conditions = result.status["status"]["conditions"]
    (found,) = (c for c in conditions if c["type"] == "VolumeReady")
    return dict(found)


@pytest.mark.parametrize(
    ("made", "capacity"),
    [
        (storage_class(), 4800),
        (storage_class(), 96000),
        (storage_class(perUnitStorageThroughput="125"), 38400),
        (storage_class(metadataConfigurationMode="USER_PROVISIONED", metadataIops="24000"), 4800),
        (storage_class(efaEnabled="false", securityGroupIds=None), 1200),
        (storage_class(efaEnabled=None), 7200),
        (plain(), 1200),
        (plain(), 3600),
        (plain(deploymentType="SCRATCH_2", s3ImportPath="s3://models"), 2400),
        (plain(**HDD, perUnitStorageThroughput="12"), 6000),
        (plain(**HDD, perUnitStorageThroughput="40"), 1800),
        (plain(**TIERING), 1),
        ({"metadata": {"name": "nfs"}, "provisioner": "nfs.csi.k8s.io"}, 7),
        ({}, 7),
    ],
)
def test_what_fsx_takes_is_not_refused(made: dict[str, Any], capacity: int) -> None:
    assert judge(made, capacity) is None


@pytest.mark.parametrize(
    ("made", "capacity", "reason", "fragment"),
    [
        # the driver would round 6000 up to 7200, which EFA does not take
        (storage_class(), 6000, "CapacityInvalid", "a multiple of 4800 for EFA-enabled"),
        (storage_class(), 1200, "CapacityInvalid", "use 4800"),
        (storage_class(perUnitStorageThroughput="250"), 9600, "CapacityInvalid", "use 19200"),
        (storage_class(efaEnabled=None), 3600, "CapacityInvalid", "1200 or a multiple of 2400"),
        (plain(), 4800, "CapacityInvalid", "1200 or 2400 or a multiple of 3600"),
        (plain(**HDD, perUnitStorageThroughput="40"), 2400, "CapacityInvalid", "use 3600"),
        (storage_class(perUnitStorageThroughput="200"), 4800, "StorageClassInvalid", "125, 250"),
        (storage_class(perUnitStorageThroughput=None), 4800, "StorageClassInvalid", "125, 250"),
        (plain(perUnitStorageThroughput="50"), 1200, "StorageClassInvalid", "has no choice"),
        (storage_class(securityGroupIds=None), 4800, "SecurityGroupMissing", "to itself"),
        (storage_class(securityGroupIds=" ,"), 4800, "SecurityGroupMissing", "to itself"),
        (storage_class(s3ImportPath="s3://m"), 4800, "S3LinkUnsupported", "data repository"),
        (storage_class(metadataConfigurationMode=None), 4800, "EfaUnsupported", "set both"),
        (storage_class(deploymentType="SCRATCH_2"), 4800, "EfaUnsupported", "PERSISTENT_2"),
        (storage_class(fileSystemTypeVersion="2.12"), 4800, "EfaUnsupported", "2.15"),
        (storage_class(metadataIops="1500"), 4800, "StorageClassInvalid", "AUTOMATIC"),
        (storage_class(deploymentType="PERSISTENT_3"), 4800, "StorageClassInvalid", "SCRATCH_1"),
        (storage_class(storageType="HDD"), 4800, "StorageClassInvalid", "one of SSD"),
        (plain(**HDD | {"driveCacheType": ""}), 6000, "StorageClassInvalid", "NONE or READ"),
        (plain(**TIERING | {"throughputCapacity": "4001"}), 1, "StorageClassInvalid", "4000"),
        (storage_class(subnetId="subnet-1,subnet-2"), 4800, "StorageClassInvalid", "one subnet"),
        (storage_class(subnetId=None), 4800, "StorageClassInvalid", "one subnet"),
    ],
)
def test_what_fsx_or_its_driver_would_refuse_is_refused_before(
    made: dict[str, Any], capacity: int, reason: str, fragment: str
) -> None:
    refused = judge(made, capacity)
    assert refused is not None
    assert (refused.reason, refused.problem) == (reason, True)
    assert fragment in refused.message


def test_a_refused_storage_class_leaves_nothing_behind(build: SimpleNamespace) -> None:
    resource = of(build, dynamic={**DYNAMIC, "capacityGiB": 6000})
    assert needs(resource).storage_class == "fast"
    result = build.plan(resource, Observed(storage_class=storage_class()))
    assert kinds(result) == []
    assert volume_ready(result)["reason"] == "CapacityInvalid"
    conditions = build.conditions(resource, Observed(storage_class=storage_class()))
    assert conditions["Stalled"]["reason"] == "CapacityInvalid"  # nobody is on the way
    assert result.requeue_seconds == 5.0  # nothing tells of another class of that name


@pytest.mark.parametrize(
    ("asked", "given", "reason"),
    [
        ("Retain", "Retain", "ClaimCreating"),
        ("Delete", "Delete", "ClaimCreating"),
        ("Retain", "Delete", "ReclaimPolicyMismatch"),
        ("Delete", "Retain", "ReclaimPolicyMismatch"),
        ("Retain", "", "ReclaimPolicyMismatch"),  # Kubernetes' default is Delete
    ],
)
def test_the_reclaim_policy_is_said_twice(
    build: SimpleNamespace, asked: str, given: str, reason: str
) -> None:
    resource = of(build, dynamic={**DYNAMIC, "reclaimPolicy": asked})
    result = build.plan(resource, Observed(storage_class=storage_class(given)))
    assert volume_ready(result)["reason"] == reason
    owned = ["ownerReferences" in desired.body["metadata"] for desired in result.apply]
    assert owned == ([] if reason != "ClaimCreating" else [asked == "Delete"])


def provisioned(build: SimpleNamespace, phase: str = "Bound", **spec: Any) -> Any:
    requests = {"resources": {"requests": {"storage": "4800Gi"}}}
    fields = {"storageClassName": "fast", **requests, **spec}
    made = build.claim("tiny-weights", phase, **fields)
    del made["metadata"]["ownerReferences"]  # it is to outlive the ModelDeployment
    return made


def test_a_provisioned_claim_is_never_made_again(build: SimpleNamespace) -> None:
    resource = of(build, dynamic=DYNAMIC)
    made = build.plan(resource, Observed(claim=provisioned(build, "Pending")))
    known = made.status["status"]["volume"]
    assert known["claimUID"] == "uid-tiny-weights"
    for _ in range(2):  # what is known stays known
        resource["status"] = {"volume": known}
        result = build.plan(resource, Observed(storage_class=storage_class()))
        assert kinds(result) == []
        assert volume_ready(result)["reason"] == "ClaimDeleted"
        known = result.status["status"]["volume"]
    # a claim that someone made again for the volume that was left is taken
    again = build.plan(resource, Observed(claim=provisioned(build)))
    assert volume_ready(again)["reason"] == "Bound"
    # and another claim's past is nothing to a claim of this name
    resource["status"] = {"volume": {"claimName": "weights", "claimUID": "x"}}
    result = build.plan(resource, Observed(storage_class=storage_class()))
    assert kinds(result) == ["PersistentVolumeClaim"]


@pytest.mark.parametrize("change", [{"storageClassName": "slow"}, {"capacityGiB": 9600}])
def test_a_changed_request_does_not_touch_the_claim(build: SimpleNamespace, change: Any) -> None:
    resource = of(build, dynamic={**DYNAMIC, **change})
    world = Observed(claim=provisioned(build), source_claim=build.claim("models"))
    result = build.plan(resource, world)
    assert volume_ready(result)["reason"] == "ClaimDiffers"
    assert result.delete == ()
    assert "Job" in kinds(result)  # the claim is what it was, and serves


@pytest.mark.parametrize(
    ("volume", "metadata", "is_ours"),
    [
        ({"static": STATIC}, {}, True),
        ({"static": STATIC}, {"ownerReferences": None}, False),
        ({"static": STATIC}, {"ownerReferences": [{"uid": "x", "controller": True}]}, False),
        ({"dynamic": DYNAMIC}, {"ownerReferences": None}, True),
        ({"dynamic": DYNAMIC}, {}, False),
        ({"dynamic": DYNAMIC}, {"ownerReferences": None, "labels": {}}, False),
        ({"dynamic": {**DYNAMIC, "reclaimPolicy": "Delete"}}, {}, True),
        ({"existingClaim": {"name": "tiny-weights"}}, {"ownerReferences": None}, True),
    ],
)
def test_no_pod_mounts_a_claim_of_someone_else(
    build: SimpleNamespace, volume: Any, metadata: Any, is_ours: bool
) -> None:
    claim = build.claim("tiny-weights")
    claim["metadata"] = {
        k: v for k, v in {**claim["metadata"], **metadata}.items() if v is not None
    }
    world = Observed(claim=claim, source_claim=build.claim("models"))
    result = build.plan(of(build, **volume), world)
    assert ("Job" in kinds(result)) is is_ours
    assert ("claimUID" in result.status["status"]["volume"]) is is_ours


def test_a_claim_of_another_volume_is_not_taken_for_the_static_one(build: SimpleNamespace) -> None:
    world = Observed(claim=build.claim("tiny-weights", volumeName="pvc-1"))
    assert volume_ready(build.plan(of(build, static=STATIC), world))["reason"] == "ClaimDiffers"


FAILED = "failed to provision volume with StorageClass fast: rpc error: code = "


@pytest.mark.parametrize(
    ("event", "message", "reason", "problem"),
    [
        (None, "", "ClaimPending", False),
        ("ProvisioningFailed", FAILED + "DeadlineExceeded desc = x", "Provisioning", False),
        ("ProvisioningFailed", FAILED + "Aborted desc = x", "Provisioning", False),
        ("ProvisioningFailed", FAILED + "Unavailable desc = x", "Provisioning", False),
        (
            "ProvisioningFailed",
            FAILED + "Internal desc = Filesystem is not ready: timed out waiting for the condition",
            "Provisioning",
            False,
        ),
        ("ProvisioningFailed", FAILED + "Internal desc = Rate exceeded", "Provisioning", False),
        (
            "ProvisioningFailed",
            FAILED + "Internal desc = Filesystem is not ready: unexpected state FAILED",
            "ProvisioningFailed",
            True,
        ),
        ("ProvisioningFailed", FAILED + "InvalidArgument desc = x", "ProvisioningFailed", True),
        ("ProvisioningFailed", FAILED + "ResourceExhausted desc = x", "ProvisioningFailed", True),
        ("ProvisioningFailed", 'storageclass "fast" not found', "ProvisioningFailed", True),
        ("VolumeMismatch", "requested PV is too small", "VolumeMismatch", True),
        ("Unheard of", "x\ny", "ClaimStuck", True),
    ],
)
def test_events_of_a_pending_claim_are_told_apart(
    event: str | None, message: str, reason: str, problem: bool
) -> None:
    draft = of_warning("weights", {} if event is None else {"reason": event, "message": message})
    assert (draft.reason, draft.problem) == (reason, problem)
    assert "\n" not in draft.message


def test_the_event_reaches_the_condition(build: SimpleNamespace) -> None:
    warning = {"reason": "ProvisioningFailed", "message": FAILED + "PermissionDenied desc = x"}
    world = Observed(claim=provisioned(build, "Pending"), warnings={"uid-tiny-weights": warning})
    result = build.plan(of(build, dynamic=DYNAMIC), world)
    assert volume_ready(result)["reason"] == "ProvisioningFailed"
    assert "code = PermissionDenied" in volume_ready(result)["message"]
    assert result.requeue_seconds is not None  # no event of the claim itself tells of its end


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "Bound"),
        ({"status": {"phase": "Failed", "message": "recycler gone"}}, "VolumeFailed"),
        ({"metadata": {"deletionTimestamp": "2026-11-24T12:00:00Z"}}, "VolumeTerminating"),
        ({"spec": {"csi": {"volumeHandle": "fs-89abcdef"}}}, "VolumeDiffers"),
        ({"spec": {"csi": {"volumeAttributes": {"mountname": "x"}}}}, "VolumeDiffers"),
        ({"spec": {"persistentVolumeReclaimPolicy": "Delete"}}, "VolumeDiffers"),
        # known of an earlier claim of the same name
        ({"spec": {"claimRef": {"uid": "x"}}, "status": {"phase": "Failed"}}, "Bound"),
    ],
)
def test_an_ill_volume_shows(build: SimpleNamespace, changes: Any, reason: str) -> None:
    resource = of(build, static={**STATIC, "subPath": "team-a"})
    made = [desired.body for desired in build.plan(resource, Observed()).apply]
    (volume,) = (body for body in made if body["kind"] == "PersistentVolume")
    assert volume["spec"]["csi"]["volumeAttributes"]["mountname"] == "fsx/team-a"
    claim = build.claim("tiny-weights")
    seen = build.merged(
        dict(volume),
        {"spec": {"claimRef": {"uid": "uid-tiny-weights"}}, "status": {"phase": "Bound"}},
    )
    world = Observed(claim=claim, volume=build.merged(seen, changes))
    result = build.plan(resource, world)
    assert volume_ready(result)["reason"] == reason
    assert result.delete == ()


def test_a_volume_left_over_from_another_file_system_is_replaced(build: SimpleNamespace) -> None:
    old, new = (of(build, static=STATIC | {"mountName": name}) for name in ("old", "new"))
    made = [desired.body for desired in build.plan(old, Observed()).apply]
    (volume,) = (dict(body) for body in made if body["kind"] == "PersistentVolume")
    volume |= {
        "metadata": {**volume["metadata"], "uid": "uid-pv"},
        "status": {"phase": "Available"},
    }
    assert build.plan(old, Observed(volume=volume)).delete == ()
    (deletion,) = build.plan(new, Observed(volume=volume)).delete
    assert (deletion.kind, deletion.uid) == ("PersistentVolume", "uid-pv")
    # one that is not ours is left alone, and in the way
    foreign = build.merged(volume, {"metadata": {"labels": {"headrace.dev/namespace": "other"}}})
    assert build.plan(new, Observed(volume=foreign)).delete == ()


@pytest.mark.parametrize(
    ("allowed", "changes", "is_allowed"),
    [
        ({}, {}, False),
        ({"other": ["fs-01234567"]}, {}, False),
        ({"ns": ["fs-01234567"]}, {}, True),
        ({"*": ["fs-01234567"]}, {}, True),
        ({"ns": ["*"]}, {}, True),
        ({"ns": ["fs-0123456"]}, {}, False),
        ({"ns": ["fs-01234567/team-a"]}, {}, False),
        ({"ns": ["fs-01234567/team-a"]}, {"subPath": "team-a"}, True),
        ({"ns": ["fs-01234567/team-a"]}, {"subPath": "team-a/models"}, True),
        ({"ns": ["fs-01234567/team-a"]}, {"subPath": "team-ab"}, False),
        # what the nodes mount is the DNS name: it has to be the allowed file system's
        ({"ns": ["*"]}, {"dnsName": "fs-89abcdef.fsx.eu-central-1.amazonaws.com"}, False),
        ({"ns": ["*"]}, {"dnsName": "fs-01234567.fsx.eu-central-1.example.com"}, False),
        ({"ns": ["*"]}, {"dnsName": "fs-01234567.fsx.a.amazonaws.com.example.com"}, False),
        ({"ns": ["*"]}, {"dnsName": "fs-01234567.fsx.cn-north-1.amazonaws.com.cn"}, True),
    ],
)
def test_a_tenant_gets_only_the_file_systems_it_was_given(
    build: SimpleNamespace, allowed: Any, changes: Any, is_allowed: bool
) -> None:
    settings = Settings("loader:1", {k: frozenset(v) for k, v in allowed.items()})
    result = plan(of(build, static={**STATIC, **changes}), Observed(), settings, build.now)
    assert ("PersistentVolume" in kinds(result)) is is_allowed
    reason = volume_ready(result)["reason"]
    assert reason == ("ClaimCreating" if is_allowed else "StaticVolumeForbidden")
    if not is_allowed:
        assert kinds(result) == []


def test_the_example_storage_class_is_one_that_fsx_takes() -> None:
    root = Path(__file__).parents[2]
    made, resource = yaml.safe_load_all((root / "examples/fsx-dynamic.yaml").read_text())
    dynamic = resource["spec"]["volume"]["dynamic"]
    assert made["provisioner"] == "fsx.csi.aws.com"
    assert judge(made, dynamic["capacityGiB"]) is None
    assert made["reclaimPolicy"] == dynamic["reclaimPolicy"]
