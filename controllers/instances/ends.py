"""How a lab instance ends: in its time or before, by itself or by a failure; and nothing is left of it.

Promises: an end is written before anything outside is touched; a place is given back when its runtime has proved that
nothing is left there, and not before, whatever the phase; what was not cleaned up in time is Failed, and goes on being
cleaned up. What failed begins again by itself where that is wanted and can help, else when a person has changed it.
"""

from __future__ import annotations

from datetime import timedelta

from controllers.failure import Failure
from controllers.instances.kind import LabInstanceRequest, placed
from controllers.instances.notes import (
    NOTHING_LEFT,
    Mutate,
    completing,
    ending,
    entering,
    note_exit,
    note_log,
    place_lost,
    tell,
    tell_completed,
    time_over,
    timing_out,
)
from controllers.instances.phases import Conditions, Phase, Reasons
from controllers.instances.runtime import InstanceError, LabFailed, NotNow, Refused, Sighting, WorkerLost
from controllers.instances.scheduling import Placer
from controllers.instances.steps import RETRY_MOST, Next, Steps
from lrm.controller import Context, Result
from lrm.crashpoints import crash_point
from lrm.model import rfc3339
from lrm.resource import RETRY_ANNOTATION

_CLEANING_UP = (Reasons.CLEANING_UP, "its lab is being removed")


def begins_again(request: LabInstanceRequest) -> bool:
    """Whether a person has changed what failed, or asked for another try."""
    failure = request.status.failure
    if request.status.phase != Phase.FAILED or failure is None:
        return False
    retry = request.metadata.annotations.get(RETRY_ANNOTATION)
    return request.metadata.generation != failure.generation or (retry is not None and retry != failure.retry)


