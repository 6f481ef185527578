"""The life of a lab instance on virtual time: each phase, each trouble, each way to end, and nothing left behind."""

from __future__ import annotations

from datetime import timedelta

import pytest

from controllers.instances.controller import InstancesController
from controllers.instances.kind import LAB_INSTANCE_REQUEST, LabInstanceRequest
from controllers.instances.runtime import LabFailed, NotNow, Refused
from controllers.instances.steps import CRASH_POINTS
from equipment.instances_scene import (
    at_rest,
    away,
    check_history,
    condition,
    dying_at,
    instances_scene,
)
from lrm.controller import Context, Result
from lrm.resource import RETRY_ANNOTATION


async def test_an_instance_runs_for_its_minutes_and_leaves_nothing() -> None:
    async with instances_scene() as scene:
        made = await scene.make()
        running = await scene.until_phase("Running")
        assert running.status.worker_ref is not None
        assert running.status.access_url == f"http://w1/{made.uid}"
        assert condition(running, "WorkerAssigned") == ("True", "Scheduled")
        assert condition(running, "ResourcesAllocated") == ("True", "Scheduled")
        assert condition(running, "Ready") == ("True", "Running")
        assert running.status.started_at is not None
        ends = running.status.started_at + timedelta(minutes=60)
        await scene.clock.advance((ends - scene.now).total_seconds() - 1)
        assert await scene.phase() == "Running"
        await scene.clock.advance(2)
        assert await scene.phase() == "Timeout"
        done = await scene.until_phase("Completed")
        assert condition(done, "TimedOut") == ("True", "DurationElapsed")
        assert condition(done, "CleanupCompleted") == ("True", "CleanedUp")
        assert condition(done, "Ready")[0] == "False"
        assert done.status.worker_ref is None
        assert done.status.completed_at is not None
        assert scene.outside.made[made.uid] == 1
        steps = [s.to for s in done.status.phase_history]
        assert steps == ["Scheduling", "Provisioning", "Running", "Timeout", "Completed"]
        at_rest(scene)


async def test_a_running_instance_costs_no_writes_and_is_looked_at_when_told() -> None:
    async with instances_scene() as scene:
        made = await scene.make(durationMinutes=480)
        before = await scene.until_phase("Running")
        await scene.clock.advance(3600)
        assert (await scene.get()).metadata.resource_version == before.metadata.resource_version
        scene.outside.of(made.uid)[0].state = "ended"
        scene.hints.tell(("default", "a"))
        await scene.clock.settle()
        done = await scene.until_phase("Completed")
        assert done.status.exit_code == 0
        assert condition(done, "TimedOut") == ("", "")
        at_rest(scene)


async def test_what_a_lab_wrote_last_is_kept_until_it_begins_anew() -> None:
    async with instances_scene() as scene:
        await scene.make()
        await scene.until_phase("Running")
        scene.outside.troubles["look"] = LabFailed("ContainerFailed", "exit code 3", exit_code=3, last_log="boom\n")
        scene.hints.tell(("default", "a"))
        failed = await scene.until_phase("Failed")
        assert failed.status.last_log == "boom\n"
        await scene.clock.advance(60)
        assert (await scene.get()).status.last_log == "boom\n", "its clean-up asks no second time"
        at_rest(scene)
        scene.outside.troubles.clear()
        await scene.annotate(RETRY_ANNOTATION, "1")
        running = await scene.until_phase("Running")
        assert running.status.last_log is None
        await scene.change(desired_phase="Stopped")
        done = await scene.until_phase("Completed")
        assert done.status.last_log == "last words of a\n", "read before its lab was touched"
        at_rest(scene)


async def test_what_a_lab_wrote_that_never_came_up_is_kept() -> None:
    async with instances_scene() as scene:
        await scene.make()
        await scene.until_phase("Provisioning")
        assert scene.running_now()
        scene.outside.troubles["provision"] = NotNow("Provisioning", "its health check fails", again=30.0)
        failed = await scene.until_phase("Failed", seconds=1000, step=5)
        assert failed.status.failure is not None
        assert failed.status.failure.reason == "ProvisioningTimeout"
        await scene.clock.advance(60)
        assert (await scene.get()).status.last_log == "last words of a\n"
        at_rest(scene)


