"""Deleting a record deletes its lab, forgetting does not, and no record waits for a CML that is gone."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from structlog.testing import capture_logs

from controllers.cml.simulator.labs import Lab
from controllers.labs.kind import FORGET_ANNOTATION, LabRecord, record_name
from controllers.workers.kind import INSTANCE_FINALIZER, LabWorker
from controllers.workers.status import Identity
from equipment.fault_proxy import FaultProxy, How, When
from equipment.labs_world import LabsWorld, labs_world
from equipment.waiting import until
from lrm.devservers import EtcdServer
from lrm.errors import ResourceNotFound
from storage.etcd import EtcdStorage


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LabsWorld]:
    async with labs_world(monkeypatch) as world:
        yield world


async def mirrored(world: LabsWorld, *, running: bool = False, title: str = "doomed") -> tuple[Lab, LabRecord]:
    """A lab on a serving worker, and its record."""
    await world.worker()
    lab = world.machine().add_lab(title, nodes=2, running=running)
    await world.sync()
    return lab, await world.record(lab.id)


async def reason(world: LabsWorld, record: LabRecord, condition: str = "LabDeleted") -> str:
    try:
        found = (await world.client.get(LabRecord, "default", record.name)).status.condition(condition)
    except ResourceNotFound:
        return "gone"
    return found.reason if found else ""


async def wait_for_reason(world: LabsWorld, record: LabRecord, wanted: str, condition: str = "LabDeleted") -> None:
    async def there() -> bool:
        return await reason(world, record, condition) == wanted

    await until(there, f"{condition} to say {wanted}")


async def enter(world: LabsWorld, *phases: str) -> None:
    def step(w: LabWorker) -> None:
        for phase in phases:
            w.status.enter(phase, "Test", world.clock.now())

    await world.change_worker(step)


# The four scenarios of the seed


async def test_happy_path(world: LabsWorld) -> None:
    """User deletes a lab; it is gone from CML, its record at once; the next sync finds no orphan."""
    lab, record = await mirrored(world, running=True)
    await world.client.delete(record)
    await world.gone(record)
    assert lab.id not in world.machine().labs
    world.machine().counts.clear()
    await world.sync()
    assert not world.machine().counts["GET /labs/{lab_id}"], "no orphan was looked for"


async def test_edge_case_phase_1_db_delete_fails(
    monkeypatch: pytest.MonkeyPatch, etcd: EtcdServer, etcd_root: str
) -> None:
    """CML has deleted the lab, but the store cannot be reached for the record's end: it is made good when it can."""
    async with FaultProxy(etcd.endpoint) as proxy:
        storage = EtcdStorage([proxy.endpoint], root=etcd_root)
        async with labs_world(monkeypatch, storage=storage, root=etcd_root) as world:
            lab, record = await mirrored(world)
            world.fault("delay", method="DELETE", path=f"/labs/{lab.id}", seconds=0.3)
            await world.client.delete(record)
            await until(lambda: any(e["method"] == "DELETE" for e in world.machine().log))
            rule = proxy.inject(When.BEFORE, How.RESET, "/v3/kv/txn", times=0)
            await until(lambda: lab.id not in world.machine().labs, "the lab to go from CML")
            await rule.hit()
            assert (await world.record(lab.id)).deleting, "stale, but on its way"
            proxy.clear()
            await world.gone(record)
        await storage.aclose()


async def test_edge_case_direct_cml_deletion(world: LabsWorld) -> None:
    """An admin deletes the lab in CML's own interface: the next sync notices."""
    lab, record = await mirrored(world)
    world.machine().remove(lab)
    await world.sync()
    await world.gone(record)


async def test_edge_case_network_failure(world: LabsWorld) -> None:
    """CML carries the deletion out, and the answer is lost on the way."""
    lab, record = await mirrored(world)
    world.fault("drop-answer", method="DELETE", path=f"/labs/{lab.id}", times=1)
    await world.client.delete(record)
    await world.gone(record)
    assert lab.id not in world.machine().labs
    assert world.machine().counts["DELETE /labs/{lab_id}"] == 1, "404 is success: it is not deleted again"


