"""The history ring: every change once, in order, whole revisions; or an end that says to list again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipment.api import SIGHTING, TELESCOPE, Telescope, telescope
from lrm.cache import Cache, CacheUpdate, Change, Item
from lrm.client import Client
from lrm.errors import CacheBehind, HistoryGone
from lrm.fanout import Delivery, Fanout, RingLimits, Subscription
from lrm.registry import Registry
from lrm.testing import VirtualClock
from storage.base import Entry
from storage.memory import MemoryStorage


@dataclass
class World:
    clock: VirtualClock
    storage: MemoryStorage
    registry: Registry
    cache: Cache
    fanout: Fanout
    client: Client

    async def make(self, name: str, site: str = "orbit", **labels: str) -> int:
        made = await self.client.create(Telescope.model_validate(telescope(name, site, labels=labels)))
        await self.caught_up(made.revision)
        return made.revision

    async def label(self, name: str, **labels: str) -> int:
        current = await self.client.get(Telescope, "default", name)
        changed = await self.client.update(current, lambda t: t.metadata.labels.update(labels))
        assert changed
        await self.caught_up(changed.revision)
        return changed.revision

    async def remove(self, name: str) -> int:
        await self.client.delete(await self.client.get(Telescope, "default", name))
        await self.caught_up(self.client.written.highest)
        return self.client.written.highest

    async def caught_up(self, revision: int) -> None:
        await self.clock.settle()
        assert self.cache.revision >= revision

    def put(self, revision: int, *names: str) -> None:
        """One revision that carries several changes, as a group commit makes it, straight from the cache."""
        changes = []
        for name in names:
            entry = Entry(self.registry.key(TELESCOPE, "default", name), b"{}", revision, revision)
            made = Telescope.model_validate(telescope(name))
            changes.append(Change("ADDED", TELESCOPE, revision, None, Item(TELESCOPE, "default", name, entry, made)))
        self.cache._publish(CacheUpdate(revision, tuple(changes)))


@asynccontextmanager
async def a_world(limits: RingLimits | None = None, storage: MemoryStorage | None = None) -> AsyncIterator[World]:
    clock = VirtualClock()
    storage = storage or MemoryStorage(clock=clock)
    registry = Registry([TELESCOPE, SIGHTING])
    cache = Cache(storage, registry, clock)
    fanout = Fanout(cache, clock, limits=limits or RingLimits())
    task = asyncio.create_task(cache.run())
    await clock.settle()
    assert cache.synced
    try:
        yield World(clock, storage, registry, cache, fanout, Client(storage, registry, clock))
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def soon(clock: VirtualClock, subscription: Subscription) -> Delivery:
    """The next delivery, which must not need time to pass."""
    task = asyncio.create_task(anext(subscription))  # type: ignore[arg-type]
    await clock.settle()
    if not task.done():
        task.cancel()
        pytest.fail("nothing was delivered")
    return task.result()


def told(delivery: Delivery) -> list[tuple[str, str, int]]:
    return [(e.type, e.item.name, e.revision) for e in delivery.events]


async def test_changes_come_in_order_with_their_revisions() -> None:
    async with a_world() as w, w.fanout.subscribe(TELESCOPE, after_revision=w.cache.revision, repeat=False) as changes:
        one, two, three = await w.make("a"), await w.label("a", x="1"), await w.remove("a")
        assert told(await soon(w.clock, changes)) == [("ADDED", "a", one)]
        assert told(await soon(w.clock, changes)) == [("MODIFIED", "a", two)]
        assert told(await soon(w.clock, changes)) == [("DELETED", "a", three)]


async def test_a_deletion_shows_the_last_state() -> None:
    async with a_world() as w, w.fanout.subscribe(TELESCOPE, after_revision=w.cache.revision, repeat=False) as changes:
        await w.make("a", x="1")
        await w.remove("a")
        await soon(w.clock, changes)
        [gone] = (await soon(w.clock, changes)).events
        assert gone.item.resource is not None
        assert gone.item.resource.metadata.labels == {"x": "1"}


async def test_other_kinds_and_namespaces_are_not_shown() -> None:
    async with a_world() as w:
        start = w.cache.revision
        await w.make("a")
        async with w.fanout.subscribe(SIGHTING, after_revision=start) as sightings:
            assert told(await _bookmark(w, sightings)) == []
        async with w.fanout.subscribe(TELESCOPE, "elsewhere", after_revision=start) as elsewhere:
            assert told(await _bookmark(w, elsewhere)) == []


async def _bookmark(w: World, subscription: Subscription) -> Delivery:
    task = asyncio.create_task(anext(subscription))  # type: ignore[arg-type]
    await w.clock.advance(15.1)
    return await task


async def test_bookmarks_come_every_15_s_at_the_head_even_when_nothing_of_the_kind_happens() -> None:
    async with a_world() as w, w.fanout.subscribe(SIGHTING, after_revision=w.cache.revision) as changes:
        head = await w.make("a")
        first = await _bookmark(w, changes)
        assert (first.revision, first.events) == (head, ())
        barrier = await asyncio.create_task(w.cache.barrier(30))
        second = await _bookmark(w, changes)
        assert second.revision == barrier > head


async def test_entering_a_selection_is_added_and_leaving_it_is_deleted() -> None:
    async with a_world() as w:

        def selector(resource: Any) -> bool:
            return bool(resource.metadata.labels.get("on") == "yes")

        async with w.fanout.subscribe(TELESCOPE, "", selector, w.cache.revision, repeat=False) as changes:
            await w.make("a", on="no")
            enters = await w.label("a", on="yes")
            stays = await w.label("a", y="z")
            leaves = await w.label("a", on="no")
            await w.remove("a")
            assert told(await soon(w.clock, changes)) == [("ADDED", "a", enters)]
            assert told(await soon(w.clock, changes)) == [("MODIFIED", "a", stays)]
            [gone] = (await soon(w.clock, changes)).events
            assert (gone.type, gone.revision) == ("DELETED", leaves)
            assert gone.item.resource is not None
            assert gone.item.resource.metadata.labels["on"] == "yes"
            assert told(await _bookmark(w, changes)) == []


async def test_siblings_of_a_shared_revision_come_together_and_are_repeated_to_who_starts_there() -> None:
    """An event's resourceVersion does not prove that its siblings were seen."""
    async with a_world() as w:
        await w.make("z")
        w.put(100, "a", "b", "c")
        w.put(101, "d")
        async with w.fanout.subscribe(TELESCOPE, after_revision=100) as changes:
            assert told(await soon(w.clock, changes)) == [("ADDED", n, 100) for n in "abc"]
            assert told(await soon(w.clock, changes)) == [("ADDED", "d", 101)]
        async with w.fanout.subscribe(TELESCOPE, after_revision=101) as changes:
            assert told(await _bookmark(w, changes)) == []
        async with w.fanout.subscribe(TELESCOPE, after_revision=100, repeat=False) as changes:
            assert told(await soon(w.clock, changes)) == [("ADDED", "d", 101)]


