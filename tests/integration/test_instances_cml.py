"""Lab instances on CML: from a topology to Running to nothing left, and exactly one lab on the way."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from controllers.instances.kind import LabInstanceRequest
from controllers.instances.marks import notes_for, read_mark
from equipment.cml_instances_world import INSTALLATION, CmlInstancesWorld, cml_instances_world, topology
from equipment.labs_world import FAST
from equipment.waiting import until
from lrm.model import rfc3339
from lrm.resource import PROTECT_ANNOTATION


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[CmlInstancesWorld]:
    async with cml_instances_world(monkeypatch) as made:
        yield made


def fault(
    world: CmlInstancesWorld, kind: str, path: str, method: str = "*", times: int | None = 1, **how: object
) -> None:
    world.labs.fault(kind, path=path, method=method, times=times, **how)


async def test_a_topology_runs_for_its_student_and_leaves_nothing(world: CmlInstancesWorld) -> None:
    """Imported once under its own title, started, converged, with its address told; stopped, wiped and deleted."""
    await world.worker()
    text = topology(3, notes="the author's own")
    await world.make(labTemplate={"topology": text}, environment={"GROUP": "7"})
    running = await world.until_phase("Running")
    (lab,) = world.titled(running)
    assert running.status.cml_lab_id == lab.id
    assert running.status.access_url == f"{world.labs.simulator.url_of(world.labs.machine().name)}/lab/{lab.id}"
    assert running.status.need is not None
    assert running.status.need.nodes == 3, "the connector needs no licence"
    assert {node.state for node in lab.nodes.values()} == {"BOOTED"}
    assert lab.notes.startswith("the author's own\n\nMade by lrm for default/a.\n\nGROUP=7\n\n")
    mark = read_mark(lab.notes)
    assert mark is not None
    assert (mark.installation, mark.uid, mark.attempt) == (INSTALLATION, running.uid, 1)
    await world.stop()
    completed = await world.until_phase("Completed")
    assert not world.labs.machine().labs
    assert completed.status.worker_ref is None
    counts = world.labs.machine().counts
    assert counts["POST /import"] == 1
    assert all(counts[f"PUT /labs/{{lab_id}}/{step}"] for step in ("start", "stop", "wipe"))


async def test_what_is_reserved_is_never_less_than_its_topology_takes(world: CmlInstancesWorld) -> None:
    asks = json.loads(topology(2))
    asks["nodes"][0] |= {"cpus": 2, "ram": 4096}
    for name, said in (("less", {"cpu": 0.01, "memory": "6Mi"}), ("more", {"cpu": 3, "memory": "8Gi"}), ("none", {})):
        await world.make(name, labTemplate={"topology": json.dumps(asks)}, resources=said)
    needs = {
        name: (await world.until_told("WorkerAssigned", "NoWorkers", name)).status.need
        for name in ("less", "more", "none")
    }
    assert {name: (need.cpu, need.memory // 1024**3, need.nodes) for name, need in needs.items() if need} == {
        "less": (2, 4, 2),
        "more": (3, 8, 2),
        "none": (2, 4, 2),
    }


async def test_an_import_whose_answer_is_lost_is_found_and_not_repeated(world: CmlInstancesWorld) -> None:
    await world.worker()
    fault(world, "drop-answer", "/import")
    await world.make()
    running = await world.until_phase("Running")
    assert len(world.titled(running)) == 1
    assert world.labs.machine().counts["POST /import"] == 1


async def test_an_import_that_never_arrived_is_sent_again(world: CmlInstancesWorld) -> None:
    await world.worker()
    fault(world, "drop", "/import")
    await world.make()
    running = await world.until_phase("Running")
    assert len(world.titled(running)) == 1
    assert world.labs.machine().counts["POST /import"] == 2


async def test_a_late_import_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """CML carries it out after we gave it up: the lab is found, no second one is made."""
    async with cml_instances_world(monkeypatch, renew_deadline=0.4, late_import=60) as world:
        await world.worker()
        fault(world, "delay", "/import", seconds=0.35)
        await world.make()
        running = await world.until_phase("Running")
        assert len(world.titled(running)) == 1
        assert world.labs.machine().counts["POST /import"] == 1


async def test_nothing_is_left_of_an_import_that_was_in_doubt_when_its_end_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cleaning up waits until CML can not be late any more."""
    async with cml_instances_world(monkeypatch, renew_deadline=0.4, late_import=3) as world:
        await world.worker()
        fault(world, "delay", "/import", seconds=0.35)
        request = await world.make()
        await until(lambda: world.labs.machine().counts["POST /import"] == 1)
        await world.delete()
        await world.gone()
        assert not world.titled(request)


