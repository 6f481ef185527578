"""What workers, the engine and requests come to as the scheduler's values: who offers how much, who wants what.

Rules of a LabWorker: it takes labs while it serves, is Ready, wishes to stay so, and is neither paused, nor observed
only, nor deleting. That is its condition AcceptingLabs without the part about room, which lags behind `allocations`.
One whose last health check failed, and not yet three of them, is doubtful.
Used is what is reserved, and besides that every lab that runs there and is no instance's: it takes a slot (of
`maxConcurrentLabs`) and its nodes; a stopped one takes nothing, and what foreign labs use of cpu and memory CML does
not tell. Pure, but for lookups in the cache's indexes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime

from controllers.containers.documents import EngineInfo
from controllers.instances.kind import LabInstanceRequest, WorkerRef, placed
from controllers.instances.phases import PLACED, WAITING
from controllers.instances.scheduler import UNBOUNDED_NODES, Amount, Place, Wanted
from controllers.instances.settings import InstanceSettings
from controllers.labs.kind import LabRecord, runs
from controllers.workers.decisions import Goal, goal_of
from controllers.workers.kind import LabWorker, serving
from controllers.workers.phases import Conditions
from lrm.cache import Cache, Change

_LONG_AGO = datetime.min.replace(tzinfo=UTC)
ENGINE = WorkerRef(kind="Engine", name="docker")
"""The place of everything that runs in a container; with it goes the uid of the engine that answers."""

EngineTold = Callable[[], EngineInfo | None]
"""What the engine tells of itself; None while it does not answer, or none is configured."""

_OWN_TITLE = re.compile(r"lrm-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""Titles of instances' labs, of other installations' too; a reservation stands for them, not their record. It stands
for those as well that their students gave another title: a request knows its lab.
"""


def closed(worker: LabWorker) -> str:
    """Why no lab is placed on a worker now, in a word; empty when labs are taken."""
    if worker.deleting:
        return "Deleting"
    if not serving(worker):
        return worker.status.phase or "Pending"
    if goal_of(worker) is not Goal.READY:
        return "Draining"
    if worker.paused:
        return "Paused"
    if worker.spec.observe_only:
        return "ObserveOnly"
    ready = worker.status.condition(Conditions.READY)
    return "" if ready is not None and ready.status == "True" else "NotReady"


def place_of(worker: LabWorker, foreign: Amount) -> Place:
    """A worker as a place; `foreign` is what labs take there that are no instances'."""
    spec, status = worker.spec, worker.status
    cml, capacity = spec.cml, status.capacity
    held = status.allocations.values()
    return Place(
        ref=WorkerRef(
            kind="LabWorker",
            namespace=worker.namespace,
            name=worker.name,
            uid=worker.uid,
            instance_id=status.ec2.instance_id or "",
        ),
        closed=closed(worker),
        total=Amount(
            capacity.cpu if capacity else 0,
            capacity.memory if capacity else 0,
            spec.max_concurrent_labs,
            cml.max_nodes_licensed if status.cml.licensed else cml.max_nodes_unlicensed,
        ),
        used=Amount(
            foreign.cpu + sum(a.cpu for a in held),
            foreign.memory + sum(a.memory for a in held),
            foreign.slots + sum(a.slots for a in held),
            foreign.nodes + sum(a.nodes for a in held),
        ),
        licensed_nodes=cml.max_nodes_licensed,
        shared=spec.shared,
        doubtful=status.cml.failed_checks > 0,
        track=spec.lab_track,
        pools=frozenset(o.name for o in worker.metadata.owner_references if o.kind == "LabWorkerPool"),
    )


def engine_place(told: EngineInfo | None, settings: InstanceSettings, used: Amount) -> Place | None:
    """The engine as a place, within what the settings leave to labs; None while there is none."""
    if told is None:
        return None
    total = Amount(
        settings.docker_cpu or told.cpus,
        settings.docker_memory or told.memory,
        settings.docker_slots,
        UNBOUNDED_NODES,
    )
    return Place(ref=ENGINE.model_copy(update={"uid": told.id}), closed="", total=total, used=used)


