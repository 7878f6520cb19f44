"""Rollouts of groups: LeaderWorkerSet tells no deadline and no end, so the plan has to see both.

The state machine plays LeaderWorkerSet's controller, which keeps the revisions of a rollout until
it ends, a kubelet whose groups of a bad template never get ready, the user, and an operator that
may die between two writes.
"""

import copy
from collections.abc import Mapping
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from headrace_operator.plan import Observed, Plan, Scale, plan, wants_history

HASH = "headrace.dev/spec-hash"
STABLE = "headrace.dev/stable-spec-hash"
ROLLED_BACK = "headrace.dev/rolled-back-spec-hash"
INDEX = "leaderworkerset.sigs.k8s.io/group-index"
DEADLINE = 60
GROUPS = {
    "replicas": 2,
    "parallelism": {"tensorParallelSize": 4, "nodes": 2},
    "rollout": {"progressDeadlineSeconds": DEADLINE},
}
Groups = Mapping[int, tuple[Any, bool]]


def image(number: int | str) -> dict[str, Any]:
    return {"engine": {"image": f"vllm:{number}"}}


def group_set_of(result: Plan) -> dict[str, Any] | None:
    bodies = (d.body for d in result.apply if d.body["kind"] == "LeaderWorkerSet")
    return next((dict(body) for body in bodies), None)


def applied(body: dict[str, Any], uid: str = "uid-lws") -> dict[str, Any]:
    """A LeaderWorkerSet as the API server has it, before its controller has seen it."""
    made = copy.deepcopy(body)
    made["metadata"] |= {"uid": uid, "generation": 1}
    return made


def template_of(group_set: Mapping[str, Any]) -> str:
    worker = group_set["spec"]["leaderWorkerTemplate"]["workerTemplate"]
    return str(worker["metadata"]["annotations"][HASH])


def revision_of(group_set: Mapping[str, Any]) -> dict[str, Any]:
    """The ControllerRevision that LeaderWorkerSet makes: a patch, with nulls that Go writes."""
    template = copy.deepcopy(group_set["spec"]["leaderWorkerTemplate"])
    for role in ("leaderTemplate", "workerTemplate"):
        template[role]["metadata"]["creationTimestamp"] = None
    spec = {
        "leaderWorkerTemplate": {**template, "$patch": "replace"},
        "networkConfig": {"subdomainPolicy": "Shared", "$patch": "replace"},
    }
    return {"metadata": {}, "data": {"spec": spec}}


def pods_of(build: SimpleNamespace, groups: Groups, size: int = 2) -> tuple[Any, ...]:
    """The pods of groups, by index: whose template they have, and whether they are ready."""
    running = {"running": {"startedAt": "2026-11-24T11:59:00Z"}}
    return tuple(
        build.pod(
            f"tiny-nodes-{index}-{worker}",
            "serve",
            build.container("engine", ready=is_ready, **running),
            inits=(build.container("loader", ready=is_ready, **running),),
            annotations=group_set["spec"]["leaderWorkerTemplate"]["workerTemplate"]["metadata"][
                "annotations"
            ],
            conditions=(build.condition("Ready", str(is_ready)),),
            **{INDEX: str(index)},
        )
        for index, (group_set, is_ready) in groups.items()
        for worker in range(size)
    )


