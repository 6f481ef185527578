"""The ordered event consumer on a real etcd and Redis: no gap, order kept, nothing twice after a clean stop."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from equipment.etcd import WHEEL, SharedEtcds, scratch_dir
from equipment.footprint import Footprint
from equipment.waiting import until
from equipment.widget import NOTES, WIDGETS, registry, widget
from lrm.bookmarks import REPLAYS, Bookmarks
from lrm.consumer import Delivery, EventConsumer
from lrm.devservers import EtcdServer, RedisServer
from lrm.election import StaticElection, Term
from lrm.errors import NotLeading
from lrm.processes import ChildProcess
from storage.base import Guard
from storage.clock import SystemClock
from storage.errors import GuardFailed, StoreReset
from storage.etcd import EtcdStorage
from storage.redis_bookmarks import RedisBookmarks

CLOCK = SystemClock()


@pytest.fixture(scope="module")
def own_etcds() -> Iterator[SharedEtcds]:
    """This file's own, because it compacts."""
    with scratch_dir("lrm-consumer-") as path:
        servers = SharedEtcds(path)
        yield servers
        servers.end()


@pytest.fixture
async def server(own_etcds: SharedEtcds) -> EtcdServer:
    return await own_etcds.get(WHEEL)


class Daemon:
    """What a daemon has, for one consumer after the other; `stop` is a clean stop, `crash` is none."""

    def __init__(self, server: EtcdServer, redis: RedisServer, root: str) -> None:
        self.root = root
        self.registry = registry(root)
        self.storage = EtcdStorage([server.endpoint], root=root)
        self.saved = RedisBookmarks(redis.url, CLOCK, root=root)
        self.bookmarks = Bookmarks(self.saved, self.storage, CLOCK, every=0.02)
        self.saving = asyncio.create_task(self.bookmarks.run())
        self.running: dict[EventConsumer, asyncio.Task[None]] = {}
        self.got: list[Delivery] = []

    async def take(self, delivery: Delivery) -> None:
        self.got.append(delivery)

    def told(self) -> list[tuple[str, str]]:
        return [(d.type, d.name) for d in self.got]

    def consumer(self, handler: Callable[[Delivery], Any] | None = None, name: str = "exports", **more: Any):  # noqa: ANN201
        handler = handler or self.take
        return EventConsumer(name, handler, self.storage, self.registry, CLOCK, self.bookmarks, **more)

    async def lead(self, name: str = "exports") -> Term:
        return await StaticElection(self.storage, CLOCK, root=self.root, lock_name=name, identity="me").acquire()

    async def start(self, consumer: EventConsumer, term: Term | None = None) -> Term:
        term = term or await self.lead(consumer.lock_name)
        self.running[consumer] = asyncio.create_task(consumer.run(term))
        return term

    async def start_new(self, consumer: EventConsumer) -> Term:
        """The same with one that has no bookmark: its RESYNC is over when this returns."""
        term = await self.start(consumer)
        await until(lambda: consumer.describe()["position"] > 0, "the first state delivered")
        return term

    async def stop(self, consumer: EventConsumer) -> None:
        await consumer.drain(5)
        task = self.running.pop(consumer)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    async def write(self, name: str, count: int = 1, *, plural: str = "widgets") -> int:
        """Create or replace an object; the revision."""
        return await self.storage.set(f"{self.root}/r/{plural}/default/{name}", self.value(name, count))

    @staticmethod
    def value(name: str, count: int = 1) -> bytes:
        return WIDGETS.encode(widget(name, count=count))

    async def delete(self, name: str) -> int:
        entry = await self.storage.get(f"{self.root}/r/widgets/default/{name}")
        return await self.storage.delete(entry.key, expected_revision=entry.revision)

    async def reached(self, consumer: EventConsumer, revision: int) -> None:
        await until(lambda: consumer.describe()["position"] >= revision, f"position {revision}")

    async def aclose(self) -> None:
        for consumer in list(self.running):
            await self.stop(consumer)
        self.saving.cancel()
        await asyncio.wait([self.saving])
        await self.saved.aclose()
        await self.storage.aclose()