async def test_history_before_the_ring_is_replayed_from_the_store_and_joined_without_gap_or_repeat() -> None:
    storage = MemoryStorage()
    async with a_world(storage=storage) as w:
        revisions = [await w.make(f"t{i}") for i in range(5)] + [await w.remove("t0")]
    async with a_world(storage=storage) as w:
        assert w.fanout.floor >= revisions[-1]
        async with w.fanout.subscribe(TELESCOPE, after_revision=revisions[1]) as changes:
            later = await w.make("later")
            names = [told(await soon(w.clock, changes))[0] for _ in range(5)]
        expected = [("ADDED", f"t{i}", revisions[i]) for i in range(2, 5)]
        assert names == [*expected, ("DELETED", "t0", revisions[5]), ("ADDED", "later", later)]


async def test_a_replay_knows_what_entered_and_left_a_selection() -> None:
    storage = MemoryStorage()
    async with a_world(storage=storage) as w:
        start = await w.make("a", on="no")
        enters, leaves = await w.label("a", on="yes"), await w.label("a", on="no")
    async with a_world(storage=storage) as w:

        def selector(resource: Any) -> bool:
            return bool(resource.metadata.labels.get("on") == "yes")

        async with w.fanout.subscribe(TELESCOPE, "", selector, start) as changes:
            assert told(await soon(w.clock, changes)) == [("ADDED", "a", enters)]
            assert told(await soon(w.clock, changes)) == [("DELETED", "a", leaves)]


