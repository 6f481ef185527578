"""When a worker's labs are to be synced next, from what its status and records say: pure, so it outlives a process.

Promises a sync at the interval (spread by ±10 %, differently for each worker and time, so that a fleet does not fall
into step; longer where nobody works, a minute while records are Missing), at once when this process has not synced the
worker yet, when a new value of an annotation asks for it (refresh-labs, or reconcile-now, which all hear), when the
worker became Ready or began to drain after the last sync, and when a desiredState was reached since. A last sync that
lies in the future (a clock was set back) counts as none, and a turn that lies there is due when its time comes. Called
by the sync before anything is asked of a CML.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from controllers.labs.kind import DESIRED_STATE, MISSING, PRESENT, READY, REFRESH_ANNOTATION, LabRecord
from controllers.labs.settings import LabsSettings
from controllers.workers.kind import LabWorker
from controllers.workers.phases import Phase
from lrm.model import rfc3339
from lrm.resource import RECONCILE_ANNOTATION

_SPREAD = 0.1
_CLOCK_SLACK = timedelta(seconds=30)
_APART = 1.0
_APART_IF_MANY = 60.0
"""Seconds between lists that count when most labs are missing, and until the next list while any is."""
_AT_REST = frozenset({"STOPPED", "DEFINED_ON_CORE"})
"""States of a lab in which nobody works with it."""


def asked_for(worker: LabWorker) -> str | None:
    """The values of the annotations that ask for a sync, if there are any: a new one of either makes this another."""
    annotations = worker.metadata.annotations
    return " ".join(filter(None, (annotations.get(RECONCILE_ANNOTATION), annotations.get(REFRESH_ANNOTATION)))) or None


def is_asked_for(worker: LabWorker) -> bool:
    """Whether a sync is asked for that is not done; it may be under way."""
    return asked_for(worker) not in (None, worker.status.labs_asked)


def apart(interval: float) -> float:
    """Seconds that lie between two syncs at least, unless somebody asks; no more than this interval's shortest wait."""
    return min(_APART, interval * (1 - _SPREAD))


def apart_if_many(interval: float) -> float:
    """Seconds that lie between two lists that count when most labs are missing, however often pushes bring one."""
    return min(_APART_IF_MANY, interval) * (1 - _SPREAD)


def interval_of(worker: LabWorker, records: Sequence[LabRecord], settings: LabsSettings, now: datetime) -> float:
    """Seconds between two syncs of a worker, as it is used: often while it drains, seldom while nobody works there.

    Records that are Missing wait for the lists that prove them gone, or find them again: that takes minutes, not hours.
    """
    interval = settings.labs_refresh_interval
    if any(_waits(record) for record in records):
        interval = min(interval, _APART_IF_MANY)
    if worker.status.phase == Phase.DRAINING:
        return min(interval, settings.labs_drain_interval)
    if settings.labs_idle_interval > interval and _is_quiet(worker, records, settings.labs_idle_interval, now):
        return settings.labs_idle_interval
    return interval


def due_in(
    worker: LabWorker,
    records: Iterable[LabRecord],
    *,
    interval: float,
    now: datetime,
    first: bool = False,
    held: float = 0.0,
) -> float:
    """Seconds until the next sync; zero when it is due. `first` is true until this process has synced the worker.

    What has turned since the last sync waits `held` seconds: forty labs started one by one are not forty lists.
    """
    synced = worker.status.labs_synced_at
    if first or synced is None or synced > now + _CLOCK_SLACK or is_asked_for(worker):
        return 0.0
    turns = _turns(worker, records)
    soonest = now + timedelta(seconds=held)
    unseen = [max(turn, soonest) for turn in turns if turn is not None and turn > synced]
    # A turn that is later than now (another clock wrote it, or ours was set back) is no reason to sync before its time:
    # every sync until then would be older than it, and so due again at once.
    times = [synced + timedelta(seconds=interval * (1 + _SPREAD * _spread(worker, synced))), *unseen]
    return max(0.0, (min(times) - now).total_seconds())


def at_rest(worker: LabWorker, records: Sequence[LabRecord]) -> bool:
    """Whether a worker was synced, and nothing that has happened since asks for a sync before its time."""
    synced = worker.status.labs_synced_at
    if synced is None or is_asked_for(worker):
        return False
    if any(_waits(record) for record in records):
        return False
    return all(turn is None or turn <= synced for turn in _turns(worker, records))


def _waits(record: LabRecord) -> bool:
    """Whether a record waits for more lists that tell what has become of its lab."""
    return record.status.phase == MISSING and not record.deleting


def _is_quiet(worker: LabWorker, records: Sequence[LabRecord], seconds: float, now: datetime) -> bool:
    """Whether no lab runs or is missing, and nothing is known to have happened for so long.

    A worker that is to be stopped when it is idle is not left alone: what was listed too long ago keeps it up.
    """
    if worker.status.allocations or worker.spec.idle_detection.enabled or worker.status.labs_sync_error:
        return False
    if any(r.deleting or r.status.phase != PRESENT or r.status.state not in _AT_REST for r in records):
        return False
    times = [_turned(worker, READY), *(_happened(record) for record in records)]
    known = [time for time in times if time is not None]
    return bool(known) and now - max(known) > timedelta(seconds=seconds)


def _happened(record: LabRecord) -> datetime | None:
    """When the lab was last seen to come, to change or to return."""
    status = record.status
    times = [
        status.first_seen_at,
        *(entry.timestamp for entry in status.operation_history[-1:]),
        *(step.at for step in status.phase_history[-1:]),
    ]
    return max((time for time in times if time is not None), default=None)


def _turns(worker: LabWorker, records: Iterable[LabRecord]) -> list[datetime | None]:
    """When what asks for a sync happened last."""
    draining = worker.status.timestamps.draining_started_at if worker.status.phase == Phase.DRAINING else None
    return [_turned(worker, READY), draining, *(_turned(record, DESIRED_STATE) for record in records)]


def _turned(resource: LabWorker | LabRecord, condition: str) -> datetime | None:
    """When the condition became True; None where it is not."""
    found = resource.status.condition(condition)
    return found.last_transition_time if found is not None and found.status == "True" else None


def _spread(worker: LabWorker, synced: datetime) -> float:
    """A number from -1 to 1 that looks random and is the same whenever it is asked for."""
    return zlib.crc32(f"{worker.uid} {rfc3339(synced)}".encode()) / 0xFFFFFFFF * 2 - 1