@pytest.fixture
async def daemon(server: EtcdServer, redis_server: RedisServer, etcd_root: str) -> AsyncIterator[Daemon]:
    daemon = Daemon(server, redis_server, etcd_root)
    yield daemon
    await daemon.aclose()


async def test_the_first_start_gets_the_state_and_then_every_change_with_the_last_state_of_what_went(
    daemon: Daemon,
) -> None:
    await daemon.write("a")
    consumer = daemon.consumer(kinds=[WIDGETS])
    await daemon.start(consumer)
    await until(lambda: len(daemon.got) == 2)
    await daemon.write("b", 3)
    await daemon.write("b", 4)
    await daemon.write("n", plural="notes")
    await daemon.write("x", plural="strangers")
    gone = await daemon.delete("b")
    passed = await daemon.write("n", plural="notes")
    await daemon.reached(consumer, passed)
    assert daemon.told() == [
        ("RESYNC", ""),
        ("SYNC", "a"),
        ("ADDED", "b"),
        ("MODIFIED", "b"),
        ("DELETED", "b"),
    ]
    last = daemon.got[-1]
    assert (last.revision, last.kind, last.namespace) == (gone, WIDGETS, "default")
    assert last.resource is not None
    assert last.resource.spec.count == 4

    async def saved() -> bool:
        held = await daemon.saved.load("exports")
        return held is not None and held.revision >= passed

    await until(saved, "its bookmark moves on when only other kinds' events pass")
    told = consumer.describe()
    assert (told["name"], told["lock"], told["delivered"], told["failures"]) == ("exports", "exports", 5, 0)


async def test_after_a_clean_stop_nothing_comes_twice_and_what_happened_meanwhile_comes_in_order(
    daemon: Daemon,
) -> None:
    first = daemon.consumer()
    await daemon.start_new(first)
    for i in range(20):
        await daemon.write(f"w{i}")
    await until(lambda: len(daemon.got) >= 10)
    await daemon.stop(first)
    taken = len(daemon.got)
    for i in range(20, 30):
        await daemon.write(f"w{i}")
    last = await daemon.delete("w0")
    second = daemon.consumer()
    await daemon.start(second)
    await daemon.reached(second, last)
    assert taken < len(daemon.got)
    assert daemon.told() == [("RESYNC", ""), *[("ADDED", f"w{i}") for i in range(30)], ("DELETED", "w0")]
    await daemon.stop(second)
    await daemon.start(second)
    assert await daemon.write("end") > last
    await until(lambda: daemon.told()[-1] == ("ADDED", "end"))
    assert len(daemon.got) == 33, "the same consumer under a later term goes on too"


async def test_a_delivery_that_fails_is_tried_again_in_place_told_and_no_reason_to_wait_for_a_stop(
    daemon: Daemon,
) -> None:
    left = {"b": 2, "d": 10**6}

    async def failing(delivery: Delivery) -> None:
        if left.get(delivery.name, 0) > 0:
            left[delivery.name] -= 1
            raise OSError("the broker is away")
        await daemon.take(delivery)

    consumer = daemon.consumer(failing)
    await daemon.start(consumer)
    await until(lambda: len(daemon.got) == 1)
    for name in "abcde":
        await daemon.write(name)
    await until(lambda: (consumer.describe()["failing"] or {}).get("tries", 0) >= 3 and len(daemon.got) == 4)
    assert daemon.told() == [("RESYNC", ""), ("ADDED", "a"), ("ADDED", "b"), ("ADDED", "c")]
    told = consumer.describe()["failing"]
    assert (told["object"], told["error"]) == ("widgets/default/d", "the broker is away")
    failures = consumer.stats.failures
    assert failures >= 5
    await daemon.stop(consumer)
    assert consumer.stats.failures == failures, "a stop waits for no other try"
    left.clear()
    await daemon.start(consumer)
    await until(lambda: len(daemon.got) == 6)
    assert daemon.told()[4:] == [("ADDED", "d"), ("ADDED", "e")]


