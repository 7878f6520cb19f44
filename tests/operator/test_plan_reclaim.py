"""Checkpoints that are made again where they are gone, and deleted where nobody uses them."""

import json
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from headrace_operator.plan.names import FINALIZER, checkpoint_path
from headrace_operator.plan.world import Rejection

DELETE = {"checkpoint": {"reclaimPolicy": "Delete"}}


def missing(build: SimpleNamespace, resource: Any, started: str, **states: Any) -> Any:
    """A serving pod whose loader did not find the checkpoint."""
    message = json.dumps({"reason": "CheckpointMissing", "message": "no manifest.json"})
    ended = {"exitCode": 65, "startedAt": started, "message": message}
    loader = build.container("loader", last=ended, waiting={"reason": "CrashLoopBackOff"})
    return build.serving_pod(resource, loader, build.container("engine"), **states)


def jobs_of(result: Any) -> list[Any]:
    return [desired.body for desired in result.apply if desired.body["kind"] == "Job"]


def test_a_checkpoint_that_is_gone_is_made_again_a_few_times(build: SimpleNamespace) -> None:
    resource = build.resource()
    job = build.done(resource)
    job["status"]["completionTime"] = "2026-11-24T11:00:00Z"
    for number in (2, 3):
        pod = missing(build, resource, "2026-11-24T11:00:05Z")
        observed = build.world(resource, jobs=(job,), pods=(pod,))
        condition = build.conditions(resource, observed)["CheckpointReady"]
        assert (condition["status"], condition["reason"]) == ("False", "CheckpointMissing")
        (again,) = jobs_of(build.plan(resource, observed))
        annotations = again["metadata"]["annotations"]
        assert annotations["headrace.dev/attempt"] == str(number)
        assert annotations["headrace.dev/replaces"] == job["metadata"]["uid"]
        assert again["metadata"]["name"] != job["metadata"]["name"]
        # once it is there, the one before it is done with, and what was missing then counts no more
        again["metadata"]["uid"] = f"uid-{number}"
        both = replace(observed, jobs=(job, again))
        result = build.plan(resource, both)
        assert [deletion.uid for deletion in result.delete] == [job["metadata"]["uid"]]
        assert jobs_of(result) == []
        again["status"] = {"conditions": [build.condition("Complete")]}
        again["status"]["completionTime"] = "2026-11-24T11:00:06Z"
        ready = build.conditions(resource, replace(observed, jobs=(again,)))["CheckpointReady"]
        assert ready["status"] == "True"
        again["status"]["completionTime"] = "2026-11-24T11:00:00Z"
        job = again
    observed = build.world(
        resource, jobs=(job,), pods=(missing(build, resource, "2026-11-24T11:00:05Z"),)
    )
    result = build.plan(resource, observed)
    assert jobs_of(result) == []
    message = build.conditions(resource, observed)["CheckpointReady"]["message"]
    assert "made 3 times and gone again each time" in message
    late = missing(build, resource, "2026-11-24T12:30:00Z")
    (again,) = jobs_of(build.plan(resource, replace(observed, pods=(late,))))
    assert again["metadata"]["annotations"]["headrace.dev/attempt"] == "1"


def test_what_a_loader_of_another_checkpoint_misses_does_not_count(build: SimpleNamespace) -> None:
    resource, other = build.resource(), build.resource({"model": {"revision": "old"}})
    job = build.done(resource)
    job["status"]["completionTime"] = "2026-11-24T11:00:00Z"
    elsewhere = build.resource({"volume": {"root": "elsewhere"}})
    template = build.deployment(elsewhere)["spec"]["template"]
    for pod in (
        missing(build, other, "2026-11-24T11:00:05Z"),
        missing(build, resource, "2026-11-24T11:00:05Z") | {"spec": template["spec"]},
    ):
        observed = build.world(resource, jobs=(job,), pods=(pod,))
        assert build.conditions(resource, observed)["CheckpointReady"]["status"] == "True"
    same = pod | {"spec": build.deployment(resource)["spec"]["template"]["spec"]}
    observed = build.world(resource, jobs=(job,), pods=(same,))
    assert build.conditions(resource, observed)["CheckpointReady"]["status"] == "False"


@pytest.mark.parametrize(
    ("tensor", "given", "count"), [(1, None, 1), (4, None, 4), (64, None, 8), (2, 5, 5)]
)
def test_the_work_is_shared_by_as_many_pods_as_ranks(
    build: SimpleNamespace, tensor: int, given: int | None, count: int
) -> None:
    spec = {"parallelism": {"tensorParallelSize": tensor}, "sharding": {"parallelism": given}}
    job = build.job(build.resource(build.merged({}, spec)))["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == (
        "Indexed",
        count,
        count,
    )
    (container,) = job["template"]["spec"]["containers"]
    command = container["command"]
    assert command[command.index("--workers") + 1] == str(count)


