"""Thousands of hostile specs against plan(): a condition or valid children, never a traceback.

What the CRD would refuse is planned for as well, since an older CRD may have let it in.
cluster/test_hostile.py puts a sample to a real API server.
"""

import json
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest

from faults.fuzz import plausible, specs
from headrace_operator.api.status import ConditionType
from headrace_operator.plan import Observed, needs

COUNT = 5000


def test_every_spec_gets_a_condition_and_children_that_can_be_sent(
    build: SimpleNamespace,
) -> None:
    planned = 0
    for spec in specs(COUNT // 2) + plausible(build.resource()["spec"], COUNT // 2):
        resource = {**build.resource(), "spec": spec}
        needs(resource)
        try:
            world = build.world(resource)
        except ValueError:
            world = Observed(claim=build.claim(), source_claim=build.claim())
        begun = time.process_time()
        result = build.plan(resource, world)
        assert time.process_time() - begun < 2, "a spec must not be expensive"
        assert result.status is not None
        conditions = {c["type"]: c for c in result.status["status"]["conditions"]}
        assert len(conditions) == len(ConditionType)
        for condition in conditions.values():
            assert re.fullmatch("[A-Z][A-Za-z0-9]*", condition["reason"])
            assert len(condition["message"]) <= 1300
            assert not re.search("[\\x00-\\x1f\\x7f-\\x9f]", condition["message"])
        json.dumps(result.status)
        planned += bool(result.apply)
        # a hot loop would be a plan that asks to be looked at again at once
        assert result.requeue_seconds is None or result.requeue_seconds >= 5
        for desired in result.apply:
            body = json.loads(json.dumps(desired.body))
            assert body["metadata"].get("namespace") in ("ns", None)
            check_child(body)
    assert planned > COUNT / 50


def check_child(body: dict[str, Any]) -> None:
    """Whatever the user says, a child keeps its owner, its labels and the security we set."""
    labels = body["metadata"]["labels"]
    assert labels["headrace.dev/model-deployment"] == "tiny"
    template = body["spec"].get("template")
    if body["kind"] not in ("Job", "Deployment") or not template:
        return
    pod = template["spec"]
    assert template["metadata"]["labels"]["headrace.dev/model-deployment"] == "tiny"
    assert pod["automountServiceAccountToken"] is False
    for volume in pod.get("volumes", []):
        assert "hostPath" not in volume or body["kind"] == "Deployment", volume
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        assert not pod.get(name)
    for container in pod.get("initContainers", []) + pod["containers"]:
        security = container.get("securityContext", {})
        assert not security.get("privileged")
        assert security.get("allowPrivilegeEscalation") is False, (body["kind"], container["name"])
        command = container.get("command") or []
        assert not {"sh", "bash", "/bin/sh", "-c"} & set(map(str, command[:2])) or (
            container["name"] == "engine"
        )


@pytest.mark.parametrize("length", [1, 40, 63])
def test_names_are_labels_at_every_length_and_never_collide(
    build: SimpleNamespace, length: int
) -> None:
    """Children of owners whose long names differ only at the end have names of their own."""
    names = []
    for last in "ab":
        resource = build.resource({"gpu": {"sharing": "ResourceClaim"}})
        resource["metadata"]["name"] = "m" * (length - 1) + last
        result = build.plan(resource, Observed(claim=build.claim(), source_claim=build.claim()))
        names += [(d.body["kind"], d.body["metadata"]["name"]) for d in result.apply]
    assert names
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name) for _, name in names)


def test_an_owner_named_like_a_child_of_another_cannot_take_it_over(
    build: SimpleNamespace,
) -> None:
    """`x` and `x-weights` meet in the name of a claim; its UID decides, so neither takes over."""
    world = Observed(claim=build.claim(), source_claim=build.claim())
    one, other = build.resource(), build.resource()
    other["metadata"] |= {"name": "tiny-shard", "uid": "uid-other"}
    for resource in (one, other):
        for desired in build.plan(resource, world).apply:
            (owner,) = desired.body["metadata"]["ownerReferences"]
            assert owner["uid"] == resource["metadata"]["uid"]
            assert owner["controller"] is True
