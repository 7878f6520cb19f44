"""What the API server refuses: unknown fields and every CEL rule, with field, value and fix."""

from typing import Any

import pytest

pytestmark = pytest.mark.cluster

STATIC = {
    "fileSystemId": "fs-01234567",
    "dnsName": "fs-01234567.fsx.eu-central-1.amazonaws.com",
    "capacityGiB": 1200,
}
DYNAMIC = {"storageClassName": "fsx", "capacityGiB": 1200}
CLAIM = {"existingClaim": {"name": "weights"}}
ENGINE = {"image": "vllm:cpu"}

# (changed part of the spec, the field that is blamed, what the message must say)
RULES: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"model": {"source": "gs://b/p"}}, "spec.model.source", ["gs://b/p", "pvc://<claim>/<path>"]),
    ({"model": {"source": "s3://bucket"}}, "spec.model.source", ["s3://<bucket>/<prefix>"]),
    ({"model": {"source": "s3://Bucket/p"}}, "spec.model.source", ["must name a bucket"]),
    ({"model": {"source": "hf://name"}}, "spec.model.source", ["hf://<owner>/<name>"]),
    ({"model": {"source": "hf://a/b/c"}}, "spec.model.source", ["must name a repository"]),
    (
        {"sharding": {"env": [{"name": "HF_TOKEN", "value": "hf_x"}]}},
        "spec.sharding.env[0]",
        ['"HF_TOKEN"', "secretKeyRef"],
    ),
    (
        {"sharding": {"env": [{"name": "HEADRACE_X", "value": "1"}]}},
        "spec.sharding.env[0].name",
        ["HEADRACE_X", "another name"],
    ),
    (
        {"engine": {**ENGINE, "maxModelLen": 4096, "args": ["--max-model-len=512"]}},
        "spec.engine.args",
        ["--max-model-len", "spec.engine.maxModelLen", "remove one"],
    ),
    (
        {"engine": {**ENGINE, "maxNumSeqs": 8, "args": ["--max_num_seqs", "16"]}},
        "spec.engine.args",
        ["--max-num-seqs", "spec.engine.maxNumSeqs", "remove one"],
    ),
    (
        {"engine": {**ENGINE, "kvCacheDtype": "fp8", "args": ["--kv-cache-dtype=auto"]}},
        "spec.engine.args",
        ["--kv-cache-dtype", "spec.engine.kvCacheDtype", "remove one"],
    ),
    (
        {"engine": {"image": "vllm/vllm-openai:v0.19.1", "kvCacheDtype": "turboquant_k8v4"}},
        "spec.engine.kvCacheDtype",
        ["turboquant_k8v4", "vLLM 0.20", "newer spec.engine.image"],
    ),
    (
        {"engine": {"image": "r.io/vllm:0.24.0-cu13", "kvCacheDtype": "int4_per_token_head"}},
        "spec.engine.kvCacheDtype",
        ["int4_per_token_head", "vLLM 0.25"],
    ),
    ({"engine": {**ENGINE, "kvCacheDtype": "int2"}}, "spec.engine.kvCacheDtype", ['"int2"']),
    ({"engine": {**ENGINE, "maxModelLen": 0}}, "spec.engine.maxModelLen", ["1"]),
    ({"model": {"source": "pvc://claim"}}, "spec.model.source", ["must name a claim"]),
    ({"model": {"source": "pvc://Claim/x"}}, "spec.model.source", ["must name a claim"]),
    ({"model": {"source": "pvc://claim//x"}}, "spec.model.source", ["must name a claim"]),
    ({"model": {"source": "pvc://c/a/../b"}}, "spec.model.source", ['"." or ".."']),
    (
        {"model": {"source": "pvc://c/x", "revision": "a b"}},
        "spec.model.revision",
        ['"a b"', "use letters"],
    ),
    (
        {"model": {"source": "pvc://c/x", "dtype": "int8"}},
        "spec.model.dtype",
        ['"int8"', '"bfloat16"'],
    ),
    (
        {"model": {"source": "pvc://c/x", "quantization": "int3"}},
        "spec.model.quantization",
        ['"fp8"', '"none"'],
    ),
    ({"parallelism": {"tensorParallelSize": 0}}, "spec.parallelism.tensorParallelSize", ["1"]),
    ({"parallelism": {"tensorParallelSize": 65}}, "spec.parallelism.tensorParallelSize", ["64"]),
    (
        {"parallelism": {"pipelineParallelSize": 2}},
        "spec.parallelism.pipelineParallelSize",
        ["Invalid value: 2", "must be 1 in this version", "tensorParallelSize"],
    ),
    (
        {"parallelism": {"expertParallelSize": 2}},
        "spec.parallelism.expertParallelSize",
        ["Invalid value: 2", "must be 1 in this version", "tensorParallelSize"],
    ),
    ({"volume": {}}, "spec.volume", ['"none"', "exactly one of"]),
    ({"volume": {**CLAIM, "static": STATIC}}, "spec.volume", ['"several"', "keep one"]),
    ({"volume": {**CLAIM, "dynamic": DYNAMIC}}, "spec.volume", ['"several"', "keep one"]),
    (
        {"volume": {"existingClaim": {"name": "A_b"}}},
        "spec.volume.existingClaim.name",
        ['"A_b"', "lower case"],
    ),
    ({"volume": {**CLAIM, "root": "/x"}}, "spec.volume.root", ['"/x"', "relative directory"]),
    ({"volume": {**CLAIM, "root": "a/../b"}}, "spec.volume.root", ["relative directory"]),
    ({"volume": {**CLAIM, "root": ""}}, "spec.volume.root", ["relative directory"]),
    (
        {"volume": {"static": {**STATIC, "fileSystemId": "vol-1"}}},
        "spec.volume.static.fileSystemId",
        ['"vol-1"', "fs-"],
    ),
    (
        {"volume": {"static": {**STATIC, "dnsName": "a b"}}},
        "spec.volume.static.dnsName",
        ['"a b"', "lower case"],
    ),
    (
        {"volume": {"static": {**STATIC, "mountName": "a/b"}}},
        "spec.volume.static.mountName",
        ['"a/b"', "mount name"],
    ),
    (
        {"volume": {"static": {**STATIC, "mountOptions": ["flock", "a,b"]}}},
        "spec.volume.static.mountOptions",
        ['"a,b"', "one option per item"],
    ),
    ({"volume": {"dynamic": {**DYNAMIC, "capacityGiB": 0}}}, "spec.volume.dynamic", ["1"]),
    (
        {"volume": {"dynamic": {**DYNAMIC, "storageClassName": "a b"}}},
        "spec.volume.dynamic.storageClassName",
        ['"a b"'],
    ),
    ({"loading": {"path": "Maybe"}}, "spec.loading.path", ['"Maybe"', '"Require"']),
    ({"loading": {"path": "Off", "gate": "Open"}}, "spec.loading.gate", ['"Open"', '"Overlap"']),
    ({"loading": {"path": "Require"}}, "spec.loading.path", ['"Require"', "set it to Off"]),
    ({"gpu": {"sharing": "Half"}}, "spec.gpu.sharing", ['"Half"', '"WholeNode"']),
    (
        {"gpu": {"sharing": "None", "deviceClassName": "A"}},
        "spec.gpu.deviceClassName",
        ['"A"', "lower case"],
    ),
    ({"engine": {"image": ""}}, "spec.engine.image", ["must be an image reference"]),
    ({"engine": {"image": "a b"}}, "spec.engine.image", ['"a b"', "name:tag"]),
    ({"engine": {**ENGINE, "port": 9400}}, "spec.engine.port", ["9400", "another port"]),
    ({"engine": {**ENGINE, "port": 0}}, "spec.engine.port", ["1"]),
    ({"engine": {**ENGINE, "command": []}}, "spec.engine.command", ["at least 1"]),
    (
        {"engine": {**ENGINE, "env": [{"name": "PYTHONPATH", "value": "/x"}]}},
        "spec.engine.env[0].name",
        ['"PYTHONPATH"', "choose another name"],
    ),
    (
        {"engine": {**ENGINE, "env": [{"name": "HEADRACE_SOCKET", "value": "/x"}]}},
        "spec.engine.env[0].name",
        ['"HEADRACE_SOCKET"'],
    ),
    (
        {"engine": {**ENGINE, "env": [{"name": "A", "value": "1", "valueFrom": {"x": 1}}]}},
        "spec.engine.env[0]",
        ['"A"', "remove one"],
    ),
    (
        {"engine": {**ENGINE, "env": [{"name": "A"}, {"name": "A"}]}},
        "spec.engine.env[1]",
        ["Duplicate value"],
    ),
    (
        {"engine": {**ENGINE, "resources": {"limits": {"nvidia.com/gpu": 1}}}},
        "spec.engine.resources",
        ["nvidia.com/gpu", "spec.gpu.sharing"],
    ),
    (
        {"sharding": {"resources": {"requests": {"nvidia.com/gpu": 1}}}},
        "spec.sharding.resources",
        ["nvidia.com/gpu"],
    ),
    (
        {"loading": {"path": "Off", "resources": {"limits": {"nvidia.com/gpu": "1"}}}},
        "spec.loading.resources",
        ["nvidia.com/gpu"],
    ),
    (
        {"engine": {**ENGINE, "resources": {"limits": {"cpu": "1"}, "requests": {"cpu": "1500m"}}}},
        "spec.engine.resources.requests",
        ['"cpu"', "at most the limit"],
    ),
    (
        {"engine": {**ENGINE, "resources": {"limits": {"memory": "lots"}}}},
        "spec.engine.resources.limits.memory",
        ['"lots"'],
    ),
    (
        {"pod": {"labels": {"headrace.dev/x": "y"}}},
        "spec.pod.labels",
        ['"headrace.dev/x"', "the operator owns"],
    ),
    (
        {"pod": {"labels": {"app.kubernetes.io/component": "y"}}},
        "spec.pod.labels",
        ['"app.kubernetes.io/component"', "the operator owns"],
    ),
    *(
        (
            {"pod": {"labels": {label: "y"}}},
            "spec.pod.labels",
            [f'"{label}"', "controllers find pods"],
        )
        for label in ("pod-template-hash", "batch.kubernetes.io/job-name", "job-name")
    ),
    (
        {"pod": {"annotations": {"container.apparmor.security.beta.kubernetes.io/engine": "x"}}},
        "spec.pod.annotations",
        ["confinement"],
    ),
    (
        {"parallelism": {"tensorParallelSize": 8, "nodes": 3}},
        "spec.parallelism.nodes",
        ["must divide tensorParallelSize"],
    ),
    (
        {"rollout": {"maxUnavailable": "0%"}},
        "spec.rollout",
        ["must not both be 0", "set one of them"],
    ),
    ({"rollout": {"maxUnavailable": -1}}, "spec.rollout.maxUnavailable", ["number of replicas"]),
    ({"rollout": {"maxSurge": "101%"}}, "spec.rollout.maxSurge", ['"101%"']),
    ({"rollout": {"canary": {"percentage": 100}}}, "spec.rollout.canary.percentage", ["99"]),
    ({"disruptionBudget": {"maxUnavailable": "x"}}, "spec.disruptionBudget", ['"x"']),
    ({"gpu": {"sharing": "None", "preset": "P5"}}, "spec.gpu.preset", ['"P5"', '"P5en"']),
    ({"pod": {"labels": {"a b": "y"}}}, "spec.pod.labels", ['"a b"', "label key"]),
    ({"pod": {"labels": {"a": "b c"}}}, "spec.pod.labels", ['"a"', "label value"]),
    (
        {"pod": {"annotations": {"headrace.dev/checkpoint-key": "y"}}},
        "spec.pod.annotations",
        ['"headrace.dev/checkpoint-key"'],
    ),
    ({"pod": {"serviceAccountName": "A"}}, "spec.pod.serviceAccountName", ['"A"']),
    ({"pod": {"priorityClassName": "A"}}, "spec.pod.priorityClassName", ['"A"']),
    ({"pod": {"schedulerName": "A"}}, "spec.pod.schedulerName", ['"A"']),
    ({"pod": {"runtimeClassName": "A"}}, "spec.pod.runtimeClassName", ['"A"']),
    ({"pod": {"runAsUser": 0}}, "spec.pod.runAsUser", ["1"]),
    ({"pod": {"imagePullPolicy": "Maybe"}}, "spec.pod.imagePullPolicy", ['"Maybe"', '"Never"']),
    ({"replicas": -1}, "spec.replicas", ["0"]),
    ({"replicas": "two"}, "spec.replicas", ["integer"]),
]
ARGUMENTS = [
    (["--model", "x"], "--model", "spec.model.source"),
    (["--model=x"], "--model=x", "spec.model.source"),
    (["--load-format", "auto"], "--load-format", "the loader"),
    (["--load_format=auto"], "--load_format=auto", "the loader"),
    (["--dtype=half"], "--dtype=half", "spec.model.dtype"),
    (["-tp", "2"], "-tp", "spec.parallelism.tensorParallelSize"),
    (["--x", "--tensor-parallel-size=2"], "--tensor-parallel-size=2", "tensorParallelSize"),
    (["-pp=2"], "-pp=2", "spec.parallelism.pipelineParallelSize"),
    (["--data-parallel-size", "2"], "--data-parallel-size", "spec.replicas"),
    (["--host", "::"], "--host", "all addresses"),
    (["--nnodes=2"], "--nnodes=2", "spec.parallelism.nodes"),
    (["-r", "1"], "-r", "spec.parallelism.nodes"),
    (["--master-addr", "x"], "--master-addr", "spec.parallelism.nodes"),
    (["--headless"], "--headless", "spec.parallelism.nodes"),
    (["--port\n=1"], None, None),
    (["--port=1"], "--port=1", "spec.engine.port"),
    (["--model-impl", "auto", "--portal", "--dtypes", "-tpx"], None, None),
]


