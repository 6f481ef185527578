"""What a pool's status says of its workers: one pure function, so that no write can forget a part of it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from controllers.pools.decisions import Decision, Roster
from controllers.pools.kind import (
    DEGRADED,
    DELETING,
    READY,
    SCALING,
    TEMPLATE_ANNOTATION,
    LabWorkerPool,
    seconds_to_ready,
    selector_of,
    template_hash,
)
from controllers.workers.kind import LabWorker

SCALING_LIMITED = "ScalingLimited"
"""True while another size is asked for than can be had now; the reason says what stands against it."""

OBSERVE_ONLY, CLOCK_JUMPED, UNKNOWN_TIME_ZONE = "ObserveOnly", "ClockJumped", "UnknownTimeZone"
UNDECODABLE_WORKER, WORKER_REFUSED = "UndecodableWorker", "WorkerRefused"
"""Reasons of `ScalingLimited` that no decision gives."""


def observe(pool: LabWorkerPool, team: Roster, now: datetime) -> None:
    """Set counts, phase and the condition Ready of a copy; what has not changed stays as it was."""
    status, members = pool.status, team.members
    if pool.deleting:
        status.planned_names, status.removing, status.waking = [], [], []
    status.observed_generation = pool.metadata.generation
    status.selector = selector_of(pool)
    status.replicas, status.ready_replicas = len(members), len(team.serving)
    status.starting_replicas, status.leaving_replicas = len(team.starting), len(team.leaving)
    status.failed_replicas = sum(w.status.phase == "Failed" for w in members)
    status.paused_replicas = len(team.asleep)
    status.outdated_replicas = _outdated(pool, members)
    times = [s for s in map(seconds_to_ready, members) if s is not None]
    status.seconds_to_ready = max(times, default=status.seconds_to_ready)
    wished = pool.spec.wished
    ready = not pool.deleting and len(team.serving) >= wished
    paused = len(team.serving) + len(team.asleep) >= wished
    moving = bool(team.starting or team.leaving or status.planned_names or status.removing or status.waking)
    phase = DELETING if pool.deleting else SCALING if moving else READY if ready or paused else DEGRADED
    reason = _why_ready(pool, ready=ready, moving=moving, paused=paused)
    message = "" if ready or pool.deleting else f"{len(team.serving)} of {wished} workers serve"
    status.set_condition("Ready", ready, reason, message, now=now, generation=pool.metadata.generation)
    status.enter(phase, reason, now)


def _why_ready(pool: LabWorkerPool, *, ready: bool, moving: bool, paused: bool) -> str:
    if pool.deleting:
        return "Deleting"
    if ready:
        return "EnoughServing"
    return "Starting" if moving else "Paused" if paused else "TooFewServing"


def tell_limit(pool: LabWorkerPool, reason: str, message: str, now: datetime) -> None:
    """Set the condition ScalingLimited of a copy; without a reason nothing limits."""
    limited = bool(reason)
    told = reason or "NotLimited"
    pool.status.set_condition(SCALING_LIMITED, limited, told, message, now=now, generation=pool.metadata.generation)


def limit_of(decision: Decision) -> tuple[str, str]:
    """Reason and message of what holds a decision back, empty where nothing does."""
    return (decision.reason.value, decision.message) if decision.held else ("", "")


def _outdated(pool: LabWorkerPool, members: Sequence[LabWorker]) -> int:
    current = template_hash(pool)
    return sum(w.metadata.annotations.get(TEMPLATE_ANNOTATION) != current for w in members)
