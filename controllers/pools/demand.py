"""How busy a pool's workers are, and what else is going to be placed on them.

`Demand` is what the pools' controller asks. `ObservedDemand` answers from the objects that there are: allocations,
the labs' sync, the measured utilization, and the lab instances that wait. What is unknown is None, never 0: nothing is
called idle by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from controllers.instances.kind import LabInstanceRequest
from controllers.instances.phases import WAITING
from controllers.labs.kind import records_of_worker
from controllers.pools.kind import LabWorkerPool
from controllers.pools.waiting import labs_for, labs_kept_for, rivals_of
from controllers.workers.kind import LabWorker, serving
from controllers.workers.phases import Phase
from lrm.cache import Cache


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """One worker's part."""

    hosts: bool
    """Whether a lab instance is placed on it or a lab runs there, for all that is known: then it is not taken away."""
    labs: int | None = None
    slots: int = 0
    """Labs that may be placed on it in all."""
    cpu: float | None = None
    """0 to 1."""
    memory: float | None = None
    """0 to 1."""

    @property
    def free(self) -> int:
        """Labs that can still be placed on it."""
        return max(0, self.slots - (self.labs or 0))


@dataclass(frozen=True, slots=True)
class Load:
    """A pool's load at one moment."""

    workers: Mapping[str, WorkerLoad] = field(default_factory=dict)
    """By name of the worker."""
    waiting: int = 0
    """Labs that want a place and have none: now, or at a known time before a worker begun now would be ready."""
    expected: int = 0
    """The same, as long ahead as any worker is begun: that time falls once a first one was quick, and what was begun
    by the longer one stays for those for whom it was. Of a pool with a stuck worker, also what counts for others."""

    def of(self, worker: LabWorker) -> WorkerLoad:
        """A worker's load; of one that nothing is known about it is unknown."""
        return self.workers.get(worker.name) or WorkerLoad(hosts=False, slots=worker.spec.max_concurrent_labs)


class Demand(Protocol):
    """Tells the load of a pool."""

    def load(
        self, pool: LabWorkerPool, workers: Sequence[LabWorker], *, now: datetime, until: datetime, horizon: datetime
    ) -> Load:
        """The load of the pool's workers, what wants a place on them until then, and what will; never waits."""
        ...


class ObservedDemand:
    """The load as the cache shows it: what has a place on a worker already, and what waits for one."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def load(
        self, pool: LabWorkerPool, workers: Sequence[LabWorker], *, now: datetime, until: datetime, horizon: datetime
    ) -> Load:
        known = {worker.name: self._of(worker) for worker in workers}
        if not pool.spec.heeds_load:
            return Load(known)
        pending = self._cache.by_index(LabWorker, "phase", Phase.PENDING.value)
        rivals = rivals_of(self._cache.all(LabWorkerPool), pending, now)
        requests = [r for phase in WAITING for r in self._cache.by_index(LabInstanceRequest, "phase", phase.value)]
        return Load(known, labs_for(pool, rivals, requests, until), labs_kept_for(pool, rivals, requests, horizon))

    def _of(self, worker: LabWorker) -> WorkerLoad:
        status = worker.status
        placed, counted, used = len(status.allocations), status.labs_count, status.utilization
        cpu = used.cpu_percent if used else None
        memory = used.memory_percent if used else None
        return WorkerLoad(
            hosts=hosts_labs(self._cache, worker),
            labs=None if counted is None and not placed else max(placed, counted or 0),
            slots=worker.spec.max_concurrent_labs,
            cpu=None if cpu is None else cpu / 100,
            memory=None if memory is None else memory / 100,
        )


def hosts_labs(cache: Cache, worker: LabWorker) -> bool:
    """Whether a lab instance is placed on the worker or a lab runs on it, or its own controller still says so.

    So does one that serves while its labs cannot be listed, or before they ever were: unknown is not none.
    """
    status = worker.status
    if status.allocations or status.phase == Phase.ACTIVE:
        return True
    if serving(worker) and not labs_are_known(worker):
        return True
    records = records_of_worker(cache, worker.namespace, worker.name)
    return any(r.status.state == "STARTED" and r.status.missing_since is None for r in records)


def labs_are_known(worker: LabWorker) -> bool:
    """Whether the labs on a worker were listed, the last time too that this was tried."""
    return worker.status.labs_synced_at is not None and not worker.status.labs_sync_error
