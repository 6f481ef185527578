"""The look at EC2 that workers at rest share: what it costs, what it may say, and what it never decides."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable

import pytest

from controllers.aws.simulator.instances import ACCOUNT
from controllers.workers.turns import Crowded
from equipment.aws import EXAMS_NUMBER
from equipment.looks_scene import LooksScene, looks_scene
from equipment.waiting import until

ONE = {"DescribeInstances": 1}


@pytest.fixture
async def scene(aws_credentials: None) -> AsyncIterator[LooksScene]:
    async with looks_scene() as made:
        yield made


@pytest.mark.parametrize("count", [300, pytest.param(1200, marks=pytest.mark.soak)])
async def test_workers_at_rest_cost_as_many_calls_an_interval_as_there_are_pages(scene: LooksScene, count: int) -> None:
    names = [f"w{n}" for n in range(count)]
    for n, name in enumerate(names):
        await scene.rest(name, "stopped" if n % 10 == 0 else "running")
    for turn in range(3):
        async with scene.counting() as writes:
            for name in names:
                sighting = await scene.see(name)
                assert sighting is not None
                assert sighting.instance is not None
        assert not writes or turn == 0, "the first turn writes their conditions"
        assert scene.calls() == {"DescribeInstances": math.ceil(count / 1000)}
        await scene.interval()
    assert not scene.hinted


async def test_workers_that_come_at_the_same_moment_share_one_call_and_do_not_wait_for_it(scene: LooksScene) -> None:
    names = [f"w{n}" for n in range(20)]
    for name in names:
        await scene.rest(name)
    found = await asyncio.gather(*(scene.see(name) for name in names), return_exceptions=True)
    assert sum(isinstance(s, Crowded) for s in found) == 19
    assert len(scene.hinted) == 19, "they are told when the answer is there"
    for name in scene.hinted:
        sighting = await scene.see(name)
        assert sighting is not None
        assert sighting.instance is not None
    assert scene.calls() == ONE


def _gone(scene: LooksScene, instance_id: str) -> None:
    assert scene.shim.instances.vanish(instance_id)


def _ended(scene: LooksScene, instance_id: str) -> None:
    found = scene.shim.instances.find(instance_id)
    assert found is not None
    scene.shim.instances.terminate(found.region, [instance_id])


def _stopped(scene: LooksScene, instance_id: str) -> None:
    found = scene.shim.instances.find(instance_id)
    assert found is not None
    scene.shim.instances.stop(found.region, [instance_id])


def _moved(scene: LooksScene, instance_id: str) -> None:
    """Stopped and started: the state is the same, the address is not."""
    _stopped(scene, instance_id)
    found = scene.shim.instances.find(instance_id)
    assert found is not None
    scene.shim.instances.start(found.region, [instance_id])


@pytest.mark.parametrize(
    ("happens", "state"),
    [(_gone, "terminated"), (_ended, "terminated"), (_stopped, "stopped"), (_moved, "running")],
    ids=["vanished", "terminated", "stopped", "moved"],
)
async def test_a_change_of_an_instance_is_noticed_within_an_interval_and_by_an_own_look(
    scene: LooksScene, happens: Callable[[LooksScene, str], None], state: str
) -> None:
    worker = await scene.rest("victim")
    await scene.rest("other")
    await scene.see("other")
    happens(scene, worker.status.ec2.instance_id or "")
    await scene.interval()
    scene.calls()
    await scene.see("other")  # whoever is first after an interval looks for all
    assert scene.hinted == ["victim"]
    assert scene.calls() == ONE
    sighting = await scene.see("victim")
    assert sighting is not None
    assert sum(scene.calls().values()) >= 1, "the shared look decides nothing"
    assert sighting.gone == (state == "terminated")
    if state != "terminated":
        status = (await scene.get("victim")).status.ec2
        found = scene.shim.instances.find(status.instance_id or "")
        assert found is not None
        assert status.state == state
        assert status.public_ip == (found.public_ip if state == "running" else None)


async def test_whom_a_look_alarms_is_looked_at_at_once(scene: LooksScene) -> None:
    """One asks every full minute, the other 30 s later: what becomes of the second is seen at the first one's turn."""
    await scene.rest("first", "stopped")
    async with scene.running() as runner:

        async def reconciled(times: int) -> None:
            await until(
                lambda: runner.stats.reconciles >= times and not len(runner.queue) + runner.queue.processing,
                f"{times} reconciles",
            )

        await reconciled(1)
        await scene.interval(0.5)
        worker = await scene.rest("second", "stopped")
        for times in (2, 3, 4):
            await reconciled(times)
            await scene.interval(0.5 if times < 4 else 0.1)
        scene.calls()
        assert not scene.hinted
        scene.shim.instances.start(worker.spec.region, [worker.status.ec2.instance_id or ""])
        await scene.interval(0.5)
        await until(lambda: scene.shim.calls["StopInstances"], "the end of what somebody started")
        assert scene.hinted == ["second"]
        assert scene.clock.monotonic() < 150, "its own turn comes then"


