"""Lab instances on workers and an engine that are objects in a store: the real controllers, with a runtime of memory.

Whoever leads can die between any two steps, lose replies, and be followed by another. `Watchman` looks at each revision
that the store goes through, and at what is left when things have settled, without asking the code under test.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from controllers.containers.documents import EngineInfo
from controllers.instances.allocations import Allocations, AllocationsController
from controllers.instances.controller import InstancesController
from controllers.instances.kind import (
    INSTANCES,
    LAB_INSTANCE_REQUEST,
    LabInstanceRequest,
    LabInstanceRequestSpec,
    Need,
)
from controllers.instances.phases import PLACED, WAITING
from controllers.instances.placing import Placing
from controllers.instances.runtime import Prepared
from controllers.instances.scheduler import Amount
from controllers.instances.settings import InstanceSettings
from controllers.labs.kind import LAB_RECORD, LabRecord, LabRecordSpec, LabRecordStatus
from controllers.workers.kind import LAB_WORKER, LabWorker, LabWorkerSpec
from controllers.workers.status import Capacity
from equipment.instances_scene import Outside
from equipment.leader import end
from equipment.pools_scene import Forgetful
from lrm.cache import Cache, CacheUpdate
from lrm.client import Client
from lrm.controller import Context, Controller, Hints
from lrm.election import StaticElection
from lrm.errors import ResourceNotFound
from lrm.reconcile import Runner
from lrm.registry import Registry
from lrm.resource import ObjectMeta
from lrm.testing import VirtualClock

TOPOLOGY = "lab: {title: t}\nnodes: []\nlinks: []\n"
MIB = 1024**2
ENGINE_TOTAL = Amount(cpu=4, memory=4096 * MIB)


class SizedOutside(Outside):
    """A runtime for which each lab needs what its request says; its nodes are in `environment`."""

    async def prepare(self, request: LabInstanceRequest, ctx: Context) -> Prepared:  # noqa: ARG002 - part of the contract
        self._trouble("prepare")
        asked = request.spec.resources
        nodes = int(request.spec.environment.get("NODES", "0"))
        return Prepared(Need(cpu=asked.cpu or 0, memory=asked.memory or 0, nodes=nodes))


@dataclass
class Watchman:
    """Sees every revision, and remembers what must not be."""

    cache: Cache
    wrongs: list[str] = field(default_factory=list)

    def on_update(self, update: CacheUpdate) -> None:
        for change in update.changes:
            old, new = (item.resource if item else None for item in (change.old, change.new))
            if isinstance(new, LabWorker):
                self._look_at_worker(old if isinstance(old, LabWorker) else None, new)
        self._look_at_requests()

    def _look_at_worker(self, old: LabWorker | None, new: LabWorker) -> None:
        """Whatever a worker came to hold, it had the room for it, and took labs."""
        before = old.status.allocations if old else {}
        added = {uid: a for uid, a in new.status.allocations.items() if uid not in before}
        if not added:
            return
        others = [a for uid, a in new.status.allocations.items() if uid in before]
        if len(added) > 1 or not has_room(new, others, *added.values()):
            self.wrongs.append(f"{new.name} is overcommitted at {new.revision}: {new.status.allocations}")
        if new.status.phase != "Ready" or new.deleting:
            self.wrongs.append(f"{new.name} was given a lab while it was {new.status.phase} at {new.revision}")

    def _look_at_requests(self) -> None:
        """Whatever has its place somewhere is in that place's books."""
        engine: list[Need] = []
        for request in self.cache.all(LabInstanceRequest):
            ref = request.status.worker_ref
            if ref is None:
                continue
            if ref.kind == "Engine":
                engine.append(request.status.need or Need())
                continue
            worker = self.cache.get(LabWorker, ref.namespace, ref.name)
            if worker is not None and worker.uid == ref.uid and request.uid not in worker.status.allocations:
                self.wrongs.append(f"{request.name} is on {ref.name} without a reservation")
        if sum(n.cpu for n in engine) > ENGINE_TOTAL.cpu or sum(n.memory for n in engine) > ENGINE_TOTAL.memory:
            self.wrongs.append(f"the engine is overcommitted: {engine}")


def has_room(worker: LabWorker, held: Iterable[Any], need: Any) -> bool:
    """Whether a worker has what is needed beside what is held there; what is not needed may be overdrawn."""
    held, capacity, cml = list(held), worker.status.capacity or Capacity(), worker.spec.cml
    totals = {
        "cpu": capacity.cpu,
        "memory": capacity.memory,
        "nodes": cml.max_nodes_licensed if worker.status.cml.licensed else cml.max_nodes_unlicensed,
        "slots": worker.spec.max_concurrent_labs,
    }
    return all(
        getattr(need, what) == 0 or sum(getattr(h, what) for h in held) + getattr(need, what) <= total
        for what, total in totals.items()
    )