async def test_what_a_lab_wrote_is_kept_by_a_leader_that_dies_when_it_has_removed_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with instances_scene() as scene:
        scene.outside.at_once = True
        dying_at(monkeypatch, "instances.cleaned")
        await scene.make()
        await scene.until_phase("Running")
        await scene.change(desired_phase="Stopped")
        assert scene.dead
        await scene.stop()
        await scene.lead()
        done = await scene.until_phase("Completed")
        assert done.status.last_log == "last words of a\n"
        at_rest(scene)


@pytest.mark.parametrize("when", ["Pending", "Provisioning", "Running"])
async def test_it_can_be_stopped_at_any_time(when: str) -> None:
    async with instances_scene(slots={} if when == "Pending" else {"w1": 1}) as scene:
        await scene.make()
        await scene.until_phase(when)
        await scene.change(desired_phase="Stopped")
        done = await scene.until_phase("Completed")
        check_history(done)
        assert condition(done, "CleanupCompleted") == ("True", "CleanedUp")
        at_rest(scene)


@pytest.mark.parametrize("when", ["Pending", "Provisioning", "Running", "Timeout", "Completed", "Failed"])
async def test_it_can_be_deleted_at_any_time_and_goes_when_nothing_is_left(when: str) -> None:
    async with instances_scene(slots={} if when == "Pending" else {"w1": 1}) as scene:
        if when == "Failed":
            scene.outside.troubles["prepare"] = Refused("ImageNotFound", "there is no such image")
        await scene.make(durationMinutes=1)
        await scene.until_phase(when, seconds=120, step=0.5)
        scene.outside.troubles["clean"] = away()
        await scene.delete()
        if when in ("Provisioning", "Running", "Timeout"):
            await scene.clock.advance(30)
            held = await scene.get()
            assert condition(held, "CleanupCompleted") == ("False", "CleanupFailed")
            assert scene.places.held, "given back while it may still run"
            del scene.outside.troubles["clean"]
        await scene.clock.advance(20)
        assert await scene.gone()
        at_rest(scene)


async def test_what_is_stopped_before_it_had_a_place_says_so_and_not_what_it_waited_for() -> None:
    async with instances_scene(slots={}) as scene:
        scene.places.full = "NoMatchingTrack"
        await scene.make()
        await scene.change(desired_phase="Stopped")
        done = await scene.until_phase("Completed")
        assert {c.type: c.reason for c in done.status.conditions if c.status == "False"} == {
            "WorkerAssigned": "StopRequested",
            "Ready": "StopRequested",
        }
        reason = next(column for column in LAB_INSTANCE_REQUEST.columns if column.name == "Reason")
        assert reason.value(done) == "StopRequested"
        assert {reason for _, reason, _ in await scene.told()} == {"NoMatchingTrack", "StopRequested", "Completed"}


async def test_a_topology_that_cannot_be_read_now_is_told_tried_less_often_and_then_placed() -> None:
    async with instances_scene(slots={"w1": 1}) as scene:
        told = "https://git.example.edu/lab.yaml: the server answers 500"
        scene.outside.troubles["prepare"] = NotNow("TopologyUnavailable", told, again=30.0)
        await scene.make()
        before = (await scene.get()).metadata.resource_version
        await scene.clock.advance(1800)
        waiting = await scene.get()
        assert (waiting.status.phase, condition(waiting, "Ready")) == ("Pending", ("False", "TopologyUnavailable"))
        assert condition(waiting, "WorkerAssigned") == ("False", "TopologyUnavailable")
        assert waiting.metadata.resource_version == before, "the same again is no write"
        assert await scene.told() == [("Warning", "TopologyUnavailable", told)]
        assert 6 <= scene.outside.asked["prepare"] <= 12, "30 s, then doubled, five minutes at most"
        scene.outside.troubles.clear()
        running = await scene.until_phase("Running", seconds=320, step=5)
        assert condition(running, "Ready") == ("True", "Running")
        assert condition(running, "WorkerAssigned") == ("True", "Scheduled")


async def test_a_lab_whose_workers_are_lost_again_and_again_is_given_up_after_its_retries() -> None:
    async with instances_scene(slots={"w0": 1}, instances_retries=2, instances_retry_delay=10) as scene:
        await scene.make()
        for lost in range(3):
            await scene.until_phase("Provisioning", seconds=60, step=0.5)
            assert (await scene.get()).status.retry_count == lost
            scene.places.slots = {f"w{lost + 1}": 1}
            scene.outside.lose(f"w{lost}")
            failed = await scene.until_phase("Failed" if lost == 2 else "Pending", seconds=20)
        assert failed.status.failure is not None
        assert (failed.status.failure.reason, failed.status.retry_count) == ("WorkerLost", 2)
        await scene.clock.advance(10)
        at_rest(scene)


