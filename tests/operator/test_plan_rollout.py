"""Rollouts: canary, pause, giving up, going back, and what users and kstatus read of it."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest

from headrace_operator.plan import Deletion, Observed, Scale
from headrace_operator.plan.names import job_name

HASH = "headrace.dev/spec-hash"
STABLE = "headrace.dev/stable-spec-hash"
ROLLED_BACK = "headrace.dev/rolled-back-spec-hash"
FAILED = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}
DONE = {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"}
OLD = {"replicas": 4}
NEW = {"replicas": 4, "engine": {"image": "vllm:2"}}


def body_of(result: Any, kind: str = "Deployment") -> dict[str, Any]:
    (body,) = (d.body for d in result.apply if d.body["kind"] == kind)
    return dict(body)


def kinds(result: Any) -> list[str]:
    return [d.body["kind"] for d in result.apply]


def live(body: dict[str, Any], *conditions: dict[str, str], **status: Any) -> dict[str, Any]:
    """A Deployment as the API server has it once it was applied."""
    made = copy.deepcopy(body)
    made["metadata"] |= {"uid": "uid-deployment", "generation": 1}
    made["status"] = {"observedGeneration": 1, "conditions": list(conditions), **status}
    return made


def replica_set(deployment: dict[str, Any]) -> dict[str, Any]:
    """The ReplicaSet that the Deployment controller makes of a Deployment."""
    template = copy.deepcopy(deployment["spec"]["template"])
    template["metadata"]["labels"]["pod-template-hash"] = "abc"
    annotations = dict(deployment["metadata"]["annotations"])
    return {"metadata": {"annotations": annotations}, "spec": {"template": template}}


def pods(build: SimpleNamespace, deployment: dict[str, Any], *ages: float | None) -> list[Any]:
    """Serving pods of a Deployment's template, ready since so many seconds or not at all."""
    annotations = deployment["spec"]["template"]["metadata"]["annotations"]
    made = []
    for age in ages:
        conditions = ()
        if age is not None:
            since = f"2026-11-24T11:{59 - int(age) // 60:02}:{(60 - int(age) % 60) % 60:02}Z"
            conditions = (build.condition("Ready", lastTransitionTime=since),)
        pod = build.pod(f"p-{len(made)}", "serve", annotations=annotations, conditions=conditions)
        made.append(pod)
    return made


@pytest.fixture
def given_up(build: SimpleNamespace) -> SimpleNamespace:
    """A stable Deployment, and one with a template that did not become ready in time."""
    old, new = build.resource(OLD), build.resource(NEW)
    stable = live(body_of(build.plan(old, build.world(old))), DONE, updatedReplicas=4)
    rolling = body_of(build.plan(new, build.world(new, deployment=stable)))
    failed = live(rolling, FAILED, replicas=4, updatedReplicas=1, readyReplicas=3)
    return SimpleNamespace(old=old, new=new, stable=stable, rolling=rolling, failed=failed)


def test_a_template_that_proved_itself_is_remembered(
    build: SimpleNamespace, given_up: SimpleNamespace
) -> None:
    known = given_up.rolling["metadata"]["annotations"]
    assert known[STABLE] == given_up.stable["metadata"]["annotations"][HASH] != known[HASH]
    done = live(given_up.rolling, DONE, replicas=4, updatedReplicas=4, readyReplicas=4)
    body = body_of(build.plan(given_up.new, build.world(given_up.new, deployment=done)))
    assert body["metadata"]["annotations"][STABLE] == ""
    # one that did not is not: the one before it still is
    third = build.resource({**NEW, "engine": {"image": "vllm:3"}})
    body = body_of(build.plan(third, build.world(third, deployment=given_up.failed)))
    assert body["metadata"]["annotations"][STABLE] == known[STABLE]


