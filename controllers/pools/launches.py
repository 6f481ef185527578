"""What keeps a pool's worker from being launched for the first time, for as long as nobody does anything about it.

Such a worker is not on its way. Pure; called by `decisions`, `waiting` and the controller.
"""

from __future__ import annotations

from controllers.workers.kind import LabWorker
from controllers.workers.phases import Phase, Reasons
from controllers.workers.status import Problem

BRAKE = Reasons.MAX_INSTANCES
"""The limit on the installation's instances: while it holds one worker, no pool's worker is launched."""

LASTING = frozenset({BRAKE, "AWSAuthFailed", "AccountForbidden", "UnknownAccount", "UnknownRegion", "WrongAccount"})
"""Reasons that end when a person mends something, or another instance ends; nobody knows when."""


def stuck_by(worker: LabWorker) -> Problem | None:
    """What keeps a worker from its first launch, if it lasts."""
    ec2 = worker.status.ec2
    if worker.status.phase != Phase.PENDING or ec2.instance_id is not None or ec2.sent_at is not None:
        return None
    return ec2.last_error if ec2.last_error is not None and ec2.last_error.reason in LASTING else None
