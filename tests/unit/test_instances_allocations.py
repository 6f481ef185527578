"""Places given out for real: reservations in the workers' status, whatever dies, and nobody forgotten who fits."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import pytest

from controllers.instances.allocations import Allocations
from controllers.instances.kind import INSTANCES, LabInstanceRequest, Need, WorkerRef
from controllers.instances.placing import Placing
from controllers.instances.scheduling import NoRoom, Waits
from controllers.workers.kind import LabWorker
from controllers.workers.status import Allocation
from equipment.instances_scene import dying_at
from equipment.placing_scene import MIB, PlacingScene, SizedOutside, placing_scene
from equipment.pools_scene import Forgetful
from lrm.cache import Cache
from lrm.errors import CacheBehind, LrmError
from lrm.resource import PAUSE_ANNOTATION
from lrm.testing import VirtualClock
from storage.base import Entry, Guard
from storage.errors import OutcomeUnknown, StorageError, Unavailable

CORE = {"resources": {"cpu": 1}}


class Slow(Forgetful):
    """A store that takes its time over the writes of requests, as long as it is told to."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(clock=clock)
        self.open = asyncio.Event()
        self.waiting = 0

    async def update(self, key: str, value: bytes, *, expected_revision: int, guards: tuple[Guard, ...] = ()) -> Entry:
        if "/labinstancerequests/" in key and b'"workerRef"' in value:
            self.waiting += 1
            await self.open.wait()
        return await super().update(key, value, expected_revision=expected_revision, guards=guards)


async def test_a_place_is_reserved_while_the_lab_is_there_and_given_back_after() -> None:
    async with placing_scene() as scene:
        await scene.worker("w")
        await scene.ask("a", resources={"cpu": 2, "memory": "1Gi"}, environment={"NODES": "3"})
        await scene.clock.advance(5)
        request, worker = await scene.get("a"), await scene.get_worker("w")
        assert request.status.phase == "Running"
        [held] = worker.status.allocations.values()
        assert (held.cpu, held.memory, held.nodes, held.slots) == (2, 1024 * MIB, 3, 1)
        assert held.since == scene.clock.now() - timedelta(seconds=5)
        await scene.delete("a")
        await scene.clock.advance(5)
        assert await scene.where("a") == "gone"
        assert await scene.held() == {"w": set()}
        assert await scene.settled_wrongs() == []


async def test_what_waits_is_woken_by_whatever_gives_it_room() -> None:
    async with placing_scene() as scene:
        await scene.ask("a", labTrack="t")
        assert await scene.where("a") == "NoWorkersAvailable"
        worker = await scene.worker("w", slots=1, labTrack="t")
        assert await scene.where("a") == "w"
        await scene.ask("b")
        assert await scene.where("b") == "NoCapacityAvailable"
        await scene.client.update(worker, lambda w: setattr(w.spec, "max_concurrent_labs", 2))
        await scene.clock.settle()
        assert await scene.where("b") == "w"
        await scene.ask("c")
        await scene.delete("a")
        await scene.clock.advance(5)
        assert await scene.where("c") == "w"


async def test_a_stranger_s_lab_takes_a_slot_and_its_nodes_until_it_stops() -> None:
    async with placing_scene() as scene:
        await scene.worker("w", slots=2, cml={"maxNodesLicensed": 10})
        stranger = await scene.foreign_lab("w", "l1", node_count=8)
        stopped = await scene.foreign_lab("w", "l2", state="STOPPED", node_count=8)
        await scene.ask("big", environment={"NODES": "3"})
        await scene.ask("small", environment={"NODES": "2"})
        assert await scene.where("big") == "NoCapacityAvailable"
        assert await scene.where("small") == "w"
        assert (await scene.get("big")).status.phase_history == []
        await scene.end_foreign_lab(stranger)
        assert await scene.where("big") == "w"
        assert stopped.status.state == "STOPPED"


async def test_the_record_of_an_instance_s_own_lab_does_not_count_beside_its_reservation() -> None:
    async with placing_scene() as scene:
        await scene.worker("w", slots=2)
        await scene.ask("a")
        await scene.foreign_lab("w", "l1", title=f"lrm-{(await scene.get('a')).uid}", node_count=4)
        await scene.ask("b")
        assert await scene.where("b") == "w"