def test_ready_waits_for_the_final_annotations(
    build: SimpleNamespace, given_up: SimpleNamespace
) -> None:
    """Forgetting the template before begins a generation that is not observed at once."""
    held = {"ready": True, "running": {"startedAt": "2026-11-24T11:59:00Z"}}
    containers = (build.container("loader", **held), build.container("engine", **held))
    serving = tuple(build.serving_pod(given_up.new, *containers, name=f"p-{n}") for n in range(4))
    counts = {"replicas": 4, "updatedReplicas": 4, "readyReplicas": 4}
    rolled_out = live(given_up.rolling, DONE, **counts)
    final = live(
        body_of(build.plan(given_up.new, build.world(given_up.new, deployment=rolled_out)))
    )
    final["status"] |= rolled_out["status"]
    written = copy.deepcopy(final)
    written["metadata"]["generation"] = 2
    for deployment, ready in ((rolled_out, "False"), (written, "False"), (final, "True")):
        world = build.world(given_up.new, deployment=deployment, pods=serving)
        assert build.conditions(given_up.new, world)["Ready"]["status"] == ready


def test_what_does_not_become_ready_in_time_gives_way_to_the_last_that_did(
    build: SimpleNamespace, given_up: SimpleNamespace
) -> None:
    new, failed = given_up.new, given_up.failed
    history = (replica_set(given_up.rolling), replica_set(given_up.stable))
    world = build.world(new, deployment=failed, history=history)
    body = body_of(build.plan(new, world))
    assert body["spec"]["template"] == given_up.stable["spec"]["template"]
    annotations = body["metadata"]["annotations"]
    assert annotations[ROLLED_BACK] == failed["metadata"]["annotations"][HASH]
    assert annotations[HASH] == annotations[STABLE]
    conditions = build.conditions(new, world)
    assert (conditions["Ready"]["status"], conditions["Ready"]["reason"]) == ("False", "RolledBack")
    assert conditions["Stalled"]["status"] == "True"
    assert conditions["Reconciling"]["status"] == "False"

    back = live(body, DONE, replicas=4, updatedReplicas=4, readyReplicas=4)
    result = build.plan(new, build.world(new, deployment=back))
    assert kinds(result) == ["Service", "PodDisruptionBudget"]  # not tried again
    assert result.scale is None
    scaled = build.merged(new, {"spec": {"replicas": 6}})
    result = build.plan(scaled, build.world(scaled, deployment=back))
    assert result.scale == Scale("Deployment", "tiny", {"replicas": 6})
    other = build.resource({**NEW, "engine": {"image": "vllm:3"}})
    body = body_of(build.plan(other, build.world(other, deployment=back)))
    assert body["metadata"]["annotations"][ROLLED_BACK] == ""
    assert body["metadata"]["annotations"][STABLE] == annotations[STABLE]


def test_the_reason_for_going_back_outlives_the_pods(
    build: SimpleNamespace, given_up: SimpleNamespace
) -> None:
    crash = {"exitCode": 1, "reason": "Error"}
    waiting = {"waiting": {"reason": "CrashLoopBackOff"}, "last": crash, "restarts": 4}
    pod = build.serving_pod(
        given_up.new, build.container("loader", ready=True), build.container("engine", **waiting)
    )
    history = (replica_set(given_up.stable),)
    world = build.world(given_up.new, deployment=given_up.failed, history=history, pods=(pod,))
    first = build.plan(given_up.new, world)
    written = {**given_up.new, "status": first.status["status"]}
    back = live(body_of(first), DONE, replicas=4, updatedReplicas=4, readyReplicas=4)
    ready = build.conditions(written, build.world(written, deployment=back))["Ready"]
    assert "container engine: exit code 1" in ready["message"]


@pytest.mark.parametrize("missing", ["history", "stable"])
def test_with_nothing_to_go_back_to_the_rollout_stands_and_says_so(
    build: SimpleNamespace, given_up: SimpleNamespace, missing: str
) -> None:
    history = (replica_set(given_up.stable),)
    if missing == "stable":
        del given_up.failed["metadata"]["annotations"][STABLE]
    else:
        history = ()
    world = build.world(given_up.new, deployment=given_up.failed, history=history)
    body = body_of(build.plan(given_up.new, world))
    assert body["spec"]["template"] == given_up.rolling["spec"]["template"]
    stalled = build.conditions(given_up.new, world)["Stalled"]
    assert (stalled["status"], stalled["reason"]) == ("True", "ProgressDeadlineExceeded")