async def test_a_start_at_the_rings_floor_looks_for_siblings_in_the_store() -> None:
    storage = MemoryStorage()
    async with a_world(storage=storage) as w:
        await w.make("a")
        both = storage._commit(
            [
                (
                    w.registry.key(TELESCOPE, "default", n),
                    (await storage.get(w.registry.key(TELESCOPE, "default", "a"))).value,
                    0,
                )
                for n in ("a", "b")
            ]
        )
    async with a_world(storage=storage) as w:
        assert w.fanout.floor == both
        async with w.fanout.subscribe(TELESCOPE, after_revision=both) as changes:
            assert [(kind, revision) for kind, _, revision in told(await soon(w.clock, changes))] == [
                ("MODIFIED", both),
                ("ADDED", both),
            ]
            assert told(await _bookmark(w, changes)) == []


async def test_compacted_history_ends_a_replay_before_it_begins() -> None:
    storage = MemoryStorage()
    async with a_world(storage=storage) as w:
        start = await w.make("a")
        await w.make("b")
        await storage.compact(await w.make("c"))
    async with a_world(storage=storage) as w:
        with pytest.raises(HistoryGone):
            async with w.fanout.subscribe(TELESCOPE, after_revision=start):
                pytest.fail("it was opened")


async def test_a_revision_that_has_not_happened_is_refused() -> None:
    async with a_world() as w:
        with pytest.raises(HistoryGone, match="has not happened"):
            async with w.fanout.subscribe(TELESCOPE, after_revision=w.cache.revision + 1):
                pytest.fail("it was opened")


async def test_nobody_subscribes_to_a_cache_that_is_not_filled() -> None:
    clock = VirtualClock()
    cache = Cache(MemoryStorage(clock=clock), Registry([TELESCOPE]), clock)
    with pytest.raises(CacheBehind):
        async with Fanout(cache, clock).subscribe(TELESCOPE):
            pytest.fail("it was opened")


async def test_a_relist_ends_every_subscription_and_what_came_before_it() -> None:
    """What happened in the gap is not known change by change, so nobody may believe to have seen it."""
    async with a_world() as w:
        start = await w.make("a")
        async with w.fanout.subscribe(TELESCOPE, after_revision=start) as changes:
            waiting = asyncio.create_task(anext(changes))  # type: ignore[arg-type]
            await w.clock.settle()
            w.cache._publish(CacheUpdate(start + 50, (), relisted=True))
            await w.clock.settle()
            with pytest.raises(HistoryGone):
                waiting.result()
        with pytest.raises(HistoryGone):
            async with w.fanout.subscribe(TELESCOPE, after_revision=start):
                pytest.fail("it was opened")
        async with w.fanout.subscribe(TELESCOPE, after_revision=start + 50, repeat=False) as changes:
            w.put(start + 51, "b")
            assert told(await soon(w.clock, changes)) == [("ADDED", "b", start + 51)]


async def test_a_restored_store_ends_every_subscription() -> None:
    async with a_world() as w:
        await w.make("a")
        snapshot = w.storage.snapshot()
        await w.make("b")
        async with w.fanout.subscribe(TELESCOPE, after_revision=w.cache.revision) as changes:
            waiting = asyncio.create_task(anext(changes))  # type: ignore[arg-type]
            await w.clock.settle()
            w.storage.restore(snapshot)
            await w.clock.advance(1)
            with pytest.raises(HistoryGone):
                waiting.result()