async def test_of_two_labs_of_one_try_the_older_stays(world: CmlInstancesWorld) -> None:
    """What a second import left behind is removed before the first one is started; an earlier try's lab is no one's."""
    request = (await world.make()).thaw()
    request.status.attempt = 7
    world.copy_of(request)
    request.status.attempt = 1
    _, older = world.copy_of(request), world.copy_of(request)
    older.created -= timedelta(minutes=1)
    await world.worker()
    running = await world.until_phase("Running")
    assert running.status.cml_lab_id == older.id
    assert world.titled(running) == [older]
    assert world.labs.machine().counts["POST /import"] == 0


async def test_a_lab_that_another_made_under_its_title_is_not_taken_for_its_own(world: CmlInstancesWorld) -> None:
    await world.worker()
    request = await world.make(scheduledStartTime=(world.labs.clock.now() + timedelta(days=1)).isoformat())
    mark = "lrm installation={} uid={} attempt=1".format
    student, machine = "11111111-1111-4111-8111-111111111111", world.labs.machine()
    forged = [
        machine.add_lab(request.outside_name, nodes=1, owner=student, notes=mark(INSTALLATION, request.uid)),
        machine.add_lab(request.outside_name, nodes=1, notes=mark("another", request.uid)),
        machine.add_lab(request.outside_name, nodes=1, notes=mark(INSTALLATION, uuid.uuid4())),
    ]
    await world.labs.client.update(await world.get(), lambda r: setattr(r.spec, "scheduled_start_time", None))
    running = await world.until_phase("Running")
    assert [lab.id for lab in world.titled(running)] == [running.status.cml_lab_id]
    assert running.status.cml_lab_id not in [lab.id for lab in forged]


@pytest.mark.parametrize("step", ["start", "stop", "wipe", "delete"])
async def test_a_step_whose_answer_is_lost_is_judged_by_the_lab(world: CmlInstancesWorld, step: str) -> None:
    await world.worker()
    path = "/labs/*" if step == "delete" else f"/labs/*/{step}"
    fault(world, "drop-answer", path, "DELETE" if step == "delete" else "PUT")
    await world.make()
    running = await world.until_phase("Running")
    assert len(world.titled(running)) == 1
    await world.stop()
    await world.until_phase("Completed")
    assert not world.labs.machine().labs


async def test_an_instance_at_rest_costs_no_call(world: CmlInstancesWorld) -> None:
    """Once the lab has its record, the controller looks there."""
    await world.worker()
    await world.running()
    await world.labs.settled()
    seen, machine = world.looks, world.labs.machine()
    await until(lambda: world.looks >= seen + 2)  # one that began before the record came may ask CML yet
    machine.counts.clear()
    await until(lambda: world.looks >= seen + 6)
    assert not machine.counts
    assert (await world.get()).status.phase == "Running"


async def test_a_lab_that_its_student_deleted_is_lost(world: CmlInstancesWorld) -> None:
    await world.worker()
    running = await world.running()
    world.labs.machine().remove(world.titled(running)[0])
    await world.labs.sync()
    failed = await world.until_phase("Failed")
    assert failed.status.failure is not None
    assert failed.status.failure.reason == "LabLost"
    await world.until_told("CleanupCompleted", "CleanedUp")