async def test_a_delivery_that_hangs_ends_at_its_deadline_and_is_tried_again(daemon: Daemon) -> None:
    calls: list[str] = []

    async def hanging(delivery: Delivery) -> None:
        calls.append(delivery.type)
        if len(calls) == 1:
            await asyncio.Event().wait()

    consumer = daemon.consumer(hanging, deadline=0.1)
    await daemon.start(consumer)
    await until(lambda: len(calls) == 2)
    await until(lambda: consumer.stats.delivered == 1)
    assert consumer.stats.failures == 1


async def test_after_a_compaction_one_resync_and_the_state_and_then_what_follows(daemon: Daemon) -> None:
    first = daemon.consumer()
    await daemon.start(first)
    for name in ("gone", "kept"):
        await daemon.write(name)
    await until(lambda: len(daemon.got) == 3)
    await daemon.stop(first)
    await daemon.delete("gone")
    await daemon.storage.compact(await daemon.write("new"))
    daemon.got.clear()
    second = daemon.consumer()
    await daemon.start(second)
    await until(lambda: len(daemon.got) == 3)
    await daemon.delete("new")
    await until(lambda: len(daemon.got) == 4)
    assert daemon.told() == [("RESYNC", ""), ("SYNC", "kept"), ("SYNC", "new"), ("DELETED", "new")]
    await daemon.stop(second)
    third = daemon.consumer()
    await daemon.start(third)
    await daemon.write("last")
    await until(lambda: len(daemon.got) == 5)
    assert daemon.told()[-1] == ("ADDED", "last"), "the gap is told once"


@pytest.mark.parametrize("watching", [True, False], ids=["while it watches", "while it does not"])
async def test_a_new_epoch_is_a_gap_and_the_bookmark_follows_to_the_new_line(daemon: Daemon, *, watching: bool) -> None:
    consumer = daemon.consumer()
    term = await daemon.start_new(consumer)
    await daemon.reached(consumer, await daemon.write("a"))
    if not watching:
        await daemon.stop(consumer)
    now = await daemon.storage.set(f"{daemon.root}/epoch", b"restored")
    if watching:
        with pytest.raises(StoreReset):
            async with daemon.storage.watch(f"{daemon.root}/r/", now):
                raise AssertionError("whoever sees the epoch is told, and all open watches with it")
    else:
        await daemon.start(consumer, term)
    await until(lambda: consumer.stats.resyncs == 2)
    last = await daemon.write("b")
    await daemon.reached(consumer, last)
    assert daemon.told() == [("RESYNC", ""), ("ADDED", "a"), ("RESYNC", ""), ("SYNC", "a"), ("ADDED", "b")]

    async def saved() -> bool:
        held = await daemon.saved.load("exports")
        return held is not None and (held.epoch, held.revision >= last) == ("restored", True)

    await until(saved)


async def test_a_new_epoch_of_which_others_were_told_while_it_waited_its_turn_is_a_gap_too(daemon: Daemon) -> None:
    """The store tells each reset once, to those who watch; a consumer between two watches looks for itself."""
    first, consumer = daemon.consumer(), daemon.consumer()
    term = await daemon.start_new(first)
    await daemon.stop(first)
    async with AsyncExitStack() as others:
        for _ in range(REPLAYS):
            await others.enter_async_context(daemon.bookmarks.replays)
        await daemon.start(consumer, term)
        await until(lambda: consumer.describe()["position"] > 0, "it has its bookmark, and waits to read history")
        now = await daemon.storage.set(f"{daemon.root}/epoch", b"restored")
        with pytest.raises(StoreReset):
            async with daemon.storage.watch(f"{daemon.root}/r/", now):
                raise AssertionError("this is who is told")
    await until(lambda: consumer.stats.resyncs == 1)


async def test_a_lost_term_ends_the_delivery_in_hand_and_the_next_leader_gets_it(daemon: Daemon) -> None:
    ended: list[str] = []

    async def slow(delivery: Delivery) -> None:
        if delivery.name != "slow":
            return
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(delivery.name)

    consumer = daemon.consumer(slow)
    term = await daemon.start(consumer)
    await until(lambda: consumer.stats.delivered == 1)
    await daemon.write("slow")
    await until(lambda: consumer.describe()["delivered"] == 1 and not consumer._idle.is_set())
    term.lost()
    async with asyncio.timeout(30):
        await daemon.running.pop(consumer)
    assert ended == ["slow"]
    successor = daemon.consumer()
    await daemon.start(successor)
    await until(lambda: daemon.told() == [("ADDED", "slow")])