async def test_a_worker_that_stays_away_while_the_lab_is_made_costs_its_place_and_no_failure() -> None:
    async with instances_scene(slots={"w1": 1, "w2": 1}, instances_provisioning_timeout=100) as scene:
        scene.outside.troubles["provision"] = away()
        await scene.make()
        await scene.clock.advance(99)
        held = await scene.get()
        assert held.status.phase == "Provisioning"
        assert condition(held, "Ready") == ("Unknown", "WorkerAway")
        scene.places.slots.pop("w1")
        await scene.clock.advance(5)
        waiting = await scene.get()
        assert (waiting.status.phase, waiting.status.retry_count) == ("Pending", 1)
        assert (waiting.status.worker_ref, scene.places.held) == (None, {})
        assert condition(waiting, "ResourcesAllocated")[0] == "False"
        del scene.outside.troubles["provision"]
        running = await scene.until_phase("Running")
        assert running.status.worker_ref is not None
        assert running.status.worker_ref.name == "w2"


async def test_what_does_not_come_up_in_time_fails_and_is_cleaned_up() -> None:
    async with instances_scene(instances_provisioning_timeout=100) as scene:
        scene.outside.troubles["provision"] = NotNow("Refused", "it has no room", again=5.0)
        await scene.make()
        await scene.clock.advance(99)
        held = await scene.get()
        assert held.status.phase == "Provisioning"
        assert condition(held, "Ready") == ("Unknown", "Refused")
        failed = await scene.until_phase("Failed", seconds=10)
        assert failed.status.failure is not None
        assert failed.status.failure.reason == "ProvisioningTimeout"
        assert "it has no room" in failed.status.failure.message
        await scene.clock.advance(5)
        assert condition(await scene.get(), "CleanupCompleted") == ("True", "CleanedUp")
        at_rest(scene)


async def test_what_cannot_be_cleaned_up_in_time_is_failed_and_keeps_its_place_until_it_is() -> None:
    async with instances_scene(instances_stopping_timeout=100) as scene:
        await scene.make()
        await scene.until_phase("Running")
        scene.outside.troubles["clean"] = away()
        await scene.change(desired_phase="Stopped")
        await scene.clock.advance(99)
        assert await scene.phase() == "Stopping"
        failed = await scene.until_phase("Failed", seconds=10)
        assert failed.status.failure is not None
        assert failed.status.failure.reason == "StoppingTimeout"
        await scene.clock.advance(1000)
        assert scene.places.held
        assert scene.running_now()
        del scene.outside.troubles["clean"]
        await scene.clock.advance(120)
        assert condition(await scene.get(), "CleanupCompleted") == ("True", "CleanedUp")
        at_rest(scene)


async def test_what_can_never_run_is_failed_until_a_person_changes_it() -> None:
    async with instances_scene() as scene:
        scene.outside.troubles["prepare"] = Refused("ImageNotFound", "there is no such image")
        await scene.make()
        failed = await scene.get()
        assert (failed.status.phase, failed.status.error_message) == ("Failed", "there is no such image")
        assert condition(failed, "CleanupCompleted") == ("True", "CleanedUp")
        await scene.clock.advance(7200)
        assert await scene.phase() == "Failed"
        await scene.annotate(RETRY_ANNOTATION, "1")
        again = await scene.get()
        assert (again.status.phase, len(again.status.phase_history)) == ("Failed", 3)
        del scene.outside.troubles["prepare"]
        await scene.change(duration_minutes=30)
        running = await scene.until_phase("Running")
        assert (running.status.failure, running.status.error_message) == (None, None)


