"""A person's wish at an awkward moment, and answers of EC2's that are lost: each way leads to what is wished last."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from controllers.aws.simulator import ShimOptions
from equipment.workers_world import (
    FAST_CML,
    REGION,
    TOKEN_ENV,
    WorkersWorld,
    condition,
    history,
    someone_elses,
    tags_of,
    workers_world,
)
from lrm.resource import RECONCILE_ANNOTATION, RETRY_ANNOTATION

LICENSED: dict[str, Any] = {"licenseTokenFrom": {"env": TOKEN_ENV}}
SERVING = ("Ready", "ReadyUnlicensed")


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch, moto_url: str) -> AsyncIterator[WorkersWorld]:
    async with workers_world(monkeypatch, moto_url) as made:
        yield made


@pytest.fixture
async def slow(monkeypatch: pytest.MonkeyPatch, moto_url: str) -> AsyncIterator[WorkersWorld]:
    """A world in which every phase lasts long enough to change one's mind."""
    cml = replace(FAST_CML, boot_bad_gateway=0.4, registration=0.4)
    options = ShimOptions(moto_url=moto_url, delay=0.4)
    async with workers_world(monkeypatch, moto_url, cml_options=cml, shim_options=options) as made:
        yield made


@pytest.mark.parametrize(
    ("when", "follows"),
    [
        ("ProvisioningEC2", {"Stopping", "EC2Ready"}),
        ("Licensing", {"Draining", "Ready"}),
        pytest.param("EC2Ready", {"Stopping", "Starting"}, marks=pytest.mark.soak),
        pytest.param("Starting", {"Stopping", "Licensing"}, marks=pytest.mark.soak),
    ],
)
async def test_a_worker_that_is_to_be_stopped_on_its_way_up_stops_and_can_be_started(
    slow: WorkersWorld, when: str, follows: set[str]
) -> None:
    await slow.create(cml=LICENSED)
    await slow.until(lambda w: when in history(w) and w.status.ec2.instance_id, when)
    await slow.wish("Stopped")
    stopped = await slow.phase("Stopped")
    steps = history(stopped)
    assert steps[steps.index(when) + 1] in follows
    assert [slow.state(i) for i in slow.instances()] == ["stopped"]
    assert not slow.machine(stopped).licensing.licensed
    await slow.wish("Ready")
    again = await slow.phase("Ready")
    assert again.status.ec2.instance_id == stopped.status.ec2.instance_id
    assert slow.shim.calls["RunInstances"] == 1
    assert "Failed" not in history(again)


@pytest.mark.parametrize("when", ["Stopping", pytest.param("Unlicensing", marks=pytest.mark.soak)])
async def test_a_worker_that_is_to_be_ready_on_its_way_down_stops_first_and_starts_again(
    slow: WorkersWorld, when: str
) -> None:
    before = await slow.serving(cml=LICENSED)
    await slow.phase("Ready")
    await slow.wish("Stopped")
    await slow.until(lambda w: when in history(w), when)
    await slow.wish("Ready")
    again = await slow.until(
        lambda w: w.status.phase == "Ready" and "Stopped" in history(w), "it serving after it had stopped"
    )
    assert again.status.ec2.instance_id == before.status.ec2.instance_id
    assert condition(again, "LicenseSeatLeaked") == ("", "")


