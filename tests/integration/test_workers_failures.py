"""Troubles of the world around a LabWorker: each is told, none makes a storm, and all pass without a person's help."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from controllers.aws.simulator.instances import Instance
from controllers.cml.simulator import Machine
from controllers.labs.kind import LabRecord
from equipment.waiting import until
from equipment.workers_world import (
    BAD_TOKEN_ENV,
    FAST_CML,
    PASSWORD_ENV,
    REGION,
    TOKEN_ENV,
    WorkersWorld,
    condition,
    history,
    workers_world,
)
from lrm.resource import RECONCILE_ANNOTATION

LICENSED: dict[str, Any] = {"licenseTokenFrom": {"env": TOKEN_ENV}}
LOGIN = "POST /auth_extended"


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch, moto_url: str) -> AsyncIterator[WorkersWorld]:
    async with workers_world(monkeypatch, moto_url) as made:
        yield made


def expired(world: WorkersWorld) -> Any:
    """AWS refuses whatever it is asked."""
    return world.aws_fault("*", "error", times=0, code="ExpiredToken", message="The security token has expired")


async def test_credentials_that_expire_on_the_way_hold_the_worker_where_it_is_until_they_return(
    world: WorkersWorld,
) -> None:
    world.shim.instances.delay = 3600  # it is pending until it is let run
    await world.create()
    launched = await world.until(lambda w: w.status.ec2.instance_id, "the launch")
    assert launched.status.phase == "ProvisioningEC2"
    fault = expired(world)
    told = await world.until(lambda w: condition(w, "EC2Provisioned") == ("False", "AWSAuthFailed"), "the reason")
    assert told.status.phase == "ProvisioningEC2"
    world.shim.faults.remove(fault.id)
    world.let_run()
    worker = await world.phase("ReadyUnlicensed")
    assert "Failed" not in history(worker)

    fault = expired(world)
    told = await world.until(lambda w: w.status.ec2.last_error is not None, "the error told")
    assert condition(told, "Ready")[0] == "True", "labs do not notice"
    await world.wish("Stopped")
    await world.phase("Stopping")
    await world.looked_again(3)
    assert (await world.status()).phase == "Stopping"
    world.shim.faults.remove(fault.id)
    stopped = await world.phase("Stopped")
    assert stopped.status.ec2.last_error is None
    assert stopped.status.ec2.instance_id == launched.status.ec2.instance_id
    assert world.shim.calls["RunInstances"] == 1


async def test_a_launch_that_is_throttled_for_long_is_sent_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    """Between two launches lies a fifth of the time that they have been tried: 24 in ten minutes at every 5 s."""
    async with workers_world(monkeypatch, moto_url, worker_ec2_deadline=4) as world:
        struck = world.aws_fault("RunInstances", "throttle", times=0)
        await world.create()
        failed = await world.phase("Failed")
        assert failed.status.failure is not None
        assert failed.status.failure.reason == "Throttled"
        assert 1 < struck.hits <= 25, "at every look it would be 80"
        assert world.shim.calls["DescribeInstances"] <= 3 * struck.hits + 5
        await world.looked_again(5)
        assert world.shim.calls["RunInstances"] == struck.hits


async def test_looks_that_are_throttled_for_long_are_no_storm_and_cost_no_writes(world: WorkersWorld) -> None:
    await world.serving()
    await world.listed()
    struck = world.aws_fault("DescribeInstances", "throttle", times=0)
    await world.until(lambda w: w.status.ec2.last_error is not None, "the error told")
    await world.cache.barrier(30)
    hits, stats = struck.hits, world.runners[0].stats
    looks = stats.reconciles
    async with world.counting() as writes:
        await until(lambda: stats.reconciles >= looks + 2, "two more looks", 60)
    assert struck.hits - hits <= 3 * (stats.reconciles - looks + 1), "three tries a look at most, ever slower"
    assert writes["labworkers MODIFIED"] == 0
    assert condition(await world.get(), "Ready")[0] == "True"


async def test_a_wrong_password_is_told_and_tried_once_a_minute_by_all_that_ask(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    async with workers_world(monkeypatch, moto_url, led=("metrics",)) as world:
        await world.create(cml={"passwordFrom": {"env": BAD_TOKEN_ENV}})
        worker = await world.until(
            lambda w: condition(w, "CMLReady") == ("False", "CredentialsRefused"), "the reason told"
        )
        machine = world.machine(worker)
        for n in range(3):
            await world.annotate(RECONCILE_ANNOTATION, str(n))
            await world.looked_again(3)
        assert machine.counts[LOGIN] == 1
        assert (await world.status()).phase == "Starting"
        await world.change(lambda w: setattr(w.spec.cml.password_from, "env", PASSWORD_ENV))
        await world.phase("ReadyUnlicensed")
        assert machine.counts[LOGIN] == 2, "another password is tried at once"


async def test_a_password_that_is_changed_in_cml_while_it_serves_is_tried_once(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    async with workers_world(monkeypatch, moto_url, led=("metrics",), labs_refresh_interval=0.2) as world:
        worker = await world.serving()
        machine = world.machine(worker)
        await world.until(lambda w: w.status.labs_synced_at is not None, "the labs listed")
        logins = machine.counts[LOGIN]
        machine.admin.password = "changed-by-hand"
        machine.directory.close_sessions()
        told = await world.until(lambda w: w.status.cml.last_error is not None, "the refusal told")
        assert told.status.cml.last_error is not None
        assert told.status.cml.last_error.reason == "CredentialsRefused"
        for n in range(3):
            await world.annotate(RECONCILE_ANNOTATION, str(n))
            await world.looked_again(3)
        assert machine.counts[LOGIN] - logins == 1
        assert (await world.status()).phase == "ReadyUnlicensed", "its labs run on"
        monkeypatch.setenv(PASSWORD_ENV, "changed-by-hand")
        await world.until(lambda w: w.status.cml.last_error is None, "the new password taken")


class Addresses:
    """Which machine answers at which address, told to the simulator: an address is somebody else's once it is free."""

    def __init__(self) -> None:
        self.world: WorkersWorld | None = None
        self.others: dict[str, Machine] = {}

    @contextmanager
    def of(self, world: WorkersWorld, url: str) -> Iterator[None]:
        """Let the simulator ask here which of its machines run."""
        self.world, fleet = world, world.cml.fleet
        before = fleet.options
        fleet.options = replace(before, ec2_state_url=url)
        try:
            yield
        finally:
            fleet.options = before

    async def answer(self, request: web.Request) -> web.Response:
        world, address = self.world, request.match_info["address"]
        assert world is not None
        machines = world.cml.fleet.machines
        holder = next((i for i in world.instances() if i.public_ip == address), None)
        if holder is not None:
            machines.setdefault(address, self._machine_of(world, holder))
            return web.json_response({"state": world.state(holder), "launch": address})
        if address not in self.others:
            # The next customer's CML, which takes the same password.
            self.others[address] = Machine(f"other-{address}", FAST_CML, world.clock, world.cml.faults)
            machines[address] = self.others[address]
        return web.json_response({"state": "running", "launch": "other"})

    def _machine_of(self, world: WorkersWorld, holder: Instance) -> Machine:
        return world.cml.machine(holder.id)


