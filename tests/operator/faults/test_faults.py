"""Whatever goes wrong in a whole life, it ends as the undisturbed one does.

Each scenario is a life in its own namespace: create, shard, serve, scale and roll, shard
anew, roll, delete. Lives mostly wait for Kubernetes, so all of them are lived at the same
time, once, and each test looks at one. Afterwards there have to be the same children with
the same specs and the same status; over the whole life the same Jobs, Deployments, Services
and ReplicaSets, each made once; and after the deletion nothing.

The named scenarios are lived by default. HEADRACE_FAULTS=all adds lives in which the operator is
killed at a call and at every fortieth after it, before or after the API server has acted: of all
of them together, each call of a life is one at which an operator died.
HEADRACE_FAULTS=NAME,NAME lives these alone.
"""

import asyncio
import itertools
import os
import random
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from faults.life import (
    NAMESPACE,
    Kube,
    Life,
    Operator,
    Outcome,
    Scenario,
    connect,
    live,
    model_deployment,
)
from faults.proxy import HANGING, LOST, REFUSED, Harm, Proxy, Request
from headrace_operator.cluster import api
from headrace_operator.cluster.execute import Executor
from headrace_operator.cluster.kinds import JOB, MODEL_DEPLOYMENT, WATCHED
from headrace_operator.cluster.store import Store
from headrace_operator.errors import ApiError, Conflict
from headrace_operator.plan import Deletion, Desired, Plan

ASKED = os.environ.get("HEADRACE_FAULTS", "")
ALL = ASKED == "all"
# The first test lives all lives, and one that is stuck should tell so itself.
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600 if ALL else 900)]
SAMPLED_WRITES = range(4, 44, 13)
# More than the calls of a start, so that each operator comes to work.
CALLS_BETWEEN = 40
TOGETHER = 30
SEED = 20261124
LATE_SECONDS = 0.2


def killed_at(first: int, *, before: bool) -> Scenario:
    """Killed at a call and again whenever as many more have been made."""

    def harm(operator: Operator, request: Request) -> Harm | None:
        if request.number % CALLS_BETWEEN != first:
            return None
        operator.die()
        return REFUSED if before else LOST

    return Scenario(harm)


def killed_at_write(number: int) -> Scenario:
    def harm(operator: Operator, request: Request) -> Harm | None:
        if request.write != number or operator.starts > 1:
            return None
        return Harm(pass_on=True, unless=operator.die)

    return Scenario(harm)


def killed_after_every_write() -> Scenario:
    """No operator outlives its first write that succeeds."""

    def harm(operator: Operator, request: Request) -> Harm | None:
        if request.write is None:
            return None
        return Harm(pass_on=True, unless=lambda status: status >= 300 or operator.die())

    return Scenario(harm)


def killed_ever_later() -> Scenario:
    """The first operator dies of its first call, the second of its third, and so on."""

    def harm(operator: Operator, request: Request) -> Harm | None:
        if request.number - operator.first_request < 2 * (operator.starts - 1):
            return None
        operator.die()
        return LOST

    return Scenario(harm)


def sometimes(count: int, harm: Harm, *, writes: bool = False, reads: bool = False) -> Scenario:
    """One of so many calls, of any kind but watches, goes wrong.

    By chance: a period could always meet the same call of one that repeats itself.
    """

    def choose(_: Operator, request: Request) -> Harm | None:
        if writes and request.write is None:
            return None
        if request.is_watch or (reads and request.write is not None):
            return None
        return harm if random.random() < 1 / count else None

    return Scenario(choose)


def watches(harm: Harm) -> Scenario:
    """Every other watch is refused."""
    return Scenario(lambda _, r: harm if r.is_watch and r.number % 2 else None)


async def dropped(_: Operator, _request: Request, event: Any) -> list[Any]:
    return [] if random.random() < 0.5 else [event]


async def none(*_: Any) -> list[Any]:
    return []


async def doubled(_: Operator, _request: Request, event: Any) -> list[Any]:
    return [event, event]


