"""Thousands of hostile specs against plan(): a condition or valid children, never a traceback.

`GENERATED` are specs of the schema's shape with hostile values anywhere; what the CRD would
refuse is planned for as well, since an older CRD may have let it in. The cluster's tests put
a sample of the same ones to a real API server.
"""

import json
import random
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest

from headrace_operator.api.crd import definition
from headrace_operator.plan import Observed, needs

COUNT = 5000
SEED = 6
WORDS = [
    *("", " ", "\0", "\n", "a\nb", "$(rm -rf /)", "`id`", "; reboot", "&& x", "| y", "'", '"'),
    *("../../etc/passwd", "/etc/shadow", "..", "%2e%2e", "{{ .Values }}", "${HOME}", "--help"),
    *("-" * 63, "a" * 63, "a" * 64, "a" * 253, "a" * 254, "ä", "名前", "\u202e", "🜁", "\ufeff"),
    *("pvc://a/b", "pvc://a/../b", "pvc://-/x", "s3://b/k", "hf://a/b", "file:///etc", "pvc://"),
    *("kube-system", "default", "headrace.dev/model-deployment", "app.kubernetes.io/component"),
]
HOSTILE = [
    {"hostPath": {"path": "/"}},
    {"privileged": True, "runAsUser": 0},
    {"secretKeyRef": {"name": "other", "key": "k", "namespace": "kube-system"}},
    [{"name": "x", "hostPath": {"path": "/"}}],
]


def schema() -> dict[str, Any]:
    """The CRD's schema of spec."""
    versions = definition()["spec"]["versions"]
    found: dict[str, Any] = versions[0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return found


class Fuzzer:
    """Random values of a schema's shape; one in eight breaks it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def value(self, schema: dict[str, Any], depth: int = 0) -> Any:
        if self.random.random() < 0.08:
            return self.junk()
        kind = schema.get("type")
        if "enum" in schema and self.random.random() < 0.8:
            return self.random.choice(schema["enum"])
        if kind == "object" and "properties" in schema:
            return self.object(schema, depth)
        if kind == "object":
            keys = (self.word() for _ in range(self.random.randrange(4)))
            inner = schema.get("additionalProperties") or {}
            return {k: self.value(inner, depth + 1) if inner else self.junk() for k in keys}
        if kind == "array":
            count = self.random.choice([0, 1, 2, 3, 300 if depth < 3 else 3])
            return [self.value(schema.get("items", {}), depth + 1) for _ in range(min(count, 40))]
        if kind == "integer":
            return self.random.choice([0, 1, -1, 2, 8, 2**31 - 1, 2**31, 2**63 - 1, 1e300])
        if kind == "boolean":
            return self.random.random() < 0.5
        return self.word()

    def object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        required = schema.get("required", [])
        return {
            name: self.value(inner, depth + 1)
            for name, inner in schema["properties"].items()
            if name in required or self.random.random() < 0.4
        }

    def word(self) -> str:
        word = self.random.choice(WORDS)
        return word * 20000 if word and self.random.random() < 0.002 else word

    def junk(self) -> Any:
        plain = [None, True, -1, 2**70, 1.5, [], {}, self.word(), [[]], {"": {}}]
        return self.random.choice([*plain, *HOSTILE])


def specs(count: int, seed: int = SEED) -> list[Any]:
    fuzzer, shape = Fuzzer(seed), schema()
    return [fuzzer.object(shape, 0) for _ in range(count)]


def plausible(build: SimpleNamespace, count: int) -> list[Any]:
    """A good spec in which a part or two is hostile: those get past the first rule."""
    fuzzer, shape = Fuzzer(SEED + 1), schema()
    made = []
    for _ in range(count):
        spec = build.resource()["spec"]
        for _ in range(fuzzer.random.choice([1, 2])):
            name = fuzzer.random.choice(list(shape["properties"]))
            value = fuzzer.value(shape["properties"][name], 1)
            both = isinstance(value, dict) and isinstance(spec.get(name), dict)
            spec[name] = {**spec[name], **value} if both else value
        made.append(spec)
    return made


@pytest.fixture(scope="module")
def all_specs(request: pytest.FixtureRequest) -> Any:
    """All the specs; the plausible ones need the builders of one test."""

    def make(build: SimpleNamespace) -> list[Any]:
        return specs(COUNT // 2) + plausible(build, COUNT // 2)

    return make


def test_every_spec_gets_a_condition_and_children_that_can_be_sent(
    build: SimpleNamespace, all_specs: Any
) -> None:
    planned = 0
    for spec in all_specs(build):
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
        assert len(conditions) == 6
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
