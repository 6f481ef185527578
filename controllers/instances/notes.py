"""Changes of an instance's status as functions of it, so that one write may make several."""

from __future__ import annotations

from collections.abc import Callable

from controllers.instances.kind import LabInstanceRequest, placed
from controllers.instances.phases import Conditions, Phase, Reasons
from controllers.instances.runtime import InstanceError, LabFailed, Sighting
from lrm.controller import Context
from lrm.resource import PhaseChange

Mutate = Callable[[LabInstanceRequest], None]
NOTHING_LEFT = "nothing of it is left outside"


def entering(phase: Phase, reason: str, ctx: Context) -> Mutate:
    """Go to a phase now."""
    now = ctx.clock.now()
    return lambda r: r.status.enter(phase.value, reason, now)


def tell(r: LabInstanceRequest, ctx: Context, kind: str, status: bool | None, why: tuple[str, str]) -> None:
    """Set a condition; `why` is a reason and a message."""
    r.status.set_condition(kind, status, *why, now=ctx.clock.now(), generation=r.metadata.generation)


def completing(ctx: Context) -> Mutate:
    """It has come to its end, and nothing is left of it."""
    now = ctx.clock.now()

    def complete(r: LabInstanceRequest) -> None:
        entering(Phase.COMPLETED, Reasons.CLEANED_UP, ctx)(r)
        r.status.completed_at = now
        tell(r, ctx, Conditions.CLEANUP_COMPLETED, True, (Reasons.CLEANED_UP, NOTHING_LEFT))

    return complete


def tell_completed(request: LabInstanceRequest, ctx: Context) -> None:
    """By an event, after the write."""
    ctx.events.record(request, "Normal", Phase.COMPLETED, NOTHING_LEFT)


def sighted(seen: Sighting, ctx: Context, *, ready: bool, reason: str) -> Mutate:
    """What a runtime has seen; what it does not say stays."""

    def note(r: LabInstanceRequest) -> None:
        status = r.status
        status.container_id = seen.container_id or status.container_id
        status.cml_lab_id = seen.cml_lab_id or status.cml_lab_id
        status.access_url = seen.access_url or status.access_url
        status.ports = seen.ports or status.ports
        tell(r, ctx, Conditions.READY, ready, (reason, seen.message or ("it runs" if ready else "")))

    return note


def note_exit(r: LabInstanceRequest, error: InstanceError) -> None:
    """How a lab that failed has ended, and its last words."""
    note_log(r, error.last_log)
    if isinstance(error, LabFailed):
        r.status.exit_code, r.status.oom_killed = error.exit_code, error.oom_killed or None


def note_log(r: LabInstanceRequest, last_log: str | None) -> None:
    """The last that it has written; where that is not known an earlier attempt's stays."""
    if last_log is not None:
        r.status.last_log = last_log


def ending(phase: Phase, ctx: Context, why: tuple[str, str]) -> Mutate:
    """Its end begins; nothing outside was touched yet."""
    now = ctx.clock.now()

    def end(r: LabInstanceRequest) -> None:
        entering(phase, why[0], ctx)(r)
        r.status.observed_generation = r.metadata.generation
        r.status.ending_started_at = now
        r.status.retry_at = None
        tell(r, ctx, Conditions.READY, False, why)
        if not placed(r):
            tell(r, ctx, Conditions.WORKER_ASSIGNED, False, why)

    return end


def time_over(request: LabInstanceRequest) -> str:
    """That its time is over, in a sentence."""
    minutes = request.spec.duration_minutes
    return f"its {minutes} minutes are over" if minutes > 1 else "its minute is over"


def place_lost(request: LabInstanceRequest) -> PhaseChange | None:
    """When it last went back to waiting, and why; None of what never had a place."""
    had = (Phase.PROVISIONING, Phase.RUNNING)
    back = (c for c in reversed(request.status.phase_history) if c.to == Phase.PENDING and c.source in had)
    return next(back, None)


def timing_out(request: LabInstanceRequest, ctx: Context) -> Mutate:
    """Its time is over while it runs."""
    why = Reasons.DURATION_ELAPSED, time_over(request)

    def time_out(r: LabInstanceRequest) -> None:
        ending(Phase.TIMEOUT, ctx, why)(r)
        tell(r, ctx, Conditions.TIMED_OUT, True, why)

    return time_out