@dataclass
class PlacingScene:
    """See the module."""

    storage: Forgetful
    clock: VirtualClock
    registry: Registry
    cache: Cache
    client: Client
    settings: InstanceSettings
    outside: SizedOutside
    watchman: Watchman
    engine: EngineInfo | None = field(
        default_factory=lambda: EngineInfo("engine-1", ENGINE_TOTAL.cpu, ENGINE_TOTAL.memory, now=0.0)
    )
    placing: Placing | None = None
    runners: list[Runner[Any]] = field(default_factory=list)
    running: list[asyncio.Task[None]] = field(default_factory=list)

    # Who leads

    async def lead(self) -> None:
        """A new process takes the lock."""
        election = StaticElection(self.storage, self.clock, root="/lrm", lock_name=INSTANCES, identity="test")
        term = await election.acquire()
        allocations = Allocations(self.cache)
        hints = Hints()
        self.placing = Placing(
            self.cache, allocations, self.settings, self.clock, engine=lambda: self.engine, hints=hints
        )
        runtimes = {"Container": self.outside, "CML": self.outside}
        controllers: list[Controller[Any]] = [
            InstancesController(self.cache, self.placing, runtimes, self.settings, hints=hints),
            AllocationsController(self.cache, allocations, self.placing.promised),
        ]
        self.runners = [Runner(c, self.client, self.cache, self.clock) for c in controllers]
        self.running = [asyncio.create_task(runner.run(term)) for runner in self.runners]
        await self.clock.settle()

    async def stop(self) -> None:
        """The process ends, however far it is."""
        tasks, self.running = self.running, []
        await end(*tasks)

    # What there is

    async def worker(self, name: str, *, namespace: str = "default", slots: int = 4, **spec: Any) -> LabWorker:
        """One that serves, licensed, with 8 cores and 8 GiB."""
        wanted = LabWorkerSpec.model_validate(
            {"region": "us-east-1", "aws": {"amiId": "ami-1234"}, "maxConcurrentLabs": slots, **spec}
        )
        made = await self.client.create(LabWorker(metadata=ObjectMeta(name=name, namespace=namespace), spec=wanted))

        def serve(w: LabWorker) -> None:
            for phase in ("ProvisioningEC2", "EC2Ready", "Starting", "Licensing", "Ready"):
                w.status.enter(phase, "Test", self.clock.now())
            w.status.ec2.instance_id, w.status.ec2.state = "i-0123456789abcdef0", "running"
            w.status.capacity = Capacity(cpu=8, memory=8192 * MIB)
            w.status.cml.licensed = w.status.cml.ready = True
            w.status.set_condition("Ready", True, "Serving", "", now=self.clock.now())

        return await self.set_worker(made, serve)

    async def set_worker(self, worker: LabWorker, mutate: Any) -> LabWorker:
        """Change a worker's status as its own controller would."""
        changed = await self.client.bind(owner="workers", fence=None).update_status(worker, mutate)
        await self.clock.settle()
        return changed

    async def get_worker(self, name: str) -> LabWorker:
        return await self.client.get(LabWorker, "default", name)

    async def foreign_lab(self, worker: str, lab: str, state: str = "STARTED", **status: Any) -> LabRecord:
        """A lab that somebody runs on a worker, as the sync records it."""
        record = LabRecord(
            metadata=ObjectMeta(name=f"{worker}-{lab}"),
            spec=LabRecordSpec(worker_ref=worker, lab_id=lab),
            status=LabRecordStatus(phase="Present", state=state, **{"title": "somebody's", **status}),
        )
        made = await self.client.bind(owner="labs", fence=None).create(record, with_status=True)
        await self.clock.settle()
        return made

    async def end_foreign_lab(self, record: LabRecord) -> None:
        client = self.client.bind(owner="labs", fence=None)
        await client.update_status(record, lambda r: setattr(r.status, "state", "STOPPED"))
        await self.clock.settle()

    async def ask(self, name: str, *, runtime: str = "CML", namespace: str = "default", **spec: Any) -> None:
        """A student asks for a lab."""
        template = {"topology": TOPOLOGY} if runtime == "CML" else {"image": "lab:1"}
        wanted = LabInstanceRequestSpec.model_validate(
            {"labTemplate": template, "studentEmail": f"{name}@x.edu", "durationMinutes": 60, **spec}
        )
        await self.client.create(LabInstanceRequest(metadata=ObjectMeta(name=name, namespace=namespace), spec=wanted))
        await self.clock.settle()

    async def get(self, name: str) -> LabInstanceRequest:
        return await self.client.get(LabInstanceRequest, "default", name)

    async def delete(self, name: str) -> None:
        await self.client.delete(await self.get(name))
        await self.clock.settle()

    async def where(self, name: str) -> str:
        """The name of its place, or why it has none."""
        try:
            request = await self.get(name)
        except ResourceNotFound:
            return "gone"
        if request.status.worker_ref is not None:
            return request.status.worker_ref.name
        assigned = request.status.condition("WorkerAssigned")
        return assigned.reason if request.status.phase in WAITING and assigned else request.status.phase

    async def held(self) -> dict[str, set[str]]:
        """By worker, the names of the requests that something is reserved for; of one that is gone, its uid."""
        called = {r.uid: r.name for r in await self.client.list(LabInstanceRequest)}
        workers = await self.client.list(LabWorker)
        return {w.name: {called.get(uid, uid) for uid in w.status.allocations} for w in workers}

    async def settled_wrongs(self) -> list[str]:
        """What must not be once nothing goes on any more: leaked reservations, and who waits for what is free."""
        wrongs = list(self.watchman.wrongs)
        requests = await self.client.list(LabInstanceRequest)
        workers = await self.client.list(LabWorker)
        placed = {r.uid: r.status.worker_ref for r in requests if r.status.worker_ref is not None}
        for worker in workers:
            wrongs += [
                f"{uid} leaked on {worker.name}"
                for uid in worker.status.allocations
                if uid not in placed or placed[uid].uid != worker.uid
            ]
        for request in requests:
            over = request.ends_at is not None and request.ends_at <= self.clock.now()
            if request.status.phase in WAITING and not request.deleting and not over:
                assigned = request.status.condition("WorkerAssigned")
                reason = assigned.reason if assigned else "nothing"
                told = f"{request.name} waits ({request.status.phase}, {reason})"
                if self._beyond_quota(request, requests):
                    continue
                if fits := [w.name for w in workers if self._fits(request, w)]:
                    wrongs.append(f"{told}, and fits {fits}")
                elif request.spec.runs_in == "Container" and self._fits_engine(request, requests):
                    wrongs.append(f"{told}, and fits the engine")
        return wrongs

    def _fits(self, request: LabInstanceRequest, worker: LabWorker) -> bool:
        need = request.status.need
        assert need is not None
        ready = worker.status.condition("Ready")
        open_ = (
            worker.status.phase == "Ready"
            and not worker.deleting
            and not worker.paused
            and worker.spec.desired_phase == "Ready"
            and ready is not None
            and ready.status == "True"
        )
        near = worker.spec.shared or worker.namespace == request.namespace
        track = request.spec.lab_track in ("", worker.spec.lab_track)
        others = [r for r in self.cache.all(LabRecord) if r.spec.worker_ref == worker.name]
        strangers = [Need(slots=1) for r in others if r.status.state == "STARTED"]
        held = [*worker.status.allocations.values(), *strangers]
        return request.spec.runs_in == "CML" and open_ and near and track and has_room(worker, held, need)

    def _fits_engine(self, request: LabInstanceRequest, requests: list[LabInstanceRequest]) -> bool:
        need = request.status.need
        assert need is not None
        there = [r.status.need or Need() for r in requests if r.status.worker_ref and r.spec.runs_in == "Container"]
        return (
            sum(n.cpu for n in [*there, need]) <= ENGINE_TOTAL.cpu
            and sum(n.memory for n in [*there, need]) <= ENGINE_TOTAL.memory
        )

    def _beyond_quota(self, request: LabInstanceRequest, requests: list[LabInstanceRequest]) -> bool:
        """Whether a student has as many that run, or wait and are older, as are allowed."""
        theirs = [r for r in requests if r.spec.student_email == request.spec.student_email and r is not request]
        before = [
            r
            for r in theirs
            if r.status.phase in PLACED or (r.status.phase in WAITING and not r.deleting and _rank(r) < _rank(request))
        ]
        most = self.settings.instances_most_per_student
        return 0 < most <= len(before)


