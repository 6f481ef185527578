"""The pools' controller at work on virtual time, over a memory store, with workers that a test plays.

Whoever leads can die between any two writes, lose a reply, or be followed by another; `fleet` does to the workers what
their own controller would, as far as a pool can see it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from controllers.instances.kind import LAB_INSTANCE_REQUEST, LabInstanceRequest, LabInstanceRequestSpec
from controllers.labs.kind import LAB_RECORD, LabRecord, LabRecordSpec, LabRecordStatus
from controllers.pools import controller as pools_module
from controllers.pools.controller import PoolsController, new_suffix
from controllers.pools.demand import ObservedDemand
from controllers.pools.kind import LAB_WORKER_POOL, LabWorkerPool, LabWorkerPoolSpec
from controllers.pools.settings import PoolSettings
from controllers.workers.kind import INSTANCE_FINALIZER, LAB_WORKER, LabWorker, serving
from controllers.workers.status import IdleStatus, Utilization
from equipment.leader import end
from equipment.pools import TEMPLATE
from lrm.cache import Cache, CacheUpdate, Change
from lrm.client import Client
from lrm.election import StaticElection
from lrm.errors import ResourceNotFound
from lrm.reconcile import Runner
from lrm.registry import Registry
from lrm.resource import ObjectMeta
from lrm.testing import VirtualClock
from storage.base import Entry, Guard
from storage.errors import OutcomeUnknown
from storage.memory import MemoryStorage

INTERVAL = 30.0
_NEXT = {
    "Pending": "ProvisioningEC2",
    "ProvisioningEC2": "EC2Ready",
    "EC2Ready": "Starting",
    "Starting": "ReadyUnlicensed",
}


class Died(BaseException):
    """The process has ended here."""


class Forgetful(MemoryStorage):
    """Loses the reply to one of the leader's writes: it is made, and nobody hears of it."""

    lose = 0
    """Which one, counted down; 0 is none."""

    def _replied(self, guards: tuple[Guard, ...]) -> None:
        if any("/leader/" in guard.key for guard in guards) and self.lose:
            self.lose -= 1
            if self.lose == 0:
                raise OutcomeUnknown("the reply was lost")

    async def create(self, key: str, value: bytes, *, lease: int = 0, guards: tuple[Guard, ...] = ()) -> Entry:
        entry = await super().create(key, value, lease=lease, guards=guards)
        self._replied(guards)
        return entry

    async def update(self, key: str, value: bytes, *, expected_revision: int, guards: tuple[Guard, ...] = ()) -> Entry:
        entry = await super().update(key, value, expected_revision=expected_revision, guards=guards)
        self._replied(guards)
        return entry

    async def delete(self, key: str, *, expected_revision: int, guards: tuple[Guard, ...] = ()) -> int:
        revision = await super().delete(key, expected_revision=expected_revision, guards=guards)
        self._replied(guards)
        return revision