async def test_a_reader_that_falls_out_of_the_ring_is_told_and_others_are_not_hurt() -> None:
    async with (
        a_world(RingLimits(seconds=0, least=10, most=100)) as w,
        w.fanout.subscribe(TELESCOPE, after_revision=w.cache.revision, repeat=False) as slow,
        w.fanout.subscribe(TELESCOPE, after_revision=w.cache.revision, repeat=False) as quick,
    ):
        w.put(100, "first")
        assert told(await soon(w.clock, slow)) == [("ADDED", "first", 100)]
        await soon(w.clock, quick)
        for revision in range(101, 401):
            w.put(revision, f"t{revision}")
            assert told(await soon(w.clock, quick)) == [("ADDED", f"t{revision}", revision)]
        with pytest.raises(HistoryGone, match="too slow"):
            await soon(w.clock, slow)


async def test_a_reader_within_the_ring_is_replayed_everything_it_missed() -> None:
    async with a_world() as w, w.fanout.subscribe(TELESCOPE, after_revision=w.cache.revision, repeat=False) as slow:
        for revision in range(100, 1600):
            w.put(revision, f"t{revision}")
        assert [told(await soon(w.clock, slow))[0][2] for _ in range(1500)] == list(range(100, 1600))


async def test_the_ring_keeps_what_is_young_and_at_least_and_at_most_so_much() -> None:
    async with a_world(RingLimits(seconds=75, least=200, most=1000)) as w:
        for revision in range(100, 1000):
            w.put(revision, "t")
        assert w.fanout.floor < 100, "young history stays"
        await w.clock.advance(76)
        for revision in range(1000, 1000 + 64):
            w.put(revision, "t")
        held = w.fanout.head - w.fanout.floor
        assert 200 <= held < 200 + 2 * 64, "old history goes, down to the least"
        for revision in range(2000, 5000):
            w.put(revision, "t")
        assert len(w.fanout._ring) == 1000, "never more than the most, however young"
        assert w.fanout.floor == 3999


async def test_one_revision_larger_than_the_ring_is_kept_whole() -> None:
    async with (
        a_world(RingLimits(seconds=0, least=1, most=10)) as w,
        w.fanout.subscribe(TELESCOPE, after_revision=w.cache.revision, repeat=False) as changes,
    ):
        w.put(100, *(f"t{i}" for i in range(50)))
        assert len((await soon(w.clock, changes)).events) == 50


async def test_what_cannot_be_decoded_is_neither_announced_nor_reported_gone() -> None:
    async with a_world() as w, w.fanout.subscribe(TELESCOPE, after_revision=w.cache.revision, repeat=False) as changes:
        await w.make("a")
        await soon(w.clock, changes)
        key = w.registry.key(TELESCOPE, "default", "a")
        await w.storage.set(key, b"not json")
        assert told(await _bookmark(w, changes)) == []
        await w.storage.delete(key, expected_revision=w.cache.revision)
        assert [t[:2] for t in told(await soon(w.clock, changes))] == [("DELETED", "a")]


async def test_an_object_that_becomes_readable_again_is_told_to_all_who_may_have_known_it() -> None:
    async with a_world() as w:

        def selector(resource: Any) -> bool:
            return bool(resource.metadata.labels.get("on") == "yes")

        await w.make("a", on="yes")
        key = w.registry.key(TELESCOPE, "default", "a")
        no = (await w.storage.get(key)).value.replace(b'"yes"', b'"no"')
        async with w.fanout.subscribe(TELESCOPE, "", selector, w.cache.revision) as changes:
            await w.storage.set(key, b"not json")
            revision = await w.storage.set(key, no)
            assert told(await soon(w.clock, changes)) == [("DELETED", "a", revision)]


async def test_stopping_ends_all_iterations() -> None:
    async with a_world() as w, w.fanout.subscribe(TELESCOPE, after_revision=w.cache.revision) as changes:
        ended = asyncio.create_task(_all(changes))
        await w.clock.settle()
        w.fanout.stop()
        await w.clock.settle()
        assert ended.done()
        assert ended.result() == []


