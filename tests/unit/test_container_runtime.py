"""The container runtime on an engine whose answers the test writes: what a real one shows only in a bad hour."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from controllers.containers.runtime import ContainerRuntime
from controllers.instances.kind import LabInstanceRequest, WorkerRef
from controllers.instances.phases import Reasons
from controllers.instances.runtime import LabFailed, NotNow, State
from controllers.instances.settings import InstanceSettings
from equipment.scripted_engine import INSTALLATION, ScriptedEngine, scripted_engine
from equipment.waiting import until
from lrm.controller import Hints
from lrm.testing import VirtualClock


@dataclass
class Scene:
    script: ScriptedEngine
    runtime: ContainerRuntime
    clock: VirtualClock

    @property
    def ctx(self) -> Any:
        return SimpleNamespace(clock=self.clock, check_leading=lambda *_: None)

    async def exchange(self, engine: str) -> None:
        """Another engine takes this one's address."""
        self.script.id = engine
        self.script.containers.clear()
        self.script.end_streams()
        await self.follow()

    async def follow(self) -> None:
        async def step() -> bool:
            await self.clock.advance(1)
            told = self.runtime.told()
            return told is not None and told.id == self.script.id

        await until(step, f"{self.script.id} is followed")


@pytest.fixture
async def scene(server_dir: Path) -> AsyncIterator[Scene]:
    clock = VirtualClock()
    async with (
        scripted_engine(server_dir) as (script, host),
        ContainerRuntime(InstanceSettings(docker_host=host), INSTALLATION, Hints(), clock) as runtime,
    ):
        scene = Scene(script, runtime, clock)
        await scene.follow()
        yield scene


def running(engine: str = "engine-1") -> LabInstanceRequest:
    """A lab that runs in the container `c`, if there is one."""
    request = LabInstanceRequest.model_validate(
        {
            "metadata": {"name": "lab", "namespace": "default", "uid": "uid"},
            "spec": {"labTemplate": "lab:1", "studentEmail": "ann@example.edu", "durationMinutes": 60},
        }
    ).thaw()
    request.status.phase, request.status.attempt = "Running", 1
    request.status.worker_ref = WorkerRef(kind="Engine", name="docker", uid=engine)
    return request


async def test_what_another_engine_has_says_nothing_of_a_lab(scene: Scene) -> None:
    """A wiped one, or that of another daemon's host: nothing is lost or made until the right one is back."""
    scene.script.put("c")
    await scene.exchange("engine-2")
    for step in (scene.runtime.provision, scene.runtime.look, scene.runtime.clean):
        with pytest.raises(NotNow, match=r"engine-1.*engine-2") as raised:
            await step(running(), scene.ctx)
        assert raised.value.reason == Reasons.WORKER_AWAY
    with pytest.raises(NotNow, match="same engine"):
        await anext(scene.runtime.logs(running()))
    with pytest.raises(LabFailed):
        await scene.runtime.look(running("engine-2"), scene.ctx)
    assert await scene.runtime.clean(running("engine-2"), scene.ctx)
    assert await scene.runtime.clean(running(""), scene.ctx), "placed before engines were told apart"
    await scene.exchange("engine-1")
    scene.script.put("c")
    assert (await scene.runtime.look(running(), scene.ctx)).state is State.RUNNING


@pytest.mark.parametrize("step", ["look", "clean"])
async def test_an_engine_that_changes_behind_its_address_proves_nothing(scene: Scene, step: str) -> None:
    """An address that moves to another machine leaves the stream of events silent for a while, not ended."""
    scene.script.id = "engine-2"
    with pytest.raises(NotNow, match="engine-2"):
        await getattr(scene.runtime, step)(running(), scene.ctx)
