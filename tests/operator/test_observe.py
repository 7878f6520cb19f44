"""Observation: only what the ModelDeployment controls counts as its own."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from headrace_operator.cluster import observe
from headrace_operator.cluster.api import Api, Listing
from headrace_operator.cluster.kinds import (
    CLAIM,
    DEPLOYMENT,
    JOB,
    MODEL_DEPLOYMENT,
    VOLUME,
    WATCHED,
    Kind,
)
from headrace_operator.cluster.observe import Observer
from headrace_operator.cluster.store import Store


def child(name: str, owner: str, *, controller: bool = True) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "namespace": "ns",
            "resourceVersion": "1",
            "labels": {"headrace.dev/model-deployment": "tiny"},
            "ownerReferences": [{"uid": owner, "controller": controller}],
        }
    }


async def test_children_of_an_earlier_object_of_the_name_are_not_its_own(
    build: SimpleNamespace,
) -> None:
    store = Store(WATCHED)
    store.put(JOB, child("ours", "uid-cr"))
    store.put(JOB, child("earlier", "uid-earlier"))
    store.put(JOB, child("only-related", "uid-cr", controller=False))
    store.put(DEPLOYMENT, child("tiny", "uid-earlier"))
    # a spec that cannot be read needs no request, so there is no client behind this API
    resource = build.resource({"replicas": "many"})
    observed = await Observer(Api(None), store).observe(resource, build.now)  # type: ignore[arg-type]
    assert [job["metadata"]["name"] for job in observed.jobs] == ["ours"]
    assert observed.deployment is None


async def test_volumes_are_listed_once_a_minute_also_where_none_is_ill(
    build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[Kind] = []

    async def none_listed(_: Api, kind: Kind, *__: Any, **___: Any) -> Listing:
        listed.append(kind)
        return Listing([], 1)

    monkeypatch.setattr(Api, "list", none_listed)
    now = 1000.0
    monkeypatch.setattr(observe.time, "monotonic", lambda: now)
    store = Store(WATCHED)
    claim = build.claim("weights")
    claim["metadata"] |= {"resourceVersion": "1"}
    store.put(CLAIM, claim)
    observer = Observer(Api(None), store)  # type: ignore[arg-type]
    for seconds in (0, 10, 50, 70):
        now = 1000.0 + seconds
        await observer.observe(build.resource(), build.now)
    assert listed.count(VOLUME) == 2


async def test_the_checkpoints_of_others_are_read_once_per_version(
    build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of thousands that may delete its checkpoint asks for those of all others."""
    read: list[str] = []

    def path_of(resource: Any) -> str:
        read.append(resource["metadata"]["name"])
        return f"path of {resource['metadata']['name']}"

    monkeypatch.setattr(observe, "path_in_use", path_of)
    store = Store(WATCHED)
    spec = {"model": {"source": "hf://a/b"}, "checkpoint": {"reclaimPolicy": "Delete"}}
    resources = [build.resource(spec) for _ in range(3)]
    for number, resource in enumerate(resources):
        resource["metadata"] |= {"name": f"m{number}", "resourceVersion": "1"}
        store.put(MODEL_DEPLOYMENT, resource)
    observer = Observer(Api(None), store)  # type: ignore[arg-type]
    monkeypatch.setattr(observer, "_volume_of", lambda *_: asyncio.sleep(0))
    for _ in range(2):
        observed = await observer.observe(resources[0], build.now)
        assert observed.paths_in_use == {"path of m1", "path of m2"}
    assert read == ["m0", "m1", "m2"]
    resources[1]["metadata"]["resourceVersion"] = "2"
    store.put(MODEL_DEPLOYMENT, resources[1])
    store.observe(MODEL_DEPLOYMENT, resources[2] | {}, gone=True)
    observed = await observer.observe(resources[0], build.now)
    assert (observed.paths_in_use, read[3:]) == ({"path of m1"}, ["m1"])