async def test_deletions_are_logged_and_counted_by_how_they_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with capture_logs() as logs:
        async with labs_world(monkeypatch) as world:
            await _deleted_after_two_failures(world)
    about = ("lab", "worker", "step", "title")
    told = [[line["event"], *(line[k] for k in about if k in line)] for line in logs]
    lab_id = next(line["lab"] for line in logs if line["event"] == "lab.deleted")
    steps = [["lab.deleting", lab_id, "w1", step] for step in ("stop", "wipe", "delete")]
    assert [step for step in steps if step not in told] == []
    assert told.count(["lab.delete_failed", lab_id, "w1"]) == 2
    assert told.count(["lab.deleted", lab_id, "w1", "doomed"]) == 1
    gone = [line["name"] for line in logs if line["event"] == "reconcile.finalized"]
    assert gone == [f"w1-{lab_id}"], "and its record with it"


async def _deleted_after_two_failures(world: LabsWorld) -> None:
    lab, record = await mirrored(world, running=True)
    world.fault("status", method="DELETE", path=f"/labs/{lab.id}", status=409, times=2)
    await world.client.delete(record)
    await world.gone(record)
    shown = world.telemetry.exposition()[0].decode()
    assert 'lrm_labs_deletes_total{result="failure"} 2.0' in shown
    assert 'lrm_labs_deletes_total{result="success"} 1.0' in shown


# Deletion, step by step


async def test_a_running_lab_is_stopped_wiped_and_deleted_in_this_order(world: LabsWorld) -> None:
    lab, record = await mirrored(world, running=True)
    world.machine().log.clear()
    await world.client.delete(record)
    await world.gone(record)
    changes = [
        (e["method"], e["path"].rpartition("/")[2]) for e in world.machine().log if e["method"] in {"PUT", "DELETE"}
    ]
    in_order = list(dict.fromkeys(changes))
    assert in_order == [("PUT", "stop"), ("PUT", "wipe"), ("DELETE", lab.id)]


@pytest.mark.parametrize("status", [400, 403, 409])
async def test_a_refused_step_is_judged_by_the_labs_state_and_tried_again(world: LabsWorld, status: int) -> None:
    lab, record = await mirrored(world)
    world.fault("status", method="DELETE", path=f"/labs/{lab.id}", status=status, times=2)
    await world.client.delete(record)
    await world.gone(record)
    assert lab.id not in world.machine().labs


async def test_a_lab_that_is_started_while_it_is_being_deleted_is_stopped_again(world: LabsWorld) -> None:
    lab, record = await mirrored(world)
    world.fault("status", method="DELETE", path=f"/labs/{lab.id}", status=409, times=1)
    await world.client.delete(record)
    await until(lambda: world.machine().counts["DELETE /labs/{lab_id}"] == 1)
    world.machine().force(lab, "STARTED")
    await world.gone(record)
    assert world.machine().counts["PUT /labs/{lab_id}/stop"] >= 1


@pytest.mark.parametrize(
    ("fault", "how"),
    [
        ("status", {"status": 500}),
        ("html", {"status": 502}),
        ("html", {"status": 404}),
        ("truncate", {}),
        ("drop", {}),
    ],
    ids=["500", "booting", "a-proxys-404", "half-a-json", "no-connection"],
)
async def test_the_record_stays_while_cml_does_not_answer_and_goes_when_it_does(
    world: LabsWorld, fault: str, how: dict[str, int]
) -> None:
    lab, record = await mirrored(world)
    world.fault(fault, path=f"/labs/{lab.id}/state", **how)
    await world.client.delete(record)

    async def told() -> bool:
        return (await reason(world, record)).startswith("Cml")

    await until(told, "the failure to be told")
    assert lab.id in world.machine().labs
    world.simulator.faults.clear()
    await world.gone(record)
    assert lab.id not in world.machine().labs


async def test_a_404_under_a_session_not_proven_to_be_an_admins_is_not_success(world: LabsWorld) -> None:
    """An old login that does not tell whether the user is an admin: CML may hide the lab by the same answer."""
    lab, record = await mirrored(world)
    world.fault("status", path="/auth_extended", status=404, description="Not found")
    world.machine().directory.close_sessions()
    world.machine().remove(lab)
    await world.client.delete(record)
    await wait_for_reason(world, record, "CmlForbidden")
    assert (await world.client.get(LabRecord, "default", record.name)).deleting
    world.simulator.faults.clear()
    await world.gone(record)  # the next login tells


