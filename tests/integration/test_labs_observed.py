"""What people, dashboards and traces learn of the mirror: events, lines of the log, counters, spans."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from controllers.cml.simulator.labs import Lab
from controllers.instances.kind import INSTANCES, LabInstanceRequest, WorkerRef
from controllers.labs.controller import SyncFailed
from controllers.workers.kind import INSTANCE_FINALIZER
from equipment.labs_world import INSTALLATION, LabsWorld, labs_world
from equipment.waiting import until
from lrm.client import Client
from storage.errors import TooLarge
from storage.memory import MemoryStorage


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with capture_logs() as logs:
        yield logs


@pytest.fixture
async def world(lines: list[Any], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LabsWorld]:
    async with labs_world(monkeypatch) as world:
        yield world


async def mirrored(world: LabsWorld, *titles: str) -> list[Lab]:
    """A worker with labs of these titles, in records, as the last sync of those so far."""
    await world.worker()
    labs = [world.machine().add_lab(title, nodes=2) for title in titles]
    await world.sync()
    await world.settled()
    world.spans.clear()
    return labs


def said(lines: list[Any], event: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] == event]


def measured(world: LabsWorld, name: str) -> dict[tuple[str, ...], float]:
    """The samples of this name, by the values of their labels."""
    families = text_string_to_metric_families(world.telemetry.exposition()[0].decode())
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return {tuple(value for _, value in sorted(sample.labels.items())): sample.value for sample in samples}


async def the_span(world: LabsWorld) -> ReadableSpan:
    """The one span since the last look; it ends with its sync, a moment after the sync's last write."""
    return (await until(world.spans.get_finished_spans, "a span"))[0]


async def test_a_lab_that_is_found_changes_and_starts_is_told_on_its_record(world: LabsWorld) -> None:
    (lab,) = await mirrored(world, "OSPF")
    record = await world.record(lab.id)
    world.edit(lab, title="BGP\x1b[31m")
    world.machine().force(lab, "STARTED")
    await world.sync()
    assert await world.told(record.name) == [
        ("Normal", "Created", 'the lab "OSPF" is DEFINED_ON_CORE, 2 nodes'),
        ("Normal", "StateChanged", "the lab \"'BGP\\x1b[31m'\" went from DEFINED_ON_CORE to STARTED"),
        ("Normal", "Updated", "the lab \"'BGP\\x1b[31m'\" changed: title from OSPF to 'BGP\\x1b[31m'"),
    ]


async def test_a_lab_at_rest_is_told_of_no_more(world: LabsWorld) -> None:
    (lab,) = await mirrored(world, "OSPF")
    record = await world.record(lab.id)
    before = await world.told(record.name)
    await world.sync()
    world.edit(lab, notes="which no history remembers")
    await world.sync()
    assert await world.told(record.name) == before


async def test_a_lab_that_vanished_from_outside_is_told_on_its_worker(world: LabsWorld) -> None:
    labs = await mirrored(world, "stays", "goes")
    world.machine().remove(labs[1])
    await world.sync()
    ((kind, reason, message),) = await world.told("w1", "LabWorker")
    assert (kind, reason) == ("Warning", "LabVanished")
    assert message.startswith(f'the lab "goes" ({labs[1].id}) is gone from CML and was not deleted through lrm')


async def test_a_lab_that_was_deleted_through_lrm_did_not_vanish(world: LabsWorld) -> None:
    (lab,) = await mirrored(world, "goes")
    record = await world.record(lab.id)
    await world.client.delete(record)
    await world.gone(record)
    await world.sync()
    assert await world.told("w1", "LabWorker") == []


def _place(request: LabInstanceRequest, *, ref: WorkerRef | None) -> None:
    request.status.worker_ref = ref


