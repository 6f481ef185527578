"""Lab instances on CML while daemons die and answers get lost: one lab for each, and none after its end.

The daemon is `lrm serve`, told to end like a power cut at a named point; what it left is taken over by a second term.
Lost and spoilt answers need no process: the controller that asked goes on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from controllers.cml.simulator import Simulator
from controllers.instances.cml_runtime import MAKING_CRASH_POINTS, REMOVING_CRASH_POINTS
from controllers.instances.steps import CRASH_POINTS
from equipment.cml_instances_world import CmlInstancesWorld, cml_instances_world
from equipment.daemons import DaemonProcess
from equipment.labs_world import FAST, PASSWORD_ENV
from equipment.waiting import until
from lrm.crashpoints import EXIT_CODE
from lrm.devservers import EtcdServer
from storage.etcd import EtcdStorage

MAKING = (*CRASH_POINTS[: CRASH_POINTS.index("instances.ending")], *MAKING_CRASH_POINTS)
REMOVING = (*CRASH_POINTS[CRASH_POINTS.index("instances.ending") :], *REMOVING_CRASH_POINTS)
SAMPLE = {"instances.cml-imported", "instances.cml-wiped", "instances.cleaned"}


@dataclass
class Scene:
    """A store and a CML that outlive the daemons."""

    daemon: DaemonProcess
    simulator: Simulator
    endpoint: str
    root: str
    monkeypatch: pytest.MonkeyPatch

    @asynccontextmanager
    async def world(self) -> AsyncIterator[CmlInstancesWorld]:
        """Terms of our own, in this process."""
        storage = EtcdStorage([self.endpoint], root=self.root)
        try:
            async with cml_instances_world(
                self.monkeypatch, storage=storage, root=self.root, simulator=self.simulator
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
        plugins="equipment.instances_plugin",
        LRM_SECRETS_ALLOW=PASSWORD_ENV,
        LRM_LABS_REFRESH_INTERVAL="3600",
        LRM_INSTANCES_STEP_INTERVAL="0.05",
        **{PASSWORD_ENV: FAST.password},
    )
    async with Simulator.run(FAST) as simulator:
        yield Scene(daemon, simulator, etcd.endpoint, etcd_root, monkeypatch)
        await daemon.end()


def nobody_leads(world: CmlInstancesWorld) -> None:
    """Nobody acts on what follows before the daemon does."""
    world.term.lost()
    world.labs.term.lost()


async def nothing_is_left(world: CmlInstancesWorld) -> None:
    """No lab, and no place kept for one."""
    assert not world.labs.machine().labs

    async def free() -> bool:
        return not (await world.labs.get_worker()).status.allocations

    await until(free, "the place to be given back", 30)


def sampled(points: tuple[str, ...]) -> list[object]:
    return [pytest.param(p, marks=() if p in SAMPLE else pytest.mark.soak) for p in points]


@pytest.mark.parametrize("point", sampled(MAKING))
async def test_the_making_of_a_lab_killed_at(point: str, scene: Scene) -> None:
    """However far it had come, one lab runs, and nothing is left of it afterwards."""
    async with scene.world() as world:
        await world.worker()
        nobody_leads(world)
        await world.make()
    await scene.killed_at(point)
    async with scene.world() as world:
        running = await world.until_phase("Running")
        assert [lab.id for lab in world.titled(running)] == [running.status.cml_lab_id]
        assert running.status.attempt == 1
        await world.stop()
        await world.until_phase("Completed")
        await nothing_is_left(world)


@pytest.mark.parametrize("point", sampled(REMOVING))
async def test_the_removing_of_a_lab_killed_at(point: str, scene: Scene) -> None:
    """However far it had come, it is completed, nothing is left, and no other lab was touched."""
    async with scene.world() as world:
        await world.worker()
        other = world.labs.machine().add_lab("a student's own", nodes=1, running=True)
        await world.running()
        nobody_leads(world)
        await world.stop()
    await scene.killed_at(point)
    async with scene.world() as world:
        await world.until_phase("Completed")
        assert list(world.labs.machine().labs.values()) == [other]
        assert other.state == "STARTED"
        await world.delete()
        await world.gone()
        world.labs.machine().remove(other)
        await nothing_is_left(world)


CALLS = {
    "list": ("GET", "/labs"),
    "tiles": ("GET", "/populate_lab_tiles"),
    "import": ("POST", "/import"),
    "start": ("PUT", "/labs/*/start"),
    "elements": ("GET", "/labs/*/lab_element_state"),
    "converged": ("GET", "/labs/*/check_if_converged"),
    "state": ("GET", "/labs/*/state"),
    "stop": ("PUT", "/labs/*/stop"),
    "wipe": ("PUT", "/labs/*/wipe"),
    "delete": ("DELETE", "/labs/*"),
}
FAULTS = ("drop-answer", "drop", "cut", "truncate", "html", "status")
TELLING = {("import", "truncate"), ("import", "status"), ("list", "truncate"), ("state", "html"), ("delete", "cut")}
"""What is left in of the matrix; a lost answer to each step is tried with the runtime itself."""


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        pytest.param(call, kind, marks=() if (call, kind) in TELLING else pytest.mark.soak)
        for call in CALLS
        for kind in FAULTS
    ],
)
async def test_one_lab_lives_and_ends_though_an_answer_is_spoilt(
    call: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was done of it, and more often than a read is tried in one call: one lab, then none."""
    method, path = CALLS[call]
    async with cml_instances_world(monkeypatch) as world:
        await world.worker()
        hurt = world.labs.fault(kind, method=method, path=path, times=4 if method == "GET" else 2)
        await world.make()
        running = await world.until_phase("Running", timeout=60)
        await until(lambda: len(world.titled(running)) == 1, "one survivor", 60)
        await world.stop()
        await world.until_phase("Completed", timeout=60)
        assert hurt.hits
        await nothing_is_left(world)
