"""The mirror of labs under random deaths, lies and changes of mind: no record goes whose lab is there.

Two daemons under leases are killed, paused and started anew; CMLs lose, spoil and refuse answers, tell half of their
labs or none, forget that the session is an admin's, or are another CML; students make, change, start and remove labs
in CML, people delete, stop and import them through lrm. At no moment is a record gone whose lab is still in CML. Once
it ends: every lab has its record, as it is, and every record its lab; each import has one lab, or none and says why.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from controllers.cml.simulator import Simulator
from controllers.cml.simulator.labs import Lab
from controllers.labs.imports_kind import LabImport, LabImportSpec
from controllers.labs.kind import LabRecord, Operation
from controllers.workers.kind import LabWorker
from equipment.cml_instances_world import topology
from equipment.labs_world import FAST, PASSWORD_ENV, LabsWorld, labs_world
from equipment.pair import Pair, a_pair, at_rest, free_locks
from lrm.cache import CacheUpdate
from lrm.devservers import EtcdServer
from lrm.errors import LrmError, ResourceNotFound
from lrm.resource import RECONCILE_ANNOTATION, ObjectMeta
from storage.etcd import EtcdStorage

WORKERS = ("w1", "w2", "w3")
SPOILING = ("drop-answer", "drop", "cut", "truncate", "html", "status")
LIES = ("empty", "half", "not-admin")
SLOW_LIE = "identity"
"""Who is another CML is asked once a minute."""
SAMPLE = 3
SPEED = {
    "LRM_LABS_REFRESH_INTERVAL": "1",
    "LRM_LABS_IDLE_INTERVAL": "1",
    "LRM_LABS_STEP_INTERVAL": "0.1",
    "LRM_LABS_IMPORT_SETTLE": "0.5",
    "LRM_SECRETS_ALLOW": PASSWORD_ENV,
    PASSWORD_ENV: FAST.password,
}


class Scene:
    """What happens, and what must never be seen meanwhile."""

    def __init__(self, world: LabsWorld, pair: Pair, chance: random.Random, lies: Sequence[str]) -> None:
        self.world = world
        self._lies = lies
        self.pair = pair
        self.chance = chance
        self.told: list[str] = []
        """What was done, for whoever reads a failure."""
        self.lost: list[str] = []
        """Records that went before their labs."""
        self.removed = 0
        self._made = 0
        world.cache.subscribe(self._hear)

    def _hear(self, update: CacheUpdate) -> None:
        for change in update.changes:
            record = change.old.resource if change.old and change.new is None else None
            if isinstance(record, LabRecord):
                self.removed += 1
                if record.spec.lab_id in self.world.machine(record.spec.worker_ref).labs:
                    self.lost.append(f"{record.name} after {self.told}")

    def a_lab(self) -> tuple[str, Lab] | None:
        worker = self.chance.choice(WORKERS)
        labs = list(self.world.machine(worker).labs.values())
        return (worker, self.chance.choice(labs)) if labs else None

    async def trouble(self) -> None:
        """One thing that goes wrong, or one wish."""
        act = self.chance.choices(
            (self.students, self.order, self.import_lab, self.spoil, self.lie, self.hurt_daemon),
            (30, 20, 8, 15, 15, 12),
        )[0]
        try:
            await act()
        except LrmError as error:  # what a user is told who comes too late
            self.told.append(f"refused: {error}")

    async def students(self) -> None:
        """What is done in CML itself."""
        found, what = self.a_lab(), self.chance.choice(("add", "edit", "start", "remove"))
        if found is None or what == "add":
            worker = self.chance.choice(WORKERS)
            self._made += 1
            self.world.machine(worker).add_lab(f"Lab {self._made}", nodes=self.chance.randint(0, 2))
            self.told.append(f"{worker}: a lab added")
            return
        worker, lab = found
        self.told.append(f"{worker}: {what} {lab.id}")
        if what == "edit":
            self.world.edit(lab, worker, title=f"{lab.title[:40]}'")
        elif what == "start":
            self.world.machine(worker).force(lab, "STARTED")
        else:
            self.world.machine(worker).remove(lab)

    async def order(self) -> None:
        """What is asked of lrm for a lab that it knows."""
        records = await self.world.client.list(LabRecord, "default")
        if not records:
            return
        record, what = self.chance.choice(records), self.chance.choice(("delete", "start", "stop", "wipe", "desired"))
        self.told.append(f"{record.name}: {what}")
        if what == "delete":
            await self.world.client.delete(record)
        elif what == "desired":
            state = self.chance.choice(("STARTED", "STOPPED", "DEFINED_ON_CORE"))
            await self.world.client.update(record, lambda r: setattr(r.spec, "desired_state", state))
        else:
            operation = Operation.model_validate({"id": str(self.chance.random()), "verb": what.capitalize()})
            await self.world.client.update(record, lambda r: setattr(r.spec, "operation", operation))

    async def import_lab(self) -> None:
        self._made += 1
        spec = LabImportSpec(
            worker_ref=self.chance.choice(WORKERS), title=f"Import {self._made}", topology=topology(1), ttl_seconds=600
        )
        await self.world.client.create(LabImport(metadata=ObjectMeta(name=f"i{self._made}"), spec=spec))
        self.told.append(f"i{self._made} to {spec.worker_ref}")

    async def spoil(self) -> None:
        worker, kind = self.chance.choice(WORKERS), self.chance.choice(SPOILING)
        method = self.chance.choice(("GET", "GET", "POST", "PUT", "DELETE"))
        self.world.fault(kind, worker, method=method, times=self.chance.randint(1, 4))
        self.told.append(f"{worker}: {kind} of {method}")

    async def lie(self) -> None:
        """Until the next one about the same worker, or peace."""
        worker, kind = self.chance.choice(WORKERS), self.chance.choice(self._lies)
        machine = self.world.machine(worker)
        self.world.simulator.faults.clear(instance=machine.name)
        how = {"path": self.chance.choice(("/labs", "/populate_lab_tiles"))} if kind in ("empty", "half") else {}
        self.world.fault(kind, worker, **how)
        self.told.append(f"{worker}: {kind} {how}")

    async def hurt_daemon(self) -> None:
        self.told.append(self.pair.hurt())

    async def peace(self) -> None:
        """Nothing is spoilt any more, both daemons run, and whoever waits to try again is told."""
        self.world.simulator.faults.clear()
        self.pair.heal()
        now = {RECONCILE_ANNOTATION: str(self.chance.random())}
        for kind in (LabRecord, LabImport, LabWorker):
            for found in await self.world.client.list(kind, "default"):
                with contextlib.suppress(ResourceNotFound):
                    await self.world.client.update(found, lambda r: r.metadata.annotations.update(now))

    # What must hold afterwards

    async def wrong(self) -> list[str]:
        """What is not as it should be once everything has come to rest."""
        records = await self.world.client.list(LabRecord, "default")
        orders = await self.world.client.list(LabImport, "default")
        found = [f"{r.name} is being deleted" for r in records if r.deleting]
        for name in WORKERS:
            labs = self.world.machine(name).labs
            mirrored = {r.spec.lab_id: r for r in records if r.spec.worker_ref == name}
            if set(labs) != set(mirrored):
                found.append(f"{name}: labs {sorted(labs)}, records {sorted(mirrored)}")
            for lab_id in labs.keys() & mirrored.keys():
                lab, status = labs[lab_id], mirrored[lab_id].status
                is_, told = (lab.title, lab.state, len(lab.nodes)), (status.title, status.state, status.node_count)
                if is_ != told or status.missing_since is not None:
                    found.append(f"{lab_id} is {is_}, told {told}, missing since {status.missing_since}")
        titles = Counter(lab.title for name in WORKERS for lab in self.world.machine(name).labs.values())
        for order in orders:
            title = order.spec.title
            if order.status.phase not in ("Imported", "Failed"):
                found.append(f"{order.name} is {order.status.phase}")
            if sum(count for told, count in titles.items() if told.rstrip("'") == title) > 1:
                found.append(f"{order.name} has several labs")
        return found

    async def settled(self) -> None:
        await at_rest(self.wrong, self.told, self.pair, 200)  # a list that counts is a minute after the one before


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
            labs_world(monkeypatch, storage=storage, root=root, simulator=simulator)
        )
        world.term.lost()  # the world of this process only looks
        await free_locks(storage, root)
        for name in WORKERS:
            await world.worker(name)
            for number in range(8):
                world.machine(name).add_lab(f"Lab of {name} {number}", nodes=1)
        plugins = "equipment.labs_plugin"
        pair = await stack.enter_async_context(a_pair(folder, etcd, root, chance, plugins=plugins, **SPEED))
        yield Scene(world, pair, chance, LIES if seed == SAMPLE else (*LIES, SLOW_LIE))


@pytest.mark.parametrize("seed", [SAMPLE, *(pytest.param(s, marks=pytest.mark.soak) for s in range(20, 30))])
async def test_no_record_goes_whose_lab_is_there_and_the_mirror_is_exact_once_trouble_ends(
    server_dir: Path, etcd: EtcdServer, etcd_root: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    async with chaos(server_dir, etcd, etcd_root, monkeypatch, seed) as scene:
        await scene.settled()
        for _ in range(60):
            await scene.trouble()
            # Not waiting for anything: the moment is the point.
            await scene.world.clock.sleep(scene.chance.uniform(0, 0.4))
        await scene.peace()
        await scene.settled()
        await scene.world.cache.barrier(30)
        assert scene.removed
        assert not scene.lost
