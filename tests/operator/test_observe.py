"""Observation: only what the ModelDeployment controls counts as its own."""

from types import SimpleNamespace
from typing import Any

from headrace_operator.cluster.api import Api
from headrace_operator.cluster.kinds import DEPLOYMENT, JOB, WATCHED
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
