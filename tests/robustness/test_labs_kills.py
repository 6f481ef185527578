"""A daemon killed between any two steps of a sync or a deletion: what follows makes it good, once.

The daemon is `lrm serve`, told to end like a power cut at a named point. What it left is taken over by a second term,
and judged by what CML and the store then hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from controllers.cml.simulator import Simulator
from controllers.cml.simulator.labs import Lab
from controllers.labs.controller import CRASH_POINTS
from controllers.labs.imports import IMPORT_CRASH_POINTS
from controllers.labs.imports_kind import LabImport, LabImportSpec
from controllers.labs.kind import Operation
from controllers.labs.records import DELETION_CRASH_POINTS, STEP_CRASH_POINT
from controllers.workers.kind import INSTANCE_FINALIZER, LabWorker
from equipment.daemons import DaemonProcess
from equipment.labs_world import FAST, PASSWORD_ENV, LabsWorld, labs_world
from equipment.waiting import until
from lrm.crashpoints import EXIT_CODE
from lrm.devservers import EtcdServer
from lrm.errors import ResourceNotFound
from lrm.resource import ObjectMeta
from storage.etcd import EtcdStorage

RETENTION = 3600


@dataclass
class Scene:
    """A store and a CML that outlive the daemons."""

    daemon: DaemonProcess
    simulator: Simulator
    endpoint: str
    root: str
    monkeypatch: pytest.MonkeyPatch

    @asynccontextmanager
    async def world(self) -> AsyncIterator[LabsWorld]:
        """A term of our own, in this process."""
        storage = EtcdStorage([self.endpoint], root=self.root)
        try:
            async with labs_world(
                self.monkeypatch,
                storage=storage,
                root=self.root,
                simulator=self.simulator,
                labs_topology_retention=RETENTION,
                labs_import_settle=0.5,
            ) as world:
                yield world
        finally:
            await storage.aclose()

    async def killed_at(self, point: str) -> None:
        self.daemon.start(LRM_CRASH_AT=point)
        assert await self.daemon.exit_code() == EXIT_CODE, self.daemon.log()


@pytest.fixture
async def scene(
    server_dir: Path, etcd: EtcdServer, etcd_root: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Scene]:
    daemon = DaemonProcess(
        server_dir,
        endpoint=etcd.endpoint,
        root=etcd_root,
        plugins="equipment.labs_plugin",
        LRM_SECRETS_ALLOW=PASSWORD_ENV,
        LRM_LABS_REFRESH_INTERVAL="3600",
        LRM_LABS_STEP_INTERVAL="0.05",
        LRM_LABS_TOPOLOGY_RETENTION=str(RETENTION),
        **{PASSWORD_ENV: FAST.password},
    )
    async with Simulator.run(FAST) as simulator:
        yield Scene(daemon, simulator, etcd.endpoint, etcd_root, monkeypatch)
        await daemon.end()


async def mirrored(world: LabsWorld, count: int) -> list[Lab]:
    await world.worker()
    labs = [world.machine().add_lab(f"Lab {n}", nodes=1) for n in range(count)]
    await world.sync()
    return labs


async def something_new(world: LabsWorld) -> None:
    await mirrored(world, 3)
    for n in range(5):
        world.machine().add_lab(f"New {n}")


async def something_changed(world: LabsWorld) -> None:
    for lab in await mirrored(world, 5):
        world.edit(lab, title=f"{lab.title} changed")


async def few_gone(world: LabsWorld) -> None:
    for lab in (await mirrored(world, 12))[:3]:
        world.machine().remove(lab)


async def most_gone(world: LabsWorld) -> None:
    for lab in (await mirrored(world, 12))[:7]:
        world.machine().remove(lab)


async def worker_gone(world: LabsWorld) -> None:
    await mirrored(world, 5)
    world.term.lost()  # nobody acts on what follows before the daemon does
    await world.client.delete(await world.get_worker())
    await world.client.remove_finalizer(await world.get_worker(), INSTANCE_FINALIZER)


SYNCS: dict[str, tuple[str, Callable[[LabsWorld], Awaitable[None]]]] = {
    "labs.listed": ("labs.listed", something_new),
    "labs.record-created": ("labs.record-created:3", something_new),
    "labs.record-updated": ("labs.record-updated:2", something_changed),
    "labs.record-marked": ("labs.record-marked:3", most_gone),
    "labs.record-removed": ("labs.record-removed:2", few_gone),
    "labs.records-written": ("labs.records-written", something_new),
    "labs.worker-written": ("labs.worker-written", something_changed),
    "labs.record-forgotten": ("labs.record-forgotten:2", worker_gone),
}


LESS_TELLING = {
    "labs.record-created",
    "labs.records-written",
    "labs.worker-written",
    "labs.wipe-sent",
    "labs.before-delete",
    "labs.import-noted",
    "labs.import-renamed",
    "labs.import-told",
}
"""Left to the soak: their neighbours differ from them by one write."""


def points(names: tuple[str, ...]) -> list[object]:
    return [pytest.param(n, marks=pytest.mark.soak if n in LESS_TELLING else ()) for n in names]


def test_every_crash_point_of_a_sync_is_tried() -> None:
    assert set(SYNCS) == set(CRASH_POINTS)


@pytest.mark.parametrize("point", points(CRASH_POINTS))
async def test_a_sync_killed_at(point: str, scene: Scene) -> None:
    """After the kill and one more sync, the records are what CML has, each change told once."""
    at, prepare = SYNCS[point]
    async with scene.world() as world:
        await prepare(world)
    await scene.killed_at(at)
    async with scene.world() as world:
        if prepare is worker_gone:
            await until(lambda: world.cache.get(LabWorker, "default", "w1") is None)
            assert not await world.records()
            return
        worker = await world.sync()
        if prepare is most_gone:
            missing = [r for r in (await world.records()).values() if r.status.missing_since is not None]
            assert len(missing) == 7, "the half rule holds over a kill"
            for _ in range(4):
                worker = await world.later_sync()
        records = await world.records()
        labs = world.machine().labs
        assert set(records) == set(labs)
        assert {i: r.status.title for i, r in records.items()} == {i: lab.title for i, lab in labs.items()}
        if prepare is something_changed:
            assert {len(r.status.operation_history) for r in records.values()} == {1}
        assert worker.status.labs_count == len(labs)


@pytest.mark.parametrize("point", points(DELETION_CRASH_POINTS))
async def test_a_deletion_killed_at(point: str, scene: Scene) -> None:
    """After the kill the lab goes, then the record, no other lab is touched, and one copy of the topology is kept."""
    async with scene.world() as world:
        labs = await mirrored(world, 2)
        world.machine().force(labs[0], "STARTED")
        world.term.lost()
        await world.client.delete(await world.record(labs[0].id))
    await scene.killed_at(point)
    async with scene.world() as world:
        await until(lambda: len(world.known()) == 1)
        assert set(world.machine().labs) == {labs[1].id} == set(await world.records())
        await world.sync()
        assert set(await world.records()) == {labs[1].id}, "and it does not come back"
        kept = await world.client.list(LabImport)
        assert [(i.spec.title, i.spec.held) for i in kept] == [("Lab 0", True)]


@pytest.mark.parametrize("point", points(IMPORT_CRASH_POINTS))
async def test_an_import_killed_at(point: str, scene: Scene) -> None:
    """However far it had come, one lab comes of it, under its title."""
    async with scene.world() as world:
        await mirrored(world, 1)
        world.term.lost()
        spec = LabImportSpec(worker_ref="w1", title="Mine", topology="lab: {version: 0.2.0}\nnodes: []\nlinks: []")
        await world.client.create(LabImport(metadata=ObjectMeta(name="mine"), spec=spec))
    await scene.killed_at(point)
    async with scene.world() as world:

        async def imported() -> bool:
            return (await world.client.get(LabImport, "default", "mine")).status.phase == "Imported"

        await until(imported)
        assert sorted(lab.title for lab in world.machine().labs.values()) == ["Lab 0", "Mine"]
        made = await world.client.get(LabImport, "default", "mine")
        assert world.machine().labs[made.status.lab_id or ""].title == "Mine"
        mirrored_as = {"Lab 0", "Mine"}
        await until(lambda: {r.status.title for r in world.known()} == mirrored_as, "the records, without a refresh")


async def test_an_operation_killed_after_its_step_was_sent(scene: Scene) -> None:
    """It comes to its end all the same."""
    async with scene.world() as world:
        labs = await mirrored(world, 1)
        world.term.lost()
        operation = Operation(id="1", verb="Start")
        await world.client.update(await world.record(labs[0].id), lambda r: setattr(r.spec, "operation", operation))
    await scene.killed_at(STEP_CRASH_POINT)
    async with scene.world() as world:

        async def ended() -> bool:
            told = (await world.record(labs[0].id)).status.operation
            return told is not None and (told.id, told.result) == ("1", "Succeeded")

        await until(ended)
        assert labs[0].state == "STARTED"


async def test_a_desired_state_killed_after_its_step_was_sent(scene: Scene) -> None:
    """The step is sent again, which CML takes, and the state is reached."""
    async with scene.world() as world:
        labs = await mirrored(world, 1)
        world.term.lost()
        await world.client.update(await world.record(labs[0].id), lambda r: setattr(r.spec, "desired_state", "STARTED"))
    await scene.killed_at(STEP_CRASH_POINT)
    async with scene.world() as world:

        async def reached() -> bool:
            record = await world.record(labs[0].id)
            return record.status.observed_generation == 2 and record.status.state == "STARTED"

        await until(reached, "the state, and the sync that follows it")


@pytest.mark.soak
@pytest.mark.timeout(300)
async def test_a_daemon_killed_at_random_moments_loses_and_invents_nothing(scene: Scene) -> None:
    """Labs come, change and go, records are deleted, and the daemon is killed twenty times meanwhile."""
    rng, now = random.Random(7), asyncio.get_running_loop().time
    async with scene.world() as world:
        await mirrored(world, 30)
        machine, doomed = world.machine(), set[str]()
        world.term.lost()  # from here on only daemons act; we change labs, and delete records
        for _ in range(20):
            scene.daemon.start(LRM_LABS_REFRESH_INTERVAL="0.2")
            end = now() + rng.uniform(1.5, 4.0)
            while now() < end:
                choice, labs = rng.random(), list(machine.labs.values())
                if choice < 0.4 or len(labs) < 10:
                    machine.add_lab(f"random {choice}")
                elif choice < 0.6:
                    machine.remove(rng.choice(labs))
                elif choice < 0.9:
                    machine.force(rng.choice(labs), rng.choice(["STARTED", "STOPPED"]))
                elif world.known():
                    record = rng.choice(world.known())
                    with contextlib.suppress(ResourceNotFound):  # the daemon was quicker
                        await world.client.delete(record)
                        doomed.add(record.spec.lab_id)
                await asyncio.sleep(0.05)
            scene.daemon.process.kill()
    async with scene.world() as world:
        for _ in range(5):
            await world.later_sync()
        await until(lambda: not any(r.deleting for r in world.known()), "the deletions to end", timeout=60)
        records = await world.records()
        assert set(records) == set(machine.labs)
        assert {i: r.status.state for i, r in records.items()} == {i: lab.state for i, lab in machine.labs.items()}
        assert not doomed & set(machine.labs), "what was to be deleted is"
        assert len(doomed) > 5
