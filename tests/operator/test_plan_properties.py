"""Properties of plan() over generated worlds: total, pure, stable, careful."""

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace_operator.api.status import ConditionType
from headrace_operator.plan import Observed, Rejection, needs
from headrace_operator.plan.failures import stuck
from headrace_operator.plan.volume import is_orphan

KINDS = ["Job", "Deployment", "Service", "PersistentVolume", "ResourceClaimTemplate"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
STATUSES = ["", "True", "False", "Failed", "Bound", "Released", "Running", "Pending"]
REASONS = ["Error", "CrashLoopBackOff", "ImagePullBackOff", "OOMKilled", "lower case"]
NAMES = ["loader", "engine", "shard", "Unschedulable"]
WORDS = st.sampled_from([*STATUSES, *REASONS, *NAMES])
TIMES = st.sampled_from(["2026-11-24T11:00:00Z", "2026-11-24T12:00:01+14:00", "no time", ""])
TERMINATION = '{"reason":"NoSpaceOnVolume","message":"full","totalBytes":7}'
PROGRESS_FAILED = {
    "type": "Progressing",
    "status": "False",
    "reason": "ProgressDeadlineExceeded",
}
BROKEN = ["", "plain", '{"reason":1}', '{"reason":"bad reason"}', "[" * 5000, "{" * 30]
MESSAGES = st.sampled_from([TERMINATION, *BROKEN])


def loose(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """An object in which every field may be missing or be anything."""
    return st.fixed_dictionaries({}, optional={k: v | JUNK for k, v in fields.items()})


def lists(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner | JUNK, max_size=3)


ENDED = loose(reason=WORDS, message=MESSAGES, exitCode=st.sampled_from([0, 1, 65, 137]))
STATE = loose(
    running=loose(startedAt=TIMES), waiting=loose(reason=WORDS, message=MESSAGES), terminated=ENDED
)
CONTAINER = loose(
    name=WORDS, ready=st.booleans(), restartCount=st.integers(0, 3), state=STATE, lastState=STATE
)
CONDITION = loose(
    type=st.sampled_from(
        [
            "PodScheduled",
            "Ready",
            "Complete",
            "Failed",
            "Suspended",
            "ReplicaFailure",
            "Progressing",
        ]
        + [str(kind) for kind in ConditionType]
    ),
    status=WORDS,
    reason=WORDS,
    message=MESSAGES,
    lastTransitionTime=TIMES,
)
STATUS = loose(
    phase=WORDS,
    reason=WORDS,
    message=MESSAGES,
    conditions=lists(CONDITION),
    initContainerStatuses=lists(CONTAINER),
    containerStatuses=lists(CONTAINER),
    replicas=st.integers(0, 3),
    readyReplicas=st.integers(0, 3),
    updatedReplicas=st.integers(0, 3),
    observedGeneration=st.integers(0, 3),
    failed=st.integers(0, 5),
    active=st.integers(0, 1),
    checkpoint=loose(key=WORDS, totalBytes=st.integers()),
    rollout=loose(template=WORDS, readyReplicas=st.integers(0, 3), progressedAt=TIMES),
)


@st.composite
def worlds(draw: st.DrawFn, build: SimpleNamespace, resource: Any) -> Observed:
    """Worlds made of real objects with anything done to them, and of pure junk."""
    component = st.sampled_from(["shard", "serve", "other"])
    metadata = loose(
        name=st.sampled_from(["tiny", build.job_name(build.resource())]) | WORDS,
        namespace=WORDS,
        uid=WORDS,
        deletionTimestamp=TIMES,
        creationTimestamp=TIMES,
        generation=st.integers(0, 3),
        labels=loose(**{"app.kubernetes.io/component": component}),
        annotations=loose(
            **{
                "headrace.dev/spec-hash": WORDS,
                "headrace.dev/stable-spec-hash": WORDS,
                "headrace.dev/rolled-back-spec-hash": WORDS,
                "headrace.dev/template-version": WORDS,
            }
        ),
    )
    anything = loose(metadata=metadata, spec=JUNK, status=STATUS)
    jobs = [build.done(resource), build.job(resource, build.condition("Failed"))]
    job = st.sampled_from(jobs) | anything
    current = build.deployment(build.resource())
    failed = copy.deepcopy(current)
    failed["status"]["conditions"] = [PROGRESS_FAILED]
    failed["metadata"]["annotations"]["headrace.dev/stable-spec-hash"] = "True"
    worker = loose(metadata=metadata, spec=JUNK)
    groups = loose(leaderWorkerTemplate=loose(size=st.integers(0, 2), workerTemplate=worker))
    group_set = loose(metadata=metadata, spec=groups, status=STATUS)
    deployment = st.sampled_from([current, failed]) | group_set | anything
    revision = loose(metadata=metadata, data=loose(spec=groups))
    claims = st.none() | st.just(build.claim()) | anything
    reason = st.sampled_from(["Invalid", "NameConflict", "Forbidden"])
    rejection = st.builds(Rejection, st.sampled_from(KINDS), WORDS, reason, st.text(max_size=9))
    return Observed(
        claim=draw(claims),
        source_claim=draw(claims),
        volume=draw(st.none() | anything),
        jobs=tuple(draw(st.lists(job, max_size=3))),
        deployment=draw(st.none() | deployment),
        history=tuple(draw(st.lists(anything | revision, max_size=2))),
        disruption_budget=draw(st.none() | anything),
        service=draw(st.none() | anything),
        claims=tuple(draw(st.lists(anything, max_size=2))),
        claim_templates=tuple(draw(st.lists(anything, max_size=2))),
        pods=tuple(draw(st.lists(anything, max_size=3))),
        gpus_of_nodes=draw(st.none() | st.frozensets(st.integers(1, 8))),
        dra_served=draw(st.none() | st.booleans()),
        device_classes=draw(st.none() | st.frozensets(WORDS)),
        groups_served=draw(st.none() | st.booleans()),
        warnings=draw(st.dictionaries(WORDS, anything | loose(reason=WORDS, message=MESSAGES))),
        rejections=tuple(draw(st.lists(rejection, max_size=2))),
    )


@st.composite
def resources(draw: st.DrawFn, build: SimpleNamespace) -> Any:
    spec = draw(
        st.sampled_from(
            [
                {},
                {"replicas": 0},
                {"gpu": {"sharing": "ResourceClaim"}, "loading": {"path": "Prefer"}},
                {"gpu": {"sharing": "WholeNode"}, "parallelism": {"tensorParallelSize": 2}},
                {
                    "volume": {
                        "existingClaim": None,
                        "static": {
                            "fileSystemId": "fs-01234567",
                            "dnsName": "fs-01234567.fsx.eu-central-1.amazonaws.com",
                            "capacityGiB": 1,
                        },
                    }
                },
                {
                    "volume": {
                        "existingClaim": None,
                        "dynamic": {"storageClassName": "x", "capacityGiB": 1200},
                    }
                },
                {"model": {"source": "s3://bucket"}},
                {"parallelism": {"tensorParallelSize": 4, "nodes": 2}, "replicas": 2},
                {"rollout": {"canary": {"percentage": 50}}, "replicas": 3},
                {"rollout": {"paused": True, "maxSurge": "50%"}},
                {"gpu": {"sharing": "None", "preset": "P5en"}},
            ]
        )
    )
    return {**build.resource(spec), "status": draw(STATUS)}


GENERATED = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@GENERATED
@given(data=st.data())
def test_plan_is_total_pure_and_complete(data: st.DataObject, build: SimpleNamespace) -> None:
    resource = data.draw(resources(build))
    observed = data.draw(worlds(build, resource))
    before = copy.deepcopy((resource, observed))
    first = build.plan(resource, observed)
    # repr, because NaN in junk is not equal to itself; of a copy, whose sets have the copy's order
    assert repr(copy.deepcopy((resource, observed))) == repr(before)
    assert repr(build.plan(resource, observed)) == repr(first)
    assert first.status is not None
    conditions = first.status["status"]["conditions"]
    assert [c["type"] for c in conditions] == [str(kind) for kind in ConditionType]
    for condition in conditions:
        assert condition["reason"].isalnum()
        assert condition["reason"][0].isupper()
        assert 0 < len(condition["message"]) <= 1300
        assert "\n" not in condition["message"]
    json.dumps(first.status)
    for desired in first.apply:
        json.dumps(desired.body)
        assert len(desired.body["metadata"]["name"]) <= 63


@GENERATED
@given(data=st.data())
def test_planning_again_from_the_written_status_changes_nothing(
    data: st.DataObject, build: SimpleNamespace
) -> None:
    resource = data.draw(resources(build))
    observed = data.draw(worlds(build, resource))
    first = build.plan(resource, observed)
    again = build.plan({**resource, "status": first.status["status"]}, observed)
    assert again.status == first.status
    assert again.transitions == ()


@GENERATED
@given(data=st.data())
def test_a_template_changes_only_with_the_spec_and_a_published_checkpoint(
    data: st.DataObject, build: SimpleNamespace
) -> None:
    resource = data.draw(resources(build))
    observed = data.draw(worlds(build, resource))
    result = build.plan(resource, observed)
    kinds = {"Deployment", "LeaderWorkerSet"}
    rendered = [d.body for d in result.apply if d.body["kind"] in kinds]
    live = (observed.deployment or {}).get("metadata")
    annotations = live.get("annotations") if isinstance(live, dict) else None
    pinned = annotations.get("headrace.dev/spec-hash") if isinstance(annotations, dict) else None
    for body in rendered:
        wanted = body["metadata"]["annotations"]["headrace.dev/spec-hash"]
        conditions = {c["type"]: c for c in result.status["status"]["conditions"]}
        assert pinned == wanted or conditions["CheckpointReady"]["status"] == "True"
    assert not (rendered and result.scale)


@GENERATED
@given(resource=loose(metadata=JUNK, spec=JUNK, status=STATUS) | JUNK)
def test_any_resource_can_be_planned_for(resource: Any, build: SimpleNamespace) -> None:
    needs(resource)
    result = build.plan(resource, Observed())
    assert result.apply == ()


@GENERATED
@given(pods=st.lists(loose(metadata=JUNK, status=STATUS), max_size=3), junk=JUNK)
def test_the_helpers_are_total_as_well(pods: Any, junk: Any, build: SimpleNamespace) -> None:
    assert len(stuck(pods, [junk], build.now)) <= 2
    assert is_orphan(junk, is_wanted=False) is False


def test_a_deleted_resource_is_left_alone(build: SimpleNamespace) -> None:
    resource = build.resource()
    resource["metadata"]["deletionTimestamp"] = "2026-11-24T12:00:00Z"
    result = build.plan(resource, build.world(resource))
    assert (result.apply, result.delete, result.status) == ((), (), None)


@pytest.mark.parametrize("kind", list(ConditionType))
def test_a_transition_time_moves_only_with_the_status(
    build: SimpleNamespace, kind: ConditionType
) -> None:
    old = "2020-01-01T00:00:00Z"
    resource = build.resource()
    fresh = build.conditions(resource, Observed())[kind]
    assert fresh["lastTransitionTime"] == "2026-11-24T12:00:00Z"
    for status, expected in [(fresh["status"], old), ("Unknown", "2026-11-24T12:00:00Z")]:
        if status == "Unknown" == fresh["status"]:
            continue
        known = {"type": str(kind), "status": status, "lastTransitionTime": old, "reason": "Other"}
        before = build.resource(None, conditions=[known])
        assert build.conditions(before, Observed())[kind]["lastTransitionTime"] == expected
