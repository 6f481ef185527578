"""How many lab instances without a place a pool is to have room for: pure, from the requests and the pools.

A request that several pools could serve counts for one of them, so that one student brings one worker: the first by
name that can grow now. What no further worker helps (a quota, a licence, a lab too large for any) counts nowhere.
Called by `demand`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from controllers.instances.kind import LabInstanceRequest
from controllers.instances.phases import Conditions, Reasons
from controllers.instances.places import wants_place
from controllers.pools.hours import UnknownTimeZone
from controllers.pools.kind import LabWorkerPool
from controllers.pools.launches import BRAKE, stuck_by
from controllers.workers.kind import LabWorker

_NO_HELP = frozenset({Reasons.QUOTA_EXCEEDED, Reasons.TOO_LARGE, Reasons.WORKER_NOT_LICENSED})


@dataclass(frozen=True, slots=True)
class Rivals:
    """The pools for which requests can count at one moment."""

    pools: tuple[LabWorkerPool, ...]
    """In the order in which they are asked."""
    growing: frozenset[str]
    """Uids of those that can grow now."""
    stuck: frozenset[str]
    """Uids of owners of a worker that something keeps from being launched."""


def rivals_of(pools: Iterable[LabWorkerPool], pending: Iterable[LabWorker], now: datetime) -> Rivals:
    """Judge who can grow; `pending` are the workers in the phase Pending, of all pools and of none."""
    waiting = [(worker, problem) for worker in pending if not worker.deleting and (problem := stuck_by(worker))]
    braked = any(problem.reason == BRAKE for _, problem in waiting)
    stuck = frozenset(owner.uid for worker, _ in waiting for owner in worker.metadata.owner_references)
    able = [p for p in pools if p.spec.heeds_load and not p.deleting and not p.paused]
    growing = (p.uid for p in able if _can_grow(p, now, launches=not braked and p.uid not in stuck))
    return Rivals(tuple(sorted(able, key=lambda p: (p.namespace, p.name))), frozenset(growing), stuck)


def labs_for(pool: LabWorkerPool, rivals: Rivals, requests: Iterable[LabInstanceRequest], until: datetime) -> int:
    """Slots that requests which wait want of this pool by then; `requests` are those Pending or Scheduling."""
    return sum(_slots(r) for r in requests if _wants_worker(r, until) and _pool_of(r, rivals) == pool.uid)


def labs_kept_for(pool: LabWorkerPool, rivals: Rivals, requests: Iterable[LabInstanceRequest], until: datetime) -> int:
    """The same, to judge who is given up: of a pool with a stuck worker, all that it could serve.

    They count for others because of that worker; given up for it, it would be made again and be stuck again.
    """
    if pool.uid not in rivals.stuck:
        return labs_for(pool, rivals, requests, until)
    return sum(_slots(r) for r in requests if _wants_worker(r, until) and _serves(pool, r))


def _wants_worker(request: LabInstanceRequest, by: datetime) -> bool:
    """Whether a request takes a place on a worker by then, if there is one."""
    if request.spec.runs_in != "CML" or not wants_place(request, by, early=0):
        return False
    assigned = request.status.condition(Conditions.WORKER_ASSIGNED)
    return assigned is None or assigned.status == "True" or assigned.reason not in _NO_HELP


def _pool_of(request: LabInstanceRequest, rivals: Rivals) -> str | None:
    """The uid of the pool for which it counts."""
    able = [pool for pool in rivals.pools if _serves(pool, request)]
    chosen = next((pool for pool in able if pool.uid in rivals.growing), next(iter(able), None))
    return chosen.uid if chosen is not None else None


def _serves(pool: LabWorkerPool, request: LabInstanceRequest) -> bool:
    spec = request.spec
    return (
        (pool.spec.template.spec.shared or pool.namespace == request.namespace)
        and spec.lab_track in ("", pool.spec.lab_track)
        and spec.pool in (None, pool.name)
    )


def _can_grow(pool: LabWorkerPool, now: datetime, *, launches: bool) -> bool:
    """Whether load may bring the pool a worker now, by waking one or, where it `launches`, by a new one."""
    try:
        if not pool.spec.may_grow(now):
            return False
    except UnknownTimeZone:
        return False  # it decides nothing on this machine
    return pool.status.paused_replicas > 0 or (launches and pool.status.replicas < pool.spec.max_workers)


def _slots(request: LabInstanceRequest) -> int:
    need = request.status.need
    return need.slots if need is not None else 1
