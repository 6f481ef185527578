"""What happens to a LabWorker at the same moment: wishes that change while a launch, a licence or a drain is under way,
second instances that show up late, and a wall clock that is set. No instance is forgotten, none is made unasked.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta

import pytest

from controllers.aws.ec2 import Ec2, Ec2Instance
from controllers.aws.simulator import ShimOptions
from controllers.cml.client import CmlClient
from controllers.cml.models import Licensing
from controllers.workers.decisions import launch_parameters
from controllers.workers.kind import DRAIN_ANNOTATION, LabWorker
from controllers.workers.status import Allocation
from equipment.aws import HERE
from equipment.waiting import until
from equipment.workers_world import (
    BAD_TOKEN_ENV,
    INSTALLATION,
    REGION,
    TOKEN_ENV,
    WorkersWorld,
    condition,
    history,
    workers_world,
)
from lrm.resource import RETRY_ANNOTATION
from storage.clock import SystemClock


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch, moto_url: str) -> AsyncIterator[WorkersWorld]:
    async with workers_world(monkeypatch, moto_url) as made:
        yield made


async def twin(world: WorkersWorld, worker: LabWorker, token: str = "of-nobody") -> Ec2Instance:
    """A second instance that carries the worker's uid, as a launch makes whose token nobody remembers."""
    async with Ec2(SystemClock(), endpoint_url=world.shim.url) as ec2:
        parameters = replace(launch_parameters(worker, 1, INSTALLATION), client_token=token)
        return await ec2.run_instance(HERE, parameters)


async def allocate(world: WorkersWorld) -> None:
    def place(worker: LabWorker) -> None:
        worker.status.allocations = {"some-uid": Allocation(slots=1)}

    await world.client.bind(owner="instances", fence=None).update_status(await world.get(), place)
    await world.phase("Active")


