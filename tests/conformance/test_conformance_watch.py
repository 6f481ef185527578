"""Promises 3, 7 and 9: a watch delivers every change once, in order, whole revisions; or raises."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from equipment.backends import Backend
from storage.base import Batch, Event, Storage, Watch
from storage.errors import Compacted, FutureRevision, InvalidKey, StoreReset, Unavailable


@asynccontextmanager
async def collecting(
    store: Storage, prefix: str, after: int, *, live: bool = False
) -> AsyncIterator[tuple[Watch, list[Batch]]]:
    """A watch and the list of batches that its consumer has been given so far."""
    batches = []
    async with store.watch(prefix, after, live=live) as watch:

        async def collect() -> None:
            async for batch in watch:
                batches.append(batch)  # noqa: PERF401 - the list is looked at while it grows

        task = asyncio.create_task(collect())
        try:
            yield watch, batches
        finally:
            task.cancel()
            await asyncio.wait({task})


def events(batches: list[Batch]) -> list[Event]:
    return [e for b in batches for e in b.events]


async def take(watch: Watch, count: int) -> list[Event]:
    """The next events, at least so many."""
    taken = []
    async with asyncio.timeout(30):
        while len(taken) < count:
            taken += (await anext(watch)).events
    return taken


async def test_a_watch_delivers_what_happened_since_a_revision_and_what_happens_then(
    backend: Backend, store: Storage
) -> None:
    a = await store.create(backend.key("a"), b"1")
    b = await store.create(backend.key("b"), b"1")
    async with store.watch(backend.prefix, a.revision) as watch:
        assert await take(watch, 1) == [Event("put", b, None)]
        a2 = await store.update(a.key, b"2", expected_revision=a.revision)
        deleted = await store.delete(b.key, expected_revision=b.revision)
        changed, gone = await take(watch, 2)
    assert changed == Event("put", a2, a)
    assert (gone.kind, gone.entry.key, gone.entry.revision, gone.entry.value) == ("delete", b.key, deleted, b"")
    assert gone.previous == b


async def test_a_watch_sees_nothing_outside_its_prefix(backend: Backend, store: Storage) -> None:
    start = await store.current_revision()
    for name in ("a", "a/1", "a/2", "a0", "b/1"):
        await store.create(backend.key(name), b"")
    async with store.watch(backend.key("a/"), start) as watch:
        assert [e.entry.key for e in await take(watch, 2)] == [backend.key("a/1"), backend.key("a/2")]


async def test_keys_that_change_at_one_revision_are_delivered_together(backend: Backend, store: Storage) -> None:
    lease = await store.grant_lease(60)
    start = await store.current_revision()
    for name in ("a", "b", "c"):
        await store.create(backend.key(name), b"", lease=lease.id)
    await store.create(f"{backend.root}/elsewhere", b"", lease=lease.id)
    await store.revoke(lease.id)
    async with store.watch(backend.prefix, start) as watch:
        batches = [await anext(watch) for _ in range(4)]
    assert [len(b.events) for b in batches] == [1, 1, 1, 3]
    assert {(e.kind, e.entry.key, e.entry.revision) for e in batches[3].events} == {
        ("delete", backend.key(name), batches[3].revision) for name in ("a", "b", "c")
    }


async def test_many_watchers_see_the_same_history_while_many_write(backend: Backend, store: Storage) -> None:
    start = await store.current_revision()
    choice = random.Random(7)
    names = [f"k{i}" for i in range(12)]

    async def write(client: Storage) -> None:
        for i in range(30):
            await client.set(backend.key(choice.choice(names)), str(i).encode())

    async with collecting(store, backend.prefix, start, live=True) as (live, seen_live):
        await asyncio.gather(*(write(backend.client(f"w{i}")) for i in range(4)))
        await live.barrier(10)
        async with store.watch(backend.prefix, start) as replay:
            seen_replay = await take(replay, 120)
    assert events(seen_live) == seen_replay
    revisions = [b.revision for b in seen_live]
    assert revisions == sorted(set(revisions)), "every revision once, in order"
    assert len(seen_replay) == 120


async def test_a_watch_from_each_point_of_history_brings_exactly_the_rest(backend: Backend, store: Storage) -> None:
    start = await store.current_revision()
    written = []
    for i in range(6):
        entry = await store.create(backend.key(f"k{i}"), b"")
        written.append((entry.key, entry.revision))
        written.append((entry.key, await store.delete(entry.key, expected_revision=entry.revision)))
    for after in range(start, written[-1][1]):
        async with store.watch(backend.prefix, after) as watch:
            rest = [w for w in written if w[1] > after]
            assert [(e.entry.key, e.entry.revision) for e in await take(watch, len(rest))] == rest


async def test_a_watch_after_a_compacted_revision_is_an_error(backend: Backend, store: Storage) -> None:
    entry = await store.create(backend.key("a"), b"")
    await store.set(backend.key("b"), b"")
    await store.set(backend.key("c"), b"")
    head = await store.current_revision()
    await store.compact(head)
    for after in (0, 1, entry.revision, head - 1):
        with pytest.raises(Compacted):
            async with store.watch(backend.prefix, after) as watch:
                await anext(watch)
    async with store.watch(backend.prefix, head) as watch:
        entry = await store.create(backend.key("d"), b"")
        assert await take(watch, 1) == [Event("put", entry, None)]


async def test_a_delete_exactly_at_the_compaction_revision_is_not_lost_in_silence(
    backend: Backend, store: Storage
) -> None:
    """Etcd before 3.4.36 and 3.5.18 delivers nothing and says nothing."""
    entry = await store.create(backend.key("a"), b"")
    await store.set(backend.key("b"), b"")
    before = await store.current_revision()
    deleted = await store.delete(entry.key, expected_revision=entry.revision)
    await store.compact(deleted)
    with pytest.raises(Compacted):
        async with store.watch(backend.prefix, before) as watch:
            await anext(watch)


async def test_compaction_under_a_live_watch_disturbs_it_not(backend: Backend, store: Storage) -> None:
    start = await store.current_revision()
    async with collecting(store, backend.prefix, start, live=True) as (watch, batches):
        for i in range(10):
            await store.set(backend.key("a"), str(i).encode())
            await watch.barrier()
            await store.compact(await store.current_revision())
        await watch.barrier()
    assert [e.entry.value for e in events(batches)] == [str(i).encode() for i in range(10)]


async def test_a_watch_after_a_revision_to_come_is_an_error_that_shows_the_head(
    backend: Backend, store: Storage
) -> None:
    head = await store.current_revision()
    with pytest.raises(FutureRevision) as caught:
        async with store.watch(backend.prefix, head + 1000):
            pass
    assert (caught.value.asked, caught.value.head) == (head + 1000, head)


async def test_a_barrier_returns_after_everything_that_others_wrote_before_it(backend: Backend, store: Storage) -> None:
    other = backend.client("other")
    async with collecting(store, backend.prefix, await store.current_revision(), live=True) as (watch, batches):
        for i in range(20):
            entry = await other.create(backend.key(f"k{i}"), b"")
            revision = await watch.barrier()
            assert revision > entry.revision
            assert events(batches)[-1].entry == entry
            assert batches[-1].revision == revision, "a revision without events tells how far the consumer is"
            assert batches[-1].events == ()


async def test_concurrent_barriers_share_writes(backend: Backend, store: Storage) -> None:
    async with collecting(store, backend.prefix, await store.current_revision(), live=True) as (watch, _):
        before = await store.current_revision()
        revisions = await asyncio.gather(*(watch.barrier() for _ in range(100)))
        assert await store.current_revision() - before <= 3
        assert min(revisions) > before


async def test_two_daemons_watch_one_prefix_and_each_has_its_own_barrier(backend: Backend, store: Storage) -> None:
    other = backend.client("two")
    start = await store.current_revision()
    async with (
        collecting(store, backend.prefix, start, live=True) as (one, seen_one),
        collecting(other, backend.prefix, start, live=True) as (two, seen_two),
    ):
        await asyncio.gather(one.barrier(), two.barrier())
        entry = await store.create(backend.key("a"), b"")
        await asyncio.gather(one.barrier(), two.barrier())
        assert events(seen_one) == events(seen_two) == [Event("put", entry, None)]


async def test_a_barrier_that_is_not_consumed_has_a_deadline(backend: Backend, store: Storage) -> None:
    async with store.watch(backend.prefix, await store.current_revision(), live=True) as watch:
        with pytest.raises(Unavailable):
            await watch.barrier(0.2)
        waiting = asyncio.create_task(watch.barrier(10))
        await anext(watch)
        await anext(watch)
        await waiting


async def test_a_barrier_waiter_hears_of_the_watchs_end(backend: Backend, store: Storage) -> None:
    async with store.watch(backend.prefix, await store.current_revision(), live=True) as watch:
        waiting = asyncio.create_task(watch.barrier(30))
        await asyncio.sleep(0.1)
    with pytest.raises(Unavailable):
        await waiting
    with pytest.raises(Unavailable):
        await watch.barrier()


async def test_a_cancelled_barrier_takes_no_other_with_it(backend: Backend, store: Storage) -> None:
    async with collecting(store, backend.prefix, await store.current_revision(), live=True) as (watch, _):
        waiting = [asyncio.create_task(watch.barrier(10)) for _ in range(10)]
        await asyncio.sleep(0)
        for task in waiting[::2]:
            task.cancel()
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(d, int) for d in done[1::2])
        assert all(isinstance(d, asyncio.CancelledError) for d in done[::2])


async def test_only_a_live_watch_on_a_folder_has_a_barrier(backend: Backend, store: Storage) -> None:
    start = await store.current_revision()
    async with store.watch(backend.prefix, start) as watch:
        with pytest.raises(RuntimeError, match="live"):
            await watch.barrier()
    with pytest.raises(InvalidKey):
        async with store.watch(backend.prefix.rstrip("/"), start, live=True):
            pass


async def test_a_new_epoch_ends_every_watch_once_and_the_store_goes_on(backend: Backend, store: Storage) -> None:
    start = await store.current_revision()
    async with (
        store.watch(backend.prefix, start, live=True) as live,
        store.watch(backend.prefix, start) as replay,
    ):
        await store.set(f"{backend.root}/epoch", b"two")
        with pytest.raises(StoreReset):
            await live.barrier()
        for watch in (live, replay):
            with pytest.raises(StoreReset):
                await anext(watch)
    async with collecting(store, backend.prefix, await store.current_revision(), live=True) as (watch, _):
        await watch.barrier()
    assert (await store.health()).epoch == "two"


async def test_a_cancelled_consumer_loses_no_event(backend: Backend, store: Storage) -> None:
    start = await store.current_revision()
    async with store.watch(backend.prefix, start) as watch:
        taken = []
        for i in range(20):
            waiting = asyncio.create_task(anext(watch))
            await asyncio.sleep(0)
            entry = await store.create(backend.key(f"k{i}"), b"")
            waiting.cancel()
            await asyncio.wait({waiting})
            if not waiting.cancelled():
                taken += waiting.result().events
        taken += await take(watch, 20 - len(taken))
        assert [e.entry.key for e in taken] == [backend.key(f"k{i}") for i in range(20)]
        assert taken[-1].entry == entry


async def test_old_barrier_keys_can_be_deleted_and_watchers_are_not_bothered(backend: Backend, store: Storage) -> None:
    """The compactor removes those of daemons that are gone."""
    start = await store.current_revision()
    async with collecting(store, backend.prefix, start, live=True) as (watch, batches):
        await watch.barrier()
        (left,) = (await store.list(f"{backend.prefix}.barrier/")).entries
        deleted = await store.delete(left.key, expected_revision=left.revision)
        await watch.barrier()
    assert deleted in [b.revision for b in batches]
    assert events(batches) == []
