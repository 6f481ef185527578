"""A lab instance's times: its schedule, its minutes and their extension, its deadlines, whoever leads."""

from __future__ import annotations

from datetime import timedelta

import pytest

from controllers.instances.controller import InstancesController
from controllers.instances.deadlines import DeadlinesController
from controllers.instances.kind import LabInstanceRequest, LabInstanceRequestSpec
from controllers.instances.runtime import LabFailed, NotNow, Refused
from equipment.instances_scene import (
    SPEC,
    at_rest,
    away,
    condition,
    instances_scene,
)
from lrm.model import rfc3339
from lrm.resource import ObjectMeta


async def test_a_scheduled_instance_begins_five_minutes_early_and_runs_its_whole_time() -> None:
    async with instances_scene() as scene:
        start = scene.now + timedelta(hours=3)
        await scene.make(scheduledStartTime=start.isoformat())
        waiting = await scene.get()
        assert condition(waiting, "WorkerAssigned") == ("False", "NotYetDue")
        due = rfc3339((start - timedelta(minutes=5)).replace(microsecond=0))
        assert await scene.told() == [("Normal", "NotYetDue", f"it may begin at {due}")]
        assert scene.places.held == {}
        await scene.clock.advance(3 * 3600 - 301)
        assert await scene.phase() == "Pending"
        await scene.clock.advance(2)
        running = await scene.until_phase("Running", seconds=10)
        assert running.status.started_at is not None
        assert running.status.started_at < start
        await scene.clock.advance((start + timedelta(minutes=60) - scene.now).total_seconds() - 1)
        assert await scene.phase() == "Running"
        await scene.clock.advance(2)
        assert await scene.phase() == "Timeout"


async def test_an_extension_is_heard_until_the_last_second() -> None:
    async with instances_scene() as scene:
        await scene.make()
        running = await scene.until_phase("Running")
        assert running.ends_at is not None
        await scene.clock.advance((running.ends_at - scene.now).total_seconds() - 1)
        await scene.change(duration_minutes=90)
        extended = await scene.get()
        assert extended.status.observed_generation == extended.metadata.generation
        await scene.clock.advance(30 * 60 - 1)
        assert await scene.phase() == "Running"
        await scene.clock.advance(3)
        assert await scene.phase() == "Timeout"


async def test_an_extension_and_every_end_are_told_by_an_event() -> None:
    async with instances_scene() as scene:
        await scene.make(durationMinutes=1)
        running = await scene.until_phase("Running")
        await scene.clock.advance(1)  # events of one moment come in any order
        await scene.change(restart_policy="OnFailure")
        told = {reason for _, reason, _ in await scene.told()}
        assert told == {"Scheduled", "Running"}, "that was no extension"
        scene.outside.troubles["look"] = away()
        await scene.change(duration_minutes=2)
        assert running.status.ends_at is not None
        ends = rfc3339(running.status.ends_at + timedelta(minutes=1))
        assert (await scene.told())[-1] == ("Normal", "Extended", f"it runs until {ends}")
        await scene.until_phase("Completed", seconds=200)
        assert (await scene.told())[3:] == [
            ("Warning", "WorkerAway", "it does not answer"),
            ("Normal", "DurationElapsed", "its 2 minutes are over"),
            ("Normal", "Completed", "nothing of it is left outside"),
        ]


async def test_an_extension_while_it_waits_for_another_try_is_told() -> None:
    async with instances_scene(instances_retry_delay=60) as scene:
        await scene.make(durationMinutes=30, restartPolicy="OnFailure")
        running = await scene.until_phase("Running")
        assert running.ends_at is not None
        scene.outside.troubles["look"] = LabFailed("ContainerFailed", "exit code 1", exit_code=1)
        scene.hints.tell(("default", "a"))
        await scene.until_phase("Pending")
        await scene.clock.advance(1)
        await scene.change(duration_minutes=90)
        scene.outside.troubles.clear()
        await scene.until_phase("Running", seconds=100)
        extended = [told for told in await scene.told() if told[1] == "Extended"]
        assert extended == [("Normal", "Extended", f"it runs until {rfc3339(running.ends_at + timedelta(hours=1))}")]


async def test_an_end_that_an_older_version_left_tells_no_extension() -> None:
    async with instances_scene() as scene:
        await scene.make()
        running = await scene.until_phase("Running")
        await scene.stop()
        assert running.ends_at is not None
        stale = running.ends_at - timedelta(hours=2)
        await scene.client.update_status(running, lambda r: setattr(r.status, "ends_at", stale), force=True)
        await scene.clock.settle()
        await scene.lead()
        await scene.clock.advance(5)
        assert (await scene.get()).status.ends_at == running.ends_at
        assert {reason for _, reason, _ in await scene.told()} == {"Scheduled", "Running"}


async def test_time_that_is_over_is_told_in_good_grammar() -> None:
    async with instances_scene() as scene:
        await scene.make(durationMinutes=1)
        done = await scene.until_phase("Completed", seconds=100)
        told = done.status.condition("TimedOut")
        assert told is not None
        assert told.message == "its minute is over"