@dataclass
class PoolScene:
    """See the module."""

    storage: Forgetful
    clock: VirtualClock
    registry: Registry
    cache: Cache
    client: Client
    workers_client: Client
    labs_client: Client
    suffix: Callable[[], str] = new_suffix
    observe_only: bool = False
    listing: bool = True
    """Whether the labs of workers that serve are listed."""
    changes: list[Change] = field(default_factory=list)
    """Everything that happened to objects, in order."""
    runner: Runner[LabWorkerPool] | None = None
    running: asyncio.Task[None] | None = None

    # Who leads

    async def lead(self) -> None:
        """A new process takes the lock."""
        election = StaticElection(self.storage, self.clock, root="/lrm", lock_name="pools", identity="test")
        term = await election.acquire()
        settings = PoolSettings(pool_interval=INTERVAL)
        controller = PoolsController(self.cache, ObservedDemand(self.cache), settings, suffix=self.suffix)
        self.runner = Runner(controller, self.client, self.cache, self.clock, observe_only=self.observe_only)
        self.running = asyncio.create_task(self.runner.run(term))
        await self.clock.settle()

    async def stop(self) -> None:
        """The process ends, however far it is."""
        task, self.running = self.running, None
        await end(task)

    @property
    def dead(self) -> bool:
        return self.running is not None and self.running.done()

    # The pool, as a person sees it

    async def make(self, name: str = "p", **spec: Any) -> LabWorkerPool:
        document = {"labTrack": "ccna", "template": TEMPLATE, **spec}
        wanted = LabWorkerPoolSpec.model_validate(document)
        return await self.client.create(LabWorkerPool(metadata=ObjectMeta(name=name), spec=wanted))

    async def pool(self, name: str = "p") -> LabWorkerPool:
        return await self.client.get(LabWorkerPool, "default", name)

    async def change(self, **spec: Any) -> None:
        def mutate(pool: LabWorkerPool) -> None:
            for key, value in spec.items():
                setattr(pool.spec, key, value)

        await self.client.update(await self.pool(), mutate)

    async def annotate(self, resource: Any, key: str, value: str) -> None:
        await self.client.update(resource, lambda r: r.metadata.annotations.update({key: value}))

    async def gone(self, name: str = "p") -> bool:
        try:
            await self.pool(name)
        except ResourceNotFound:
            return True
        return False

    async def workers(self) -> list[LabWorker]:
        return await self.client.list(LabWorker)

    # The world goes on

    async def fleet(self, *, seconds: float = 1, rounds: int = 8) -> None:
        """Time passes; workers start and serve, and those that are deleted go unless something is placed on them."""
        for _ in range(rounds):
            for worker in await self.workers():
                await self._step(worker)
            await self.clock.advance(seconds)

    async def _step(self, worker: LabWorker) -> None:
        if worker.deleting:
            if not worker.status.allocations:
                await self.client.remove_finalizer(worker, INSTANCE_FINALIZER)
        elif INSTANCE_FINALIZER not in worker.metadata.finalizers:
            await self.client.add_finalizer(worker, INSTANCE_FINALIZER)
        elif worker.status.phase in _NEXT:
            await self.phase(worker, _NEXT[worker.status.phase])

    async def phase(self, worker: LabWorker, phase: str) -> None:
        """What the workers' controller would write; a failed worker's instance has ended, the labs of one that serves
        are listed.
        """
        now = self.clock.now()

        def mutate(w: LabWorker) -> None:
            w.status.enter(phase, "Test", now)
            w.status.ec2.instance_id = "i-0123456789abcdef0"
            w.status.ec2.state = "terminated" if phase == "Failed" else "running"

        entered = await self.workers_client.update_status(worker, mutate)
        if serving(entered) and entered.status.labs_synced_at is None and self.listing:
            await self.list_labs(entered)

    async def list_labs(self, worker: LabWorker, error: str | None = None) -> None:
        """A worker's labs were listed, or could not be."""
        now = self.clock.now()

        def mutate(w: LabWorker) -> None:
            w.status.labs_sync_error = error
            if error is None:
                w.status.labs_synced_at = now

        await self.labs_client.update_status(worker, mutate)

    async def doze(self, worker: LabWorker) -> None:
        """Idleness has stopped a worker."""
        now = self.clock.now()

        def mutate(w: LabWorker) -> None:
            w.status.enter("Stopped", "Idle", now)
            w.status.ec2.state = "stopped"
            w.status.idle = IdleStatus(paused_at=now)

        await self.workers_client.update_status(worker, mutate)

    async def place(self, worker: LabWorker, labs: int) -> None:
        """Labs run on a worker, as the sync records them."""
        now = self.clock.now()
        for i in range(labs):
            record = LabRecord(
                metadata=ObjectMeta(name=f"{worker.name}-l{i}"),
                spec=LabRecordSpec(worker_ref=worker.name, lab_id=f"l{i}"),
                status=LabRecordStatus(phase="Present", state="STARTED", first_seen_at=now),
            )
            await self.labs_client.create(record, with_status=True)
        await self.labs_client.update_status(worker, lambda w: setattr(w.status, "labs_count", labs))

    async def want(self, name: str, **spec: Any) -> None:
        """A student's request for a CML lab."""
        document = {"labTemplate": {"topology": "nodes: []"}, "studentEmail": "s@university.edu", "durationMinutes": 60}
        wanted = LabInstanceRequestSpec.model_validate({**document, **spec})
        await self.client.create(LabInstanceRequest(metadata=ObjectMeta(name=name), spec=wanted))

    async def measure(self, *, cpu: float, memory: float, labs: int) -> None:
        """The same is measured of all workers; shares in percent."""
        metrics, used = (
            self.client.bind(owner="metrics", fence=None),
            Utilization(cpu_percent=cpu, memory_percent=memory),
        )
        for worker in await self.workers():
            await metrics.update_status(worker, lambda w: setattr(w.status, "utilization", used))
            await self.labs_client.update_status(worker, lambda w: setattr(w.status, "labs_count", labs))

    async def empty(self) -> None:
        """All labs end."""
        for record in await self.client.list(LabRecord):
            await self.labs_client.update_status(record, lambda r: setattr(r.status, "state", "STOPPED"))


@asynccontextmanager
async def pool_scene(*, leading: bool = True, **options: Any) -> AsyncIterator[PoolScene]:
    """A scene in which somebody leads from the beginning, unless told otherwise."""
    clock = VirtualClock()
    storage = Forgetful(clock=clock)
    registry = Registry((LAB_WORKER, LAB_RECORD, LAB_WORKER_POOL, LAB_INSTANCE_REQUEST))
    cache, client = Cache(storage, registry, clock), Client(storage, registry, clock)
    scene = PoolScene(
        storage,
        clock,
        registry,
        cache,
        client,
        client.bind(owner="workers", fence=None),
        client.bind(owner="labs", fence=None),
        **options,
    )
    caching = asyncio.create_task(cache.run())
    await cache.wait_synced()
    cache.subscribe(lambda update: scene.changes.extend(_kept(update)))
    try:
        if leading:
            await scene.lead()
        yield scene
    finally:
        await scene.stop()
        caching.cancel()
        await asyncio.wait([caching])
        await storage.aclose()


def _kept(update: CacheUpdate) -> list[Change]:
    return [change for change in update.changes if change.kind.plural != "labrecords"]


def dying_at(monkeypatch: pytest.MonkeyPatch, point: str, time: int = 1) -> None:
    """The process dies when it comes to a point for the so-manieth time, once."""
    left = {point: time}

    def crash(name: str) -> None:
        if name in left:
            left[name] -= 1
            if left[name] == 0:
                raise Died(name)

    monkeypatch.setattr(pools_module, "crash_point", crash)


def worker_of(change: Change) -> LabWorker:
    return cast("LabWorker", change.item.resource)
