"""What is to be done, decided from what is known: pure functions without the clock, the store or the world.

Each answers one question of the workers' controller; tables of tests stand on them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from enum import Enum, auto

from controllers.aws.ec2 import Ec2Instance, LaunchParameters
from controllers.workers.kind import DRAIN_ANNOTATION, WAKE_ANNOTATION, LabWorker
from controllers.workers.phases import Conditions, Phase, Reasons
from controllers.workers.status import Ec2Status, Problem
from lrm.resource import RETRY_ANNOTATION

UID_TAG, INSTALLATION_TAG = "lrm/uid", "lrm/installation"
NAME_TAG, NAMESPACE_TAG = "lrm/name", "lrm/namespace"
RETAIN_TAG = "lrm/retain"
"""On what outlives its worker, so that it can be told even when the worker was lost with its store."""

KEEPABLE = frozenset({"pending", "running", "stopping", "stopped"})
"""States of an instance that can still serve."""

LAUNCHES_MOST = 3
"""Launches in one provisioning whose instances EC2 itself ended, before that is taken for an answer."""


class Goal(Enum):
    """What the worker is to become."""

    READY = auto()
    DRAINING = auto()
    STOPPED = auto()
    TERMINATED = auto()


_GOALS = {
    "Ready": Goal.READY,
    "Draining": Goal.DRAINING,
    "Stopped": Goal.STOPPED,
    "Terminated": Goal.TERMINATED,
}


def goal_of(worker: LabWorker) -> Goal:
    """The wish of the spec; an object that is being deleted wishes to end, one that is paused to be stopped."""
    if worker.deleting:
        return Goal.TERMINATED
    goal = _GOALS[worker.spec.desired_phase]
    return Goal.STOPPED if goal is Goal.READY and is_paused(worker) else goal


def is_paused(worker: LabWorker) -> bool:
    """Whether idleness has stopped the worker, or is about to, and nobody has said a word since (see `idle`)."""
    idle = worker.status.idle
    if idle is None or idle.paused_at is None or not worker.spec.idle_detection.enabled:
        return False
    return worker.metadata.annotations.get(WAKE_ANNOTATION) == idle.wake


def drains_before_delete(worker: LabWorker) -> bool:
    """Whether the end, asked for by deletion or desiredPhase, first waits for the labs."""
    return worker.metadata.annotations.get(DRAIN_ANNOTATION, "false") != "false"


def ends_at_once(worker: LabWorker) -> bool:
    """Whether the worker is to go without waiting for its labs: a host that nobody wants any more bills by the hour."""
    return goal_of(worker) is Goal.TERMINATED and not drains_before_delete(worker)


def retry_of(worker: LabWorker) -> str | None:
    """The present value of the annotation that asks for another try."""
    return worker.metadata.annotations.get(RETRY_ANNOTATION)


def may_retry(worker: LabWorker) -> bool:
    """Whether something that a person controls has changed since the worker failed."""
    failure = worker.status.failure
    return failure is None or (failure.generation, failure.retry) != (worker.metadata.generation, retry_of(worker))


def may_license(worker: LabWorker) -> bool:
    """Whether a licence is wanted and this very wish has not failed before."""
    done = worker.status.cml.registration
    if not worker.spec.wants_license:
        return False
    return (
        done is None
        or done.failed is None
        or (done.generation, done.retry) != (worker.metadata.generation, retry_of(worker))
    )


def may_hold_seat(worker: LabWorker) -> bool:
    """Whether Smart Licensing may count a seat for this worker: CML said so, or a registration may yet come through."""
    cml = worker.status.cml
    if cml.licensed or cml.registration is None:
        return cml.licensed
    failed = cml.registration.failed
    return failed is None or failed.reason == Reasons.LICENSE_TIMEOUT


def at_rest(worker: LabWorker) -> bool:
    """Whether the next look at a worker may come as late as `worker_rest_interval` allows: nothing is on its way.

    Every wish was carried out or given up, nothing is wrong or in doubt, and no deadline runs.
    """
    status, goal = worker.status, goal_of(worker)
    steady = status.condition(Conditions.CLOCK_STEADY)
    if status.observed_generation != worker.metadata.generation or (steady is not None and steady.status == "False"):
        return False
    well = status.ec2.last_error is None and status.cml.last_error is None and status.cml.failed_checks == 0
    match status.phase:
        case Phase.TERMINATED:
            return True
        case Phase.FAILED:
            return goal is not Goal.TERMINATED and not may_retry(worker)
        case Phase.STOPPED:
            return well and goal in (Goal.STOPPED, Goal.DRAINING) and status.ec2.state == "stopped"
        case Phase.READY | Phase.READY_UNLICENSED | Phase.ACTIVE:
            serves = well and goal is Goal.READY and status.cml.ready and status.ec2.state == "running"
            licensing = status.phase == Phase.READY_UNLICENSED and (status.cml.licensed or may_license(worker))
            return serves and not licensing
    return False


def over(since: datetime | None, seconds: float, now: datetime) -> bool:
    """Whether more than `seconds` have passed; what has not begun is not over."""
    return since is not None and (now - since).total_seconds() > seconds


def tags_of(worker: LabWorker, installation: str) -> dict[str, str]:
    """What everything of this worker carries in EC2."""
    tags = {
        UID_TAG: worker.uid,
        INSTALLATION_TAG: installation,
        NAME_TAG: worker.name,
        NAMESPACE_TAG: worker.namespace,
    }
    return {**tags, RETAIN_TAG: "true"} if worker.spec.retains else tags


def client_token(uid: str, attempt: int) -> str:
    """EC2's idempotency token: one per attempt, for a token for ever would give back a terminated instance."""
    return hashlib.sha256(f"{uid}/{attempt}".encode()).hexdigest()[:64]