async def test_a_second_carrier_is_ended_by_the_workers_own_look(scene: LooksScene) -> None:
    worker = await scene.rest("victim")
    await scene.rest("other")
    await scene.see("other")
    second = scene.launch(worker)
    await scene.interval()
    await scene.see("other")
    assert scene.hinted == ["victim"]
    assert "TerminateInstances" not in scene.calls()
    await scene.see("victim")
    assert scene.calls()["TerminateInstances"] == 1
    worker = await scene.get("victim")
    assert worker.status.ec2.surplus == [second]
    # What is reported is taken back by an own look, too.
    await scene.see("victim")
    surplus = (await scene.get("victim")).status.condition("SurplusInstances")
    assert surplus is not None
    assert surplus.status == "False"
    scene.calls()
    await scene.interval()
    await scene.see("victim")
    assert scene.calls() == ONE


async def test_whoever_is_not_at_rest_or_is_asked_for_looks_itself(scene: LooksScene) -> None:
    for name in ("resting", "leaving", "draining", "adopted"):
        await scene.rest(name, adopts=name == "adopted")
    await scene.see("resting")
    assert scene.calls() == ONE
    await scene.see("adopted")
    assert scene.calls() == {}, "what was adopted bears our tags and may be confirmed"

    await scene.wish("leaving", "Terminated")
    await scene.enter("draining", "Draining")
    for name in ("leaving", "draining"):
        await scene.see(name)
        assert scene.calls() == ONE, name
    await scene.see("resting", asked=True)
    assert scene.calls() == ONE, "a person wants to know now"

    worker = await scene.get("adopted")
    scene.shim.instances.untag(worker.spec.region, [worker.status.ec2.instance_id or ""], {"lrm/name": None})
    await scene.interval()
    await scene.see("adopted")
    assert scene.calls() == {"DescribeInstances": 2, "CreateTags": 1}, "a mark that is missing is put back"


async def test_what_is_only_observed_is_looked_at_together_too_though_it_bears_no_mark(scene: LooksScene) -> None:
    names = [f"w{n}" for n in range(5)]
    for name in names:
        await scene.rest(name, adopts=True, marked=False, observeOnly=True)
    await scene.rest("ours")
    await scene.see("ours")
    scene.calls()
    await scene.interval()
    for name in (*names, "ours"):
        await scene.see(name)
    assert scene.calls() == {"DescribeInstances": 2}, "one by the tag, one by their ids"
    _stopped(scene, (await scene.get("w3")).status.ec2.instance_id or "")
    await scene.interval()
    await scene.see("ours")
    assert scene.hinted == ["w3"]
    await scene.see("w3")
    assert (await scene.get("w3")).status.ec2.state == "stopped"
    assert "CreateTags" not in scene.calls()


async def test_nothing_is_believed_that_was_asked_before_the_last_change_or_in_another_term(scene: LooksScene) -> None:
    worker = await scene.rest("w")
    await scene.rest("other")
    await scene.see("w")
    assert scene.calls() == ONE
    await scene.provisioner.start(scene.work(worker), worker.status.ec2.instance_id or "")
    scene.calls()
    await scene.see("w")
    assert scene.calls() == ONE, "the answer is older than the change"
    await scene.see("other")
    assert scene.calls() == {}
    await scene.interval()
    await scene.see("w")
    assert scene.calls() == ONE
    await scene.see("w")
    assert scene.calls() == {}, "the next answer is younger"
    await scene.lead_again()
    await scene.see("w")
    assert scene.calls() == ONE


async def test_regions_are_looked_at_each_for_itself(scene: LooksScene) -> None:
    await scene.rest("here")
    await scene.rest("there", region="eu-west-1")
    scene.shim.faults.add({"action": "*", "fault": "denied", "times": 0, "region": "eu-west-1"})
    assert await scene.see("here") is not None
    assert await scene.see("there") is None
    await scene.interval()
    assert await scene.see("here") is not None
    assert (await scene.get("here")).status.ec2.last_error is None


