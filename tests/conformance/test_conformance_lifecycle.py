"""Leases, health, and promises 6 and 10: nothing is left of a call that was cancelled or a store that was closed."""

from __future__ import annotations

import asyncio
import gc

import pytest

from equipment.backends import Backend
from equipment.footprint import Footprint
from equipment.waiting import until
from storage.base import Storage
from storage.errors import LeaseNotFound, NotFound, StoreReset, Unavailable


async def test_a_leases_keys_go_with_it_and_keeping_it_alive_keeps_them(backend: Backend, store: Storage) -> None:
    short, kept = await store.grant_lease(1), await store.grant_lease(1)
    start = await store.current_revision()
    await store.create(backend.key("short"), b"", lease=short.id)
    entry = await store.create(backend.key("kept"), b"", lease=kept.id)
    assert entry.lease == kept.id
    assert short.ttl >= 1

    async def gone() -> bool:
        assert await store.keep_alive(kept.id) == kept.ttl
        return not await store.exists(backend.key("short"))

    await until(gone, "the short lease ends")
    assert await store.get(backend.key("kept")) == entry
    async with store.watch(backend.prefix, start) as watch:
        kinds = [(e.kind, e.entry.key) for _ in range(3) for e in (await anext(watch)).events]
    assert kinds == [("put", backend.key("short")), ("put", backend.key("kept")), ("delete", backend.key("short"))]
    with pytest.raises(LeaseNotFound):
        await store.keep_alive(short.id)
    await store.revoke(kept.id)  # or its end would be a revision in the midst of a later test


async def test_a_revoked_lease_is_gone_with_its_keys_and_revoking_again_is_fine(
    backend: Backend, store: Storage
) -> None:
    lease = await store.grant_lease(60)
    await store.create(backend.key("a"), b"", lease=lease.id)
    await store.revoke(lease.id)
    await store.revoke(lease.id)
    with pytest.raises(NotFound):
        await store.get(backend.key("a"))
    with pytest.raises(LeaseNotFound) as caught:
        await store.keep_alive(lease.id)
    assert caught.value.lease == lease.id


async def test_an_update_keeps_the_lease_and_set_drops_it(backend: Backend, store: Storage) -> None:
    lease = await store.grant_lease(60)
    first = await store.create(backend.key("a"), b"1", lease=lease.id)
    second = await store.update(backend.key("a"), b"2", expected_revision=first.revision)
    assert second.lease == lease.id == (await store.get(backend.key("a"))).lease
    third = await store.compare_and_swap(backend.key("a"), b"2", b"3")
    assert third.lease == lease.id
    await store.set(backend.key("a"), b"4")
    await store.revoke(lease.id)
    assert (await store.get(backend.key("a"))).value == b"4"


async def test_health_tells_revision_epoch_and_every_member(backend: Backend, store: Storage) -> None:
    await store.set(f"{backend.root}/epoch", b"seven")
    health = await store.health()
    assert health.ok
    assert (health.epoch, health.revision) == ("seven", await store.current_revision())
    (member,) = health.members
    assert member.leader
    assert member.error == ""
    old = {"etcd-3.4", "etcd-3.5.1"}
    assert bool(health.notes) == (backend.name in old), "versions with known bugs are named"


async def test_the_line_tells_cluster_epoch_and_revision_and_takes_no_reset_from_a_watch(
    backend: Backend, store: Storage
) -> None:
    """Whoever asks for the line must not be the one who hears of a new epoch in place of those who follow."""
    first = await store.line()
    assert (first.epoch, first.revision) == ("", await store.current_revision())
    assert first.cluster_id == (await store.health()).cluster_id != ""
    async with store.watch(backend.prefix, first.revision, live=True) as watch:
        written = await store.set(f"{backend.root}/epoch", b"two")
        second = await store.line()
        assert (second.cluster_id, second.epoch, second.revision) == (first.cluster_id, "two", written)
        assert not second.same_history(first)
        with pytest.raises(StoreReset):
            await watch.barrier()


async def test_a_closed_store_answers_every_call_with_an_error_and_ends_its_watches(backend: Backend) -> None:
    store = backend.client("closing")
    start = await store.current_revision()
    async with store.watch(backend.key("a/"), start) as quiet, store.watch(backend.prefix, start, live=True) as live:
        waiting = [asyncio.create_task(anext(quiet)), asyncio.create_task(live.barrier(30))]
        await asyncio.sleep(0.05)
        await store.aclose()
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(result, Unavailable), result
    for call in (
        lambda: store.get(backend.key("a")),
        lambda: store.create(backend.key("a"), b""),
        lambda: store.list(backend.prefix),
        store.current_revision,
        store.line,
        lambda: store.grant_lease(5),
    ):
        with pytest.raises(Unavailable):
            await call()
    assert not (await store.health()).ok
    await store.aclose()


async def test_cancelling_a_call_at_any_moment_leaves_nothing_behind_and_harms_no_other(backend: Backend) -> None:
    """Every operation is cancelled after each number of turns of the loop at which it is still under way."""
    footprint = Footprint.now()
    store = backend.client("cancelled")
    key = backend.key("a")
    entry = await store.create(key, b"1")

    async def watching() -> None:
        async with store.watch(backend.prefix, entry.revision, live=True) as watch:
            await asyncio.gather(watch.barrier(), anext(watch))

    calls = {
        "get": lambda: store.get(key),
        "list": lambda: store.list(backend.prefix),
        "create": lambda: store.create(key, b"2"),
        "update": lambda: store.update(key, b"2", expected_revision=1),
        "set": lambda: store.set(backend.key("b"), b"2"),
        "grant": lambda: store.grant_lease(5),
        "watch": watching,
        "health": store.health,
    }
    for call in calls.values():
        for turns in (0, 1, 2, 3, 5, 8, 13, 21, 34):
            task = asyncio.ensure_future(call())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
            assert task.cancelled() or task.done()
    assert (await store.get(key)).value == b"1"
    async with store.watch(backend.prefix, await store.current_revision(), live=True) as watch:
        await asyncio.gather(watch.barrier(), anext(watch))
    if not backend.is_memory:
        await store.aclose()
    gc.collect()
    await footprint.is_all_that_is_left()