def test_a_verdict_on_an_older_generation_is_none(
    build: SimpleNamespace, given_up: SimpleNamespace
) -> None:
    given_up.failed["metadata"]["generation"] = 2
    history = (replica_set(given_up.stable),)
    world = build.world(given_up.new, deployment=given_up.failed, history=history)
    body = body_of(build.plan(given_up.new, world))
    assert body["metadata"]["annotations"][ROLLED_BACK] == ""


CANARY = {"rollout": {"canary": {"percentage": 50, "seconds": 30}}}


@pytest.mark.parametrize(
    ("ages", "stands", "again"),
    [
        ((), True, None),
        ((None, None), True, None),
        ((40, None), True, None),
        ((40, 10), True, 21.0),
        ((40, 31), False, None),
    ],
)
def test_the_canary_holds_the_others_back_until_it_has_stood(
    build: SimpleNamespace, ages: Any, stands: bool, again: float | None
) -> None:
    old, new = build.resource(OLD | CANARY), build.resource(NEW | CANARY)
    stable = live(body_of(build.plan(old, build.world(old))), DONE, updatedReplicas=4)
    assert "minReadySeconds" not in stable["spec"]
    rolling = body_of(build.plan(new, build.world(new, deployment=stable)))
    present = (*pods(build, stable, 99, 99), *pods(build, rolling, *ages))
    world = build.world(new, deployment=live(rolling, updatedReplicas=2), pods=present)
    result = build.plan(new, world)
    spec = body_of(result)["spec"]
    batches = spec["strategy"]["rollingUpdate"]
    if stands:
        assert (spec["minReadySeconds"], batches) == (30, {"maxSurge": 0, "maxUnavailable": "50%"})
        assert build.conditions(new, world)["Ready"]["reason"] in {"CanaryStanding", "PodsStarting"}
    else:
        assert batches == {"maxSurge": 0, "maxUnavailable": 1}
        assert "minReadySeconds" not in spec
    assert spec["progressDeadlineSeconds"] == 3630
    if again is not None:
        assert result.requeue_seconds in {again, 16.0}


def test_a_canary_of_surging_replicas_surges(build: SimpleNamespace) -> None:
    rollout = {"rollout": {"maxSurge": 1, "maxUnavailable": 0, "canary": {"percentage": 30}}}
    old, new = build.resource(OLD | rollout), build.resource(NEW | rollout)
    stable = live(body_of(build.plan(old, build.world(old))), DONE)
    world = build.world(new, deployment=stable, pods=tuple(pods(build, stable, 9, 9, 9, 9)))
    batches = body_of(build.plan(new, world))["spec"]["strategy"]["rollingUpdate"]
    assert batches == {"maxSurge": "30%", "maxUnavailable": 0}


def test_a_paused_rollout_neither_begins_nor_goes_on(build: SimpleNamespace) -> None:
    old = build.resource(OLD)
    paused = {"rollout": {"paused": True}}
    stable = live(body_of(build.plan(old, build.world(old))), DONE)
    new = build.resource(NEW | paused)
    result = build.plan(new, build.world(new, deployment=stable))
    assert kinds(result) == ["Service", "PodDisruptionBudget"]
    assert result.scale == Scale("Deployment", "tiny", {"paused": True})
    rolling = body_of(build.plan(build.resource(NEW), build.world(new, deployment=stable)))
    halfway = build.world(new, deployment=live(rolling, replicas=4, updatedReplicas=1))
    assert body_of(build.plan(new, halfway))["spec"]["paused"] is True
    assert "paused" not in body_of(build.plan(build.resource(NEW), halfway))["spec"]
    rolling["spec"]["paused"] = True
    halfway = build.world(new, deployment=live(rolling, replicas=4, updatedReplicas=1))
    assert body_of(build.plan(build.resource(NEW), halfway))["spec"]["paused"] is False


def test_a_pause_holds_no_first_pod_back(build: SimpleNamespace) -> None:
    """The Deployment controller makes no pods for a Deployment that was always paused."""
    resource = build.resource({"rollout": {"paused": True}})
    made = body_of(build.plan(resource, build.world(resource)))
    assert "paused" not in made["spec"]
    for status, paused in (({}, None), (live(made)["status"], True)):
        world = build.world(resource, deployment=live(made) | {"status": status})
        assert body_of(build.plan(resource, world))["spec"].get("paused") is paused


