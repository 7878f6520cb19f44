"""The work queue: each key once, never two workers on one key, bounded backoff."""

import asyncio

import pytest

from headrace_operator import queue as queue_module
from headrace_operator.queue import MAX_BACKOFF_SECONDS, WorkQueue


async def test_a_key_waits_once() -> None:
    queue: WorkQueue[str] = WorkQueue()
    for _ in range(3):
        queue.add("a")
    assert len(queue) == 1
    assert await queue.get() == "a"
    queue.done("a")
    assert len(queue) == 0


async def test_a_key_added_during_its_work_comes_again_after_it() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a")
    await queue.get()
    queue.add("a")
    assert len(queue) == 0
    queue.done("a")
    assert len(queue) == 1


async def test_workers_never_share_a_key() -> None:
    queue: WorkQueue[int] = WorkQueue()
    working: set[int] = set()
    seen: list[int] = []

    async def work() -> None:
        while (key := await queue.get()) is not None:
            assert key not in working
            working.add(key)
            await asyncio.sleep(0)
            seen.append(key)
            working.discard(key)
            queue.done(key)

    workers = [asyncio.create_task(work()) for _ in range(3)]
    for n in range(60):
        queue.add(n % 4)
        if n % 7 == 0:
            await asyncio.sleep(0)
    async with asyncio.timeout(5):
        while len(queue) or working:  # noqa: ASYNC110  # that is what is tested
            await asyncio.sleep(0)
    queue.shut_down()
    await asyncio.gather(*workers)
    assert set(seen) == {0, 1, 2, 3}


async def test_a_later_key_comes_once_in_time_and_an_event_brings_it_forward() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add_later("a", 0.02)
    queue.add_later("b", 60.0)
    async with asyncio.timeout(1):
        assert await queue.get() == "a"
    queue.add("b")
    assert await queue.get() == "b"
    queue.done("a")
    queue.done("b")
    assert len(queue) == 0


async def test_failures_back_off_up_to_a_cap_and_success_resets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(queue_module, "FIRST_BACKOFF_SECONDS", 0.5)
    queue: WorkQueue[str] = WorkQueue()
    delays = []
    for _ in range(12):
        queue.add("a")
        await queue.get()
        queue.add("a")  # an event during the work does not shorten the backoff
        delays.append(queue.failed("a"))
        assert len(queue) == 0
    assert delays[:4] == [0.5, 1.0, 2.0, 4.0]
    assert delays[-1] == MAX_BACKOFF_SECONDS
    queue.add("a")
    await queue.get()
    queue.done("a")
    queue.add("a")
    await queue.get()
    assert queue.failed("a") == 0.5
    queue.shut_down()


async def test_work_that_began_from_an_old_state_is_done_again_once_the_new_one_is_there() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a")
    await queue.get()
    queue.add("a")
    queue.failed("a", is_stale=True)
    assert len(queue) == 1
    await queue.get()
    queue.failed("a", is_stale=True)  # nothing new: after the backoff
    assert len(queue) == 0
    queue.shut_down()


async def test_events_come_before_the_background_which_gets_its_turn() -> None:
    queue: WorkQueue[str] = WorkQueue()
    for n in range(20):
        queue.add(f"old {n}", background=True)
    for n in range(20):
        queue.add(f"new {n}")
    queue.add("old 19")  # something is known of it now
    queue.add("new 0", background=True)  # which takes nothing back
    assert len(queue) == 40
    order = [await queue.get() for _ in range(40)]
    assert [key for key in order[:23] if key is not None and key.startswith("old")] == [
        *("old 0", "old 1"),
        "old 19",
    ]
    assert len(set(order)) == 40
    assert len(queue) == 0


async def test_shut_down_lets_everyone_go() -> None:
    queue: WorkQueue[str] = WorkQueue()
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.shut_down()
    assert await waiting is None
    queue.add("a")
    assert await queue.get() is None
