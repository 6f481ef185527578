"""Events: told without cost or danger to who tells them, counted instead of repeated, and gone after a day."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from equipment.gc_scene import gc_scene
from equipment.widget import widget
from lrm import events as module
from lrm.election import StaticElection
from lrm.events import KEPT_SECONDS, LEASE_EVENTS_MOST, SIMILAR_MOST, Events, events_prefix
from lrm.resource import AnyResource
from lrm.telemetry import Telemetry
from lrm.testing import VirtualClock
from storage.base import Entry, Guard, Lease
from storage.errors import NoSpace, OutcomeUnknown, TooLarge, Unavailable
from storage.memory import MemoryStorage


class Store(MemoryStorage):
    """A memory store that counts, and fails as it is told: each error once, in order."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(clock=clock)
        self.errors: list[Exception] = []
        self.lose_answers = 0
        self.leases = 0
        self.writes = 0

    async def grant_lease(self, ttl: int) -> Lease:
        self.leases += 1
        return await super().grant_lease(ttl)

    async def create(self, key: str, value: bytes, *, lease: int = 0, guards: tuple[Guard, ...] = ()) -> Entry:
        return await self._one(super().create(key, value, lease=lease, guards=guards))

    async def update(self, key: str, value: bytes, *, expected_revision: int, guards: tuple[Guard, ...] = ()) -> Entry:
        return await self._one(super().update(key, value, expected_revision=expected_revision, guards=guards))

    async def _one(self, write: Any) -> Any:
        if self.errors:
            write.close()
            raise self.errors.pop(0)
        self.writes += 1
        entry = await write
        if self.lose_answers:
            self.lose_answers -= 1
            raise Unavailable("the answer was lost, and the writer took it for not written")
        return entry


