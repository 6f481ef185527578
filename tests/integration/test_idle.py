"""Idle workers on simulated EC2 and CMLs: stopped when nobody uses them, kept up by every doubt, woken by a word."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from controllers.workers.kind import SNOOZE_ANNOTATION, WAKE_ANNOTATION, LabWorker
from controllers.workers.status import Allocation
from equipment.waiting import until
from equipment.workers_world import WorkersWorld, condition, history, workers_world
from lrm.errors import Invalid
from lrm.model import rfc3339
from lrm.resource import RECONCILE_ANNOTATION

DETECTION = {"enabled": True, "timeoutMinutes": 60}


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch, moto_url: str) -> AsyncIterator[WorkersWorld]:
    """A world whose clock can be set: the step is remembered for half a second only."""
    settings = {"worker_idle_interval": 0.05, "worker_rest_interval": 0.1}
    async with workers_world(monkeypatch, moto_url, jump_hold=0.5, **settings) as made:
        yield made


async def used(world: WorkersWorld, **detection: Any) -> LabWorker:
    """A worker that somebody has used a moment ago, as lrm knows."""
    worker = await world.serving(idleDetection={**DETECTION, **detection})
    return await use(world, worker)


async def use(world: WorkersWorld, worker: LabWorker) -> LabWorker:
    """Somebody does something; then its labs are listed once more, as they are every half an hour."""
    world.machine(worker).record("export_lab", {})
    await world.until(lambda w: w.status.idle and w.status.idle.user_events, "its use seen")
    await world.annotate(RECONCILE_ANNOTATION, "used")
    return await world.until(lambda w: w.status.labs_asked == "used", "its labs listed")


def hours_pass(world: WorkersWorld, hours: float) -> None:
    """Wall time goes on; the looks at the clock see a step, and wait until it is over."""
    world.clock.offset += timedelta(hours=hours)


async def looked(world: WorkersWorld, worker: LabWorker, times: int = 3) -> None:
    """Until CML was asked some times more what people did."""
    counts = world.machine(worker).counts
    wanted = telemetry_calls(world, worker) + times
    await until(lambda: telemetry_calls(world, worker) >= wanted, f"more questions: {counts}")


def telemetry_calls(world: WorkersWorld, worker: LabWorker) -> int:
    return world.machine(worker).counts["GET /telemetry/events"]


async def test_a_worker_that_nobody_uses_is_stopped_and_starts_again_at_a_word(world: WorkersWorld) -> None:
    before = await used(world)
    await world.looked_again()
    await world.cache.barrier(30)
    async with world.counting() as writes:
        await looked(world, before)
    assert not writes, "to look costs no write"
    hours_pass(world, 2)
    told = await world.until(lambda w: condition(w, "ClockSteady")[0] == "False", "the step told")
    assert told.status.phase == "ReadyUnlicensed", "a clock that was just set is not believed"
    worker = await world.phase("Stopped")
    assert history(worker)[-4:] == ["ReadyUnlicensed", "Draining", "Stopping", "Stopped"]
    assert [s.reason for s in worker.status.phase_history if s.to == "Draining"] == ["Idle"]
    assert condition(worker, "Idle") == ("True", "Idle")
    assert worker.spec.desired_phase == "Ready", "the wish stays what it was"
    assert [world.state(i) for i in world.instances()] == ["stopped"]
    await world.change(lambda w: setattr(w.spec, "max_concurrent_labs", 3))
    await world.until(lambda w: w.status.observed_generation == w.metadata.generation, "the new spec seen")
    await world.looked_again()
    await world.cache.barrier(30)
    async with world.counting() as writes:
        await world.looked_again(3)
    assert not writes
    assert (await world.status()).phase == "Stopped"

    await world.annotate(WAKE_ANNOTATION, "1")
    again = await world.phase("ReadyUnlicensed")
    assert condition(again, "Idle") == ("False", "InUse")
    assert again.status.ec2.instance_id == before.status.ec2.instance_id
    await looked(world, again)
    assert (await world.status()).phase == "ReadyUnlicensed", "its time begins anew"
    assert world.shim.calls["RunInstances"] == 1


async def test_a_snooze_keeps_it_up_and_wakes_one_that_sleeps(world: WorkersWorld) -> None:
    worker = await used(world)
    with pytest.raises(Invalid):
        await world.annotate(SNOOZE_ANNOTATION, "tomorrow")
    await world.annotate(SNOOZE_ANNOTATION, rfc3339(world.clock.now() + timedelta(hours=4)))
    hours_pass(world, 3)
    await world.until(lambda w: condition(w, "ClockSteady")[0] == "False", "the step told")
    await world.until(lambda w: condition(w, "ClockSteady")[0] == "True", "the clock believed")
    asked = telemetry_calls(world, worker)
    await world.looked_again(4)
    assert (await world.status()).phase == "ReadyUnlicensed"
    assert telemetry_calls(world, worker) == asked, "what would not matter is not asked"
    hours_pass(world, 2)
    await world.phase("Stopped")
    await world.annotate(SNOOZE_ANNOTATION, rfc3339(world.clock.now() + timedelta(hours=1)))
    await world.phase("ReadyUnlicensed")


async def test_what_is_not_known_is_never_idle(world: WorkersWorld) -> None:
    nothing = world.cml_fault("empty", path="/telemetry/events")
    worker = await world.serving(idleDetection=DETECTION)
    silent = await world.until(lambda w: w.status.idle and w.status.idle.last_error, "the silence told")
    assert silent.status.idle is not None
    assert silent.status.idle.last_error is not None
    assert silent.status.idle.last_error.reason == "NoTelemetry"
    del world.cml.faults.faults[nothing.id]
    await use(world, worker)
    broken = world.cml_fault("status", path="/telemetry/events")
    hours_pass(world, 2)
    known = await world.until(lambda w: w.status.idle and w.status.idle.last_error, "the trouble told")
    assert known.status.phase == "ReadyUnlicensed"
    await world.until(lambda w: condition(w, "ClockSteady")[0] == "True", "the clock believed")
    hits = broken.hits
    await until(lambda: broken.hits > hits + 1, "more questions")
    assert (await world.status()).phase == "ReadyUnlicensed"
    del world.cml.faults.faults[broken.id]
    assert (await world.phase("Stopped")).status.idle is not None


async def test_an_instance_that_is_placed_while_cml_answers_keeps_it_up(world: WorkersWorld) -> None:
    worker = await used(world, rule="NoUserActivity")
    slow = world.cml_fault("delay", path="/telemetry/events", seconds=1.0)
    hours_pass(world, 2)
    await until(lambda: slow.hits, "a question whose answer comes when the clock is believed again")

    def place(w: LabWorker) -> None:
        w.status.allocations = {"some-uid": Allocation(slots=1, since=world.clock.now())}

    await world.client.bind(owner="instances", fence=None).update_status(await world.get(), place)
    active = await world.phase("Active")
    assert "Draining" not in history(active)
    await world.looked_again(3)
    assert (await world.status()).phase == "Active"
    assert world.live() == [worker.status.ec2.instance_id]


async def test_by_the_rule_of_activity_alone_a_running_lab_drains_and_its_user_brings_the_worker_back(
    world: WorkersWorld,
) -> None:
    worker = await used(world, rule="NoUserActivity")
    machine = world.machine(worker)
    lab = machine.add_lab("forgotten", nodes=1, running=True)
    await world.annotate(RECONCILE_ANNOTATION, "1")
    await world.phase("Active")
    hours_pass(world, 2)
    draining = await world.phase("Draining")
    assert condition(draining, "AcceptingLabs")[0] == "False"
    machine.record("start_node", {"lab_id": lab.id})
    back = await world.phase("Active")
    assert "DrainCancelled" in [s.reason for s in back.status.phase_history]
    assert condition(back, "Idle") == ("False", "InUse")


async def test_by_default_a_running_lab_keeps_its_worker_up(world: WorkersWorld) -> None:
    worker = await used(world)
    world.machine(worker).add_lab("exam", nodes=1, running=True)
    await world.annotate(RECONCILE_ANNOTATION, "1")
    await world.phase("Active")
    hours_pass(world, 3)
    await world.until(lambda w: condition(w, "ClockSteady")[0] == "False", "the step told")
    await world.until(lambda w: condition(w, "ClockSteady")[0] == "True", "the clock believed")
    await world.looked_again(4)
    assert (await world.status()).phase == "Active"


async def test_a_lab_that_started_before_the_drain_saw_it_ends_the_pause_without_a_word_of_telemetry(
    world: WorkersWorld,
) -> None:
    worker = await used(world, categories=["user_activity"])
    await world.change(lambda w: setattr(w.spec, "drain_timeout_minutes", 0))
    world.cml_fault("delay", path="/labs", seconds=1.0)
    hours_pass(world, 2)
    await world.phase("Draining")
    world.cml_fault("status", path="/telemetry/events")
    world.machine(worker).add_lab("exam", nodes=1, running=True)
    back = await world.phase("Active")
    assert "Stopping" not in history(back), "what is not listed yet may run, whatever the time"
    assert "DrainCancelled" in [s.reason for s in back.status.phase_history]