def launch_parameters(worker: LabWorker, attempt: int, installation: str) -> LaunchParameters:
    """What attempt number `attempt` asks of EC2, by the spec as it is now."""
    aws = worker.spec.aws
    return LaunchParameters(
        ami_id=aws.ami_id or "",
        instance_type=aws.instance_type,
        client_token=client_token(worker.uid, attempt),
        key_name=aws.key_name or "",
        subnet_id=aws.subnet_id or "",
        security_group_ids=tuple(aws.security_group_ids),
        assign_public_ip=aws.assign_public_ip,
        volume_size_gb=aws.volume_size_gb,
        volume_type=aws.volume_type,
        iops=aws.iops,
        iam_instance_profile=aws.iam_instance_profile or "",
        tags={**aws.tags, "Name": aws.tags.get("Name", worker.name), **tags_of(worker, installation)},
    )


def next_launch(
    worker: LabWorker, installation: str, *, now: datetime, trace_timeout: float
) -> tuple[int, LaunchParameters]:
    """The attempt to send next and its parameters, when no live instance carries the worker's uid.

    A launch that may have been carried out is repeated word for word (EC2 knows its token) until it has left no trace
    for `trace_timeout` seconds. One that was refused for certain is repeated if the spec still says the same. All
    else is a new attempt.
    """
    ec2 = worker.status.ec2
    if ec2.launch is not None:
        if ec2.sent_at is not None and not over(ec2.sent_at, trace_timeout, now):
            return ec2.attempt, LaunchParameters.from_json(ec2.launch)
        again = launch_parameters(worker, ec2.attempt, installation)
        if ec2.sent_at is None and again.to_json() == ec2.launch:
            return ec2.attempt, again
    return ec2.attempt + 1, launch_parameters(worker, ec2.attempt + 1, installation)


def in_doubt(ec2: Ec2Status, now: datetime, trace_timeout: float) -> bool:
    """Whether a launch may have been carried out whose instance nobody has seen yet."""
    return ec2.instance_id is None and ec2.sent_at is not None and not over(ec2.sent_at, trace_timeout, now)


def choose(found: Sequence[Ec2Instance], recorded: str | None) -> tuple[Ec2Instance | None, tuple[Ec2Instance, ...]]:
    """The one instance to keep, of those (oldest first) that carry the worker's uid, and the surplus.

    The one recorded in the status is kept, else the oldest; what is on its way out is neither.
    """
    able = [i for i in found if i.state in KEEPABLE]
    kept = next((i for i in able if i.id == recorded), able[0] if able else None)
    return kept, tuple(i for i in able if i is not kept)


def addresses_of(instance: Ec2Instance) -> tuple[str | None, str | None]:
    """Its public and private address, as far as it can be reached by them: none when it is off."""
    if instance.state not in {"pending", "running"}:
        return None, None
    return instance.public_ip or None, instance.private_ip or None


def absence_proves(ec2: Ec2Status, now: datetime, *, gone_after: float, trace_timeout: float) -> bool:
    """Whether EC2's word that the recorded instance does not exist can be believed.

    Its views agree within minutes: an instance that was described `gone_after` seconds ago or earlier is known to all
    of them. One that was never described gets as long as a launch without trace.
    """
    if ec2.first_seen_at is not None:
        return over(ec2.first_seen_at, gone_after, now)
    return ec2.sent_at is None or over(ec2.sent_at, trace_timeout, now)


def problem(old: Problem | None, reason: str, message: str, now: datetime) -> Problem:
    """A problem to record; the same one again keeps its time, and so costs no write."""
    if old is not None and (old.reason, old.message) == (reason, message):
        return old
    return Problem(reason=reason, message=message, at=now)
