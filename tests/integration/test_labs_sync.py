"""The sync against simulated CMLs: what comes into the records, what it costs, and what never removes one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from controllers.labs.kind import LAB_FINALIZER, LAB_RECORD, LabRecord, Operation
from controllers.workers.kind import LabWorker
from equipment.labs_world import LabsWorld, labs_world
from equipment.waiting import until
from lrm.cache import CacheUpdate


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LabsWorld]:
    async with labs_world(monkeypatch) as world:
        yield world


async def test_every_lab_becomes_a_record_with_all_that_cml_tells(world: LabsWorld) -> None:
    await world.worker()
    lab = world.machine().add_lab("OSPF", nodes=3, running=True, description="areas", notes="day 1")
    worker = await world.sync()
    record = await world.record(lab.id)
    assert record.name == f"w1-{lab.id}"
    assert record.metadata.finalizers == [LAB_FINALIZER]
    assert [(o.kind, o.name, o.uid) for o in record.metadata.owner_references] == [("LabWorker", "w1", worker.uid)]
    assert (record.spec.worker_ref, record.spec.lab_id, record.spec.desired_state) == ("w1", lab.id, None)
    status = record.status
    assert (status.title, status.description, status.notes, status.state) == ("OSPF", "areas", "day 1", "STARTED")
    assert (status.node_count, status.link_count, status.groups) == (3, 2, [])
    assert (status.owner, status.owner_username) == (world.machine().admin.id, "admin")
    assert status.cml_created_at is not None
    assert status.modified_at is not None
    assert status.first_seen_at is not None
    assert (status.phase, status.observed_generation, status.operation_history) == ("Present", 1, [])
    ready = status.condition("Ready")
    assert ready is not None
    assert ready.status == "True"
    assert (worker.status.labs_count, worker.status.labs_sync_error) == (1, None)


async def test_a_sync_is_two_calls_and_one_write_when_nothing_changed(world: LabsWorld) -> None:
    await world.worker()
    for n in range(5):
        world.machine().add_lab(f"Lab {n}", nodes=2)
    await world.sync()
    world.machine().counts.clear()
    async with world.counting() as writes:
        await world.sync()
    assert dict(world.machine().counts) == {"GET /populate_lab_tiles": 1, "GET /labs": 1}
    # Ours is one of the two: the other is the annotation that asked for it.
    assert dict(writes) == {"labworkers MODIFIED": 2}


async def test_a_change_of_state_title_or_size_is_history_and_all_else_is_refreshed_in_silence(
    world: LabsWorld,
) -> None:
    await world.worker()
    machine = world.machine()
    lab = machine.add_lab("Before", nodes=2)
    await world.sync()
    world.edit(lab, title="After")
    machine.force(lab, "STARTED")
    await world.sync()
    world.edit(lab, notes="changed")
    await world.sync()
    record = await world.record(lab.id)
    assert record.status.notes == "changed"
    (entry,) = record.status.operation_history
    assert (entry.previous_state, entry.new_state) == ("DEFINED_ON_CORE", "STARTED")
    changed = {name: (change.old, change.new) for name, change in entry.changed_fields.items()}
    assert changed == {"state": ("DEFINED_ON_CORE", "STARTED"), "title": ("Before", "After")}


async def test_a_worker_is_synced_at_start_and_when_it_comes_to_serve(world: LabsWorld) -> None:
    world.machine().add_lab("there")
    await world.worker(phase="ReadyUnlicensed")

    async def synced() -> bool:
        return (await world.get_worker()).status.labs_synced_at is not None

    await until(synced)
    assert len(await world.records()) == 1


async def test_a_sync_comes_at_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    async with labs_world(monkeypatch, labs_refresh_interval=0.1) as world:
        await world.worker()
        await until(lambda: len(world.known()) == 0 and world.machine().counts["GET /labs"] >= 1)
        lab = world.machine().add_lab("later")
        await until(lambda: [r.spec.lab_id for r in world.known()] == [lab.id])
        world.machine().remove(lab)
        await until(lambda: not world.known(), "the interval's lists to remove it")


async def test_a_turn_to_ready_that_lies_in_the_future_is_one_sync_when_its_time_comes(world: LabsWorld) -> None:
    """The wall clock was ahead when the condition turned, and was set back."""
    await world.worker()
    await world.sync()
    world.machine().counts.clear()
    turns = world.clock.now() + timedelta(seconds=1.5)
    await world.change_worker(
        lambda w: w.status.set_condition("Ready", status=True, reason="Serving", message="", now=turns)
    )

    async def synced() -> bool:
        at = (await world.get_worker()).status.labs_synced_at
        return at is not None and at >= turns

    await until(synced)
    assert world.machine().counts["GET /labs"] == 1


async def test_the_annotation_is_honoured_once(world: LabsWorld) -> None:
    await world.worker()
    await world.sync()
    world.machine().counts.clear()
    await world.client.update(await world.get_worker(), lambda w: w.metadata.labels.update({"touched": "yes"}))
    await world.settled()
    assert not world.machine().counts["GET /labs"]


async def test_a_stopped_worker_is_not_asked_and_keeps_its_records(world: LabsWorld) -> None:
    await world.worker()
    lab = world.machine().add_lab("kept")
    await world.sync()

    def stop(w: LabWorker) -> None:
        w.status.enter("Stopped", "Test", world.clock.now())

    await world.change_worker(stop)
    world.machine().counts.clear()
    await world.ask()
    await world.settled()
    assert not world.machine().counts, "it would have answered"
    assert (await world.get_worker()).status.labs_sync_error is None
    assert (await world.record(lab.id)).status.phase == "Present"


async def test_one_failing_worker_does_not_stop_the_others(world: LabsWorld) -> None:
    for name in ("w1", "w2", "w3"):
        await world.worker(name)
        world.machine(name).add_lab(f"on {name}")
    world.fault("status", "w2", path="/labs", status=500)
    await world.sync("w1")
    await world.failing_sync(name="w2")
    await world.sync("w3")
    assert [len(await world.records(n)) for n in ("w1", "w2", "w3")] == [1, 0, 1]


async def test_when_all_workers_are_asked_for_at_once_each_is_synced_once(world: LabsWorld) -> None:
    names = [f"w{n}" for n in range(1, 9)]
    for name in names:
        await world.worker(name)
        await world.sync(name)
        world.machine(name).counts.clear()
    asked = [await world.ask(name) for name in names]

    async def honoured() -> bool:
        return [(await world.get_worker(name)).status.labs_asked for name in names] == asked

    await until(honoured)
    await world.settled()
    assert [world.machine(name).counts["GET /labs"] for name in names] == [1] * len(names)


async def test_one_lab_that_cannot_be_written_does_not_stop_the_others(world: LabsWorld) -> None:
    """A record may have 1 MiB: notes beyond that are refused by the store."""
    await world.worker()
    machine = world.machine()
    labs = [machine.add_lab(f"Lab {n}") for n in range(3)]
    world.edit(labs[1], notes="x" * (1024 * 1024))
    worker = await world.failing_sync(labs[1].id)
    assert set(await world.records()) == {labs[0].id, labs[2].id}
    assert worker.status.labs_synced_at is None
    world.edit(labs[1], notes="short")
    worker = await world.sync()
    assert len(await world.records()) == 3
    assert worker.status.labs_sync_error is None


async def test_one_lab_that_cml_cannot_tell_of_does_not_stop_the_others(world: LabsWorld) -> None:
    """The tiles lack it, as they may, and CML stumbles over it when asked: it is there, and its record stays."""
    await world.worker()
    machine = world.machine()
    known = machine.add_lab("known")
    await world.sync()
    other = machine.add_lab("other")
    world.fault("status", path="/populate_lab_tiles", status=500)
    world.fault("status", path=f"/labs/{known.id}", status=500)
    worker = await world.failing_sync(known.id)
    assert worker.status.labs_sync_error is not None
    assert worker.status.labs_sync_error.startswith("1 lab could not be mirrored")
    records = await world.records()
    assert set(records) == {known.id, other.id}
    assert records[known.id].status.missing_since is None


async def test_a_record_that_cannot_be_read_is_told_and_holds_the_time_of_the_last_sync(world: LabsWorld) -> None:
    await world.worker()
    lab = world.machine().add_lab("known")
    synced = (await world.sync()).status.labs_synced_at
    key = world.registry.key_of(await world.record(lab.id))
    await world.storage.set(key, b'{"spec": 7}')
    await world.cache.barrier(30)
    world.machine().add_lab("other")
    worker = await world.failing_sync("cannot be read")
    assert worker.status.labs_synced_at == synced
    assert len(world.known()) == 1, "the other lab has its record"
    entry = await world.storage.get(key)
    assert entry.value == b'{"spec": 7}', "it is left alone"


async def test_a_client_that_is_given_up_during_a_sync_is_no_news(world: LabsWorld) -> None:
    worker = await world.worker()
    await world.sync()
    told: list[str] = []

    def note(update: CacheUpdate) -> None:
        for change in update.changes:
            after = change.new.resource if change.new else None
            if isinstance(after, LabWorker) and after.status.labs_sync_error:
                told.append(after.status.labs_sync_error)

    end = world.cache.subscribe(note)
    world.fault("delay", path="/labs", seconds=30, times=1)
    world.machine().log.clear()
    value = await world.ask()
    await until(lambda: any(e["path"] == "/labs" for e in world.machine().log), "the list to be under way")
    failures = world.labs.stats.failures
    world.sessions.retire(worker.uid)

    async def honoured() -> bool:
        return (await world.get_worker()).status.labs_asked == value

    await until(honoured)
    await world.cache.barrier(30)
    end()
    assert world.labs.stats.failures == failures + 1
    assert told == []


@pytest.mark.parametrize(
    "title",
    ["\U0001f9ea" * 64, "tab\tand\x00nul\x1b[31m\u202e", " ", "</td><script>", "ﬀ\u0301" * 20],
    ids=["64-emoji", "controls", "space", "markup", "combining"],
)
async def test_a_title_is_mirrored_as_it_is(world: LabsWorld, title: str) -> None:
    await world.worker()
    lab = world.machine().add_lab(title)
    await world.sync()
    assert (await world.record(lab.id)).status.title == title


async def test_last_synced_is_the_workers_time_until_the_lab_is_missing(world: LabsWorld) -> None:
    await world.worker()
    lab = world.machine().add_lab("here")
    worker = await world.sync()
    record = await world.record(lab.id)
    assert record.status.last_synced_at is None, "it costs no write"
    assert LAB_RECORD.present is not None

    def look_up(kind: str, namespace: str, name: str) -> LabWorker | None:
        return worker if (kind, namespace, name) == ("LabWorker", "default", "w1") else None

    worker = await world.sync()
    assert LAB_RECORD.present(record, look_up).status.last_synced_at == worker.status.labs_synced_at
    assert record.status.last_synced_at is None, "what is served is a copy"


async def test_a_record_can_be_found_by_worker_and_by_lab(world: LabsWorld) -> None:
    for name in ("w1", "w2"):
        await world.worker(name)
        world.machine(name).add_lab("a")
        world.machine(name).add_lab("b")
        await world.sync(name)
    assert len(world.cache.by_index(LabRecord, "worker", "default/w2")) == 2
    record = world.known("w2")[0]
    assert world.cache.by_index(LabRecord, "lab", f"default/w2/{record.spec.lab_id}") == [record]
    assert not world.cache.by_index(LabRecord, "lab", f"default/w1/{record.spec.lab_id}")


async def test_two_thousand_labs_come_in_with_one_write_each_and_cost_none_afterwards(world: LabsWorld) -> None:
    await world.worker()
    await world.sync()
    for n in range(2000):
        world.machine().add_lab(f"Lab {n}", nodes=1)
    world.machine().counts.clear()
    async with world.counting() as writes:
        await world.sync(timeout=60)
    assert dict(writes) == {"labrecords ADDED": 2000, "labworkers MODIFIED": 2}
    assert world.machine().counts.total() == 3, "the list twice as always, and the proof again, as labs came"
    world.machine().counts.clear()
    async with world.counting() as writes:
        await world.sync(timeout=60)
    assert dict(writes) == {"labworkers MODIFIED": 2}
    assert world.machine().counts.total() == 2


async def test_labs_that_are_started_one_by_one_keep_a_slow_cml_no_busier_than_pushes_do(world: LabsWorld) -> None:
    await world.worker()
    for n in range(200):
        world.machine().add_lab(f"Lab {n}", nodes=1)
    await world.sync()
    world.fault("delay", path="/populate_lab_tiles", seconds=0.5)
    await world.sync()
    world.machine().counts.clear()
    began = world.clock.monotonic()
    for record in world.known():
        if world.clock.monotonic() - began >= 2:
            break
        await world.client.update(record, lambda r: setattr(r.spec, "operation", Operation(id="a", verb="Start")))

        async def ended(name: str = record.name) -> bool:
            outcome = (await world.client.get(LabRecord, "default", name)).status.operation
            return outcome is not None and outcome.result == "Succeeded"

        await until(ended)
    took = world.clock.monotonic() - began
    assert world.machine().counts["GET /populate_lab_tiles"] <= 1 + took // 2.5


async def test_no_more_than_so_many_workers_are_synced_at_once(world: LabsWorld) -> None:
    names = [f"w{n}" for n in range(34)]
    for name in names:
        world.fault("delay", name, path="/labs", seconds=60)
        await world.worker(name)
    await until(lambda: (world.labs.queue.processing, len(world.labs.queue)) == (32, 2))


async def test_a_worker_on_which_nobody_works_is_listed_at_the_longer_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    async with labs_world(monkeypatch, labs_refresh_interval=1800, labs_idle_interval=7200) as world:
        await world.worker()
        world.machine().add_lab("at rest")
        await world.sync()
        world.clock.passed += 7300
        await world.sync()
        world.machine().counts.clear()
        for passed, lists in ((2000, 0), (6000, 1)):
            world.clock.passed += passed
            world.labs.queue.add(("default", "w1"))
            await world.settled()
            assert world.machine().counts["GET /labs"] == lists


async def test_as_many_operations_are_kept_as_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    async with labs_world(monkeypatch, labs_history_length=2) as world:
        await world.worker()
        lab = world.machine().add_lab("title 0")
        await world.sync()
        for n in range(1, 5):
            world.edit(lab, title=f"title {n}")
            await world.sync()
        kept = (await world.record(lab.id)).status.operation_history
        assert [entry.changed_fields["title"].new for entry in kept] == ["title 3", "title 4"]