async def test_a_worker_that_is_lost_before_the_lab_ran_costs_a_delay() -> None:
    async with instances_scene(slots={"w1": 1, "w2": 1}, instances_retry_delay=10) as scene:
        made = await scene.make()
        await scene.until_phase("Provisioning")
        scene.places.slots.pop("w1")
        scene.outside.lose("w1")
        waiting = await scene.until_phase("Pending", seconds=5)
        assert waiting.status.retry_count == 1
        await scene.clock.advance(1)
        waiting = await scene.get()
        assert condition(waiting, "WorkerAssigned") == ("False", "BackingOff")
        assert scene.places.held == {}
        running = await scene.until_phase("Running")
        assert running.status.worker_ref is not None
        assert running.status.worker_ref.name == "w2"
        assert scene.outside.made[made.uid] == 2
        assert len(scene.running_now()) == 1


@pytest.mark.parametrize(("policy", "fate"), [("Never", "Failed"), ("OnFailure", "Running")])
async def test_a_worker_that_is_lost_under_a_running_lab(policy: str, fate: str) -> None:
    async with instances_scene(slots={"w1": 1, "w2": 1}) as scene:
        await scene.make(restartPolicy=policy)
        first = await scene.until_phase("Running")
        await scene.clock.advance(600)
        scene.places.slots.pop("w1")
        scene.outside.lose("w1")
        scene.hints.tell(("default", "a"))
        await scene.clock.advance(30)
        after = await scene.get()
        assert after.status.phase == fate
        assert after.status.started_at == first.status.started_at, "its time goes on"
        if fate == "Failed":
            assert condition(after, "CleanupCompleted") == ("True", "CleanedUp")
            at_rest(scene)


@pytest.mark.parametrize(("step", "seconds", "events"), [("provision", 100, 1), ("look", 100, 1), ("look", 10, 0)])
async def test_a_trouble_that_lasts_is_a_reason_and_one_event(step: str, seconds: float, events: int) -> None:
    reason = next(column for column in LAB_INSTANCE_REQUEST.columns if column.name == "Reason")
    async with instances_scene() as scene:
        await scene.make()
        provisioning = await scene.get()
        assert (provisioning.status.phase, reason.value(provisioning)) == ("Provisioning", None)
        if step == "look":
            await scene.until_phase("Running")
        scene.outside.troubles[step] = away()
        scene.hints.tell(("default", "a"))
        await scene.clock.advance(seconds)
        assert reason.value(await scene.get()) == "WorkerAway"
        scene.outside.troubles.clear()
        await scene.clock.advance(10)
        running = await scene.get()
        assert (running.status.phase, reason.value(running), running.status.held_up_since) == ("Running", None, None)
        told = [event for event in await scene.told() if event[0] == "Warning"]
        assert told == [("Warning", "WorkerAway", "it does not answer")] * events


@pytest.mark.parametrize("how", ["stopped", "over", "late"])
async def test_what_cannot_be_cleaned_up_for_another_try_still_ends(how: str) -> None:
    async with instances_scene(slots={"w1": 1}, instances_stopping_timeout=300) as scene:
        await scene.make(restartPolicy="OnFailure", durationMinutes=20)
        running = await scene.until_phase("Running")
        assert running.ends_at is not None
        if how != "late":
            await scene.clock.advance((running.ends_at - scene.now).total_seconds() - 120)
        scene.outside.troubles |= {"look": LabFailed("ContainerFailed", "exit code 1", exit_code=1), "clean": away()}
        scene.hints.tell(("default", "a"))
        await scene.clock.advance(10)
        assert await scene.phase() == "Pending"
        if how == "stopped":
            await scene.change(desired_phase="Stopped")
        await scene.clock.advance(320 if how == "late" else 120)
        assert await scene.phase() == ("Stopping" if how == "stopped" else "Failed")
        assert scene.places.held, "it may still be there"
        scene.outside.troubles.clear()
        await scene.clock.advance(60)
        assert await scene.phase() == ("Completed" if how == "stopped" else "Failed")
        at_rest(scene)


async def test_what_cannot_be_deleted_in_time_says_so() -> None:
    async with instances_scene(instances_stopping_timeout=100) as scene:
        await scene.make()
        await scene.until_phase("Running")
        scene.outside.troubles["clean"] = away()
        await scene.delete()
        failed = await scene.until_phase("Failed", seconds=120)
        assert failed.status.failure is not None
        assert failed.status.failure.reason == "StoppingTimeout"
        del scene.outside.troubles["clean"]
        await scene.clock.advance(60)
        assert await scene.gone()
        at_rest(scene)