@pytest.mark.parametrize("before", ["new", "failed", "scheduled"])
async def test_how_long_it_is_held_up_counts_from_the_trouble_and_not_from_what_was_before(before: str) -> None:
    async with instances_scene() as scene:
        trouble = NotNow("TopologyUnavailable", "the server answers 500", again=10.0)
        first = {"new": {"prepare": trouble}, "failed": {"prepare": Refused("TemplateInvalid", "no")}, "scheduled": {}}
        scene.outside.troubles |= first[before]
        start = {"scheduledStartTime": (scene.now + timedelta(hours=9)).isoformat()} if before == "scheduled" else {}
        await scene.make(**start)
        if before != "new":
            await scene.clock.advance(3600)
            scene.outside.troubles["prepare"] = trouble
            scene.outside.asked.clear()
            await scene.change(duration_minutes=30)
        tries = [scene.outside.asked["prepare"]]
        for reason, seconds in (("Other", 15), ("Other", 10), ("TopologyUnavailable", 20), ("Other", 40)):
            scene.outside.troubles["prepare"] = NotNow(reason, "the server answers 500", again=10.0)
            await scene.clock.advance(seconds)
            tries.append(scene.outside.asked["prepare"])
        assert tries == [1, 2, 3, 4, 5], "at 0, 10, 20, 40 and 80 s"
        assert (await scene.get()).status.held_up_since is not None
        scene.outside.troubles.clear()
        await scene.clock.advance(120)
        assert (await scene.get()).status.held_up_since is None


async def test_what_waits_for_a_topology_to_begin_again_still_ends_in_its_time() -> None:
    async with instances_scene(slots={"w1": 1}) as scene:
        await scene.make(restartPolicy="OnFailure", durationMinutes=10)
        await scene.until_phase("Running")
        scene.places.slots.clear()
        scene.outside.lose("w1")
        scene.hints.tell(("default", "a"))
        await scene.clock.advance(30)
        scene.outside.troubles["prepare"] = NotNow("TopologyUnavailable", "the server answers 500", again=30.0)
        await scene.change(duration_minutes=11)
        waiting = await scene.get()
        assert condition(waiting, "Ready") == ("False", "TopologyUnavailable")
        assert waiting.ends_at is not None
        await scene.clock.advance((waiting.ends_at - scene.now).total_seconds() - 2)
        assert await scene.phase() == "Pending"
        await scene.clock.advance(4)
        assert await scene.phase() == "Failed"
        at_rest(scene)


async def test_a_start_in_the_past_begins_at_once_and_is_told() -> None:
    async with instances_scene() as scene:
        start = scene.now - timedelta(hours=1)
        await scene.make(scheduledStartTime=start.isoformat())
        running = await scene.until_phase("Running")
        assert running.status.started_at is not None
        assert running.ends_at == running.status.started_at + timedelta(minutes=60), "its whole time is ahead of it"
        told = f"its start, {rfc3339(start)}, is past: it begins as soon as there is a place"
        assert ("Warning", "StartIsPast", told) in await scene.told()


async def test_a_start_that_was_kept_is_not_told_to_be_past_when_it_begins_again() -> None:
    async with instances_scene(instances_retry_delay=60) as scene:
        start = scene.now + timedelta(hours=1)
        await scene.make(scheduledStartTime=start.isoformat(), restartPolicy="OnFailure")
        await scene.clock.advance(4000)
        assert await scene.phase() == "Running"
        scene.outside.troubles["look"] = LabFailed("ContainerFailed", "exit code 1", exit_code=1)
        scene.hints.tell(("default", "a"))
        await scene.until_phase("Pending")
        await scene.clock.advance(1)
        scene.outside.troubles.clear()
        await scene.change(duration_minutes=90)
        again = await scene.until_phase("Running", seconds=100)
        assert again.status.prepared_at is not None
        assert again.status.prepared_at > start, "it was prepared anew"
        assert "StartIsPast" not in {reason for _, reason, _ in await scene.told()}


