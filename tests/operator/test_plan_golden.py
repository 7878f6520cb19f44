"""The rendered children, compared with files that were read by a human.

A change of a pod template without a new serving_pod.VERSION would roll every pod of every
user at an upgrade of the operator, so the version is part of the files' names. Files of
earlier versions stay, for what they hold must not be rolled. Set
HEADRACE_UPDATE_GOLDEN=1 to write them again.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from headrace_operator.plan import Observed, Scale
from headrace_operator.plan.serving_pod import VERSION

GOLDEN = Path(__file__).parent / "golden"
EVERYTHING: dict[str, Any] = {
    "replicas": 2,
    "model": {
        "source": "pvc://models/meta/Llama 3.1_70B",
        "revision": "v2",
        "dtype": "bfloat16",
    },
    "parallelism": {"tensorParallelSize": 4},
    "volume": {
        "existingClaim": None,
        "static": {
            "fileSystemId": "fs-0123456789abcdef0",
            "dnsName": "fs-0123456789abcdef0.fsx.eu-west-1.amazonaws.com",
            "mountName": "abcdefgh",
            "capacityGiB": 4800,
        },
        "root": "team/headrace",
    },
    "loading": {
        "path": "Require",
        "gate": "Overlap",
        "resources": {"limits": {"memory": "8Gi"}},
    },
    "gpu": {"sharing": "ResourceClaim", "deviceClassName": "h200.example.com"},
    "engine": {
        "image": "vllm/vllm-openai:v0.32.0",
        "args": ["--max-model-len", "8192"],
        "env": [
            {"name": "HF_HUB_OFFLINE", "value": "0"},
            {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
        ],
        "port": 9000,
        "resources": {"requests": {"cpu": 8, "memory": "64Gi"}},
    },
    "sharding": {
        "resources": {"limits": {"memory": "16Gi"}},
        "nodeSelector": {"pool": "cpu"},
        "tolerations": [{"key": "cpu", "operator": "Exists"}],
    },
    "pod": {
        "labels": {"team": "ml"},
        "annotations": {"example.com/note": "x"},
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "DoNotSchedule",
            }
        ],
        "serviceAccountName": "models",
        "priorityClassName": "high",
        "schedulerName": "volcano",
        "runtimeClassName": "nvidia",
        "imagePullSecrets": [{"name": "registry"}],
        "imagePullPolicy": "Always",
        "runAsUser": 2000,
        "fsGroup": 3000,
        "terminationGracePeriodSeconds": 120,
    },
}
CASES: dict[str, dict[str, Any]] = {
    "host": {},
    "claim": EVERYTHING,
    "node": {
        "loading": {"path": "Prefer"},
        "gpu": {"sharing": "WholeNode"},
        "parallelism": {"tensorParallelSize": 8},
    },
    "nodes": {
        "replicas": 2,
        "loading": {"path": "Prefer"},
        "gpu": {"sharing": "ResourceClaim", "preset": "P6e-GB200"},
        "parallelism": {"tensorParallelSize": 8, "nodes": 2},
        "rollout": {"canary": {"percentage": 50}},
    },
}


def _earlier() -> list[tuple[int, str]]:
    """Versions and cases of the golden files that are kept of earlier templates."""
    names = (path.stem.split("-") for path in sorted(GOLDEN.glob("template-v*-*.yaml")))
    found = [(int(version.removeprefix("v")), case) for _, version, case in names]
    return [(version, case) for version, case in found if version < VERSION]


@pytest.mark.parametrize(("version", "case"), _earlier())
def test_deployments_of_earlier_templates_keep_their_templates(
    version: int, case: str, build: SimpleNamespace
) -> None:
    """What an earlier operator has applied, as its golden file has it, is not rolled."""
    resource = build.resource(CASES[case])
    text = (GOLDEN / f"template-v{version}-{case}.yaml").read_text()
    bodies = {body["kind"]: body for body in yaml.safe_load_all(text)}
    live = bodies["Deployment"]
    live["metadata"] |= {"uid": "uid-deployment", "generation": 1}
    name = "tiny-weights" if case == "claim" else "weights"
    observed = Observed(
        claim=build.claim(name), jobs=(build.done(resource),), deployment=live, dra_served=True
    )
    result = build.plan(resource, observed)
    assert "Deployment" not in [desired.body["kind"] for desired in result.apply]
    assert result.scale is None
    more = build.plan(build.merged(resource, {"spec": {"replicas": 9}}), observed)
    assert more.scale == Scale("Deployment", "tiny", {"replicas": 9})
    changed = build.merged(resource, {"spec": {"engine": {"args": ["--seed", "1"]}}})
    kinds = [desired.body["kind"] for desired in build.plan(changed, observed).apply]
    assert "Deployment" in kinds


@pytest.mark.parametrize("case", CASES)
def test_the_children_are_those_of_the_golden_file(case: str, build: SimpleNamespace) -> None:
    resource = build.resource(CASES[case])
    name = "tiny-weights" if case == "claim" else "weights"
    source = build.claim("models")
    sharding = Observed(claim=build.claim(name), source_claim=source)
    serving = Observed(claim=build.claim(name), jobs=(build.done(resource),))
    bodies = [
        *(desired.body for desired in build.plan(resource, sharding).apply),
        *(desired.body for desired in build.plan(resource, serving).apply),
    ]
    unique = {(body["kind"], body["metadata"]["name"]): body for body in bodies}
    text = "---\n".join(yaml.safe_dump(dict(body), width=100) for body in unique.values())
    path = GOLDEN / f"template-v{VERSION}-{case}.yaml"
    if os.environ.get("HEADRACE_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), "a new template needs a new serving_pod.VERSION"
