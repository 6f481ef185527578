"""What a worker's CML can do to it: boot slowly, lie, be another one, refuse a licence, fall silent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, cast

import pytest

from controllers.cml.client import CmlClient
from controllers.cml.errors import CmlClosed, CmlError, CmlUnavailable
from controllers.cml.sessions import CmlSessions
from controllers.workers.controller import WorkersController
from controllers.workers.kind import TRUST_ANNOTATION
from equipment.waiting import until
from equipment.workers_world import BAD_TOKEN_ENV, FAST_CML, TOKEN_ENV, WorkersWorld, condition, history, workers_world
from lrm.resource import RETRY_ANNOTATION

LICENSED: dict[str, Any] = {"licenseTokenFrom": {"env": TOKEN_ENV}}


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch, moto_url: str) -> AsyncIterator[WorkersWorld]:
    async with workers_world(monkeypatch, moto_url) as made:
        yield made


async def test_while_it_boots_the_worker_waits_and_says_why(monkeypatch: pytest.MonkeyPatch, moto_url: str) -> None:
    slow = replace(FAST_CML, boot_bad_gateway=1.5, boot_not_ready=1.5)
    async with workers_world(monkeypatch, moto_url, cml_options=slow) as world:
        await world.create()
        await world.until(lambda w: condition(w, "CMLReady") == ("False", "CMLNotReady"), "the 502 told")
        await world.until(lambda w: condition(w, "CMLReady") == ("False", "Booting"), "ready: false told")
        worker = await world.phase("ReadyUnlicensed")
        assert condition(worker, "CMLReady")[0] == "True"
        assert worker.status.cml.last_error is None


async def test_a_cml_that_never_boots_ends_in_failed_and_retry_goes_on_with_the_same_instance(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    async with workers_world(monkeypatch, moto_url, worker_boot_deadline=0.6) as world:
        fault = world.cml_fault("html", status=502)
        await world.create()
        failed = await world.phase("Failed")
        assert failed.status.failure is not None
        assert failed.status.failure.reason == "BootTimeout"
        assert "502" in failed.status.failure.message
        await world.looked_again(2)
        assert (await world.status()).phase == "Failed"
        assert len(world.live()) == 1
        world.cml.faults.clear(fault)
        await world.annotate(RETRY_ANNOTATION, "1")
        worker = await world.phase("ReadyUnlicensed")
        assert history(worker)[-3:] == ["Failed", "Starting", "ReadyUnlicensed"]
        assert worker.status.ec2.instance_id == failed.status.ec2.instance_id


@pytest.mark.parametrize(
    ("fault", "how", "reason"),
    [
        ("status", {"status": 500, "path": "/licensing"}, "BadAnswer"),
        pytest.param("status", {"status": 404, "path": "/system_information"}, "BadAnswer", marks=pytest.mark.soak),
        pytest.param("truncate", {"path": "/system_information"}, "BadAnswer", marks=pytest.mark.soak),
        ("status", {"status": 403, "path": "/licensing"}, "NotAdmin"),
        ("drop", {"path": "/system_information"}, "Unreachable"),
        ("status", {"status": 403, "path": "/auth_extended"}, "CredentialsRefused"),
    ],
)
async def test_a_boot_that_goes_wrong_is_told_by_its_reason(
    world: WorkersWorld, fault: str, how: dict[str, Any], reason: str
) -> None:
    world.cml_fault(fault, **how)
    await world.create()
    await world.until(lambda w: condition(w, "CMLReady") == ("False", reason), f"the reason {reason}")
    assert (await world.status()).phase == "Starting"


async def test_a_password_that_may_not_be_read_is_told_and_nothing_is_sent(world: WorkersWorld) -> None:
    await world.create(cml={"passwordFrom": {"env": "HOME"}})
    worker = await world.until(lambda w: condition(w, "CMLReady")[1] == "SecretUnavailable", "the reason")
    error = worker.status.cml.last_error
    assert error is not None
    assert "env HOME" in error.message


async def test_one_failed_check_is_no_outage_and_three_in_a_row_are(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    async with workers_world(monkeypatch, moto_url) as world:
        await world.serving()
        await world.listed()
        struck = world.cml_fault("html", status=502, path="/system_information", times=3)
        await world.until(lambda w: w.status.cml.failed_checks == 1, "one failure")
        worker = await world.until(lambda w: w.status.cml.failed_checks == 0, "its end")
        assert struck.hits == 3, "the client itself asks three times"
        assert condition(worker, "HealthCheckPassed") == ("True", "Healthy")
        assert {c.last_transition_time for c in worker.status.conditions if c.type == "Ready"} == {
            c.last_transition_time for c in worker.status.conditions if c.type == "CMLReady"
        }, "Ready has not moved since CML was first ready"

        world.cml_fault("html", status=502)
        sick = await world.until(lambda w: condition(w, "HealthCheckPassed")[0] == "False", "the failed health check")
        assert condition(sick, "Ready")[0] == "False"
        assert condition(sick, "CMLReady")[0] == "False"
        assert condition(sick, "AcceptingLabs")[0] == "False"
        assert sick.status.phase == "ReadyUnlicensed"
        await world.quiet()
        async with world.counting() as writes:
            await world.looked_again(3)
        assert not writes, "an outage that goes on costs no writes"
        world.cml.faults.clear()
        await world.until(lambda w: condition(w, "Ready")[0] == "True", "recovery")


def sessions_of(world: WorkersWorld) -> CmlSessions:
    """The CML clients that everybody in the world shares."""
    return cast("WorkersController", world.runners[0].controller)._cml.sessions


async def test_a_dead_cml_is_unhealthy_whoever_is_let_through_to_it_and_recovers(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    """Others ask all the time, so that the health check itself is hardly ever let through."""
    monkeypatch.setitem(cast("Any", CmlClient.__init__).__kwdefaults__, "breaker_cool_down", 0.2)
    async with workers_world(monkeypatch, moto_url) as world:
        client = sessions_of(world).client_for(await world.serving())

        async def ask_all_the_time() -> None:
            while True:
                with contextlib.suppress(CmlUnavailable):
                    await client.lab_ids()
                await world.clock.sleep(0.001)

        others = asyncio.create_task(ask_all_the_time())
        world.cml_fault("drop")
        sick = await world.until(lambda w: condition(w, "HealthCheckPassed")[0] == "False", "the failed health check")
        assert condition(sick, "Ready") == ("False", "Unreachable")
        await world.looked_again(5)
        assert (await world.status()).cml == sick.status.cml, "an outage that goes on costs no writes"
        world.cml.faults.clear()
        await world.until(lambda w: condition(w, "Ready")[0] == "True", "recovery")
        others.cancel()
        await asyncio.wait([others])


async def test_a_worker_at_rest_is_looked_at_when_anybody_finds_its_cml_dead_and_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    monkeypatch.setitem(cast("Any", CmlClient.__init__).__kwdefaults__, "breaker_cool_down", 0.0)
    async with workers_world(monkeypatch, moto_url) as world:
        worker = await world.serving()
        await world.listed()
        looks = world.runners[0].stats.reconciles
        world.shorten(worker_rest_interval=3600)
        await until(lambda: world.runners[0].stats.reconciles > looks, "the last look for an hour")
        await world.at_rest()
        client = sessions_of(world).client_for(worker)
        fault = world.cml_fault("drop")
        for _ in range(2):  # three tries each
            with pytest.raises(CmlUnavailable):
                await client.lab_ids()
        doubtful = await world.until(lambda w: w.status.cml.failed_checks, "the look")
        assert condition(doubtful, "Ready")[0] == "True", "one failed check is no outage"
        world.cml.faults.clear(fault)
        await client.lab_ids()
        await world.until(lambda w: w.status.cml.failed_checks == 0, "the look")


async def test_at_rest_one_question_is_enough_until_it_fails_or_somebody_asks(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    slow = ("GET /system_information", "GET /system_health")
    async with workers_world(monkeypatch, moto_url, worker_examine_interval=3600) as world:
        worker = await world.serving()
        machine = world.machine(worker)
        await until(lambda: machine.counts["GET /system_health"], "the examination")
        await world.looked_again()
        machine.counts.clear()
        await world.looked_again(5)
        assert machine.counts["GET /licensing"] >= 5
        assert not any(machine.counts[path] for path in slow)

        await world.annotate("lab.neuroglia.io/reconcile-now", "1")
        await until(lambda: all(machine.counts[path] for path in slow), "all questions, as a person wants to know")
        asked = machine.counts[slow[0]]
        await world.looked_again(5)
        assert machine.counts[slow[0]] == asked, "once"

        fault = world.cml_fault("html", status=502, path="/licensing")
        await world.until(lambda w: w.status.cml.failed_checks == 3, "three failures in a row")
        assert machine.counts[slow[0]] > asked, "after the first one everything is asked"
        world.cml.faults.clear(fault)
        healthy = await world.until(lambda w: condition(w, "Ready")[0] == "True", "recovery")
        assert healthy.status.cml.failed_checks == 0


async def test_another_cml_at_the_address_gets_nothing_and_the_worker_says_so(world: WorkersWorld) -> None:
    worker = await world.serving()
    instance = worker.status.ec2.instance_id or ""
    identity = worker.status.cml.identity
    other = "99999999-8888-4777-8666-555555555555"
    world.cml_fault("identity", instance=instance, product_uuid=other)
    sick = await world.until(lambda w: condition(w, "CMLIdentityMismatch")[0] == "True", "the mismatch")
    assert condition(sick, "Ready") == ("False", "IdentityMismatch")
    assert sick.status.cml.identity == identity, "what is known of the right one stays"
    assert sick.status.ec2.instance_id == instance

    await world.annotate(TRUST_ANNOTATION, "ticket-17")
    trusted = await world.until(lambda w: condition(w, "CMLIdentityMismatch")[0] == "False", "trust")
    assert trusted.status.cml.identity is not None
    assert trusted.status.cml.identity.product_uuid == other
    assert trusted.status.cml.trusted == "ticket-17"
    world.cml.faults.clear()
    world.machine(worker).directory.close_sessions()
    await world.until(lambda w: condition(w, "CMLIdentityMismatch")[0] == "True", "that trust was for once")


async def test_a_refused_licence_falls_back_to_unlicensed_and_a_retry_tries_again(world: WorkersWorld) -> None:
    await world.create(cml={"licenseTokenFrom": {"env": BAD_TOKEN_ENV}})
    worker = await world.phase("ReadyUnlicensed")
    assert history(worker)[-2:] == ["Licensing", "ReadyUnlicensed"]
    assert condition(worker, "Licensed") == ("False", "RegistrationFailed")
    assert condition(worker, "Ready") == ("True", "Unlicensed")
    await world.looked_again(3)
    assert history(await world.get()) == history(worker), "it is not tried again by itself"

    await world.change(lambda w: setattr(w.spec.cml.license_token_from, "env", TOKEN_ENV))
    licensed = await world.phase("Ready")
    assert condition(licensed, "Licensed") == ("True", "Licensed")


async def test_a_registration_that_never_completes_ends_by_its_deadline(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    async with workers_world(monkeypatch, moto_url) as world:
        fault = world.cml_fault("registration-stuck")
        await world.create(cml=LICENSED)
        await world.registering("IN_PROGRESS")
        world.shorten(worker_license_deadline=0.5)
        worker = await world.phase("ReadyUnlicensed")
        assert condition(worker, "Licensed") == ("False", "LicenseTimeout")
        assert "IN_PROGRESS" in (worker.status.condition("Licensed") or worker.status.conditions[0]).message
        world.cml.faults.clear(fault)
        late = await world.phase("Ready")
        assert condition(late, "Licensed")[0] == "True", "a licence that comes late is taken"


@pytest.mark.parametrize(
    ("fault", "how"),
    [
        ("drop-answer", {"times": 1}),
        ("drop", {"times": 1}),
        pytest.param("html", {"status": 502, "times": 2}, marks=pytest.mark.soak),
        pytest.param("status", {"status": 500, "times": 1}, marks=pytest.mark.soak),
        pytest.param("status", {"status": 409, "times": 1}, marks=pytest.mark.soak),
    ],
)
async def test_a_lost_answer_to_the_registration_ends_licensed_all_the_same(
    monkeypatch: pytest.MonkeyPatch, moto_url: str, fault: str, how: dict[str, Any]
) -> None:
    monkeypatch.setattr("controllers.workers.cml_side._UNHEARD", 0.3)
    async with workers_world(monkeypatch, moto_url) as world:
        world.cml_fault(fault, method="POST", path="/licensing/registration", **how)
        await world.create(cml=LICENSED)
        worker = await world.phase("Ready")
        assert condition(worker, "Licensed")[0] == "True"


async def test_the_seat_is_given_back_before_the_instance_ends(world: WorkersWorld) -> None:
    worker = await world.serving(cml=LICENSED)
    machine = world.machine(worker)
    assert machine.licensing.licensed
    await world.delete()
    await world.until(lambda w: w.status.phase in {"TerminatingEC2", "Terminated"}, "the end")
    assert not machine.licensing.licensed
    await world.gone()


async def test_a_seat_that_cannot_be_given_back_is_reported_and_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    async with workers_world(monkeypatch, moto_url) as world:
        await world.serving(cml=LICENSED)
        world.shorten(worker_license_deadline=0.5)
        world.cml_fault("html", status=502)
        await world.wish("Terminated")
        worker = await world.phase("Terminated")
        assert condition(worker, "LicenseSeatLeaked") == ("True", "DeregistrationFailed")
        assert world.live() == []


async def test_a_seat_that_only_cml_gave_up_is_reported(world: WorkersWorld) -> None:
    await world.serving(cml=LICENSED)
    world.cml_fault("ssms-unreachable")
    await world.wish("Terminated")
    worker = await world.phase("Terminated")
    assert condition(worker, "LicenseSeatLeaked") == ("True", "LicenseServerUnreachable")


async def test_clients_of_workers_that_are_gone_are_closed(monkeypatch: pytest.MonkeyPatch, moto_url: str) -> None:
    made: list[CmlSessions] = []
    original = CmlSessions.__init__

    def remember(self: CmlSessions, *args: Any) -> None:
        original(self, *args)
        made.append(self)

    monkeypatch.setattr(CmlSessions, "__init__", remember)
    async with workers_world(monkeypatch, moto_url) as world:
        worker = await world.serving()
        client = made[0].client_for(worker)
        await world.delete()
        await world.gone()

        async def closed() -> bool:
            try:
                await client.system_information()
            except CmlClosed:
                return True
            except CmlError:
                return False
            return False

        await until(closed, "the client closed")