@pytest.mark.parametrize("refusal", ["guard", "not leading"])
async def test_a_handler_that_is_fenced_ends_the_term(daemon: Daemon, refusal: str) -> None:
    term = await daemon.lead()

    async def fenced(_: Delivery) -> None:
        if refusal == "guard":
            raise GuardFailed(Guard(term.key, term.number))
        raise NotLeading("another one leads")

    consumer = daemon.consumer(fenced)
    await daemon.start(consumer, term)
    async with asyncio.timeout(30):
        await daemon.running.pop(consumer)
    with pytest.raises(NotLeading):
        term.check()
    assert consumer.stats.failures == 0


async def test_what_cannot_be_decoded_is_passed_over_counted_and_logged_once(daemon: Daemon) -> None:
    consumer = daemon.consumer()
    await daemon.start(consumer)
    await until(lambda: len(daemon.got) == 1)
    key = f"{daemon.root}/r/widgets/default/bad"
    with capture_logs() as logs:
        for value in (b"nonsense", b"{}"):
            await daemon.storage.set(key, value)
        await daemon.delete("bad")
        await daemon.write("good")
        await until(lambda: len(daemon.got) == 3)
    assert daemon.told()[1:] == [("DELETED", "bad"), ("ADDED", "good")]
    assert daemon.got[1].resource is None, "that it is gone is told, though not what it was"
    assert consumer.stats.undecodable == 3
    assert [line["event"] for line in logs].count("consumer.undecodable") == 1


async def test_a_stop_in_the_middle_of_a_revision_takes_the_whole_of_it(daemon: Daemon) -> None:
    """Three objects share a revision (here the end of their lease): the bookmark stands only at revisions' ends."""
    lease = await daemon.storage.grant_lease(600)
    for name in "abc":
        key = f"{daemon.root}/r/widgets/default/{name}"
        await daemon.storage.create(key, daemon.value(name), lease=lease.id)
    first_of_three, go_on = asyncio.Event(), asyncio.Event()

    async def waiting(delivery: Delivery) -> None:
        if delivery.type == "DELETED" and not first_of_three.is_set():
            first_of_three.set()
            await go_on.wait()
        await daemon.take(delivery)

    consumer = daemon.consumer(waiting)
    await daemon.start(consumer)
    await until(lambda: len(daemon.got) == 4)
    await daemon.storage.revoke(lease.id)
    await first_of_three.wait()
    stopping = asyncio.create_task(daemon.stop(consumer))
    await daemon.write("later")
    go_on.set()
    await stopping
    assert daemon.told()[4:] == [("DELETED", "a"), ("DELETED", "b"), ("DELETED", "c")]
    assert len({d.revision for d in daemon.got[4:]}) == 1
    await daemon.start(consumer)
    await until(lambda: len(daemon.got) >= 8)
    assert daemon.told()[7:] == [("ADDED", "later")]


async def test_only_so_many_read_old_history_at_once_and_who_stands_still_makes_room(daemon: Daemon) -> None:
    names = [f"c{i}" for i in range(REPLAYS + 2)]
    for name in names:
        one = daemon.consumer(name=name)
        await daemon.start(one)
        await until(lambda one=one: one.stats.delivered == 1)
        await daemon.stop(one)
    last = await daemon.write("old")
    gate = asyncio.Event()
    inside: list[str] = []

    def handler(name: str) -> Callable[[Delivery], Any]:
        async def held(_: Delivery) -> None:
            inside.append(name)
            if name == names[0] and not gate.is_set():
                raise OSError("the broker is away")
            await gate.wait()

        return held

    consumers = [daemon.consumer(handler(name), name=name) for name in names]
    for one in consumers:
        await daemon.start(one)
    await until(lambda: len(set(inside)) == REPLAYS + 1, "one fails, and another one takes its place")
    await asyncio.sleep(0.3)
    assert len(set(inside)) == REPLAYS + 1
    gate.set()
    for one in consumers:
        await daemon.reached(one, last)


