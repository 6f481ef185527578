"""The container runtime alone, on a real engine: a test plays the controller, step by step.

Everything is of an installation that no other test has, and nothing of it may be left at the end.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog

from controllers.containers.documents import INSTALLATION_LABEL, UID_LABEL
from controllers.containers.runtime import ContainerRuntime
from controllers.instances.kind import (
    INSTANCES,
    LAB_INSTANCE_REQUEST,
    LabInstanceRequest,
    LabInstanceRequestSpec,
    LabInstanceRequestStatus,
    WorkerRef,
)
from controllers.instances.runtime import NotNow, Sighting, State
from controllers.instances.settings import InstanceSettings
from equipment.engine import Engine
from equipment.waiting import until
from lrm.cache import Cache
from lrm.client import Client
from lrm.clock import WallJumps
from lrm.controller import Context, Hints, Key
from lrm.election import StaticElection, StaticTerm
from lrm.events import Events, Recorder
from lrm.registry import Registry
from lrm.resource import ObjectMeta
from storage.clock import SystemClock
from storage.memory import MemoryStorage


@dataclass
class ContainersWorld:
    """See the module."""

    engine: Engine
    runtime: ContainerRuntime
    installation: str
    client: Client
    cache: Cache
    ctx: Context
    term: StaticTerm
    told: list[Key] = field(default_factory=list)
    """Hints, in the order of their coming."""

    def request(self, name: str = "lab", *, attempt: int = 1, **template: Any) -> LabInstanceRequest:
        """A request that has just got its place; `template` beside the image, `spec_` fields of the spec."""
        spec = {k.removeprefix("spec_"): template.pop(k) for k in tuple(template) if k.startswith("spec_")}
        template.setdefault("image", self.engine.busybox_image)
        values = {"labTemplate": template, "studentEmail": "ann@example.edu", "durationMinutes": 60, **spec}
        request = LabInstanceRequest(
            metadata=ObjectMeta(name=name, namespace="default", uid=str(uuid.uuid4())),
            spec=LabInstanceRequestSpec.model_validate(values),
        )
        request.status = LabInstanceRequestStatus(
            attempt=attempt,
            worker_ref=WorkerRef(kind="Engine", name="docker"),
            provisioning_started_at=self.ctx.clock.now(),
        )
        return request

    async def provision(self, request: LabInstanceRequest, seconds: float = 60) -> Sighting:
        """Step until it is more than starting; raises what the runtime does, but `NotNow`."""

        async def step() -> Sighting | None:
            try:
                seen = await self.runtime.provision(request, self.ctx)
            except NotNow:
                return None
            return None if seen.state is State.STARTING else seen

        seen = await until(step, f"{request.name} runs", timeout=seconds)
        assert seen is not None
        return seen

    async def clean(self, request: LabInstanceRequest, seconds: float = 60) -> None:
        await until(lambda: self.runtime.clean(request, self.ctx), f"nothing is left of {request.name}", seconds)
        assert self.engine.leftovers(f"{UID_LABEL}={request.uid}") == []

    def inspect(self, request: LabInstanceRequest) -> dict[str, Any]:
        """The engine's own word on its container."""
        return dict(self.engine.client.api.inspect_container(request.outside_name))

    def hinted(self, request: LabInstanceRequest) -> bool:
        return (request.namespace, request.name) in self.told


def registry_at(root: str = "/lrm") -> Registry:
    return Registry((LAB_INSTANCE_REQUEST,), root=root)


@asynccontextmanager
async def containers_world(
    engine: Engine, *, installation: str = "", host: str = "", **settings: Any
) -> AsyncIterator[ContainersWorld]:
    """An open runtime whose mirror is current; `host` to reach the engine through something else."""
    ours, clock, store, registry = installation or str(uuid.uuid4()), SystemClock(), MemoryStorage(), registry_at()
    cache, client, hints = Cache(store, registry, clock), Client(store, registry, clock, owner=INSTANCES), Hints()
    values: dict[str, Any] = {"docker_host": host or engine.host, "docker_stop_grace": 1.0, **settings}
    term = await StaticElection(store, clock, root="/lrm", lock_name=INSTANCES, identity="test").acquire()
    ctx = Context(
        client=client,
        cache=cache,
        clock=clock,
        term=term,
        observe_only=False,
        renew_deadline=10.0,
        jumps=WallJumps(clock),
        bound_log=structlog.get_logger(),
        events=Recorder(Events(store, clock, root="/lrm"), "test", term),
    )
    async with ContainerRuntime(InstanceSettings(**values), ours, hints, clock) as runtime:
        world = ContainersWorld(engine, runtime, ours, client, cache, ctx, term)
        hints.listen(world.told.append)
        async with asyncio.TaskGroup() as tasks:
            following = tasks.create_task(cache.run())
            await until(lambda: runtime.told() is not None, "the engine is followed")
            try:
                yield world
            finally:
                following.cancel()
                _clear(engine, ours)


def _clear(engine: Engine, installation: str) -> None:
    """Whatever a failed test has left, so that others do not see it."""
    chosen = {"filters": {"label": f"{INSTALLATION_LABEL}={installation}"}}
    for container in engine.client.containers.list(all=True, **chosen):
        container.remove(force=True, v=True)
    for network in engine.client.networks.list(**chosen):
        network.remove()