@pytest.mark.parametrize(("spec", "field", "fragments"), RULES, ids=lambda v: str(v)[:60])
def test_a_broken_rule_is_named(world: Any, spec: Any, field: str, fragments: list[str]) -> None:
    with pytest.raises(Exception, match="is invalid") as refused:
        world.kube.create(_kind(), world.manifest(**spec), dry_run=True)
    message = str(refused.value)
    assert field in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(("args", "value", "fix"), ARGUMENTS, ids=lambda v: str(v)[:40])
def test_arguments_that_the_operator_sets_are_refused(
    world: Any, args: list[str], value: str | None, fix: str | None
) -> None:
    manifest = world.manifest(engine={**ENGINE, "args": args})
    if value is None or fix is None:
        world.kube.create(_kind(), manifest, dry_run=True)
        return
    with pytest.raises(Exception, match="the operator sets this argument") as refused:
        world.kube.create(_kind(), manifest, dry_run=True)
    message = str(refused.value)
    assert f'spec.engine.args: "{value}"' in message
    assert fix in message


@pytest.mark.parametrize("name", ["1tiny", "tiny.x", "a" * 64])
def test_a_name_that_the_service_cannot_have_is_refused(world: Any, name: str) -> None:
    with pytest.raises(Exception, match="must be a DNS label") as refused:
        world.kube.create(_kind(), world.manifest(name), dry_run=True)
    assert f'metadata.name: "{name}"' in str(refused.value)