async def test_redis_away_for_the_whole_term_costs_a_resync_and_nothing_else(
    daemon: Daemon, redis_server: RedisServer
) -> None:
    redis_server.kill()
    first = daemon.consumer()
    await daemon.start(first)
    await daemon.write("a")
    await until(lambda: len(daemon.got) == 2)
    async with asyncio.timeout(30):
        await daemon.stop(first)
    second = daemon.consumer()
    await daemon.start(second)
    await until(lambda: len(daemon.got) == 4)
    assert daemon.told()[2:] == [("RESYNC", ""), ("SYNC", "a")]
    assert daemon.bookmarks.error
    await redis_server.start()

    async def saved() -> bool:
        return await daemon.saved.load("exports") is not None

    await until(saved, "it is saved as soon as redis is back")


async def test_kill_9_in_the_middle_of_a_stream_loses_nothing_and_repeats_only_the_last_moment(
    daemon: Daemon, server: EtcdServer, redis_server: RedisServer, tmp_path: Path
) -> None:
    """Killed while objects are written; then stopped cleanly and started again: nothing is repeated by that.

    More is written than had been delivered when it is killed, however fast it was.
    """
    file = tmp_path / "deliveries"
    file.touch()
    argv = [sys.executable, "-m", "equipment.consumer_process", server.endpoint, daemon.root, redis_server.url, file]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}

    def start() -> ChildProcess:
        return ChildProcess.start(argv, name="consumer", log_path=tmp_path / "log", env=env)

    def lines() -> list[str]:
        return file.read_text().splitlines()

    killed_once = asyncio.Event()

    async def write_all() -> None:
        for i in range(300):
            if i == 200:
                await killed_once.wait()
            await daemon.write(f"w{i}")
            await asyncio.sleep(0.005)

    async def saved() -> int:
        held = await daemon.saved.load("exports")
        return held.revision if held is not None else 0

    async def well_under_way() -> bool:
        told = lines()
        return len(told) > 100 and await saved() > int(told[50].split(" ")[1])

    process = start()
    try:
        await until(lines, "the first delivery")
        writing = asyncio.create_task(write_all())
        await until(well_under_way, "a hundred deliveries, and a bookmark on the way")
        bookmark = await saved()
        process.kill()
        killed = len(lines())
        killed_once.set()
        process = start()
        await writing
        await until(lambda: len(lines()) > killed and lines()[-1].endswith(" w299"))
        await process.stop(grace=10)
        stopped = len(lines())
        await daemon.write("end")
        process = start()
        await until(lambda: lines()[-1].endswith(" end"))
    finally:
        await process.stop(grace=10)
    deliveries = [line.split(" ") for line in lines()]
    assert [kind for kind, *_ in deliveries] == ["RESYNC", *["ADDED"] * (len(deliveries) - 1)]
    assert {name for _, _, name in deliveries[1:]} == {*(f"w{i}" for i in range(300)), "end"}, "nothing is lost"
    assert len(deliveries) == stopped + 1, "nothing comes twice after a clean stop"
    revisions = [int(revision) for _, revision, _ in deliveries]
    back = [i for i, (one, other) in enumerate(pairwise(revisions), 1) if other <= one]
    assert back in ([], [killed]), "the order is kept; only the resumption after the kill goes back"
    assert revisions[killed] > bookmark, "and no further than to the bookmark"


async def test_without_kinds_all_are_delivered_and_nothing_is_left_when_it_has_ended(
    server: EtcdServer, redis_server: RedisServer, etcd_root: str
) -> None:
    before = Footprint.now()
    daemon = Daemon(server, redis_server, etcd_root)
    consumer = daemon.consumer()
    await daemon.start_new(consumer)
    await daemon.write("n", plural="notes")
    await until(lambda: len(daemon.got) == 2)
    assert daemon.got[1].kind is NOTES
    await daemon.aclose()
    await before.is_all_that_is_left()