def test_progress_by_index(build: SimpleNamespace) -> None:
    resource = build.resource({"parallelism": {"tensorParallelSize": 4}})
    job = build.job(resource, succeeded=2, completedIndexes="0,3")
    wrote = json.dumps({"reason": "PartsWritten", "message": "done", "totalBytes": 5})
    published = json.dumps({"reason": "Published", "message": "done", "totalBytes": 5})
    pods = [
        build.job_pod(
            build.container("shard", terminated={"exitCode": 0, "message": message}),
            name=f"shard-{number}",
            phase="Succeeded",
        )
        for number, message in enumerate((wrote, published))
    ]
    observed = build.world(resource, jobs=(job,), pods=tuple(pods))
    status = build.plan(resource, observed).status["status"]
    assert (status["checkpoint"]["workers"], status["checkpoint"]["completedIndexes"]) == (4, "0,3")
    assert "2 of 4 pods have done their share" in status["conditions"][1]["message"]
    job["status"]["conditions"] = [build.condition("Complete")]
    condition = build.conditions(resource, observed)["CheckpointReady"]
    assert (condition["status"], condition["reason"]) == ("True", "Published")


def deleted(build: SimpleNamespace, spec: Any = DELETE) -> Any:
    resource = build.resource(spec)
    resource["metadata"] |= {
        "deletionTimestamp": "2026-11-24T12:00:00Z",
        "finalizers": ["other/one", FINALIZER],
    }
    return resource


@pytest.mark.parametrize(("spec", "wanted"), [(DELETE, True), ({}, False)])
def test_the_finalizer_is_there_for_the_policy_delete_alone(
    build: SimpleNamespace, spec: Any, wanted: bool
) -> None:
    resource = build.resource(spec)
    assert build.plan(resource, build.world(resource)).finalizer is wanted


def test_a_deleted_resource_takes_its_checkpoint_along(build: SimpleNamespace) -> None:
    resource = deleted(build)
    running = build.serving_pod(resource, build.container("loader"), build.container("engine"))
    live = build.deployment(build.resource(DELETE))
    observed = build.world(resource, deployment=live, pods=(running,))
    result = build.plan(resource, observed)
    assert [(d.kind, d.name) for d in result.delete] == [("Deployment", "tiny")]
    assert (result.finalizer, result.apply) == (True, ())
    result = build.plan(resource, replace(observed, deployment=None))
    assert (result.finalizer, result.apply, result.delete) == (True, (), ())
    alone = replace(observed, deployment=None, pods=())
    result = build.plan(resource, alone)
    (job,) = jobs_of(result)
    assert result.finalizer is True
    (container,) = job["spec"]["template"]["spec"]["containers"]
    path = checkpoint_path(build.spec_of(resource))
    assert container["command"] == ["headrace", "delete", f"/mnt/weights/{path}"]
    # a quota refuses pods without
    assert all({"cpu", "memory"} == set(container["resources"][k]) for k in ("requests", "limits"))
    assert job["spec"]["activeDeadlineSeconds"] == 900
    job["metadata"]["uid"] = "uid-reclaim"
    result = build.plan(resource, replace(alone, jobs=(*alone.jobs, job)))
    assert (result.finalizer, result.apply) == (True, ())
    for kind, reason, warning in (
        ("Complete", "CheckpointDeleted", False),
        ("Failed", "CheckpointKept", True),
    ):
        ended = {**job, "status": {"conditions": [build.condition(kind)]}}
        result = build.plan(resource, replace(alone, jobs=(*alone.jobs, ended)))
        assert result.finalizer is False
        (event,) = result.transitions
        assert (event.reason, event.warning) == (reason, warning)
        assert path in event.message


@pytest.mark.parametrize("obstacle", ["others", "claim", "policy"])
def test_a_deleted_resource_goes_at_once_where_nothing_may_be_deleted(
    build: SimpleNamespace, obstacle: str
) -> None:
    resource = deleted(build)
    if obstacle == "policy":
        resource["metadata"]["finalizers"] = ["other/one"]
    path = checkpoint_path(build.spec_of(resource))
    observed = build.world(
        resource,
        claim=None if obstacle == "claim" else build.claim(),
        paths_in_use=frozenset({path} if obstacle == "others" else ()),
    )
    result = build.plan(resource, observed)
    assert (result.finalizer, result.apply, result.delete) == (False, (), ())