async def _all(changes: Subscription) -> list[Delivery]:
    return [delivery async for delivery in changes]


async def test_a_cancelled_reader_leaves_nothing_behind_and_loses_nothing() -> None:
    async with a_world() as w, w.fanout.subscribe(TELESCOPE, after_revision=w.cache.revision, repeat=False) as changes:
        waiting = asyncio.create_task(anext(changes))  # type: ignore[arg-type]
        await w.clock.settle()
        waiting.cancel()
        await w.clock.settle()
        made = await w.make("a")
        assert told(await soon(w.clock, changes)) == [("ADDED", "a", made)]


async def test_a_reader_that_takes_a_replay_too_slowly_gives_its_place_up() -> None:
    storage = MemoryStorage()
    async with a_world(storage=storage) as w:
        start = await w.make("a")
        await w.make("b")
        await w.make("c")
    async with a_world(storage=storage) as w, w.fanout.subscribe(TELESCOPE, after_revision=start) as changes:
        assert len((await soon(w.clock, changes)).events) == 1
        await w.clock.advance(241)
        with pytest.raises(HistoryGone, match="too slow"):
            await soon(w.clock, changes)


async def test_four_replays_at_once_and_the_fifth_is_told_in_time() -> None:
    storage = MemoryStorage()
    async with a_world(storage=storage) as w:
        start = await w.make("a")
        await w.make("b")
    async with a_world(storage=storage) as w:
        held = [w.fanout.subscribe(TELESCOPE, after_revision=start) for _ in range(4)]
        for each in held:
            await each.__aenter__()
        fifth = asyncio.create_task(w.fanout.subscribe(TELESCOPE, after_revision=start).__aenter__())
        await w.clock.advance(29)
        assert not fifth.done()
        await w.clock.advance(2)
        with pytest.raises(HistoryGone, match="too many"):
            fifth.result()
        for each in held:
            await each.__aexit__(None, None, None)
        async with w.fanout.subscribe(TELESCOPE, after_revision=start) as changes:
            assert len((await soon(w.clock, changes)).events) == 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["put", "delete"])), min_size=1, max_size=30),
    st.integers(0, 30),
    st.integers(0, 30),
)
async def test_whoever_follows_from_any_revision_ends_with_the_stores_state(
    steps: list[tuple[str, str]], start: int, restart: int
) -> None:
    """Present state at a revision plus the changes after it is the present state at the end, replays included."""
    storage = MemoryStorage()
    states: list[tuple[int, frozenset[str]]] = []
    async with a_world(storage=storage) as w:
        present: set[str] = set()
        for name, what in steps[: restart + 1]:
            states.append((await _step(w, present, name, what), frozenset(present)))
    async with a_world(storage=storage) as w:
        for name, what in steps[restart + 1 :]:
            states.append((await _step(w, present, name, what), frozenset(present)))
        revision, known = states[min(start, len(states) - 1)]
        seen = set(known)
        async with w.fanout.subscribe(TELESCOPE, after_revision=max(revision, 1)) as changes:
            while changes.revision < states[-1][0]:
                for event in (await _within(w, changes)).events:
                    if event.type == "DELETED":
                        seen.remove(event.item.name)
                    else:
                        assert (event.type == "ADDED") is (event.item.name not in seen)
                        seen.add(event.item.name)
        assert seen == present


async def _within(w: World, changes: Subscription) -> Delivery:
    task = asyncio.create_task(anext(changes))  # type: ignore[arg-type]
    await w.clock.advance(16)
    return await task


async def _step(w: World, present: set[str], name: str, what: str) -> int:
    if what == "put":
        changed = name in present
        present.add(name)
        return await (w.label(name, n=str(w.cache.revision)) if changed else w.make(name))
    if name in present:
        present.remove(name)
        return await w.remove(name)
    return w.cache.revision
