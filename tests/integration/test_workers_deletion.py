"""How LabWorkers end, and how existing instances become theirs: both policies, every phase, claims."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import orjson
import pytest

from controllers.aws.simulator import ShimOptions
from controllers.workers.kind import DRAIN_ANNOTATION, LabWorker
from equipment.waiting import until
from equipment.workers_world import (
    FAST_CML,
    REGION,
    TOKEN_ENV,
    WorkersWorld,
    claims,
    condition,
    history,
    someone_elses,
    tags_of,
    unreadable,
    workers_world,
)
from lrm.resource import RECONCILE_ANNOTATION


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch, moto_url: str) -> AsyncIterator[WorkersWorld]:
    async with workers_world(monkeypatch, moto_url) as made:
        yield made


SOAK = ("EC2Ready", "Starting", "Draining", "Stopping", "Stopped")


@pytest.mark.parametrize(
    "when",
    ["Pending", "ProvisioningEC2", "Licensing", "Ready", *(pytest.param(p, marks=pytest.mark.soak) for p in SOAK)],
)
async def test_a_deletion_in_any_phase_leaves_no_instance_and_no_object(
    monkeypatch: pytest.MonkeyPatch, moto_url: str, when: str
) -> None:
    slow = replace(FAST_CML, boot_bad_gateway=0.3, registration=0.3)
    options = ShimOptions(moto_url=moto_url, delay=0.3)
    async with workers_world(monkeypatch, moto_url, cml_options=slow, shim_options=options) as world:
        await world.create(cml={"licenseTokenFrom": {"env": TOKEN_ENV}})
        if when in {"Draining", "Stopping", "Stopped"}:
            await world.phase("Ready")
            await world.wish("Draining" if when == "Draining" else "Stopped")
        await world.until(lambda w: when in history(w), when)
        await world.delete()
        await world.gone()
        assert world.live() == []
        assert len(world.instances()) <= 1


async def test_a_worker_that_never_launched_is_deleted_without_asking_ec2(world: WorkersWorld) -> None:
    await world.create(desiredPhase="Stopped")
    await world.until(lambda w: w.metadata.finalizers, "the finalizer")
    world.aws_fault("*", "auth", times=0)
    await world.delete()
    await world.gone()


async def test_a_failed_worker_with_an_instance_is_deleted_with_it(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    async with workers_world(monkeypatch, moto_url, worker_boot_deadline=0.3) as world:
        world.cml_fault("html", status=502)
        await world.create()
        await world.phase("Failed")
        assert len(world.live()) == 1
        await world.delete()
        await world.gone()
        assert world.live() == []


async def test_deletion_does_not_wait_for_labs_unless_the_annotation_says_so(world: WorkersWorld) -> None:
    for name, waits in (("w1", False), ("w2", True)):
        worker = await world.serving(name)
        machine = world.machine(worker)
        lab = machine.add_lab("exam", nodes=1, running=True)
        await world.annotate(RECONCILE_ANNOTATION, "1", name)
        await world.phase("Active", name=name)
        if waits:
            await world.annotate(DRAIN_ANNOTATION, "true", name)
        await world.delete(name)
        if waits:
            await world.phase("Draining", name=name)
            await world.looked_again(3)
            assert (await world.status(name)).phase == "Draining"
            assert len(world.live()) == 1
            machine.force(lab, "STOPPED")
        await world.gone(name)
    assert world.live() == []


async def test_retain_lets_the_object_go_and_the_instance_run_without_our_marks(world: WorkersWorld) -> None:
    worker = await world.serving(deletionPolicy="Retain", cml={"licenseTokenFrom": {"env": TOKEN_ENV}})
    await world.delete()
    await world.gone()
    assert world.live() == [worker.status.ec2.instance_id]
    assert tags_of(world, worker.status.ec2.instance_id or "") == {"Name": "w1"}
    assert world.machine(worker).licensing.licensed, "the licence belongs to the machine that stays"
    assert "TerminateInstances" not in world.shim.calls
    assert "StopInstances" not in world.shim.calls


async def test_a_running_instance_is_adopted_marked_and_let_go(world: WorkersWorld) -> None:
    instance_id = await someone_elses(world, owner="alice")
    await world.adopt("w1", instance_id)
    worker = await world.phase("ReadyUnlicensed")
    assert history(worker) == ["Pending", "Starting", "ReadyUnlicensed"]
    assert worker.status.ec2.adopted
    assert worker.status.ec2.attempt == 0
    assert world.shim.calls["RunInstances"] == 1, "the one that was there before"
    await until(lambda: tags_of(world, instance_id).get("lrm/uid") == worker.uid, "our marks")
    assert tags_of(world, instance_id)["owner"] == "alice"
    assert await claims(world) == {instance_id: worker.uid}
    await world.delete()
    await world.gone()
    assert world.live() == [instance_id], "what was adopted is kept unless told otherwise"
    assert tags_of(world, instance_id) == {"owner": "alice"}
    assert await claims(world) == {}


async def test_an_adopted_instance_is_ended_where_the_policy_says_so(world: WorkersWorld) -> None:
    instance_id = await someone_elses(world)
    await world.adopt("w1", instance_id, deletionPolicy="Terminate")
    await world.phase("ReadyUnlicensed")
    await world.delete()
    await world.gone()
    assert world.live() == []
    assert await claims(world) == {}


async def test_a_stopped_instance_is_adopted_as_it_is_and_started_if_wanted(world: WorkersWorld) -> None:
    instance_id = await someone_elses(world)
    world.shim.instances.stop(REGION, [instance_id])
    await until(lambda: world.instances("stopped"), "the instance stopped")
    await world.adopt("w1", instance_id, desiredPhase="Stopped")
    worker = await world.phase("Stopped")
    assert history(worker) == ["Pending", "Stopped"]
    await world.looked_again(2)
    assert world.instances("stopped")
    await world.wish("Ready")
    await world.phase("ReadyUnlicensed")


async def test_of_two_workers_that_claim_one_instance_one_wins_and_the_other_says_who(world: WorkersWorld) -> None:
    instance_id = await someone_elses(world)
    await world.adopt("w1", instance_id)
    await world.adopt("w2", instance_id)

    async def decided() -> bool:
        return {(await world.status(n)).phase for n in ("w1", "w2")} == {"ReadyUnlicensed", "Failed"}

    await until(decided, "a winner and a loser")
    workers = {n: await world.get(n) for n in ("w1", "w2")}
    winner, loser = sorted(workers, key=lambda n: workers[n].status.phase == "Failed")
    failure = workers[loser].status.failure
    assert failure is not None
    assert failure.reason in {"ClaimedByAnother", "AdoptionRefused"}
    assert f"default/{winner}" in failure.message
    assert await claims(world) == {instance_id: workers[winner].uid}
    assert workers[loser].status.ec2.instance_id is None

    await world.delete(loser)
    await world.gone(loser)
    assert await claims(world) == {instance_id: workers[winner].uid}, "the loser gives up nothing that is not its own"
    assert tags_of(world, instance_id)["lrm/uid"] == workers[winner].uid
    await world.delete(winner)
    await world.gone(winner)
    await world.adopt("w3", instance_id)
    await world.phase("ReadyUnlicensed", name="w3")


async def test_a_claim_whose_worker_is_no_more_is_taken_over(world: WorkersWorld) -> None:
    instance_id = await someone_elses(world)
    left = orjson.dumps({"uid": "of-a-worker-that-was-forced-away", "namespace": "default", "name": "ghost"})
    await world.storage.create(f"/lrm/claim/ec2/{instance_id}", left)
    await world.adopt("w1", instance_id)
    worker = await world.phase("ReadyUnlicensed")
    assert await claims(world) == {instance_id: worker.uid}


async def test_nothing_is_adopted_that_may_be_a_worker_s_that_cannot_be_read(world: WorkersWorld) -> None:
    owner = await world.serving("w1")
    async with unreadable(world, "w1"):
        await world.adopt("w2", owner.status.ec2.instance_id or "")

        def held(worker: LabWorker) -> bool:
            trouble = worker.status.ec2.last_error
            return trouble is not None and trouble.reason == "UndecodableWorker"

        held_up = await world.until(held, "the reason", name="w2")
        assert held_up.status.ec2.instance_id is None
        assert await claims(world) == {}
    failed = await world.phase("Failed", name="w2")
    assert failed.status.failure is not None
    assert "default/w1" in failed.status.failure.message


async def test_a_claim_of_a_worker_that_cannot_be_read_is_waited_for(world: WorkersWorld) -> None:
    """Its instance bears no mark, as it is only observed: the claim alone tells of it."""
    instance_id = await someone_elses(world)
    await world.adopt("w1", instance_id, observeOnly=True)
    await world.phase("ReadyUnlicensed", name="w1")
    before = await claims(world)
    async with unreadable(world, "w1"):
        await world.adopt("w2", instance_id)

        def held(worker: LabWorker) -> bool:
            trouble = worker.status.ec2.last_error
            return trouble is not None and trouble.reason == "UndecodableWorker" and "default/w1" in trouble.message

        await world.until(held, "the reason", name="w2")
        assert await claims(world) == before
    failed = await world.phase("Failed", name="w2")
    assert failed.status.failure is not None
    assert failed.status.failure.reason == "ClaimedByAnother"


async def test_what_belongs_to_another_worker_or_installation_is_not_adopted(world: WorkersWorld) -> None:
    owner = await world.serving("w1")
    await world.adopt("w2", owner.status.ec2.instance_id or "")
    failed = await world.phase("Failed", name="w2")
    assert failed.status.failure is not None
    assert failed.status.failure.reason == "AdoptionRefused"
    assert "default/w1" in failed.status.failure.message
    foreign = await someone_elses(world, **{"lrm/installation": "another", "lrm/uid": "x"})
    await world.adopt("w3", foreign)
    failed = await world.phase("Failed", name="w3")
    assert failed.status.failure is not None
    assert failed.status.failure.reason == "AdoptionRefused"
    for name in ("w2", "w3"):
        await world.delete(name)
        await world.gone(name)
    assert sorted(world.live()) == sorted([owner.status.ec2.instance_id or "", foreign])
    assert tags_of(world, foreign)["lrm/installation"] == "another"
    assert tags_of(world, owner.status.ec2.instance_id or "")["lrm/uid"] == owner.uid


async def test_an_instance_that_is_not_there_cannot_be_adopted(world: WorkersWorld) -> None:
    await world.adopt("w1", "i-0123456789abcdef0")
    failed = await world.phase("Failed")
    assert failed.status.failure is not None
    assert failed.status.failure.reason == "InstanceNotFound"
    instance_id = await someone_elses(world)
    await world.change(lambda w: setattr(w.spec.aws, "instance_id", instance_id))
    await world.phase("ReadyUnlicensed")


async def test_a_deletion_waits_for_a_launch_in_doubt_and_ends_what_comes_of_it(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    options = ShimOptions(moto_url=moto_url, delay=0.05, describe_lag=3600)
    async with workers_world(monkeypatch, moto_url, shim_options=options) as world:
        world.aws_fault("RunInstances", "lost-reply", times=0)
        await world.create()
        await until(world.instances, "an instance of which only EC2 knows")
        await world.delete()
        worker = await world.phase("TerminatingEC2")
        assert worker.status.ec2.instance_id is None
        world.show_instances()
        world.shorten(worker_trace_timeout=1)
        await world.gone()
        assert world.live() == []


async def test_a_worker_recreated_under_its_name_is_another_worker(world: WorkersWorld) -> None:
    first = await world.serving()
    await world.delete()
    await world.gone()
    second = await world.serving()
    assert second.uid != first.uid
    assert second.status.ec2.instance_id != first.status.ec2.instance_id
    assert world.live() == [second.status.ec2.instance_id]
    assert condition(second, "Ready")[0] == "True"
