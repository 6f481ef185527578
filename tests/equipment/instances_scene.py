"""The instances' controller at work on virtual time, over a memory store, with a runtime and places that a test plays.

Whoever leads can die between any two steps and be followed by another; what was made outside stays. `Outside` keeps
labs by uid and counts what was ever made, so that a test sees what is doubled, leaked or used without a place.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import orjson

from controllers.instances import deadlines, ends, running, waiting
from controllers.instances.controller import InstancesController
from controllers.instances.deadlines import DeadlinesController
from controllers.instances.kind import (
    INSTANCES,
    LAB_INSTANCE_REQUEST,
    LabInstanceRequest,
    LabInstanceRequestSpec,
    Need,
    WorkerRef,
)
from controllers.instances.phases import TRANSITIONS
from controllers.instances.runtime import InstanceError, NotNow, Prepared, Sighting, State, WorkerLost
from controllers.instances.scheduling import NoRoom, Waits
from controllers.instances.settings import InstanceSettings
from controllers.labs.kind import LAB_RECORD
from controllers.workers.kind import LAB_WORKER
from equipment.leader import end
from equipment.pools_scene import Died, Forgetful
from lrm.cache import Cache, Change
from lrm.client import Client
from lrm.controller import Context, Controller, Hints, Key
from lrm.election import StaticElection
from lrm.errors import ResourceNotFound
from lrm.events import Events, events_prefix
from lrm.reconcile import Runner
from lrm.registry import Registry
from lrm.resource import ObjectMeta
from lrm.testing import VirtualClock

SPEC: dict[str, Any] = {"labTemplate": "lab:1", "studentEmail": "ann@example.edu", "durationMinutes": 60}


@dataclass
class Lab:
    """A lab that exists outside."""

    uid: str
    place: str
    state: str = "booting"


class Outside:
    """A runtime whose labs a test can see and change; each step takes one call."""

    def __init__(self) -> None:
        self.labs: list[Lab] = []
        self.made: Counter[str] = Counter()
        self.troubles: dict[str, InstanceError] = {}
        """Raised by the step of that name (prepare, provision, look, clean) until it is taken out."""
        self.slow: dict[str, float] = {}
        """Seconds that the step of that name takes."""
        self.asked: Counter[str] = Counter()
        """How often each step was asked for."""
        self.at_once = False
        """Whether a lab goes with the first step of its clean-up."""
        self.lost: set[str] = set()
        """Places that are gone for good."""

    def of(self, uid: str) -> list[Lab]:
        return [lab for lab in self.labs if lab.uid == uid]

    async def prepare(self, request: LabInstanceRequest, ctx: Context) -> Prepared:  # noqa: ARG002 - part of the contract
        self._trouble("prepare")
        return Prepared(Need(cpu=1, memory=1024, slots=1))

    async def provision(self, request: LabInstanceRequest, ctx: Context) -> Sighting:
        place = self._place(request)
        self._trouble("provision")
        await ctx.clock.sleep(self.slow.get("provision", 0))
        lab = next(iter(self.of(request.uid)), None)
        if lab is None:
            ctx.check_leading(ctx.creating_timeout)
            self.labs.append(Lab(request.uid, place))
            self.made[request.uid] += 1
            return Sighting(State.STARTING, "booting", container_id=f"c-{request.uid}", again=2.0)
        lab.state = "up" if lab.state == "booting" else lab.state
        return self._sighting(lab)

    async def look(self, request: LabInstanceRequest, ctx: Context) -> Sighting:
        self._place(request)
        self._trouble("look")
        await ctx.clock.sleep(self.slow.get("look", 0))
        return self._sighting(self.of(request.uid)[0])

    async def last_log(self, request: LabInstanceRequest) -> str | None:
        return f"last words of {request.name}\n" if self.of(request.uid) else None

    async def clean(self, request: LabInstanceRequest, ctx: Context) -> bool:
        place = self._place(request)
        self._trouble("clean")
        await ctx.clock.sleep(self.slow.get("clean", 0))
        ctx.check_leading()
        for lab in self.of(request.uid):
            assert lab.place == place, "cleaned up where it is not"
            if lab.state != "stopping" and not self.at_once:
                lab.state = "stopping"
                return False
            self.labs.remove(lab)
        return True

    def lose(self, place: str) -> None:
        """A worker ends, and all labs on it."""
        self.lost.add(place)
        self.labs = [lab for lab in self.labs if lab.place != place]

    def _place(self, request: LabInstanceRequest) -> str:
        ref = request.status.worker_ref
        assert ref is not None, "asked outside without a place"
        if ref.name in self.lost:
            raise WorkerLost("WorkerLost", f"{ref.name} is gone")
        return ref.name

    def _trouble(self, step: str) -> None:
        self.asked[step] += 1
        error = self.troubles.get(step)
        if error is not None:
            raise error

    def _sighting(self, lab: Lab) -> Sighting:
        if lab.state == "ended":
            return Sighting(State.ENDED, "exit code 0", exit_code=0)
        return Sighting(State.RUNNING, access_url=f"http://{lab.place}/{lab.uid}", container_id=f"c-{lab.uid}")


@dataclass
class Places:
    """Workers with so many slots each; what is reserved outlives a leader, as in the workers' status."""

    slots: dict[str, int]
    held: dict[str, str] = field(default_factory=dict)
    """uid → place."""
    waiting: set[Key] = field(default_factory=set)
    """Who was told to wait."""
    full: str = "NoCapacityAvailable"
    asked: int = 0
    """How often a place was asked for."""

    async def choose(self, request: LabInstanceRequest, ctx: Context) -> WorkerRef | Waits:  # noqa: ARG002 - part of the contract
        self.asked += 1
        mine = self.held.get(request.uid)
        for name, slots in self.slots.items():
            if name == mine or (mine is None and Counter(self.held.values())[name] < slots):
                self.waiting.discard((request.namespace, request.name))
                return WorkerRef(kind="LabWorker", namespace="default", name=name, uid=f"u-{name}")
        self.waiting.add((request.namespace, request.name))
        return Waits(self.full, "every place is taken")

    async def reserve(self, place: WorkerRef, request: LabInstanceRequest, ctx: Context) -> None:
        await ctx.clock.sleep(0)
        if self.held.get(request.uid) == place.name:
            return
        if Counter(self.held.values())[place.name] >= self.slots.get(place.name, 0):
            raise NoRoom(f"{place.name} is full")
        self.held[request.uid] = place.name

    async def release(self, request: LabInstanceRequest, ctx: Context) -> None:  # noqa: ARG002 - part of the contract
        self.held.pop(request.uid, None)

    def wakes(self, change: Change) -> list[Key]:
        old, new = (item.resource if item else None for item in (change.old, change.new))
        had, has = (isinstance(r, LabInstanceRequest) and r.status.worker_ref is not None for r in (old, new))
        return sorted(self.waiting) if had and not has else []