def _rank(request: LabInstanceRequest) -> tuple[Any, ...]:
    created = request.metadata.creation_timestamp
    return request.spec.scheduled_start_time or created, created, request.uid


@asynccontextmanager
async def placing_scene(
    *, lead: bool = True, storage: Forgetful | None = None, clock: VirtualClock | None = None, **settings: Any
) -> AsyncIterator[PlacingScene]:
    """A scene in which nothing is looked at just because time has passed: what waits must be woken."""
    clock = clock or VirtualClock()
    storage = storage or Forgetful(clock=clock)
    registry = Registry((LAB_INSTANCE_REQUEST, LAB_WORKER, LAB_RECORD))
    cache, client = Cache(storage, registry, clock), Client(storage, registry, clock)
    watchman = Watchman(cache)
    limits = {"instances_rest_interval": 100_000.0, "instances_most_per_student": 0, **settings}
    scene = PlacingScene(storage, clock, registry, cache, client, InstanceSettings(**limits), SizedOutside(), watchman)
    async with AsyncExitStack() as ending:
        caching = asyncio.create_task(cache.run())
        ending.push_async_callback(storage.aclose)
        ending.push_async_callback(asyncio.wait, [caching])
        ending.callback(caching.cancel)
        await cache.wait_synced()
        ending.callback(cache.subscribe(watchman.on_update))
        ending.push_async_callback(scene.stop)
        if lead:
            await scene.lead()
        yield scene
