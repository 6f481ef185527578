"""A LabWorker that drains: nobody's lab is taken away before its time is over, whatever was known when it began."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from controllers.workers.kind import DRAIN_ANNOTATION
from equipment.workers_world import TOKEN_ENV, WorkersWorld, history, workers_world
from lrm.resource import RECONCILE_ANNOTATION

LICENSED: dict[str, Any] = {"licenseTokenFrom": {"env": TOKEN_ENV}}


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch, moto_url: str) -> AsyncIterator[WorkersWorld]:
    async with workers_world(monkeypatch, moto_url) as made:
        yield made


async def listed(world: WorkersWorld) -> None:
    await world.until(lambda w: w.status.labs_synced_at is not None, "the labs listed")


@pytest.mark.parametrize("end", ["stop", "delete"])
async def test_a_lab_that_was_started_since_the_last_list_holds_a_drain(world: WorkersWorld, end: str) -> None:
    """The next list by itself would be an hour away: no record of this lab exists when the drain begins."""
    worker = await world.serving()
    await listed(world)
    machine = world.machine(worker)
    lab = machine.add_lab("exam", nodes=1, running=True)
    if end == "stop":
        await world.wish("Stopped")
    else:
        await world.annotate(DRAIN_ANNOTATION, "true")
        await world.delete()
    await world.phase("Draining")
    await world.until(lambda w: w.status.labs_count == 1, "the lab seen")
    await world.looked_again(3)
    assert (await world.status()).phase == "Draining"
    assert [world.state(i) for i in world.instances()] == ["running"]
    machine.force(lab, "STOPPED")
    if end == "stop":
        stopped = await world.phase("Stopped")
        assert stopped.status.phase_history[-2].reason == "Drained"
    else:
        await world.gone()


async def test_a_drain_waits_while_the_labs_cannot_be_listed(world: WorkersWorld) -> None:
    worker = await world.serving()
    await listed(world)
    unknown = world.cml_fault("status", path="/labs", status=500)
    world.machine(worker).add_lab("exam", nodes=1, running=True)
    await world.wish("Stopped")
    await world.until(lambda w: w.status.phase == "Draining" and w.status.labs_sync_error, "the error told")
    await world.looked_again(3)
    assert (await world.status()).phase == "Draining", "what is not known may run"
    await world.change(lambda w: setattr(w.spec, "drain_timeout_minutes", 0))
    stopped = await world.phase("Stopped")
    assert "DrainTimeout" in [s.reason for s in stopped.status.phase_history]
    world.cml.faults.clear(unknown)


async def test_a_cancelled_drain_leads_back_to_where_it_came_from_and_the_lab_has_not_noticed(
    world: WorkersWorld,
) -> None:
    worker = await world.serving(cml=LICENSED)
    machine = world.machine(worker)
    lab = machine.add_lab("exam", nodes=1, running=True)
    await world.annotate(RECONCILE_ANNOTATION, "1")
    await world.phase("Active")
    await world.wish("Stopped")
    await world.phase("Draining")
    await world.wish("Ready")
    active = await world.until(lambda w: history(w)[-1] == "Active", "at work again")
    assert history(active)[-4:] == ["Active", "Draining", "Ready", "Active"]
    assert active.status.phase_history[-2].reason == "DrainCancelled"
    assert machine.licensing.licensed, "nothing was given up meanwhile"
    assert lab.state == "STARTED"