async def test_nothing_is_sent_to_another_cml(world: LabsWorld) -> None:
    lab, record = await mirrored(world)
    world.fault("identity", product_uuid="deadbeef-0000-4000-8000-000000000000")
    world.machine().directory.close_sessions()
    world.machine().log.clear()
    await world.client.delete(record)
    await wait_for_reason(world, record, "CmlIdentityMismatch")
    assert not [e for e in world.machine().log if e["method"] in {"PUT", "DELETE"}]
    assert lab.id in world.machine().labs


async def test_observing_only_nothing_is_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    async with labs_world(monkeypatch, observe_only=True) as world:
        lab, record = await mirrored(world)
        await world.client.delete(record)
        await wait_for_reason(world, record, "ObserveOnly")
        assert lab.id in world.machine().labs


# Forgetting


async def test_forgetting_leaves_the_lab(world: LabsWorld) -> None:
    lab, record = await mirrored(world, running=True)
    marked = await world.client.update(record, lambda r: r.metadata.annotations.update({FORGET_ANNOTATION: "true"}))
    assert marked is not None
    world.machine().log.clear()
    await world.client.delete(marked)
    await world.gone(record)
    assert world.machine().labs[lab.id].state == "STARTED"
    assert not [e for e in world.machine().log if e["method"] in {"PUT", "DELETE"}]


async def test_a_deletion_that_waits_can_be_turned_into_forgetting(world: LabsWorld) -> None:
    lab, record = await mirrored(world)
    world.fault("status", path=f"/labs/{lab.id}/state", status=500)
    deleting = await world.client.delete(record)
    assert deleting is not None
    await wait_for_reason(world, record, "CmlBadAnswer")
    await world.client.update(deleting, lambda r: r.metadata.annotations.update({FORGET_ANNOTATION: "yes"}))
    await world.gone(record)
    assert lab.id in world.machine().labs


async def test_a_forgotten_lab_that_still_exists_comes_back_with_the_next_sync(world: LabsWorld) -> None:
    lab, record = await mirrored(world)
    await world.client.forget(record)
    await world.sync()
    assert (await world.record(lab.id)).uid != record.uid


# Records whose CML is away, and those whose CML is gone


async def test_the_deletion_of_a_stopped_workers_lab_waits_for_the_worker(world: LabsWorld) -> None:
    lab, record = await mirrored(world)
    await enter(world, "Stopped")
    await world.client.delete(record)
    await wait_for_reason(world, record, "WorkerNotServing")
    assert lab.id in world.machine().labs
    await enter(world, "Starting", "ReadyUnlicensed")
    await world.gone(record)
    assert lab.id not in world.machine().labs


async def test_the_deletion_goes_on_at_once_when_the_instance_is_terminated(world: LabsWorld) -> None:
    _, record = await mirrored(world)
    await enter(world, "Stopped")
    await world.client.delete(record)
    await wait_for_reason(world, record, "WorkerNotServing")
    await enter(world, "TerminatingEC2", "Terminated")
    await world.gone(record)


async def test_a_lab_of_a_replaced_instance_is_gone(world: LabsWorld) -> None:
    _, record = await mirrored(world)

    def replaced(w: LabWorker) -> None:
        w.status.ec2.instance_id, w.status.cml.identity = None, None
        w.status.enter("Failed", "Test", world.clock.now())

    await world.change_worker(replaced)
    await world.client.delete(record)
    await world.gone(record)


async def test_a_lab_of_a_worker_that_was_made_anew_is_gone(world: LabsWorld) -> None:
    _, record = await mirrored(world)
    worker = await world.get_worker()
    await world.client.forget(worker)  # by hand, past every finalizer
    await world.settled()
    await world.worker()
    await world.client.delete(record)
    await world.gone(record)


async def test_a_lab_of_a_worker_that_is_gone_is_gone(world: LabsWorld) -> None:
    _, record = await mirrored(world)
    await world.client.forget(await world.get_worker())
    await world.client.delete(record)
    await world.gone(record)


