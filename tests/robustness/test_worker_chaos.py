"""Random faults, wishes and changes of leader, then peace: each worker ends as wished, with one instance or none.

Every kind of trouble that the simulators can make strikes three workers at random moments, while users change their
minds and leaders come and go. While it lasts no worker ever has two instances; afterwards all is as the specs say, and
EC2 holds nothing that nobody claims. Each instance that ended with a licence was told of.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from controllers.cml.simulator import Machine
from controllers.workers.kind import LabWorker
from equipment.waiting import until
from equipment.workers_world import TOKEN_ENV, WorkersWorld, workers_world
from lrm.cache import CacheUpdate
from lrm.election import StaticElection
from lrm.errors import LrmError, ResourceNotFound
from lrm.resource import RETRY_ANNOTATION

NAMES = ("w1", "w2", "w3")
AWS_FAULTS = ("throttle", "quota", "capacity", "auth", "server-error", "lost-reply", "dropped", "delay", "slow-reply")
ACTIONS = ("RunInstances", "DescribeInstances", "StartInstances", "StopInstances", "TerminateInstances")
CML_FAULTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("html", {"status": 502}),
    ("status", {"status": 500}),
    ("drop", {}),
    ("drop-answer", {}),
    ("truncate", {}),
    ("registration-stuck", {}),
)


class Seats:
    """The licences that machines took, and those of which a worker said that they may be left taken."""

    def __init__(self, world: WorkersWorld) -> None:
        self._world = world
        self._machines: dict[str, Machine] = {}
        self._told: set[str] = set()
        world.cache.subscribe(self._hear)

    def look(self) -> None:
        """Remember the machines that there are: the simulator forgets them with their instances."""
        self._machines.update(self._world.cml.fleet.machines)

    def check(self) -> None:
        """Raise if an instance ended with a licence and nobody was told."""
        taken = {name for name, machine in self._machines.items() if machine.licensing.status == "COMPLETED"}
        assert taken - set(self._world.live()) <= self._told

    def _hear(self, update: CacheUpdate) -> None:
        for change in update.changes:
            worker = change.new.resource if change.new else None
            said = worker.status.condition("LicenseSeatLeaked") if isinstance(worker, LabWorker) else None
            if said is not None and said.status != "False":
                self._told.add(said.message.partition(":")[0])


@asynccontextmanager
async def leading(world: WorkersWorld) -> AsyncIterator[None]:
    """The three controllers under a term of their own."""
    term = await StaticElection(world.storage, world.clock, root="/lrm", lock_name="workers", identity="x").acquire()
    world.term = term
    running = [asyncio.create_task(r.run(term)) for r in world.runners]
    try:
        yield
    finally:
        term.lost()
        for task in running:
            task.cancel()
        await asyncio.wait(running)


async def trouble(world: WorkersWorld, chance: random.Random) -> None:
    """One thing that goes wrong, or one change of mind."""
    what, name = chance.random(), chance.choice(NAMES)
    if what < 0.35:
        world.aws_fault(chance.choice(ACTIONS), chance.choice(AWS_FAULTS), times=chance.randint(1, 3), seconds=0.1)
    elif what < 0.55:
        kind, how = chance.choice(CML_FAULTS)
        world.cml_fault(kind, **how, times=chance.randint(1, 6))
    elif what < 0.75:
        await attempt(
            world, name, lambda w: setattr(w.spec, "desired_phase", chance.choice(("Ready", "Stopped", "Draining")))
        )
    elif what < 0.85:
        await attempt(world, name, lambda w: w.metadata.annotations.update({RETRY_ANNOTATION: str(chance.random())}))
    elif what < 0.92:
        running = [i.id for i in world.instances("running")]
        if running:
            act = chance.choice((world.shim.instances.stop, world.shim.instances.terminate))
            act("us-east-1", [chance.choice(running)])
    else:
        try:
            await world.delete(name)
        except ResourceNotFound:
            await world.create(name, cml={"licenseTokenFrom": {"env": TOKEN_ENV}})


async def attempt(world: WorkersWorld, name: str, mutate: Any) -> None:
    """A user's change; that the worker is just being deleted is no failure of the test."""
    try:
        await world.change(mutate, name)
    except LrmError:
        return


@pytest.mark.parametrize("seed", [7, *(pytest.param(s, marks=pytest.mark.soak) for s in range(20, 40))])
async def test_whatever_happens_all_is_as_wished_once_it_ends(
    monkeypatch: pytest.MonkeyPatch, moto_url: str, seed: int
) -> None:
    chance = random.Random(seed)
    monkeypatch.setattr("controllers.workers.cml_side._UNHEARD", 0.3)
    async with workers_world(monkeypatch, moto_url, worker_license_deadline=1, worker_boot_deadline=3) as world:
        world.term.lost()  # the leaders of this test come and go
        seats = Seats(world)
        for name in NAMES:
            await world.create(name, cml={"licenseTokenFrom": {"env": TOKEN_ENV}})
        for _ in range(4):
            async with leading(world):
                for _ in range(10):
                    await trouble(world, chance)
                    seats.look()
                    owners = Counter(i.tags["lrm/uid"] for i in world.instances("pending", "running", "stopped"))
                    assert max(owners.values(), default=0) <= 1, "two instances of one worker"
                    await asyncio.sleep(chance.uniform(0, 0.25))  # not waiting for anything: the moment is the point
        world.shim.faults.clear()
        world.cml.faults.clear()
        async with leading(world):
            await settled(world)
            await check(world)
            seats.look()
            for worker in await world.client.list(LabWorker):
                await world.delete(worker.name)
            for name in NAMES:
                await world.gone(name)
            assert world.live() == []
            seats.check()


async def settled(world: WorkersWorld) -> None:
    """Lift every failure, wish for Ready, and wait for it."""
    for worker in await world.client.list(LabWorker):
        await attempt(world, worker.name, lambda w: setattr(w.spec, "desired_phase", "Ready"))

    async def as_wished() -> bool:
        workers = await world.client.list(LabWorker)
        for worker in workers:
            if worker.status.phase == "Failed":
                await attempt(
                    world, worker.name, lambda w: w.metadata.annotations.update({RETRY_ANNOTATION: str(w.revision)})
                )
        return all(w.status.phase in {"Ready", "ReadyUnlicensed"} and not w.deleting for w in workers)

    await until(as_wished, "all as wished", 60)


async def check(world: WorkersWorld) -> None:
    workers = await world.client.list(LabWorker)
    claimed = sorted(w.status.ec2.instance_id or "" for w in workers)
    await until(lambda: sorted(world.live()) == claimed, f"exactly the claimed instances {claimed} live")
    for worker in workers:
        assert worker.status.ec2.state == "running"
        assert worker.status.cml.identity is not None
        assert worker.status.cml.identity.product_uuid == world.machine(worker).product_uuid