@dataclass
class InstancesScene:
    """See the module."""

    storage: Forgetful
    clock: VirtualClock
    registry: Registry
    cache: Cache
    client: Client
    outside: Outside
    places: Places
    settings: InstanceSettings
    hints: Hints = field(default_factory=Hints)
    observe_only: bool = False
    running: asyncio.Task[None] | None = None
    events: Events = field(init=False)

    def __post_init__(self) -> None:
        self.events = Events(self.storage, self.clock, root="/lrm")

    async def lead(self) -> None:
        """A new process takes the lock."""
        election = StaticElection(self.storage, self.clock, root="/lrm", lock_name=INSTANCES, identity="test")
        term = await election.acquire()
        runtimes = {"Container": self.outside, "CML": self.outside}
        controllers: tuple[Controller[LabInstanceRequest], ...] = (
            InstancesController(self.cache, self.places, runtimes, self.settings, hints=self.hints),
            DeadlinesController(),
        )
        runners = [
            Runner(c, self.client, self.cache, self.clock, observe_only=self.observe_only, events=self.events)
            for c in controllers
        ]

        async def work() -> None:
            async with asyncio.TaskGroup() as tasks:
                for runner in runners:
                    tasks.create_task(runner.run(term))

        self.running = asyncio.create_task(work())
        await self.clock.settle()

    async def stop(self) -> None:
        """The process ends, however far it is."""
        task, self.running = self.running, None
        await end(task)

    @property
    def dead(self) -> bool:
        return self.running is not None and self.running.done()

    async def make(self, name: str = "a", **spec: Any) -> LabInstanceRequest:
        wanted = LabInstanceRequestSpec.model_validate({**SPEC, **spec})
        made = await self.client.create(LabInstanceRequest(metadata=ObjectMeta(name=name), spec=wanted))
        await self.clock.settle()
        return made

    async def get(self, name: str = "a") -> LabInstanceRequest:
        return await self.client.get(LabInstanceRequest, "default", name)

    async def change(self, name: str = "a", **spec: Any) -> None:
        def mutate(request: LabInstanceRequest) -> None:
            for key, value in spec.items():
                setattr(request.spec, key, value)

        await self._ask(self.client.update(await self.get(name), mutate))

    async def annotate(self, key: str, value: str, name: str = "a") -> None:
        request = await self.get(name)
        await self._ask(self.client.update(request, lambda r: r.metadata.annotations.update({key: value})))

    async def delete(self, name: str = "a") -> None:
        await self._ask(self.client.delete(await self.get(name)))

    async def _ask(self, call: Coroutine[Any, Any, Any]) -> None:
        """A person's call; it may meet the controller's writes, and then waits a moment before it tries again."""
        asking = asyncio.create_task(call)
        await self.clock.settle()
        while not asking.done():
            await self.clock.advance(0.01)
        await asking
        await self.clock.settle()

    async def told(self, name: str = "a") -> list[tuple[str, str, str]]:
        """Type, reason and message of the events about it, in the order in which they were told first."""
        await self.clock.settle()
        page = await self.storage.list(events_prefix("/lrm", "default", name))
        events = [orjson.loads(entry.value) for entry in page.entries]
        return [(e["type"], e["reason"], e["message"]) for e in events]

    async def find(self, name: str = "a") -> LabInstanceRequest | None:
        try:
            return await self.get(name)
        except ResourceNotFound:
            return None

    async def gone(self, name: str = "a") -> bool:
        return await self.find(name) is None

    async def phase(self, name: str = "a") -> str:
        return (await self.get(name)).status.phase

    async def until_phase(
        self, phase: str, name: str = "a", *, seconds: float = 30, step: float = 1.0
    ) -> LabInstanceRequest:
        """Let time pass until it stands there."""
        spent = 0.0
        while (found := await self.get(name)).status.phase != phase:
            assert spent < seconds, f"still {found.status.phase} after {spent} s: {found.status.wire()}"
            await self.clock.advance(step)
            spent += step
        return found

    def running_now(self) -> list[str]:
        """Uids of all labs outside."""
        return sorted(lab.uid for lab in self.outside.labs)

    @property
    def now(self) -> datetime:
        return self.clock.now()


