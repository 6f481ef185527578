"""Lab instances on simulated CMLs: the labs' world, and in it the instances' controller, the CML runtime and strays.

Workers are put there ready-made, as in the labs' world; all else is the real thing, on real time with short intervals.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pytest

from controllers.cml.simulator.labs import Lab
from controllers.instances.allocations import Allocations
from controllers.instances.cml_runtime import CmlRuntime
from controllers.instances.controller import InstancesController
from controllers.instances.fetches import Fetches
from controllers.instances.kind import (
    INSTANCES,
    LabInstanceRequest,
    LabInstanceRequestSpec,
)
from controllers.instances.marks import notes_for
from controllers.instances.placing import Placing
from controllers.instances.settings import InstanceSettings
from controllers.instances.strays import StrayLabs
from controllers.workers.kind import LabWorker
from controllers.workers.status import Capacity
from equipment.labs_world import INSTALLATION, LabsWorld, labs_world
from equipment.waiting import until
from lrm.controller import Hints
from lrm.election import StaticElection, StaticTerm
from lrm.errors import ResourceNotFound
from lrm.reconcile import Runner
from lrm.resource import ObjectMeta


def topology(nodes: int = 2, *, notes: str = "", **extra: Any) -> str:
    """So many routers, an external connector, and no link."""
    lab: dict[str, Any] = {"version": "0.3.0", "title": "as its author calls it", "notes": notes}
    kinds = ["iosv"] * nodes + ["external_connector"]
    made = [
        {"id": f"n{n}", "label": f"r{n}", "x": n, "y": 0, "node_definition": kind, "interfaces": []}
        for n, kind in enumerate(kinds)
    ]
    return json.dumps({"lab": lab, "nodes": made, "links": [], **extra})


def serves(worker: LabWorker, api_url: str, now: datetime) -> None:
    """What the workers' controller says of a worker that takes labs."""
    worker.status.cml.api_url = api_url
    worker.status.capacity = Capacity(cpu=48, memory=192 * 1024**3, nodes=200, slots=20)
    worker.status.set_condition("Ready", True, "Serving", "it serves", now=now)


@dataclass
class CmlInstancesWorld:
    """See the module."""

    labs: LabsWorld
    runner: Runner[LabInstanceRequest]
    strays: StrayLabs
    term: StaticTerm

    async def worker(self, name: str = "w1") -> None:
        """One that serves, whose CML says where it is."""
        await self.labs.worker(name)
        url = self.labs.simulator.url_of(self.labs.machine(name).name)
        await self.labs.change_worker(lambda w: serves(w, url, self.labs.clock.now()), name)

    async def make(self, name: str = "a", **spec: Any) -> LabInstanceRequest:
        template = {} if "labTemplate" in spec else {"labTemplate": {"topology": topology()}}
        wanted = LabInstanceRequestSpec.model_validate(
            {"studentEmail": "ann@example.edu", "durationMinutes": 60, **template, **spec}
        )
        return await self.labs.client.create(LabInstanceRequest(metadata=ObjectMeta(name=name), spec=wanted))

    async def get(self, name: str = "a") -> LabInstanceRequest:
        return await self.labs.client.get(LabInstanceRequest, "default", name)

    async def until_phase(self, phase: str, name: str = "a", timeout: float = 30.0) -> LabInstanceRequest:
        async def there() -> LabInstanceRequest | None:
            found = await self.get(name)
            return found if found.status.phase == phase else None

        found = await until(there, f"phase {phase} of {name}", timeout)
        assert found is not None
        return found

    async def until_told(self, kind: str, part: str, name: str = "a", timeout: float = 30.0) -> LabInstanceRequest:
        """Until a condition's reason or message has `part` in it."""

        async def told() -> LabInstanceRequest | None:
            found = await self.get(name)
            condition = found.status.condition(kind)
            return found if condition and part in f"{condition.reason}: {condition.message}" else None

        try:
            found = await until(told, "", timeout)
        except AssertionError:
            conditions = [c.wire() for c in (await self.get(name)).status.conditions]
            raise AssertionError(f"no {kind} of {name} that tells of {part!r}: {conditions}") from None
        assert found is not None
        return found

    async def running(self, name: str = "a", **spec: Any) -> LabInstanceRequest:
        """One that runs, and whose lab has a record."""
        await self.make(name, **spec)
        found = await self.until_phase("Running", name)
        await self.labs.sync()
        return found

    async def stop(self, name: str = "a") -> None:
        await self.labs.client.update(await self.get(name), lambda r: setattr(r.spec, "desired_phase", "Stopped"))

    async def delete(self, name: str = "a") -> None:
        await self.labs.client.delete(await self.get(name))

    async def gone(self, name: str = "a", timeout: float = 30.0) -> None:
        async def absent() -> bool:
            try:
                await self.get(name)
            except ResourceNotFound:
                return True
            return False

        await until(absent, f"the end of {name}", timeout)

    def titled(self, request: LabInstanceRequest, worker: str = "w1") -> list[Lab]:
        """The labs in a CML that bear the request's title."""
        return [lab for lab in self.labs.machine(worker).labs.values() if lab.title == request.outside_name]

    def copy_of(self, request: LabInstanceRequest, worker: str = "w1", installation: str = INSTALLATION) -> Lab:
        """Another lab of it, as a late import leaves one."""
        notes = notes_for(request, installation)
        return self.labs.machine(worker).add_lab(request.outside_name, nodes=1, notes=notes)

    async def look_for_strays(self) -> None:
        """One look, on a sync of a moment ago."""
        await self.labs.sync()
        await self.strays.look(self.term)

    @property
    def looks(self) -> int:
        """How often the controller has reconciled anything."""
        return self.runner.stats.reconciles


@asynccontextmanager
async def cml_instances_world(
    monkeypatch: pytest.MonkeyPatch, *, renew_deadline: float = 10.0, late_import: float = 0.4, **settings: Any
) -> AsyncIterator[CmlInstancesWorld]:
    """Everything running; `settings` are of `InstanceSettings` or what `labs_world` takes."""
    own = {k: settings.pop(k) for k in list(settings) if k.startswith(("instances_", "topology_"))}
    values = {"instances_step_interval": 0.05, "instances_rest_interval": 0.2, "instances_retry_delay": 0.1, **own}
    hints = Hints()
    async with labs_world(monkeypatch, **settings) as labs, Fetches(labs.clock, hints) as fetches:
        known = InstanceSettings(**values)
        runtime = CmlRuntime(
            labs.cache, labs.sessions, known, fetches=fetches, installation=INSTALLATION, late_import=late_import
        )
        placing = Placing(labs.cache, Allocations(labs.cache), known, labs.clock)
        controller = InstancesController(labs.cache, placing, {"CML": runtime}, known, hints=hints)
        runner = Runner(
            controller, labs.client, labs.cache, labs.clock, renew_deadline=renew_deadline, events=labs.events
        )
        strays = StrayLabs(
            labs.cache,
            labs.sessions,
            labs.client,
            labs.clock,
            known,
            installation=INSTALLATION,
            observe_only=False,
        )
        election = StaticElection(
            labs.storage, labs.clock, root=labs.registry.root, lock_name=INSTANCES, identity="test"
        )
        term = await election.acquire()
        running = asyncio.create_task(runner.run(term))
        try:
            yield CmlInstancesWorld(labs, runner, strays, term)
        finally:
            running.cancel()
            await asyncio.wait([running])