def test_a_replica_cannot_spread_over_more_nodes_later(world: Any) -> None:
    world.create(parallelism={"tensorParallelSize": 4, "nodes": 4})
    world.change({"spec": {"parallelism": {"nodes": 2}}})
    with pytest.raises(Exception, match="create a new ModelDeployment") as refused:
        world.change({"spec": {"parallelism": {"nodes": 1}}})
    assert "spec.parallelism.nodes" in str(refused.value)


def test_a_static_volume_cannot_become_another_one(world: Any) -> None:
    world.create(volume={"static": STATIC})
    with pytest.raises(Exception, match="create a new ModelDeployment") as refused:
        world.change({"spec": {"volume": {"static": {"fileSystemId": "fs-76543210"}}}})
    assert 'spec.volume.static: "fs-76543210"' in str(refused.value)
    world.change({"spec": {"volume": {"static": None, "existingClaim": {"name": "weights"}}}})


@pytest.mark.parametrize(
    ("manifest", "field"),
    [
        ({"spec": {"engin": {}}}, "spec.engin"),
        ({"spec": {"engine": {"image": "x", "arg": []}}}, "spec.engine.arg"),
        ({"spec": {"engine": {"image": "x", "resources": {"limit": {}}}}}, "resources.limit"),
        ({"spec": {"pod": {"hostNetwork": True}}}, "spec.pod.hostNetwork"),
        ({"spec": {"pod": {"volumes": [{"hostPath": {"path": "/"}}]}}}, "spec.pod.volumes"),
        ({"spec": {"pod": {"securityContext": {"runAsUser": 0}}}}, "spec.pod.securityContext"),
        ({"spec": {"engine": {"image": "x", "securityContext": {}}}}, "engine.securityContext"),
    ],
)
def test_kubectl_refuses_an_unknown_field(
    world: Any, cluster: Any, manifest: Any, field: str
) -> None:
    import json

    body = world.manifest()
    body["spec"] |= manifest["spec"]
    with pytest.raises(Exception, match="strict decoding error: unknown field") as refused:
        cluster.kubectl("apply", "--dry-run=server", "-f", "-", stdin=json.dumps(body))
    assert field in str(refused.value)