async def late(_: Operator, request: Request, event: Any) -> list[Any]:
    """What becomes of a Deployment is told after all else, the operator's own status above all."""
    if request.path.endswith("/deployments"):
        await asyncio.sleep(LATE_SECONDS)
    return [event]


def reordered() -> Callable[[Operator, Request, Any], Awaitable[list[Any]]]:
    held: dict[int, list[Any]] = {}

    async def shuffle(operator: Operator, request: Request, event: Any) -> list[Any]:
        kept = held.setdefault(hash((id(operator), request.number)), [])
        kept.append(event)
        if len(kept) < 3:
            return []
        random.shuffle(kept)
        return [kept.pop(), kept.pop()]

    return shuffle


async def expired_in_the_stream(_: Operator, request: Request, event: Any) -> list[Any]:
    if random.random() < 0.7:
        return [event]
    gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}
    return [{"type": "ERROR", "object": gone}]


async def cut(operator: Operator) -> None:
    while True:
        await asyncio.sleep(random.uniform(0.2, 2.0))  # a short watch makes the next one wait
        operator.proxy.cut()


def stepping_clock() -> Callable[[], datetime]:
    """A clock that is an hour ahead and an hour behind in turns."""
    hours = itertools.cycle((1, -1, 0))
    return lambda: datetime.now(UTC) + timedelta(hours=next(hours))


UNDISTURBED = "undisturbed"
SCENARIOS: Mapping[str, Scenario] = {
    UNDISTURBED: Scenario(),
    "killed-after-every-write": killed_after_every_write(),
    "killed-ever-later": killed_ever_later(),
    **{f"killed-at-write-{n}": killed_at_write(n) for n in SAMPLED_WRITES},
    "conflict": sometimes(3, Harm(status=409), writes=True),
    "too-many-requests": sometimes(4, Harm(status=429, headers=(("Retry-After", "1"),))),
    "server-error": sometimes(4, Harm(status=500)),
    "server-error-after-the-act": sometimes(3, Harm(pass_on=True, status=500), writes=True),
    "gateway-timeout-after-the-act": sometimes(3, Harm(pass_on=True, status=504), writes=True),
    "connection-refused": sometimes(4, REFUSED),
    "answer-lost": sometimes(3, LOST, writes=True),
    "no-answer-in-time": sometimes(12, HANGING),
    "listing-expired": sometimes(3, Harm(status=410, message="too old"), reads=True),
    "watch-expired": watches(Harm(status=410, message="too old")),
    "watch-refused": watches(Harm(status=500)),
    "watch-forgotten": Scenario(events=expired_in_the_stream),
    "watches-cut": Scenario(meanwhile=cut),
    "events-lost": Scenario(events=dropped, period=2.0),
    "events-all-lost": Scenario(events=none, period=1.0),
    "events-twice": Scenario(events=doubled),
    "events-late": Scenario(events=late),
    "events-reordered": Scenario(events=reordered(), period=2.0),
    "clock-steps": Scenario(clock=stepping_clock()),
    "two-operators": Scenario(operators=2),
}
EXHAUSTIVE = {
    f"killed-{'before' if before else 'after'}-call-{n}": killed_at(n, before=before)
    for n in range(CALLS_BETWEEN)
    for before in (True, False)
}
LIVES = SCENARIOS
if ASKED:
    LIVES = {**SCENARIOS, **EXHAUSTIVE}
if ASKED and not ALL:
    LIVES = {name: LIVES[name] for name in (UNDISTURBED, *ASKED.split(","))}


async def live_all(cluster: Any, token: str) -> dict[str, Outcome]:
    gate = asyncio.Semaphore(TOGETHER)
    async with Kube(cluster) as kube:

        async def one(name: str, scenario: Scenario) -> Outcome:
            async with gate:
                return await live(kube, token, name, scenario)

        outcomes = await asyncio.gather(*(one(n, s) for n, s in LIVES.items()))
    return dict(zip(LIVES, outcomes, strict=True))


@pytest.fixture(scope="module")
def outcomes(cluster: Any, token: str) -> dict[str, Outcome]:
    """Live all lives, with requests that wait for 5 s at most."""
    random.seed(SEED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "REQUEST_TIMEOUT_SECONDS", 5.0)
        return asyncio.run(live_all(cluster, token))


