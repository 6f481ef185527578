"""What EC2 can do to a LabWorker: refusals, silence, lost replies, vanished instances, surplus; never two survivors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from controllers.aws.ec2 import Ec2
from controllers.aws.simulator import DEMO_AMI, ShimOptions
from controllers.workers.decisions import launch_parameters, tags_of
from controllers.workers.kind import LabWorker
from equipment.aws import HERE, boto
from equipment.waiting import until
from equipment.workers_world import FAST_CML, INSTALLATION, REGION, WorkersWorld, condition, history, workers_world
from lrm.election import StaticElection
from lrm.resource import RETRY_ANNOTATION
from storage.clock import SystemClock


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch, moto_url: str) -> AsyncIterator[WorkersWorld]:
    async with workers_world(monkeypatch, moto_url) as made:
        yield made


async def test_a_bad_ami_fails_at_once_and_a_changed_spec_tries_anew(world: WorkersWorld) -> None:
    await world.create(aws={"amiId": "ami-00000000000000bad"})
    failed = await world.phase("Failed")
    assert failed.status.failure is not None
    assert failed.status.failure.reason == "LaunchRefused"
    assert "InvalidAMIID" in failed.status.failure.message
    assert condition(failed, "Ready") == ("False", "LaunchRefused")
    assert condition(failed, "EC2Provisioned") == ("False", "LaunchRefused")
    sent = world.shim.calls["RunInstances"]  # more than once, where EC2 took its time
    await world.looked_again(2)
    assert world.shim.calls["RunInstances"] == sent, "it is not tried again by itself"
    await world.change(lambda w: setattr(w.spec.aws, "ami_id", DEMO_AMI))
    worker = await world.phase("ReadyUnlicensed")
    assert worker.status.ec2.attempt == 2
    assert worker.status.failure is None
    assert len(world.live()) == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("throttle", "Throttled"),
        ("quota", "QuotaExceeded"),
        pytest.param("vcpu", "QuotaExceeded", marks=pytest.mark.soak),
        ("capacity", "InsufficientCapacity"),
        ("auth", "AWSAuthFailed"),
        ("server-error", "AWSError"),
    ],
)
async def test_a_passing_refusal_is_shown_and_outlived(world: WorkersWorld, fault: str, reason: str) -> None:
    struck = world.aws_fault("RunInstances", fault, times=2)
    await world.create()
    await world.until(lambda w: condition(w, "EC2Provisioned") == ("False", reason), f"the reason {reason}")
    worker = await world.phase("ReadyUnlicensed")
    assert struck.hits == 2
    assert len(world.instances()) == 1
    assert worker.status.ec2.attempt == 1, "a launch that was refused for certain is repeated as it was"


async def test_a_quota_that_stays_fails_by_the_deadline_with_its_own_reason(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    async with workers_world(monkeypatch, moto_url, worker_ec2_deadline=0.6) as world:
        world.aws_fault("RunInstances", "quota", times=0)
        await world.create()
        failed = await world.phase("Failed")
        assert failed.status.failure is not None
        assert failed.status.failure.reason == "QuotaExceeded"
        world.shim.faults.clear()
        await world.annotate(RETRY_ANNOTATION, "1")
        # Without an instance it begins at the beginning.
        await world.until(lambda w: "Pending" in history(w)[1:], "another try")


@pytest.mark.parametrize("fault", ["lost-reply", "dropped"])
async def test_a_lost_launch_is_settled_by_its_token_and_tag(world: WorkersWorld, fault: str) -> None:
    world.aws_fault("RunInstances", fault, times=2)
    await world.create()
    worker = await world.phase("ReadyUnlicensed")
    assert len(world.instances()) == 1
    assert worker.status.ec2.attempt == 1


async def test_a_late_answer_to_a_launch_makes_no_second_instance(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    async with workers_world(monkeypatch, moto_url, renew_deadline=2.0) as world:
        world.aws_fault("RunInstances", "slow-reply", times=1, seconds=3.0)
        world.aws_fault("DescribeInstances", "server-error", times=6)
        await world.create()
        await world.phase("ReadyUnlicensed")
        assert len(world.instances()) == 1


async def test_plain_ec2_without_client_tokens_keeps_one_and_reports_the_surplus(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    async with (
        workers_world(monkeypatch, moto_url, plain_moto=True) as world,
        Ec2(SystemClock(), endpoint_url=moto_url) as ec2,
        boto(moto_url) as call,
    ):
        created = await world.create(desiredPhase="Stopped")
        tags = [{"Key": k, "Value": v} for k, v in tags_of(created, INSTALLATION).items()]
        launch = {
            "ImageId": DEMO_AMI,
            "InstanceType": "m5zn.metal",
            "MinCount": 1,
            "MaxCount": 1,
            "ClientToken": created.uid,
            "TagSpecifications": [{"ResourceType": "instance", "Tags": tags}],
        }
        twins = [(await call("run_instances", **launch))["Instances"][0]["InstanceId"] for _ in range(2)]
        assert len(set(twins)) == 2, "moto ignores the token"
        await world.wish("Ready")
        worker = await world.phase("ReadyUnlicensed")
        kept = worker.status.ec2.instance_id
        assert kept in twins

        async def alone() -> bool:
            found = await ec2.find_by_tags(HERE, {"lrm/uid": created.uid}, states=("pending", "running"))
            return [i.id for i in found] == [kept]

        await until(alone, "one survivor")
        assert worker.status.ec2.surplus == [t for t in twins if t != kept]
        assert worker.status.condition("SurplusInstances") is not None
        await world.delete()
        await world.gone()
        assert not await ec2.find_by_tags(HERE, {"lrm/uid": created.uid})


async def test_surplus_that_shows_up_while_it_boots_is_ended_and_the_recorded_one_kept(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    slow = replace(FAST_CML, boot_bad_gateway=1.0)
    async with workers_world(monkeypatch, moto_url, cml_options=slow) as world:
        await world.create()
        worker = await world.phase("Starting")
        async with Ec2(SystemClock(), endpoint_url=world.shim.url) as ec2:
            late = await ec2.run_instance(
                HERE, replace(launch_parameters(worker, 1, INSTALLATION), client_token="late")
            )
        await until(lambda: late.id not in world.live(), "the end of the late one")
        worker = await world.until(
            lambda w: w.status.phase == "ReadyUnlicensed" and w.status.ec2.surplus, "it serving, the late one told of"
        )
        assert world.live() == [worker.status.ec2.instance_id]
        assert worker.status.ec2.surplus == [late.id]


async def test_a_launch_that_no_describe_shows_yet_is_not_repeated_under_another_token(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    options = ShimOptions(moto_url=moto_url, delay=0.05, describe_lag=0.5)
    async with workers_world(monkeypatch, moto_url, shim_options=options) as world:
        world.aws_fault("RunInstances", "lost-reply")
        await world.create()
        worker = await world.phase("ReadyUnlicensed")
        assert len(world.instances()) == 1
        assert worker.status.ec2.attempt == 1


async def test_describe_errors_are_never_the_end_of_an_instance(world: WorkersWorld) -> None:
    worker = await world.serving()
    for fault in ("server-error", "denied"):
        world.shim.faults.clear()
        world.aws_fault("DescribeInstances", fault, times=0)
        await world.looked_again(2)
        status = await world.status()
        assert status.phase == "ReadyUnlicensed"
        assert status.ec2.instance_id == worker.status.ec2.instance_id
        assert status.ec2.state == "running"
    world.shim.faults.clear()
    await world.until(lambda w: w.status.ec2.last_error is None, "the error forgotten")
    assert world.shim.calls["RunInstances"] == 1


async def test_an_instance_terminated_by_somebody_else_is_a_failure_and_retry_makes_another(
    world: WorkersWorld,
) -> None:
    worker = await world.serving()
    world.shim.instances.terminate(REGION, [worker.status.ec2.instance_id or ""])
    failed = await world.phase("Failed")
    assert failed.status.failure is not None
    assert failed.status.failure.reason == "InstanceTerminated"
    await world.looked_again(2)
    assert world.live() == [], "nobody pays for a replacement that nobody asked for"
    await world.annotate(RETRY_ANNOTATION, "again")
    again = await world.phase("ReadyUnlicensed")
    assert again.status.ec2.instance_id != worker.status.ec2.instance_id
    assert again.status.ec2.attempt == 2
    assert again.status.cml.identity != worker.status.cml.identity
    assert len(world.live()) == 1


async def test_an_instance_that_vanished_without_a_word_is_believed_gone_only_after_a_while(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    async with workers_world(monkeypatch, moto_url, worker_gone_after=3600) as world:
        worker = await world.serving()
        world.shim.instances.vanish(worker.status.ec2.instance_id or "")
        await world.looked_again(3)
        assert (await world.status()).phase == "ReadyUnlicensed", "EC2 forgets for moments; that proves nothing"
    async with workers_world(monkeypatch, moto_url) as world:
        worker = await world.serving()
        world.shim.instances.vanish(worker.status.ec2.instance_id or "")
        failed = await world.phase("Failed")
        assert failed.status.failure is not None
        assert failed.status.failure.reason == "InstanceTerminated"


async def test_an_instance_that_ec2_ends_while_it_launches_is_replaced_thrice_at_most(world: WorkersWorld) -> None:
    ended: set[str] = set()

    def end_it() -> bool:
        for instance in world.instances("pending", "running"):
            if instance.id not in ended:
                ended.add(instance.id)
                world.shim.instances.terminate(REGION, [instance.id])
        return len(ended) >= 3

    world.shim.instances.delay = 1.0  # time enough to end each before it runs
    await world.create()
    await until(end_it, "three launches that EC2 ended")
    failed = await world.phase("Failed")
    assert failed.status.failure is not None
    assert failed.status.failure.reason == "LaunchFailed"
    assert failed.status.ec2.attempt == 3
    assert world.live() == []


async def test_a_spent_token_leads_to_the_next_attempt(world: WorkersWorld) -> None:
    world.aws_fault("RunInstances", "error", code="IdempotentParameterMismatch", message="other parameters")
    await world.create()
    worker = await world.phase("ReadyUnlicensed")
    assert worker.status.ec2.attempt == 2
    assert len(world.instances()) == 1


async def test_a_worker_whose_instance_is_stuck_in_pending_fails_by_the_deadline_and_can_still_be_deleted(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    options = ShimOptions(moto_url=moto_url, delay=3600)
    async with workers_world(monkeypatch, moto_url, shim_options=options, worker_ec2_deadline=0.5) as world:
        await world.create()
        failed = await world.phase("Failed")
        assert failed.status.failure is not None
        assert failed.status.failure.reason == "EC2Timeout"
        assert failed.status.ec2.instance_id is not None
        world.shim.instances.delay = 0.05
        await world.delete()
        await world.gone()
        assert world.live() == []


async def test_a_terminate_that_fails_is_repeated_until_ec2_says_terminated(world: WorkersWorld) -> None:
    await world.serving()
    struck = [world.aws_fault("TerminateInstances", f, times=2) for f in ("server-error", "throttle", "dropped")]
    await world.delete()
    await world.until(lambda w: w.status.phase == "TerminatingEC2", "its end begun")
    await world.gone()
    assert [f.hits for f in struck] == [2, 2, 2]
    assert world.live() == []


async def test_a_worker_stays_while_ec2_cannot_say_whether_its_instance_has_ended(world: WorkersWorld) -> None:
    await world.serving()
    world.aws_fault("DescribeInstances", "auth", times=0)
    await world.delete()
    await world.phase("TerminatingEC2")
    await world.looked_again(3)
    worker = await world.get()
    assert worker.status.phase == "TerminatingEC2"
    assert worker.status.ec2.last_error is not None
    world.shim.faults.clear()
    await world.gone()
    assert world.live() == []


async def test_the_tags_of_a_worker_name_it_and_its_installation(world: WorkersWorld) -> None:
    worker: LabWorker = await world.serving(aws={"tags": {"course": "ccna", "Name": "exam-host"}})
    [instance] = world.instances()
    wanted = {**tags_of(worker, INSTALLATION), "course": "ccna", "Name": "exam-host"}
    assert instance.tags == wanted


async def test_a_launch_in_flight_when_leadership_is_lost_is_found_by_the_next_leader(world: WorkersWorld) -> None:
    slow = world.aws_fault("RunInstances", "slow-reply", seconds=0.5)
    await world.create()
    await until(lambda: slow.hits, "the launch sent")
    world.term.lost()
    election = StaticElection(world.storage, world.clock, root="/lrm", lock_name="workers", identity="next")
    async with asyncio.TaskGroup() as tasks:
        term = await election.acquire()
        running = tasks.create_task(world.runners[0].run(term))
        worker = await world.phase("ReadyUnlicensed")
        assert [i.id for i in world.instances()] == [worker.status.ec2.instance_id]
        assert worker.status.ec2.attempt == 1
        running.cancel()


async def test_a_deposed_leader_changes_nothing_in_the_store_and_launches_nothing(world: WorkersWorld) -> None:
    await world.storage.delete("/lrm/leader/workers", expected_revision=world.term.number)
    await world.create()
    async with world.clock.timeout(10):
        await world.term.wait_lost()
    assert world.instances() == []
    assert (await world.status()).phase == "Pending"
