"""A worker's way up: an instance launched or adopted, CML booted and identified, a licence registered.

One method per phase; each takes one step, and says when to look again or what phase is next. What EC2 and CML are
asked, and what is recorded before, is in `provisioning` and `cml_side`. Called by the workers' controller.
"""

from __future__ import annotations

from controllers.aws.errors import AwsError, Ec2NotFound
from controllers.cml.errors import CmlError
from controllers.workers.claims import Claims, HolderUnreadable
from controllers.workers.cml_side import CmlSide, LicenseStep
from controllers.workers.conditions import FAILED_CHECKS
from controllers.workers.decisions import KEEPABLE, LAUNCHES_MOST, Goal, goal_of, in_doubt, may_license
from controllers.workers.departure import Departure
from controllers.workers.kind import LabWorker
from controllers.workers.pace import Pace
from controllers.workers.phases import Phase, Reasons
from controllers.workers.provisioning import (
    UNDECODABLE_WORKER,
    Held,
    Provisioner,
    Sighting,
    fail_if_ended,
    is_off,
    reason_of,
)
from controllers.workers.work import Work, forget_instance, fresh_registration, licensed_now
from lrm.controller import Result
from lrm.crashpoints import crash_point

CRASH_POINTS = ("workers.adopt.claimed", "workers.adopt.recorded")


