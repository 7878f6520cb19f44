"""Hostile specs: of the schema's shape, with anything anywhere."""

import copy
import random
from typing import Any

from headrace_operator.api.crd import definition

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
        plain: list[Any] = [None, True, -1, 2**70, 1.5, [], {}, self.word(), [[]], {"": {}}]
        return self.random.choice([*plain, *HOSTILE])


def specs(count: int, seed: int = SEED) -> list[Any]:
    fuzzer, shape = Fuzzer(seed), schema()
    return [fuzzer.object(shape, 0) for _ in range(count)]


def plausible(good: dict[str, Any], count: int, seed: int = SEED + 1) -> list[Any]:
    """Return copies of a good spec in which a part or two is hostile.

    Those get past the first rule.
    """
    fuzzer, shape, made = Fuzzer(seed), schema(), []
    for _ in range(count):
        spec = copy.deepcopy(good)
        for _ in range(fuzzer.random.choice([1, 2])):
            name = fuzzer.random.choice(list(shape["properties"]))
            value = fuzzer.value(shape["properties"][name], 1)
            both = isinstance(value, dict) and isinstance(spec.get(name), dict)
            spec[name] = {**spec[name], **value} if both else value
        made.append(spec)
    return made
