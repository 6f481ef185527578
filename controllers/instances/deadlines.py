"""Ends the time of lab instances on time, whatever else keeps their controller busy.

`InstancesController` waits for CMLs and engines, key by key; a class of five hundred that begins, or one CML that
hangs, would make another's end late by as much. This controller asks nobody outside: it writes the phase Timeout when
it is due, and the other one, woken by that, cleans up. Both write on exactly the state that they judged.
"""

from __future__ import annotations

from controllers.instances.kind import INSTANCES, LabInstanceRequest
from controllers.instances.notes import time_over, timing_out
from controllers.instances.phases import Phase, Reasons
from lrm.controller import Context, Controller, Result
from lrm.crashpoints import crash_point

_LONGEST_WAIT = 600.0
"""Seconds between two looks: wall time may be set meanwhile."""


class DeadlinesController(Controller[LabInstanceRequest]):
    """See the module."""

    name = "instance-deadlines"
    owner = INSTANCES
    lock_name = INSTANCES
    model = LabInstanceRequest
    workers = 8

    def settled(self, request: LabInstanceRequest) -> bool:
        """It does not run."""
        return request.status.phase != Phase.RUNNING

    async def reconcile(self, request: LabInstanceRequest, ctx: Context) -> Result:
        """Wait for its end, then write it."""
        ends = request.ends_at
        if request.status.phase != Phase.RUNNING or ends is None or request.deleting or ctx.observe_only:
            return Result.done()
        left = (ends - ctx.clock.now()).total_seconds()
        if left > 0:
            return Result.after(min(left, _LONGEST_WAIT))
        if ctx.wall_jumped:
            return Result.after(1.0)
        ended = await ctx.client.update_status(request, timing_out(request, ctx), retry=False)
        ctx.events.record(ended, "Normal", Reasons.DURATION_ELAPSED, time_over(ended))
        crash_point("instances.ending")
        ctx.log.info("instance.phase", source=Phase.RUNNING, to=Phase.TIMEOUT)
        return Result.done()
