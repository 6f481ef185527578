"""What a lab instance does that has no place yet: it is measured, waits for its turn, and takes the place that it gets.

Promises that a place is reserved before it is written down, and written down before anything is made there; and that a
request which waits says for what. Who gets which place is the `Placer`'s.
"""

from __future__ import annotations

from controllers.instances.ends import Ends
from controllers.instances.kind import LabInstanceRequest, WorkerRef, placed
from controllers.instances.notes import entering, tell
from controllers.instances.phases import Conditions, Phase, Reasons
from controllers.instances.scheduling import NoRoom, Placer, Waits
from controllers.instances.steps import LONGEST_WAIT, Next, Steps
from lrm.controller import Context, Result
from lrm.crashpoints import crash_point
from lrm.model import rfc3339


class Waiting:
    """See the module."""

    def __init__(self, steps: Steps, ends: Ends, placer: Placer) -> None:
        self._steps = steps
        self._ends = ends
        self._placer = placer

    async def pending(self, request: LabInstanceRequest, ctx: Context) -> Next:
        """Wait for its time, its quota and a place; what it left elsewhere is cleaned up first."""
        if request.status.need is not None and request.status.observed_generation != request.metadata.generation:
            return await self._steps.write(request, ctx, lambda r: setattr(r.status, "need", None))
        if request.spec.desired_phase == "Stopped":
            return await self._ends.stop(request, ctx)
        if self._steps.time_is_over(request, ctx):
            return await self._ends.never_came_back(request, ctx)
        if placed(request):
            return await self._ends.clean_in_time(request, ctx)
        if request.status.need is None:
            request = await self._prepare(request, ctx)
        waits = self._not_yet(request, ctx) or await self._placer.choose(request, ctx)
        if isinstance(waits, Waits):
            return await self._wait(request, ctx, waits)
        return await self._steps.write(request, ctx, entering(Phase.SCHEDULING, Reasons.SCHEDULED, ctx))

    async def scheduling(self, request: LabInstanceRequest, ctx: Context) -> Next:
        """Reserve a place, then write down which."""
        if request.spec.desired_phase == "Stopped" or request.status.need is None or ctx.observe_only:
            return await self._unschedule(request, ctx, Waits(Reasons.NOT_RUNNING, "it is not to be placed now"))
        chosen = await self._placer.choose(request, ctx)
        if isinstance(chosen, Waits):
            return await self._unschedule(request, ctx, chosen)
        try:
            await self._placer.reserve(chosen, request, ctx)
        except NoRoom as error:
            return await self._unschedule(request, ctx, Waits(Reasons.NO_CAPACITY_AVAILABLE, str(error)))
        crash_point("instances.reserved")
        placed_now = await self._take(request, ctx, chosen)
        crash_point("instances.placed")
        return placed_now

    async def _prepare(self, request: LabInstanceRequest, ctx: Context) -> LabInstanceRequest:
        prepared = await self._steps.runtime(request).prepare(request, ctx)
        now = ctx.clock.now()

        def note(r: LabInstanceRequest) -> None:
            r.status.need = prepared.need
            r.status.template_digest = prepared.digest
            r.status.prepared_at = now

        prepared_request = await self._steps.write(request, ctx, note)
        planned = request.spec.scheduled_start_time
        if planned is not None and planned < now and request.status.attempt == 0:  # what had a place has begun
            told = f"its start, {rfc3339(planned)}, is past: it begins as soon as there is a place"
            ctx.events.record(prepared_request, "Warning", "StartIsPast", told)
        crash_point("instances.prepared")
        return prepared_request

    def _not_yet(self, request: LabInstanceRequest, ctx: Context) -> Waits | None:
        """Why it is not to have a place now, whatever is free."""
        now, status = ctx.clock.now(), request.status
        if status.retry_at is not None and now < status.retry_at:
            return Waits(Reasons.BACKING_OFF, status.error_message or "", status.retry_at)
        due = request.due_at(self._steps.settings.instances_early_start)
        if due is not None and now < due:
            return Waits(Reasons.NOT_YET_DUE, f"it may begin at {rfc3339(due.replace(microsecond=0))}", due)
        if ctx.observe_only:
            return Waits(Reasons.OBSERVE_ONLY, "nothing outside may be changed")
        return None

    async def _wait(self, request: LabInstanceRequest, ctx: Context, waits: Waits) -> Result:
        """Stay Pending, and say why; room that becomes free wakes it."""
        before = request.status.condition(Conditions.WORKER_ASSIGNED)

        def note(r: LabInstanceRequest) -> None:
            tell(r, ctx, Conditions.WORKER_ASSIGNED, False, (waits.reason, waits.message))
            tell(r, ctx, Conditions.READY, False, (waits.reason, waits.message))

        waiting = await self._steps.write(request, ctx, note)
        if before is None or before.reason != waits.reason:
            calm = waits.reason in (Reasons.NOT_YET_DUE, Reasons.BACKING_OFF)
            ctx.events.record(waiting, "Normal" if calm else "Warning", waits.reason, waits.message)
        now, ends = ctx.clock.now(), self._steps.ends_at(request, ctx)
        # What began and lost its place waits no longer than it may run.
        times = [(at - now).total_seconds() for at in (waits.until, ends) if at is not None]
        look = LONGEST_WAIT if waits.until is not None else self._steps.settings.instances_rest_interval
        return self._steps.again(max(min([look, *times]), 1.0 if ctx.wall_jumped else 0.01), ctx)

    async def _unschedule(self, request: LabInstanceRequest, ctx: Context, waits: Waits) -> Next:
        """Back to waiting; whatever an earlier try reserved is given back first."""
        await self._placer.release(request, ctx)

        def back(r: LabInstanceRequest) -> None:
            entering(Phase.PENDING, waits.reason, ctx)(r)
            tell(r, ctx, Conditions.WORKER_ASSIGNED, False, (waits.reason, waits.message))
            tell(r, ctx, Conditions.READY, False, (waits.reason, waits.message))

        await self._steps.write(request, ctx, back)
        return Result.after(1.0)

    async def _take(self, request: LabInstanceRequest, ctx: Context, place: WorkerRef) -> LabInstanceRequest:
        now, told = ctx.clock.now(), f"on {place.name}"

        def take(r: LabInstanceRequest) -> None:
            entering(Phase.PROVISIONING, Reasons.PROVISIONING, ctx)(r)
            status = r.status
            status.worker_ref = place
            status.attempt += 1
            status.provisioning_started_at = now
            status.retry_at = status.ending_started_at = None
            status.container_id = status.cml_lab_id = status.access_url = None
            status.ports = []
            status.exit_code = status.oom_killed = None
            tell(r, ctx, Conditions.WORKER_ASSIGNED, True, (Reasons.SCHEDULED, told))
            tell(r, ctx, Conditions.RESOURCES_ALLOCATED, True, (Reasons.SCHEDULED, told))
            tell(r, ctx, Conditions.READY, False, (Reasons.PROVISIONING, "it is being made"))
            status.conditions = [c for c in status.conditions if c.type != Conditions.CLEANUP_COMPLETED]

        taken = await self._steps.write(request, ctx, take)
        ctx.events.record(taken, "Normal", Reasons.SCHEDULED, f"it has its place {told}")
        return taken