async def test_a_shared_look_that_fails_is_made_up_for_by_own_looks_once_the_last_one_is_old(scene: LooksScene) -> None:
    await scene.rest("w")
    await scene.see("w")
    fault = {"action": "DescribeInstances", "fault": "error", "code": "InvalidNextToken", "message": "no"}
    await scene.interval()
    scene.shim.faults.add({**fault, "times": 1})
    scene.calls()
    sighting = await scene.see("w")
    assert sighting is not None
    assert sighting.instance is not None, "the answer of an interval ago will do"
    assert scene.calls() == ONE
    await scene.interval()
    scene.shim.faults.add({**fault, "times": 1})
    sighting = await scene.see("w")
    assert sighting is not None
    assert sighting.instance is not None
    assert scene.calls() == {"DescribeInstances": 2}, "the shared one failed, so it looked itself"
    assert (await scene.get("w")).status.ec2.last_error is None


async def test_a_mistake_in_the_shared_look_costs_calls_and_no_worker(
    scene: LooksScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scene.rest("w")
    with monkeypatch.context() as patched:
        patched.setattr("controllers.workers.looks.Answer.of", None)
        sighting = await scene.see("w")
    assert sighting is not None
    assert sighting.instance is not None
    assert scene.calls() == {"DescribeInstances": 2}
    await scene.interval(0.25)
    await scene.see("w")
    assert scene.calls() == ONE, "it is made again, and is believed"


@pytest.mark.parametrize(
    ("fault", "reason", "attempts", "turns"), [("denied", "AWSAuthFailed", 1, 3), ("dropped", "AWSUnavailable", 3, 1)]
)
async def test_while_nothing_can_be_asked_the_workers_at_rest_send_one_question_and_recover(
    scene: LooksScene, fault: str, reason: str, attempts: int, turns: int
) -> None:
    names = [f"w{n}" for n in range(30)]
    for name in names:
        await scene.rest(name)
    await scene.see(names[0])
    struck = scene.shim.faults.add({"action": "*", "fault": fault, "times": 0})
    await scene.interval(2)
    scene.calls()
    for _ in range(turns):
        for name in names:
            assert await scene.see(name) is None, "nothing was seen, and nothing is concluded"
        assert scene.calls() == {"DescribeInstances": attempts}
        await scene.interval(0.25)
    trouble = (await scene.get("w7")).status.ec2
    assert (trouble.state, trouble.last_error and trouble.last_error.reason) == ("running", reason)
    scene.shim.faults.remove(struck.id)
    for name in names:
        assert await scene.see(name) is not None
    assert scene.calls() == ONE
    assert (await scene.get("w7")).status.ec2.last_error is None


async def test_whoever_comes_while_a_question_hangs_has_the_last_word_of_ec2(scene: LooksScene) -> None:
    for name in ("first", "second"):
        await scene.rest(name)
    await scene.see("first")
    hangs = scene.shim.faults.add({"action": "*", "fault": "delay", "seconds": 30, "times": 1})
    await scene.interval()
    asking = asyncio.create_task(scene.see("first"))
    await until(lambda: hangs.hits == 1, "the question")
    sighting = await scene.see("second")
    assert sighting is not None
    assert sighting.instance is not None
    assert not asking.done()
    asking.cancel()
    await asyncio.wait([asking])
    assert await scene.see("first") is not None, "another one asks in place of who was cut off"


async def test_credentials_of_another_account_are_one_refusal_for_all_who_are_at_rest(
    monkeypatch: pytest.MonkeyPatch, aws_credentials: None, moto_url: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", EXAMS_NUMBER)
    async with looks_scene(moto_url) as scene:
        names = [f"w{n}" for n in range(20)]
        for name in names:
            await scene.rest(name)
            await scene.client().update_status(
                await scene.get(name), lambda w: setattr(w.status.ec2, "owner_id", ACCOUNT)
            )
        await scene.cache.barrier(30)
        for _ in range(2):
            for name in names:
                assert await scene.see(name) is None, "nothing is seen with them, and nothing is concluded"
            assert scene.calls() == {"DescribeInstances": 1, "GetCallerIdentity": 1}
            await scene.interval(0.25)
        trouble = (await scene.get("w7")).status.ec2
        assert (trouble.state, trouble.last_error and trouble.last_error.reason) == ("running", "WrongAccount")


async def test_where_nobody_says_whose_the_credentials_are_whom_a_look_does_not_show_looks_itself(
    scene: LooksScene,
) -> None:
    worker = await scene.rest("w")
    await scene.see("w")
    await scene.see("w", asked=True)  # takes down whose it is
    assert (await scene.get("w")).status.ec2.owner_id is not None
    _ended(scene, worker.status.ec2.instance_id or "")
    await scene.interval()
    sighting = await scene.see("w")
    assert sighting is not None
    assert sighting.gone