@pytest.mark.parametrize(
    ("rollout", "updated", "reason"),
    [
        ({"paused": True}, None, "RolloutPaused"),
        ({"paused": True}, 1, "RolloutPaused"),
        ({"canary": {"percentage": 25, "seconds": 90}}, 1, "CanaryStanding"),
        ({}, 1, "PodsStarting"),
    ],
)
def test_ready_says_what_holds_the_other_replicas_back(
    build: SimpleNamespace, rollout: Any, updated: int | None, reason: str
) -> None:
    """Also where the new ones are of another checkpoint, so that few hold its weights."""
    old, new = build.resource(OLD), build.resource({**NEW, "model": {"revision": "v2"}})
    new["spec"]["rollout"] = rollout
    counts = {"replicas": 4, "updatedReplicas": 4, "readyReplicas": 4}
    stable = live(body_of(build.plan(old, build.world(old))), DONE, **counts)
    if updated is None:
        observed = build.world(new, deployment=stable)
    else:
        plain = build.resource({**NEW, "model": {"revision": "v2"}})
        rolling = body_of(build.plan(plain, build.world(plain, deployment=stable)))
        counts["updatedReplicas"] = updated
        present = (*pods(build, stable, 9, 9, 9), *pods(build, rolling, 9))
        observed = build.world(new, deployment=live(rolling, **counts), pods=present)
    status = build.plan(new, observed).status["status"]
    assert status["updatedReplicas"] == (updated or 0)
    assert build.conditions(new, observed)["Ready"]["reason"] == reason


