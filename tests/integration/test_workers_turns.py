"""Workers of a place that does not answer hold up none of another, and its own no longer than it is silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from controllers.workers.provisioning import Sighting
from controllers.workers.turns import Crowded
from equipment.looks_scene import LooksScene, looks_scene
from equipment.waiting import until
from lrm.resource import RECONCILE_ANNOTATION

SILENT = "eu-west-1"
"""A region of the same account: its calls must leave threads for the others."""


@pytest.fixture
async def scene(aws_credentials: None) -> AsyncIterator[LooksScene]:
    async with looks_scene() as made:
        yield made


def hang(scene: LooksScene) -> int:
    """Let the region not answer; the fault's id."""
    fault = {"action": "*", "fault": "delay", "seconds": 30, "times": 0, "region": SILENT}
    hanging: int = scene.shim.faults.add(fault).id
    return hanging


@pytest.mark.parametrize("asked", [True, False], ids=["own-looks", "the-shared-look"])
async def test_more_workers_than_the_controller_has_hands_hang_and_those_of_another_place_do_not_wait(
    scene: LooksScene, asked: bool
) -> None:
    for n in range(40):
        worker = await scene.rest(f"a{n:02}", "stopped", region=SILENT)
        if asked:
            await scene.client().update(worker, lambda w: w.metadata.annotations.update({RECONCILE_ANNOTATION: "1"}))
    other = await scene.rest("b", "stopped")
    await scene.cache.barrier(30)
    scene.shim.instances.start(other.spec.region, [other.status.ec2.instance_id or ""])
    hang(scene)
    async with scene.running() as runner:
        # No time passes, so no call that hangs ends.
        await until(lambda: scene.shim.calls["StopInstances"], "the end of what somebody started")
        assert runner.stats.reconciles > 40
        assert runner.queue.processing <= 5


async def test_of_a_silent_place_one_asks_and_the_others_hear_what_was_heard_last(scene: LooksScene) -> None:
    names = [f"w{n}" for n in range(10)]
    for name in names:
        await scene.rest(name, region=SILENT)
    fault = hang(scene)

    def look(name: str) -> asyncio.Task[Sighting | None]:
        return asyncio.create_task(scene.see(name, asked=True))

    tasks = [look(name) for name in names]
    await until(lambda: sum(task.done() for task in tasks) == 6, "those who are too many")
    assert all(isinstance(task.exception(), Crowded) for task in tasks if task.done())
    await until(lambda: scene.shim.calls["DescribeInstances"] == 4, "the questions")
    await scene.clock.advance(20)
    assert [t.result() for t in tasks if not t.exception()] == [None] * 4
    assert len(scene.hinted) == 6, "they may hear it now"
    first = (await scene.get("w0")).status.ec2.last_error
    assert first is not None
    assert first.reason == "AWSUnavailable"

    asking = look("w9")
    await until(lambda: scene.shim.calls["DescribeInstances"] == 5, "the one that finds out")
    for name in names[:9]:
        assert await scene.see(name, asked=True) is None
        told = (await scene.get(name)).status.ec2.last_error
        assert told is not None
        assert told.reason == "AWSUnavailable"
    assert scene.shim.calls["DescribeInstances"] == 5
    scene.shim.faults.remove(fault)
    await scene.clock.advance(20)
    assert await asking is None
    assert await scene.see("w0", asked=True) is not None
    found = await asyncio.gather(*(scene.see(name, asked=True) for name in names[:3]))
    assert all(sighting is not None for sighting in found), "it answers, and is asked by many again"