def test_everything_that_is_allowed_is_accepted_and_kept(world: Any) -> None:
    spec = {
        "replicas": 0,
        "volume": {"static": {**STATIC, "mountOptions": ["flock", "relatime"]}, "root": "a/b_c.d"},
        "gpu": {"sharing": "ResourceClaim"},
        "loading": {"path": "Require", "gate": "Overlap"},
        "engine": {
            "image": "registry.example.com:5000/vllm/vllm@sha256:0123",
            "args": ["--max-model-len", "128", "--kv-cache-dtype=fp8"],
            "env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
            "resources": {"limits": {"cpu": 2, "memory": "1.5Gi"}, "requests": {"cpu": "500m"}},
        },
        "pod": {
            "labels": {"example.com/team": "ml"},
            "tolerations": [{"key": "a", "operator": "Exists", "anything": {"goes": 1}}],
            "affinity": {"nodeAffinity": {"x": [1]}},
        },
    }
    made = world.kube.create(_kind(), world.manifest(**spec), dry_run=True)
    kept = made["spec"]
    assert kept["pod"]["tolerations"] == spec["pod"]["tolerations"]
    assert kept["pod"]["affinity"] == spec["pod"]["affinity"]
    assert kept["engine"]["env"] == spec["engine"]["env"]
    assert kept["parallelism"] == {
        "tensorParallelSize": 1,
        "pipelineParallelSize": 1,
        "expertParallelSize": 1,
        "nodes": 1,
    }
    assert kept["rollout"]["maxSurge"] == 0
    assert kept["rollout"]["maxUnavailable"] == 1
    assert kept["engine"]["command"][:2] == ["python3", "-m"]


def _kind() -> Any:
    from headrace_operator.cluster.kinds import MODEL_DEPLOYMENT

    return MODEL_DEPLOYMENT
