"""A worker's way down: drained of labs, its licence given back, stopped or ended, and its object let go.

Promises: a drain takes nobody's lab away before its time is over; a licence is given back while CML can still do it,
for a bounded time, and a seat that stays taken is reported; an instance is "ended" only when EC2 says so of every
instance that carries the worker's uid, and when no launch is in doubt any more. A deletion with the policy Retain
touches nothing but our own marks. Called by the workers' controller, whose finalizer this is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from controllers.aws.errors import AwsError
from controllers.cml.client import Deregistration
from controllers.cml.errors import CmlError, CmlFingerprintMismatch, CmlIdentityMismatch
from controllers.workers.claims import Claims
from controllers.workers.cml_side import CmlSide
from controllers.workers.conditions import FAILED_CHECKS
from controllers.workers.decisions import (
    Goal,
    drains_before_delete,
    ends_at_once,
    goal_of,
    in_doubt,
    may_hold_seat,
)
from controllers.workers.idle import stops_only_empty
from controllers.workers.kind import LabWorker
from controllers.workers.pace import Pace
from controllers.workers.phases import SERVING, Phase, Reasons
from controllers.workers.provisioning import Provisioner, Sighting, fail_if_ended, is_off, note_ended, reason_of
from controllers.workers.work import Work, unlicensed
from lrm.controller import Result
from lrm.crashpoints import crash_point

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

CRASH_POINTS = (
    "workers.unlicense.sent",
    "workers.terminate.begin",
    "workers.terminate.sent",
    "workers.terminate.ended",
    "workers.terminate.written",
    "workers.retain.unmarked",
    "workers.claim.released",
)


class Departure:
    """See the module."""

    def __init__(
        self,
        provisioner: Provisioner,
        cml: CmlSide,
        claims: Claims,
        pace: Pace,
        *,
        busy: Callable[[Work], bool],
        check: Callable[[Work], Awaitable[bool]],
    ) -> None:
        self._ec2 = provisioner
        self._cml = cml
        self._claims = claims
        self._pace = pace
        self._settings = pace.settings
        self._busy = busy
        self._check = check

    async def finalize(self, work: Work) -> Result:
        """One step of a deletion; `done` when nothing is left that needs this object."""
        worker = work.worker
        if work.phase is Phase.TERMINATED:
            return await self._let_go(work)
        if worker.spec.retains:
            return await self._retain(work)
        await work.settle()
        drains = drains_before_delete(worker) and worker.status.ec2.state == "running"
        if drains and work.phase in SERVING:
            return await work.enter(Phase.DRAINING, Reasons.DELETING)
        if drains and work.phase is Phase.DRAINING and not self._is_drained(work):
            return await self._draining_to_end(work)
        if work.phase in {Phase.UNLICENSING, Phase.TERMINATING_EC2}:
            return await self.step(work)
        return await self.leave(work, Reasons.DELETING)

    async def _draining_to_end(self, work: Work) -> Result:
        """Wait for the labs as `draining` does; an instance that ended or is off holds none."""
        sighting = await self._ec2.see(work)
        if sighting is not None and sighting.has_ended:
            await work.write(note_ended)
            return await self.leave(work, Reasons.INSTANCE_TERMINATED)
        if is_off(sighting):
            return await self.leave(work, Reasons.INSTANCE_STOPPED)
        await self._check(work)
        return self._for_labs(work)

    async def begin(self, work: Work) -> Result:
        """Take a serving worker out of service, as its wish says."""
        if ends_at_once(work.worker):
            return await self.leave(work, Reasons.TERMINATION_REQUESTED)
        return await work.enter(Phase.DRAINING, Reasons.DRAINING)

    async def leave(self, work: Work, reason: str) -> Result:
        """Begin the end, from any phase: through Unlicensing if there is a licence that can be given back."""
        worker = work.worker
        if may_hold_seat(worker) and worker.status.ec2.state == "running" and not work.observe_only:
            return await work.enter(Phase.UNLICENSING, reason)
        await work.lose_seat(f"the instance is {worker.status.ec2.state or 'unknown'}: CML cannot be asked")
        return await work.enter(Phase.TERMINATING_EC2, reason)

    async def step(self, work: Work) -> Result:
        """One step in Unlicensing, Stopping or TerminatingEC2."""
        if work.phase is Phase.UNLICENSING:
            return await self._unlicensing(work)
        if work.phase is Phase.STOPPING:
            return await self._stopping(work)
        return await self._terminating(work)

    async def draining(self, work: Work, sighting: Sighting | None) -> Result:  # noqa: PLR0911 - each way out says what is next
        """Wait until no lab runs, or the time for it is over; a wish to be Ready again cancels."""
        goal, worker = goal_of(work.worker), work.worker
        licensed = worker.status.cml.licensed
        if ended := await fail_if_ended(work, sighting):
            return ended
        if is_off(sighting):
            # No lab runs there any more; what comes next, the phase after Stopping decides.
            return await work.enter(Phase.STOPPING, Reasons.INSTANCE_STOPPED)
        if goal is Goal.READY:
            return await work.enter(Phase.READY if licensed else Phase.READY_UNLICENSED, Reasons.DRAIN_CANCELLED)
        if ends_at_once(worker):
            return await self.leave(work, Reasons.TERMINATION_REQUESTED)
        await self._check(work)
        if not self._is_drained(work):
            return self._for_labs(work)
        if goal is Goal.DRAINING:
            return self._pace.rest()  # drained: a change of the spec wakes us
        reason = Reasons.DRAINED if self._is_empty(work) else Reasons.DRAIN_TIMEOUT
        if goal is Goal.TERMINATED:
            return await self.leave(work, reason)
        # Stopped keeps the disk and with it the registration; the seat is returned where it can be had again.
        if may_hold_seat(worker) and worker.spec.wants_license and not work.observe_only:
            return await work.enter(Phase.UNLICENSING, reason)
        return await work.enter(Phase.STOPPING, reason)

    async def rest_in_peace(self, work: Work) -> Result:
        """Terminated, and the object stays: nothing outside is left to look at."""
        if work.worker.spec.adopts:
            await self._claims.release(work.worker.spec.aws.instance_id or "", work.worker, work.ctx)
        return Result.done()

    async def _unlicensing(self, work: Work) -> Result:
        worker = work.worker
        onward = Phase.TERMINATING_EC2 if goal_of(worker) is Goal.TERMINATED else Phase.STOPPING
        if not may_hold_seat(worker):
            return await work.enter(onward, Reasons.DEREGISTERED)
        if work.observe_only:
            return self._pace.soon()
        asked_before = worker.status.cml.deregistration_sent_at is not None
        try:
            outcome = await self._cml.deregister(work)
        except CmlError as error:
            foreign = isinstance(error, CmlIdentityMismatch | CmlFingerprintMismatch)
            began = worker.status.timestamps.unlicensing_started_at
            if not foreign and not work.over(began, self._settings.worker_license_deadline):
                await self._cml.note_error(work, error, counts=False, most=FAILED_CHECKS)
                return self._pace.soon()
            await work.lose_seat(str(error))
        else:
            crash_point("workers.unlicense.sent")
            if outcome is Deregistration.SEAT_LEAKED:
                await work.leaked_seat(Reasons.SSMS_UNREACHABLE, "CML gave its licence up, and could not tell Cisco")
            elif outcome is Deregistration.ALREADY and asked_before:
                message = "CML gave its licence up, and its answer was lost: whether it could tell Cisco is not known"
                await work.leaked_seat(Reasons.DEREGISTRATION_UNKNOWN, message, sure=False)
        return await work.enter(onward, Reasons.DEREGISTERED, unlicensed)

    async def _stopping(self, work: Work) -> Result:
        worker = work.worker
        if goal_of(worker) is Goal.TERMINATED:
            return await self.leave(work, Reasons.TERMINATION_REQUESTED)
        sighting = await self._ec2.see(work)
        if ended := await fail_if_ended(work, sighting):
            return ended
        if is_off(sighting):
            self._cml.sessions.retire(worker.uid)
            return await work.enter(Phase.STOPPED, Reasons.INSTANCE_STOPPED)
        instance = sighting.instance if sighting else None
        if instance is not None and instance.state == "running" and not work.observe_only:
            try:
                await self._ec2.stop(work, instance.id)
            except AwsError as error:
                await work.ec2_trouble(reason_of(error), str(error))
        began = work.worker.status.timestamps.stopping_started_at
        if self._pace.is_over(work, began, self._settings.worker_ec2_deadline):
            message = f"the instance did not stop within {self._settings.worker_ec2_deadline:g} s"
            return await work.fail(Reasons.STOP_TIMEOUT, message)
        return self._pace.soon()

    async def _terminating(self, work: Work) -> Result:
        ec2 = work.worker.status.ec2
        if ec2.attempt == 0 and ec2.instance_id is None:
            # The attempt is recorded before anything is launched, so there is nothing.
            return await work.enter(Phase.TERMINATED, Reasons.NO_INSTANCE)
        crash_point("workers.terminate.begin")
        try:
            live = await self._ec2.live(work)
            for instance in live:
                if instance.state != "shutting-down" and not work.observe_only:
                    await self._ec2.terminate(work, instance.id)
                    crash_point("workers.terminate.sent")
        except AwsError as error:
            # An error is no proof of anything, and a host that runs is billed: this goes on until EC2 says "ended".
            await work.ec2_trouble(reason_of(error), str(error))
            return self._pace.soon()
        if live or in_doubt(ec2, work.due_by, self._settings.worker_trace_timeout):
            state = next((i.state for i in live if i.id == ec2.instance_id), ec2.state)
            await work.write(lambda w: setattr(w.status.ec2, "state", state))
            return self._pace.soon()
        crash_point("workers.terminate.ended")
        self._cml.sessions.retire(work.worker.uid)
        result = await work.enter(Phase.TERMINATED, Reasons.INSTANCE_TERMINATED, _ended)
        crash_point("workers.terminate.written")
        return result

    async def _retain(self, work: Work) -> Result:
        """Let the object go and the instance be: only what marks it as ours is taken away.

        What keeps its marks keeps a claim: to the sweep they alone would look like something forgotten.
        """
        ec2 = work.worker.status.ec2
        marked = work.observe_only and ec2.attempt > 0
        if (ec2.instance_id is not None or ec2.attempt) and not work.observe_only:
            try:
                if in_doubt(ec2, work.due_by, self._settings.worker_trace_timeout):
                    # What comes of the launch carries our marks: it is named and unmarked, or proved not to be.
                    sighting = await self._ec2.look(work)
                    if sighting.instance is None:
                        return self._pace.soon()
                    await self._ec2.record(work, sighting.instance)
                await self._ec2.unmark(work)
            except AwsError as error:
                await work.ec2_trouble(reason_of(error), str(error))
                if not work.over(work.worker.metadata.deletion_timestamp, self._settings.worker_ec2_deadline):
                    return self._pace.soon()
                # Tags are no reason to hold an object for ever; the log is what is left of it.
                marked = True
                work.log.warning(
                    "worker.retained_with_tags", instance=work.worker.status.ec2.instance_id, error=str(error)
                )
            crash_point("workers.retain.unmarked")
        instance_id = work.worker.status.ec2.instance_id
        work.log.info("worker.retained", instance=instance_id)
        if marked and instance_id is not None:
            await self._claims.take(instance_id, work.worker, work.ctx)
            return await self._let_go(work, but=instance_id)
        return await self._let_go(work)

    async def _let_go(self, work: Work, *, but: str | None = None) -> Result:
        claimed = {work.worker.spec.aws.instance_id, work.worker.status.ec2.instance_id} - {None, but}
        for instance_id in sorted(str(c) for c in claimed):
            await self._claims.release(instance_id, work.worker, work.ctx)
        crash_point("workers.claim.released")
        self._cml.sessions.retire(work.worker.uid)
        return Result.done()

    def _is_drained(self, work: Work) -> bool:
        """Whether nobody's lab is in the way, or the time for that is over, which for idleness it never is."""
        if stops_only_empty(work.worker):
            return self._is_empty(work)
        limit = work.worker.spec.drain_timeout_minutes * 60
        return self._is_empty(work) or work.over(work.worker.status.timestamps.draining_started_at, limit)

    def _is_empty(self, work: Work) -> bool:
        return not self._busy(work) and not work.ctx.wall_jumped and listed_since_drain(work.worker)

    def _for_labs(self, work: Work) -> Result:
        """The last lab that stops wakes us; a list of them does not."""
        return self._pace.rest() if self._busy(work) else self._pace.soon()


def listed_since_drain(worker: LabWorker) -> bool:
    """Whether CML was asked for its labs since the drain began, and answered last time.

    What records say from before may be half an hour old: a lab that was started meanwhile is in none.
    """
    listed, began = worker.status.labs_synced_at, worker.status.timestamps.draining_started_at
    return listed is not None and began is not None and listed >= began and not worker.status.labs_sync_error


def _ended(worker: LabWorker) -> None:
    """The id stays for people to read; what belonged to the machine goes, the CML's identity with it."""
    ec2 = worker.status.ec2
    if ec2.instance_id is not None:
        ec2.state = "terminated"
    ec2.sent_at = ec2.last_error = None
    worker.status.cml.identity = None
    unlicensed(worker)