async def test_after_a_restart_the_old_address_is_anothers_and_nothing_is_removed_because_of_it(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    addresses, app = Addresses(), web.Application()
    app.router.add_get("/{address}", addresses.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with workers_world(monkeypatch, moto_url, address="public_ip", labs_refresh_interval=0.2) as world:
            with addresses.of(world, url):
                await _moves(world, addresses)
    finally:
        await runner.cleanup()


async def _moves(world: WorkersWorld, addresses: Addresses) -> None:
    worker = await world.serving()
    instance, old = worker.status.ec2.instance_id or "", worker.status.ec2.public_ip or ""
    machine = world.machine(worker)
    machine.add_lab("exam", nodes=1)
    await until(lambda: world.cache.all(LabRecord), "the record of the lab")
    world.aws_fault("DescribeInstances", "server-error", times=0)
    world.shim.instances.stop(REGION, [instance])
    await until(lambda: world.instances("stopped"), "it stopped")
    world.shim.instances.start(REGION, [instance])
    sick = await world.until(lambda w: condition(w, "CMLIdentityMismatch")[0] == "True", "the mismatch")
    assert condition(sick, "Ready") == ("False", "IdentityMismatch")
    assert sick.status.ec2.public_ip == old, "EC2 could not tell"
    await world.looked_again(3)
    other = addresses.others[old]
    asked = Counter({k: n for k, n in other.counts.items() if k.startswith(("POST", "PUT", "PATCH", "DELETE"))})
    assert set(asked) <= {LOGIN}, "nothing is changed in a CML that is not ours"
    assert asked[LOGIN] <= 1
    assert len(world.cache.all(LabRecord)) == 1, "another CML's list proves nothing about ours"

    world.shim.faults.clear()
    well = await world.until(lambda w: condition(w, "Ready")[0] == "True", "it found where it is now")
    assert well.status.ec2.public_ip not in (None, old)
    assert condition(well, "CMLIdentityMismatch")[0] == "False"
    assert well.status.cml.identity == worker.status.cml.identity
    await world.quiet()  # who had read the old address before the new one was written has asked by now
    before = other.counts.total()
    await world.looked_again(4)
    assert other.counts.total() == before, "the old address is asked no more"
    assert len(world.cache.all(LabRecord)) == 1
