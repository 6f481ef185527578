"""Only a proven list removes records: everything that a CML can do wrong, and the law of tombstones."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from controllers.cml.client import Timeouts
from controllers.cml.simulator import Account, Options
from controllers.cml.simulator.labs import Lab
from controllers.labs.kind import LabRecord
from equipment.labs_world import FAST, LabsWorld, SettableClock, labs_world
from equipment.waiting import until


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LabsWorld]:
    async with labs_world(monkeypatch) as world:
        yield world


async def synced_labs(world: LabsWorld, count: int) -> list[Lab]:
    """A worker with so many labs, all of them in records."""
    await world.worker()
    student = world.machine().directory.add("student", "a-password", world.clock.now())
    labs = [world.machine().add_lab(f"Lab {n}", nodes=1, owner=student.id) for n in range(count)]
    await world.sync()
    assert len(await world.records()) == count
    return labs


def untouched(before: dict[str, LabRecord], after: dict[str, LabRecord]) -> bool:
    return {i: r.metadata.resource_version for i, r in before.items()} == {
        i: r.metadata.resource_version for i, r in after.items()
    }


FAILURES: list[tuple[str, str, dict[str, Any], str]] = [
    # what, fault, how, part of the error
    ("the list is refused with 500", "status", {"path": "/labs", "status": 500}, "unusable"),
    ("the list is forbidden", "status", {"path": "/labs", "status": 403}, "refused with 403"),
    ("the list is not found", "status", {"path": "/labs", "status": 404}, "no such thing"),
    ("the list is an HTML page", "html", {"path": "/labs", "status": 200}, "HTML"),
    ("the list is a booting proxy's page", "html", {"path": "/labs", "status": 502}, "not ready"),
    ("the list is half a JSON", "truncate", {"path": "/labs"}, "unusable"),
    ("the connection is cut inside the list", "cut", {"path": "/labs"}, ""),
    ("the list's request is dropped", "drop", {"path": "/labs"}, ""),
    ("everything is refused", "drop", {}, ""),
    ("the list is empty since the session is no admin's", "not-admin", {"path": "new session"}, "administrator"),
    ("the list is empty since the session is an admin's no more", "not-admin", {}, "administrator"),
    ("half of the list is missing while CML has the labs", "half", {"path": "/labs"}, "lacks"),
    ("the list is empty while CML has the labs", "empty", {"path": "/labs"}, "lacks"),
    ("another CML answers", "identity", {"product_uuid": "deadbeef-0000-4000-8000-000000000000"}, "identity"),
]


@pytest.mark.parametrize(("what", "fault", "how", "part"), FAILURES, ids=[f[0].replace(" ", "-") for f in FAILURES])
async def test_records_stay_when(what: str, fault: str, how: dict[str, Any], part: str, world: LabsWorld) -> None:
    await synced_labs(world, 4)
    before = await world.records()
    if fault == "identity" or how.get("path") == "new session":
        world.machine().directory.close_sessions()  # the present session has proved itself
    how = {} if fault == "not-admin" else how
    world.fault(fault, **how)
    worker = await world.failing_sync(part)
    assert untouched(before, await world.records()), what
    synced_at = worker.status.labs_synced_at
    assert synced_at is not None, "the last good sync is still told"
    condition = worker.status.condition("LabsSynced")
    assert condition is not None
    assert condition.status == "True", "one bad answer flips no condition"
    world.simulator.faults.clear()
    await world.client.update(await world.get_worker(), lambda w: w.metadata.labels.update({"a": "b"}))
    if fault == "identity":
        return  # a foreign CML is not asked again for a minute
    worker = await world.sync()
    assert worker.status.labs_sync_error is None
    assert worker.status.labs_synced_at is not None
    assert worker.status.labs_synced_at > synced_at
    assert untouched(before, await world.records())


async def test_records_stay_when_the_list_does_not_come_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async with labs_world(monkeypatch, timeouts=Timeouts(attempt=0.5, read=1)) as world:
        await synced_labs(world, 4)
        before = await world.records()
        world.fault("delay", path="/labs", seconds=60)
        worker = await world.failing_sync("from CML")
        assert "in time" in str(worker.status.labs_sync_error) or "within" in str(worker.status.labs_sync_error)
        assert untouched(before, await world.records())


async def test_records_stay_when_the_worker_stops_in_the_middle_of_a_sync(world: LabsWorld) -> None:
    """Its machine is switched off between the two calls, and its phase follows."""
    await synced_labs(world, 4)
    before = await world.records()
    world.fault("delay", path="/populate_lab_tiles", seconds=0.3, times=1)
    world.machine().log.clear()
    await world.ask()
    await until(
        lambda: any(e["path"] == "/populate_lab_tiles" for e in world.machine().log), "the sync to be under way"
    )
    world.machine().power_off()

    async def told() -> bool:
        return bool((await world.get_worker()).status.labs_sync_error)

    await until(told, "the failure")
    await world.change_worker(lambda w: w.status.enter("Stopped", "Test", world.clock.now()))
    await world.settled()
    assert untouched(before, await world.records())
    assert {r.status.phase for r in (await world.records()).values()} == {"Present"}


async def test_the_condition_turns_when_the_labs_are_overdue_and_back_with_the_next_good_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with labs_world(monkeypatch, labs_refresh_interval=0.2) as world:

        async def condition(status: str) -> bool:
            found = (await world.get_worker()).status.condition("LabsSynced")
            return found is not None and found.status == status

        await world.worker()
        await until(lambda: condition("True"))
        fault = world.fault("status", path="/labs", status=500)
        await until(lambda: condition("False"), "the labs to be overdue")
        world.simulator.faults.clear(fault)
        await until(lambda: condition("True"))


async def test_a_session_that_is_not_an_admins_adds_and_removes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = Options(
        **{n: getattr(FAST, n) for n in FAST.__dataclass_fields__ if n != "accounts"},
        accounts=(Account("student", FAST.password),),
    )
    async with labs_world(monkeypatch, options=options) as world:
        machine = world.machine()
        student = machine.directory.named("student")
        assert student is not None
        own, other = machine.add_lab("own", owner=student.id), machine.add_lab("other")
        await world.worker()
        await world.sync()
        machine.add_lab("own too", owner=student.id)
        machine.remove(other)
        worker = await world.get_worker()
        await world.client.update(worker, lambda w: setattr(w.spec.cml, "username", "student"))
        await world.failing_sync("administrator rights are required")
        records = await world.records()
        assert set(records) == {own.id, other.id}
        assert records[other.id].status.missing_since is None


async def test_a_token_that_expires_between_the_two_calls_changes_nothing(world: LabsWorld) -> None:
    labs = await synced_labs(world, 3)
    before = await world.records()
    world.fault("delay", path="/populate_lab_tiles", seconds=0.3, times=1)
    await world.ask()
    await until(lambda: any(e["path"] == "/populate_lab_tiles" and e["status"] == 0 for e in world.machine().log))
    world.machine().directory.close_sessions()
    await world.sync()
    assert untouched(before, await world.records())
    assert len(labs) == len(await world.records())


async def test_a_lab_deleted_between_the_tiles_and_its_detail_gets_no_record(world: LabsWorld) -> None:
    await world.worker()
    world.fault("empty", path="/populate_lab_tiles")  # so that each lab is asked for alone
    gone, stays = world.machine().add_lab("gone"), world.machine().add_lab("stays")
    world.fault("status", path=f"/labs/{gone.id}", status=404, description=f"Lab not found: {gone.id}")
    await world.sync()
    assert set(await world.records()) == {stays.id}


async def test_a_mirrored_lab_deleted_between_the_list_and_its_detail_loses_its_record(world: LabsWorld) -> None:
    """The list still had it: CML's own 404 a moment later is the newer word, and nothing of it is told as present."""
    gone, stays = await synced_labs(world, 2)
    world.fault("empty", path="/populate_lab_tiles")
    world.fault("status", path=f"/labs/{gone.id}", status=404, description=f"Lab not found: {gone.id}")
    await world.sync()
    assert set(await world.records()) == {stays.id}