@pytest.mark.parametrize("state", ["STOPPED", "DEFINED_ON_CORE"])
async def test_a_lab_that_its_student_stopped_stays_until_its_time_is_over(
    world: CmlInstancesWorld, state: str
) -> None:
    """Nothing is started or deleted; it is told once what to do; started there, it is Ready; its time goes on."""
    await world.worker()
    running = await world.running()
    (lab,) = world.titled(running)
    world.labs.machine().counts.clear()
    world.labs.machine().force(lab, state)
    await world.labs.sync()
    ends = running.ends_at
    assert ends is not None
    told = await world.until_told("Ready", f"start it there, it ends at {rfc3339(ends)}")
    seen = world.looks
    await until(lambda: world.looks >= seen + 4)
    told = await world.get()
    ready = told.status.condition("Ready")
    assert (told.status.phase, ready and (ready.status, ready.reason)) == ("Running", ("False", "LabStopped"))
    assert told.status.worker_ref == running.status.worker_ref
    events = await world.labs.told("a", "LabInstanceRequest")
    assert [kind for kind, reason, _ in events if reason == "LabStopped"] == ["Warning"]
    world.labs.machine().force(lab, "QUEUED")
    await world.until_told("Ready", "is QUEUED in CML")
    world.labs.machine().force(lab, "STARTED")
    await world.until_told("Ready", "Running")
    counts = world.labs.machine().counts
    assert not [call for call in counts if not call.startswith("GET ")]
    world.labs.machine().force(lab, state)
    await world.labs.sync()
    await world.until_told("Ready", "LabStopped")
    world.labs.clock.passed += 3600
    await world.until_phase("Completed")
    assert not world.labs.machine().labs


@pytest.mark.parametrize("end", ["stop", "delete"])
async def test_a_stopped_lab_ends_when_it_is_asked_to(world: CmlInstancesWorld, end: str) -> None:
    await world.worker()
    running = await world.running()
    world.labs.machine().force(world.titled(running)[0], "STOPPED")
    await world.labs.sync()
    await world.until_told("Ready", "LabStopped")
    await (world.stop() if end == "stop" else world.delete())
    await (world.until_phase("Completed") if end == "stop" else world.gone())
    assert not world.labs.machine().labs


async def test_a_stopped_lab_is_started_again_where_its_policy_says_so(world: CmlInstancesWorld) -> None:
    """The same lab, with what is in it; CML's refusals are told; it is not begun anew."""
    await world.worker()
    running = await world.running(restartPolicy="OnFailure")
    (lab,) = world.titled(running)
    world.labs.machine().counts.clear()
    fault(world, "status", "/labs/*/start", "PUT", times=None, status=400)
    world.labs.machine().force(lab, "STOPPED")
    await world.labs.sync()
    await world.until_told("Ready", "CML refused with 400")
    world.labs.simulator.faults.clear()
    await until(lambda: lab.state == "STARTED")
    await world.until_told("Ready", "Running: it runs")
    after = await world.get()
    assert (after.status.cml_lab_id, after.status.retry_count, after.status.attempt) == (lab.id, 0, 1)
    counts = world.labs.machine().counts
    assert not counts["POST /import"]
    assert not counts["DELETE /labs/{lab_id}"]
    events = await world.labs.told("a", "LabInstanceRequest")
    assert [kind for kind, reason, _ in events if reason == "StartedAgain"] == ["Normal"]


async def test_a_stopped_lab_is_not_started_again_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its student renamed it and goes on stopping it: once in a rest interval, though its record tells each time."""
    async with cml_instances_world(monkeypatch, instances_rest_interval=3600) as world:
        await world.worker()
        running = await world.running(restartPolicy="OnFailure")
        (lab,) = world.titled(running)
        world.labs.edit(lab, title="routers at last")
        world.labs.machine().counts.clear()
        for n in range(3):
            world.labs.machine().force(lab, "STOPPED")
            await world.labs.sync()
            await (until(lambda: lab.state == "STARTED") if n == 0 else world.until_told("Ready", "LabStopped"))
            world.labs.machine().force(lab, "STARTED")
            await world.labs.sync()
            await world.until_told("Ready", "Running: it runs")
        assert world.labs.machine().counts["PUT /labs/{lab_id}/start"] == 1


async def test_a_lab_is_not_started_again_against_its_record(world: CmlInstancesWorld) -> None:
    """Whoever has it stopped, or deleted, by its LabRecord is not worked against."""
    await world.worker()
    running = await world.running(restartPolicy="OnFailure")
    (lab,) = world.titled(running)
    record = await world.labs.record(lab.id)
    await world.labs.client.update(record, lambda r: setattr(r.spec, "desired_state", "STOPPED"))
    await world.until_told("Ready", "wishes for STOPPED")
    assert lab.state == "STOPPED"
    await world.labs.client.delete(await world.labs.record(lab.id))
    again = await until(lambda: [found for found in world.titled(running) if found is not lab], "another lab", 60)
    await until(lambda: again[0].state == "STARTED")
    assert "StartedAgain" not in {reason for _, reason, _ in await world.labs.told("a", "LabInstanceRequest")}


async def test_a_lab_that_its_student_renamed_is_its_own_as_before(world: CmlInstancesWorld) -> None:
    """What happens to it is heard at once, and that lrm deletes it is no news; a student's copy of it is his own."""
    await world.worker()
    running = await world.running()
    (lab,) = world.titled(running)
    world.labs.edit(lab, title="routers at last")
    copied = world.labs.machine().add_lab("my copy", notes=lab.notes)
    await world.labs.sync()
    world.labs.machine().force(lab, "STOPPED")
    await world.labs.sync()
    await world.until_told("Ready", "LabStopped")
    world.labs.machine().remove(copied)
    await world.labs.sync()
    told = await world.labs.told("w1", "LabWorker")
    assert ["my copy" in message for _, reason, message in told if reason == "LabVanished"] == [True]
    await world.stop()
    await world.until_phase("Completed")
    assert not world.labs.machine().labs
    await world.labs.sync()
    assert not await world.labs.records()
    assert await world.labs.told("w1", "LabWorker") == told