def test_the_checkpoint_of_an_earlier_spec_goes_once_the_new_one_serves(
    build: SimpleNamespace,
) -> None:
    old = build.resource(DELETE)
    new = build.resource(build.merged(DELETE, {"model": {"revision": "v2"}}))
    record, current = build.done(old), build.done(new)
    record["metadata"]["uid"] = "uid-old"
    before = build.world(new, jobs=(record, current), deployment=build.deployment(old))
    result = build.plan(new, before)
    assert not result.delete
    assert jobs_of(result) == []
    held = {"ready": True, "running": {"startedAt": "2026-11-24T11:00:00Z"}}
    ready = (build.condition("Ready"),)
    loader, engine = build.container("loader", **held), build.container("engine", **held)
    pod = build.serving_pod(new, loader, engine, conditions=ready)
    served = replace(before, deployment=build.deployment(new), pods=(pod,))
    assert build.conditions(new, served)["Ready"]["status"] == "True"
    (job,) = jobs_of(build.plan(new, served))
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[2:] == [f"/mnt/weights/{checkpoint_path(build.spec_of(old))}"]
    job["metadata"]["uid"] = "uid-reclaim"
    ended = {**job, "status": {"conditions": [build.condition("Complete")]}}
    result = build.plan(new, replace(served, jobs=(record, current, ended)))
    assert [deletion.uid for deletion in result.delete] == ["uid-old", "uid-reclaim"]
    used = replace(served, paths_in_use=frozenset({checkpoint_path(build.spec_of(old))}))
    result = build.plan(new, used)
    assert jobs_of(result) == []
    assert [deletion.uid for deletion in result.delete] == ["uid-old"]


@pytest.mark.parametrize(
    "change", [{"existingClaim": {"name": "other"}}, {"root": "elsewhere"}], ids=["claim", "root"]
)
def test_a_checkpoint_counts_in_its_own_place_alone(build: SimpleNamespace, change: Any) -> None:
    old, new = build.resource(), build.resource({"volume": change})
    claim = build.claim(new["spec"]["volume"]["existingClaim"]["name"])
    made, live = build.done(old), build.deployment(old)
    observed = build.world(new, claim=claim, jobs=(made,), deployment=live)
    result = build.plan(new, observed)
    assert [d.body["kind"] for d in result.apply] == ["Job", "Service"]  # no pod goes before it
    (job,) = jobs_of(result)
    assert job["metadata"]["name"] != made["metadata"]["name"]
    assert [deletion.uid for deletion in result.delete] == [made["metadata"]["uid"]]
    assert build.conditions(new, observed)["CheckpointReady"]["reason"] == "ShardJobCreating"
    job["metadata"]["uid"] = "uid-new"
    job["status"] = {"conditions": [build.condition("Complete")]}
    both = replace(observed, jobs=(made, job))
    assert build.conditions(new, both)["CheckpointReady"]["status"] == "True"
    assert build.conditions(old, replace(both, claim=build.claim()))["CheckpointReady"][
        "status"
    ] == ("True")


def test_a_claim_made_anew_under_the_same_name_is_empty(build: SimpleNamespace) -> None:
    resource, claim = build.resource(), build.claim()
    job = build.done(resource)
    job["status"]["completionTime"] = "2026-11-24T11:00:00Z"
    live = build.deployment(resource)
    for made, again in (("2026-11-24T10:00:00Z", False), ("2026-11-24T11:30:00Z", True)):
        claim["metadata"]["creationTimestamp"] = made
        result = build.plan(
            resource, build.world(resource, claim=claim, jobs=(job,), deployment=live)
        )
        assert len(jobs_of(result)) == again
        assert [deletion.uid for deletion in result.delete] == (["uid-job"] if again else [])


def settled(build: SimpleNamespace, spec: Any, *jobs: Any) -> tuple[Any, Any]:
    """A ModelDeployment that serves, and its world with these Jobs beside its own."""
    resource = build.resource(build.merged(DELETE, spec))
    held = {"ready": True, "running": {"startedAt": "2026-11-24T11:00:00Z"}}
    loader, engine = build.container("loader", **held), build.container("engine", **held)
    pod = build.serving_pod(resource, loader, engine, conditions=(build.condition("Ready"),))
    claim = build.claim(resource["spec"]["volume"]["existingClaim"]["name"])
    live, own = build.deployment(resource), build.done(resource)
    observed = build.world(resource, claim=claim, jobs=(own, *jobs), deployment=live, pods=(pod,))
    assert build.conditions(resource, observed)["Ready"]["status"] == "True"
    return resource, observed