class Scene:
    """Events over a store, on a clock that stands still."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.storage = Store(self.clock)
        uids = itertools.count(1)
        self.events = Events(
            self.storage, self.clock, root="/lrm", instance="host-a", new_uid=lambda: f"{next(uids):06x}-uid"
        )

    def tell(self, message: str = "no answer", reason: str = "Unreachable", **how: Any) -> None:
        of: AnyResource = how.pop("of", None) or stored_widget()
        self.events.record(of, how.pop("type", "Warning"), reason, message, component="widgets", **how)

    async def stored(self) -> list[dict[str, Any]]:
        await self.clock.settle()
        return [orjson.loads(e.value) for e in (await self.storage.list(events_prefix("/lrm"))).entries]

    async def counts(self) -> list[tuple[str, int]]:
        return [(e["message"], e["count"]) for e in await self.stored()]


def stored_widget(name: str = "w", uid: str = "uid-1") -> AnyResource:
    made = widget(name)
    made.metadata.uid, made.metadata.resource_version = uid, "7"
    return made


@asynccontextmanager
async def telling() -> AsyncIterator[Scene]:
    scene = Scene()
    running = asyncio.create_task(scene.events.run())
    try:
        yield scene
    finally:
        running.cancel()
        await asyncio.wait([running])
        await scene.storage.aclose()


async def test_an_event_is_what_kubernetes_clients_expect() -> None:
    async with telling() as scene:
        scene.tell()
        [event] = await scene.stored()
    assert event["involvedObject"] == {
        "apiVersion": "test.neuroglia.io/v1",
        "kind": "Widget",
        "namespace": "default",
        "name": "w",
        "uid": "uid-1",
        "resourceVersion": "7",
    }
    assert (event["type"], event["reason"], event["message"], event["count"]) == (
        "Warning",
        "Unreachable",
        "no answer",
        1,
    )
    assert event["source"] == {"component": "widgets", "host": "host-a"}
    assert event["firstTimestamp"] == event["lastTimestamp"] == "2026-01-01T00:00:00Z"
    assert event["metadata"]["name"].startswith("w.")


async def test_names_of_one_objects_events_are_unique_and_sorted_by_time() -> None:
    async with telling() as scene:
        for number in range(5):
            scene.tell(f"{number}")
            if number % 2:
                await scene.clock.advance(1)
        assert [e["message"] for e in await scene.stored()] == ["0", "1", "2", "3", "4"]
        assert (await scene.storage.list(events_prefix("/lrm", "default", "w"))).entries
        assert not (await scene.storage.list(events_prefix("/lrm", "default", "wx"))).entries


async def test_the_same_again_is_a_count_until_ten_minutes_were_quiet() -> None:
    async with telling() as scene:
        for _ in range(4):
            scene.tell()
            await scene.clock.advance(500)
        [event] = await scene.stored()
        assert (event["count"], event["lastTimestamp"]) == (4, "2026-01-01T00:25:00Z")
        await scene.clock.advance(101)
        scene.tell()
        assert await scene.counts() == [("no answer", 4), ("no answer", 1)]


async def test_what_repeats_faster_than_it_is_written_costs_one_write() -> None:
    async with telling() as scene:
        for _ in range(100):
            scene.tell()
        assert await scene.counts() == [("no answer", 100)]
        assert scene.storage.writes == 1


async def test_the_eleventh_message_for_one_reason_and_all_later_ones_are_combined() -> None:
    async with telling() as scene:
        for number in range(SIMILAR_MOST + 5):
            scene.tell(f"message {number}")
        scene.tell("message 3")
        scene.tell("another reason", reason="Other")
        scene.tell("another object", of=stored_widget("v"))
        found = dict(await scene.counts())
    assert found.pop("(combined from similar events): message 14") == 5
    assert found.pop("message 3") == 2
    assert len(found) == SIMILAR_MOST - 1 + 2


async def test_a_story_that_goes_on_for_hours_begins_anew_before_its_first_event_ends() -> None:
    async with telling() as scene:
        for _ in range(7 * 12):
            scene.tell()
            await scene.clock.advance(300)
        assert [count for _, count in await scene.counts()] == [73, 11]


async def test_events_end_with_a_lease_that_many_share() -> None:
    async with telling() as scene:
        for number in range(LEASE_EVENTS_MOST + 1):
            scene.tell(of=stored_widget(f"w{number}"))
        await scene.events.flush(60)
        assert scene.storage.leases == 2, "a thousand end with one"
        await scene.clock.advance(601)
        scene.tell()
        assert len(await scene.stored()) == LEASE_EVENTS_MOST + 2
        assert scene.storage.leases == 3, "ten minutes are one lease's"
        await scene.clock.advance(KEPT_SECONDS - 602)
        assert len(await scene.stored()) == LEASE_EVENTS_MOST + 2, "a day is kept"
        await scene.clock.advance(1202)
        assert await scene.stored() == []


async def test_what_is_told_while_the_store_is_away_is_written_when_it_is_back() -> None:
    async with telling() as scene:
        scene.storage.errors = [Unavailable("away"), NoSpace("full"), Unavailable("away")]
        scene.tell("a")
        scene.tell("b")
        assert await scene.stored() == []
        scene.tell("a")
        await scene.clock.advance(10)
        assert await scene.counts() == [("a", 2), ("b", 1)]
        assert scene.events.stats.dropped == 0


async def test_a_write_whose_answer_was_lost_is_not_told_twice() -> None:
    async with telling() as scene:
        scene.storage.lose_answers = 1
        scene.tell()
        await scene.clock.advance(1)
        scene.tell()
        assert await scene.counts() == [("no answer", 2)]


@pytest.mark.parametrize("error", [OutcomeUnknown("?"), TooLarge("!"), RuntimeError("a mistake of ours")])
async def test_what_cannot_be_settled_or_is_refused_is_given_up_and_later_ones_go_on(error: Exception) -> None:
    async with telling() as scene:
        scene.storage.errors = [error]
        scene.tell()
        assert await scene.stored() == []
        assert scene.events.stats.dropped == 1
        scene.tell()
        assert await scene.counts() == [("no answer", 1)]


async def test_a_message_of_any_length_and_letters_is_told() -> None:
    async with telling() as scene:
        scene.tell("half a pair: \ud800")
        scene.tell("long" * 1000)
        messages = [message for message, _ in await scene.counts()]
    assert messages[0] == "half a pair: ?"
    assert (len(messages[1]), messages[1][-1]) == (1024, "…")


async def test_a_count_goes_on_in_a_new_event_when_the_old_one_is_gone() -> None:
    async with telling() as scene:
        scene.tell()
        [entry] = await _entries(scene)
        await scene.storage.delete(entry.key, expected_revision=entry.revision)
        scene.tell()
        assert await scene.counts() == [("no answer", 1)]


async def test_a_lease_that_the_store_forgot_is_replaced() -> None:
    async with telling() as scene:
        scene.tell()
        [entry] = await _entries(scene)
        await scene.storage.revoke(entry.lease)
        scene.tell("another")
        assert await scene.counts() == [("another", 1)]
        assert scene.storage.leases == 2


async def test_when_too_many_wait_the_oldest_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_QUEUE_MOST", 3)
    scene = Scene()
    for number in range(5):
        scene.tell(reason=f"R{number}")
    assert (scene.events.stats.recorded, scene.events.stats.dropped) == (5, 2)
    exposition, _ = served_by(scene.events)
    assert b"lrm_events_dropped_total 2.0" in exposition
    assert b"lrm_events_queued 3.0" in exposition
    running = asyncio.create_task(scene.events.run())
    assert [e["reason"] for e in await scene.stored()] == ["R2", "R3", "R4"]
    running.cancel()
    await asyncio.wait([running])


async def test_a_deposed_leader_tells_nothing() -> None:
    async with telling() as scene:
        first = StaticElection(scene.storage, scene.clock, root="/lrm", lock_name="l", identity="a")
        term = await first.acquire()
        scene.tell("while it led", fence=term)
        await scene.clock.settle()
        rival = StaticElection(scene.storage, scene.clock, root="/lrm", lock_name="l", identity="b")
        await rival.acquire()
        scene.tell("not knowing", fence=term)
        await scene.clock.settle()
        term.lost()
        scene.tell("knowing", fence=term)
        assert [message for message, _ in await scene.counts()] == ["while it led"]
        assert scene.events.stats.dropped == 2


async def test_flush_waits_for_what_was_told_and_not_for_ever() -> None:
    async with telling() as scene:
        scene.tell()
        await scene.events.flush(5)
        assert scene.events.stats.written == 1
        scene.storage.errors = [Unavailable("away")] * 100
        scene.tell()
        flushing = asyncio.create_task(scene.events.flush(1))
        await scene.clock.advance(0.9)
        assert not flushing.done()
        await scene.clock.advance(0.2)
        assert flushing.done()


async def test_what_is_collected_is_told_of_the_object_and_outlives_it() -> None:
    async with gc_scene() as scene:
        owner = await scene.make("owner")
        await scene.make("child", owner)
        await scene.client.delete(owner)
        await scene.settle()
        writing = asyncio.create_task(scene.events.run())
        await scene.settle()
        writing.cancel()
        await asyncio.wait([writing])
        assert await scene.names() == set()
        [entry] = (await scene.storage.list(events_prefix("/lrm", "default", "child"))).entries
    event = orjson.loads(entry.value)
    assert (event["reason"], event["source"]["component"]) == ("Collected", "gc")
    assert event["message"] == "deletion was asked for: it belonged to Widget/owner"


async def _entries(scene: Scene) -> list[Entry]:
    await scene.clock.settle()
    return list((await scene.storage.list(events_prefix("/lrm"))).entries)


def served_by(events: Events) -> tuple[bytes, str]:
    telemetry = Telemetry()
    telemetry.observe(events.measure)
    return telemetry.exposition()