async def test_without_tiles_the_labs_are_asked_for_one_by_one(world: LabsWorld) -> None:
    world.fault("status", path="/populate_lab_tiles", status=404, description="Not here")
    await synced_labs(world, 20)
    assert world.machine().counts["GET /labs/{lab_id}"] == 20


async def test_a_lab_that_is_gone_is_removed_at_once_when_cml_also_answers_404(world: LabsWorld) -> None:
    labs = await synced_labs(world, 5)
    world.machine().remove(labs[0])
    await world.sync()
    assert set(await world.records()) == {lab.id for lab in labs[1:]}


async def test_a_lab_that_only_the_list_lacks_gets_a_tombstone_and_goes_with_the_second_list(world: LabsWorld) -> None:
    """More labs are gone than are asked for one by one, so the lists decide for the rest."""
    labs = await synced_labs(world, 90)
    seen = (await world.get_worker()).status.labs_synced_at
    for lab in labs[:40]:
        world.machine().remove(lab)
    worker = await world.sync()
    records = await world.records()
    missing = [r for r in records.values() if r.status.missing_since is not None]
    assert (len(records), len(missing)) == (58, 8), "32 were asked for and answered with 404"
    for record in missing:
        assert (record.status.phase, record.status.missing_lists) == ("Missing", 1)
        assert record.status.last_synced_at == seen, "when it was last seen"
        ready = record.status.condition("Ready")
        assert ready is not None
        assert (ready.status, ready.reason) == ("False", "Missing")
    assert worker.status.labs_count == 50
    await world.later_sync()
    assert set(await world.records()) == {lab.id for lab in labs[40:]}


