"""Questions about LabWorkers that others ask, answered from the cache's indexes.

What they give is as old as the cache; whoever decides on it writes under the object's resourceVersion. Called by
other controllers and by the routes.
"""

from __future__ import annotations

from collections import Counter

from controllers.labs.kind import LabRecord, records_of_worker
from controllers.workers.kind import LabWorker
from controllers.workers.phases import SERVING, Phase
from lrm.cache import Cache


def by_track(cache: Cache, track: str, namespace: str = "") -> list[LabWorker]:
    """The workers of a lab track."""
    return _inside(cache.by_index(LabWorker, "track", track), namespace)


def by_phase(cache: Cache, phase: Phase, namespace: str = "") -> list[LabWorker]:
    """The workers that stand in a phase."""
    return _inside(cache.by_index(LabWorker, "phase", phase.value), namespace)


def active(cache: Cache, namespace: str = "") -> list[LabWorker]:
    """Workers on which labs run or may run: the serving ones and those that drain."""
    return sorted(
        (w for phase in SERVING | {Phase.DRAINING} for w in by_phase(cache, phase, namespace)),
        key=lambda w: (w.namespace, w.name),
    )


def ready(cache: Cache, namespace: str = "") -> list[LabWorker]:
    """Workers that take new labs now."""
    return [w for w in active(cache, namespace) if _is_true(w, "AcceptingLabs") and not w.deleting]


def draining(cache: Cache, namespace: str = "") -> list[LabWorker]:
    """Workers on their way out of service that still let labs end."""
    return by_phase(cache, Phase.DRAINING, namespace)


def started_labs(cache: Cache, worker: LabWorker) -> list[LabRecord]:
    """The labs that run on a worker, as far as it is known."""
    return [r for r in records_of_worker(cache, worker.namespace, worker.name) if is_started(r)]


def is_started(record: LabRecord) -> bool:
    """Whether a lab runs, and was in the last complete list."""
    return record.status.state == "STARTED" and record.status.missing_since is None


def count_by_phase(cache: Cache, namespace: str = "") -> Counter[str]:
    """How many workers stand where."""
    return Counter(str(w.status.phase) for w in cache.all(LabWorker, namespace))


def count_by_track(cache: Cache, namespace: str = "") -> Counter[str]:
    """How many workers each track has."""
    return Counter(w.spec.lab_track for w in cache.all(LabWorker, namespace))


def _inside(workers: list[LabWorker], namespace: str) -> list[LabWorker]:
    return [w for w in workers if not namespace or w.namespace == namespace]


def _is_true(worker: LabWorker, kind: str) -> bool:
    condition = worker.status.condition(kind)
    return condition is not None and condition.status == "True"
