"""The store: the newest version wins, listings repair it, a dead watch is noticed."""

import asyncio
import pickle
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_operator.cluster.api import Change, Listing
from headrace_operator.cluster.informer import Informer
from headrace_operator.cluster.kinds import CLAIM, JOB, MODEL_DEPLOYMENT
from headrace_operator.cluster.store import Key, Store
from headrace_operator.errors import Unavailable

OWNER = Key("ns", "tiny")


def job(name: str, version: int, owner: str = "tiny") -> dict[str, Any]:
    labels = {"headrace.dev/model-deployment": owner}
    metadata = {"name": name, "namespace": "ns", "resourceVersion": str(version), "labels": labels}
    return {"metadata": {**metadata, "managedFields": [{"manager": "x"}]}}


def versions(store: Store, owner: Key = OWNER) -> dict[str, int]:
    found = store.children(JOB, owner)
    return {j["metadata"]["name"]: int(j["metadata"]["resourceVersion"]) for j in found}


def test_events_and_writes_are_kept_by_version() -> None:
    store = Store([MODEL_DEPLOYMENT, JOB])
    assert store.observe(JOB, job("a", 5), gone=False) == {OWNER}
    store.put(JOB, job("a", 7))
    store.observe(JOB, job("a", 6), gone=False)
    assert versions(store) == {"a": 7}
    assert "managedFields" not in next(iter(store.children(JOB, OWNER)))["metadata"]
    store.observe(JOB, job("a", 8), gone=True)
    assert versions(store) == {}
    store.put(JOB, job("a", 7))  # the answer to a write that was overtaken
    assert versions(store) == {}


def test_a_watch_that_lists_first_tells_only_what_is_new() -> None:
    store = Store([JOB])
    store.replace(JOB, Listing([job("a", 5)], 9))
    store.replace(JOB, Listing([job("a", 5)], 9))
    assert store.is_behind(JOB)
    assert store.observe(JOB, job("a", 5), gone=False, listed=True) == set()
    assert not store.is_behind(JOB)
    assert store.observe(JOB, job("a", 6), gone=False, listed=True) == {OWNER}
    assert store.observe(JOB, job("a", 6), gone=False) == {OWNER}  # the event of an own write


def test_an_object_follows_its_label() -> None:
    store = Store([JOB])
    store.observe(JOB, job("a", 1), gone=False)
    assert store.observe(JOB, job("a", 2, "other"), gone=False) == {Key("ns", "other")}
    assert versions(store) == {}
    assert versions(store, Key("ns", "other")) == {"a": 2}


def test_a_listing_removes_what_is_gone_and_tells_whose_it_was() -> None:
    store = Store([JOB])
    store.observe(JOB, job("a", 1), gone=False)
    store.observe(JOB, job("b", 2, "other"), gone=False)
    store.observe(JOB, job("new", 9), gone=False)  # newer than the listing
    assert store.replace(JOB, Listing([job("a", 1)], 5)) == {Key("ns", "other")}
    assert versions(store) == {"a": 1, "new": 9}


def test_an_old_listing_brings_nothing_back() -> None:
    store = Store([JOB])
    store.observe(JOB, job("a", 1), gone=False)
    store.observe(JOB, job("a", 6), gone=True)
    store.replace(JOB, Listing([job("a", 1)], 5))
    assert versions(store) == {}


def test_a_watch_that_misses_what_two_listings_showed_is_behind() -> None:
    store = Store([JOB])
    store.observe(JOB, job("a", 3), gone=False)
    store.replace(JOB, Listing([job("a", 4)], 4))
    assert not store.is_behind(JOB)  # it may still come
    store.replace(JOB, Listing([job("a", 4)], 4))
    assert store.is_behind(JOB)
    store.observe(JOB, job("a", 4), gone=False)
    assert not store.is_behind(JOB)


def test_own_writes_do_not_hide_a_dead_watch() -> None:
    store = Store([JOB])
    store.put(JOB, job("a", 4))
    for _ in range(2):
        store.replace(JOB, Listing([job("a", 4)], 4))
    assert store.is_behind(JOB)


@pytest.mark.parametrize(("changed", "behind"), [(4, False), (11, True)])
def test_a_watch_owes_only_what_changed_after_its_beginning(changed: int, behind: bool) -> None:
    store, listing = Store([JOB]), [job("a", 4)]

    class Api:
        async def pages(self, *_: Any, **__: Any) -> AsyncIterator[Listing]:
            yield Listing(listing, 10)

        async def watch(self, *_: Any, **__: Any) -> AsyncIterator[Change]:
            """Deliver nothing; what listings show changes meanwhile, or does not."""
            listing[:] = [job("a", changed)]
            for _ in range(2):
                await informer.list(lambda _: None)
            raise asyncio.CancelledError
            yield

    informer = Informer(Api(), store, JOB, (None,), "", lambda _: None)  # type: ignore[arg-type]
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(informer.run(None))
    assert store.is_behind(JOB) is behind


async def test_what_a_page_has_changed_is_told_even_if_the_next_is_refused() -> None:
    told: list[Key] = []

    class Api:
        async def pages(self, *_: Any, **__: Any) -> AsyncIterator[Listing]:
            yield Listing([job("a", 4)], 10)
            raise Unavailable("no more pages")

    informer = Informer(Api(), Store([JOB]), JOB, (None,), "", lambda _: None)  # type: ignore[arg-type]
    with pytest.raises(Unavailable):
        await informer.list(told.append)
    assert told == [OWNER]


EVENTS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["put", "gone", "list"])), max_size=12
)


@given(EVENTS, st.randoms(use_true_random=False))
def test_any_order_of_events_and_listings_ends_with_the_truth(
    events: list[tuple[str, str]], random: Any
) -> None:
    """The history of a server, delivered per object in order, listings late or early."""
    store, truth, pending = Store([JOB]), {}, []
    for version, (name, what) in enumerate(events, start=1):
        if what == "put":
            truth[name] = version
            pending.append(lambda n=name, v=version: store.observe(JOB, job(n, v), gone=False))
        elif what == "gone" and name in truth:
            del truth[name]
            pending.append(lambda n=name, v=version: store.observe(JOB, job(n, v), gone=True))
        elif what == "list":
            listing = Listing([job(n, v) for n, v in truth.items()], version)
            pending.insert(
                random.randint(0, len(pending)), lambda li=listing: store.replace(JOB, li)
            )
    for deliver in pending:
        deliver()
    assert versions(store) == truth


def test_a_claim_of_others_concerns_those_who_use_it() -> None:
    store = Store([MODEL_DEPLOYMENT, CLAIM])
    body = {"metadata": {"name": "weights", "namespace": "ns", "resourceVersion": "1"}}
    assert store.observe(CLAIM, body, gone=False) == set()
    assert store.claim(Key("ns", "weights")) == body
    store.use_claims(OWNER, ("weights", None))
    body["metadata"]["resourceVersion"] = "2"
    assert store.observe(CLAIM, body, gone=False) == {OWNER}
    assert store.replace(CLAIM, Listing([], 3)) == {OWNER}
    store.use_claims(OWNER, ("other",))
    body["metadata"]["resourceVersion"] = "4"
    assert store.observe(CLAIM, body, gone=False) == set()


def test_nothing_is_remembered_of_those_that_are_gone() -> None:
    store = Store([MODEL_DEPLOYMENT, CLAIM])
    before = pickle.dumps(vars(store))
    for number in range(3):
        gone = Key("ns", f"gone-{number}")
        store.use_claims(gone, ("weights", f"source-{number}"))
        store.use_claims(gone, ())
    assert pickle.dumps(vars(store)) == before