async def test_an_instance_s_own_lab_does_not_count_beside_its_reservation_whatever_its_title() -> None:
    async with placing_scene() as scene:
        await scene.worker("w", slots=2)
        await scene.ask("a")
        instances = scene.client.bind(owner="instances", fence=None)
        await instances.update_status(await scene.get("a"), lambda r: setattr(r.status, "cml_lab_id", "l1"))
        await scene.foreign_lab("w", "l1", title="routers at last", node_count=4)
        await scene.ask("b")
        assert await scene.where("b") == "w"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda w: w.status.enter("Draining", "Test", w.metadata.creation_timestamp), "it drains"),
        (
            lambda w: w.status.set_condition("Ready", False, "X", "", now=w.metadata.creation_timestamp),
            "it is not Ready",
        ),
        (lambda w: setattr(w.status, "capacity", None), "what it has is not known"),
    ],
)
async def test_a_worker_that_takes_no_labs_is_passed_over_until_it_does_again(change: Any, why: str) -> None:
    async with placing_scene() as scene:
        worker = await scene.worker("w")
        before = worker.status.thaw()
        closed = await scene.set_worker(worker, change)
        await scene.ask("a", **CORE)
        assert await scene.where("a") in {"NoWorkersAvailable", "NoCapacityAvailable"}, why

        def open_again(w: LabWorker) -> None:
            history = w.status.phase_history
            w.status.capacity, w.status.conditions = before.capacity, before.conditions
            if w.status.phase != "Ready":
                w.status.phase_history = history
                w.status.enter("Ready", "Test", scene.clock.now())

        await scene.set_worker(closed, open_again)
        assert await scene.where("a") == "w", why


@pytest.mark.parametrize("field", ["desired_phase", "observe_only", "paused"])
async def test_a_worker_that_a_person_holds_back_takes_no_labs(field: str) -> None:
    async with placing_scene() as scene:
        worker = await scene.worker("w")

        def hold(w: LabWorker) -> None:
            match field:
                case "desired_phase":
                    w.spec.desired_phase = "Draining"
                case "observe_only":
                    w.spec.observe_only = True
                case _:
                    w.metadata.annotations[PAUSE_ANNOTATION] = "true"

        await scene.client.update(worker, hold)
        await scene.clock.settle()
        await scene.ask("a")
        assert await scene.where("a") == "NoWorkersAvailable"


async def test_a_hundred_who_ask_at_once_get_what_there_is_in_their_order() -> None:
    async with placing_scene(lead=False) as scene:
        for n in range(5):
            await scene.worker(f"w{n}", slots=4)
        for n in range(100):
            await scene.ask(f"r{n:03}")
            await scene.clock.advance(0.001)
        await scene.lead()
        await scene.clock.advance(10)
        placed = [f"r{n:03}" for n in range(100) if (await scene.where(f"r{n:03}")).startswith("w")]
        assert placed == [f"r{n:03}" for n in range(20)]
        assert await scene.settled_wrongs() == []


async def test_the_engine_s_room_is_what_its_requests_leave() -> None:
    async with placing_scene() as scene:
        for n in range(6):
            await scene.ask(f"r{n}", runtime="Container", **CORE)
            await scene.clock.advance(1)
        await scene.clock.advance(5)
        placed = [await scene.where(f"r{n}") for n in range(6)]
        assert placed == ["docker"] * 4 + ["NoCapacityAvailable"] * 2
        await scene.delete("r0")
        await scene.clock.advance(5)
        assert await scene.where("r4") == "docker"
        assert await scene.settled_wrongs() == []


async def test_the_engine_s_room_is_not_promised_twice_while_places_are_written_down() -> None:
    clock = VirtualClock()
    storage = Slow(clock)
    async with placing_scene(storage=storage, clock=clock, lead=False) as scene:
        for n in range(8):
            await scene.ask(f"r{n}", runtime="Container", **CORE)
        await scene.lead()
        await clock.advance(30)
        assert storage.waiting == 4
        storage.open.set()
        await clock.advance(5)
        assert Counter([await scene.where(f"r{n}") for n in range(8)]) == {"docker": 4, "NoCapacityAvailable": 4}
        assert await scene.settled_wrongs() == []