def at_rest(scene: InstancesScene) -> None:
    """Nothing is left outside, and nothing is reserved."""
    assert scene.outside.labs == []
    assert scene.places.held == {}


def check_history(request: LabInstanceRequest) -> None:
    """Every step that it took is in the table."""
    for step in request.status.phase_history:
        assert step.to in TRANSITIONS[step.source], f"{step.source} → {step.to}"


def condition(request: LabInstanceRequest, kind: str) -> tuple[str, str]:
    """Status and reason of a condition."""
    found = request.status.condition(kind)
    return (found.status, found.reason) if found else ("", "")


def away(again: float = 5.0) -> NotNow:
    return NotNow("WorkerAway", "it does not answer", again=again)


@asynccontextmanager
async def instances_scene(
    *, slots: dict[str, int] | None = None, observe_only: bool = False, lead: bool = True, **settings: Any
) -> AsyncIterator[InstancesScene]:
    """A leader over an empty store."""
    clock = VirtualClock()
    storage = Forgetful(clock=clock)
    registry = Registry((LAB_INSTANCE_REQUEST, LAB_WORKER, LAB_RECORD), root="/lrm")
    cache = Cache(storage, registry, clock)
    client = Client(storage, registry, clock)
    scene = InstancesScene(
        storage,
        clock,
        registry,
        cache,
        client,
        Outside(),
        Places(slots if slots is not None else {"w1": 10}),
        InstanceSettings(**settings),
        observe_only=observe_only,
    )
    background = [asyncio.create_task(cache.run()), asyncio.create_task(scene.events.run())]
    await cache.wait_synced()
    try:
        if lead:
            await scene.lead()
        yield scene
    finally:
        await scene.stop()
        for task in background:
            task.cancel()
        await asyncio.wait(background)
        await storage.aclose()


def dying_at(monkeypatch: Any, point: str) -> Counter[str]:
    """Let the process die when it first comes to a crash point; how often it did."""
    died: Counter[str] = Counter()

    def crash_point(name: str) -> None:
        if name == point and not died[name]:
            died[name] += 1
            raise Died(name)

    for module in (deadlines, ends, running, waiting):
        monkeypatch.setattr(module, "crash_point", crash_point)
    return died
