"""Operations on labs: each carried out once for its id, beside desiredState and not against it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, cast

import pytest

from controllers.cml.simulator.labs import Lab
from controllers.labs.kind import ENDED, LabRecord, Operation, OperationOutcome
from controllers.workers.kind import LabWorker
from equipment.labs_world import FAST, LabsWorld, labs_world
from equipment.waiting import until
from lrm.errors import Invalid


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LabsWorld]:
    async with labs_world(monkeypatch) as world:
        yield world


async def mirrored(world: LabsWorld, *, running: bool = False) -> tuple[Lab, LabRecord]:
    await world.worker()
    lab = world.machine().add_lab("OSPF", nodes=2, running=running)
    await world.sync()
    return lab, await world.record(lab.id)


async def change(world: LabsWorld, record: LabRecord, **spec: Any) -> LabRecord:
    def set_them(r: LabRecord) -> None:
        for name, value in spec.items():
            setattr(r.spec, name, value)

    current = await world.client.get(LabRecord, "default", record.name)
    return cast("LabRecord", await world.client.update(current, set_them))


async def operate(world: LabsWorld, record: LabRecord, name: str, verb: Any) -> LabRecord:
    return await change(world, record, operation=Operation(id=name, verb=verb))


async def told(world: LabsWorld, record: LabRecord, name: str, result: str = "") -> OperationOutcome:
    """What the record says of the operation, once that is its end or `result`."""

    async def there() -> OperationOutcome | None:
        outcome = (await world.client.get(LabRecord, "default", record.name)).status.operation
        if outcome is None or outcome.id != name:
            return None
        return outcome if (outcome.result == result if result else outcome.result in ENDED) else None

    return cast("OperationOutcome", await until(there, f"operation {name} to be {result or 'ended'}"))


async def test_each_operation_is_carried_out_once_for_its_id_and_the_mirror_follows(world: LabsWorld) -> None:
    lab, record = await mirrored(world)
    for name, verb, state in (("1", "start", "STARTED"), ("2", "STOP", "STOPPED"), ("3", "Wipe", "DEFINED_ON_CORE")):
        await operate(world, record, name, verb)
        outcome = await told(world, record, name)
        assert (outcome.result, outcome.verb) == ("Succeeded", verb.capitalize())
        assert lab.state == state

        async def mirrored_state(state: str = state) -> bool:
            return (await world.record(lab.id)).status.state == state

        await until(mirrored_state, "the sync that follows")
    await operate(world, record, "4", "Start")
    await told(world, record, "4")
    world.machine().force(lab, "STOPPED")
    await world.sync()
    await world.settled()
    assert lab.state == "STOPPED", "what students do afterwards is not fought"
    await operate(world, record, "5", "Start")
    assert (await told(world, record, "5")).result == "Succeeded"
    assert lab.state == "STARTED", "the same verb again is another operation"


async def test_an_operation_that_is_applied_again_after_another_one_is_not_carried_out_again(world: LabsWorld) -> None:
    lab, record = await mirrored(world)
    for name, verb in (("a", "Wipe"), ("b", "Start")):
        await operate(world, record, name, verb)
        await told(world, record, name)
    again = await operate(world, record, "a", "Wipe")

    async def settled() -> bool:
        now = await world.client.get(LabRecord, "default", record.name)
        return now.status.observed_generation == again.metadata.generation

    await until(settled)
    assert ((await told(world, record, "a")).result, lab.state) == ("Succeeded", "STARTED")


async def test_a_running_lab_is_stopped_before_it_is_wiped(world: LabsWorld) -> None:
    lab, record = await mirrored(world, running=True)
    await operate(world, record, "1", "Wipe")
    assert (await told(world, record, "1")).result == "Succeeded"
    assert lab.state == "DEFINED_ON_CORE"


async def test_an_operation_does_not_bring_an_old_desired_state_back(world: LabsWorld) -> None:
    lab, record = await mirrored(world)
    await change(world, record, desired_state="STARTED")
    await until(lambda: lab.state == "STARTED")
    await operate(world, record, "1", "Stop")
    await told(world, record, "1")
    await change(world, record, operation=None)
    await world.sync()
    await world.settled()
    final = await world.client.get(LabRecord, "default", record.name)
    assert final.status.observed_generation == final.metadata.generation
    assert lab.state == "STOPPED"
    assert world.machine().counts["PUT /labs/{lab_id}/start"] == 1


async def test_an_operation_and_a_new_desired_state_at_once_are_both_carried_out_the_operation_first(
    world: LabsWorld,
) -> None:
    lab, record = await mirrored(world)
    await change(world, record, operation=Operation(id="1", verb="Start"), desired_state="STOPPED")

    async def settled() -> bool:
        now = await world.client.get(LabRecord, "default", record.name)
        return now.status.observed_generation == now.metadata.generation

    await until(settled)
    assert (await told(world, record, "1")).result == "Succeeded"
    assert lab.state == "STOPPED"


async def test_a_newer_operation_takes_the_place_of_one_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = replace(FAST, node_stop=0.5)
    async with labs_world(monkeypatch, options=slow) as world:
        lab, record = await mirrored(world, running=True)
        await operate(world, record, "1", "Wipe")
        await until(lambda: world.machine().counts["PUT /labs/{lab_id}/stop"] == 1)
        await operate(world, record, "2", "Start")
        assert (await told(world, record, "2")).result == "Succeeded"
        assert lab.state == "STARTED"
        assert not world.machine().counts["PUT /labs/{lab_id}/wipe"]


async def test_an_operation_that_is_withdrawn_is_told_so(world: LabsWorld) -> None:
    _, record = await mirrored(world)

    def stop(w: LabWorker) -> None:
        w.status.enter("Stopped", "Test", world.clock.now())

    await world.change_worker(stop)
    await operate(world, record, "1", "Start")
    waiting = await told(world, record, "1", "Waiting")
    assert "Stopped" in waiting.message
    await change(world, record, operation=None)
    assert (await told(world, record, "1")).result == "Superseded"


async def test_cmls_no_ends_an_operation_and_no_answer_does_not(world: LabsWorld) -> None:
    lab, record = await mirrored(world)
    rule = world.fault("status", path=f"/labs/{lab.id}/state", status=500)
    await operate(world, record, "1", "Start")

    async def held_up() -> bool:
        return "500" in (await told(world, record, "1", "Waiting")).message

    await until(held_up)
    world.simulator.faults.clear()
    del rule
    assert (await told(world, record, "1")).result == "Succeeded"
    world.fault("status", method="PUT", path=f"/labs/{lab.id}/stop", status=400, description="not now", times=1)
    await operate(world, record, "2", "Stop")
    refused = await told(world, record, "2")
    assert (refused.result, "not now" in refused.message) == ("Failed", True)


@pytest.mark.parametrize(
    ("method", "rest", "kind"), [("PUT", "start", "status"), ("PUT", "start", "drop"), ("GET", "state", "status")]
)
async def test_an_operation_for_which_cml_never_has_an_answer_of_use_ends(
    monkeypatch: pytest.MonkeyPatch, method: str, rest: str, kind: Any
) -> None:
    async with labs_world(monkeypatch, labs_step_timeout=1) as world:
        lab, record = await mirrored(world)
        how = {"status": 500} if kind == "status" else {}
        rule = world.fault(kind, method=method, path=f"/labs/{lab.id}/{rest}", **how)
        await operate(world, record, "1", "Start")
        assert (await told(world, record, "1")).result == "Failed"
        condition = (await world.record(lab.id)).status.condition("DesiredState")
        assert condition is not None
        assert (condition.reason, rule.hits > 1) == ("TimedOut", True)


async def test_another_verb_under_the_same_id_is_refused(world: LabsWorld) -> None:
    _, record = await mirrored(world)
    await operate(world, record, "1", "Start")
    with pytest.raises(Invalid, match=r"spec\.operation\.id"):
        await operate(world, record, "1", "Stop")


async def test_a_slow_cml_holds_up_its_own_labs_alone(world: LabsWorld) -> None:
    _, record = await mirrored(world)
    await world.worker("slow")
    labs = [world.machine("slow").add_lab(f"Lab {n}") for n in range(40)]
    await world.sync("slow")
    rule = world.fault("delay", worker="slow", method="PUT", path="/labs/*/start", seconds=50)
    for waiting in (await world.records("slow")).values():
        await operate(world, waiting, "1", "Start")
    await world.cache.barrier(30)
    queue = world.records_runner.queue
    await until(lambda: rule.hits == queue.processing == 4 and not len(queue), "four of the slow one alone in hand")
    await operate(world, record, "1", "Start")
    assert (await told(world, record, "1")).result == "Succeeded"
    assert {lab.state for lab in labs} == {"DEFINED_ON_CORE"}, "the slow one has not answered yet"
    world.simulator.faults.clear()
