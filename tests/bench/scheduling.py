"""What it takes to find a place for a lab instance among many workers, and to hear of a change while many wait.

The placer of the daemon over a cache in memory: half of each worker is taken, so every worker is looked at and most
would do. Nothing is reserved, for that is a write to the store like any other.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog

from bench.report import Figure, Size
from controllers.instances.allocations import Allocations
from controllers.instances.kind import INSTANCES, LAB_INSTANCE_REQUEST, LabInstanceRequest, Need, WorkerRef
from controllers.instances.placing import Placing
from controllers.instances.settings import InstanceSettings
from controllers.labs.kind import LAB_RECORD
from controllers.workers.kind import LAB_WORKER, LabWorker
from controllers.workers.status import Allocation, Capacity, LabWorkerStatus
from lrm.cache import Cache, CacheUpdate, Change
from lrm.client import Client
from lrm.clock import WallJumps
from lrm.controller import Context
from lrm.election import StaticElection
from lrm.events import Recorder
from lrm.registry import Registry
from lrm.resource import Condition
from storage.clock import SystemClock
from storage.memory import MemoryStorage

WORKERS, WAITING = 1_000, 500
DECISION_MS = 5.0
CHANGE_MS = 20.0
"""For hearing of a change while many wait: it must not hold up the event loop; a bound of our own, no promise."""
_GIB = 1024**3
_CLOCK = SystemClock()


async def scheduling(size: Size) -> list[Figure]:
    """Milliseconds for one decision, and for what a change means to all that wait."""
    workers = min(WORKERS, size.objects)
    async with _scene(workers, free=True) as scene:
        cold, *decisions = [await scene.decide(scene.requests[0]) for _ in range(1 + size.operations // 20)]
    async with _scene(workers, free=False, waiting=min(WAITING, size.objects)) as scene:
        _, *changes = [await scene.hear(n % workers) for n in range(1 + size.operations // 20)]
        waiting = len(scene.requests)
    return [
        Figure(
            f"scheduling: a place among {workers:,} workers",
            statistics.median(decisions),
            "ms",
            DECISION_MS,
            told=f"{len(decisions)} decisions; longest {max(decisions):.1f} ms, the first {cold:.1f} ms",
        ),
        Figure(
            f"scheduling: room on a worker while {waiting:,} wait",
            statistics.median(changes),
            "ms",
            CHANGE_MS,
            told=f"{len(changes)} changes; longest {max(changes):.1f} ms",
        ),
    ]


@dataclass
class _Scene:
    """A placer that leads."""

    cache: Cache
    client: Client
    placing: Placing
    context: Context
    requests: Sequence[LabInstanceRequest]
    heard: list[Change]

    async def decide(self, request: LabInstanceRequest) -> float:
        """Milliseconds for one place, which is given back."""
        began = _CLOCK.monotonic()
        place = await self.placing.choose(request, self.context)
        spent = _CLOCK.monotonic() - began
        if not isinstance(place, WorkerRef):
            raise RuntimeError(f"nothing was measured: {place}")  # noqa: TRY004 - it is no type that is wrong
        await self.placing.release(request, self.context)
        return spent * 1000

    async def hear(self, position: int) -> float:
        """Milliseconds until it is known that a worker's change gives room to somebody; then the room is gone again."""
        worker = self.cache.all(LabWorker)[position]
        held = dict(worker.status.allocations)
        self.heard.clear()
        worker = await self.client.update_status(worker, lambda w: w.status.allocations.popitem())
        await self.cache.barrier()
        began = _CLOCK.monotonic()
        if not any(self.placing.wakes(change) for change in self.heard):
            raise RuntimeError("nothing was measured: the change gave room to nobody")
        spent = _CLOCK.monotonic() - began
        await self.client.update_status(worker, lambda w: w.status.allocations.update(held))
        await self.cache.barrier()
        return spent * 1000


@asynccontextmanager
async def _scene(workers: int, *, free: bool, waiting: int = 1) -> AsyncIterator[_Scene]:
    registry = Registry((LAB_INSTANCE_REQUEST, LAB_WORKER, LAB_RECORD))
    storage = MemoryStorage()
    for n in range(workers):
        worker = _worker(n, taken=10 if free else 20)
        await storage.create(registry.key_of(worker), LAB_WORKER.encode(worker))
    for n in range(waiting):
        request = _request(n)
        await storage.create(registry.key_of(request), LAB_INSTANCE_REQUEST.encode(request))
    cache, client = Cache(storage, registry, _CLOCK), Client(storage, registry, _CLOCK, owner=INSTANCES)
    term = await StaticElection(storage, _CLOCK, root="/lrm", lock_name=INSTANCES, identity="bench").acquire()
    placing = Placing(cache, Allocations(cache), InstanceSettings(), _CLOCK)
    context = Context(
        client=client,
        cache=cache,
        clock=_CLOCK,
        term=term,
        observe_only=False,
        renew_deadline=10,
        jumps=WallJumps(_CLOCK),
        bound_log=structlog.get_logger(),
        events=Recorder(None, INSTANCES, term),
    )
    heard: list[Change] = []
    caching = asyncio.create_task(cache.run())
    try:
        await cache.wait_synced()
        cache.subscribe(lambda update: _remember(heard, update))
        yield _Scene(cache, client, placing, context, cache.all(LabInstanceRequest), heard)
    finally:
        caching.cancel()
        await asyncio.wait([caching])
        await storage.aclose()


def _remember(heard: list[Change], update: CacheUpdate) -> None:
    heard.extend(update.changes)


def _worker(n: int, *, taken: int) -> LabWorker:
    now = _CLOCK.now()
    allocation = Allocation(cpu=1, memory=_GIB, nodes=5, since=now)
    worker = LabWorker.model_validate(
        {
            "metadata": {"name": f"w{n:04}", "uid": f"w-{n}", "creationTimestamp": now},
            "spec": {"region": "us-east-1", "labTrack": f"track-{n % 5}", "aws": {"amiId": "ami-1234"}},
        }
    )
    worker.status = LabWorkerStatus(
        phase="Ready",
        capacity=Capacity(cpu=64, memory=256 * _GIB),
        allocations={f"{n}-{i}": allocation.thaw() for i in range(taken)},
        conditions=[Condition(type="Ready", status="True", reason="Serving", last_transition_time=now)],
    )
    worker.status.cml.licensed = True
    return worker


def _request(n: int) -> LabInstanceRequest:
    request = LabInstanceRequest.model_validate(
        {
            "metadata": {"name": f"r{n:04}", "uid": f"r-{n}", "creationTimestamp": _CLOCK.now()},
            "spec": {
                "labTemplate": {"topology": "nodes: []"},
                "studentEmail": f"s{n}@x.edu",
                "durationMinutes": 60,
            },
        }
    )
    request.status.phase, request.status.need = "Pending", Need(cpu=1, memory=_GIB, nodes=5)
    return request