def reclaim_job(build: SimpleNamespace, *conditions: str) -> tuple[Any, Any]:
    """The Job that deletes the checkpoint of the first spec, and that spec's own."""
    record = build.done(build.resource(DELETE))
    record["metadata"]["uid"] = "uid-record"
    (job,) = jobs_of(build.plan(*settled(build, {"model": {"revision": "v2"}}, record)))
    job["metadata"]["uid"] = "uid-reclaim"
    return {**job, "status": {"conditions": [build.condition(c) for c in conditions]}}, record


def test_nothing_is_deleted_on_a_volume_that_is_another_one_by_now(build: SimpleNamespace) -> None:
    """The path may be someone else's there."""
    record = build.done(build.resource(DELETE))
    record["metadata"]["uid"] = "uid-record"
    change = {"model": {"revision": "v2"}, "volume": {"existingClaim": {"name": "other"}}}
    resource, observed = settled(build, change, record)
    result = build.plan(resource, observed)
    assert jobs_of(result) == []
    assert [deletion.uid for deletion in result.delete] == ["uid-record"]
    (event,) = (t for t in result.transitions if t.reason == "CheckpointKept")
    assert "no longer names its claim weights" in event.message
    # nor when the ModelDeployment goes
    going = deleted(build, build.merged(DELETE, change))
    (job,) = jobs_of(build.plan(going, replace(observed, deployment=None, pods=())))
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[2:] == [f"/mnt/weights/{checkpoint_path(build.spec_of(going))}"]


def test_a_checkpoint_that_is_wanted_again_while_it_is_deleted_is_not_trusted(
    build: SimpleNamespace,
) -> None:
    reclaim, record = reclaim_job(build)
    again = build.resource(DELETE)
    live = build.deployment(build.resource(build.merged(DELETE, {"model": {"revision": "v2"}})))
    observed = build.world(again, jobs=(record, reclaim), deployment=live)
    result = build.plan(again, observed)
    assert [d.body["kind"] for d in result.apply] == ["Service"]
    assert result.delete == ()
    assert build.conditions(again, observed)["CheckpointReady"]["reason"] == "ShardJobReplacing"
    reclaim["status"]["conditions"] = [build.condition("Complete")]
    ended = build.plan(again, observed)
    assert [deletion.uid for deletion in ended.delete] == ["uid-record", "uid-reclaim"]
    assert len(jobs_of(build.plan(again, replace(observed, jobs=())))) == 1


def test_a_job_of_an_earlier_round_says_nothing_about_the_next(build: SimpleNamespace) -> None:
    reclaim, _ = reclaim_job(build, "Complete")
    resource, observed = settled(build, {"model": {"revision": "v3"}}, reclaim)
    assert [deletion.uid for deletion in build.plan(resource, observed).delete] == ["uid-reclaim"]


def test_a_job_takes_its_records_along_when_more_has_to_go_by_now(build: SimpleNamespace) -> None:
    reclaim, record = reclaim_job(build, "Complete")
    another = build.done(build.resource(build.merged(DELETE, {"model": {"revision": "v2"}})))
    another["metadata"] |= {"name": "another", "uid": "uid-another"}
    resource, observed = settled(build, {"model": {"revision": "v3"}}, record, another, reclaim)
    result = build.plan(resource, observed)
    assert [deletion.uid for deletion in result.delete] == ["uid-record", "uid-reclaim"]
    assert "CheckpointDeleted" in [transition.reason for transition in result.transitions]
    (job,) = jobs_of(result)
    path = another["metadata"]["annotations"]["headrace.dev/checkpoint-path"]
    assert job["metadata"]["annotations"]["headrace.dev/checkpoint-path"] == path
    # nor is what it deleted trusted while the new one is not settled
    unsettled = build.plan(resource, replace(observed, pods=()))
    assert [deletion.uid for deletion in unsettled.delete] == ["uid-record", "uid-reclaim"]
    assert jobs_of(unsettled) == []


def test_what_is_being_deleted_is_not_deleted_twice(build: SimpleNamespace) -> None:
    reclaim, record = reclaim_job(build)
    another = build.done(build.resource(build.merged(DELETE, {"model": {"revision": "v2"}})))
    resource, observed = settled(build, {"model": {"revision": "v3"}}, record, another, reclaim)
    result = build.plan(resource, observed)
    (job,) = jobs_of(result)
    path = another["metadata"]["annotations"]["headrace.dev/checkpoint-path"]
    assert (job["metadata"]["annotations"]["headrace.dev/checkpoint-path"], result.delete) == (
        path,
        (),
    )


