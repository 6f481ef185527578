"""What people read of a worker's life in its events, also when the worker is gone."""

from __future__ import annotations

from collections.abc import AsyncIterator

import orjson
import pytest

from equipment.waiting import until
from equipment.workers_world import BAD_TOKEN_ENV, WorkersWorld, workers_world
from lrm.events import events_prefix


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch, moto_url: str) -> AsyncIterator[WorkersWorld]:
    async with workers_world(monkeypatch, moto_url) as made:
        yield made


async def told_of(world: WorkersWorld, name: str = "w1") -> list[tuple[str, str, str]]:
    """Type, reason and message of a worker's events, in order."""
    page = await world.storage.list(events_prefix("/lrm", "default", name))
    events = [orjson.loads(e.value) for e in page.entries]
    return [(e["type"], e["reason"], e["message"]) for e in events]


async def test_each_phase_is_told_with_its_reason_and_outlives_the_worker(world: WorkersWorld) -> None:
    await world.serving()
    await world.delete()
    await world.gone()

    async def last_is_told() -> bool:
        return any("Terminated" in message for _, _, message in await told_of(world))

    await until(last_is_told, "the last event")
    told = await told_of(world)
    assert told[:4] == [
        ("Normal", "Launching", "went from Pending to ProvisioningEC2"),
        ("Normal", "InstanceRunning", "went from ProvisioningEC2 to EC2Ready"),
        ("Normal", "Booting", "went from EC2Ready to Starting"),
        ("Normal", "NoLicenseWanted", "went from Starting to ReadyUnlicensed"),
    ]
    assert "Deleting" in {reason for _, reason, _ in told}


async def test_a_failure_is_a_warning_that_says_where_and_why(world: WorkersWorld) -> None:
    await world.create(aws={"keyName": "no-such-key"})
    await world.phase("Failed")

    async def warned() -> list[tuple[str, str, str]]:
        return [told for told in await told_of(world) if told[0] == "Warning" and "failed in" in told[2]]

    [(_, reason, message)] = await until(warned, "the warning")
    failure = (await world.status()).failure
    assert failure is not None
    assert reason == failure.reason
    assert message == f"failed in {failure.phase}: {failure.message}"


async def test_a_refused_licence_and_failing_health_checks_are_warnings_told_once(world: WorkersWorld) -> None:
    await world.create(cml={"licenseTokenFrom": {"env": BAD_TOKEN_ENV}})
    await world.phase("ReadyUnlicensed")
    await world.listed()
    world.cml_fault("html", status=502)
    await world.until(lambda w: w.status.cml.failed_checks == 3, "the failed health checks")
    await world.looked_again(3)

    async def warnings() -> list[str]:
        return [reason for of, reason, _ in await told_of(world) if of == "Warning"]

    async def both() -> bool:
        return "Unhealthy" in await warnings()

    await until(both, "the warning")
    assert await warnings() == ["RegistrationFailed", "Unhealthy"]
    assert not any("INVALID00" in message for _, _, message in await told_of(world)), "no token is told"
