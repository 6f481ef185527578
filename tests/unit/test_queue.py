"""The work queue: order, one worker per key, delays and backoff, all on virtual time."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrm.queue import BACKOFF_FIRST, BACKOFF_MOST, WorkQueue
from lrm.testing import VirtualClock


def make(clock: VirtualClock | None = None) -> WorkQueue[str]:
    return WorkQueue(clock or VirtualClock(), spread=lambda: 0.5)


async def test_keys_come_in_order_and_once() -> None:
    queue = make()
    for key in ("a", "b", "a", "c"):
        queue.add(key)
    assert [await queue.get(), await queue.get(), await queue.get()] == ["a", "b", "c"]
    assert len(queue) == 0


async def test_a_key_in_hand_is_given_to_nobody_else_and_comes_again_if_added_meanwhile() -> None:
    queue = make()
    queue.add("a")
    assert await queue.get() == "a"
    queue.add("a")
    queue.add("a")
    assert len(queue) == 0
    queue.done("a")
    assert await queue.get() == "a"
    queue.done("a")
    assert len(queue) == 0


async def test_a_delay_ends_on_time_and_the_earliest_of_two_counts() -> None:
    clock = VirtualClock()
    queue = make(clock)
    queue.add_after("a", 10)
    queue.add_after("a", 3)
    queue.add_after("a", 7)
    taken = asyncio.create_task(queue.get())
    await clock.advance(2.9)
    assert not taken.done()
    assert queue.waiting == 1
    await clock.advance(0.2)
    assert await taken == "a"
    queue.done("a")
    await clock.advance(60)
    assert len(queue) == 0


async def test_an_add_overtakes_a_delay_and_cancels_it() -> None:
    clock = VirtualClock()
    queue = make(clock)
    queue.add_after("a", 10)
    queue.add("a")
    assert await queue.get() == "a"
    queue.done("a")
    again = asyncio.create_task(queue.get())
    await clock.advance(30)
    assert not again.done()
    queue.close()
    assert await again is None


async def test_backoff_doubles_from_200_ms_to_a_minute_and_success_resets_it() -> None:
    clock = VirtualClock()
    queue = make(clock)
    delays = []
    for _ in range(12):
        delays.append(queue.add_failed("a"))
        await clock.advance(delays[-1])
        assert await queue.get() == "a"
        queue.done("a")
    assert delays[:4] == [BACKOFF_FIRST, 0.4, 0.8, 1.6]
    assert delays[-1] == BACKOFF_MOST
    queue.forget_failures("a")
    assert queue.add_failed("a") == BACKOFF_FIRST


@pytest.mark.parametrize(("spread", "factor"), [(0.0, 0.8), (1.0, 1.2)])
async def test_backoff_is_spread_by_a_fifth(spread: float, factor: float) -> None:
    queue: WorkQueue[str] = WorkQueue(VirtualClock(), spread=lambda: spread)
    assert queue.add_failed("a") == pytest.approx(BACKOFF_FIRST * factor)


async def test_close_wakes_every_worker_and_adds_nothing_more() -> None:
    queue = make()
    workers = [asyncio.create_task(queue.get()) for _ in range(3)]
    await asyncio.sleep(0)
    queue.close()
    assert await asyncio.gather(*workers) == [None, None, None]
    queue.add("a")
    assert len(queue) == 0


async def test_of_many_waiting_workers_one_keeps_the_time_and_the_next_goes_on_when_it_is_cancelled() -> None:
    clock = VirtualClock()
    queue = make(clock)
    queue.add_after("late", 10)
    first, second, third = [asyncio.create_task(queue.get()) for _ in range(3)]
    await clock.advance(1)
    queue.add_after("early", 2)
    first.cancel()
    await clock.advance(2)
    assert second.done()
    assert await second == "early"
    assert not third.done()
    await clock.advance(7)
    assert third.done()
    assert await third == "late"


async def test_ages_are_told() -> None:
    clock = VirtualClock()
    queue = make(clock)
    queue.add("a")
    queue.add("b")
    await clock.advance(4)
    assert queue.oldest() == 4
    await queue.get()
    await clock.advance(2)
    assert queue.longest_running() == 2
    assert queue.processing == 1


async def test_a_cancelled_get_loses_no_key() -> None:
    queue = make()
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    waiting.cancel()
    queue.add("a")
    await asyncio.gather(waiting, return_exceptions=True)
    assert waiting.cancelled()
    assert await queue.get() == "a"


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "later", "fail", "get", "done", "tick"]), st.sampled_from("abc")), max_size=60
    )
)
def test_no_key_is_lost_or_in_two_hands(steps: list[tuple[str, str]]) -> None:
    """Whatever the order of calls, every added key is handed out after its last add, to one worker at a time."""

    async def scenario() -> None:
        clock = VirtualClock()
        queue = make(clock)
        owed: set[str] = set()
        in_hand: set[str] = set()
        for step, key in steps:
            match step:
                case "add":
                    queue.add(key)
                    owed.add(key)
                case "later":
                    queue.add_after(key, 5)
                    owed.add(key)
                case "fail":
                    queue.add_failed(key)
                    owed.add(key)
                case "tick":
                    await clock.advance(5)
                case "get":
                    task = asyncio.create_task(queue.get())
                    await clock.settle()
                    if not task.done():
                        task.cancel()
                        await asyncio.gather(task, return_exceptions=True)
                        continue
                    got = task.result()
                    assert got is not None
                    assert got not in in_hand
                    in_hand.add(got)
                    owed.discard(got)
                case "done":
                    if key in in_hand:
                        in_hand.remove(key)
                        queue.done(key)
        for key in list(in_hand):
            queue.done(key)
        await clock.advance(2 * BACKOFF_MOST)
        while owed:
            async with asyncio.timeout(30):
                got = await queue.get()
            assert got is not None
            owed.discard(got)
            queue.done(got)

    asyncio.run(scenario())
