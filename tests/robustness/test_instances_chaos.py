"""Random deaths, faults and changes of mind, then peace: each lab instance is where its status says, once, or nowhere.

Two daemons under leases are killed, paused and started anew; workers of three slots each stop and come back; CMLs lose,
spoil and refuse answers; students ask, extend, stop and go. At no revision of the store is more reserved on a worker
than it has. Once it ends: what runs has one lab, at its worker; what is over has none; nothing waits that would fit;
what is reserved is what is placed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from controllers.cml.simulator import Simulator
from controllers.instances.kind import LabInstanceRequest, over, placed
from controllers.instances.phases import Phase
from controllers.workers.kind import LabWorker
from equipment.cml_instances_world import CmlInstancesWorld, cml_instances_world, serves, topology
from equipment.labs_world import FAST, PASSWORD_ENV
from equipment.pair import Pair, a_pair, at_rest, free_locks
from lrm.cache import CacheUpdate
from lrm.devservers import EtcdServer
from lrm.errors import LrmError
from lrm.resource import RETRY_ANNOTATION
from storage.etcd import EtcdStorage

WORKERS = ("w1", "w2", "w3")
SLOTS = 3
MOST = 14
"""Requests at a time: more than there are slots for."""
STUDENTS = ("ann", "bob", "eve", "joe")
FAULTS = ("drop-answer", "drop", "cut", "truncate", "html", "status")
SPEED = {
    "LRM_LABS_REFRESH_INTERVAL": "1",
    "LRM_LABS_IDLE_INTERVAL": "1",
    "LRM_LABS_STEP_INTERVAL": "0.1",
    "LRM_INSTANCES_STEP_INTERVAL": "0.05",
    "LRM_INSTANCES_REST_INTERVAL": "0.5",
    "LRM_INSTANCES_RETRY_DELAY": "0.1",
    "LRM_INSTANCES_RETRIES": "50",
    "LRM_INSTANCES_MOST_PER_STUDENT": "0",
    "LRM_SECRETS_ALLOW": PASSWORD_ENV,
    PASSWORD_ENV: FAST.password,
}


class Scene:
    """What happens, and what must never be seen meanwhile."""

    def __init__(self, world: CmlInstancesWorld, pair: Pair, chance: random.Random) -> None:
        self.world = world
        self.pair = pair
        self.chance = chance
        self.told: list[str] = []
        """What was done, for whoever reads a failure."""
        self.overcommitted: list[str] = []
        self._made = 0
        world.labs.cache.subscribe(self._hear)

    def _hear(self, update: CacheUpdate) -> None:
        for change in update.changes:
            worker = change.new.resource if change.new else None
            if isinstance(worker, LabWorker):
                slots = sum(entry.slots for entry in worker.status.allocations.values())
                if slots > worker.spec.max_concurrent_labs:
                    self.overcommitted.append(f"{worker.name}: {slots} slots at revision {worker.revision}")

    async def requests(self) -> list[LabInstanceRequest]:
        return await self.world.labs.client.list(LabInstanceRequest, "default")

    async def trouble(self) -> None:
        """One thing that goes wrong, or one wish."""
        act = self.chance.choices(
            (self.ask, self.change, self.hurt_cml, self.hurt_daemon, self.hurt_worker), (30, 25, 20, 15, 10)
        )[0]
        try:
            await act()
        except LrmError as error:  # what a user is told who comes too late
            self.told.append(f"refused: {error}")

    async def ask(self) -> None:
        if len(await self.requests()) >= MOST:
            return
        self._made += 1
        name = f"r{self._made}"
        await self.make(name, self.chance.choice(("Never", "OnFailure")))
        self.told.append(f"{name} asked")

    async def make(self, name: str, restart_policy: str = "Never") -> None:
        """One node each: slots are what there is too little of."""
        student = f"{self.chance.choice(STUDENTS)}@example.edu"
        template = {"topology": topology(1)}
        await self.world.make(name, studentEmail=student, restartPolicy=restart_policy, labTemplate=template)

    async def change(self) -> None:
        found = await self.requests()
        if not found:
            return
        request, client = self.chance.choice(found), self.world.labs.client
        what = self.chance.choice(("stop", "extend", "delete", "retry"))
        self.told.append(f"{request.name} in {request.phase}: {what}")
        if what == "stop":
            await client.update(request, lambda r: setattr(r.spec, "desired_phase", "Stopped"))
        elif what == "extend":
            await client.update(request, lambda r: setattr(r.spec, "duration_minutes", r.spec.duration_minutes + 5))
        elif what == "retry":
            value = str(self.chance.random())
            await client.update(request, lambda r: r.metadata.annotations.update({RETRY_ANNOTATION: value}))
        else:
            await client.delete(request)

    async def hurt_cml(self) -> None:
        worker, kind = self.chance.choice(WORKERS), self.chance.choice(FAULTS)
        method = self.chance.choice(("GET", "POST", "PUT", "DELETE"))
        self.world.labs.fault(kind, worker, method=method, times=self.chance.randint(1, 4))
        self.told.append(f"{worker}: {kind} of {method}")

    async def hurt_daemon(self) -> None:
        self.told.append(self.pair.hurt())

    async def hurt_worker(self) -> None:
        """Its instance is stopped, or comes back; what was in its CML is still there then."""
        name = self.chance.choice(WORKERS)
        worker = await self.world.labs.get_worker(name)
        if worker.status.phase == "Stopped":
            await self.bring_back(name)
            return
        await self.world.labs.change_worker(self._stopped, name)
        self.told.append(f"{name} stopped")

    def _stopped(self, worker: LabWorker) -> None:
        now = self.world.labs.clock.now()
        worker.status.enter("Stopped", "Test", now)
        worker.status.set_condition("Ready", False, "Stopped", "it is stopped", now=now)

    async def bring_back(self, name: str) -> None:
        url, now = self.world.labs.simulator.url_of(self.world.labs.machine(name).name), self.world.labs.clock.now()

        def back(worker: LabWorker) -> None:
            for phase in ("Starting", "ReadyUnlicensed"):
                worker.status.enter(phase, "Test", now)
            serves(worker, url, now)

        await self.world.labs.change_worker(back, name)
        self.told.append(f"{name} serves again")

    async def peace(self) -> None:
        """Everything runs, and nothing is spoilt any more."""
        self.world.labs.simulator.faults.clear()
        self.pair.heal()
        for name in WORKERS:
            if (await self.world.labs.get_worker(name)).status.phase == "Stopped":
                await self.bring_back(name)

    # What must hold afterwards

    async def wrong(self) -> list[str]:
        """What is not as it should be once everything has come to rest."""
        requests = await self.requests()
        workers = {name: await self.world.labs.get_worker(name) for name in WORKERS}
        found = [
            f"{r.name} is {r.phase}, deleting: {r.deleting}"
            for r in requests
            if r.deleting or (r.phase not in (Phase.RUNNING, Phase.PENDING) and not (over(r) and not placed(r)))
        ]
        labs = Counter((lab.title, name) for name in WORKERS for lab in self.world.labs.machine(name).labs.values())
        wanted = Counter(
            (r.outside_name, r.status.worker_ref.name) for r in requests if r.status.worker_ref is not None
        )
        if labs != wanted:
            found.append(f"labs beside those of requests: {labs - wanted}, and none for {wanted - labs}")
        for name, worker in workers.items():
            there = {r.uid for r in requests if r.status.worker_ref and r.status.worker_ref.name == name}
            if set(worker.status.allocations) != there:
                found.append(f"reserved on {name}: {sorted(worker.status.allocations)}, placed {sorted(there)}")
        free = sum(SLOTS - len(worker.status.allocations) for worker in workers.values())
        waiting = [r.name for r in requests if r.phase == Phase.PENDING]
        if free and waiting:
            found.append(f"{waiting} wait beside {free} free slots")
        return found

    async def settled(self) -> None:
        await at_rest(self.wrong, self.told, self.pair, 120)


@asynccontextmanager
async def chaos(
    folder: Path, etcd: EtcdServer, root: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> AsyncIterator[Scene]:
    chance = random.Random(seed)
    async with AsyncExitStack() as stack:
        simulator = await stack.enter_async_context(Simulator.run(FAST))
        storage = EtcdStorage([etcd.endpoint], root=root)
        stack.push_async_callback(storage.aclose)
        world = await stack.enter_async_context(
            cml_instances_world(monkeypatch, storage=storage, root=root, simulator=simulator)
        )
        # The world of this process only looks.
        world.term.lost()
        world.labs.term.lost()
        await free_locks(storage, root)
        for name in WORKERS:
            await world.worker(name)
            worker = await world.labs.get_worker(name)
            await world.labs.client.update(worker, lambda w: setattr(w.spec, "max_concurrent_labs", SLOTS))
        plugins = "equipment.instances_plugin"
        pair = await stack.enter_async_context(a_pair(folder, etcd, root, chance, plugins=plugins, **SPEED))
        yield Scene(world, pair, chance)


@pytest.mark.parametrize("seed", [3, *(pytest.param(s, marks=pytest.mark.soak) for s in range(20, 40))])
async def test_each_instance_has_one_lab_or_none_once_trouble_ends(
    server_dir: Path, etcd: EtcdServer, etcd_root: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    async with chaos(server_dir, etcd, etcd_root, monkeypatch, seed) as scene:
        for name in ("a", "b", "c", "d", "e", "f"):
            await scene.make(name)
        await scene.world.until_phase("Running", "a", timeout=60)
        for _ in range(60):
            await scene.trouble()
            # Not waiting for anything: the moment is the point.
            await scene.world.labs.clock.sleep(scene.chance.uniform(0, 0.4))
        await scene.peace()
        await scene.settled()
        for request in await scene.requests():
            if not request.deleting:
                await scene.world.labs.client.delete(request)
        await scene.settled()
        assert await scene.requests() == []
        assert not scene.overcommitted
