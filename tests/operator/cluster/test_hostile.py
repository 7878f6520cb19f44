"""Hostile specs on a real API server: refused with the field, or let in and told as a condition."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from faults.fuzz import plausible, specs
from headrace_operator.cluster.kinds import DEPLOYMENT, JOB, MODEL_DEPLOYMENT
from headrace_operator.plan import Observed, Settings, plan

pytestmark = pytest.mark.cluster
SAMPLE = 200
THREADS = 4


def answer(kube: Any, kind: Any, body: Any) -> tuple[int, Any]:
    """Return the status of a dry run, and the object that would be made."""
    try:
        return 201, kube.create(kind, body, dry_run=True)
    except Exception as error:  # noqa: BLE001 - RefusedError, which is the conftest's own
        return getattr(error, "status", 0), None


def test_what_the_crd_lets_in_the_operator_can_read(kube: Any, world: Any, build: Any) -> None:
    """Nothing is answered with a server error, and what is let in is never SpecInvalid."""
    good = world.manifest()["spec"]
    manifests = [
        {**world.manifest(), "spec": spec} for spec in specs(SAMPLE // 4) + plausible(good, SAMPLE)
    ]

    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(lambda m: answer(kube, MODEL_DEPLOYMENT, m), manifests))
    assert {status for status, _ in answers} <= {201, 400, 413, 422}
    let_in = [resource for status, resource in answers if status == 201]
    assert 10 < len(let_in) < len(manifests) / 2
    refused = 0
    for resource in let_in:
        observed = Observed(claim=build.claim(), source_claim=build.claim())
        made = plan(resource, observed, Settings("loader:1"), build.now)
        conditions = {c["type"]: c for c in made.status["status"]["conditions"]}
        assert conditions["Ready"]["reason"] != "SpecInvalid", conditions["Ready"]["message"]
        for desired in made.apply:
            body = dict(desired.body)
            if body["kind"] != "Job":
                continue
            body["metadata"] = {**body["metadata"], "namespace": world.namespace}
            # Passed-through parts are checked here; the operator tells as JobInvalid.
            status, _ = answer(kube, JOB, body)
            assert status in (201, 400, 422)
            refused += status != 201
    assert refused < len(let_in)


@pytest.mark.parametrize(
    "part",
    [
        {"pod": {"hostNetwork": True}},
        {"pod": {"volumes": [{"name": "x", "hostPath": {"path": "/"}}]}},
        {"pod": {"securityContext": {"runAsUser": 0}}},
        {"pod": {"runAsUser": 0}},
        {"engine": {"image": "x", "securityContext": {"privileged": True}}},
        {"engine": {"image": "x", "volumeMounts": [{"name": "x", "mountPath": "/x"}]}},
        {"sharding": {"securityContext": {"privileged": True}}},
        {"pod": {"labels": {"headrace.dev/model-deployment": "other"}}},
        {"pod": {"labels": {"app.kubernetes.io/component": "shard"}}},
    ],
)
def test_a_tenant_has_no_field_for_the_node_or_for_labels_of_ours(world: Any, part: Any) -> None:
    with pytest.raises(Exception, match="spec") as refused:
        world.create(**part)
    assert getattr(refused.value, "status", 0) in (400, 422)


def test_a_secret_of_another_namespace_cannot_be_named(
    operator: Any, world: Any, kubelet: Any, eventually: Any
) -> None:
    """Kubernetes has no field for it; one made up is refused with the child, not dropped."""
    reference = {"name": "root", "key": "password", "namespace": "kube-system"}
    env = [{"name": "STOLEN", "valueFrom": {"secretKeyRef": reference}}]
    world.add_claims("weights")
    world.create(engine={"image": "vllm:cpu", "env": env})
    (pod,) = world.wait_pods("shard")
    kubelet.publish(pod)
    condition = world.wait_condition("WeightsResident", "False", "DeploymentInvalid")
    assert "namespace" in condition["message"]
    assert world.deployment() is None
    before = _reconciles(operator)
    assert eventually(lambda: _reconciles(operator) >= before, "metrics")
    # What is refused for good is tried again at resyncs, not in a loop.
    assert _reconciles(operator) - before <= 2


def test_the_operator_may_read_no_secret(cluster: Any, kube: Any) -> None:
    account = "--as=system:serviceaccount:headrace-system:headrace"
    for verb in ("get", "list", "watch"):
        answer = cluster.kubectl("auth", "can-i", verb, "secrets", "-A", account, check=False)
        assert answer.strip() == "no", verb


def test_names_of_63_characters_live_and_longer_ones_are_refused(world: Any, kube: Any) -> None:
    world.kube.create(MODEL_DEPLOYMENT, world.manifest("m" * 63), dry_run=True)
    for name in ("m" * 64, "Großes", "a.b", "-a", "a" * 254):
        with pytest.raises(Exception, match="name") as refused:
            world.kube.create(MODEL_DEPLOYMENT, world.manifest(name), dry_run=True)
        assert getattr(refused.value, "status", 0) in (400, 422)


def test_huge_specs_are_refused_or_carried(world: Any) -> None:
    big = {"image": "x", "env": [{"name": f"E{n}", "value": "x" * 4000} for n in range(200)]}
    world.kube.create(MODEL_DEPLOYMENT, world.manifest(engine=big), dry_run=True)
    too_big = world.manifest(engine={"image": "x", "args": ["x" * 3_000_000]})
    assert answer(world.kube, MODEL_DEPLOYMENT, too_big)[0] in (400, 413, 422)
    assert world.kube.list(DEPLOYMENT, world.namespace) == []


def _reconciles(operator: Any) -> int:
    status, text = operator.text(operator.metrics_port, "/metrics")
    assert status == 200
    name = "headrace_operator_reconcile_duration_seconds_count"
    return int(float(next(line for line in text.splitlines() if line.startswith(name)).split()[-1]))