async def test_a_failed_worker_with_an_instance_can_be_stopped_and_started(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    async with workers_world(monkeypatch, moto_url, worker_boot_deadline=0.5) as world:
        fault = world.cml_fault("html", status=502)
        await world.create()
        failed = await world.phase("Failed")
        await world.wish("Stopped")
        stopped = await world.phase("Stopped")
        assert history(stopped)[-3:] == ["Failed", "Stopping", "Stopped"]
        assert stopped.status.failure is None
        world.cml.faults.clear(fault)
        world.shorten(worker_boot_deadline=60)
        await world.wish("Ready")
        again = await world.phase("ReadyUnlicensed")
        assert again.status.ec2.instance_id == failed.status.ec2.instance_id


async def test_a_stop_that_ec2_does_not_carry_out_fails_by_its_deadline_and_a_retry_goes_on(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    async with workers_world(monkeypatch, moto_url) as world:
        await world.serving()
        world.shorten(worker_ec2_deadline=1)
        world.aws_fault("StopInstances", "server-error", times=0)
        await world.wish("Stopped")
        failed = await world.phase("Failed")
        assert failed.status.failure is not None
        assert failed.status.failure.reason == "StopTimeout"
        assert len(world.live()) == 1
        world.shim.faults.clear()
        await world.annotate(RETRY_ANNOTATION, "1")
        await world.phase("Stopped")


async def test_a_worker_at_work_that_somebody_else_stops_is_started_again(world: WorkersWorld) -> None:
    worker = await world.serving()
    world.machine(worker).add_lab("exam", nodes=1, running=True)
    await world.annotate(RECONCILE_ANNOTATION, "1")
    await world.phase("Active")
    world.shim.instances.stop(REGION, [worker.status.ec2.instance_id or ""])
    again = await world.until(
        lambda w: w.status.phase in SERVING and "Stopped" in history(w), "it serving, and its lab no longer"
    )
    steps = history(again)
    assert steps[steps.index("Stopped") - 1] == "Active"


async def test_a_retry_while_the_old_instance_is_still_ending_waits_and_is_not_lost(world: WorkersWorld) -> None:
    worker = await world.serving()
    world.shim.instances.delay = 0.6
    world.shim.instances.terminate(REGION, [worker.status.ec2.instance_id or ""])
    await world.phase("Failed")
    await world.annotate(RETRY_ANNOTATION, "1")
    world.shim.instances.delay = 0.05
    again = await world.phase("ReadyUnlicensed")
    assert history(again).count("Failed") == 1
    assert again.status.ec2.attempt == 2


@pytest.mark.parametrize("fault", ["lost-reply", pytest.param("dropped", marks=pytest.mark.soak)])
async def test_lost_replies_to_a_stop_a_start_and_an_end_change_nothing_of_how_it_ends(
    world: WorkersWorld, fault: str
) -> None:
    struck = [world.aws_fault(f"{what}Instances", fault) for what in ("Stop", "Start", "Terminate")]
    before = await world.serving(cml=LICENSED)
    await world.wish("Stopped")
    await world.phase("Stopped")
    await world.wish("Ready")
    again = await world.until(lambda w: w.status.phase == "Ready" and "Stopped" in history(w), "it serving again")
    assert again.status.ec2.instance_id == before.status.ec2.instance_id
    await world.wish("Terminated")
    ended = await world.phase("Terminated")
    assert [f.hits for f in struck] == [1, 1, 1]
    assert "Failed" not in history(ended)
    assert world.live() == []
    assert condition(ended, "LicenseSeatLeaked") == ("", "")


@pytest.mark.parametrize("fault", [pytest.param(f, marks=pytest.mark.soak) for f in ("lost-reply", "dropped")])
async def test_lost_replies_to_the_marks_of_an_adopted_instance_leave_it_marked_and_then_unmarked(
    world: WorkersWorld, fault: str
) -> None:
    instance_id = await someone_elses(world)
    struck = [world.aws_fault(f"{what}Tags", fault) for what in ("Create", "Delete")]
    await world.adopt("w1", instance_id)
    worker = await world.phase("ReadyUnlicensed")
    marked = await world.until(lambda _: tags_of(world, instance_id).get("lrm/uid") == worker.uid, "our marks")
    assert marked.status.phase == "ReadyUnlicensed"
    await world.delete()
    await world.gone()
    assert [f.hits for f in struck] == [1, 1]
    assert world.live() == [instance_id]
    assert not any(tag.startswith("lrm/") for tag in tags_of(world, instance_id))
