"""LabImports: one lab for each whatever is lost on the way, and topologies that are kept before a lab is deleted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any, cast

import pytest

from controllers.cml.client import Timeouts
from controllers.labs.imports_kind import IMPORT_ANNOTATION, LabImport, LabImportSpec, mark_of
from controllers.labs.kind import LabRecord
from controllers.workers.kind import LabWorker
from equipment.labs_world import LabsWorld, labs_world
from equipment.waiting import until
from lrm.errors import Invalid, ResourceNotFound
from lrm.resource import ObjectMeta

TOPOLOGY = """\
lab:
  title: inside
  version: 0.2.0
nodes: []
links: []
"""


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LabsWorld]:
    async with labs_world(monkeypatch, labs_import_settle=0.3) as world:
        yield world


async def order(world: LabsWorld, name: str = "one", *, protected: bool = False, **spec: Any) -> LabImport:
    values = {"worker_ref": "w1", "title": "OSPF 1", "topology": TOPOLOGY, **spec}
    metadata = ObjectMeta(name=name, annotations={"lab.neuroglia.io/protect": "true"} if protected else {})
    return await world.client.create(LabImport(metadata=metadata, spec=LabImportSpec(**values)))


async def now(world: LabsWorld, of: LabImport) -> LabImport:
    return await world.client.get(LabImport, of.namespace, of.name)


async def in_phase(world: LabsWorld, of: LabImport, phase: str) -> LabImport:
    async def there() -> LabImport | None:
        found = await now(world, of)
        return found if found.status.phase == phase else None

    return cast("LabImport", await until(there, f"import {of.name} to be {phase}"))


async def because(world: LabsWorld, of: LabImport, reason: str) -> LabImport:
    async def there() -> LabImport | None:
        found = await now(world, of)
        ready = found.status.condition("Ready")
        return found if ready is not None and ready.reason == reason else None

    return cast("LabImport", await until(there, f"import {of.name} to say {reason}"))


async def gone(world: LabsWorld, of: LabImport) -> None:
    async def absent() -> bool:
        try:
            await now(world, of)
        except ResourceNotFound:
            return True
        return False

    await until(absent, f"import {of.name} to go")


def titles(world: LabsWorld) -> list[str]:
    return sorted(lab.title for lab in world.machine().labs.values())


async def test_an_import_becomes_a_lab_under_its_title_which_is_mirrored(world: LabsWorld) -> None:
    await world.worker()
    made = await in_phase(world, await order(world), "Imported")
    assert titles(world) == ["OSPF 1"]
    assert made.status.lab_id in world.machine().labs
    assert [c.to for c in made.status.phase_history] == ["Importing", "Imported"]

    async def recorded() -> bool:
        record = (await world.records()).get(made.status.lab_id or "")
        return record is not None and record.status.title == "OSPF 1"

    await until(recorded, "the record, without anybody asking for a sync")


async def test_an_import_whose_answer_is_lost_is_found_and_not_made_again(world: LabsWorld) -> None:
    await world.worker()
    world.fault("drop-answer", method="POST", path="/import", times=1)
    made = await in_phase(world, await order(world), "Imported")
    assert titles(world) == ["OSPF 1"]
    assert made.status.attempts == 1


async def test_an_import_that_never_arrived_is_sent_again_once_it_cannot_come_any_more(world: LabsWorld) -> None:
    await world.worker()
    world.fault("drop", method="POST", path="/import", times=1)
    made = await in_phase(world, await order(world), "Imported")
    assert titles(world) == ["OSPF 1"]
    assert made.status.attempts == 2


@pytest.mark.parametrize("running", [False, True], ids=["", "and is in use"])
async def test_a_lab_of_an_earlier_try_that_comes_late_is_removed(world: LabsWorld, running: bool) -> None:
    """The first try's lab appears only after the second one's: one survives. CML deletes none that runs."""
    await world.worker()
    world.fault("drop", method="POST", path="/import", times=1)
    world.fault("status", method="PATCH", path="/labs/*", status=500)
    first = await order(world)

    async def second_noted() -> bool:
        status = (await now(world, first)).status
        return status.attempts == 2 and status.lab_id is not None

    await until(second_noted)
    surplus = world.machine().add_lab(mark_of(first), nodes=1, running=running)
    await until(lambda: world.machine().counts["DELETE /labs/{lab_id}"], "the surplus to be removed")
    world.simulator.faults.clear()
    made = await in_phase(world, first, "Imported")
    assert set(world.machine().labs) == {made.status.lab_id, *([surplus.id] if running else [])}
    assert titles(world).count("OSPF 1") == 1
    told = [reason for _, reason, _ in await world.told(first.name, "LabImport")]
    assert ("SurplusLeft" in told) is running


async def test_what_cml_refuses_is_told_and_begins_anew_when_the_spec_changes(world: LabsWorld) -> None:
    await world.worker()
    failed = await in_phase(world, await order(world, topology="lab: {version: '9'}\nnodes: 7\nlinks: []"), "Failed")
    ready = failed.status.condition("Ready")
    assert ready is not None
    assert ready.reason == "Refused"
    await world.client.update(failed, lambda i: setattr(i.spec, "topology", TOPOLOGY))
    await in_phase(world, failed, "Imported")
    assert titles(world) == ["OSPF 1"]


async def test_an_import_waits_for_its_worker_and_fails_with_it(world: LabsWorld) -> None:
    early = await order(world, "early")
    await because(world, early, "WorkerNotFound")
    await world.worker()
    await in_phase(world, early, "Imported")

    def stop(w: LabWorker) -> None:
        w.status.enter("Stopped", "Test", world.clock.now())

    await world.change_worker(stop)
    late = await order(world, "late")
    await because(world, late, "WorkerNotServing")
    await world.client.delete(await world.get_worker())
    assert (await in_phase(world, late, "Failed")).status.condition("Ready").reason == "WorkerGone"  # type: ignore[union-attr]


async def test_an_import_for_a_worker_that_nobody_knows_fails_and_goes_in_the_end(world: LabsWorld) -> None:
    lost, waits = await order(world, "lost", ttl_seconds=1), await order(world, "waits")
    await gone(world, lost)
    assert ("Warning", "WorkerNotFound") in [told[:2] for told in await world.told("lost", "LabImport")]
    await because(world, waits, "WorkerNotFound")


async def test_an_import_goes_when_its_time_is_over_and_a_protected_one_stays(world: LabsWorld) -> None:
    await world.worker()
    over = await order(world, "over", ttl_seconds=1)
    kept = await order(world, "kept", protected=True, ttl_seconds=1)
    imported = await in_phase(world, kept, "Imported")
    await gone(world, over)
    ended = imported.status.phase_history[-1].at + timedelta(seconds=1)
    await until(lambda: world.clock.now() > ended + timedelta(seconds=0.5), "the time of the protected one to be over")
    assert (await now(world, kept)).status.phase == "Imported"
    assert titles(world) == ["OSPF 1", "OSPF 1"], "the labs stay"


async def test_what_was_sent_is_fixed_and_what_is_too_large_is_refused(world: LabsWorld) -> None:
    await world.worker()
    made = await in_phase(world, await order(world), "Imported")
    with pytest.raises(Invalid, match=r"spec\.title"):
        await world.client.update(made, lambda i: setattr(i.spec, "title", "other"))
    with pytest.raises(ValueError, match="at most 524288 bytes"):
        await order(world, "large", topology="#" * (512 * 1024 + 1))


async def test_an_import_is_not_sent_again_on_a_list_that_proves_nothing(world: LabsWorld) -> None:
    """An old login that does not tell whether the user is an admin: CML may hide the lab."""
    await world.worker()
    world.fault("status", path="/auth_extended", status=404, description="Not found")
    world.fault("drop", method="POST", path="/import", times=1)
    first = await order(world)
    told = await because(world, first, "CmlBadAnswer")
    assert told.status.attempts == 1
    world.simulator.faults.clear()
    world.machine().directory.close_sessions()
    await in_phase(world, first, "Imported")
    assert titles(world) == ["OSPF 1"]


@pytest.mark.parametrize("title", ["lrm-{}", "lrm-import-{}"])
async def test_titles_by_which_lrm_finds_its_own_labs_are_not_taken(world: LabsWorld, title: str) -> None:
    with pytest.raises(Invalid, match=r"spec\.title"):
        await order(world, title=title.format("90f84e38-a71c-4d57-8d90-00fa8a197385"))


# Topologies that are kept


async def deleted_with(world: LabsWorld, title: str = "BGP") -> tuple[str, LabRecord]:
    await world.worker()
    lab = world.machine().add_lab(title, nodes=2, running=True)
    await world.sync()
    record = await world.record(lab.id)
    await world.client.delete(record)
    return lab.id, record


async def test_a_topology_is_kept_before_its_lab_is_deleted_and_one_annotation_imports_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with labs_world(monkeypatch, labs_topology_retention=3600) as world:
        lab_id, record = await deleted_with(world, "BGP \x07")
        await world.gone(record)
        assert not world.machine().labs
        (kept,) = await world.client.list(LabImport)
        assert (kept.spec.title, kept.spec.held, kept.spec.ttl_seconds) == ("BGP \N{REPLACEMENT CHARACTER}", True, 3600)
        assert kept.metadata.labels == {"lab.neuroglia.io/worker": "w1", "lab.neuroglia.io/lab": lab_id}
        held = await in_phase(world, kept, "Held")
        await world.client.update(held, lambda i: i.metadata.annotations.update({IMPORT_ANNOTATION: "true"}))
        again = await in_phase(world, kept, "Imported")
        (lab,) = world.machine().labs.values()
        assert (lab.id, lab.title, len(lab.nodes)) == (again.status.lab_id, kept.spec.title, 2)
        assert lab.id != lab_id


async def test_a_kept_topology_goes_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    async with labs_world(monkeypatch, labs_topology_retention=1) as world:
        _, record = await deleted_with(world)
        await world.gone(record)

        async def none_left() -> bool:
            return not await world.client.list(LabImport)

        await until(none_left)


async def test_the_time_of_a_kept_topology_begins_when_its_lab_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with labs_world(monkeypatch, labs_topology_retention=3600) as world:
        world.fault("status", method="DELETE", path="/labs/*", status=409)
        _, record = await deleted_with(world)
        (kept,) = await until(lambda: world.client.list(LabImport), "the copy")
        await in_phase(world, kept, "Held")
        await until(lambda: not world.imports.queue.processing)
        assert (await now(world, kept)).status.completed_at is None
        world.simulator.faults.clear()
        await world.gone(record)

        async def begun() -> bool:
            return (await now(world, kept)).status.completed_at is not None

        await until(begun)


@pytest.mark.parametrize(
    ("kind", "how"),
    [("status", {"status": 500}), ("drop", {}), ("delay", {"seconds": 9})],
    ids=["stumbles", "is cut off", "is late"],
)
async def test_a_lab_whose_topology_cml_cannot_give_is_deleted_in_the_end(
    monkeypatch: pytest.MonkeyPatch, kind: Any, how: dict[str, Any]
) -> None:
    async with labs_world(
        monkeypatch, labs_topology_retention=3600, labs_step_timeout=1, timeouts=Timeouts(change=2)
    ) as world:
        rule = world.fault(kind, path="*/download", **how)
        _, record = await deleted_with(world)
        await world.gone(record)
        assert rule.hits > 1, "it is asked for more than once"
        assert ("Warning", "TopologyNotKept") in [told[:2] for told in await world.told(record.name)]
        assert not await world.client.list(LabImport)


async def test_a_download_has_longer_than_other_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    async with labs_world(monkeypatch, labs_topology_retention=3600, timeouts=Timeouts(attempt=1, read=2)) as world:
        world.fault("delay", path="*/download", seconds=3)
        _, record = await deleted_with(world)
        await world.gone(record)
        assert [kept.spec.title for kept in await world.client.list(LabImport)] == ["BGP"]


async def test_a_topology_that_is_too_large_is_told_and_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with labs_world(monkeypatch, labs_topology_retention=3600) as world:
        await world.worker()
        lab = world.machine().add_lab("large", nodes=1)
        node = next(iter(lab.nodes.values()))
        node.configuration = "!" * (512 * 1024 + 1)
        await world.sync()
        record = await world.record(lab.id)
        world.fault("status", method="DELETE", path=f"/labs/{lab.id}", status=409)
        await world.client.delete(record)

        async def told() -> bool:
            found = (await world.client.get(LabRecord, "default", record.name)).status.condition("TopologyKept")
            return found is not None and (found.status, found.reason) == ("False", "TooLarge")

        await until(told)
        world.simulator.faults.clear()
        await world.gone(record)
        assert not await world.client.list(LabImport)