async def test_labs_of_instances_that_are_over_are_not_missed(world: LabsWorld) -> None:
    """They were removed by lrm itself: their records go at once, nobody is warned, and no half rule begins."""
    await world.worker()
    gone: list[Lab] = []
    instances = Client(world.storage, world.registry, world.clock, owner=INSTANCES)
    for place in [None] * 12 + ["w1", "w2"]:
        request = await world.client.create(
            LabInstanceRequest.model_validate(
                {
                    "metadata": {"name": f"r{len(gone)}"},
                    "spec": {"studentEmail": "a@b.edu", "durationMinutes": 9, "labTemplate": {"topology": "{}"}},
                }
            )
        )
        ref = WorkerRef(kind="LabWorker", namespace="default", name=place) if place else None
        await instances.update_status(request, partial(_place, ref=ref))
        gone.append(world.machine().add_lab(request.outside_name))
    forgotten = str(uuid.UUID(int=7))
    mark = f"lrm installation={INSTALLATION} uid={forgotten} attempt=1"
    gone += [world.machine().add_lab(f"lrm-{forgotten}", notes=notes) for notes in (mark, "somebody's")]
    await world.sync()
    for lab in gone:
        world.machine().remove(lab)
    await world.sync()
    assert not await world.records()
    told = [message for _, reason, message in await world.told("w1", "LabWorker") if reason == "LabVanished"]
    assert sorted(lab.id for lab in gone if any(lab.id in message for message in told)) == sorted(
        [gone[12].id, gone[15].id]
    ), "one that is placed here, and one of somebody else"
    assert len(told) == 2
    assert measured(world, "lrm_labs_orphans_total") == {(): 2}


