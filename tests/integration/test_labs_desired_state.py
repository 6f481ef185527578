"""desiredState: carried out once per generation, never held against what students do."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from controllers.cml.simulator import Options
from controllers.cml.simulator.labs import Lab
from controllers.labs.kind import LabRecord
from controllers.workers.kind import LabWorker
from equipment.labs_world import FAST, LabsWorld, labs_world
from equipment.waiting import until
from lrm.resource import Condition


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LabsWorld]:
    async with labs_world(monkeypatch) as world:
        yield world


async def mirrored(world: LabsWorld, *, running: bool = False) -> tuple[Lab, LabRecord]:
    await world.worker()
    lab = world.machine().add_lab("OSPF", nodes=2, running=running)
    await world.sync()
    return lab, await world.record(lab.id)


async def wish(world: LabsWorld, record: LabRecord, state: str | None) -> LabRecord:
    current = await world.client.get(LabRecord, "default", record.name)
    changed = await world.client.update(current, lambda r: setattr(r.spec, "desired_state", state))
    assert changed is not None
    return changed


async def outcome(world: LabsWorld, record: LabRecord, generation: int) -> Condition:
    """The condition with which a generation was settled."""

    async def settled() -> LabRecord | None:
        now = await world.client.get(LabRecord, "default", record.name)
        return now if now.status.observed_generation == generation else None

    final = await until(settled, f"generation {generation} to be settled")
    assert final is not None
    assert final.status.acting is None
    condition = final.status.condition("DesiredState")
    assert condition is not None
    assert condition.observed_generation == generation
    return condition


async def test_a_lab_is_started_stopped_and_wiped_and_the_mirror_follows(world: LabsWorld) -> None:
    lab, record = await mirrored(world)
    for generation, state in enumerate(("STARTED", "STOPPED", "STARTED", "DEFINED_ON_CORE"), start=2):
        await wish(world, record, state)
        assert (await outcome(world, record, generation)).status == "True"
        assert lab.state == state

        async def mirrored_state(state: str = state) -> bool:
            return (await world.record(lab.id)).status.state == state

        await until(mirrored_state, "the sync that follows a reached state")
    history = (await world.record(lab.id)).status.operation_history
    assert [e.new_state for e in history] == ["STARTED", "STOPPED", "STARTED", "DEFINED_ON_CORE"]


async def test_what_students_do_afterwards_is_not_fought(world: LabsWorld) -> None:
    lab, record = await mirrored(world)
    await wish(world, record, "STARTED")
    await outcome(world, record, 2)
    world.machine().force(lab, "STOPPED")
    await world.sync()
    await world.settled()
    assert lab.state == "STOPPED"
    assert world.machine().counts["PUT /labs/{lab_id}/start"] == 1


async def test_what_students_do_meanwhile_is_not_fought_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is sent once: a lab that was stopped again before we looked stays so, and that is told."""
    async with labs_world(monkeypatch, labs_step_timeout=0.5, labs_step_interval=0.2) as world:
        lab, record = await mirrored(world)
        await wish(world, record, "STARTED")
        await until(lambda: world.machine().counts["PUT /labs/{lab_id}/start"] == 1)
        world.machine().force(lab, "STOPPED")
        condition = await outcome(world, record, 2)
        assert (condition.status, condition.reason) == ("False", "TimedOut")
        assert lab.state == "STOPPED"
        assert world.machine().counts["PUT /labs/{lab_id}/start"] == 1


async def test_a_start_that_cml_refuses_is_told_and_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    limited = Options(**{**{n: getattr(FAST, n) for n in FAST.__dataclass_fields__}, "nodes_unlicensed": 1})
    async with labs_world(monkeypatch, options=limited) as world:
        lab, record = await mirrored(world)
        await wish(world, record, "STARTED")
        condition = await outcome(world, record, 2)
        assert (condition.status, condition.reason) == ("False", "Refused")
        assert "limit" in condition.message
        assert lab.state == "DEFINED_ON_CORE"
        assert world.machine().counts["PUT /labs/{lab_id}/start"] == 1