def test_the_same_path_on_another_claim_is_another_checkpoint(build: SimpleNamespace) -> None:
    reclaim, _ = reclaim_job(build, "Complete")
    other = {"volume": {"existingClaim": {"name": "other"}}}
    moved = build.resource(build.merged(DELETE, other))
    done = build.done(moved)
    done["metadata"]["uid"] = "uid-moved"
    observed = build.world(moved, claim=build.claim("other"), jobs=(done, reclaim))
    result = build.plan(moved, observed)
    assert [deletion.uid for deletion in result.delete] == ["uid-reclaim"]
    assert build.conditions(moved, observed)["CheckpointReady"]["status"] == "True"
    # what is a record there is still to be deleted
    resource, observed = settled(
        build, build.merged(other, {"model": {"revision": "v2"}}), done, reclaim
    )
    result = build.plan(resource, observed)
    assert [deletion.uid for deletion in result.delete] == ["uid-reclaim"]
    (job,) = jobs_of(result)
    assert job["metadata"]["name"] != reclaim["metadata"]["name"]
    # also when the ModelDeployment goes
    going = deleted(build, build.merged(DELETE, other))
    alone = build.world(going, claim=build.claim("other"), jobs=(done, reclaim))
    result = build.plan(going, alone)
    assert (result.finalizer, len(jobs_of(result))) == (True, 1)


def test_a_refused_deletion_is_told(build: SimpleNamespace) -> None:
    reclaim, record = reclaim_job(build)
    resource, observed = settled(build, {"model": {"revision": "v2"}}, record)
    refusal = Rejection("Job", reclaim["metadata"]["name"], "Forbidden", "exceeded quota: jobs")
    refused = replace(observed, rejections=(refusal,))
    (event,) = (t for t in build.plan(resource, refused).transitions if t.warning)
    assert (event.reason, "exceeded quota" in event.message) == ("CheckpointKept", True)
    going = deleted(build)
    alone = build.world(going, jobs=(), rejections=(refusal,))
    result = build.plan(going, alone)
    assert (result.finalizer, [t.reason for t in result.transitions]) == (False, ["CheckpointKept"])


def test_groups_go_before_their_checkpoint(build: SimpleNamespace) -> None:
    spec = {**DELETE, "parallelism": {"tensorParallelSize": 2, "nodes": 2}}
    resource = deleted(build, spec)
    made = build.plan(build.resource(spec), build.world(build.resource(spec)))
    (group,) = (d.body for d in made.apply if d.body["kind"] == "LeaderWorkerSet")
    group["metadata"]["uid"] = "uid-group"
    result = build.plan(resource, build.world(resource, deployment=group))
    assert [(d.kind, d.uid) for d in result.delete] == [("LeaderWorkerSet", "uid-group")]


def test_orphans_keep_serving_from_their_checkpoint(build: SimpleNamespace) -> None:
    resource = deleted(build)
    resource["metadata"]["finalizers"].append("orphan")
    live = build.deployment(build.resource(DELETE))
    result = build.plan(resource, build.world(resource, deployment=live))
    assert (result.finalizer, result.apply, result.delete) == (False, (), ())


def test_a_deletion_that_cannot_end_is_given_up(build: SimpleNamespace) -> None:
    """Its pod is on a node that is lost, or nobody admits its Job."""
    resource = deleted(build)
    pod = build.serving_pod(resource, build.container("loader"), build.container("engine"))
    observed = build.world(resource, pods=(pod,))
    for minutes, finalizer in ((-29, True), (-31, False)):
        since = (build.now + timedelta(minutes=minutes)).isoformat()
        resource["metadata"]["deletionTimestamp"] = since
        result = build.plan(resource, observed)
        assert result.finalizer is finalizer
    assert [t.reason for t in result.transitions] == ["CheckpointKept"]


def test_a_checkpoint_that_keeps_vanishing_stalls(build: SimpleNamespace) -> None:
    """As does a Job that failed to make one again, which has another name than the first."""
    resource = build.resource()
    job = build.done(resource)
    job["metadata"]["annotations"]["headrace.dev/attempt"] = "3"
    job["status"]["completionTime"] = "2026-11-24T11:00:00Z"
    pod = missing(build, resource, "2026-11-24T11:00:05Z")
    observed = build.world(resource, jobs=(job,), pods=(pod,))
    assert build.conditions(resource, observed)["Stalled"]["reason"] == "CheckpointMissing"
    failed = build.job(resource, build.condition("Failed", reason="BackoffLimitExceeded"))
    failed["metadata"]["name"] += "-again"
    observed = build.world(resource, jobs=(failed,))
    assert build.conditions(resource, observed)["Stalled"]["status"] == "True"