class Ends:
    """See the module."""

    def __init__(self, steps: Steps, placer: Placer) -> None:
        self._steps = steps
        self._placer = placer

    # How its end begins

    async def stop(self, request: LabInstanceRequest, ctx: Context) -> LabInstanceRequest:
        """Somebody asks for its end, by its spec."""
        return await self.end(request, ctx, Reasons.STOP_REQUESTED, "it is not wanted any more")

    async def end(self, request: LabInstanceRequest, ctx: Context, reason: str, message: str) -> LabInstanceRequest:
        """Its end begins before its time."""
        ended = await self._steps.write(request, ctx, ending(Phase.STOPPING, ctx, (reason, message)))
        ctx.events.record(ended, "Normal", reason, message)
        crash_point("instances.ending")
        return ended

    async def time_out(self, request: LabInstanceRequest, ctx: Context) -> LabInstanceRequest:
        """Its time is over while it runs."""
        ended = await self._steps.write(request, ctx, timing_out(request, ctx))
        ctx.events.record(ended, "Normal", Reasons.DURATION_ELAPSED, time_over(ended))
        crash_point("instances.ending")
        return ended

    async def never_came_back(self, request: LabInstanceRequest, ctx: Context) -> LabInstanceRequest:
        """Its time is over while it waits to begin again: Failed, by what took its place from it."""
        why, lost = request.status.error_message or "it has lost its place", place_lost(request)
        at = f", at {rfc3339(lost.at.replace(microsecond=0))}" if lost is not None else ""
        told = f"{why[:800]}{at}; its time was over before it could begin again"

        def outlive(r: LabInstanceRequest) -> None:
            tell(r, ctx, Conditions.TIMED_OUT, True, (Reasons.DURATION_ELAPSED, time_over(r)))

        error = InstanceError(lost.reason if lost is not None else Reasons.WORKER_LOST, told)
        return await self.fail(request, ctx, error, also=outlive)

    async def exited(self, request: LabInstanceRequest, ctx: Context, seen: Sighting) -> LabInstanceRequest:
        """It ended by itself, and well."""

        def note(r: LabInstanceRequest) -> None:
            r.status.exit_code, r.status.oom_killed = seen.exit_code, seen.oom_killed
            note_log(r, seen.last_log)

        request = await self._steps.write(request, ctx, note)
        return await self.end(request, ctx, Reasons.EXITED, seen.message or "it ended by itself")

    async def fail(
        self, request: LabInstanceRequest, ctx: Context, error: InstanceError, *, also: Mutate = lambda _: None
    ) -> LabInstanceRequest:
        """Failed, with what a person must change; what is outside is cleaned up from there. `also` is noted with it."""
        now, why = ctx.clock.now(), str(error)[:1000]

        def fail(r: LabInstanceRequest) -> None:
            note_exit(r, error)
            also(r)
            status = r.status
            status.failure = Failure(
                reason=error.reason,
                message=why,
                at=now,
                phase=status.phase,
                generation=r.metadata.generation,
                retry=r.metadata.annotations.get(RETRY_ANNOTATION),
            )
            entering(Phase.FAILED, error.reason, ctx)(r)
            status.error_message, status.completed_at, status.retry_at = why, now, None
            tell(r, ctx, Conditions.READY, False, (error.reason, why))
            if not placed(r):
                tell(r, ctx, Conditions.CLEANUP_COMPLETED, True, (Reasons.CLEANED_UP, NOTHING_LEFT))
                if status.condition(Conditions.WORKER_ASSIGNED) is not None:
                    tell(r, ctx, Conditions.WORKER_ASSIGNED, False, (error.reason, why))

        failed = await self._steps.write(request, ctx, fail)
        ctx.events.record(failed, "Warning", error.reason, why)
        return failed

    async def again_or_fail(
        self, request: LabInstanceRequest, ctx: Context, error: WorkerLost | LabFailed, *, abandon: bool = False
    ) -> LabInstanceRequest:
        """Begin again after a delay, where that is wanted and can help.

        `abandon` gives its place up unseen: what may be left there is a stray, and collected when its worker is back.
        """
        spec, status, settings = request.spec, request.status, self._steps.settings
        lost_early = isinstance(error, WorkerLost) and status.started_at is None
        wanted = lost_early or spec.restart_policy == "OnFailure"
        if not wanted or status.retry_count >= settings.instances_retries or spec.desired_phase == "Stopped":
            return await self.fail(request, ctx, error)
        delay = min(settings.instances_retry_delay * 2**status.retry_count, RETRY_MOST)
        now, why = ctx.clock.now(), str(error)[:1000]

        def again(r: LabInstanceRequest) -> None:
            note_exit(r, error)
            entering(Phase.PENDING, error.reason, ctx)(r)
            r.status.retry_count += 1
            r.status.retry_at, r.status.error_message = now + timedelta(seconds=delay), why
            r.status.ending_started_at = now
            if abandon:
                r.status.worker_ref = None
                tell(r, ctx, Conditions.RESOURCES_ALLOCATED, False, (error.reason, why))
            tell(r, ctx, Conditions.READY, False, (error.reason, why))

        waiting = await self._steps.write(request, ctx, again)
        if abandon:
            await self._placer.release(waiting, ctx)
        ctx.events.record(waiting, "Warning", error.reason, f"{why}; it begins again in {delay:.0f} s")
        return waiting

    # The phases of it

    async def ending(self, request: LabInstanceRequest, ctx: Context) -> Next:
        """Clean up; within the deadline it is Completed, after it Failed, and cleaning up goes on."""
        if placed(request):
            return await self.clean_in_time(request, ctx)
        after = await self._steps.write(request, ctx, completing(ctx))
        tell_completed(after, ctx)
        return after

    async def failed(self, request: LabInstanceRequest, ctx: Context) -> Next:
        """Clean up; then begin anew if a person has changed what failed."""
        if placed(request):
            return await self._clean(request, ctx)
        await self._placer.release(request, ctx)
        if not begins_again(request):
            return Result.done()

        def anew(r: LabInstanceRequest) -> None:
            changed = r.status.failure is None or r.status.failure.generation != r.metadata.generation
            entering(Phase.PENDING, Reasons.SPEC_CHANGED if changed else Reasons.RETRY, ctx)(r)
            status = r.status
            status.need = status.failure = status.error_message = status.template_digest = status.last_log = None
            status.started_at = status.completed_at = status.ending_started_at = status.retry_at = None
            status.retry_count = 0
            status.conditions = [c for c in status.conditions if c.type != Conditions.TIMED_OUT]

        return await self._steps.write(request, ctx, anew)

    async def completed(self, request: LabInstanceRequest, ctx: Context) -> Next:
        """Give back what a leader that died has left."""
        if placed(request):
            return await self._clean(request, ctx)
        await self._placer.release(request, ctx)
        return Result.done()

    # Cleaning up

    async def clean_in_time(self, request: LabInstanceRequest, ctx: Context) -> Next:
        """Clean up until its deadline: then it is Failed, so that somebody looks."""
        final = request.status.phase in (Phase.FAILED, Phase.COMPLETED)
        if final or self._steps.left(request, ctx) > 0 or ctx.wall_jumped or ctx.observe_only:
            return await self._clean(request, ctx)
        cleanup = request.status.condition(Conditions.CLEANUP_COMPLETED)
        message = f"not cleaned up within {self._steps.settings.instances_stopping_timeout:.0f} s: "
        error = Refused(Reasons.STOPPING_TIMEOUT, message + (cleanup.message if cleanup else ""))
        return await self.fail(request, ctx, error)

    async def _clean(self, request: LabInstanceRequest, ctx: Context) -> Next:
        """One step; once nothing is left the place is given back, and what was ending has ended."""
        if ctx.observe_only:
            return Result.after(self._steps.settings.instances_rest_interval)
        why, again = "", self._steps.settings.instances_step_interval
        try:
            runtime = self._steps.runtime(request)
            last_log = await runtime.last_log(request) if _log_is_due(request) else None
            if last_log is not None:
                request = await self._keep_log(request, ctx, last_log)
            done = await runtime.clean(request, ctx)
        except WorkerLost:
            done = True  # and all that was there with it
        except NotNow as error:
            done, why, again = False, str(error), error.again
        except InstanceError as error:
            done, why, again = False, str(error), self._steps.settings.instances_rest_interval
        if not done:
            return await self._not_clean(request, ctx, why, again)
        crash_point("instances.cleaned")
        ending = request.status.phase in (Phase.STOPPING, Phase.TIMEOUT)

        def cleaned(r: LabInstanceRequest) -> None:
            r.status.worker_ref = None
            r.status.access_url = None
            r.status.ports = []
            tell(r, ctx, Conditions.CLEANUP_COMPLETED, True, (Reasons.CLEANED_UP, NOTHING_LEFT))
            tell(r, ctx, Conditions.WORKER_ASSIGNED, False, (Reasons.CLEANED_UP, "its place was given back"))
            tell(r, ctx, Conditions.RESOURCES_ALLOCATED, False, (Reasons.CLEANED_UP, "its place was given back"))
            if ending:
                completing(ctx)(r)

        after = await self._steps.write(request, ctx, cleaned)
        if ending:
            tell_completed(after, ctx)
        crash_point("instances.ended")
        await self._placer.release(request, ctx)
        return after

    async def _keep_log(self, request: LabInstanceRequest, ctx: Context, last_log: str) -> LabInstanceRequest:
        """Before its lab is touched, for one step may remove it; with what that step would tell, so it is no more."""

        def keep(r: LabInstanceRequest) -> None:
            note_log(r, last_log)
            if r.status.condition(Conditions.CLEANUP_COMPLETED) is None:
                tell(r, ctx, Conditions.CLEANUP_COMPLETED, False, _CLEANING_UP)

        return await self._steps.write(request, ctx, keep)

    async def _not_clean(self, request: LabInstanceRequest, ctx: Context, why: str, again: float) -> Result:
        def note(r: LabInstanceRequest) -> None:
            told = (Reasons.CLEANUP_FAILED, why) if why else _CLEANING_UP
            tell(r, ctx, Conditions.CLEANUP_COMPLETED, False, told)

        after = await self._steps.write(request, ctx, note)
        return Result.after(min(again, max(self._steps.left(after, ctx), 1.0)))


def _log_is_due(request: LabInstanceRequest) -> bool:
    """Whether what it wrote is to be kept now: before its lab is touched, where it did not end by itself."""
    cleanup = request.status.condition(Conditions.CLEANUP_COMPLETED)
    begun = cleanup is not None and cleanup.reason == Reasons.CLEANING_UP
    ended = request.status.phase in (Phase.STOPPING, Phase.TIMEOUT)
    failed = request.status.phase == Phase.FAILED and request.status.last_log is None
    return (ended or failed) and request.status.exit_code is None and not begun and not request.deleting
