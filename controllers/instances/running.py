"""What a lab instance does that has its place: it is made there, within a deadline, and runs for its time.

Promises that it is Running only once its runtime has seen it so, that nothing is asked outside for longer than its time
lasts, that silence outside ends nothing before a deadline does, and that what is only stopped is not ended either.
"""

from __future__ import annotations

from controllers.instances.ends import Ends
from controllers.instances.kind import LabInstanceRequest
from controllers.instances.notes import entering, sighted
from controllers.instances.phases import Conditions, Phase, Reasons
from controllers.instances.runtime import Refused, Sighting, State, WorkerLost
from controllers.instances.steps import LONGEST_WAIT, Next, Steps
from lrm.controller import Context, Result
from lrm.crashpoints import crash_point

_REASONS = {
    State.RUNNING: Reasons.RUNNING,
    State.UNHEALTHY: Reasons.UNHEALTHY,
    State.STOPPED: Reasons.LAB_STOPPED,
}
"""Why something in phase Running is Ready, or not."""


class Running:
    """See the module."""

    def __init__(self, steps: Steps, ends: Ends) -> None:
        self._steps = steps
        self._ends = ends

    async def provisioning(self, request: LabInstanceRequest, ctx: Context) -> Next:
        """One step further, within the deadline."""
        if request.spec.desired_phase == "Stopped":
            return await self._ends.stop(request, ctx)
        if ctx.observe_only:
            return Result.after(self._steps.settings.instances_rest_interval)
        left = self._steps.left(request, ctx)
        if left <= 0 and not ctx.wall_jumped:
            return await self._not_in_time(request, ctx)
        seen = await self._steps.runtime(request).provision(request, ctx)
        crash_point("instances.provisioned")
        if seen.state is State.STARTING:
            reason = seen.trouble or Reasons.PROVISIONING
            await self._steps.write(request, ctx, sighted(seen, ctx, ready=False, reason=reason))
            return Result.after(min(_again(seen), max(left, 1.0)))
        if seen.state is State.ENDED:
            return await self._ends.exited(request, ctx, seen)
        now = ctx.clock.now()

        def run(r: LabInstanceRequest) -> None:
            entering(Phase.RUNNING, Reasons.RUNNING, ctx)(r)
            r.status.started_at = r.status.started_at or now
            r.status.error_message = None
            sighted(seen, ctx, ready=seen.state is State.RUNNING, reason=Reasons.RUNNING)(r)

        running = await self._steps.write(request, ctx, run)
        ctx.events.record(running, "Normal", Reasons.RUNNING, seen.access_url or "it runs")
        crash_point("instances.running")
        return running

    async def running(self, request: LabInstanceRequest, ctx: Context) -> Next:
        """Until its time is over, it is asked to stop, or it ends by itself."""
        if request.spec.desired_phase == "Stopped":
            return await self._ends.stop(request, ctx)
        if self._steps.time_is_over(request, ctx):
            return await self._ends.time_out(request, ctx)
        left = max(self._steps.left(request, ctx), 1.0)
        try:
            async with ctx.clock.timeout(left):
                seen = await self._steps.runtime(request).look(request, ctx)
        except TimeoutError:
            return request  # its time is over, or nearly
        if seen.state is State.ENDED:
            return await self._ends.exited(request, ctx, seen)
        before, reason = request.status.condition(Conditions.READY), _REASONS.get(seen.state, Reasons.NOT_RUNNING)
        well = seen.state is State.RUNNING
        after = await self._steps.write(request, ctx, sighted(seen, ctx, ready=well, reason=reason))
        if seen.state is State.STOPPED and (before is None or before.reason != reason):
            ctx.events.record(after, "Warning", reason, seen.message)
        return self._steps.again(min(_again(seen), left, LONGEST_WAIT), ctx)

    async def _not_in_time(self, request: LabInstanceRequest, ctx: Context) -> LabInstanceRequest:
        """Its deadline for Running has passed: where its worker does not even answer, another one may do better."""
        ready, ref = request.status.condition(Conditions.READY), request.status.worker_ref
        told = ready.message if ready else ""
        message = f"not Running within {self._steps.settings.instances_provisioning_timeout:.0f} s: {told}"
        away = ready is not None and (ready.status, ready.reason) == ("Unknown", Reasons.WORKER_AWAY)
        if away and ref is not None and ref.kind == "LabWorker":
            return await self._ends.again_or_fail(request, ctx, WorkerLost(Reasons.WORKER_AWAY, message), abandon=True)
        return await self._ends.fail(request, ctx, Refused(Reasons.PROVISIONING_TIMEOUT, message))


def _again(seen: Sighting) -> float:
    return LONGEST_WAIT if seen.again is None else seen.again