async def test_a_lab_outlives_a_restart_of_its_cml(world: CmlInstancesWorld) -> None:
    await world.worker()
    running = await world.running()
    (lab,) = world.titled(running)
    world.labs.machine().power_off()
    world.labs.machine().power_on()
    await world.labs.sync()
    told = await world.until_told("Ready", "or its CML was restarted")
    assert told.status.phase == "Running"
    assert world.titled(running) == [lab]


async def test_a_404_under_a_session_that_may_not_see_everything_proves_nothing(world: CmlInstancesWorld) -> None:
    await world.worker()
    running = await world.running()
    (lab,) = world.titled(running)
    fault(world, "not-admin", "*", times=None)
    fault(world, "status", f"/labs/{lab.id}/state", status=404, times=None)
    worker = await world.labs.get_worker()
    world.labs.sessions.client_for(worker).renew_session()
    record = next(iter((await world.labs.records()).values()))
    await world.labs.client.forget(record)
    await world.until_told("Ready", "administrator rights")
    assert (await world.get()).status.phase == "Running"
    world.labs.simulator.faults.clear()
    await world.until_told("Ready", "Running")


async def test_what_cml_does_not_take_is_refused_in_its_words(world: CmlInstancesWorld) -> None:
    await world.worker()
    await world.make(labTemplate={"topology": topology(1, surprise=[])})
    failed = await world.until_phase("Failed")
    assert failed.status.failure is not None
    assert failed.status.failure.reason == "Refused"
    assert "surprise" in failed.status.failure.message
    await world.until_told("CleanupCompleted", "CleanedUp")
    assert not world.labs.machine().labs


async def test_a_start_that_cml_refuses_is_told_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """CML is full for a moment; the provisioning deadline is what ends the patience with it."""
    options = replace(FAST, nodes_unlicensed=4)
    async with cml_instances_world(monkeypatch, options=options) as world:
        await world.worker()
        other = world.labs.machine().add_lab("a student's own", nodes=2, running=True)
        await world.make(labTemplate={"topology": topology(3)})
        told = await world.until_told("Ready", "CML refused with 400")
        assert told.status.phase == "Provisioning"
        world.labs.machine().force(other, "STOPPED")
        await world.until_phase("Running")


