"""Where the lab of a record is: on a CML that can be asked now, on one that cannot, or on none any more.

Promises that `Gone` is said only of a CML that cannot come back: its worker is gone or was made anew, or the instance
that had the lab is terminated or no longer the worker's. Everything that may change (a stopped worker, a CML that is
not identified, a value we cannot read) is `Away`. A record never waits for what is `Gone`. Pure reading of the cache;
called by the lab-records controller before anything is asked of a CML.
"""

from __future__ import annotations

from dataclasses import dataclass

from controllers.cml.sessions import trust_pending
from controllers.labs.kind import LabRecord
from controllers.workers.kind import LabWorker
from controllers.workers.phases import CML_RUNNING, Phase
from lrm.cache import Cache


@dataclass(frozen=True, slots=True)
class Gone:
    """The CML that had the lab exists no more, for this reason."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Away:
    """The lab's CML cannot be asked now; a change of the worker says when it can."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Home:
    """The worker whose CML has the lab and can be asked."""

    worker: LabWorker


AWAY_REASONS = frozenset({"WorkerUnreadable", "WorkerNotServing", "CMLNotIdentified", "ObserveOnly"})
"""Every reason of an `Away`."""
OBSERVING = Away("ObserveOnly", "nothing is changed on a CML that is only observed")


def is_failure(reason: str) -> bool:
    """Whether a condition's reason is the class of CML's error that ended a try; another try follows, ever later."""
    return reason.startswith("Cml")


def holds_up(reason: str) -> bool:
    """Whether a condition's reason says that nothing is under way: CML is away, or the next try is still to come."""
    return reason in AWAY_REASONS or is_failure(reason)


def home_of(record: LabRecord, cache: Cache) -> Home | Away | Gone:
    """Where a record's lab is, as far as the cache knows."""
    name = record.spec.worker_ref
    item = cache.item(cache.registry.of(LabWorker), record.namespace, name)
    if item is None:
        # The cache shows all kinds at one revision, at which this incarnation of the worker was gone for good.
        return Gone("WorkerGone", f"the worker {name} does not exist")
    worker = cache.get(LabWorker, record.namespace, name)
    if worker is None:
        return Away("WorkerUnreadable", f"the worker {name} cannot be decoded by this version")
    return _home_on(worker, record)


def _home_on(worker: LabWorker, record: LabRecord) -> Home | Away | Gone:
    name, ec2 = worker.name, worker.status.ec2
    owner = next((o.uid for o in record.metadata.owner_references if o.kind == worker.kind), worker.uid)
    if owner != worker.uid:
        return Gone("WorkerReplaced", f"the worker {name} was deleted and made anew")
    if worker.status.phase == Phase.TERMINATED or ec2.state == "terminated":
        return Gone("InstanceTerminated", f"the instance of {name} is terminated")
    had = record.status.instance_id
    if had and had != (ec2.instance_id or ""):
        return Gone("InstanceReplaced", f"the worker {name} no longer runs on {had}")
    if worker.status.phase not in CML_RUNNING:
        return Away("WorkerNotServing", f"the worker {name} is {worker.status.phase}")
    if not identified(worker):
        return Away("CMLNotIdentified", f"it is not settled which CML answers for {name}")
    return Home(worker)


def identified(worker: LabWorker) -> bool:
    """Whether it is known which CML is the worker's, so that another one at its address is noticed."""
    return worker.status.cml.identity is not None and not trust_pending(worker)


def can_be_asked(worker: LabWorker) -> bool:
    """Whether the worker's CML is expected to answer, and to be known when it does."""
    return worker.status.phase in CML_RUNNING and identified(worker)
