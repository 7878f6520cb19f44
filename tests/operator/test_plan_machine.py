"""plan() in a world that moves: every order of events and steps ends where the spec says.

A state machine plays the user (who changes the spec), the cluster's controllers (Job,
Deployment, claims and volumes, garbage collection), whoever deletes things, and the operator,
which observes, plans and writes, or writes only a part of its plan and dies. Whenever it is
left alone with its controllers it has to converge in a few rounds and then change nothing.
"""

import copy
import itertools
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
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from headrace_operator.plan import Observed, Plan, needs, plan
from headrace_operator.plan.names import COMPONENT_LABEL, RECLAIM
from headrace_operator.plan.objects import is_deleting, name_of, uid_of

ROUNDS = 25
SPECS: list[dict[str, Any]] = [
    {"replicas": 0},
    {"replicas": 2},
    {"model": {"revision": "v2"}},
    {"model": {"revision": "v3"}, "replicas": 3},
    {"engine": {"args": ["--max-model-len", "8"]}},
    {"gpu": {"sharing": "ResourceClaim"}, "parallelism": {"tensorParallelSize": 2}},
    {"gpu": {"sharing": "WholeNode"}, "parallelism": {"tensorParallelSize": 2}},
    {"volume": {"existingClaim": {"name": "other"}}},
    {"volume": {"root": "other/root"}},
    {"checkpoint": {"reclaimPolicy": "Delete"}},
    {
        "volume": {
            "existingClaim": None,
            "static": {
                "fileSystemId": "fs-01234567",
                "dnsName": "fs-01234567.fsx.eu-west-1.amazonaws.com",
                "capacityGiB": 1200,
            },
        }
    },
]
KIND_OF_CLUSTER = "PersistentVolume"


