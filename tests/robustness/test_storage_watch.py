"""Promises 3, 7, 8 and 9 under force: every change once, in order, whole revisions, or an error; never a silence.

What a watch delivered is held against etcd's own history, read past our code.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from equipment.cluster import EtcdCluster
from equipment.etcd import VERSIONS, WHEEL, Gateway, binary, restore, snapshot
from equipment.fault_proxy import FaultProxy, How, When
from equipment.listener import Listener, listening, told_by_etcd
from equipment.storage_scene import is_write
from equipment.waiting import until
from lrm.devservers import EtcdServer
from lrm.testing import VirtualClock
from storage.errors import Compacted, StorageError, StoreReset, Unavailable
from storage.etcd import EtcdStorage

WATCH = "/v3/watch"


@asynccontextmanager
async def storage_at(*endpoints: str, root: str, quick: bool = True, **options: object) -> AsyncIterator[EtcdStorage]:
    """A storage with liveness times of a second, or with the defaults."""
    liveness = {"liveness_silence": 1.0, "liveness_deadline": 1.0} if quick else {}
    storage = EtcdStorage(endpoints, root=root, **liveness, **options)
    try:
        yield storage
    finally:
        await storage.aclose()


async def _write_until(stop: asyncio.Event, direct: Gateway, prefix: str, name: int) -> None:
    """One writer: single writes, several keys at one revision, and deletions, one after the other."""
    count = 0
    while not stop.is_set():
        count += 1
        value = b"%d.%d" % (name, count)
        if count % 4 == 0:
            await direct.put_together({f"{prefix}shared/{name}/{i}": value for i in range(3)})
        elif count % 7 == 0:
            await direct.delete(f"{prefix}{name}")
        else:
            await direct.put(f"{prefix}{name}", value)
        await asyncio.sleep(0.02)  # bounds the load on the machine that the tests share


def _reconnects() -> list[object]:
    """The sample is 200 resets of four watches in all; the whole is 200 of each, on every version."""
    whole = [pytest.param(version, 800, marks=(pytest.mark.soak, pytest.mark.timeout(600))) for version in VERSIONS]
    return [pytest.param(WHEEL, 200), *whole]


@pytest.mark.slow
@pytest.mark.parametrize(("version", "resets"), _reconnects())
async def test_forced_reconnects_on_random_members_lose_and_repeat_nothing(
    server_dir: Path, version: str, resets: int
) -> None:
    """Eight writers write all the while; each reset sends the watches to a member that is drawn by lot."""
    draw = random.Random(20)
    async with EtcdCluster(server_dir, binary(version)) as cluster, AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(FaultProxy(e)) for e in cluster.endpoints]
        direct = [Gateway(endpoint) for endpoint in cluster.endpoints]
        listeners: list[Listener] = []
        for instance in ("one", "two"):
            # Silence is not what is tested: a busy etcd's must not be taken for the end of a stream.
            daemon = storage_at(*(p.endpoint for p in proxies), root="/t", instance=instance, quick=False)
            storage = await stack.enter_async_context(daemon)
            listeners += [
                await stack.enter_async_context(listening(storage, "/t/r/", 1, live=live)) for live in (True, False)
            ]
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for name in range(8):
                group.create_task(_write_until(stop, direct[name % 3], "/t/r/", name))
            done = 0
            while done < resets:
                chosen = draw.choice(proxies)
                for proxy in proxies:
                    proxy.clear()
                    if proxy is not chosen:
                        proxy.inject(When.BEFORE, How.RESET, WATCH, times=0)
                done += sum(proxy.abort(WATCH) for proxy in proxies)
                await until(lambda: chosen.serving(WATCH) == 4, "four streams at the chosen member")  # noqa: B023
                if draw.random() < 0.8:  # else the streams are reset again before they brought anything
                    seen = await direct[0].put("/t/r/mark", b"")
                    for listener in listeners:
                        await listener.reach(seen)
            stop.set()
        last = await direct[0].put("/t/r/end", b"")
        told = await told_by_etcd(direct[0], "/t/r/", 1, last)
        for listener in listeners:
            await listener.reach(last)
            assert listener.deliveries == told
        assert sum(len(changes) > 1 for _, changes in told) > 20, "revisions of several keys were among them"
        assert len(told) > 400, "there was load"


async def test_a_stream_cut_at_any_byte_loses_and_repeats_nothing(server_dir: Path) -> None:
    """Cut in the middle of a line, of a fragment, of a revision: what was not whole comes again, whole."""
    async with EtcdServer(server_dir / "etcd") as etcd, FaultProxy(etcd.endpoint) as proxy:
        direct = Gateway(etcd.endpoint)
        async with storage_at(proxy.endpoint, root="/t") as storage, listening(storage, "/t/r/", 1) as listener:
            for keep in range(40, 2400, 150):
                cut = proxy.inject(When.AFTER, How.TRUNCATE, WATCH, keep=keep)
                await until(lambda: proxy.abort(WATCH), "a stream to reset")
                await until(lambda: cut.seen, "another stream")  # noqa: B023
                for i in range(6):
                    await direct.put_together({f"/t/r/{name}": b"%d.%d" % (keep, i) for name in "abc"})
                await cut.hit()
                last = await direct.put("/t/r/end", b"")
                await listener.reach(last)
            assert listener.deliveries == await told_by_etcd(direct, "/t/r/", 1, last)


@pytest.mark.parametrize(
    ("status", "reply"),
    [
        (200, b""),
        (200, b"<html>welcome</html>\n"),
        (200, b'{"result":{"header":{}}}\n'),
        (200, b'{"result":{"created":true,"header":{"revision":"1"}}}\n{"result":{"eve'),
        (200, b'{"error":{"grpc_code":14,"message":"transport is closing"}}\n'),
        (503, b'{"error":"etcdserver: no leader","code":14}'),
        (502, b"<html>502</html>"),
        (404, b"Not Found"),
    ],
    ids=["nothing", "html", "nonsense", "half", "error-in-stream", "no-leader", "bad-gateway", "not-found"],
)
async def test_a_stream_that_is_not_one_is_replaced(
    etcd: EtcdServer, etcd_root: str, status: int, reply: bytes
) -> None:
    """A peer that lies when the watch resumes costs time, and no event."""
    direct, prefix = Gateway(etcd.endpoint), f"{etcd_root}/r/"
    first = await direct.put(f"{prefix}a", b"0")
    async with (
        FaultProxy(etcd.endpoint) as proxy,
        storage_at(proxy.endpoint, root=etcd_root) as storage,
        listening(storage, prefix, first) as listener,
    ):
        lie = proxy.inject(When.BEFORE, How.REPLACE, WATCH, status=status, reply=reply)
        await until(lambda: proxy.abort(WATCH), "a stream to reset")
        await lie.hit()
        last = await direct.put(f"{prefix}a", b"1")
        await listener.reach(last)
        assert listener.deliveries == await told_by_etcd(direct, prefix, first, last)


async def test_a_barrier_in_the_middle_of_a_3000_event_replay_waits_for_all_of_it(
    etcd: EtcdServer, etcd_root: str
) -> None:
    """The reader has stopped in the middle; the barrier returns only when the rest has been handed out."""
    direct, prefix = Gateway(etcd.endpoint), f"{etcd_root}/r/"
    first = await direct.put(f"{prefix}first", b"")
    await direct.put_many((f"{prefix}{i % 50}" for i in range(3000)), b"x" * 1500)
    async with storage_at(etcd.endpoint, root=etcd_root) as storage, listening(storage, prefix, first) as listener:
        await until(lambda: len(listener.batches) > 500, "the middle")
        listener.may_read.clear()
        barrier = asyncio.create_task(listener.watch.barrier(timeout=30))
        assert not (await asyncio.wait({barrier}, timeout=1.5))[0], "it was not handed out yet"
        assert len(listener.batches) < 3000
        listener.may_read.set()
        revision = await barrier
        assert len(listener.deliveries) == 3000
        assert listener.revision >= revision
        last = await direct.put(f"{prefix}end", b"")
        await listener.reach(last)
        assert listener.deliveries == await told_by_etcd(direct, prefix, first, last)


@pytest.mark.parametrize("cut", [False, True], ids=["uncut", "cut"])
async def test_large_revisions_arrive_whole_though_etcd_sends_them_in_fragments(server_dir: Path, *, cut: bool) -> None:
    """Also when streams end in the middle of them: what a fragment had brought is not counted twice."""
    async with EtcdServer(server_dir / "etcd") as etcd, FaultProxy(etcd.endpoint) as proxy:
        direct = Gateway(etcd.endpoint)
        for i in range(30):
            await direct.put_together({f"/t/r/{name}": bytes([65 + i]) * 60_000 for name in "abcdefgh"})
        last = await direct.revision()
        cuts = [proxy.inject(When.AFTER, How.TRUNCATE, WATCH, keep=k) for k in range(1_600_000, 4_000_000, 300_000)]
        if not cut:
            proxy.clear()
        async with storage_at(proxy.endpoint, root="/t") as storage, listening(storage, "/t/r/", 1) as listener:
            await listener.reach(last)
            assert [len(batch.events) for batch in listener.batches if batch.events] == [8] * 30
            assert listener.deliveries == await told_by_etcd(direct, "/t/r/", 1, last)
        assert sum(rule.hits for rule in cuts) == (len(cuts) if cut else 0)


async def test_a_slow_reader_is_not_taken_for_a_silent_stream(etcd: EtcdServer, etcd_root: str) -> None:
    """It stops reading for longer than the liveness times, with much more to come than a buffer holds."""
    direct, prefix = Gateway(etcd.endpoint), f"{etcd_root}/r/"
    first = await direct.put(f"{prefix}first", b"")
    async with FaultProxy(etcd.endpoint) as proxy, storage_at(proxy.endpoint, root=etcd_root) as storage:
        async with listening(storage, prefix, first) as listener:
            listener.may_read.clear()
            await direct.put_many((f"{prefix}{i}" for i in range(60)), b"x" * 200_000, at_once=4)
            await asyncio.sleep(3)  # the time that passes is what is tested
            listener.may_read.set()
            last = await direct.put(f"{prefix}end", b"")
            await listener.reach(last)
            assert listener.deliveries == await told_by_etcd(direct, prefix, first, last)
        assert proxy.counts[WATCH] == 1


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_delete_at_the_compaction_revision_is_told_or_compacted(server_dir: Path, version: str) -> None:
    """Old etcds resume there without a word: the deletion would be lost for ever."""
    async with EtcdServer(server_dir / "etcd", binary=binary(version)) as etcd, FaultProxy(etcd.endpoint) as proxy:
        direct = Gateway(etcd.endpoint)
        async with storage_at(proxy.endpoint, root="/t") as storage:
            created = await direct.put("/t/r/a", b"1")
            async with listening(storage, "/t/r/", created - 1) as listener:
                await listener.reach(created)
                await proxy.refuse()
                deleted = await direct.delete("/t/r/a")
                await direct.compact(deleted)
                await proxy.listen()
                assert isinstance(await listener.fails(), Compacted), "resumed below the compaction"
            with pytest.raises(Compacted):
                async with listening(storage, "/t/r/", created) as late:
                    await late.reach(deleted)
            async with listening(storage, "/t/r/", deleted) as after:
                last = await direct.put("/t/r/b", b"2")
                await after.reach(last)
                assert after.deliveries == [(last, (("/t/r/b", b"2"),))]


async def test_compaction_under_a_live_watch_is_not_noticed(server_dir: Path) -> None:
    """Neither by a watch that has come so far, nor by its resumption."""
    async with EtcdServer(server_dir / "etcd") as etcd, FaultProxy(etcd.endpoint) as proxy:
        direct = Gateway(etcd.endpoint)
        async with storage_at(proxy.endpoint, root="/t") as storage, listening(storage, "/t/r/", 1) as listener:
            for i in range(20):
                await listener.reach(await direct.put("/t/r/a", b"%d" % i))
                await direct.compact(await direct.revision())
                if i % 3 == 0:
                    assert proxy.abort(WATCH) == 1
            assert await listener.watch.barrier() > listener.deliveries[-1][0]
            assert [changes[0][1] for _, changes in listener.deliveries] == [b"%d" % i for i in range(20)]


async def test_a_restored_store_is_told_once_to_everyone_and_then_served(server_dir: Path) -> None:
    """A snapshot is put back under a running client: revisions fall, the cluster's id stays the same."""
    async with EtcdServer(server_dir / "etcd") as etcd:
        direct = Gateway(etcd.endpoint)
        await direct.put("/t/r/a", b"kept")
        snapshot(etcd, server_dir / "snapshot")
        async with storage_at(etcd.endpoint, root="/t") as storage:
            await direct.put_many((f"/t/r/{i}" for i in range(20)), b"lost")
            await direct.put("/t/r/5", b"lost as well")  # the puts above come in any order; this is the head
            lost = await storage.get("/t/r/5")
            async with (
                listening(storage, "/t/r/", 1) as live,
                listening(storage, "/t/r/", 1, live=False) as plain,
            ):
                await live.reach(lost.revision)
                await etcd.stop()
                restore(etcd, server_dir / "snapshot")
                waiting = asyncio.create_task(live.watch.barrier(timeout=30))
                await etcd.start()
                assert isinstance(await live.fails(), StoreReset)
                assert isinstance(await plain.fails(), StoreReset)
                assert isinstance((await asyncio.gather(waiting, return_exceptions=True))[0], StoreReset | Unavailable)
            assert (await storage.get("/t/r/a")).value == b"kept"
            assert not await storage.exists("/t/r/5")
            revision = await storage.current_revision()
            assert revision < lost.revision
            with pytest.raises(StorageError):
                await storage.update("/t/r/5", b"ghost", expected_revision=lost.revision)
            async with listening(storage, "/t/r/", revision) as again:
                entry = await storage.create("/t/r/new", b"1")
                await again.reach(entry.revision)
                assert again.deliveries == [(entry.revision, (("/t/r/new", b"1"),))]


