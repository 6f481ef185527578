"""Licence seats: each that Smart Licensing may still count when a worker lets go of its instance is told of."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from equipment.workers_world import REGION, TOKEN, TOKEN_ENV, WorkersWorld, condition, history, workers_world
from lrm.resource import RETRY_ANNOTATION

LICENSED: dict[str, Any] = {"licenseTokenFrom": {"env": TOKEN_ENV}}
DEREGISTRATION = {"method": "DELETE", "path": "/licensing/deregistration"}


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch, moto_url: str) -> AsyncIterator[WorkersWorld]:
    async with workers_world(monkeypatch, moto_url) as made:
        yield made


@pytest.mark.parametrize(
    ("fault", "how", "told", "why"),
    [
        ("drop", {"times": 4}, ("", ""), "it was not carried out, and its repetition was"),
        ("drop-answer", {"times": 1}, ("Unknown", "DeregistrationUnknown"), "it was carried out: how is not known"),
        ("status", {"status": 500, "times": 1}, ("", ""), "refused, and then carried out"),
    ],
)
async def test_a_lost_answer_to_a_deregistration_is_told_for_what_it_is(
    world: WorkersWorld, fault: str, how: dict[str, Any], told: tuple[str, str], why: str
) -> None:
    worker = await world.serving(cml=LICENSED)
    machine = world.machine(worker)
    struck = world.cml_fault(fault, **DEREGISTRATION, **how)
    await world.wish("Terminated")
    ended = await world.phase("Terminated")
    assert struck.hits
    assert not machine.licensing.licensed
    assert condition(ended, "LicenseSeatLeaked") == told, why
    assert ended.status.cml.deregistration_sent_at is None


async def test_a_registration_under_way_is_waited_for_and_given_back(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    async with workers_world(monkeypatch, moto_url) as world:
        stuck = world.cml_fault("registration-stuck")
        await world.create(cml=LICENSED)
        machine = await world.registering("IN_PROGRESS")
        await world.wish("Terminated")
        await world.phase("Unlicensing")
        await world.looked_again(2)
        assert world.live(), "CML refuses to give back what it is about to get"
        world.cml.faults.clear(stuck)
        ended = await world.phase("Terminated")
        assert machine.licensing.status == "NOT_REGISTERED"
        assert condition(ended, "LicenseSeatLeaked") == ("", "")


async def test_a_registration_that_may_yet_come_through_is_told_of_when_cml_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    async with workers_world(monkeypatch, moto_url) as world:
        world.cml_fault("registration-stuck")
        await world.create(cml=LICENSED)
        await world.registering("IN_PROGRESS")
        world.shorten(worker_license_deadline=0.5)
        worker = await world.phase("ReadyUnlicensed")
        assert condition(worker, "Licensed") == ("False", "LicenseTimeout")
        world.cml_fault("html", status=502)
        await world.wish("Terminated")
        ended = await world.phase("Terminated")
        assert condition(ended, "LicenseSeatLeaked") == ("Unknown", "DeregistrationFailed")


async def test_the_seat_of_an_instance_that_somebody_else_ended_is_told_of_before_another_is_launched(
    world: WorkersWorld,
) -> None:
    worker = await world.serving(cml=LICENSED)
    world.shim.instances.terminate(REGION, [worker.status.ec2.instance_id or ""])
    failed = await world.phase("Failed")
    assert condition(failed, "LicenseSeatLeaked") == ("True", "DeregistrationFailed")
    assert not failed.status.cml.licensed
    await world.annotate(RETRY_ANNOTATION, "1")
    again = await world.phase("Ready")
    assert condition(again, "LicenseSeatLeaked")[0] == "True", "that seat is still taken"
    assert condition(again, "Licensed")[0] == "True"


async def test_the_seat_of_an_instance_that_ended_after_its_worker_had_failed_is_told_of(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    """A licence that somebody registered by hand, on a machine that was stopped and does not come up again."""
    async with workers_world(monkeypatch, moto_url) as world:
        worker = await world.serving()
        machine = world.machine(worker)
        machine.licensing.register(TOKEN, world.clock.monotonic(), world.clock.now(), again=False)
        await world.phase("Ready")
        await world.wish("Stopped")
        stopped = await world.phase("Stopped")
        assert stopped.status.cml.licensed, "what lrm has not registered a stop does not give back"
        world.shorten(worker_boot_deadline=0.5)
        world.cml_fault("html", status=502)
        await world.wish("Ready")
        failed = await world.phase("Failed")
        assert condition(failed, "LicenseSeatLeaked") == ("", "")
        world.shim.instances.terminate(REGION, [worker.status.ec2.instance_id or ""])
        await world.until(lambda w: condition(w, "LicenseSeatLeaked")[0] == "True", "the seat told of")


async def test_while_the_licence_server_cannot_be_reached_the_worker_serves_and_takes_the_licence_when_it_comes(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    async with workers_world(monkeypatch, moto_url) as world:
        away = world.cml_fault("ssms-unreachable")
        await world.create(cml=LICENSED)
        await world.registering("RETRY")
        world.shorten(worker_license_deadline=0.5)
        worker = await world.phase("ReadyUnlicensed")
        assert condition(worker, "Licensed") == ("False", "LicenseTimeout")
        told = worker.status.condition("Licensed")
        assert told is not None
        assert "RETRY" in told.message
        assert condition(worker, "Ready") == ("True", "Unlicensed")
        posts = world.machine(worker).counts["POST /licensing/registration"]
        await world.looked_again(4)
        assert world.machine(worker).counts["POST /licensing/registration"] == posts == 1
        world.cml.faults.clear(away)
        late = await world.phase("Ready")
        assert history(late)[-2:] == ["ReadyUnlicensed", "Ready"]
