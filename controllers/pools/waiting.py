"""How many lab instances without a place a pool is to have room for: pure, from the requests and the pools.

A request that several pools could serve counts for one of them, so that one student brings one worker: the first by
name that can still grow. What no further worker helps (a quota, a licence, a lab too large for any) counts nowhere.
Called by `demand`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from controllers.instances.kind import LabInstanceRequest
from controllers.instances.phases import Conditions, Reasons
from controllers.instances.places import wants_place
from controllers.pools.kind import LabWorkerPool

_NO_HELP = frozenset({Reasons.QUOTA_EXCEEDED, Reasons.TOO_LARGE, Reasons.WORKER_NOT_LICENSED})


def labs_for(
    pool: LabWorkerPool, pools: Iterable[LabWorkerPool], requests: Iterable[LabInstanceRequest], until: datetime
) -> int:
    """Slots that requests which wait want of this pool by then; `requests` are those Pending or Scheduling."""
    rivals = sorted((p for p in pools if p.spec.heeds_load and not p.deleting), key=lambda p: (p.namespace, p.name))
    return sum(_slots(r) for r in requests if _wants_worker(r, until) and _pool_of(r, rivals) == pool.uid)


def _wants_worker(request: LabInstanceRequest, by: datetime) -> bool:
    """Whether a request takes a place on a worker by then, if there is one."""
    if request.spec.runs_in != "CML" or not wants_place(request, by, early=0):
        return False
    assigned = request.status.condition(Conditions.WORKER_ASSIGNED)
    return assigned is None or assigned.status == "True" or assigned.reason not in _NO_HELP


def _pool_of(request: LabInstanceRequest, pools: Sequence[LabWorkerPool]) -> str | None:
    """The uid of the pool for which it counts."""
    able = [pool for pool in pools if _serves(pool, request)]
    chosen = next((pool for pool in able if _can_grow(pool)), next(iter(able), None))
    return chosen.uid if chosen is not None else None


def _serves(pool: LabWorkerPool, request: LabInstanceRequest) -> bool:
    spec = request.spec
    return (
        (pool.spec.template.spec.shared or pool.namespace == request.namespace)
        and spec.lab_track in ("", pool.spec.lab_track)
        and spec.pool in (None, pool.name)
    )


def _can_grow(pool: LabWorkerPool) -> bool:
    return pool.status.replicas < pool.spec.max_workers or pool.status.paused_replicas > 0


def _slots(request: LabInstanceRequest) -> int:
    need = request.status.need
    return need.slots if need is not None else 1