@pytest.mark.parametrize("name", LIVES)
def test_the_end_is_the_same(name: str, outcomes: dict[str, Outcome]) -> None:
    outcome, undisturbed = outcomes[name], outcomes[UNDISTURBED].life
    if outcome.error is not None:
        raise outcome.error
    assert outcome.life.snapshot == undisturbed.snapshot
    assert outcome.life.made == undisturbed.made
    assert outcome.life.taken_back == []


def test_the_disturbances_took_place(outcomes: dict[str, Outcome]) -> None:
    starts = {name: outcome.operators[0].starts for name, outcome in outcomes.items()}
    for name in LIVES:
        if name.startswith("killed-at-"):
            assert starts[name] == 2, name
        if name in EXHAUSTIVE:
            assert starts[name] > 2, name
    # How many writes a life has depends on how many changes fall together.
    assert starts.get("killed-after-every-write", 99) > 12
    assert starts.get("killed-ever-later", 99) > 8
    assert starts[UNDISTURBED] == 1
    requests = outcomes[UNDISTURBED].operators[0].proxy.requests
    assert len({r.write for r in requests}) > len(SAMPLED_WRITES)


def test_an_undisturbed_life_is_as_described(outcomes: dict[str, Outcome]) -> None:
    life: Life = outcomes[UNDISTURBED].life
    kinds = [kind for kind, _ in life.made]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "Job": 2,
        "Deployment": 1,
        "Service": 1,
        "ReplicaSet": 3,
    }
    assert len(life.snapshot["Job"]) == 1
    assert len(life.snapshot["Pod"]) == 2


async def test_a_status_does_not_replace_one_that_was_written_meanwhile(
    cluster: Any, token: str
) -> None:
    namespace = "overtaken"
    async with Kube(cluster) as kube, Proxy(cluster.server, cluster.authority) as proxy:
        await kube.create(NAMESPACE, {"metadata": {"name": namespace}})
        _, read = await kube.create(MODEL_DEPLOYMENT, model_deployment(namespace))
        async with connect(proxy, token) as client:
            executor = Executor(api.Api(client), Store(WATCHED))
            seen = await executor.write_status(read, status_of(read, "1/1"))
            with pytest.raises(Conflict):
                await executor.write_status(read, status_of(read, "0/1"))
            assert (await executor.write_status(seen, status_of(read, "2/1")))["status"] == {
                "ready": "2/1"
            }


async def test_what_is_not_needed_is_deleted_even_if_the_rest_fails(
    cluster: Any, token: str
) -> None:
    """Else operators that die after a write would leave a Job of each spec at work."""
    namespace = "halfway"
    pod = {"restartPolicy": "Never", "containers": [{"name": "shard", "image": "none"}]}
    spec = {"suspend": True, "template": {"spec": pod}}
    async with (
        Kube(cluster) as kube,
        Proxy(
            cluster.server,
            cluster.authority,
            harm=lambda request: REFUSED if request.method == "PATCH" else None,
        ) as proxy,
        connect(proxy, token) as client,
    ):
        await kube.create(NAMESPACE, {"metadata": {"name": namespace}})
        body = {"metadata": {"name": "old", "namespace": namespace}, "spec": spec}
        _, old = await kube.create(JOB, body)
        _, resource = await kube.create(MODEL_DEPLOYMENT, model_deployment(namespace))
        new = {**old, "metadata": {**old["metadata"], "name": "new", "labels": {}}}
        executor = Executor(api.Api(client), Store(WATCHED))
        plan = Plan(delete=(Deletion.of(old),), apply=(Desired(new),))
        with pytest.raises(ApiError):
            await executor.write_children(resource, plan)
        assert await kube.list(JOB, namespace) == []


def status_of(resource: Any, ready: str) -> dict[str, Any]:
    metadata = {key: resource["metadata"][key] for key in ("name", "namespace")}
    kinds = {key: resource[key] for key in ("apiVersion", "kind")}
    return {**kinds, "metadata": metadata, "status": {"ready": ready}}