def counted(group_set: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """What the controller of version 0.8 writes: counts, and not of which generation they are."""
    new = [g for g in groups.values() if template_of(g[0]) == template_of(group_set)]
    group_set["status"] = {
        "replicas": len(groups),
        "updatedReplicas": len(new),
        "readyReplicas": sum(is_ready for _, is_ready in groups.values()),
    }
    return group_set


class Rolling(SimpleNamespace):
    """A template that was ready as a whole, and the one that is taking its place."""

    def world(self, groups: Groups, group_set: Any = None, **fields: Any) -> Observed:
        live = counted(copy.deepcopy(group_set or self.bad), groups)
        pods = pods_of(self.build, groups)
        return self.build.world(self.new, deployment=live, pods=pods, **fields)

    def visit(self, groups: Groups, seconds: float, group_set: Any = None, **fields: Any) -> Plan:
        """Plan so many seconds after the last template began to roll, and keep the status."""
        now = self.build.now + timedelta(seconds=seconds)
        world = self.world(groups, group_set, **fields)
        result = plan(self.new, world, self.build.settings, now)
        assert result.status is not None
        self.new = {**self.new, "status": result.status["status"]}
        return result

    def reason(self, kind: str = "Ready") -> str:
        conditions = {c["type"]: c for c in self.new["status"]["conditions"]}
        return str(conditions[kind]["reason"])


@pytest.fixture
def rolling(build: SimpleNamespace) -> Rolling:
    old = build.resource({**GROUPS, **image("good")})
    first = applied(group_set_of(build.plan(old, build.world(old))) or {})
    groups = {0: (first, True), 1: (first, True)}
    world = build.world(
        old, deployment=counted(copy.deepcopy(first), groups), pods=pods_of(build, groups)
    )
    good = applied(group_set_of(build.plan(old, world)) or {})
    new = build.resource({**GROUPS, **image("bad")})
    world = build.world(
        new, deployment=counted(copy.deepcopy(good), groups), pods=pods_of(build, groups)
    )
    bad = applied(group_set_of(build.plan(new, world)) or {})
    return Rolling(build=build, old=old, new=new, first=first, good=good, bad=bad)


def test_a_template_all_of_whose_groups_were_ready_stays_known_as_such(rolling: Rolling) -> None:
    """LeaderWorkerSet does not remember it, and a group may be missing when the spec changes."""
    known = rolling.good["metadata"]["annotations"]
    assert known[STABLE] == known[HASH]
    groups = {0: (rolling.good, True), 1: (rolling.good, False)}
    body = group_set_of(rolling.visit(groups, 0, rolling.good))
    assert body is not None
    assert body["metadata"]["annotations"][STABLE] == known[HASH]
    assert body["metadata"]["annotations"][HASH] != known[HASH]


def test_learning_that_a_template_is_proven_takes_no_readiness_back(rolling: Rolling) -> None:
    """As at an upgrade from an operator that did not remember it."""
    rolling.new = rolling.old
    groups = {0: (rolling.first, True), 1: (rolling.first, True)}
    assert rolling.first["metadata"]["annotations"][STABLE] == ""
    body = group_set_of(rolling.visit(groups, 0, rolling.first))
    assert body is not None
    assert body["metadata"]["annotations"][STABLE] == template_of(rolling.first)
    assert body["spec"] == rolling.first["spec"]
    assert rolling.reason() == "Serving"


def test_counts_of_an_earlier_template_prove_nothing(rolling: Rolling) -> None:
    """Version 0.8 does not say which generation its status is about."""
    groups = {0: (rolling.good, True), 1: (rolling.good, True)}
    claims = {"metadata": {"name": "tiny-gpu-old", "namespace": "ns", "uid": "uid-claims"}}
    world = rolling.world(groups, claim_templates=(claims,))
    world.deployment["status"]["updatedReplicas"] = 2  # type: ignore[index]
    result = plan(rolling.new, world, rolling.build.settings, rolling.build.now)
    body = group_set_of(result)
    assert body is not None
    assert body["metadata"]["annotations"][STABLE] == template_of(rolling.good)
    assert result.delete == ()  # old pods, and going back, need them


def test_each_group_that_gets_ready_begins_the_deadline_anew(rolling: Rolling) -> None:
    one = {0: (rolling.good, True), 1: (rolling.bad, False)}
    assert rolling.visit(one, 0).requeue_seconds == DEADLINE + 1
    assert rolling.visit(one, 50).requeue_seconds == 11
    two = {0: (rolling.good, True), 1: (rolling.bad, True)}
    assert rolling.visit(two, 55).requeue_seconds == DEADLINE + 1
    # it restarts, which is no progress, and gets ready again, which is
    rolling.visit(one, 60)
    assert rolling.visit(two, 100).requeue_seconds == DEADLINE + 1
    rolling.visit(one, 100 + DEADLINE - 1)
    assert rolling.reason("Stalled") == "Progressing"
    rolling.visit(one, 100 + DEADLINE, history=(revision_of(rolling.good),))
    assert rolling.reason() == "RolledBack"


def test_another_template_has_a_deadline_of_its_own(rolling: Rolling) -> None:
    groups = {0: (rolling.good, True), 1: (rolling.bad, False)}
    rolling.visit(groups, 0)
    rolling.new = rolling.build.merged(rolling.new, {"spec": image("worse")})
    body = group_set_of(rolling.visit(groups, DEADLINE - 1))
    assert body is not None
    worse = applied(body)
    groups = {0: (rolling.good, True), 1: (worse, False)}
    history = (revision_of(rolling.good),)
    assert rolling.visit(groups, DEADLINE, worse).requeue_seconds == DEADLINE + 1
    rolling.visit(groups, 2 * DEADLINE - 1, worse, history=history)
    assert rolling.reason("Stalled") == "Progressing"
    body = group_set_of(rolling.visit(groups, 2 * DEADLINE, worse, history=history))
    assert body is not None
    assert template_of(body) == template_of(rolling.good)


def test_groups_that_do_not_get_ready_in_time_give_way_to_the_last_that_did(
    rolling: Rolling,
) -> None:
    groups = {0: (rolling.good, True), 1: (rolling.bad, False)}
    rolling.visit(groups, 0)
    late = rolling.build.now + timedelta(seconds=DEADLINE)
    assert not wants_history(rolling.new, rolling.world(groups), rolling.build.now)
    assert wants_history(rolling.new, rolling.world(groups), late)
    history = (revision_of(rolling.bad), revision_of(rolling.good))
    body = group_set_of(rolling.visit(groups, DEADLINE, history=history))
    assert body is not None
    assert body["spec"] == rolling.good["spec"]
    assert body["metadata"]["annotations"] == {
        **rolling.good["metadata"]["annotations"],
        ROLLED_BACK: template_of(rolling.bad),
    }
    assert (rolling.reason(), rolling.reason("Stalled")) == ("RolledBack", "RolledBack")

    back = applied(body)
    groups = {0: (rolling.good, True), 1: (rolling.good, True)}
    result = rolling.visit(groups, DEADLINE + 5, back)
    assert group_set_of(result) is None  # not tried again
    assert (rolling.reason(), "rollout" in rolling.new["status"]) == ("RolledBack", False)
    rolling.new = rolling.build.merged(rolling.new, {"spec": {"replicas": 3}})
    assert rolling.visit(groups, 99, back).scale == Scale(
        "LeaderWorkerSet", "tiny-nodes", {"replicas": 3}
    )
    rolling.new = rolling.build.merged(rolling.new, {"spec": {"replicas": 2, **image("good")}})
    body = group_set_of(rolling.visit(groups, 100, back))
    assert body is not None
    assert body["metadata"]["annotations"] == rolling.good["metadata"]["annotations"]
    assert body["spec"] == rolling.good["spec"]


def test_with_nothing_to_go_back_to_the_groups_stand_and_say_so(rolling: Rolling) -> None:
    groups = {0: (rolling.good, True), 1: (rolling.bad, False)}
    rolling.visit(groups, 0)
    body = group_set_of(rolling.visit(groups, DEADLINE))
    assert body is not None
    assert template_of(body) == template_of(rolling.bad)
    assert rolling.reason("Stalled") == "ProgressDeadlineExceeded"
    # one that gets ready after all goes on
    rolling.visit({**groups, 1: (rolling.bad, True)}, DEADLINE + 9)
    assert rolling.reason("Stalled") == "Progressing"


@pytest.mark.parametrize("change", [{"rollout": {"paused": True}}, {"replicas": 0}])
def test_what_is_paused_or_at_zero_does_not_fail_and_has_all_its_time_after(
    rolling: Rolling, change: dict[str, Any]
) -> None:
    groups = {0: (rolling.good, True), 1: (rolling.bad, False)}
    rolling.visit(groups, 0)
    resource = rolling.new
    rolling.new = rolling.build.merged(resource, {"spec": change})
    for seconds in (DEADLINE - 1, 9 * DEADLINE):
        result = rolling.visit(groups, seconds)
        assert result.requeue_seconds in {None, 16.0}  # that of pods that stand still
        assert rolling.reason("Stalled") in {"Progressing", "Settled"}
    rolling.new = {**rolling.new, "spec": resource["spec"]}
    assert rolling.visit(groups, 10 * DEADLINE).requeue_seconds in {DEADLINE + 1, 16.0}
    rolling.visit(groups, 11 * DEADLINE - 1)
    assert rolling.reason("Stalled") == "Progressing"


def test_a_canary_that_has_to_stand_extends_the_deadline(rolling: Rolling) -> None:
    canary = {"rollout": {"canary": {"percentage": 50, "seconds": 30}}}
    rolling.new = rolling.build.merged(rolling.new, {"spec": canary})
    groups = {0: (rolling.good, True), 1: (rolling.bad, False)}
    rolling.visit(groups, 0)
    history = (revision_of(rolling.good),)
    rolling.visit(groups, DEADLINE + 29, history=history)
    assert rolling.reason("Stalled") == "Progressing"
    body = group_set_of(rolling.visit(groups, DEADLINE + 30, history=history))
    assert body is not None
    assert body["spec"]["rolloutStrategy"]["rollingUpdateConfiguration"]["partition"] == 0
    assert rolling.reason() == "RolledBack"


def test_a_clock_that_steps_back_gives_time_and_takes_none(rolling: Rolling) -> None:
    groups = {0: (rolling.good, True), 1: (rolling.bad, False)}
    rolling.visit(groups, 0)
    assert rolling.visit(groups, -7200).requeue_seconds in {DEADLINE + 1, 16.0}
    rolling.visit(groups, -7200 + DEADLINE, history=(revision_of(rolling.good),))
    assert rolling.reason() == "RolledBack"


class Cluster(RuleBasedStateMachine):
    """One ModelDeployment of groups; images with an even number work."""

    build: SimpleNamespace

    @initialize()
    def begin(self) -> None:
        self.clock = self.passed = self.progressed = 0
        self.resource = self.build.resource({**GROUPS, **image(0)})
        self.live: dict[str, Any] | None = None
        self.revisions: list[dict[str, Any]] = []
        self.groups: dict[int, tuple[Any, bool]] = {}

    # the user

    @rule(number=st.integers(0, 5))
    def change_the_image(self, number: int) -> None:
        self.change(image(number))

    @rule(replicas=st.sampled_from([0, 1, 2, 3]))
    def scale(self, replicas: int) -> None:
        self.change({"replicas": replicas})

    @rule(paused=st.booleans())
    def pause(self, paused: bool) -> None:
        self.change({"rollout": {"paused": paused}})

    def change(self, change: dict[str, Any]) -> None:
        self.resource["spec"] = self.build.merged(self.resource["spec"], change)

    # time, and the clock, which may step back

    @rule(seconds=st.integers(1, DEADLINE))
    def wait(self, seconds: int) -> None:
        self.wait_a_while(seconds)

    def wait_a_while(self, seconds: int) -> None:
        self.passed += seconds
        self.clock += seconds

    @rule(seconds=st.integers(1, 2 * DEADLINE))
    def step_back(self, seconds: int) -> None:
        self.clock -= seconds

    # the operator

    @rule(writes=st.sampled_from([0, 1, 2, 2, 2]))
    def visit(self, writes: int) -> None:
        self.reconcile(writes)

    def reconcile(self, writes: int = 2) -> float | None:
        now = self.build.now + timedelta(seconds=self.clock)
        pods = pods_of(self.build, self.groups)
        world = self.build.world(self.resource, deployment=copy.deepcopy(self.live), pods=pods)
        if wants_history(self.resource, world, now):
            history = tuple(map(revision_of, self.revisions))
            world = self.build.world(
                self.resource, deployment=world.deployment, pods=pods, history=history
            )
        result = plan(self.resource, world, self.build.settings, now)
        if writes > 0:
            self.write(result)
        if writes > 1 and result.status is not None:
            self.resource["status"] = copy.deepcopy(result.status["status"])
        return result.requeue_seconds

    def write(self, result: Plan) -> None:
        body = group_set_of(result)
        if result.scale is not None and self.live is not None:
            self.live["spec"].update(result.scale.spec)
        if body is None:
            return
        given_up = body["metadata"]["annotations"][ROLLED_BACK]
        if given_up and self.live and given_up == template_of(self.live):
            self.check_what_was_given_up(body)
        if self.live is None or template_of(body) != template_of(self.live):
            self.progressed = self.passed
        status = (self.live or {}).get("status")
        self.live = applied(body) | ({"status": status} if status else {})

    def check_what_was_given_up(self, body: dict[str, Any]) -> None:
        spec = self.resource["spec"]
        assert spec["replicas"] > 0
        assert not spec["rollout"].get("paused")
        assert self.works(body)
        assert self.passed - self.progressed >= DEADLINE

    # LeaderWorkerSet's controller, and the kubelet

    @rule()
    def control(self) -> None:
        """Replace one group of the old template, the last first, as leaderworkerset 0.8 does."""
        if self.live is None:
            return
        body, replicas = self.live, self.live["spec"]["replicas"]
        if not self.revisions or template_of(self.revisions[-1]) != template_of(body):
            self.revisions.append(copy.deepcopy(body))
        self.groups = {i: g for i, g in self.groups.items() if i < replicas}
        for index in range(replicas):
            self.groups.setdefault(index, (copy.deepcopy(body), False))
        partition = body["spec"]["rolloutStrategy"]["rollingUpdateConfiguration"]["partition"]
        new = template_of(body)
        for index in sorted(self.groups, reverse=True):
            group, is_ready = self.groups[index]
            others = all(ready for i, (_, ready) in self.groups.items() if i != index)
            if index >= partition and template_of(group) != new and (others or not is_ready):
                self.groups[index] = (copy.deepcopy(body), False)
                break
        counted(body, self.groups)
        done = all(template_of(g) == new and ready for g, ready in self.groups.values())
        if done and partition == 0:
            self.revisions = [r for r in self.revisions if template_of(r) == new]

    @rule(index=st.integers(0, 2))
    def a_group_gets_ready(self, index: int) -> None:
        if index in self.groups and self.works(self.groups[index][0]):
            self.set_ready(index, True)

    @rule(index=st.integers(0, 2))
    def a_group_is_lost(self, index: int) -> None:
        if index in self.groups:
            self.set_ready(index, False)

    def set_ready(self, index: int, ready: bool) -> None:
        group, was = self.groups[index]
        self.groups[index] = (group, ready)
        if self.live and ready > was and template_of(group) == template_of(self.live):
            self.progressed = self.passed

    def works(self, group_set: Mapping[str, Any]) -> bool:
        template = group_set["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
        return int(template["spec"]["containers"][0]["image"][-1]) % 2 == 0

    # what has to hold

    @rule()
    def left_alone_it_comes_to_an_end(self) -> None:
        waited = 0
        for _ in range(60):
            before = copy.deepcopy((self.resource, self.live, self.groups))
            again = self.reconcile()
            self.control()
            for index, (group_set, _) in self.groups.items():
                if self.works(group_set):
                    self.set_ready(index, True)
            if (self.resource, self.live, self.groups) == before:
                if again is None or waited > 2 * DEADLINE:
                    break
                self.wait_a_while(int(again))
                waited += int(again)
        else:
            raise AssertionError("no end")
        self.check_the_end()

    def check_the_end(self) -> None:
        spec, live = self.resource["spec"], self.live
        conditions = {c["type"]: c for c in self.resource["status"]["conditions"]}
        if spec["rollout"].get("paused"):
            return
        assert live is not None
        assert live["spec"]["replicas"] == len(self.groups) == spec["replicas"]
        asked = int(spec["engine"]["image"][-1])
        ready = conditions["Ready"]
        if asked % 2 == 0 or spec["replicas"] == 0:
            assert ready["status"] == "True" or ready["reason"] == "RolledBack", ready
        elif ready["reason"] == "RolledBack":
            assert self.works(live)
            assert all(is_ready for _, is_ready in self.groups.values())
            assert conditions["Stalled"]["status"] == "True"
        else:
            # There is nothing to go back to.
            assert conditions["Stalled"]["reason"] == "ProgressDeadlineExceeded"
            stable = live["metadata"]["annotations"][STABLE]
            assert stable not in {template_of(r) for r in self.revisions} - {template_of(live)}


def test_every_order_of_events_ends_with_groups_that_work(build: SimpleNamespace) -> None:
    machine = type("Machine", (Cluster,), {"build": build})
    budget = settings(max_examples=25, stateful_step_count=25, deadline=None)
    run_state_machine_as_test(machine, settings=budget)  # type: ignore[no-untyped-call]