def foreign_labs(cache: Cache, namespace: str, name: str) -> Amount:
    """What labs take on a worker that run there and are no instances'."""
    found = cache.by_index(LabRecord, "running", f"{namespace}/{name}")
    strangers = [
        record
        for record in found
        if not _OWN_TITLE.fullmatch(record.status.title)
        and not cache.by_index(LabInstanceRequest, "lab", record.spec.lab_id)
    ]
    return Amount(slots=len(strangers), nodes=sum(record.status.node_count or 0 for record in strangers))


def student_of(request: LabInstanceRequest) -> str:
    """By whom quotas count."""
    return request.spec.student_email.lower()


def counts(request: LabInstanceRequest) -> bool:
    """Whether it counts for quotas: it waits or runs, or is being stopped."""
    if request.status.phase in WAITING:
        return not request.deleting
    return request.status.phase in PLACED


def wants_place(request: LabInstanceRequest, now: datetime, early: float) -> bool:
    """Whether it takes a place as soon as there is one; it may begin `early` seconds ahead of its schedule."""
    return waits(request) and wanted_of(request, early).is_ready(now)


def waits(request: LabInstanceRequest) -> bool:
    """Whether it has no place and may want one, now or later."""
    return request.status.phase in WAITING and not request.deleting and not placed(request)


def wanted_of(request: LabInstanceRequest, early: float) -> Wanted:
    """A request without a place, as the scheduler knows it."""
    spec, status = request.spec, request.status
    created = request.metadata.creation_timestamp or status.prepared_at or _LONG_AGO
    return Wanted(
        uid=request.uid,
        namespace=request.namespace,
        student=student_of(request),
        runtime=spec.runs_in,
        since=(spec.scheduled_start_time or created, created, request.uid),
        need=status.need,
        ready=not request.paused and spec.desired_phase == "Running",
        begins=max((at for at in (request.due_at(early), status.retry_at) if at is not None), default=None),
        ends=request.ends_at,
        track=spec.lab_track,
        pool=spec.pool,
    )


def gives_room(change: Change, now: datetime, early: float) -> bool:
    """Whether after a change there may be room, or a quota, where there was none."""
    old, new = (item.resource if item else None for item in (change.old, change.new))
    match old, new:
        case (LabWorker() | None, LabWorker()):
            return _worker_gives(old, new)
        case (LabRecord(), LabRecord() | None):
            return runs(old) and not (new is not None and runs(new) and _nodes(old) <= _nodes(new))
        case (LabInstanceRequest(), LabInstanceRequest() | None):
            return _request_gives(old, new, now, early)
        case _:
            return False


def _worker_gives(old: LabWorker | None, new: LabWorker) -> bool:
    after = place_of(new, Amount())
    if after.closed:
        return False
    if old is None:
        return True
    before = place_of(old, Amount())
    if before.closed or (before.ref, before.shared, before.track, before.pools) != (
        after.ref,
        after.shared,
        after.track,
        after.pools,
    ):
        return True
    gained = after.free - before.free
    return gained.cpu > 0 or gained.memory > 0 or gained.slots > 0 or gained.nodes > 0


def _request_gives(old: LabInstanceRequest, new: LabInstanceRequest | None, now: datetime, early: float) -> bool:
    if new is None:
        return counts(old) or placed(old)
    if placed(old) and not placed(new):
        return True
    if counts(old) and not counts(new):
        return True
    if placed(new) or old.status.phase not in WAITING:
        return False
    # One that waited before others may want less now, later, elsewhere or for another student, or be held back.
    moved = old.metadata.generation != new.metadata.generation or old.status.need not in (None, new.status.need)
    return moved or (wants_place(old, now, early) and not wants_place(new, now, early))


def _nodes(record: LabRecord) -> int:
    return record.status.node_count or 0
