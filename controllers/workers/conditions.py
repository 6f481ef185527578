"""The conditions of a LabWorker and the totals of its capacity, derived from the rest of it.

One pure function, called before every write of the status: conditions can neither flap on their own nor be forgotten.
Messages hold nothing that changes by itself, so that a worker at rest is written never.
"""

from __future__ import annotations

from datetime import datetime

from controllers.workers.decisions import Goal, goal_of, is_paused
from controllers.workers.kind import TRUST_ANNOTATION, WAKE_ANNOTATION, LabWorker
from controllers.workers.phases import CML_RUNNING, SERVING, Conditions, Phase, Reasons

FAILED_CHECKS = 3
"""Checks in a row that must fail before the health check has failed: one lost packet is no outage."""

_Verdict = tuple[bool | None, str, str]


def refresh(worker: LabWorker, now: datetime) -> None:
    """Set what follows from the rest: totals and conditions; those that are as they were keep their times."""
    capacity, cml = worker.status.capacity, worker.spec.cml
    if capacity is not None:
        capacity.nodes = cml.max_nodes_licensed if worker.status.cml.licensed else cml.max_nodes_unlicensed
        capacity.slots = worker.spec.max_concurrent_labs
    verdicts: dict[str, _Verdict] = {
        Conditions.EC2_PROVISIONED: _provisioned(worker),
        Conditions.CML_READY: _cml_ready(worker),
        Conditions.LICENSED: _licensed(worker),
        Conditions.HEALTH_CHECK_PASSED: _healthy(worker),
        Conditions.CAPACITY_AVAILABLE: _capacity(worker),
        Conditions.READY: _ready(worker),
    }
    verdicts[Conditions.ACCEPTING_LABS] = _accepting(
        worker, verdicts[Conditions.READY], verdicts[Conditions.CAPACITY_AVAILABLE]
    )
    if _mismatch(worker):
        verdicts[Conditions.CML_IDENTITY_MISMATCH] = (True, Reasons.IDENTITY_MISMATCH, _what_to_do(worker))
    elif worker.status.condition(Conditions.CML_IDENTITY_MISMATCH):
        verdicts[Conditions.CML_IDENTITY_MISMATCH] = (False, Reasons.IDENTITY_MATCHES, "")
    if is_paused(worker):
        verdicts[Conditions.IDLE] = _idle(worker)
    elif worker.status.condition(Conditions.IDLE):
        verdicts[Conditions.IDLE] = (False, Reasons.IN_USE, "")
    for kind, (status, reason, message) in verdicts.items():
        old = worker.status.condition(kind)
        word = "Unknown" if status is None else str(status)
        if old is not None and (old.status, old.reason, old.message) == (word, reason, message):
            continue
        worker.status.set_condition(
            kind, status, reason, message, now=now, generation=worker.status.observed_generation
        )


def tell_of_clock(worker: LabWorker, now: datetime, *, jumped: bool) -> None:
    """Say that deadlines are held back, while they are; a worker that no step of the clock concerned is not told."""
    # Nothing is due of a worker that has ended, and nobody would look again to take the word back.
    jumped = jumped and worker.status.phase != Phase.TERMINATED
    told = worker.status.condition(Conditions.CLOCK_STEADY)
    if jumped:
        message = "the wall clock was set by more than 30 s a moment ago: deadlines are held back until it is steady"
        worker.status.set_condition(Conditions.CLOCK_STEADY, False, Reasons.CLOCK_JUMPED, message, now=now)
    elif told is not None and told.status != "True":
        worker.status.set_condition(Conditions.CLOCK_STEADY, True, Reasons.CLOCK_STEADY, "", now=now)


def _mismatch(worker: LabWorker) -> bool:
    error = worker.status.cml.last_error
    return error is not None and error.reason == Reasons.IDENTITY_MISMATCH


def _what_to_do(worker: LabWorker) -> str:
    """The mismatch, and how a person who means this CML has it taken."""
    error, pinned = worker.status.cml.last_error, worker.spec.cml.tls.fingerprint
    told = f"{error.message}; " if error else ""
    first = ", once spec.cml.tls.fingerprint is that of its certificate" if pinned else ""
    return f"{told}if it is to be this worker's, a new value of the annotation {TRUST_ANNOTATION} takes it{first}"


def _idle(worker: LabWorker) -> _Verdict:
    minutes = worker.spec.idle_detection.timeout_minutes
    message = f"nobody used it for {minutes} min; a new value of the annotation {WAKE_ANNOTATION} starts it again"
    return True, Reasons.IDLE, message


