"""What users read of the serving pods and in the summary, state by state."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from headrace_operator.plan import Observed, Rejection
from headrace_operator.plan.world import LoadedPath

RUNNING = {"startedAt": "2026-11-24T11:59:30Z"}
CRASH = {"exitCode": 1, "reason": "Error"}
GPU = {"gpu": {"sharing": "ResourceClaim"}, "loading": {"path": "Require"}}
WHOLE_NODE = {
    "gpu": {"sharing": "WholeNode"},
    "loading": {"path": "Prefer"},
    "parallelism": {"tensorParallelSize": 2},
}


def own(reason: str, message: str, exit_code: int = 65, **more: Any) -> dict[str, Any]:
    body = json.dumps({"reason": reason, "message": message, **more})
    return {"exitCode": exit_code, "reason": "Error", "message": body}


def expect(condition: dict[str, Any], status: str, reason: str, *fragments: str) -> None:
    assert (condition["status"], condition["reason"]) == (status, reason), condition
    for fragment in fragments:
        assert fragment in condition["message"], condition


HELD = {"ready": True, "running": RUNNING}
LOADING = {"running": RUNNING}
STARTING: dict[str, Any] = {"waiting": {"reason": "PodInitializing"}}


@pytest.mark.parametrize(
    ("loader", "engine", "ready", "resident", "available", "summary"),
    [
        (STARTING, STARTING, 0, ("False", "PodsStarting"), "WaitingForWeights", "PodsStarting"),
        (LOADING, STARTING, 0, ("False", "Loading"), "WaitingForWeights", "Loading"),
        (HELD, LOADING, 0, ("True", "Resident"), "EngineStarting", "EngineStarting"),
        (
            LOADING,
            {"waiting": {"reason": "ErrImageNeverPull"}},
            0,
            ("False", "Loading"),
            "ErrImageNeverPull",
            "Loading",
        ),
        (HELD, HELD, 1, ("True", "Resident"), "Serving", "Serving"),
        (
            {
                "restarts": 1,
                "last": own("DigestMismatch", "part 0"),
                "running": RUNNING,
            },
            STARTING,
            0,
            ("False", "DigestMismatch"),
            "WaitingForWeights",
            "DigestMismatch",
        ),
        (
            {"restarts": 1, "last": {"exitCode": 137, "reason": "Error"}, "running": RUNNING},
            STARTING,
            0,
            ("False", "LoaderFailed"),
            "WaitingForWeights",
            "LoaderFailed",
        ),
        (
            {"restarts": 4, "last": CRASH, "waiting": {"reason": "CrashLoopBackOff"}},
            STARTING,
            0,
            ("False", "CrashLoopBackOff"),
            "WaitingForWeights",
            "CrashLoopBackOff",
        ),
        (
            HELD,
            {"restarts": 1, "last": CRASH, "running": RUNNING},
            0,
            ("True", "Resident"),
            "EngineFailed",
            "EngineFailed",
        ),
        (
            HELD,
            {"waiting": {"reason": "ErrImageNeverPull", "message": "no image vllm:cpu"}},
            0,
            ("True", "Resident"),
            "ErrImageNeverPull",
            "ErrImageNeverPull",
        ),
    ],
)
def test_conditions_of_a_serving_pod(
    build: SimpleNamespace,
    loader: Any,
    engine: Any,
    ready: int,
    resident: tuple[str, str],
    available: str,
    summary: str,
) -> None:
    resource = build.resource()
    pod = build.serving_pod(
        resource, build.container("loader", **loader), build.container("engine", **engine)
    )
    observed = build.world(resource, deployment=build.deployment(resource, ready), pods=(pod,))
    conditions = build.conditions(resource, observed)
    expect(conditions["WeightsResident"], *resident)
    status = "True" if ready else "False"
    expect(conditions["Available"], status, available)
    expect(conditions["Ready"], status, summary)


def test_one_failing_replica_of_two_keeps_ready_but_not_available_from_holding(
    build: SimpleNamespace,
) -> None:
    resource = build.resource({"replicas": 2})
    engines = [
        {"ready": True, "running": RUNNING},
        {"restarts": 3, "last": CRASH, "waiting": {"reason": "CrashLoopBackOff"}},
    ]
    pods = tuple(
        build.serving_pod(
            resource,
            build.container("loader", **HELD),
            build.container("engine", **engine),
            name=f"serve-{n}",
        )
        for n, engine in enumerate(engines)
    )
    observed = build.world(resource, deployment=build.deployment(resource, 1), pods=pods)
    conditions = build.conditions(resource, observed)
    expect(conditions["WeightsResident"], "True", "Resident", "2 of 2")
    expect(conditions["Available"], "True", "Serving", "1 of 2")
    expect(conditions["Ready"], "False", "CrashLoopBackOff", "pod serve-1, container engine")


def test_past_crashes_and_pods_on_their_way_out_are_no_failures(build: SimpleNamespace) -> None:
    resource = build.resource({"replicas": 2})
    recovered = build.serving_pod(
        resource,
        build.container("loader", last=CRASH, restarts=1, **HELD),
        build.container("engine", last=CRASH, restarts=3, **HELD),
    )
    going = build.serving_pod(
        resource,
        build.container("loader", last=CRASH, restarts=1),
        build.container("engine", last=CRASH, restarts=1),
        name="serve-b",
    )
    going["metadata"]["deletionTimestamp"] = "2026-11-24T12:00:00Z"
    deployment = build.deployment(resource, 1)
    observed = build.world(resource, deployment=deployment, pods=(recovered, going))
    conditions = build.conditions(resource, observed)
    expect(conditions["WeightsResident"], "False", "PodsStarting", "1 of 2")
    job = build.job(resource)
    shard = build.job_pod(build.container("shard", terminated=CRASH))
    shard["metadata"]["deletionTimestamp"] = "2026-11-24T12:00:00Z"
    sharding = build.world(resource, jobs=(job,), pods=(shard,))
    expect(build.conditions(resource, sharding)["CheckpointReady"], "False", "Sharding")


def test_ready_waits_for_the_last_old_pod(build: SimpleNamespace) -> None:
    resource = build.resource({"replicas": 2})
    pods = tuple(
        build.serving_pod(
            resource,
            build.container("loader", **HELD),
            build.container("engine", **HELD),
            name=f"serve-{n}",
        )
        for n in range(2)
    )
    for field, value in (("updatedReplicas", 1), ("replicas", 3), ("observedGeneration", 0)):
        deployment = build.deployment(resource, **{field: value})
        conditions = build.conditions(
            resource, build.world(resource, deployment=deployment, pods=pods)
        )
        expect(conditions["Ready"], "False", "RollingOut", "2 of 2")
    # the old template is rolled out, and the new one not applied yet
    changed = build.resource({"replicas": 2, "engine": {"image": "vllm:2"}})
    stale = build.world(changed, deployment=build.deployment(resource), pods=pods)
    expect(build.conditions(changed, stale)["Ready"], "False", "RollingOut")
    done = build.world(resource, deployment=build.deployment(resource), pods=pods)
    expect(build.conditions(resource, done)["Ready"], "True", "Serving")


def test_weights_of_another_checkpoint_do_not_count(build: SimpleNamespace) -> None:
    resource = build.resource()
    pod = build.serving_pod(
        resource,
        build.container("loader", **HELD),
        build.container("engine", **HELD),
        annotations={"headrace.dev/checkpoint-key": "another"},
    )
    observed = build.world(resource, deployment=build.deployment(resource), pods=(pod,))
    expect(
        build.conditions(resource, observed)["WeightsResident"], "False", "PodsStarting", "0 of 1"
    )


def test_zero_replicas_are_ready_once_the_checkpoint_is(build: SimpleNamespace) -> None:
    resource = build.resource({"replicas": 0})
    sharding = build.world(resource, jobs=(build.job(resource),))
    conditions = build.conditions(resource, sharding)
    expect(conditions["Available"], "False", "WaitingForWeights")
    expect(conditions["Ready"], "False", "ShardJobStarting")
    going = {"replicas": 2, "updatedReplicas": 2, "readyReplicas": 2}
    scaling = build.world(resource, deployment=build.deployment(resource, **going))
    ready = build.conditions(resource, scaling)["Ready"]
    expect(ready, "False", "RollingOut", "2 replicas still exist, spec.replicas is 0")
    done = build.world(resource, deployment=build.deployment(resource))
    conditions = build.conditions(resource, done)
    for kind in ("WeightsResident", "Available", "Ready"):
        expect(conditions[kind], "True", "ScaledToZero")


@pytest.mark.parametrize(
    ("spec", "fields", "reason", "fragment"),
    [
        (GPU, {"dra_served": False}, "DraUnavailable", "resource.k8s.io/v1"),
        (WHOLE_NODE, {"gpus_of_nodes": frozenset({4, 8})}, "PartialNodeWithoutDRA", "4, 8"),
    ],
)
def test_a_pod_that_cannot_share_its_gpus_is_refused(
    build: SimpleNamespace, spec: Any, fields: Any, reason: str, fragment: str
) -> None:
    resource = build.resource(spec)
    observed = build.world(resource, **fields)
    conditions = build.conditions(resource, observed)
    expect(conditions["CheckpointReady"], "True", "Published")
    expect(conditions["WeightsResident"], "False", reason, fragment, "spec.")
    assert build.plan(resource, observed).apply == ()


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        (GPU, {"dra_served": True}),
        (GPU, {"dra_served": None}),
        (WHOLE_NODE, {"gpus_of_nodes": frozenset({2, 8})}),
        (WHOLE_NODE, {"gpus_of_nodes": frozenset()}),
        (WHOLE_NODE, {"gpus_of_nodes": None}),
    ],
)
def test_what_is_not_known_to_be_impossible_is_tried(
    build: SimpleNamespace, spec: Any, fields: Any
) -> None:
    resource = build.resource(spec)
    kinds = {d.body["kind"] for d in build.plan(resource, build.world(resource, **fields)).apply}
    assert {"Deployment", "Service"} <= kinds


@pytest.mark.parametrize(
    ("kind", "condition"),
    [
        ("PersistentVolumeClaim", "VolumeReady"),
        ("Job", "CheckpointReady"),
        ("Deployment", "WeightsResident"),
        ("ResourceClaimTemplate", "WeightsResident"),
        ("Service", "Available"),
    ],
)
def test_a_rejected_child_is_named(build: SimpleNamespace, kind: str, condition: str) -> None:
    resource = build.resource()
    rejections = (Rejection(kind, "child", "Invalid", "spec.x: 1: must be 2"),)
    jobs = {"jobs": ()} if kind == "Job" else {}
    observed = build.world(resource, rejections=rejections, **jobs)
    result = build.conditions(resource, observed)[condition]
    expect(result, "False", f"{kind}Invalid", f"{kind} child", "spec.x: 1: must be 2")


def test_pods_that_cannot_be_made_are_explained(build: SimpleNamespace) -> None:
    resource = build.resource()
    deployment = build.deployment(resource, 0)
    message = 'pods "x" is forbidden: violates PodSecurity'
    deployment["status"]["conditions"] = [build.condition("ReplicaFailure", message=message)]
    result = build.conditions(resource, build.world(resource, deployment=deployment))
    expect(result["WeightsResident"], "False", "PodsRejected", "violates PodSecurity")
    # also where a quota lets some of them through
    many = build.resource({"replicas": 2})
    held = build.container("loader", ready=True)
    pods = (build.serving_pod(many, held, build.container("engine", ready=True)),)
    result = build.conditions(many, build.world(many, deployment=deployment, pods=pods))
    expect(result["WeightsResident"], "False", "PodsRejected", "violates PodSecurity")


def test_direct_path(build: SimpleNamespace) -> None:
    host = build.resource()
    expect(build.conditions(host, Observed())["DirectPath"], "False", "Off")
    gpu = build.resource(GPU)
    expect(build.conditions(gpu, Observed())["DirectPath"], "Unknown", "NotReported")
    loader = build.container(
        "loader", last=own("DirectPathUnavailable", "no nvidia-fs"), restarts=1, running=RUNNING
    )
    pod = build.serving_pod(gpu, loader, build.container("engine", **STARTING))
    observed = build.world(gpu, deployment=build.deployment(gpu, 0), pods=(pod,))
    conditions = build.conditions(gpu, observed)
    expect(conditions["DirectPath"], "False", "DirectPathUnavailable", "no nvidia-fs")
    expect(conditions["WeightsResident"], "False", "DirectPathUnavailable")


@pytest.mark.parametrize(
    ("paths", "status", "reason", "fragment"),
    [
        ((), "Unknown", "LoaderUnreachable", "port 9400"),
        ((LoadedPath(True, "", ""),), "Unknown", "LoaderUnreachable", "pod serve-1"),
        ((LoadedPath(True, "", ""),) * 2, "True", "GPUDirect", "2 of 2"),
        (
            (LoadedPath(True, "", ""), LoadedPath(False, "NvidiaFsMissing", "no nvidia-fs")),
            "False",
            "NvidiaFsMissing",
            "pod serve-1: the weights took another path: no nvidia-fs",
        ),
        ((LoadedPath(False, "not a reason", "x"),), "False", "FellBack", "serve-0"),
    ],
)
def test_direct_path_as_the_loaders_tell_it(
    build: SimpleNamespace, paths: Any, status: str, reason: str, fragment: str
) -> None:
    gpu = build.resource(GPU | {"replicas": 2, "loading": {"path": "Prefer"}})
    loader = build.container("loader", running=RUNNING, ready=True)
    engine = build.container("engine", **STARTING)
    pods = tuple(build.serving_pod(gpu, loader, engine, name=f"serve-{n}") for n in range(2))
    told = {pod["metadata"]["uid"]: path for pod, path in zip(pods, paths, strict=False)}
    observed = build.world(gpu, deployment=build.deployment(gpu, 0), pods=pods, loaded_paths=told)
    expect(build.conditions(gpu, observed)["DirectPath"], status, reason, fragment)
    result = build.plan(gpu, observed)
    assert (result.requeue_seconds is not None) == (reason == "LoaderUnreachable")
    events = [(t.reason, t.warning) for t in result.transitions if t.condition == "DirectPath"]
    assert events == ([] if status == "Unknown" else [(reason, status == "False")])


def test_a_spec_that_cannot_be_read_is_a_condition(build: SimpleNamespace) -> None:
    resource = build.resource({"replicas": "many"})
    result = build.plan(resource, Observed())
    conditions = {c["type"]: c for c in result.status["status"]["conditions"]}
    expect(conditions["Ready"], "False", "SpecInvalid", "spec.replicas")
    expect(conditions["VolumeReady"], "Unknown", "SpecInvalid")
    assert result.apply == ()


def test_a_required_direct_path_selects_nodes_where_it_was_verified(build: SimpleNamespace) -> None:
    def selector(path: str, **pod: Any) -> Any:
        changes = {"gpu": {"sharing": "WholeNode"}, "loading": {"path": path}, "pod": pod}
        resource = build.resource(changes)
        observed = Observed(claim=build.claim("weights"), jobs=(build.done(resource),))
        bodies = (desired.body for desired in build.plan(resource, observed).apply)
        body = next(body for body in bodies if body["kind"] == "Deployment")
        return body["spec"]["template"]["spec"].get("nodeSelector", {})

    assert selector("Require") == {"headrace.dev/gds": "verified"}
    assert selector("Prefer") == {}
    own = {"headrace.dev/gds": "mine"}
    assert selector("Require", nodeSelector=own) == own
