"""CML's pushes make the mirror quick, and nothing but quick: they wake a sync, which believes the list alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable

import pytest
from structlog.testing import capture_logs

from controllers.cml.client import CmlClient
from controllers.labs.hints import PushHints
from controllers.labs.push import LabsPush
from controllers.workers.kind import INSTANCE_FINALIZER, LabWorker
from controllers.workers.status import Identity
from equipment.labs_world import LabsWorld, labs_world
from equipment.waiting import until
from lrm.resource import PAUSE_ANNOTATION

MODIFIED = {"event_type": "lab_event", "event": "modified", "element_type": "lab", "lab_id": "", "data": {}}


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LabsWorld]:
    """The interval is an hour: whatever is mirrored sooner was pushed."""
    async with labs_world(monkeypatch, push=True, labs_push_interval=0.05) as world:
        yield world


async def listening(world: LabsWorld, name: str = "w1") -> None:
    await until(lambda: len(world.machine(name).listeners) == 1, f"the channel to {name}")


async def silent(world: LabsWorld, name: str = "w1") -> None:
    await until(lambda: not world.machine(name).listeners, f"the end of the channel to {name}")


async def at_rest(world: LabsWorld) -> None:
    """No sync is under way, and none is due for a push."""
    hints, uid = world.labs.controller.hints, (await world.get_worker()).uid
    assert isinstance(hints, PushHints)
    await until(lambda: hints.due_in(uid) is None)
    await world.settled()


def delayed(world: LabsWorld) -> bool:
    """Whether the one channel waits to be opened again."""
    (waiting,) = world.push._delayed.values() or (None,)
    return waiting is not None and not waiting.is_set()


async def listened(world: LabsWorld) -> None:
    """A worker that was synced, and whose CML is heard."""
    await world.worker()
    await world.sync()
    await listening(world)
    await at_rest(world)


async def test_what_changes_in_cml_is_mirrored_as_soon_as_it_is_pushed(world: LabsWorld) -> None:
    await listened(world)
    lab = world.machine().add_lab("pushed", nodes=1)
    await until(lambda: [r.status.title for r in world.known()] == ["pushed"])
    world.edit(lab, title="renamed")
    await until(lambda: [r.status.title for r in world.known()] == ["renamed"])
    world.machine().start(lab)
    await until(lambda: [r.status.state for r in world.known()] == ["STARTED"])
    world.machine().remove(lab)
    await until(lambda: not world.known(), "the record to go")
    assert "lrm_labs_push_channels 1.0" in world.telemetry.exposition()[0].decode()


async def test_a_storm_of_pushes_is_few_syncs(world: LabsWorld) -> None:
    await listened(world)
    world.machine().counts.clear()
    for _ in range(500):
        world.machine().push(MODIFIED)
    await until(lambda: world.machine().counts["GET /labs"] >= 1)
    await at_rest(world)
    assert world.machine().counts["GET /labs"] <= 50
    assert world.push.describe()["hints"] <= 50


async def test_what_was_missed_while_no_channel_was_open_is_seen_when_it_opens_again(world: LabsWorld) -> None:
    await listened(world)
    fault = world.fault("status", path="/ws/ui", status=503)
    world.machine().directory.close_sessions()
    world.machine().push({})  # CML looks at its tokens now and then
    await silent(world)
    world.machine().add_lab("told to nobody")
    await until(lambda: world.machine().counts["GET /ws/ui"] >= 2, "a try that fails")
    assert not world.known()
    world.simulator.faults.clear(fault)
    await until(lambda: len(world.known()) == 1, "a look after the channel was opened again")


async def test_a_push_whose_sync_failed_is_not_forgotten(world: LabsWorld) -> None:
    await listened(world)
    fault = world.fault("html", path="/labs", status=200)
    world.machine().add_lab("pushed")

    async def told() -> bool:
        return "HTML" in ((await world.get_worker()).status.labs_sync_error or "")

    await until(told)
    world.simulator.faults.clear(fault)
    await until(lambda: len(world.known()) == 1, "the next try, long before the interval is over", timeout=30)


async def test_a_cml_without_the_channel_is_mirrored_all_the_same(world: LabsWorld) -> None:
    world.fault("status", path="/ws/ui", status=404)
    world.machine().add_lab("polled")
    await world.worker()
    await world.sync()
    assert len(world.known()) == 1
    assert world.push.describe()["open"] == 0


async def test_a_push_proves_nothing(world: LabsWorld) -> None:
    """Whatever is said on the channel, records follow the list."""
    await listened(world)
    lab = world.machine().add_lab("there")
    await until(lambda: len(world.known()) == 1)
    before = world.push.describe()["hints"]
    asked = world.machine().counts["GET /labs"]
    deleted = {"event_type": "lab_event", "event": "deleted", "element_type": "lab", "lab_id": lab.id, "data": {}}
    world.machine().push(deleted)
    await until(lambda: world.push.describe()["hints"] > before)
    await until(lambda: world.machine().counts["GET /labs"] > asked, "a look")
    await world.settled()
    (record,) = world.known()
    assert record.status.phase == "Present"


async def test_the_channel_ends_with_the_workers_serving_and_begins_again_with_it(world: LabsWorld) -> None:
    await listened(world)
    await world.change_worker(lambda w: w.status.enter("Stopped", "Test", world.clock.now()))
    await silent(world)

    def serve(w: LabWorker) -> None:
        w.status.enter("Starting", "Test", world.clock.now())
        w.status.enter("ReadyUnlicensed", "Test", world.clock.now())

    await world.change_worker(serve)
    await listening(world)


async def test_a_paused_worker_is_not_listened_to(world: LabsWorld) -> None:
    await listened(world)
    annotated = await world.client.update(
        await world.get_worker(), lambda w: w.metadata.annotations.update({PAUSE_ANNOTATION: "true"})
    )
    await silent(world)
    assert annotated is not None
    await world.client.update(annotated, lambda w: w.metadata.annotations.pop(PAUSE_ANNOTATION))
    await listening(world)


async def test_a_worker_that_is_gone_is_not_listened_to_and_a_new_one_of_its_name_is(world: LabsWorld) -> None:
    await listened(world)
    worker = await world.get_worker()
    await world.client.delete(worker)
    await world.client.remove_finalizer(worker, INSTANCE_FINALIZER)
    await silent(world)
    await until(lambda: world.cache.get(LabWorker, "default", "w1") is None)
    await world.worker()
    await listening(world)


async def test_another_cml_at_the_address_is_not_listened_to(world: LabsWorld) -> None:
    await listened(world)
    world.fault("identity", product_uuid="deadbeef-0000-4000-8000-000000000000")
    world.machine().counts.clear()
    world.machine().directory.close_sessions()
    world.machine().push({})
    await silent(world)
    await until(lambda: world.machine().counts["GET /licensing"] >= 1, "the identity to be asked for")
    await world.settled()
    assert world.machine().counts["GET /ws/ui"] == 0
    assert not world.machine().listeners


async def test_a_channel_that_was_refused_is_opened_as_soon_as_the_worker_is_well_again(
    world: LabsWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turn(ready: bool) -> Callable[[LabWorker], None]:
        return lambda w: w.status.set_condition("Ready", ready, "Test", "", now=world.clock.now())

    def trust(w: LabWorker) -> None:
        w.status.cml.identity = Identity(product_uuid=world.machine().product_uuid, fingerprint="0" * 64)

    monkeypatch.setattr("controllers.labs.push._RETRY_FIRST", 3600.0)
    fault = world.fault("status", path="/ws/ui", status=503)
    await world.worker()
    for tries, cure in ((1, turn(ready=True)), (2, trust)):
        await until(lambda tries=tries: world.machine().counts["GET /ws/ui"] == tries and delayed(world))
        await world.change_worker(turn(ready=False))
        await world.cache.barrier(30)
        assert delayed(world), "it is no better"
        if tries == 2:
            world.simulator.faults.clear(fault)
        await world.change_worker(cure)
    await listening(world)


async def test_only_the_leader_listens(world: LabsWorld) -> None:
    await listened(world)
    assert "lrm_labs_records{" in world.telemetry.exposition()[0].decode()
    world.term.lost()
    await silent(world)
    await until(lambda: "lrm_labs_records{" not in world.telemetry.exposition()[0].decode())
    assert world.push.describe()["listeners"] == 0


async def test_a_daemon_that_stops_hears_nothing_more(world: LabsWorld) -> None:
    await listened(world)
    await world.push.drain(10)
    await silent(world)
    await world.worker("w2")
    await world.settled()
    assert world.push.describe()["listeners"] == 0


async def test_no_channel_is_begun_while_those_of_an_ended_term_end(
    world: LabsWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that loses the lead cancels us, and a network may be slow to end a channel."""
    let_go, ends = asyncio.Event(), asyncio.Event()

    async def listen(client: CmlClient, opened: Callable[[], None], heard: Callable[[], None]) -> None:
        opened()
        try:
            await asyncio.Event().wait()
        finally:
            ends.set()
            await let_go.wait()

    await world.worker()
    await world.sync()
    monkeypatch.setattr(CmlClient, "listen", listen)
    push = LabsPush(cache=world.cache, sessions=world.sessions, hints=world.labs.controller.hints, clock=world.clock)
    with capture_logs() as logs:
        running = asyncio.create_task(push.run(world.term))
        await until(lambda: push.describe()["open"] == 1)
        running.cancel()
        await ends.wait()
        await world.worker("w2")
        await world.cache.barrier(30)
        assert not running.done()
        assert push.describe()["listeners"] == 0
        let_go.set()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert not [entry for entry in logs if entry["log_level"] == "error"]