async def test_a_file_that_has_changed_is_taken_as_far_as_its_place_holds_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Measured when it was asked for, read again when there is a place."""
    small, large = tmp_path / "small.json", tmp_path / "large.json"
    for path in (small, large):
        path.write_text(topology(2))
    async with cml_instances_world(monkeypatch, topology_files=(f"{tmp_path}/*.json",)) as world:
        await world.make("small", labTemplate={"topologyFile": str(small)})
        await world.make("large", labTemplate={"topologyFile": str(large)})
        for name in ("small", "large"):
            await world.until_told("WorkerAssigned", "NoWorkersAvailable", name)
        small.write_text(topology(1))
        large.write_text(topology(3))
        await world.worker()
        running = await world.until_phase("Running", "small")
        assert len(world.titled(running)[0].nodes) == 2
        failed = await world.until_phase("Failed", "large")
        assert failed.status.failure is not None
        assert failed.status.failure.reason == "TemplateInvalid"
        assert "needs more: 3 nodes" in failed.status.failure.message
        await world.until_told("CleanupCompleted", "CleanedUp", "large")
        assert len(world.labs.machine().labs) == 1


# Its worker


async def test_a_worker_that_is_away_is_waited_for(world: CmlInstancesWorld) -> None:
    await world.worker()
    await world.running()
    await world.labs.change_worker(lambda w: w.status.enter("Stopped", "Test", world.labs.clock.now()))
    told = await world.until_told("Ready", "WorkerAway")
    assert told.status.phase == "Running"
    await world.labs.change_worker(lambda w: w.status.enter("Starting", "Test", world.labs.clock.now()))
    await world.labs.change_worker(lambda w: w.status.enter("ReadyUnlicensed", "Test", world.labs.clock.now()))
    await world.until_told("Ready", "Running")


async def test_a_worker_that_began_to_drain_gets_no_lab_any_more(world: CmlInstancesWorld) -> None:
    """What has its place there and was not imported yet goes elsewhere, without having failed."""
    await world.worker("w1")
    fault(world, "status", "/import", times=None, status=502)
    await world.make()
    await until(lambda: world.labs.machine("w1").counts["POST /import"] >= 1)
    await world.worker("w2")
    await world.labs.change_worker(lambda w: w.status.enter("Draining", "Test", world.labs.clock.now()))
    running = await world.until_phase("Running")
    assert running.status.worker_ref is not None
    assert running.status.worker_ref.name == "w2"
    assert not world.titled(running, "w1")


async def test_one_lab_that_cml_stumbles_over_does_not_hold_up_the_others(world: CmlInstancesWorld) -> None:
    """Its title is known from when it was mirrored; of one that never was, it may be ours."""
    await world.worker()
    broken = world.labs.machine().add_lab("somebody's")
    for path in ("/populate_lab_tiles", f"/labs/{broken.id}"):
        fault(world, "status", path, "GET", times=None)
    await world.make()
    await world.until_told("Ready", "does not tell the titles of 1 labs")
    world.labs.simulator.faults.clear()
    await world.labs.sync()
    fault(world, "status", "/populate_lab_tiles", "GET", times=None)
    fault(world, "status", f"/labs/{broken.id}", "GET", times=None)
    await world.make("b")
    await world.until_phase("Running", "b")
    await world.stop("b")
    await world.until_phase("Completed", "b")


async def test_a_worker_with_another_instance_has_lost_its_labs(world: CmlInstancesWorld) -> None:
    await world.worker()
    running = await world.running()
    world.labs.machine().counts.clear()
    await world.labs.change_worker(lambda w: setattr(w.status.ec2, "instance_id", "i-0aaaaaaaaaaaaaaaa"))
    failed = await world.until_phase("Failed")
    assert failed.status.failure is not None
    assert failed.status.failure.reason == "WorkerLost"
    await world.until_told("CleanupCompleted", "CleanedUp")
    assert len(world.titled(running)) == 1, "nothing was asked of a CML that is not its worker's any more"


# Strays


async def test_a_lab_left_on_a_worker_that_came_back_is_deleted(world: CmlInstancesWorld) -> None:
    """Its request runs elsewhere by then; two looks must agree."""
    await world.worker("w1")
    await world.running(restartPolicy="OnFailure")
    request = await world.get()
    await world.labs.change_worker(lambda w: w.status.enter("Failed", "Test", world.labs.clock.now()))
    await world.worker("w2")

    async def elsewhere() -> bool:
        found = await world.get()
        return found.status.phase == "Running" and getattr(found.status.worker_ref, "name", "") == "w2"

    await until(elsewhere)
    for phase in ("Starting", "ReadyUnlicensed"):
        await world.labs.change_worker(lambda w, phase=phase: w.status.enter(phase, "Test", world.labs.clock.now()))
    assert len(world.titled(request, "w1")) == 1
    await world.look_for_strays()
    assert not any(r.deleting for r in world.labs.known("w1"))
    await world.look_for_strays()
    await until(lambda: not world.titled(request, "w1"))
    await world.labs.sync("w2")
    await world.look_for_strays()
    await world.look_for_strays()
    assert len(world.titled(request, "w2")) == 1
    assert (await world.get()).status.phase == "Running"


async def test_what_a_late_import_made_besides_is_deleted(world: CmlInstancesWorld) -> None:
    await world.worker()
    running = await world.running()
    world.copy_of(running)
    await world.look_for_strays()
    await world.look_for_strays()
    await until(lambda: [lab.id for lab in world.titled(running)] == [running.status.cml_lab_id])
    assert (await world.get()).status.phase == "Running"


async def test_strays_are_looked_for_as_long_as_the_term_lasts(world: CmlInstancesWorld) -> None:
    await world.worker()
    running = await world.running()
    world.copy_of(running)
    await world.labs.sync()
    looking = asyncio.create_task(world.strays.run(world.term))
    await until(lambda: world.strays.describe()["removed"] == 1, timeout=30)
    await until(lambda: [lab.id for lab in world.titled(running)] == [running.status.cml_lab_id])
    world.term.lost()
    await asyncio.wait_for(looking, 30)


Change = Callable[[CmlInstancesWorld, LabInstanceRequest], object]


def of_another_installation(world: CmlInstancesWorld, request: LabInstanceRequest) -> None:
    world.copy_of(request, installation="another")


def without_a_mark(world: CmlInstancesWorld, request: LabInstanceRequest) -> None:
    world.labs.machine().add_lab(request.outside_name)


def of_a_student(world: CmlInstancesWorld, request: LabInstanceRequest) -> None:
    world.labs.machine().add_lab(f"my {request.outside_name}", notes=notes_for(request, INSTALLATION))


@pytest.mark.parametrize("leave", [of_another_installation, without_a_mark, of_a_student])
async def test_a_lab_that_is_not_known_to_be_ours_stays(world: CmlInstancesWorld, leave: Change) -> None:
    """A request that is no more claims nothing: only our own mark under its title makes a lab ours."""
    await world.worker()
    request = await world.running()
    await world.delete()
    await world.gone()
    leave(world, request)
    kept = len(world.labs.machine().labs)
    ours = world.copy_of(request)
    for _ in range(3):
        await world.look_for_strays()
    await until(lambda: ours.id not in world.labs.machine().labs)
    await world.look_for_strays()
    await world.look_for_strays()
    assert len(world.labs.machine().labs) == kept == 1


async def test_a_store_that_has_forgotten_its_requests_costs_no_lab(world: CmlInstancesWorld) -> None:
    """Restored from a backup, say: more than half of the labs are unclaimed."""
    await world.worker()
    running = (await world.running()).thaw()
    for n in range(10):
        running.metadata.uid = str(uuid.UUID(int=n))
        world.copy_of(running)
    for _ in range(3):
        await world.look_for_strays()
    assert "10 of 11 labs" in world.strays.describe()["error"]
    assert not any(r.deleting for r in world.labs.known())
    for lab in list(world.labs.machine().labs.values())[8:]:
        world.labs.machine().remove(lab)
    await world.look_for_strays()
    await until(lambda: len(world.labs.known()) == 8)
    await world.look_for_strays()
    await world.look_for_strays()
    await until(lambda: len(world.labs.machine().labs) == 1)
    assert not world.strays.describe()["error"]


async def test_a_stray_whose_record_is_protected_stays(world: CmlInstancesWorld) -> None:
    await world.worker()
    running = await world.running()
    copy = world.copy_of(running)
    await world.labs.sync()
    kept = {PROTECT_ANNOTATION: "true"}
    await world.labs.client.update(await world.labs.record(copy.id), lambda r: r.metadata.annotations.update(kept))
    for _ in range(3):
        await world.look_for_strays()
    assert not (await world.labs.record(copy.id)).deleting


async def test_no_stray_is_concluded_while_a_request_cannot_be_read(world: CmlInstancesWorld) -> None:
    """It may be the one that claims the lab."""
    await world.worker()
    running = await world.running()
    world.copy_of(running)
    key = world.labs.registry.key_of(running).removesuffix(running.name) + "unread"
    broken = await world.labs.storage.create(key, b'{"spec": 3}')
    for _ in range(3):
        await world.look_for_strays()
    assert not any(r.deleting for r in world.labs.known())
    await world.labs.storage.delete(broken.key, expected_revision=broken.revision)
    await world.look_for_strays()
    await world.look_for_strays()
    await until(lambda: len(world.titled(running)) == 1)