@pytest.mark.parametrize("how", ["runs", "is away", "waits", "is held up"])
async def test_only_observing_ends_nobodys_time_and_is_in_no_hurry(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    async with instances_scene(instances_retry_delay=300, instances_rest_interval=60) as scene:
        await scene.make(durationMinutes=1, restartPolicy="OnFailure")
        await scene.until_phase("Running")
        if how == "is away":
            scene.outside.troubles["look"] = away(again=0.1)
        elif how != "runs":
            scene.outside.troubles["look"] = LabFailed("ContainerFailed", "exit code 1", exit_code=1)
            scene.hints.tell(("default", "a"))
            await scene.until_phase("Pending")
            await scene.clock.advance(5)
        if how == "is held up":
            scene.outside.troubles["prepare"] = NotNow("TopologyUnavailable", "the server answers 500", again=1.0)
            await scene.change(duration_minutes=2)
        await scene.stop()
        scene.observe_only = True
        looks, look = [0], InstancesController.reconcile

        async def counted(self: InstancesController, request: LabInstanceRequest, ctx: Context) -> Result:
            looks[0] += 1
            return await look(self, request, ctx)

        monkeypatch.setattr(InstancesController, "reconcile", counted)
        await scene.lead()
        await scene.clock.advance(3600)
        assert await scene.phase() == ("Running" if how in ("runs", "is away") else "Pending")
        assert len(scene.running_now()) == (1 if how in ("runs", "is away") else 0)
        assert 1 <= looks[0] <= 70, "once a minute"


async def test_what_fails_again_and_again_is_given_up_after_its_retries() -> None:
    async with instances_scene(instances_retries=2, instances_retry_delay=10) as scene:
        scene.outside.troubles["provision"] = LabFailed("ContainerFailed", "exit code 3", exit_code=3)
        await scene.make(restartPolicy="OnFailure")
        begun = scene.now
        failed = await scene.until_phase("Failed", seconds=120)
        assert 30 <= (scene.now - begun).total_seconds() < 40, "10 s, then 20 s"
        assert failed.status.failure is not None
        assert (failed.status.retry_count, failed.status.failure.reason, failed.status.exit_code) == (
            2,
            "ContainerFailed",
            3,
        )
        await scene.clock.advance(10)
        at_rest(scene)


async def test_an_outside_that_does_not_answer_proves_nothing() -> None:
    async with instances_scene() as scene:
        await scene.make()
        await scene.until_phase("Running")
        scene.outside.troubles["look"] = away()
        scene.hints.tell(("default", "a"))
        await scene.clock.settle()
        assert condition(await scene.get(), "Ready") == ("Unknown", "WorkerAway")
        await scene.clock.advance(1800)
        assert await scene.phase() == "Running"
        del scene.outside.troubles["look"]
        await scene.clock.advance(10)
        assert condition(await scene.get(), "Ready") == ("True", "Running")


async def test_what_waits_takes_the_place_that_becomes_free() -> None:
    async with instances_scene(slots={"w1": 1}) as scene:
        await scene.make("a", durationMinutes=10)
        await scene.until_phase("Running")
        await scene.make("b")
        assert condition(await scene.get("b"), "WorkerAssigned") == ("False", "NoCapacityAvailable")
        await scene.clock.advance(9 * 60)
        await scene.until_phase("Completed", seconds=90)
        await scene.until_phase("Running", "b", seconds=5)


async def test_only_observing_places_and_removes_nothing() -> None:
    async with instances_scene(observe_only=True) as scene:
        await scene.make()
        await scene.clock.advance(600)
        assert condition(await scene.get(), "WorkerAssigned") == ("False", "ObserveOnly")
        at_rest(scene)


@pytest.mark.parametrize("point", CRASH_POINTS)
async def test_a_leader_that_dies_between_two_steps_doubles_and_leaks_nothing(
    monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    async with instances_scene(slots={"w1": 1}) as scene:
        died = dying_at(monkeypatch, point)
        made = await scene.make(durationMinutes=1)
        spent = 0.0
        while not scene.dead:
            await scene.clock.advance(1)
            spent += 1
            assert spent < 120, f"never came to {point}"
        assert died[point] == 1
        await scene.stop()
        await scene.clock.advance(7)
        await scene.lead()
        done = await scene.until_phase("Completed", seconds=200)
        await scene.clock.advance(5)
        check_history(done)
        assert scene.outside.made[made.uid] == 1
        at_rest(scene)