async def test_a_promise_that_is_not_taken_up_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The older one is told that the worker has no room for it after all; the younger one fits, and hears of it."""
    async with placing_scene(lead=False) as scene:
        await scene.worker("w", slots=1)
        await scene.ask("old", resources={"cpu": 8})
        await scene.clock.advance(1)
        await scene.ask("young", **CORE)
        reserve = Allocations.reserve

        async def late(self: Allocations, place: WorkerRef, request: LabInstanceRequest, need: Need, ctx: Any) -> None:
            if request.name == "old" and need.cpu == 8:
                worker = await scene.get_worker("w")
                client = scene.client.bind(owner="workers", fence=None)
                await client.update_status(worker, lambda w: setattr(w.status.capacity, "cpu", 4))
            await reserve(self, place, request, need, ctx)

        monkeypatch.setattr(Allocations, "reserve", late)
        await scene.lead()
        await scene.clock.advance(20)
        assert (await scene.where("old"), await scene.where("young")) == ("TooLarge", "w")


async def test_without_an_engine_a_container_waits_and_says_so() -> None:
    async with placing_scene(instances_rest_interval=60) as scene:
        scene.engine = None
        await scene.ask("a", runtime="Container")
        assert await scene.where("a") == "EngineUnavailable"
        await scene.ask("b")
        await scene.worker("w")
        assert await scene.where("b") == "w"


async def test_a_place_on_the_engine_names_it_and_another_engine_is_another_place() -> None:
    async with placing_scene() as scene:
        for n in range(4):
            await scene.ask(f"r{n}", runtime="Container", **CORE)
        await scene.clock.advance(5)
        ref = (await scene.get("r3")).status.worker_ref
        assert (ref and (ref.kind, ref.uid)) == ("Engine", "engine-1")
        assert scene.engine is not None
        scene.engine = replace(scene.engine, id="engine-2")
        await scene.ask("r4", runtime="Container", **CORE)
        await scene.clock.advance(5)
        ref = (await scene.get("r4")).status.worker_ref
        assert (ref and ref.uid) == "engine-2", "what the first one has takes no room there"


async def test_a_quota_lets_the_oldest_in_and_the_next_when_one_has_ended() -> None:
    async with placing_scene(instances_most_per_student=2) as scene:
        await scene.worker("w")
        for name in "abc":
            await scene.ask(name, studentEmail="ann@x.edu")
            await scene.clock.advance(1)
        await scene.ask("d", studentEmail="Ann@X.edu")
        assert [await scene.where(n) for n in "abcd"] == ["w", "w", "QuotaExceeded", "QuotaExceeded"]
        await scene.delete("a")
        await scene.clock.advance(5)
        assert [await scene.where(n) for n in "bcd"] == ["w", "w", "QuotaExceeded"]


async def test_an_instance_that_is_moved_to_another_day_gives_way_at_once() -> None:
    async with placing_scene(instances_most_per_student=1) as scene:
        await scene.ask("a", studentEmail="ann@x.edu")
        await scene.clock.advance(1)
        await scene.ask("b", studentEmail="ann@x.edu", runtime="Container")
        assert await scene.where("b") == "QuotaExceeded"
        tomorrow = scene.clock.now() + timedelta(days=1)
        await scene.client.update(await scene.get("a"), lambda r: setattr(r.spec, "scheduled_start_time", tomorrow))
        await scene.clock.settle()
        assert await scene.where("b") == "docker"


# Reservations themselves


@pytest.mark.parametrize(
    ("need", "fits", "why"),
    [
        (Need(cpu=7, memory=MIB, nodes=1), True, "what is left"),
        (Need(cpu=7.5), False, "more cores than are left"),
        (Need(memory=8192 * MIB), False, "more memory than is left"),
        (Need(nodes=200), False, "more nodes than are left"),
        (Need(slots=4), False, "more slots than are left"),
    ],
)
async def test_a_reservation_is_checked_against_the_state_that_it_changes(need: Need, fits: bool, why: str) -> None:
    async with placing_scene(lead=False) as scene:
        await scene.worker("w")
        await scene.ask("a")
        allocations, context = Allocations(scene.cache), _Context(scene)
        place = _ref(await scene.get_worker("w"))
        request = await scene.get("a")
        other = Allocation(cpu=1, memory=MIB, slots=1, nodes=1)
        await context.client.update_status(
            await scene.get_worker("w"), lambda w: w.status.allocations.update({"other": other})
        )
        # The cache may not show it yet: the store's state is what counts.
        if fits:
            await allocations.reserve(place, request, need, context)  # type: ignore[arg-type]
        else:
            with pytest.raises(NoRoom, match="no room"):
                await allocations.reserve(place, request, need, context)  # type: ignore[arg-type]
        assert (request.uid in (await scene.get_worker("w")).status.allocations) == fits, why


async def test_a_reservation_that_is_repeated_replaces_itself_and_shows_its_own_time() -> None:
    async with placing_scene(lead=False) as scene:
        await scene.worker("w", slots=1)
        await scene.ask("a")
        allocations, context = Allocations(scene.cache), _Context(scene)
        worker, request = await scene.get_worker("w"), await scene.get("a")
        times = []
        for _ in range(3):
            await allocations.reserve(_ref(worker), request, Need(cpu=8), context)  # type: ignore[arg-type]
            times.append((await scene.get_worker("w")).status.allocations[request.uid].since)
        assert len(set(times)) == 3
        assert times == sorted(times)


@pytest.mark.parametrize("end", ["deleted", "replaced", "instance"])
async def test_a_place_that_is_another_one_by_now_has_no_room(end: str) -> None:
    async with placing_scene(lead=False) as scene:
        worker = await scene.worker("w")
        await scene.ask("a")
        allocations, context, request = Allocations(scene.cache), _Context(scene), await scene.get("a")
        if end == "instance":
            await scene.set_worker(worker, lambda w: setattr(w.status.ec2, "instance_id", "i-0fedcba9876543210"))
        else:
            await scene.client.delete(worker)
            if end == "replaced":
                await scene.worker("w")
        with pytest.raises(NoRoom):
            await allocations.reserve(_ref(worker), request, Need(), context)  # type: ignore[arg-type]


async def test_a_removal_that_was_decided_before_a_new_reservation_leaves_it_alone() -> None:
    """A leftover is judged, its request gets the same place once more, and only then the removal is written."""
    async with placing_scene(lead=False) as scene:
        await scene.worker("w")
        await scene.ask("a")
        allocations, context = Allocations(scene.cache), _Context(scene)
        worker, request = await scene.get_worker("w"), await scene.get("a")
        await allocations.reserve(_ref(worker), request, Need(), context)  # type: ignore[arg-type]
        before = await scene.get_worker("w")
        judged = {request.uid: before.status.allocations[request.uid].since}
        await allocations.reserve(_ref(worker), request, Need(), context)  # type: ignore[arg-type]
        await allocations.remove(before, judged, context)  # type: ignore[arg-type]
        now = await scene.get_worker("w")
        assert request.uid in now.status.allocations
        judged = {request.uid: now.status.allocations[request.uid].since}
        await allocations.remove(now, judged, context)  # type: ignore[arg-type]
        assert (await scene.get_worker("w")).status.allocations == {}


@dataclass
class _Context:
    """What reservations use of a context."""

    scene: PlacingScene

    def __post_init__(self) -> None:
        self.client = self.scene.client.bind(owner=INSTANCES, fence=None)
        self.clock = self.scene.clock
        self.term = 1

    def guards(self) -> tuple[Guard, ...]:
        return (Guard("/lrm/leader/instances", self.term),)


def _ref(worker: LabWorker) -> WorkerRef:
    return WorkerRef(
        kind="LabWorker",
        namespace=worker.namespace,
        name=worker.name,
        uid=worker.uid,
        instance_id=worker.status.ec2.instance_id or "",
    )


# Promises


async def _wants(scene: PlacingScene, name: str, **spec: Any) -> LabInstanceRequest:
    """A request that is prepared, and that nobody has looked at since."""
    await scene.ask(name, **spec)
    client = scene.client.bind(owner=INSTANCES, fence=None)
    return await client.update_status(await scene.get(name), lambda r: setattr(r.status, "need", Need(cpu=1)))


def _placing(scene: PlacingScene) -> Placing:
    return Placing(scene.cache, Allocations(scene.cache), scene.settings, scene.clock, engine=lambda: scene.engine)


async def test_nobody_is_told_to_wait_by_a_cache_that_does_not_show_him() -> None:
    """Else the change that gives him room could pass before anybody knows that he waits."""
    async with placing_scene(lead=False) as scene:
        behind = Cache(scene.storage, scene.registry, scene.clock)
        filling = asyncio.create_task(behind.run())
        await behind.wait_synced()
        filling.cancel()
        await asyncio.wait([filling])
        placing = Placing(behind, Allocations(behind), scene.settings, scene.clock)
        request = await _wants(scene, "a")
        asking = asyncio.create_task(placing.choose(request, _Context(scene)))  # type: ignore[arg-type]
        await scene.clock.settle()
        assert not asking.done()
        await scene.clock.advance(5)
        with pytest.raises(CacheBehind):
            await asking


async def test_a_promise_is_kept_until_its_request_wants_no_place_and_not_beyond_the_term() -> None:
    async with placing_scene(lead=False) as scene:
        worker = await scene.worker("w", slots=1)
        placing, context = _placing(scene), _Context(scene)
        young = await _wants(scene, "young")
        assert await placing.choose(young, context) == _ref(worker)  # type: ignore[arg-type]
        before = {"scheduledStartTime": scene.clock.now() - timedelta(hours=1)}
        old = await _wants(scene, "old", **before)
        assert isinstance(await placing.choose(old, context), Waits)  # type: ignore[arg-type]
        assert await placing.choose(young, context) == _ref(worker)  # type: ignore[arg-type]
        context.term = 2
        assert await placing.choose(old, context) == _ref(worker)  # type: ignore[arg-type]
        assert isinstance(await placing.choose(young, context), Waits)  # type: ignore[arg-type]
        tomorrow = scene.clock.now() + timedelta(days=1)
        await scene.client.update(old, lambda r: setattr(r.spec, "scheduled_start_time", tomorrow))
        await scene.clock.settle()
        assert await placing.choose(young, context) == _ref(worker)  # type: ignore[arg-type]
        assert not placing.promised(old.uid)
        with pytest.raises(NoRoom, match="not promised"):
            await placing.reserve(_ref(worker), await scene.get("old"), context)  # type: ignore[arg-type]


async def test_those_who_ask_at_once_are_decided_together_in_their_order() -> None:
    async with placing_scene(lead=False) as scene:
        await scene.worker("w", slots=2)
        placing, context = _placing(scene), _Context(scene)
        requests = []
        for n in range(5):
            requests.append(await _wants(scene, f"r{n}"))
            await scene.clock.advance(1)
        decisions = await asyncio.gather(*(placing.choose(r, context) for r in reversed(requests)))  # type: ignore[arg-type]
        assert [isinstance(d, WorkerRef) for d in decisions] == [False, False, False, True, True]


async def test_one_who_gives_up_asking_leaves_no_promise_and_holds_up_nobody() -> None:
    async with placing_scene(lead=False) as scene:
        await scene.worker("w", slots=1)
        placing, context = _placing(scene), _Context(scene)
        first, second = await _wants(scene, "a"), await _wants(scene, "b", scheduledStartTime=scene.clock.now())
        await scene.clock.settle()
        asking = [asyncio.create_task(placing.choose(r, context)) for r in (first, second)]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        asking[0].cancel()
        await scene.client.delete(first)
        await asyncio.wait(asking)
        assert isinstance(await placing.choose(second, context), WorkerRef)  # type: ignore[arg-type]
        assert not placing.promised(first.uid)


# What a dead leader leaves


@pytest.mark.parametrize("point", ["instances.reserved", "instances.placed", "instances.cleaned", "instances.ended"])
async def test_whatever_a_dying_leader_leaves_reserved_is_used_or_given_back(
    point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = dying_at(monkeypatch, point)
    async with placing_scene() as scene:
        await scene.worker("w1", slots=1)
        await scene.ask("a")
        await scene.clock.advance(5)
        if point in {"instances.cleaned", "instances.ended"}:
            await scene.client.update(await scene.get("a"), lambda r: setattr(r.spec, "desired_phase", "Stopped"))
            await scene.clock.advance(10)
        assert died
        await scene.stop()
        await scene.ask("b")
        await scene.lead()
        await scene.clock.advance(20)
        if point in {"instances.cleaned", "instances.ended"}:
            assert await scene.where("b") == "w1"
        else:
            assert (await scene.where("a"), await scene.where("b")) == ("w1", "NoCapacityAvailable")
        assert await scene.settled_wrongs() == []


async def test_a_reservation_whose_request_was_forced_away_is_given_back() -> None:
    async with placing_scene() as scene:
        await scene.worker("w", slots=1)
        await scene.ask("a")
        await scene.clock.advance(5)
        assert await scene.held() == {"w": {"a"}}
        await scene.client.forget(await scene.get("a"))
        await scene.clock.advance(15)
        assert await scene.held() == {"w": set()}
        await scene.ask("b")
        assert await scene.where("b") == "w"


async def test_nothing_is_given_back_while_a_request_cannot_be_read() -> None:
    """It may be the very one that the reservation is for: another version wrote it."""
    async with placing_scene() as scene:
        await scene.worker("w", slots=1)
        await scene.ask("a")
        await scene.clock.advance(5)
        request = await scene.get("a")
        key = scene.registry.key_of(request)
        await scene.stop()
        await scene.storage.update(key, b'{"later": "version"}', expected_revision=request.revision)
        await scene.lead()
        await scene.clock.advance(30)
        assert list((await scene.get_worker("w")).status.allocations) == [request.uid]


async def test_a_reservation_is_not_taken_for_a_stray_while_its_place_is_being_written_down() -> None:
    clock = VirtualClock()
    storage = Slow(clock)
    async with placing_scene(storage=storage, clock=clock) as scene:
        await scene.worker("w")
        await scene.ask("a")
        await clock.advance(30)
        assert storage.waiting == 1
        assert await scene.held() == {"w": {"a"}}
        storage.open.set()
        await clock.advance(10)
        assert await scene.where("a") == "w"
        assert await scene.settled_wrongs() == []


async def test_a_reservation_without_a_request_is_looked_at_by_a_new_leader() -> None:
    async with placing_scene(lead=False) as scene:
        worker = await scene.worker("w")
        client = scene.client.bind(owner=INSTANCES, fence=None)
        await client.update_status(worker, lambda w: w.status.allocations.update({"nobody": Allocation()}))
        await scene.lead()
        await scene.clock.advance(15)
        assert (await scene.get_worker("w")).status.allocations == {}


# Any interleaving, any crash


class Unreliable(Forgetful):
    """A store that loses requests and replies of whoever leads, who alone writes under a guard of its term."""

    def __init__(self, clock: VirtualClock, chance: random.Random) -> None:
        super().__init__(clock=clock)
        self.chance, self.faults = chance, True

    async def update(self, key: str, value: bytes, *, expected_revision: int, guards: tuple[Guard, ...] = ()) -> Entry:
        theirs = self.faults and any("/leader/" in guard.key for guard in guards)
        if theirs and self.chance.random() < 0.04:
            raise Unavailable("the request was lost")
        entry = await super().update(key, value, expected_revision=expected_revision, guards=guards)
        await asyncio.sleep(0)  # here the leader may die with the write made and no reply
        if theirs and self.chance.random() < 0.04:
            raise OutcomeUnknown("the reply was lost")
        return entry


@dataclass
class Story:
    """What students, workers, strangers and leaders do, one thing after another."""

    scene: PlacingScene
    chance: random.Random
    count: int = 0

    async def tell(self, length: int) -> None:
        await self._worker()
        deeds = (*[self._ask] * 6, *[self._end] * 3, *[self._turn_worker] * 2, self._stranger, self._worker)
        for _ in range(length):
            await self._do(self.chance.choice([*deeds, self._lose_worker, self._restart])())
            for _ in range(self.chance.choice((0, 0, 1, 2, 3, 5, 8, 40))):
                await asyncio.sleep(0)
            if self.chance.random() < 0.3:
                await self.scene.clock.advance(self.chance.choice((0.3, 3, 12)))

    async def end(self) -> None:
        """No more faults; time passes, but nobody looks at anything just because it does."""
        assert isinstance(self.scene.storage, Unreliable)
        self.scene.storage.faults = False
        await self.scene.clock.advance(200)

    async def _do(self, deed: Coroutine[Any, Any, None]) -> None:
        """Do it, while time stands still unless it is what the deed waits for (a conflict is tried again later)."""
        task = asyncio.create_task(deed)
        rounds = 0
        while not task.done() and (rounds := rounds + 1) < 100:
            await asyncio.sleep(0)
        while not task.done():
            await self.scene.clock.advance(0.01)
        # What it wanted to change may be gone, changed or not be allowed any more: then nothing was done.
        with contextlib.suppress(LrmError, StorageError):
            task.result()

    def _name(self, letter: str) -> str:
        self.count += 1
        return f"{letter}{self.count}"

    async def _worker(self) -> None:
        if len(self.scene.cache.all(LabWorker)) < 4:
            track = self.chance.choice(["", "t"])
            await self.scene.worker(
                self._name("w"), slots=self.chance.randint(1, 3), labTrack=track, shared=self.chance.random() < 0.3
            )

    async def _turn_worker(self) -> None:
        """A worker drains or serves again, loses or gets its licence, is replaced by a smaller or a larger machine."""
        worker = self._some(LabWorker)
        if worker is None:
            return
        turn, now = self.chance.randrange(4), self.scene.clock.now()

        def mutate(w: LabWorker) -> None:
            if turn == 0:
                w.status.enter("Draining" if w.status.phase == "Ready" else "Ready", "Test", now)
            elif turn == 1:
                w.status.cml.licensed = not w.status.cml.licensed
            elif turn == 2 and w.status.capacity is not None:
                w.status.capacity.cpu = self.chance.choice((4, 8))
            else:
                ready = w.status.condition("Ready")
                w.status.set_condition("Ready", ready is None or ready.status == "False", "Test", "", now=now)

        await self.scene.set_worker(worker, mutate)

    async def _lose_worker(self) -> None:
        worker = self._some(LabWorker)
        if worker is not None:
            self.scene.outside.lose(worker.name)
            await self.scene.client.delete(worker)

    async def _stranger(self) -> None:
        worker = self._some(LabWorker)
        if worker is not None and self.chance.random() < 0.5:
            record = await self.scene.foreign_lab(worker.name, self._name("l"))
            if self.chance.random() < 0.7:
                await self.scene.clock.advance(1)
                await self.scene.end_foreign_lab(record)

    async def _ask(self) -> None:
        container = self.chance.random() < 0.3
        await self.scene.ask(
            self._name("r"),
            runtime="Container" if container else "CML",
            studentEmail=self.chance.choice(["ann@x.edu", "bob@x.edu", "cy@x.edu"]),
            resources=self.chance.choice([{}, {"cpu": 1}, {"cpu": 3}, {"memory": "1Gi"}]),
            environment={"NODES": self.chance.choice(["0", "4", "8"])},
            **({} if container else {"labTrack": self.chance.choice(["", "", "t"])}),
            restartPolicy=self.chance.choice(["Never", "OnFailure"]),
            durationMinutes=self.chance.choice([1, 60]),
        )

    async def _end(self) -> None:
        request = self._some(LabInstanceRequest)
        if request is None:
            return
        match self.chance.randrange(4):
            case 0:
                await self.scene.client.update(request, lambda r: setattr(r.spec, "desired_phase", "Stopped"))
            case 1:
                later = self.scene.clock.now() + timedelta(seconds=320)
                await self.scene.client.update(request, lambda r: setattr(r.spec, "scheduled_start_time", later))
            case _:
                await self.scene.client.delete(request)

    async def _restart(self) -> None:
        await self.scene.stop()
        for _ in range(self.chance.choice((0, 5))):
            await asyncio.sleep(0)
        await self.scene.lead()

    def _some(self, model: type[Any]) -> Any:
        there = self.scene.cache.all(model)
        return self.chance.choice(there) if there else None


async def tell(seed: int, length: int) -> None:
    chance, clock = random.Random(seed), VirtualClock()
    quota = chance.choice((0, 3))
    policy = chance.choice(("BestFit", "LeastUsed", "RoundRobin"))
    storage = Unreliable(clock, chance)
    async with placing_scene(
        storage=storage, clock=clock, instances_most_per_student=quota, instances_placement=policy
    ) as scene:
        story = Story(scene, chance)
        await story.tell(length)
        await story.end()
        assert await scene.settled_wrongs() == [], f"seed {seed}"
        assert isinstance(scene.outside, SizedOutside)


@pytest.mark.parametrize("seed", range(12))
async def test_nothing_is_overcommitted_leaked_or_left_waiting_whatever_happens(seed: int) -> None:
    await tell(seed, 60)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 400))
async def test_nor_in_many_and_longer_stories(seed: int) -> None:
    await tell(seed, 150)
