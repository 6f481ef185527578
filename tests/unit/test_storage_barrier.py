"""One barrier write serves all who asked before it began, and nobody is served by an earlier one."""

from __future__ import annotations

import asyncio

import pytest

from lrm.testing import VirtualClock
from storage.barrier import Barriers
from storage.errors import StoreReset, Unavailable


class Store:
    """Writes that finish when told to."""

    def __init__(self) -> None:
        self.revision = 100
        self.gates: list[asyncio.Future[None]] = []

    async def write(self) -> int:
        gate = asyncio.get_running_loop().create_future()
        self.gates.append(gate)
        await gate
        self.revision += 1
        return self.revision


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


async def test_who_asks_during_a_write_is_served_by_the_next_one(clock: VirtualClock) -> None:
    store = Store()
    barriers = Barriers(store.write, clock, 100)
    first = asyncio.create_task(barriers.wait(3))
    await clock.settle()
    later = [asyncio.create_task(barriers.wait(3)) for _ in range(5)]
    await clock.settle()
    store.gates[0].set_result(None)
    await clock.settle()
    barriers.delivered(101)
    assert await first == 101
    assert not any(task.done() for task in later)
    store.gates[1].set_result(None)
    await clock.settle()
    barriers.delivered(102)
    assert await asyncio.gather(*later) == [102] * 5
    assert len(store.gates) == 2


async def test_a_write_is_not_enough_until_its_revision_was_delivered(clock: VirtualClock) -> None:
    store = Store()
    barriers = Barriers(store.write, clock, 100)
    waiting = asyncio.create_task(barriers.wait(3))
    await clock.settle()
    store.gates[0].set_result(None)
    await clock.settle()
    assert (waiting.done(), barriers.pending) == (False, 1)
    await clock.advance(3)
    with pytest.raises(Unavailable):
        await waiting
    assert barriers.pending == 0


async def test_a_cancelled_writer_is_replaced_by_the_next_in_line(clock: VirtualClock) -> None:
    store = Store()
    barriers = Barriers(store.write, clock, 100)
    writer = asyncio.create_task(barriers.wait(3))
    await clock.settle()
    joined = [asyncio.create_task(barriers.wait(3)) for _ in range(3)]
    await clock.settle()
    writer.cancel()
    await clock.settle()
    assert len(store.gates) == 2
    store.gates[1].set_result(None)
    await clock.settle()
    barriers.delivered(101)
    assert await asyncio.gather(*joined) == [101] * 3
    assert writer.cancelled()


async def test_the_end_reaches_waiters_in_the_line_and_behind_it(clock: VirtualClock) -> None:
    store = Store()
    barriers = Barriers(store.write, clock, 100)
    waiting = [asyncio.create_task(barriers.wait(30))]
    await clock.settle()
    waiting += [asyncio.create_task(barriers.wait(30)) for _ in range(2)]
    await clock.settle()
    barriers.end(StoreReset("over"))
    store.gates[0].set_result(None)
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(r) for r in results] == [StoreReset] * 3
    with pytest.raises(StoreReset):
        await barriers.wait(3)
    assert len(store.gates) == 1