async def test_a_new_epoch_is_a_reset_even_when_revisions_have_grown_past_ours(server_dir: Path) -> None:
    """Between the restore and our return others wrote so much that only the epoch shows what happened."""
    async with EtcdServer(server_dir / "etcd") as etcd, FaultProxy(etcd.endpoint) as proxy:
        direct = Gateway(etcd.endpoint)
        await direct.put("/t/epoch", b"one")
        snapshot(etcd, server_dir / "snapshot")
        async with storage_at(proxy.endpoint, root="/t") as storage, listening(storage, "/t/r/", 1) as listener:
            await listener.reach(await direct.put("/t/r/a", b"lost"))
            await proxy.refuse()
            await etcd.stop()
            restore(etcd, server_dir / "snapshot")
            await etcd.start()
            await direct.put_many((f"/t/r/{i}" for i in range(50)), b"other")
            await direct.put("/t/epoch", b"two")
            await proxy.listen()
            assert isinstance(await listener.fails(), StoreReset)


async def test_a_stream_that_fell_silent_is_replaced(etcd: EtcdServer, etcd_root: str) -> None:
    """Bytes of the stream stop while all else works: a barrier that does not come back condemns it."""
    direct, prefix = Gateway(etcd.endpoint), f"{etcd_root}/r/"
    first = await direct.put(f"{prefix}first", b"")
    async with (
        FaultProxy(etcd.endpoint) as one,
        FaultProxy(etcd.endpoint) as two,
        storage_at(one.endpoint, two.endpoint, root=etcd_root) as storage,
        listening(storage, prefix, first) as listener,
    ):
        silent, other = (one, two) if one.counts[WATCH] else (two, one)
        silent.freeze(WATCH)
        last = await direct.put(f"{prefix}a", b"1")
        await listener.reach(last)
        assert other.counts[WATCH] >= 1
        assert listener.deliveries == await told_by_etcd(direct, prefix, first, last)