async def test_a_step_whose_answer_is_lost_is_looked_for(world: LabsWorld) -> None:
    lab, record = await mirrored(world)
    world.fault("drop-answer", method="PUT", path=f"/labs/{lab.id}/start", times=1)
    await wish(world, record, "STARTED")
    assert (await outcome(world, record, 2)).status == "True"
    assert lab.state == "STARTED"


async def test_a_state_that_is_not_reached_in_time_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Options(**{**{n: getattr(FAST, n) for n in FAST.__dataclass_fields__}, "node_stop": 60.0})
    async with labs_world(monkeypatch, options=slow, labs_step_timeout=0.3) as world:
        _, record = await mirrored(world, running=True)
        await wish(world, record, "STOPPED")
        condition = await outcome(world, record, 2)
        assert (condition.status, condition.reason) == ("False", "TimedOut")
        assert world.machine().counts["PUT /labs/{lab_id}/stop"] == 1


async def test_a_lab_that_is_gone_is_told(world: LabsWorld) -> None:
    lab, record = await mirrored(world)
    world.machine().remove(lab)
    await wish(world, record, "STARTED")
    assert (await outcome(world, record, 2)).reason == "LabNotFound"


async def test_a_wish_for_a_stopped_workers_lab_waits_for_the_worker(world: LabsWorld) -> None:
    lab, record = await mirrored(world)

    def stop(w: LabWorker) -> None:
        w.status.enter("Stopped", "Test", world.clock.now())

    await world.change_worker(stop)
    await wish(world, record, "STARTED")

    async def waiting() -> bool:
        condition = (await world.client.get(LabRecord, "default", record.name)).status.condition("DesiredState")
        return condition is not None and (condition.status, condition.reason) == ("Unknown", "WorkerNotServing")

    await until(waiting)

    def start(w: LabWorker) -> None:
        for phase in ("Starting", "ReadyUnlicensed", "Ready"):
            w.status.enter(phase, "Test", world.clock.now())

    await world.change_worker(start)
    assert (await outcome(world, record, 2)).status == "True"
    assert lab.state == "STARTED"


async def test_taking_a_wish_back_leaves_nothing_behind(world: LabsWorld) -> None:
    _, record = await mirrored(world)
    await wish(world, record, "STOPPED")
    await outcome(world, record, 2)
    await wish(world, record, None)

    async def clean() -> bool:
        status = (await world.client.get(LabRecord, "default", record.name)).status
        return status.observed_generation == 3 and status.condition("DesiredState") is None

    await until(clean)


async def test_a_newer_wish_replaces_one_that_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Options(**{**{n: getattr(FAST, n) for n in FAST.__dataclass_fields__}, "node_stop": 0.5})
    async with labs_world(monkeypatch, options=slow) as world:
        lab, record = await mirrored(world, running=True)
        await wish(world, record, "DEFINED_ON_CORE")
        await until(lambda: world.machine().counts["PUT /labs/{lab_id}/stop"] == 1)
        await wish(world, record, "STARTED")
        assert (await outcome(world, record, 3)).status == "True"
        assert lab.state == "STARTED"
        assert not world.machine().counts["PUT /labs/{lab_id}/wipe"]


async def test_a_new_leader_need_not_hurry_to_labs_that_are_mirrored_and_wish_for_nothing(world: LabsWorld) -> None:
    labs, records = world.labs.controller, world.records_runner.controller
    _, record = await mirrored(world)
    assert records.settled(record)
    assert labs.settled(await world.get_worker())
    held = record.metadata.finalizers
    record.metadata.finalizers = []
    assert not records.settled(record), "a record that nothing holds would be deleted without its lab"
    record.metadata.finalizers = held
    final = await outcome(world, record, (await wish(world, record, "STARTED")).metadata.generation)
    assert final.reason == "Reached"
    record.metadata.generation += 1
    assert not records.settled(record), "a wish is open"
    await world.sync()
    assert labs.settled(await world.get_worker())
    world.fault("status", path="/labs", status=500)
    assert not labs.settled(await world.failing_sync())