def test_the_budget_is_there_for_more_than_one_replica(build: SimpleNamespace) -> None:
    many = build.resource({"replicas": 2, "disruptionBudget": {"maxUnavailable": "50%"}})
    budget = body_of(build.plan(many, build.world(many)), "PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == "50%"
    one = build.resource()
    known = {"metadata": {"name": "tiny", "namespace": "ns", "uid": "uid-pdb"}}
    world = build.world(one, deployment=build.deployment(one), disruption_budget=known)
    result = build.plan(one, world)
    assert result.delete == (Deletion("PodDisruptionBudget", "tiny", "ns", "uid-pdb"),)


NODES = {
    "gpu": {"sharing": "ResourceClaim", "preset": "P6e-GB200"},
    "loading": {"path": "Prefer"},
    "parallelism": {"tensorParallelSize": 8, "nodes": 2},
}


def test_a_replica_of_several_nodes_is_a_group(build: SimpleNamespace) -> None:
    resource = build.resource(NODES)
    result = build.plan(resource, build.world(resource))
    group = body_of(result, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    assert (group["size"], group["restartPolicy"]) == (2, "RecreateGroupOnPodRestart")
    for role in ("leaderTemplate", "workerTemplate"):
        pod = group[role]["spec"]
        loader = pod["initContainers"][0]["command"]
        assert loader[loader.index("--nodes") :][:4] == [
            *("--nodes", "2", "--node-rank", "$(LWS_WORKER_INDEX)"),
        ]
        engine = pod["containers"][0]
        assert engine["resources"]["limits"]["vpc.amazonaws.com/efa"] == "4"
        assert ("--headless" in engine["args"]) is (role == "workerTemplate")
        assert ("readinessProbe" in engine) is (role == "leaderTemplate")
    (request,) = body_of(result, "ResourceClaimTemplate")["spec"]["spec"]["devices"]["requests"]
    assert request["exactly"]["count"] == 4
    selector = body_of(result, "Service")["spec"]["selector"]
    assert selector["leaderworkerset.sigs.k8s.io/worker-index"] == "0"
    assert "worker-index=0" in result.status["status"]["selector"]


@pytest.mark.parametrize(
    ("rollout", "expected"),
    [
        ({}, 1),
        ({"maxUnavailable": 3}, 3),
        ({"maxUnavailable": "50%"}, 2),
        ({"maxUnavailable": "20%"}, 1),
        ({"maxUnavailable": "20%", "maxSurge": 1}, 0),
    ],
)
def test_a_share_of_less_than_one_group_is_one(
    build: SimpleNamespace, rollout: Any, expected: int
) -> None:
    resource = build.resource({**NODES, "replicas": 4, "rollout": rollout})
    group_set = body_of(build.plan(resource, build.world(resource)), "LeaderWorkerSet")
    strategy = group_set["spec"]["rolloutStrategy"]["rollingUpdateConfiguration"]
    assert strategy["maxUnavailable"] == expected


def test_names_leave_room_for_what_controllers_append_to_them(build: SimpleNamespace) -> None:
    resource = build.resource(NODES)
    resource["metadata"]["name"] = "n" * 63
    group_set = body_of(build.plan(resource, build.world(resource)), "LeaderWorkerSet")
    assert len(group_set["metadata"]["name"] + "-19999-0123456789") == 63
    assert len(job_name("n" * 63, build.spec_of(resource)) + "-63") == 63


def test_a_replica_holds_its_weights_when_all_of_its_nodes_do(build: SimpleNamespace) -> None:
    resource = build.resource({**NODES, "replicas": 2})
    group = live(body_of(build.plan(resource, build.world(resource)), "LeaderWorkerSet"))
    index = "leaderworkerset.sigs.k8s.io/group-index"
    present = [
        build.serving_pod(
            resource,
            build.container("loader", ready=ready),
            build.container("engine"),
            name=f"serve-{number}",
            **{index: str(number // 2)},
        )
        for number, ready in enumerate([True, True, True, False])
    ]
    world = build.world(resource, deployment=group, pods=tuple(present))
    condition = build.conditions(resource, world)["WeightsResident"]
    assert condition["message"] == "1 of 2 replicas hold the weights"


@pytest.mark.parametrize(
    ("spec", "fields", "reason", "fragment"),
    [
        (NODES, {"groups_served": False}, "LeaderWorkerSetUnavailable", "sigs.k8s.io/lws"),
        (
            NODES,
            {"device_classes": frozenset({"tpu.example.com"})},
            "DeviceClassNotFound",
            "tpu.example.com",
        ),
        (
            {**NODES, "parallelism": {"tensorParallelSize": 8}},
            {},
            "NodeTooSmall",
            "4 GPUs",
        ),
        (
            {
                **NODES,
                "gpu": {"sharing": "WholeNode", "preset": "P5en"},
                "parallelism": {"tensorParallelSize": 4},
            },
            {},
            "PartialNodeWithoutDRA",
            "the nodes have 8",
        ),
    ],
)
def test_what_the_nodes_cannot_run_is_refused(
    build: SimpleNamespace, spec: Any, fields: Any, reason: str, fragment: str
) -> None:
    resource = build.resource(spec)
    world = build.world(resource, **fields)
    conditions = build.conditions(resource, world)
    assert conditions["WeightsResident"]["reason"] == reason
    assert fragment in conditions["WeightsResident"]["message"]
    assert conditions["Stalled"]["status"] == "True"
    # Nothing tells that the cluster has changed; that the spec has, an event does.
    is_of_cluster = bool(fields)
    assert build.plan(resource, world).requeue_seconds == (5.0 if is_of_cluster else None)
    assert build.plan(resource, world).apply == ()


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        ({"serviceAccountName": "admin"}, "PodFieldDenied"),
        ({"priorityClassName": "system-node-critical"}, "PodFieldDenied"),
        ({"runtimeClassName": "kata"}, "PodFieldDenied"),
        ({"affinity": {"x": "y" * 70000}}, "PodOverridesTooLarge"),
    ],
)
def test_overrides_beyond_a_tenants_reach_stop_everything(
    build: SimpleNamespace, pod: Any, reason: str
) -> None:
    from headrace_operator.plan import Settings, plan

    resource = build.resource({"pod": pod})
    world = Observed(claim=build.claim(), source_claim=build.claim("models"))
    strict = Settings("loader:1")
    result = plan(resource, world, strict, build.now)
    assert result.apply == ()
    conditions = {c["type"]: c for c in result.status["status"]["conditions"]}
    assert conditions["Ready"]["reason"] == conditions["Stalled"]["reason"] == reason
    serving = build.world(resource, deployment=build.deployment(build.resource()))
    assert kinds(plan(resource, serving, strict, build.now)) == ["Service"]