@pytest.mark.slow
@pytest.mark.parametrize("quick", [True, False], ids=["a-second", "defaults"])
async def test_a_follower_cut_off_from_its_peers_is_left_within_20_seconds(server_dir: Path, *, quick: bool) -> None:
    """Its stream is open and it would answer for ever, from the past."""
    async with EtcdCluster(server_dir, binary(WHEEL)) as cluster:
        leader = await cluster.leader()
        names = sorted(cluster.members, key=lambda name: name == leader)
        endpoints = [cluster.members[name].endpoint for name in names]
        direct = Gateway(cluster.members[leader].endpoint)
        first = await direct.put("/t/r/first", b"")
        async with (
            storage_at(*endpoints, root="/t", quick=quick) as storage,
            listening(storage, "/t/r/", first) as listener,
        ):
            await listener.reach(await direct.put("/t/r/a", b"1"))
            cluster.isolate(names[0])
            last = await direct.put("/t/r/a", b"2")
            # What is waited for takes no longer; then a busy machine has another stream to open.
            assert storage._liveness.silence + storage._liveness.deadline <= (2 if quick else 20)
            await listener.reach(last)
            assert listener.deliveries == await told_by_etcd(direct, "/t/r/", first, last)


async def test_an_idle_hour_costs_no_reconnect(etcd: EtcdServer, etcd_root: str) -> None:
    """By the virtual clock, against a real etcd: every ten seconds a barrier goes out and comes back."""
    clock, prefix = VirtualClock(), f"{etcd_root}/r/"
    direct = Gateway(etcd.endpoint)
    first = await direct.put(f"{prefix}first", b"")
    async with (
        FaultProxy(etcd.endpoint) as proxy,
        storage_at(proxy.endpoint, root=etcd_root, quick=False, clock=clock) as storage,
        listening(storage, prefix, first) as listener,
    ):
        barriers = proxy.inject(When.AFTER, How.PASS, times=0, matches=is_write)
        for _ in range(3600 // 3):
            await clock.advance(3)
            # The virtual clock must not run ahead of real replies and of the events that they lead to.
            await until(
                lambda: proxy.serving("/v3/kv/") == 0 and len(listener.batches) >= barriers.hits,
                "every barrier that went out has come back",
            )
        assert proxy.counts[WATCH] == 1
        assert listener.deliveries == []
        assert 3600 / 10 - 2 <= len(listener.batches) <= 3600 / 7 + 2, "one barrier in ten seconds, or a little sooner"
        last = await direct.put(f"{prefix}a", b"1")
        await listener.reach(last)
        assert listener.deliveries == [(last, ((f"{prefix}a", b"1"),))]
