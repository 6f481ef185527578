"""What the memory backend has beyond the contract: virtual time, and restores."""

from __future__ import annotations

import asyncio

import pytest

from lrm.testing import VirtualClock
from storage.base import Event
from storage.errors import NotFound, StoreReset
from storage.memory import MemoryStorage


async def test_a_watch_after_nothing_delivers_everything_from_the_beginning() -> None:
    store = MemoryStorage()
    entry = await store.create("/lrm/r/a", b"")
    async with store.watch("/lrm/r/", 0) as watch:
        assert (await anext(watch)).events == (Event("put", entry, None),)


async def test_leases_end_on_the_injected_clock_and_wake_who_watches() -> None:
    clock = VirtualClock()
    store = MemoryStorage(clock=clock)
    long, short = await store.grant_lease(100), await store.grant_lease(10)
    for name, lease in (("long", long), ("s1", short), ("s2", short)):
        await store.create(f"/lrm/leader/{name}", b"", lease=lease.id)
    async with store.watch("/lrm/leader/", await store.current_revision()) as watch:
        waiting = asyncio.create_task(anext(watch))
        await clock.advance(9)
        assert not waiting.done()
        await store.keep_alive(long.id)
        await clock.advance(1)
        assert waiting.done()
        assert [e.entry.key for e in (await waiting).events] == ["/lrm/leader/s1", "/lrm/leader/s2"]
        waiting = asyncio.create_task(anext(watch))
        await clock.advance(98)
        assert not waiting.done()
        await clock.advance(1)
        assert [e.entry.key for e in (await waiting).events] == ["/lrm/leader/long"]


async def test_a_lease_granted_later_may_end_sooner_than_the_one_waited_for() -> None:
    clock = VirtualClock()
    store = MemoryStorage(clock=clock)
    await store.grant_lease(100)
    async with store.watch("/lrm/", await store.current_revision()) as watch:
        waiting = asyncio.create_task(anext(watch))
        await clock.settle()
        lease = await store.grant_lease(1)
        await store.create("/elsewhere", b"", lease=lease.id)
        other = await store.grant_lease(2)
        await store.create("/lrm/a", b"", lease=other.id)
        assert (await waiting).events[0].kind == "put"
        waiting = asyncio.create_task(anext(watch))
        await clock.advance(2)
        assert (await waiting).events[0].kind == "delete"


async def test_a_restore_is_told_once_to_every_watch_and_waiter() -> None:
    store = MemoryStorage()
    await store.create("/lrm/r/a", b"old")
    before = store.snapshot()
    await store.create("/lrm/r/b", b"new")
    start = await store.current_revision()
    async with store.watch("/lrm/r/", start, live=True) as live, store.watch("/lrm/r/", start - 1) as behind:
        barrier = asyncio.create_task(live.barrier(30))
        await asyncio.sleep(0.01)
        store.restore(before)
        for waiting in (barrier, anext(live), anext(behind)):
            with pytest.raises(StoreReset):
                await waiting
    assert await store.current_revision() == before.revision < start
    with pytest.raises(NotFound):
        await store.get("/lrm/r/b")


async def test_a_restore_without_watches_is_told_to_the_next_caller_only() -> None:
    store = MemoryStorage()
    before = store.snapshot()
    await store.create("/lrm/r/a", b"")
    store.restore(before)
    with pytest.raises(StoreReset):
        await store.get("/lrm/r/a")
    with pytest.raises(NotFound):
        await store.get("/lrm/r/a")