async def test_a_worker_that_cannot_be_decoded_is_not_taken_for_gone(world: LabsWorld) -> None:
    lab, record = await mirrored(world)
    key = world.registry.key_of(await world.get_worker())
    await world.storage.set(key, b'{"spec": {"region": 7}}')
    await world.client.delete(record)
    await wait_for_reason(world, record, "WorkerUnreadable")
    assert lab.id in world.machine().labs


async def test_a_worker_whose_identity_is_not_settled_is_sent_nothing(world: LabsWorld) -> None:
    lab, record = await mirrored(world)
    await world.change_worker(lambda w: setattr(w.status.cml, "identity", None))
    await world.client.delete(record)
    await wait_for_reason(world, record, "CMLNotIdentified")
    assert lab.id in world.machine().labs
    known = Identity(product_uuid=world.machine().product_uuid)
    await world.change_worker(lambda w: setattr(w.status.cml, "identity", known))
    await world.gone(record)


# The worker's own end


async def test_deleting_a_worker_forgets_its_records_once_its_instance_is_settled(world: LabsWorld) -> None:
    await world.worker()
    labs = [world.machine().add_lab(f"Lab {n}") for n in range(5)]
    await world.sync()
    world.fault("status", path=f"/labs/{labs[0].id}/state", status=500)
    await world.client.delete(await world.record(labs[0].id))  # one is being deleted already, and stuck
    await world.client.delete(await world.get_worker())
    new = world.machine().add_lab("too late")
    await world.settled()
    assert set(await world.records()) == {lab.id for lab in labs}, "the instance is still there, and nothing is added"
    assert new.id not in await world.records()
    await world.client.remove_finalizer(await world.get_worker(), INSTANCE_FINALIZER)

    async def worker_gone() -> bool:
        try:
            await world.get_worker()
        except ResourceNotFound:
            return True
        return False

    await until(worker_gone)
    assert not await world.records()
    assert len(world.machine().labs) == 6, "forgetting deletes no lab"


async def test_a_worker_that_drains_before_it_goes_is_synced_with_every_lab_that_it_waits_for(
    world: LabsWorld,
) -> None:
    await world.worker()
    lab, other = world.machine().add_lab("runs", nodes=1, running=True), world.machine().add_lab("ends")
    await world.sync()
    await enter(world, "Draining")
    await world.client.delete(await world.get_worker())
    world.machine().add_lab("begun meanwhile")
    world.machine().force(lab, "STOPPED")
    world.machine().remove(other)
    await world.sync()
    records = await world.records()
    states = {r.status.title: r.status.state for r in records.values()}
    assert states == {"runs": "STOPPED", "begun meanwhile": "DEFINED_ON_CORE"}


async def test_a_worker_with_two_thousand_records_is_forgotten_with_one_write_each(world: LabsWorld) -> None:
    await world.worker()
    for n in range(2000):
        world.machine().add_lab(f"Lab {n}")
    await world.sync(timeout=60)
    await world.client.delete(await world.get_worker())
    async with world.counting() as writes:
        await world.client.remove_finalizer(await world.get_worker(), INSTANCE_FINALIZER)
        await until(lambda: world.cache.get(LabWorker, "default", "w1") is None, timeout=90)
    assert not await world.records()
    assert writes == {"labrecords DELETED": 2000, "labworkers MODIFIED": 1, "labworkers DELETED": 1}


async def test_no_record_is_made_for_a_worker_that_went_while_its_labs_were_listed(world: LabsWorld) -> None:
    """The guard: a record whose owner is gone would belong to nobody."""
    await world.worker()
    await world.sync()
    lab = world.machine().add_lab("late")
    world.fault("delay", path="/labs", seconds=0.4, times=1)
    await world.ask()
    await until(lambda: any(e["path"] == "/labs" and e["status"] == 0 for e in world.machine().log))
    await world.client.forget(await world.get_worker())
    await until(lambda: world.labs.stats.reconciles >= 2 and not world.labs.queue.processing)
    assert not await world.records()
    with pytest.raises(ResourceNotFound):
        await world.client.get(LabRecord, "default", record_name("w1", lab.id))
