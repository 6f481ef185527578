"""The cache: one picture at one revision, where only a DELETE or absence from a complete list is a deletion."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
from structlog.testing import capture_logs

from equipment.widget import NOTES, WIDGETS, Note, Widget, registry, widget
from lrm.cache import Cache, CacheUpdate
from lrm.client import Client
from lrm.errors import CacheBehind
from lrm.testing import VirtualClock
from storage.base import Page, Watch
from storage.clock import SystemClock
from storage.errors import StoreReset, Unavailable
from storage.memory import MemoryStorage


@asynccontextmanager
async def running(storage: MemoryStorage) -> AsyncIterator[tuple[Cache, Client, list[CacheUpdate]]]:
    cache = Cache(storage, registry(), SystemClock())
    updates: list[CacheUpdate] = []
    cache.subscribe(updates.append)
    task = asyncio.create_task(cache.run())
    try:
        async with asyncio.timeout(30):
            await cache.wait_synced()
            while cache.error:
                await asyncio.sleep(0)
        yield cache, Client(storage, registry(), SystemClock(), owner="widgets"), updates
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_it_lists_then_follows_every_kind_at_one_revision() -> None:
    storage = MemoryStorage()
    first = await Client(storage, registry(), SystemClock()).create(widget("before"))
    async with running(storage) as (cache, client, _):
        assert cache.get(Widget, "default", "before") == first
        second = await client.create(widget("after", labTrack="ccnp"))
        await cache.wait_for(second.revision)
        assert [w.name for w in cache.all(Widget)] == ["after", "before"]
        assert cache.all(Note) == []
        assert [w.name for w in cache.by_index(Widget, "track", "ccnp")] == ["after"]
        await client.delete(second)
        assert await cache.barrier(30) > second.revision
        assert cache.get(Widget, "default", "after") is None
        assert cache.by_index(Widget, "track", "ccnp") == []


async def test_indexes_follow_labels_and_owners() -> None:
    async with running(MemoryStorage()) as (cache, client, _):
        owner = await client.create(widget("owner"))
        child = widget("child")
        child.metadata.owner_references = [owner.as_owner()]
        child.metadata.labels = {"tier": "one"}
        child = await client.create(child)
        await cache.wait_for(child.revision)
        assert [w.name for w in cache.by_index(Widget, "owner", owner.uid)] == ["child"]
        assert [w.name for w in cache.by_index(Widget, "label", "tier=one")] == ["child"]
        moved = await client.update(child, lambda w: w.metadata.labels.update(tier="two"))
        assert moved
        await cache.wait_for(moved.revision)
        assert cache.by_index(Widget, "label", "tier=one") == []


async def test_changes_carry_old_and_new_and_a_replaced_incarnation_is_two() -> None:
    async with running(MemoryStorage()) as (cache, client, updates):
        made = await client.create(widget())
        changed = await client.update(made, lambda w: setattr(w.spec, "count", 5))
        assert changed
        await client.delete(changed)
        await cache.barrier(30)
        kinds = [c.type for u in updates for c in u.changes]
        assert kinds == ["ADDED", "MODIFIED", "DELETED"]
        assert [u.revision for u in updates if u.changes] == sorted(u.revision for u in updates if u.changes)


async def test_what_cannot_be_decoded_stays_as_an_opaque_item_and_unknown_kinds_are_skipped() -> None:
    storage = MemoryStorage()
    await storage.create("/lrm/r/widgets/default/broken", b"{not json")
    await storage.create("/lrm/r/gadgets/default/other", b"{}")
    async with running(storage) as (cache, client, _):
        item = cache.item(WIDGETS, "default", "broken")
        assert item
        assert item.resource is None
        assert "broken" in item.error
        assert cache.all(Widget) == []
        assert cache.undecodable == 1
        healed = await storage.set("/lrm/r/widgets/default/broken", WIDGETS.encode(widget("broken")))
        await cache.wait_for(healed)
        assert cache.undecodable == 0
        revision = await storage.set("/lrm/r/widgets/default/broken", b"[]")
        await cache.wait_for(revision)
        assert cache.undecodable == 1
        assert client is not None


async def test_compaction_under_a_stopped_watch_is_survived_by_a_list_that_tells_the_difference() -> None:
    storage = MemoryStorage()
    async with running(storage) as (cache, client, updates):
        kept = await client.create(widget("kept"))
        gone = await client.create(widget("gone"))
        await cache.wait_for(gone.revision)
        updates.clear()
        snapshot = storage.snapshot()
        await client.delete(gone)
        await client.create(widget("new"))
        await cache.barrier(30)
        storage.restore(snapshot)
        async with asyncio.timeout(30):
            while not any(u.relisted for u in updates):
                await asyncio.sleep(0.01)
            while cache.error:
                await asyncio.sleep(0.01)
        assert {w.name for w in cache.all(Widget)} == {"kept", "gone"}
        relist = next(u for u in updates if u.relisted)
        assert {(c.type, c.item.name) for c in relist.changes} >= {("ADDED", "gone"), ("DELETED", "new")}
        assert kept.name == "kept"


async def test_waiters_hear_of_a_reset_store() -> None:
    storage = MemoryStorage()
    async with running(storage) as (cache, client, _):
        snapshot = storage.snapshot()
        made = await client.create(widget())
        await cache.wait_for(made.revision)
        waiting = asyncio.create_task(cache.wait_for(made.revision + 1000, timeout=5))
        await asyncio.sleep(0)
        storage.restore(snapshot)
        with pytest.raises(StoreReset):
            await waiting


async def test_a_wait_has_a_deadline_and_says_where_the_cache_is() -> None:
    async with running(MemoryStorage()) as (cache, _, _):
        with pytest.raises(CacheBehind, match="not yet at 999999"):
            await cache.wait_for(999_999, timeout=0.3)


async def test_a_revision_outside_the_prefix_is_reached_by_a_barrier() -> None:
    storage = MemoryStorage()
    async with running(storage) as (cache, _, _):
        revision = await storage.set("/lrm/elsewhere", b"x")
        await cache.wait_for(revision)
        assert cache.revision > revision


class FailingLists(MemoryStorage):
    """A store whose lists fail a few times, or break off after the first page."""

    failures = 2

    async def list(self, prefix: str, *, limit: int = 0, continue_token: str = "", revision: int = 0) -> Page:
        if self.failures:
            type(self).failures -= 1
            raise Unavailable("down")
        return await super().list(prefix, limit=limit, continue_token=continue_token, revision=revision)


async def test_a_failed_list_changes_nothing_and_is_retried() -> None:
    storage = FailingLists()
    await Client(storage, registry(), SystemClock()).create(widget())
    clock = VirtualClock()
    cache = Cache(storage, registry(), clock)
    seen: list[CacheUpdate] = []
    cache.subscribe(seen.append)
    task = asyncio.create_task(cache.run())
    await clock.advance(0.1)
    assert (cache.synced, seen) == (False, [])
    assert cache.error == "down"
    await clock.advance(5)
    assert cache.synced
    assert [w.name for w in cache.all(Widget)] == ["w1"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_keys_of_another_depth_are_no_objects() -> None:
    assert registry().parse_key("/lrm/r/widgets/default/a/b")[0] is None
    assert registry().parse_key("/lrm/rx/widgets/default/a")[0] is None
    assert registry().parse_key("/lrm/r/notes/ns/a") == (NOTES, "ns", "a")


async def test_between_a_reset_and_its_list_no_revision_of_the_former_line_counts() -> None:
    """A low revision of the new line must not be answered from what the cache held of the old one."""
    storage = MemoryStorage()
    async with running(storage) as (cache, client, updates):
        snapshot = storage.snapshot()
        for i in range(20):
            made = await client.create(widget(f"w{i}"))
        await cache.wait_for(made.revision)
        storage.restore(snapshot)
        async with asyncio.timeout(30):
            while cache.current:
                await asyncio.sleep(0)
        assert cache.revision >= made.revision
        await cache.wait_for(snapshot.revision)
        assert any(u.reset for u in updates)
        assert cache.all(Widget) == []


class Cut(MemoryStorage):
    """A store that takes no live watch for a while."""

    cut = False

    def watch(self, prefix: str, after_revision: int, *, live: bool = False) -> AbstractAsyncContextManager[Watch]:
        if live and self.cut:
            raise Unavailable("no member answers")
        return super().watch(prefix, after_revision, live=live)


async def test_a_reset_that_another_was_told_of_is_noticed_though_revisions_have_grown_past_ours() -> None:
    storage = Cut()
    async with running(storage) as (cache, client, updates):
        snapshot = storage.snapshot()
        lost = await client.create(widget("lost"))
        await cache.wait_for(lost.revision)
        storage.cut = True
        for watch in tuple(storage._watches):
            watch.end(Unavailable("the connection was lost"))
        async with asyncio.timeout(30):
            while not cache.error:
                await asyncio.sleep(0)
        storage.restore(snapshot)
        with pytest.raises(StoreReset):
            await storage.current_revision()
        kept = [await client.create(widget(f"w{i}")) for i in range(5)]
        assert kept[-1].revision > cache.revision
        storage.cut = False
        async with asyncio.timeout(30):
            while not any(u.reset for u in updates):
                await asyncio.sleep(0.01)
        assert [w.name for w in cache.all(Widget)] == [w.name for w in kept]


async def test_a_subscribers_mistake_costs_nobody_else_and_it_is_told_that_it_missed_something() -> None:
    heard: list[CacheUpdate] = []

    def mistaken(update: CacheUpdate) -> None:
        heard.append(update)
        if update.changes:
            raise OverflowError("date value out of range")

    async with running(MemoryStorage()) as (cache, client, updates):
        end = cache.subscribe(mistaken)
        later: list[CacheUpdate] = []
        cache.subscribe(later.append)
        with capture_logs() as logs:
            for name in ("one", "two"):
                made = await client.create(widget(name))
                await cache.wait_for(made.revision, 30)
        end()
        names = [[c.item.name for u in found for c in u.changes] for found in (updates, later, heard)]
        assert names == [["one", "two"]] * 3
        assert [bool(u.changes) for u in heard if u.changes or u.missed] == [True, False] * 2
        assert all(u.relisted for u in heard if u.missed)
        assert [entry["event"] for entry in logs] == ["cache.mistake"], "each is logged once"
        assert not cache.error