async def test_a_list_that_lacks_most_labs_removes_them_at_the_fourth_time(world: LabsWorld) -> None:
    labs = await synced_labs(world, 12)
    for lab in labs[:7]:
        world.machine().remove(lab)
    for lists in (1, 2, 3):
        worker = await world.later_sync()
        assert worker.status.labs_last_sync is not None
        assert worker.status.labs_last_sync.missing == 7
        synced = worker.status.condition("LabsSynced")
        assert synced is not None
        assert synced.message.endswith("prove it: 7")
        records = await world.records()
        assert len(records) == 12
        assert {r.status.missing_lists for i, r in records.items() if i in {lab.id for lab in labs[:7]}} == {lists}
    await world.later_sync()
    assert set(await world.records()) == {lab.id for lab in labs[7:]}


async def test_a_lab_that_returns_loses_its_tombstone(world: LabsWorld) -> None:
    labs = await synced_labs(world, 12)
    machine = world.machine()
    for lab in labs[:7]:
        machine.remove(lab)
    await world.sync()
    assert (await world.record(labs[0].id)).status.missing_lists == 1
    machine.insert(labs[0])
    await world.sync()
    status = (await world.record(labs[0].id)).status
    assert (status.phase, status.missing_since, status.missing_lists, status.last_synced_at) == (
        "Present",
        None,
        0,
        None,
    )
    assert [(c.source, c.to) for c in status.phase_history] == [("Present", "Missing"), ("Missing", "Present")]


async def test_a_failed_list_between_two_does_not_count(world: LabsWorld) -> None:
    labs = await synced_labs(world, 12)
    for lab in labs[:7]:
        world.machine().remove(lab)
    await world.sync()
    fault = world.fault("html", path="/labs", status=200)
    await world.failing_sync("HTML")
    assert {(await world.record(lab.id)).status.missing_lists for lab in labs[:7]} == {1}
    world.simulator.faults.clear(fault)
    await world.later_sync()
    assert {(await world.record(lab.id)).status.missing_lists for lab in labs[:7]} == {2}


async def test_where_most_labs_are_missing_lists_of_one_minute_count_as_one(world: LabsWorld) -> None:
    """A CML whose core starts again lists nothing for a while, denies all its labs, and pushes."""
    labs = await synced_labs(world, 12)
    for lab in labs[:7]:
        world.machine().remove(lab)
    began = world.clock.monotonic()
    for _ in range(6):
        await world.sync()
        world.clock.passed += 2
    took = world.clock.monotonic() - began
    counted = [r.status.missing_lists for r in (await world.records()).values() if r.status.missing_since is not None]
    assert max(counted, default=4) <= 1 + took // 54


async def test_a_list_that_has_a_lab_without_its_data_ends_the_row_of_those_that_lack_it(world: LabsWorld) -> None:
    labs = await synced_labs(world, 12)
    seen = (await world.get_worker()).status.labs_synced_at
    machine = world.machine()
    for lab in labs[:7]:
        machine.remove(lab)
    await world.sync()
    machine.insert(labs[0])
    world.fault("status", path="/populate_lab_tiles", status=500)
    world.fault("status", path=f"/labs/{labs[0].id}", status=500)
    await world.failing_sync(labs[0].id)
    status = (await world.record(labs[0].id)).status
    assert (status.phase, status.missing_since, status.missing_lists) == ("Present", None, 0)
    assert status.last_synced_at == seen, "what is known of it is as old as before"
    world.simulator.faults.clear()
    await world.sync()
    assert (await world.record(labs[0].id)).status.last_synced_at is None


@pytest.mark.parametrize("step", [timedelta(hours=1), timedelta(hours=-1)], ids=["ahead", "back"])
async def test_after_a_step_of_wall_time_nothing_is_removed_or_counted_for_a_while(
    step: timedelta, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SettableClock()
    async with labs_world(monkeypatch, clock=clock) as world:
        labs = await synced_labs(world, 5)
        world.machine().remove(labs[0])  # CML also answers 404, which would be proof enough
        clock.ahead = step
        for _ in range(3):
            await world.sync()
            clock.passed += 2
        record = await world.record(labs[0].id)
        assert (record.status.phase, record.status.missing_lists) == ("Missing", 0)
        clock.passed += 61
        await world.sync()
        assert set(await world.records()) == {lab.id for lab in labs[1:]}


async def test_a_lab_whose_record_is_deleted_while_the_list_is_under_way_is_not_made_anew(world: LabsWorld) -> None:
    """The list was begun while the lab was there; its end must not bring the record back."""
    labs = await synced_labs(world, 3)
    world.fault("status", path="/populate_lab_tiles", status=404, description="Not here")
    world.fault("delay", path=f"/labs/{labs[1].id}", method="GET", seconds=4, times=1)
    value = await world.ask()
    await until(lambda: any(e["path"] == f"/labs/{labs[1].id}" for e in world.machine().log), "the list is under way")
    record = await world.record(labs[0].id)
    await world.client.delete(record)
    await world.gone(record)
    assert (await world.get_worker()).status.labs_asked != value, "the sync was still under way"

    async def honoured() -> bool:
        return (await world.get_worker()).status.labs_asked == value

    await until(honoured)
    assert set(await world.records()) == {lab.id for lab in labs[1:]}