class Arrival:
    """See the module."""

    def __init__(
        self, provisioner: Provisioner, cml: CmlSide, claims: Claims, departure: Departure, pace: Pace
    ) -> None:
        self._ec2 = provisioner
        self._cml = cml
        self._claims = claims
        self._departure = departure
        self._pace = pace
        self._settings = pace.settings

    async def pending(self, work: Work) -> Result:
        goal, worker = goal_of(work.worker), work.worker
        if goal is Goal.TERMINATED:
            return await self._departure.leave(work, Reasons.TERMINATION_REQUESTED)
        if worker.spec.adopts:
            return await self._adopt(work)
        if goal is not Goal.READY:
            return self._pace.rest()  # nothing is launched only to be stopped; a change of the spec wakes us
        if work.observe_only:
            await work.ec2_trouble(Reasons.OBSERVE_ONLY, "nothing is launched while this worker is only observed")
            return self._pace.rest()
        return await self._provision(work)

    async def _provision(self, work: Work) -> Result:
        """Take an instance that carries our uid already, or begin to make one."""
        try:
            sighting = await self._ec2.look(work)
            if sighting.instance is not None:
                await self._ec2.record(work, sighting.instance)
                await self._ec2.remove(work, sighting.surplus)
            else:
                await self._ec2.check_brake(work)
        except Held as held:
            return await self._held(work, held)
        except AwsError as error:
            return await self._refused(work, error)
        return await work.enter(Phase.PROVISIONING_EC2, Reasons.LAUNCHING)

    async def _launch(self, work: Work) -> Result:
        """Launch, after a look that found nothing."""
        try:
            await self._ec2.launch(work)
        except Held as held:
            return await self._held(work, held)
        except AwsError as error:
            return await self._refused(work, error)
        return self._pace.soon()

    async def _held(self, work: Work, held: Held) -> Result:
        await work.ec2_trouble(held.reason, str(held))
        return self._pace.rest()  # room comes when another instance ends: nobody tells, so look again

    async def _refused(self, work: Work, error: AwsError) -> Result:
        await work.ec2_trouble(reason_of(error), str(error))
        if error.definite_refusal and not error.retryable:
            return await work.fail(reason_of(error), str(error))
        return self._pace.backoff(work)

    async def provisioning(self, work: Work, sighting: Sighting | None) -> Result:  # noqa: PLR0911 - each way out says what is next
        goal, ec2 = goal_of(work.worker), work.worker.status.ec2
        if goal is Goal.TERMINATED:
            return await self._departure.leave(work, Reasons.TERMINATION_REQUESTED)
        if goal is Goal.STOPPED and ec2.instance_id is not None:
            return await work.enter(Phase.STOPPING, Reasons.STOP_REQUESTED)
        instance = sighting.instance if sighting else None
        if instance is not None and instance.state == "running":
            return await work.enter(Phase.EC2_READY, Reasons.INSTANCE_RUNNING)
        if instance is not None and instance.state in {"stopping", "stopped"}:
            return await work.enter(Phase.EC2_READY, Reasons.INSTANCE_STOPPED)
        if sighting is not None and sighting.has_ended:
            why = instance.state_reason if instance is not None else ""
            return await self._launch_ended(work, why)
        if goal is not Goal.READY and ec2.instance_id is None:
            return await self._unwanted(work, sighting)
        if work.worker.status.timestamps.provisioning_started_at is None:
            now = work.now
            await work.write(lambda w: setattr(w.status.timestamps, "provisioning_started_at", now))
        if self._pace.is_over(
            work, work.worker.status.timestamps.provisioning_started_at, self._settings.worker_ec2_deadline
        ):
            trouble = ec2.last_error
            limit = f"the instance did not run within {self._settings.worker_ec2_deadline:g} s"
            message = f"{limit}: {trouble.message}" if trouble else limit
            return await work.fail(trouble.reason if trouble else Reasons.EC2_TIMEOUT, message)
        if sighting is not None and ec2.instance_id is None:
            return await self._launch(work)
        return self._pace.soon()

    async def _unwanted(self, work: Work, sighting: Sighting | None) -> Result:
        """Nothing is launched only to be stopped; what may have been launched is looked for until that is settled."""
        ec2 = work.worker.status.ec2
        if sighting is None or in_doubt(ec2, work.due_by, self._settings.worker_trace_timeout):
            return self._pace.soon()

        def forget(worker: LabWorker) -> None:
            if worker.status.ec2.sent_at is not None:
                worker.status.ec2.launch = worker.status.ec2.sent_at = None
            worker.status.timestamps.provisioning_started_at = None  # the time at rest counts to no deadline

        await work.write(forget)
        return self._pace.rest()  # a change of the spec wakes us

    async def _launch_ended(self, work: Work, why: str) -> Result:
        """EC2 ended the instance while it was being made: that attempt is spent, the next one follows."""
        ended = work.worker.status.ec2.instance_id
        message = f"EC2 ended {ended} while launching it{': ' + why if why else ''}"
        launches = work.worker.status.ec2.launches + 1

        def spent(worker: LabWorker) -> None:
            forget_instance(worker)
            worker.status.ec2.launch = worker.status.ec2.sent_at = None
            worker.status.ec2.launches = launches

        if launches >= LAUNCHES_MOST:
            return await work.fail(Reasons.LAUNCH_FAILED, message, spent)
        work.log.warning("worker.launch_ended", instance=ended, why=why)
        await work.write(spent)
        await work.ec2_trouble(Reasons.LAUNCH_FAILED, message)
        return self._pace.backoff(work)

    async def _adopt(self, work: Work) -> Result:  # noqa: PLR0911 - each way out says what is next
        instance_id = work.worker.spec.aws.instance_id or ""
        try:
            instance = await self._ec2.describe(work, instance_id)
        except Ec2NotFound as error:
            return await work.fail(Reasons.INSTANCE_NOT_FOUND, str(error))
        except AwsError as error:
            await work.ec2_trouble(reason_of(error), str(error))
            return self._pace.soon()
        if instance.state not in KEEPABLE:
            return await work.fail(Reasons.INSTANCE_TERMINATED, f"{instance_id} is {instance.state}")
        refusal = await self._ec2.belongs_elsewhere(work, instance)
        if refusal:
            return await work.fail(Reasons.ADOPTION_REFUSED, f"{instance_id} is not adopted: {refusal}")
        try:
            holder = await self._claims.take(instance_id, work.worker, work.ctx)
        except HolderUnreadable as error:
            await work.ec2_trouble(UNDECODABLE_WORKER, str(error))
            raise
        if holder:
            return await work.fail(Reasons.CLAIMED_BY_ANOTHER, f"{instance_id} is claimed by {holder}")
        crash_point("workers.adopt.claimed")
        await self._ec2.record(work, instance, lambda w: setattr(w.status.ec2, "adopted", True))
        crash_point("workers.adopt.recorded")
        if instance.state == "stopped":
            return await work.enter(Phase.STOPPED, Reasons.ADOPTED)
        if instance.state == "stopping":
            return self._pace.soon()
        return await work.enter(Phase.STARTING, Reasons.ADOPTED)

    async def ec2_ready(self, work: Work, sighting: Sighting | None) -> Result:
        del sighting  # Starting looks for itself
        goal = goal_of(work.worker)
        if goal is Goal.TERMINATED:
            return await self._departure.leave(work, Reasons.TERMINATION_REQUESTED)
        if goal is Goal.STOPPED:
            return await work.enter(Phase.STOPPING, Reasons.STOP_REQUESTED)
        return await work.enter(Phase.STARTING, Reasons.BOOTING)

    async def starting(self, work: Work, sighting: Sighting | None) -> Result:
        goal, times = goal_of(work.worker), work.worker.status.timestamps
        if goal is Goal.TERMINATED:
            return await self._departure.leave(work, Reasons.TERMINATION_REQUESTED)
        if goal is Goal.STOPPED:
            return await work.enter(Phase.STOPPING, Reasons.STOP_REQUESTED)
        if ended := await fail_if_ended(work, sighting):
            return ended
        instance = sighting.instance if sighting else None
        if instance is None or instance.state != "running":
            if times.boot_started_at is not None and instance is not None:
                await work.write(lambda w: setattr(w.status.timestamps, "boot_started_at", None))
            if self._pace.is_over(work, times.ec2_started_at, self._settings.worker_ec2_deadline):
                limit = f"the instance did not run within {self._settings.worker_ec2_deadline:g} s"
                return await work.fail(Reasons.EC2_TIMEOUT, limit)
            if instance is not None and instance.state == "stopped" and not work.observe_only:
                try:
                    await self._ec2.start(work, instance.id)
                except AwsError as error:
                    await work.ec2_trouble(reason_of(error), str(error))
            return self._pace.soon()
        if times.boot_started_at is None:
            now = work.now
            await work.write(lambda w: setattr(w.status.timestamps, "boot_started_at", now))
        return await self._booting(work)

    async def _booting(self, work: Work) -> Result:
        try:
            report = await self._cml.ask(work, full=True)
        except CmlError as error:
            await self._cml.note_error(work, error, counts=False, most=FAILED_CHECKS)
        else:
            if report is not None:
                await self._cml.note(work, report)
                return await self._booted(work, licensed=report.licensing.is_licensed)
            message = "CML answers and is not ready yet"
            await self._cml.note_trouble(work, Reasons.BOOTING, message, counts=False, most=FAILED_CHECKS)
        if self._pace.is_over(work, work.worker.status.timestamps.boot_started_at, self._settings.worker_boot_deadline):
            trouble = work.worker.status.cml.last_error
            limit = f"CML was not ready within {self._settings.worker_boot_deadline:g} s"
            return await work.fail(Reasons.BOOT_TIMEOUT, f"{limit}: {trouble.message}" if trouble else limit)
        return self._pace.soon()

    async def _booted(self, work: Work, *, licensed: bool) -> Result:
        if licensed:
            await work.enter(Phase.LICENSING, Reasons.LICENSED)
            return await work.enter(Phase.READY, Reasons.LICENSED)
        if may_license(work.worker) and not work.observe_only:
            return await work.enter(Phase.LICENSING, Reasons.LICENSE_REGISTERING, fresh_registration)
        reason = Reasons.LICENSE_FAILED if work.worker.spec.wants_license else Reasons.NO_LICENSE_WANTED
        return await work.enter(Phase.READY_UNLICENSED, reason)

    async def licensing(self, work: Work, sighting: Sighting | None) -> Result:
        if goal_of(work.worker) is not Goal.READY:
            return await self._departure.begin(work)
        if ended := await fail_if_ended(work, sighting):
            return ended
        if is_off(sighting):
            return await work.enter(Phase.READY_UNLICENSED, Reasons.INSTANCE_STOPPED)
        try:
            step = await self._cml.license(work)
        except CmlError as error:
            step = LicenseStep.WAITING
            await self._cml.note_error(work, error, counts=False, most=FAILED_CHECKS)
            if self._pace.is_over(
                work, work.worker.status.timestamps.licensing_started_at, self._settings.worker_license_deadline
            ):
                await self._cml.license_failed(work, Reasons.LICENSE_TIMEOUT, f"CML could not be asked: {error}")
                step = LicenseStep.FAILED
        if step is LicenseStep.DONE:
            return await work.enter(Phase.READY, Reasons.LICENSED, licensed_now)
        if step is LicenseStep.FAILED:
            return await work.enter(Phase.READY_UNLICENSED, Reasons.LICENSE_FAILED)
        return self._pace.soon()
