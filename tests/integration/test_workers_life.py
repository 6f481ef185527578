"""A LabWorker's life on simulated EC2 and CML, through the real runner: up, at work, stopped and started, drained."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import timedelta

import pytest

from controllers.workers.kind import DRAIN_ANNOTATION, LabWorker
from controllers.workers.status import Allocation
from equipment.waiting import until
from equipment.workers_world import TOKEN_ENV, WorkersWorld, condition, history, workers_world
from lrm.devservers import EtcdServer
from lrm.errors import Invalid
from lrm.resource import RECONCILE_ANNOTATION
from storage.etcd import EtcdStorage


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch, moto_url: str) -> AsyncIterator[WorkersWorld]:
    async with workers_world(monkeypatch, moto_url) as made:
        yield made


async def test_a_worker_goes_from_pending_to_ready_with_its_licence(world: WorkersWorld) -> None:
    await world.create(cml={"licenseTokenFrom": {"env": TOKEN_ENV}, "productLicense": "CML_Education"})
    worker = await world.phase("Ready")
    assert history(worker) == ["Pending", "ProvisioningEC2", "EC2Ready", "Starting", "Licensing", "Ready"]
    status = worker.status
    [instance] = world.instances()
    assert status.ec2.instance_id == instance.id
    assert (status.ec2.state, status.ec2.attempt, status.ec2.sent_at) == ("running", 1, None)
    assert status.ec2.public_ip == instance.public_ip
    assert instance.tags["lrm/uid"] == worker.uid
    assert instance.tags["lrm/name"] == "w1"
    assert status.cml.identity is not None
    assert status.cml.identity.product_uuid == world.machine(worker).product_uuid
    assert status.cml.version == "2.9.1+build.7"
    assert world.machine(worker).licensing.product == "CML_Education"
    assert status.capacity is not None
    assert (status.capacity.nodes, status.capacity.slots) == (200, 20)
    for kind in ("Ready", "EC2Provisioned", "CMLReady", "Licensed", "AcceptingLabs", "CapacityAvailable"):
        assert condition(worker, kind)[0] == "True", kind
    assert condition(worker, "HealthCheckPassed") == ("True", "Healthy")
    assert status.observed_generation == worker.metadata.generation == 1
    assert world.shim.calls["RunInstances"] == 1


async def test_a_worker_without_a_licence_serves_unlicensed(world: WorkersWorld) -> None:
    worker = await world.serving()
    assert worker.status.phase == "ReadyUnlicensed"
    assert condition(worker, "Ready") == ("True", "Unlicensed")
    assert condition(worker, "Licensed") == ("False", "NoLicenseWanted")
    assert worker.status.capacity is not None
    assert worker.status.capacity.nodes == 5


async def test_a_worker_at_rest_is_looked_at_and_not_written(world: WorkersWorld) -> None:
    await world.serving()
    await world.listed()
    asked, looks = world.shim.calls["DescribeInstances"], world.runners[0].stats.reconciles
    async with world.counting() as writes:
        await world.looked_again(5)
    assert not writes
    asked = world.shim.calls["DescribeInstances"] - asked
    assert 4 <= asked <= world.runners[0].stats.reconciles - looks + 1, "one question per look"


async def test_no_secret_is_in_any_object_or_log(
    world: WorkersWorld, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.serving(cml={"licenseTokenFrom": {"env": TOKEN_ENV}})
    await world.delete()
    await world.gone()
    secrets = ("admin-secret", "dG9rZW4tb2YtdGhlLXdvcmxk")
    page = await world.storage.list("/lrm/")
    stored = b"".join(e.value for e in page.entries).decode()
    async with world.storage.watch("/lrm/", 0) as watch:
        async for batch in watch:
            stored += "".join(e.entry.value.decode() for e in batch.events)
            if batch.revision >= page.revision:
                break
    printed = capsys.readouterr()
    for secret in secrets:
        assert secret not in stored
        assert secret not in printed.out + printed.err
    assert "registration" in stored, "the history that was searched holds the licensing"


async def test_stop_clears_addresses_and_gives_the_seat_back_and_start_brings_it_all_again(world: WorkersWorld) -> None:
    before = await world.serving(cml={"licenseTokenFrom": {"env": TOKEN_ENV}})
    await world.wish("Stopped")
    stopped = await world.phase("Stopped")
    assert history(stopped)[-4:] == ["Draining", "Unlicensing", "Stopping", "Stopped"]
    assert [world.state(i) for i in world.instances()] == ["stopped"]
    status = stopped.status
    assert (status.ec2.public_ip, status.ec2.private_ip, status.cml.api_url) == (None, None, None)
    assert status.ec2.instance_id == before.status.ec2.instance_id
    assert status.cml.identity == before.status.cml.identity, "the identity stays with the instance"
    assert not status.cml.licensed
    assert condition(stopped, "Ready")[0] == "False"
    assert condition(stopped, "EC2Provisioned") == ("True", "InstanceStopped")
    assert condition(stopped, "HealthCheckPassed")[0] == "Unknown"
    await world.quiet()
    async with world.counting() as writes:
        await world.looked_again(3)
    assert not writes

    await world.wish("Ready")
    again = await world.phase("Ready")
    assert history(again)[-4:] == ["Stopped", "Starting", "Licensing", "Ready"]
    assert again.status.ec2.instance_id == before.status.ec2.instance_id
    assert again.status.ec2.public_ip not in (None, before.status.ec2.public_ip)
    assert world.shim.calls["RunInstances"] == 1


async def test_terminated_as_a_wish_ends_the_instance_and_keeps_the_object(world: WorkersWorld) -> None:
    await world.serving()
    await world.wish("Terminated")
    worker = await world.phase("Terminated")
    assert world.live() == []
    assert worker.status.ec2.state == "terminated"
    assert worker.status.cml.identity is None
    await world.wish("Ready")
    seen = await world.until(lambda w: w.status.observed_generation == w.metadata.generation, "the wish seen")
    assert seen.status.phase == "Terminated", "that phase is final"
    await world.delete()
    await world.gone()


async def test_a_running_lab_makes_it_active_and_holds_a_drain_until_it_stops(world: WorkersWorld) -> None:
    worker = await world.serving()
    machine = world.machine(worker)
    lab = machine.add_lab("exam", nodes=1, running=True)
    await world.annotate(RECONCILE_ANNOTATION, "1")
    active = await world.phase("Active")
    assert condition(active, "Ready")[0] == "True"

    await world.wish("Stopped")
    draining = await world.phase("Draining")
    assert condition(draining, "AcceptingLabs")[0] == "False"
    await world.looked_again(3)
    assert (await world.status()).phase == "Draining"
    assert world.live(), "nothing is stopped under a running lab"

    machine.force(lab, "STOPPED")
    await world.annotate(RECONCILE_ANNOTATION, "2")
    stopped = await world.phase("Stopped")
    assert stopped.status.phase_history[-2].reason == "Drained"


async def test_terminated_as_a_wish_waits_for_labs_only_where_a_drain_is_asked_for(world: WorkersWorld) -> None:
    await world.serving()
    await _allocate(world)
    await world.phase("Active")
    await world.annotate(DRAIN_ANNOTATION, "true")
    await world.wish("Terminated")
    await world.phase("Draining")
    await world.looked_again(2)
    assert (await world.status()).phase == "Draining"
    await world.annotate(DRAIN_ANNOTATION, "false")
    await world.phase("Terminated")
    assert world.live() == []


async def test_a_drain_can_be_cancelled(world: WorkersWorld) -> None:
    await world.serving()
    await world.wish("Draining")
    await world.phase("Draining")
    await world.looked_again(2)
    assert (await world.status()).phase == "Draining", "drained, and there it stays"
    await world.wish("Ready")
    worker = await world.phase("ReadyUnlicensed")
    assert worker.status.phase_history[-1].reason == "DrainCancelled"
    assert condition(worker, "AcceptingLabs")[0] == "True"


async def test_a_drain_ends_by_its_timeout(world: WorkersWorld) -> None:
    await world.serving(drainTimeoutMinutes=0)
    await _allocate(world)
    await world.phase("Active")
    await world.wish("Stopped")
    stopped = await world.phase("Stopped")
    assert "DrainTimeout" in [s.reason for s in stopped.status.phase_history]


async def test_an_allocation_makes_it_active_and_the_last_place_taken_full(world: WorkersWorld) -> None:
    await world.serving(maxConcurrentLabs=1)
    await _allocate(world)
    worker = await world.phase("Active")
    assert condition(worker, "CapacityAvailable") == ("False", "Full")
    assert condition(worker, "AcceptingLabs") == ("False", "Full")
    assert condition(worker, "Ready")[0] == "True"

    def release(w: LabWorker) -> None:
        w.status.allocations = {}

    instances = world.client.bind(owner="instances", fence=None)
    await instances.update_status(await world.get(), release)
    assert condition(await world.phase("ReadyUnlicensed"), "AcceptingLabs")[0] == "True"


async def test_an_instance_stopped_behind_our_back_is_started_again(world: WorkersWorld) -> None:
    worker = await world.serving()
    world.shim.instances.stop("us-east-1", [worker.status.ec2.instance_id or ""])
    await world.until(lambda w: "Stopped" in history(w), "Stopped")
    again = await world.until(
        lambda w: history(w)[-1] == "ReadyUnlicensed" and "Stopped" in history(w), "serving again"
    )
    assert again.status.ec2.instance_id == worker.status.ec2.instance_id


async def test_an_instance_started_behind_our_back_is_stopped_again(world: WorkersWorld) -> None:
    worker = await world.serving()
    await world.wish("Stopped")
    await world.phase("Stopped")
    world.shim.instances.start("us-east-1", [worker.status.ec2.instance_id or ""])
    await world.until(lambda w: history(w)[-3:] == ["Starting", "Stopping", "Stopped"], "stopped again")
    assert [world.state(i) for i in world.instances()] == ["stopped"]


async def test_spec_aws_is_fixed_while_the_instance_exists_but_for_tags(world: WorkersWorld) -> None:
    await world.serving()
    with pytest.raises(Invalid, match=r"spec\.aws\.instanceType"):
        await world.change(lambda w: setattr(w.spec.aws, "instance_type", "m5.large"))
    with pytest.raises(Invalid, match=r"spec\.region"):
        await world.change(lambda w: setattr(w.spec, "region", "eu-west-1"))
    await world.change(lambda w: w.spec.aws.tags.update({"course": "ccna"}))


async def test_the_limit_of_instances_holds_launches_back_until_there_is_room(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    async with workers_world(monkeypatch, moto_url, max_instances=2) as world:
        for name in ("w1", "w2", "w3", "w4"):
            await world.create(name)
        held = []

        async def two_serve() -> bool:
            workers = [await world.get(n) for n in ("w1", "w2", "w3", "w4")]
            held[:] = [w for w in workers if condition(w, "EC2Provisioned")[1] == "MaxInstancesReached"]
            return sum(w.status.phase == "ReadyUnlicensed" for w in workers) == 2 and len(held) == 2

        await until(two_serve, "two workers serve and two are held")
        assert world.shim.calls["RunInstances"] == 2
        serving = next(w for w in await world.client.list(LabWorker) if w.status.phase == "ReadyUnlicensed")
        await world.delete(serving.name)
        await world.gone(serving.name)

        async def next_serves() -> bool:
            phases = [(await world.get(w.name)).status.phase for w in held]
            return "ReadyUnlicensed" in phases

        await until(next_serves, "one of the held serves")
        assert len(world.live()) == 2


async def test_observing_only_changes_nothing_outside(monkeypatch: pytest.MonkeyPatch, moto_url: str) -> None:
    async with workers_world(monkeypatch, moto_url, observe_only=True) as world:
        await world.create()
        worker = await world.until(
            lambda w: condition(w, "EC2Provisioned")[1] == "ObserveOnly", "the condition that says why"
        )
        assert worker.status.phase == "Pending"
        await world.looked_again(2)
        assert world.instances() == []
        assert not set(world.shim.calls) & {"RunInstances", "StartInstances", "StopInstances", "TerminateInstances"}


async def test_the_same_life_over_etcd(
    monkeypatch: pytest.MonkeyPatch, moto_url: str, etcd: EtcdServer, etcd_root: str
) -> None:
    storage = EtcdStorage([etcd.endpoint], root=etcd_root)
    async with aclosing(storage), workers_world(monkeypatch, moto_url, storage=storage, root=etcd_root) as world:
        await world.serving(cml={"licenseTokenFrom": {"env": TOKEN_ENV}})
        await world.wish("Stopped")
        await world.phase("Stopped")
        await world.wish("Ready")
        await world.phase("Ready")
        await world.delete()
        await world.gone()
        assert world.live() == []


async def _allocate(world: WorkersWorld) -> None:
    def allocate(w: LabWorker) -> None:
        w.status.allocations = {"some-uid": Allocation(cpu=1, slots=1, since=world.clock.now() - timedelta(seconds=1))}

    instances = world.client.bind(owner="instances", fence=None)
    await instances.update_status(await world.get(), allocate)