class Cluster(RuleBasedStateMachine):
    """Objects by kind and name, and what acts on them."""

    build: SimpleNamespace

    @initialize()
    def begin(self) -> None:
        self.now = self.build.now
        self.uids = map(str, itertools.count())
        self.resource = self.build.resource()
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.published: set[tuple[str, str]] = set()
        for name in ("weights", "models", "other"):
            claim = self.build.claim(name)
            self.objects["PersistentVolumeClaim", name] = claim | {"kind": "PersistentVolumeClaim"}

    # the user

    @rule(change=st.sampled_from(SPECS))
    def change_the_spec(self, change: dict[str, Any]) -> None:
        self.change(change)

    def change(self, change: dict[str, Any]) -> None:
        spec = self.build.merged(self.resource["spec"], change)
        volume = spec["volume"]
        if "static" in volume and "existingClaim" in volume:
            volume.pop("static")
        if spec != self.resource["spec"]:
            self.resource["spec"] = spec
            self.resource["metadata"]["generation"] += 1

    @rule(first=st.sampled_from(SPECS), second=st.sampled_from(SPECS))
    def change_and_wait(self, first: dict[str, Any], second: dict[str, Any]) -> None:
        for change in (first, second):
            self.change(change)
            self.left_alone_it_converges()

    @rule(kind=st.sampled_from(["Job", "Deployment", "Service", "ResourceClaimTemplate"]))
    def delete_a_child(self, kind: str) -> None:
        for key in [key for key, o in self.objects.items() if key[0] == kind and not told(o)][:1]:
            self.remove(key)

    @rule(seconds=st.integers(-7200, 7200))
    def step_the_clock(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    # the operator

    @rule()
    def reconcile(self) -> None:
        self.write(self.plan())

    @rule(writes=st.integers(0, 4))
    def reconcile_and_die(self, writes: int) -> None:
        self.write(self.plan(), writes)

    # the controllers

    @rule()
    def controllers_act(self) -> None:
        self.control()

    @rule()
    @precondition(lambda self: any(key[0] == "Job" for key in self.objects))
    def a_job_fails(self) -> None:
        job = next(o for (kind, _), o in self.objects.items() if kind == "Job")
        if not job.get("status"):
            job["status"] = {"conditions": [self.build.condition("Failed", reason="Error")]}

    @rule()
    def a_replica_is_lost(self) -> None:
        for (kind, _), deployment in self.objects.items():
            if kind == "Deployment" and deployment.get("status", {}).get("readyReplicas"):
                deployment["status"]["readyReplicas"] -= 1

    # what has to hold

    @invariant()
    def names_and_owners_are_right(self) -> None:
        for (kind, name), body in self.objects.items():
            owners = body["metadata"].get("ownerReferences", [])
            assert all(owner["uid"] == uid_of(self.resource) for owner in owners)
            if kind == "Deployment":
                assert name == name_of(self.resource)
                keeps = self.resource["spec"].get("checkpoint", {}).get("reclaimPolicy") == "Delete"
                assert len(self.names("Job")) <= 1 or keeps

    @rule()
    def leave_alone(self) -> None:
        self.left_alone_it_converges()

    def left_alone_it_converges(self) -> None:
        for _ in range(ROUNDS):
            before = self.state()
            self.write(self.plan())
            self.control()
            if self.state() == before:
                break
        else:
            raise AssertionError(f"no end after {ROUNDS} rounds")
        last = self.plan()
        assert self.changes(last) == [], "the last plan still changes something"
        assert last.transitions == ()
        self.check_the_end()

    def check_the_end(self) -> None:
        conditions = {c["type"]: c for c in self.resource["status"]["conditions"]}
        spec = self.resource["spec"]
        jobs = [o for (kind, _), o in self.objects.items() if kind == "Job"]
        failed = any(c["type"] == "Failed" for job in jobs for c in job["status"]["conditions"])
        refused = spec["gpu"]["sharing"] == "WholeNode" and self.gpus() is not None
        # What the last spec that served has is deleted once this one serves.
        keeps = (failed or refused) and spec.get("checkpoint", {}).get("reclaimPolicy") == "Delete"
        assert len(jobs) == 1 or keeps
        if failed or refused:
            assert conditions["Ready"]["status"] == "False"
            assert conditions["Ready"]["reason"] not in ("Serving", "RollingOut")
            return
        assert conditions["Ready"]["status"] == "True", conditions["Ready"]
        deployment = self.objects["Deployment", "tiny"]
        assert deployment["spec"]["replicas"] == spec["replicas"]
        args = deployment["spec"]["template"]["spec"]["containers"][0].get("args", [])
        for arg in spec["engine"].get("args", []):
            assert arg in args
        templates = self.names("ResourceClaimTemplate")
        assert len(templates) == (spec["gpu"]["sharing"] == "ResourceClaim")
        assert len(self.observe().claims) == ("static" in spec["volume"])

    # its parts

    def names(self, kind: str) -> list[str]:
        return [name for found, name in self.objects if found == kind]

    def gpus(self) -> frozenset[int] | None:
        return frozenset({8})

    def state(self) -> Any:
        return copy.deepcopy((self.objects, self.resource))

    def observe(self) -> Observed:
        wanted = needs(self.resource)

        def owned(kind: str) -> tuple[dict[str, Any], ...]:
            return tuple(
                copy.deepcopy(o)
                for (found, _), o in sorted(self.objects.items())
                if found == kind and o["metadata"].get("ownerReferences")
            )

        def named(kind: str, name: str | None) -> dict[str, Any] | None:
            return copy.deepcopy(self.objects.get((kind, name or "")))

        return Observed(
            claim=named("PersistentVolumeClaim", wanted.claim),
            source_claim=named("PersistentVolumeClaim", wanted.source_claim),
            volume=named("PersistentVolume", wanted.volume),
            jobs=tuple(
                copy.deepcopy(o) for (k, _), o in sorted(self.objects.items()) if k == "Job"
            ),
            deployment=named("Deployment", "tiny"),
            service=named("Service", "tiny"),
            disruption_budget=named("PodDisruptionBudget", "tiny"),
            claims=owned("PersistentVolumeClaim"),
            claim_templates=owned("ResourceClaimTemplate"),
            pods=self.pods(),
            gpus_of_nodes=self.gpus() if wanted.gpus_of_nodes else None,
            dra_served=True if wanted.dra_served else None,
        )

    def pods(self) -> tuple[dict[str, Any], ...]:
        """Serving pods as the Deployment's status counts them."""
        deployment = self.objects.get(("Deployment", "tiny"), {})
        ready = deployment.get("status", {}).get("readyReplicas", 0)
        running = {"running": {"startedAt": "2026-11-24T12:00:00Z"}}
        loader = self.build.container("loader", ready=True, **running)
        engine = self.build.container("engine", ready=True, **running)
        annotations = deployment.get("observed", {}).get("annotations", {})
        return tuple(
            self.build.serving_pod(
                self.resource,
                loader,
                engine,
                name=f"serve-{number}",
                annotations=annotations,
                conditions=(self.build.condition("Ready"),),
            )
            for number in range(ready)
        )

    def plan(self) -> Plan:
        observed = self.observe()
        before = copy.deepcopy((self.resource, observed))
        made = plan(copy.deepcopy(self.resource), observed, self.build.settings, self.now)
        assert (self.resource, observed) == before, "planning changes its input"
        again = plan(copy.deepcopy(self.resource), observed, self.build.settings, self.now)
        assert again == made
        return made

    def changes(self, made: Plan) -> list[Any]:
        """What a plan would still write."""
        found: list[Any] = [*made.delete, *([made.scale] if made.scale else [])]
        for desired in made.apply:
            body = desired.body
            live = self.objects.get((body["kind"], name_of(body)))
            if live is None or not (desired.once or _holds(body, live)):
                found.append(body)
        if made.status is not None and made.status["status"] != self.resource.get("status"):
            found.append(made.status)
        return found

    def write(self, made: Plan, writes: int = 1 << 20) -> None:
        """Write a plan in the operator's order, or only so many of its writes."""
        steps = [lambda d=d: self.remove((d.kind, d.name), d.uid) for d in made.delete]
        steps += [lambda d=d: self.apply(d.body, once=d.once) for d in made.apply]
        if made.scale is not None:
            changed = made.scale.spec
            steps.append(lambda: self.scale(changed))
        if made.status is not None:
            status = made.status["status"]
            steps.append(lambda: self.resource.update(status=copy.deepcopy(status)))
        for step in steps[:writes]:
            step()

    def apply(self, body: Any, *, once: bool) -> None:
        key = (body["kind"], name_of(body))
        live = self.objects.get(key)
        if live is not None and (once or _holds(body, live)):
            return
        made = copy.deepcopy(dict(body))
        known = live or {"metadata": {"uid": next(self.uids), "generation": 0}}
        if body["kind"] == "Deployment":
            self.check_the_template(body, live or {})
        made["metadata"] |= {
            "uid": known["metadata"]["uid"],
            "generation": known["metadata"].get("generation", 0) + 1,
        }
        self.objects[key] = {**made, **{k: known[k] for k in ("status", "observed") if k in known}}

    def check_the_template(self, body: Any, live: Any) -> None:
        """No pod goes for one whose checkpoint is not there."""
        pod, before = body["spec"]["template"], live.get("spec", {}).get("template")
        loader = pod["spec"]["initContainers"][0]["command"]
        path = loader[loader.index("--checkpoint") + 1]
        assert pod == before or (mounted(pod), path) in self.published

    def scale(self, changed: Mapping[str, Any]) -> None:
        deployment = self.objects["Deployment", "tiny"]
        deployment["spec"] = self.build.merged(deployment["spec"], dict(changed))
        deployment["metadata"]["generation"] += 1

    def remove(self, key: tuple[str, str], uid: str | None = None) -> None:
        live = self.objects.get(key)
        if live is not None and uid in (None, uid_of(live)):
            del self.objects[key]

    def control(self) -> None:
        """One round of the controllers: all that can happen does."""
        for (kind, _), body in list(self.objects.items()):
            if is_deleting(body):
                continue
            if kind == "Job" and not body.get("status"):
                body["status"] = {"conditions": [self.build.condition("Complete")]}
                self.run(body["spec"]["template"])
            elif kind == "Deployment":
                self.roll(body)
            elif kind in ("PersistentVolume", "PersistentVolumeClaim"):
                body["status"] = {"phase": "Bound"}

    def run(self, pod: Any) -> None:
        """Publish or delete, as the pod of a Job is told."""
        command = pod["spec"]["containers"][0]["command"]
        if command[1] == "delete":
            self.published -= {(mounted(pod), path) for path in command[2:]}
        else:
            self.published.add((mounted(pod), command[command.index("--output") + 1]))

    def roll(self, deployment: dict[str, Any]) -> None:
        """Bring the pods to the template and the number that are asked for, at once."""
        count = deployment["spec"]["replicas"]
        template = deployment["spec"]["template"]["metadata"]
        deployment["observed"] = {"annotations": dict(template.get("annotations", {}))}
        deployment["status"] = {
            "observedGeneration": deployment["metadata"]["generation"],
            "replicas": count,
            "updatedReplicas": count,
            "readyReplicas": count,
        }


def told(job: Any) -> bool:
    """Whether a Job tells what it deleted; else only loaders would, which are not played here."""
    is_reclaim = job["metadata"].get("labels", {}).get(COMPONENT_LABEL) == RECLAIM
    return is_reclaim and bool(job.get("status"))


def mounted(pod: Any) -> str:
    """Return the claim of a pod template's volume of weights."""
    (volume,) = (v for v in pod["spec"]["volumes"] if v["name"] == "weights")
    return str(volume["persistentVolumeClaim"]["claimName"])


def _holds(desired: Any, live: Any) -> bool:
    if isinstance(desired, dict) and isinstance(live, dict):
        return all(key in live and _holds(value, live[key]) for key, value in desired.items())
    if isinstance(desired, list) and isinstance(live, list):
        return len(desired) == len(live) and all(map(_holds, desired, live))
    return bool(desired == live)


@pytest.mark.parametrize("gpus", [None, frozenset({8})])
def test_every_order_of_events_converges(
    build: SimpleNamespace, gpus: frozenset[int] | None
) -> None:
    machine = type("Machine", (Cluster,), {"build": build, "gpus": lambda _: gpus})
    budget = settings(max_examples=10, stateful_step_count=12, deadline=None)
    run_state_machine_as_test(machine, settings=budget)  # type: ignore[no-untyped-call]


def test_operators_that_die_leave_no_jobs_of_earlier_specs_behind(build: SimpleNamespace) -> None:
    """Each of them lives for the deletion, or for the next Job, and the spec changes again."""
    cluster = type("Machine", (Cluster,), {"build": build})()
    cluster.begin()
    cluster.leave_alone()
    for number in range(5):
        cluster.change({"model": {"revision": f"r{number}"}})
        for _ in range(2):
            cluster.reconcile_and_die(writes=1)
            cluster.names_and_owners_are_right()
    cluster.leave_alone()