def _provisioned(worker: LabWorker) -> _Verdict:
    ec2, phase = worker.status.ec2, worker.status.phase
    trouble = ec2.last_error
    if ec2.instance_id is None or phase in {Phase.PENDING, Phase.PROVISIONING_EC2}:
        if trouble:
            return False, trouble.reason, trouble.message
        return False, Reasons.LAUNCHING if phase == Phase.PROVISIONING_EC2 else Reasons.NO_INSTANCE, ""
    if ec2.state in {"terminated", "shutting-down"}:
        return False, Reasons.INSTANCE_TERMINATED, f"EC2 says that {ec2.instance_id} is {ec2.state}"
    # An error of EC2's is no word on the instance: it stays what it was, and the message says what is wrong.
    message = trouble.message if trouble else ""
    if ec2.state in {"stopping", "stopped"}:
        return True, Reasons.INSTANCE_STOPPED, message
    return True, Reasons.INSTANCE_RUNNING, message


def _cml_ready(worker: LabWorker) -> _Verdict:
    cml, phase = worker.status.cml, worker.status.phase
    trouble = cml.last_error
    if _mismatch(worker):
        return False, Reasons.IDENTITY_MISMATCH, trouble.message if trouble else ""
    if phase in CML_RUNNING:
        if cml.ready:
            return True, Reasons.CML_READY, f"CML {cml.version}" if cml.version else ""
        return False, trouble.reason if trouble else Reasons.CML_NOT_READY, trouble.message if trouble else ""
    if phase in {Phase.STARTING, Phase.FAILED} and trouble:
        return False, trouble.reason, trouble.message
    return False, Reasons.BOOTING if phase == Phase.STARTING else Reasons.NOT_SERVING, ""


def _licensed(worker: LabWorker) -> _Verdict:
    cml = worker.status.cml
    if cml.licensed:
        return True, Reasons.LICENSED, ""
    if worker.status.phase == Phase.LICENSING:
        return False, Reasons.LICENSE_REGISTERING, ""
    if cml.registration is not None and cml.registration.failed is not None:
        return False, cml.registration.failed.reason, cml.registration.failed.message
    return False, Reasons.NO_LICENSE if worker.spec.wants_license else Reasons.NO_LICENSE_WANTED, ""


def _healthy(worker: LabWorker) -> _Verdict:
    cml = worker.status.cml
    if worker.status.phase not in CML_RUNNING:
        return None, Reasons.NOT_CHECKED, ""
    if cml.failed_checks >= FAILED_CHECKS:
        trouble = cml.last_error
        return False, trouble.reason if trouble else Reasons.UNREACHABLE, trouble.message if trouble else ""
    return True, Reasons.HEALTHY, ""


def _capacity(worker: LabWorker) -> _Verdict:
    capacity = worker.status.capacity
    if capacity is None or worker.status.phase not in CML_RUNNING:
        return None, Reasons.NOT_CHECKED, ""
    used = sum(a.slots for a in worker.status.allocations.values())
    if used < capacity.slots:
        return True, Reasons.CAPACITY_LEFT, ""
    return False, Reasons.FULL, f"all {capacity.slots} places for labs are taken"


def _ready(worker: LabWorker) -> _Verdict:
    status = worker.status
    if status.failure is not None and status.phase == Phase.FAILED:
        return False, status.failure.reason, status.failure.message
    if status.phase not in SERVING:
        trouble = status.cml.last_error or status.ec2.last_error
        return False, str(status.phase) or Reasons.NOT_SERVING, trouble.message if trouble else ""
    if worker.deleting:
        return False, Reasons.DELETING, ""
    if status.ec2.state not in {"running", "pending"}:
        return False, Reasons.INSTANCE_NOT_RUNNING, f"EC2 says that the instance is {status.ec2.state}"
    ready, reason, message = _cml_ready(worker)
    if not ready:
        return False, reason, message
    return True, Reasons.SERVING if status.cml.licensed else Reasons.UNLICENSED, ""


def _accepting(worker: LabWorker, ready: _Verdict, capacity: _Verdict) -> _Verdict:
    if not ready[0]:
        return False, Reasons.NOT_SERVING, ""
    if goal_of(worker) is not Goal.READY:
        return False, Reasons.DRAINING, ""
    if not capacity[0]:
        return False, capacity[1], capacity[2]
    return True, Reasons.SERVING, ""