async def test_push_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    async with labs_world(monkeypatch, push=False) as world:
        await world.worker()
        await world.sync()
        assert world.machine().counts["GET /ws/ui"] == 0
        assert world.push.describe() == {"name": "labs-push", "lock": "labs", "listeners": 0, "open": 0, "hints": 0}


SEEDS = [pytest.param(seed, marks=[] if seed < 2 else [pytest.mark.soak]) for seed in range(20)]


@pytest.mark.parametrize("seed", SEEDS)
async def test_whatever_happens_to_the_channel_the_mirror_is_right_in_the_end(world: LabsWorld, seed: int) -> None:
    """Labs come, change and go while the channel breaks and lists fail; nothing but pushes and retries brings syncs."""
    chance = random.Random(seed)
    await listened(world)
    machine = world.machine()

    def add() -> None:
        if len(machine.labs) < 8:
            machine.add_lab(f"new {chance.random()}", nodes=1)

    def rename() -> None:
        for lab in chance.sample(sorted(machine.labs.values(), key=lambda lab: lab.id), min(2, len(machine.labs))):
            world.edit(lab, title=f"renamed {chance.random()}")

    def turn() -> None:
        for lab in list(machine.labs.values())[:2]:
            machine.force(lab, chance.choice(["STARTED", "STOPPED", "DEFINED_ON_CORE"]))

    def remove() -> None:
        if machine.labs:
            machine.remove(chance.choice(list(machine.labs.values())))

    def end_channel() -> None:
        machine.directory.close_sessions()
        machine.push({})

    def spoil_list() -> None:
        world.fault(chance.choice(["html", "truncate", "empty", "drop"]), path="/labs", times=1)

    def spoil_tiles() -> None:
        world.fault(chance.choice(["html", "half", "empty"]), path="/populate_lab_tiles", times=1)

    steps = [add, rename, turn, remove, spoil_list, spoil_tiles] * 5 + [end_channel] * 2
    for step in chance.sample(steps, len(steps)):
        step()
        if chance.random() < 0.5:
            await world.clock.sleep(chance.random() / 10)
    world.simulator.faults.clear()

    def mirrored() -> bool:
        there = {lab.id: (lab.title, lab.state) for lab in machine.labs.values()}
        return {r.spec.lab_id: (r.status.title, r.status.state) for r in world.known()} == there

    await until(mirrored, f"the mirror of {len(machine.labs)} labs", timeout=90)
