"""A worker that lrm only observes: its status is kept, and nothing of it is changed outside, whatever happens."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from controllers.labs.kind import LabRecord
from equipment.waiting import until
from equipment.workers_world import (
    REGION,
    TOKEN_ENV,
    WorkersWorld,
    claims,
    condition,
    someone_elses,
    tags_of,
    workers_world,
)
from lrm.errors import Invalid

CHANGING = {"StartInstances", "StopInstances", "TerminateInstances", "CreateTags", "DeleteTags"}


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch, moto_url: str) -> AsyncIterator[WorkersWorld]:
    async with workers_world(monkeypatch, moto_url) as made:
        yield made


async def test_an_observed_worker_is_followed_and_never_touched(world: WorkersWorld) -> None:
    instance_id = await someone_elses(world, owner="alice")
    license_token = {"licenseTokenFrom": {"env": TOKEN_ENV}}
    await world.adopt("w1", instance_id, observeOnly=True, deletionPolicy="Terminate", cml=license_token)
    worker = await world.phase("ReadyUnlicensed")
    assert condition(worker, "Ready") == ("True", "Unlicensed")
    assert await claims(world) == {instance_id: worker.uid}, "nobody else adopts it"

    world.shim.instances.stop(REGION, [instance_id])
    await world.phase("Stopped")
    await world.looked_again(3)
    assert world.instances("stopped"), "what others stop stays stopped, though it is wanted Ready"
    world.shim.instances.start(REGION, [instance_id])
    await world.phase("ReadyUnlicensed")

    await world.delete()
    await world.gone()
    assert world.live() == [instance_id], "released, in spite of the policy"
    assert tags_of(world, instance_id) == {"owner": "alice"}
    assert await claims(world) == {}
    assert not CHANGING & set(world.shim.calls)
    assert not world.machine(worker).licensing.licensed


async def test_a_worker_that_was_launched_can_be_left_alone_and_taken_up_again(world: WorkersWorld) -> None:
    worker = await world.serving()
    await world.change(lambda w: setattr(w.spec, "observe_only", True))
    world.shim.instances.stop(REGION, [worker.status.ec2.instance_id or ""])
    await world.phase("Stopped")
    await world.change(lambda w: setattr(w.spec, "observe_only", False))
    await world.phase("ReadyUnlicensed")
    assert world.shim.calls["StartInstances"] == 1


async def test_labs_of_an_observed_worker_are_mirrored_and_not_deleted(world: WorkersWorld) -> None:
    instance_id = await someone_elses(world)
    await world.adopt("w1", instance_id, observeOnly=True)
    worker = await world.phase("ReadyUnlicensed")
    lab = world.machine(worker).add_lab("exam")
    await world.annotate("lab.neuroglia.io/reconcile-now", "1")

    async def record() -> LabRecord | None:
        found = await world.client.list(LabRecord)
        return found[0] if found else None

    await world.client.delete(await until(record, "the lab's record"))

    async def told() -> bool:
        found = await record()
        assert found is not None
        return any(c.reason == "ObserveOnly" for c in found.status.conditions)

    await until(told, "the reason why it stays")
    assert lab.id in world.machine(worker).labs
    await world.change(lambda w: setattr(w.spec, "observe_only", False))
    await until(lambda: lab.id not in world.machine(worker).labs, "the lab's end, once lrm may")


async def test_what_makes_no_sense_for_an_observed_worker_is_refused(world: WorkersWorld) -> None:
    with pytest.raises(Invalid, match=r"spec\.aws\.instanceId"):
        await world.create(observeOnly=True)
    with pytest.raises(Invalid, match=r"spec\.desiredPhase"):
        await world.adopt("w1", "i-0123456789abcdef0", observeOnly=True, desiredPhase="Stopped")
