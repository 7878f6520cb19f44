"""Observation: only what the ModelDeployment controls counts as its own."""

from types import SimpleNamespace
from typing import Any

import pytest

from headrace_operator.cluster import observe
from headrace_operator.cluster.api import Api, Listing
from headrace_operator.cluster.kinds import CLAIM, DEPLOYMENT, JOB, VOLUME, WATCHED, Kind
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