async def test_an_end_is_exact_to_two_seconds_though_nothing_is_looked_at_for_an_hour(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for controller in (InstancesController, DeadlinesController):
        monkeypatch.setattr(controller, "resync", 3600.0)
    async with instances_scene() as scene:
        start = scene.now + timedelta(minutes=17)
        await scene.make("a", durationMinutes=50)
        await scene.make("b", durationMinutes=7, scheduledStartTime=start.isoformat())
        await scene.clock.advance(3 * 3600)
        a, b = await scene.get("a"), await scene.get("b")
        for lab in (a, b):
            timeout = next(step for step in lab.status.phase_history if step.to == "Timeout")
            assert lab.ends_at is not None
            assert timedelta(0) <= timeout.at - lab.ends_at < timedelta(seconds=2)
            assert lab.status.phase == "Completed"
        placed = next(step for step in b.status.phase_history if step.to == "Provisioning")
        assert timedelta(0) <= placed.at - (start - timedelta(minutes=5)) < timedelta(seconds=2)
        at_rest(scene)


async def test_the_deadline_for_cleaning_up_counts_on_over_a_new_leader() -> None:
    async with instances_scene(instances_stopping_timeout=600) as scene:
        await scene.make()
        await scene.until_phase("Running")
        scene.outside.troubles["clean"] = away()
        await scene.change(desired_phase="Stopped")
        await scene.clock.advance(400)
        await scene.stop()
        await scene.clock.advance(150)
        await scene.lead()
        await scene.clock.advance(45)
        assert await scene.phase() == "Stopping"
        failed = await scene.until_phase("Failed", seconds=10)
        assert failed.status.failure is not None
        assert failed.status.failure.reason == "StoppingTimeout"


async def test_a_labs_time_begins_when_it_runs_and_not_while_it_is_looked_at() -> None:
    async with instances_scene() as scene:
        scene.outside.slow["provision"] = 20.0
        await scene.make()
        running = await scene.until_phase("Running", seconds=100)
        assert running.status.started_at == running.status.phase_history[-1].at


async def test_the_deadline_for_running_counts_on_over_a_new_leader() -> None:
    async with instances_scene(instances_provisioning_timeout=900) as scene:
        scene.outside.troubles["provision"] = NotNow("Refused", "it has no room", again=5.0)
        await scene.make()
        await scene.clock.advance(600)
        await scene.stop()
        await scene.clock.advance(200)
        await scene.lead()
        await scene.clock.advance(95)
        assert await scene.phase() == "Provisioning"
        failed = await scene.until_phase("Failed", seconds=10)
        assert failed.status.failure is not None
        assert failed.status.failure.reason == "ProvisioningTimeout"


async def test_deadlines_survive_whoever_leads() -> None:
    async with instances_scene() as scene:
        await scene.make()
        running = await scene.until_phase("Running")
        assert running.ends_at is not None
        await scene.stop()
        await scene.clock.advance((running.ends_at - scene.now).total_seconds() - 5)
        await scene.lead()
        await scene.clock.advance(4)
        assert await scene.phase() == "Running"
        await scene.clock.advance(2)
        assert await scene.phase() == "Timeout"


async def test_time_ends_on_time_however_busy_and_slow_all_else_is() -> None:
    async with instances_scene(slots={"w1": 1000}, instances_provisioning_timeout=3600) as scene:
        await scene.make("a", durationMinutes=10)
        running = await scene.until_phase("Running")
        assert running.ends_at is not None
        await scene.clock.advance((running.ends_at - scene.now).total_seconds() - 20)
        scene.outside.slow = {"provision": 30.0, "look": 30.0}
        for n in range(100):
            spec = LabInstanceRequestSpec.model_validate(SPEC)
            await scene.client.create(LabInstanceRequest(metadata=ObjectMeta(name=f"class-{n}"), spec=spec))
        await scene.clock.advance(19)
        scene.hints.tell(("default", "a"))
        await scene.clock.advance(2.5)
        assert await scene.phase("a") == "Timeout"


async def test_what_lost_its_worker_and_finds_no_other_has_failed_when_its_time_is_over() -> None:
    async with instances_scene(slots={"w1": 1}) as scene:
        await scene.make(restartPolicy="OnFailure", durationMinutes=10)
        running = await scene.until_phase("Running")
        assert running.ends_at is not None
        scene.places.slots.clear()
        scene.outside.lose("w1")
        scene.hints.tell(("default", "a"))
        lost = rfc3339(scene.now.replace(microsecond=0))
        await scene.clock.advance((running.ends_at - scene.now).total_seconds() - 2)
        assert await scene.phase() == "Pending"
        await scene.clock.advance(3)
        failed = await scene.get()
        assert failed.status.failure is not None
        assert (failed.status.phase, failed.status.failure.reason) == ("Failed", "WorkerLost")
        told = f"w1 is gone, at {lost}; its time was over before it could begin again"
        assert (failed.status.error_message, condition(failed, "TimedOut")) == (told, ("True", "DurationElapsed"))
        assert ("Warning", "WorkerLost", told) in await scene.told()
        at_rest(scene)


async def test_a_clock_that_was_set_makes_no_hot_loop_of_what_waits() -> None:
    async with instances_scene(slots={"w1": 1}) as scene:
        await scene.make(restartPolicy="OnFailure", durationMinutes=10)
        await scene.until_phase("Running")
        scene.places.slots.clear()
        scene.outside.lose("w1")
        scene.hints.tell(("default", "a"))
        await scene.clock.advance(30)
        scene.clock.jump_wall(7200)
        asked = scene.places.asked
        scene.hints.tell(("default", "a"))
        await scene.clock.advance(30)
        assert await scene.phase() == "Pending"
        assert scene.places.asked - asked <= 40


async def test_a_wall_clock_that_is_set_ends_no_lab() -> None:
    async with instances_scene() as scene:
        await scene.make()
        await scene.until_phase("Running")
        scene.clock.jump_wall(7200)
        scene.hints.tell(("default", "a"))
        await scene.clock.advance(30)
        assert await scene.phase() == "Running"
        scene.clock.jump_wall(-7200)
        await scene.clock.advance(120)
        assert await scene.phase() == "Running"