async def test_a_sync_that_its_deadline_ends_has_failed_and_one_that_a_lost_term_ends_has_not(
    world: LabsWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    await mirrored(world)
    fault = world.fault("delay", path="/labs", seconds=60)
    monkeypatch.setattr(world.labs.controller, "deadline", 0.2)
    await world.ask()
    await until(lambda: measured(world, "lrm_labs_sync_errors_total"))
    monkeypatch.setattr(world.labs.controller, "deadline", 300.0)
    world.simulator.faults.clear(fault)
    await world.sync()
    world.fault("delay", path="/labs", seconds=60)
    counted = measured(world, "lrm_labs_sync_errors_total")
    assert set(counted) == {("DeadlineExceeded",)}
    world.machine().log.clear()
    world.spans.clear()
    await world.ask()
    await until(lambda: any(entry["path"] == "/labs" for entry in world.machine().log), "the list to be under way")
    world.term.lost()
    await until(world.spans.get_finished_spans, "the end of the sync")
    await until(lambda: world.labs.queue.processing == 0)
    assert measured(world, "lrm_labs_sync_errors_total") == counted


async def test_a_lab_that_the_list_lacks_is_told_as_missing_once(world: LabsWorld) -> None:
    labs = await mirrored(world, *(f"Lab {n}" for n in range(12)))
    for lab in labs[:7]:
        world.machine().remove(lab)
    await world.sync()
    await world.later_sync()
    record = await world.record(labs[0].id)
    assert [reason for _, reason, _ in await world.told(record.name)] == ["Created", "Missing"]


async def test_a_sync_is_a_span_that_counts_what_came_of_it(world: LabsWorld) -> None:
    first, *_, last = await mirrored(world, "a", "b", "c")
    world.edit(first, title="other")
    world.machine().remove(last)
    world.machine().add_lab("new")
    world.machine().add_lab("newer")
    await world.sync()
    span = await the_span(world)
    assert span.name == "labs.sync"
    assert span.attributes is not None
    assert dict(span.attributes) == {
        "lrm.worker": "w1",
        "lrm.namespace": "default",
        "cloud.region": "us-east-1",
        "labs.synced": 4,
        "labs.created": 2,
        "labs.updated": 1,
        "labs.missing": 0,
        "labs.removed": 1,
    }
    assert span.status.status_code is StatusCode.UNSET


async def test_a_sync_that_fails_is_a_span_with_the_error(world: LabsWorld) -> None:
    await mirrored(world, "a")
    world.fault("html", path="/labs", status=200)
    await world.failing_sync("HTML")
    span = await the_span(world)
    assert span.status.status_code is StatusCode.ERROR
    (event,) = span.events
    assert event.attributes is not None
    assert str(event.attributes["exception.type"]).endswith(SyncFailed.__name__)


async def test_syncs_and_what_they_found_are_counted(world: LabsWorld) -> None:
    labs = await mirrored(world, "a", "b")
    world.machine().remove(labs[0])
    await world.sync()
    world.fault("html", path="/labs", status=200)
    await world.failing_sync("HTML")
    await until(lambda: measured(world, "lrm_labs_sync_errors_total"))
    assert measured(world, "lrm_labs_sync_errors_total").keys() == {("CmlBadAnswer",)}
    seconds = measured(world, "lrm_labs_sync_seconds_count")
    assert seconds["synced",] >= 2
    assert seconds["failed",] >= 1
    assert measured(world, "lrm_labs_changes_total") == {("created",): 2, ("removed",): 1}
    assert measured(world, "lrm_labs_orphans_total") == {(): 1}
    assert measured(world, "lrm_labs_records") == {("w1", "default"): 1}


async def test_the_log_tells_of_orphans_and_of_their_removal(world: LabsWorld, lines: list[Any]) -> None:
    labs = await mirrored(world, "stays", "goes")
    world.machine().remove(labs[1])
    lines.clear()
    await world.sync()
    (found,) = said(lines, "labs.orphans_found")
    assert (found["worker"], found["count"], found["labs"]) == ("w1", 1, [labs[1].id])
    (removed,) = said(lines, "labs.orphan_removed")
    assert removed["lab"] == labs[1].id
    (synced,) = said(lines, "labs.synced")
    assert [synced[name] for name in ("synced", "created", "updated", "removed")] == [1, 0, 0, 1]
    lines.clear()
    await world.sync()
    assert not said(lines, "labs.orphans_found")


async def test_the_log_tells_what_each_sync_did_and_of_a_worker_that_was_let_go(
    world: LabsWorld, lines: list[Any]
) -> None:
    new, _ = await mirrored(world, "clear \x1b[2J", "other")
    assert {line["worker"] for line in said(lines, "labs.sync_started")} == {"w1"}
    created = {line["lab"]: line["title"] for line in said(lines, "labs.record_created")}
    assert (len(created), created[new.id]) == (2, r"'clear \x1b[2J'"), "a terminal obeys what it is sent"
    (synced,) = [line for line in said(lines, "labs.synced") if line["created"]]
    assert [synced[name] for name in ("worker", "synced", "created", "updated", "removed")] == ["w1", 2, 2, 0, 0]
    world.machine().force(new, "STARTED")
    lines.clear()
    await world.sync()
    (changed,) = said(lines, "labs.state_changed")
    assert [changed[name] for name in ("lab", "before", "state")] == [new.id, "DEFINED_ON_CORE", "STARTED"]
    world.fault("html", path="/labs", status=200)
    lines.clear()
    await world.failing_sync("HTML")
    await until(lambda: said(lines, "reconcile.failed"), "the failure in the log")
    (failed, *_) = said(lines, "reconcile.failed")
    assert (failed["controller"], failed["name"], "HTML" in failed["error"]) == ("labs", "w1", True)
    await world.client.delete(await world.get_worker())
    await world.client.remove_finalizer(await world.get_worker(), INSTANCE_FINALIZER)
    await until(lambda: said(lines, "labs.records_forgotten"), "the farewell in the log")
    (forgotten,) = said(lines, "labs.records_forgotten")
    assert (forgotten["worker"], forgotten["records"]) == ("w1", 2)


class Stubborn(MemoryStorage):
    """A store that refuses to delete what it is told to keep."""

    kept = ""

    async def delete(self, key: str, **how: Any) -> Any:
        if self.kept and self.kept in key:
            raise TooLarge(f"{key} stays")
        return await super().delete(key, **how)


async def test_an_orphan_that_cannot_be_removed_is_logged_and_does_not_keep_the_others(
    monkeypatch: pytest.MonkeyPatch, lines: list[Any]
) -> None:
    storage = Stubborn()
    async with labs_world(monkeypatch, storage=storage) as world:
        labs = await mirrored(world, "stays", "stuck", "goes")
        storage.kept = labs[1].id
        for lab in labs[1:]:
            world.machine().remove(lab)
        await world.failing_sync(labs[1].id)
        (line, *_) = said(lines, "labs.orphan_removal_failed")
        assert line["lab"] == labs[1].id
        assert set(await world.records()) == {labs[0].id, labs[1].id}
        storage.kept = ""
        await world.sync()
        assert set(await world.records()) == {labs[0].id}
    await storage.aclose()