async def test_retain_waits_for_a_launch_in_doubt_and_takes_its_marks_off(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    options = ShimOptions(moto_url=moto_url, delay=0.05, describe_lag=3600)
    async with workers_world(monkeypatch, moto_url, shim_options=options) as world:
        world.aws_fault("RunInstances", "lost-reply", times=0)
        await world.create(deletionPolicy="Retain")
        await until(world.instances, "an instance of which only EC2 knows")
        assert (await world.status()).ec2.instance_id is None
        await world.delete()
        await world.looked_again(2)
        world.show_instances()
        await world.gone()
        [instance] = world.instances()
        assert world.state(instance) == "running"
        assert not any(tag.startswith("lrm/") for tag in instance.tags)


async def test_a_twin_that_shows_up_while_it_serves_is_ended(world: WorkersWorld) -> None:
    worker = await world.serving()
    late = await twin(world, worker)
    await until(lambda: late.id not in world.live(), "the end of the twin")
    assert world.live() == [worker.status.ec2.instance_id]
    told = await world.until(lambda w: late.id in w.status.ec2.surplus, "the twin told of")
    assert told.status.phase == "ReadyUnlicensed"


@pytest.mark.parametrize("wish", ["Stopped", pytest.param("Draining", marks=pytest.mark.soak)])
async def test_a_twin_that_shows_up_on_the_way_down_is_ended(world: WorkersWorld, wish: str) -> None:
    worker = await world.serving()
    await world.wish(wish)
    await world.phase(wish)
    late = await twin(world, worker)
    await until(lambda: late.id not in world.live(), "the end of the twin")
    assert world.live() == [worker.status.ec2.instance_id]


async def test_when_the_recorded_instance_ended_and_a_twin_lives_a_person_decides(world: WorkersWorld) -> None:
    """As after a restored store: the status names an instance that has ended, another one carries the uid."""
    worker = await world.serving()
    blind = world.aws_fault("DescribeInstances", "server-error", times=0)
    other = await twin(world, worker)
    world.shim.instances.terminate(REGION, [worker.status.ec2.instance_id or ""])
    world.shim.faults.remove(blind.id)
    failed = await world.until(
        lambda w: w.status.phase == "Failed" and w.status.ec2.instance_id == other.id, "what lives named"
    )
    assert failed.status.failure is not None
    assert failed.status.failure.reason == "InstanceTerminated"
    assert failed.status.cml.identity is None, "the identity went with the one that ended"
    third = await twin(world, worker, "of-nobody-else")
    await until(lambda: third.id not in world.live(), "the end of one more")
    assert world.live() == [other.id]
    await world.annotate(RETRY_ANNOTATION, "1")
    again = await world.phase("ReadyUnlicensed")
    assert again.status.ec2.instance_id == other.id


async def test_a_licence_token_corrected_while_the_wrong_one_is_sent_is_tried(
    monkeypatch: pytest.MonkeyPatch, world: WorkersWorld
) -> None:
    asks, corrected = CmlClient.licensing, False

    async def asked_meanwhile(client: CmlClient) -> Licensing:
        """The real answer, and before it arrives a person corrects the token."""
        nonlocal corrected
        answer = await asks(client)
        if not corrected and (await world.status()).phase == "Licensing":
            corrected = True
            await world.change(lambda w: setattr(w.spec.cml.license_token_from, "env", TOKEN_ENV))
        return answer

    monkeypatch.setattr(CmlClient, "licensing", asked_meanwhile)
    await world.create(cml={"licenseTokenFrom": {"env": BAD_TOKEN_ENV}})
    worker = await world.phase("Ready")
    assert corrected
    assert condition(worker, "Licensed")[0] == "True"


@pytest.mark.parametrize("wish", ["Stopped", pytest.param("Draining", marks=pytest.mark.soak)])
async def test_a_lost_launch_is_not_repeated_once_nobody_wants_the_worker_ready(
    monkeypatch: pytest.MonkeyPatch, moto_url: str, wish: str
) -> None:
    # Nothing is looked at again before the wish changes.
    async with workers_world(monkeypatch, moto_url, worker_poll_interval=600, jump_hold=0.5) as world:
        world.aws_fault("RunInstances", "dropped")
        await world.create()
        await world.until(lambda w: w.status.ec2.sent_at is not None and w.status.ec2.last_error is not None, "lost")
        world.shorten(worker_poll_interval=0.05, worker_trace_timeout=1)
        await world.wish(wish)
        at_rest = await world.until(lambda w: w.status.ec2.sent_at is None, "the doubt over")
        assert at_rest.status.phase == "ProvisioningEC2"
        assert at_rest.status.ec2.launch is None
        world.shorten(worker_trace_timeout=60)
        await world.quiet()
        async with world.counting() as writes:
            await world.looked_again(3)
        assert not writes
        assert world.instances() == []
        assert world.shim.calls["RunInstances"] == 1
        world.clock.offset = timedelta(hours=1)
        await until(world.runners[0]._jumps.lately, "the step of the clock seen")
        await until(lambda: not world.runners[0]._jumps.lately(), "the clock believed")
        await world.wish("Ready")
        worker = await world.phase("ReadyUnlicensed")
        assert "Failed" not in history(worker), "the time at rest counts to no deadline"
        assert worker.status.ec2.attempt == 2


@pytest.mark.parametrize("end", ["terminate", "stop"])
async def test_a_deletion_that_drains_sees_that_the_instance_ended(world: WorkersWorld, end: str) -> None:
    worker = await world.serving()
    await allocate(world)
    await world.annotate(DRAIN_ANNOTATION, "true")
    await world.delete()
    await world.phase("Draining")
    await world.looked_again(2)
    assert (await world.status()).phase == "Draining"
    getattr(world.shim.instances, end)(REGION, [worker.status.ec2.instance_id or ""])
    await world.gone()
    assert world.live() == []


@pytest.fixture
async def set_clock_world(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> AsyncIterator[WorkersWorld]:
    """A world whose wall clock is set, and where such a step is remembered to the test's end, or so many seconds."""
    options = ShimOptions(moto_url=moto_url, delay=0.05, describe_lag=0.5)
    settings = {"worker_trace_timeout": 600, "worker_gone_after": 300, "worker_boot_deadline": 600}
    settings["jump_hold"] = getattr(request, "param", 600.0)
    async with workers_world(monkeypatch, moto_url, shim_options=options, **settings) as made:
        yield made


async def leap_and_back(world: WorkersWorld) -> LabWorker:
    """Set the wall clock a day ahead, have the worker looked at, and set it right again; the worker meanwhile."""
    world.clock.offset = timedelta(days=1)
    await world.until(lambda w: condition(w, "ClockSteady") == ("False", "ClockJumped"), "the step told")
    await world.looked_again(3)
    meanwhile = await world.get()
    world.clock.offset = timedelta()
    return meanwhile


async def test_a_step_of_the_wall_clock_does_not_end_the_doubt_about_a_launch(set_clock_world: WorkersWorld) -> None:
    world = set_clock_world
    world.shim.instances.describe_lag = 2.0
    world.aws_fault("RunInstances", "lost-reply", times=0)
    await world.create()
    await until(world.instances, "an instance of which only EC2 knows")
    await world.wish("Terminated")
    await world.phase("TerminatingEC2")
    meanwhile = await leap_and_back(world)
    assert meanwhile.status.phase == "TerminatingEC2"
    await until(lambda: not world.live(), "the end of the instance")
    assert (await world.status()).phase == "TerminatingEC2", "until the doubt is over by a clock that can be believed"


async def test_a_step_of_the_wall_clock_makes_no_second_attempt(set_clock_world: WorkersWorld) -> None:
    world = set_clock_world
    world.aws_fault("RunInstances", "dropped", times=0)
    await world.create()
    await world.until(lambda w: w.status.ec2.sent_at is not None, "the launch sent")
    meanwhile = await leap_and_back(world)
    assert meanwhile.status.phase == "ProvisioningEC2", "no deadline has passed"
    assert meanwhile.status.ec2.attempt == 1
    world.shim.faults.clear()
    worker = await world.phase("ReadyUnlicensed")
    assert worker.status.ec2.attempt == 1
    assert len(world.instances()) == 1


@pytest.mark.parametrize("set_clock_world", [8.0], indirect=True)
async def test_a_step_of_the_wall_clock_ends_no_drain_and_is_told_until_it_is_over(
    set_clock_world: WorkersWorld,
) -> None:
    world = set_clock_world
    worker = await world.serving()
    assert condition(worker, "ClockSteady") == ("", ""), "nobody is told of a clock that was never set"
    await allocate(world)
    await world.wish("Stopped")
    await world.phase("Draining")
    assert (await leap_and_back(world)).status.phase == "Draining"
    steady = await world.until(lambda w: condition(w, "ClockSteady")[0] == "True", "the clock believed again")
    assert steady.status.phase == "Draining"
    await world.looked_again(3)
    told = [c.wire() for c in steady.status.conditions if c.type != "LabsSynced"]
    assert [c.wire() for c in (await world.status()).conditions if c.type != "LabsSynced"] == told


async def test_a_step_of_the_wall_clock_makes_no_instance_gone(set_clock_world: WorkersWorld) -> None:
    world = set_clock_world
    worker = await world.serving()
    world.shim.instances.vanish(worker.status.ec2.instance_id or "")
    meanwhile = await leap_and_back(world)
    assert meanwhile.status.phase == "ReadyUnlicensed"
    assert meanwhile.status.ec2.instance_id == worker.status.ec2.instance_id


async def test_a_step_of_the_wall_clock_fails_no_boot(set_clock_world: WorkersWorld) -> None:
    world = set_clock_world
    fault = world.cml_fault("html", status=502)
    await world.create()
    await world.until(lambda w: w.status.timestamps.boot_started_at is not None, "the boot begun")
    assert (await leap_and_back(world)).status.phase == "Starting"
    world.cml.faults.clear(fault)
    await world.phase("ReadyUnlicensed")
