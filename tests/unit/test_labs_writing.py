"""Many records are written side by side, but not all at once; one that cannot be written stops no other."""

from __future__ import annotations

import asyncio

import pytest

from controllers.labs.writing import AT_ONCE, Failures, write_each
from lrm.errors import NotLeading
from storage.errors import TooLarge, Unavailable


class Store:
    """Takes writes that end when they are let go, and remembers how many were under way."""

    def __init__(self) -> None:
        self.under_way = 0
        self.most = 0
        self.written: list[int] = []
        self.refused: dict[int, Exception] = {}
        self.answers = asyncio.Event()

    async def write(self, item: int) -> None:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await self.answers.wait()
            await asyncio.sleep(0)
            if item in self.refused:
                raise self.refused[item]
            self.written.append(item)
        finally:
            self.under_way -= 1

    async def run(self, count: int, gate: asyncio.Semaphore) -> Failures:
        failures = Failures()
        await write_each(range(count), str, self.write, failures, gate)
        return failures


async def test_a_worker_has_a_few_writes_under_way_and_no_more() -> None:
    store = Store()
    store.answers.set()
    assert not await store.run(100, asyncio.Semaphore(1000))
    assert store.most == AT_ONCE
    assert sorted(store.written) == list(range(100))


async def test_all_workers_together_have_no_more_than_the_gate_lets_through() -> None:
    store, gate = Store(), asyncio.Semaphore(10)
    async with asyncio.TaskGroup() as tasks:
        for _ in range(5):
            tasks.create_task(store.run(20, gate))
        for _ in range(50):
            await asyncio.sleep(0)
        store.answers.set()
    assert store.most == 10
    assert len(store.written) == 100


async def test_what_is_wrong_with_one_record_is_collected() -> None:
    store = Store()
    store.answers.set()
    store.refused[3] = TooLarge("too long")
    failures = await store.run(10, asyncio.Semaphore(1))
    assert failures.by_lab == {"3": "too long"}
    assert failures.sentence() == "1 lab could not be mirrored; 3: too long"
    assert sorted(store.written) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("error", [Unavailable("away"), NotLeading("another leads")])
async def test_what_is_wrong_with_everything_ends_it_at_once_and_leaves_nothing_under_way(error: Exception) -> None:
    store, gate = Store(), asyncio.Semaphore(4)
    store.answers.set()
    store.refused[0] = error
    with pytest.raises(type(error)):
        await store.run(1000, gate)
    assert len(store.written) < 100
    assert store.under_way == 0
    assert gate._value == 4, "the gate is as it was"
