"""The worker that has an instance's place: what the cache knows of it, before its CML is asked anything.

Promises that `Lost` is said only where waiting is no use: the worker is gone or was made anew, its instance is another
one, ended or about to be, or it is Failed. A Failed worker may still have the lab: it is a stray once the worker is
back (`strays`). Everything that can come back is `Away`. Pure reading.
"""

from __future__ import annotations

from dataclasses import dataclass

from controllers.instances.kind import WorkerRef
from controllers.labs.homes import identified
from controllers.workers.decisions import Goal, goal_of
from controllers.workers.kind import LabWorker
from controllers.workers.phases import CML_RUNNING, Phase
from lrm.cache import Cache

_ENDS: dict[str, str] = {
    Phase.TERMINATING_EC2: "is being terminated",
    Phase.TERMINATED: "is terminated",
    Phase.FAILED: "has failed",
}


@dataclass(frozen=True, slots=True)
class Lost:
    """The place is no more, for this reason."""

    message: str


@dataclass(frozen=True, slots=True)
class Away:
    """Its CML cannot be asked now."""

    message: str


def place_of(ref: WorkerRef, cache: Cache) -> LabWorker | Lost | Away:
    """The worker, where its CML can be asked."""
    item = cache.item(cache.registry.of(LabWorker), ref.namespace, ref.name)
    if item is None:
        return Lost(f"the worker {ref.name} does not exist any more")
    worker = item.resource
    if not isinstance(worker, LabWorker):
        return Away(f"the worker {ref.name} cannot be decoded by this version")
    lost = _why_lost(worker, ref)
    if lost:
        return Lost(lost)
    if worker.status.phase not in CML_RUNNING:
        return Away(f"the worker {ref.name} is {worker.status.phase}")
    if not identified(worker):
        return Away(f"it is not settled which CML answers for {ref.name}")
    return worker


def _why_lost(worker: LabWorker, ref: WorkerRef) -> str:
    phase, ec2 = worker.status.phase, worker.status.ec2
    if ref.uid and worker.uid != ref.uid:
        return f"the worker {ref.name} was deleted and made anew"
    if ref.instance_id and ec2.instance_id != ref.instance_id:
        return f"the worker {ref.name} no longer runs on {ref.instance_id}"
    # Nothing takes it back from there, and a dead CML's licence is waited for as long as its deadline.
    if phase == Phase.UNLICENSING and goal_of(worker) is Goal.TERMINATED:
        phase = Phase.TERMINATING_EC2
    if phase in _ENDS:
        return f"the worker {ref.name} {'was deleted' if worker.deleting else _ENDS[phase]}"
    return f"the instance of {ref.name} is terminated" if ec2.state == "terminated" else ""
