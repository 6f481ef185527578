"""The workers' controller: brings each LabWorker from Pending to Ready, keeps it there, and lets it go.

Each reconcile looks at EC2, then at CML, and takes one step; what takes time is begun and looked at again. Outside
effects happen only after leadership was checked and, where they create, after the intent is in the status. Here is
the way up and the time of service; the way down is `departure`. A worker at rest is looked at every
`worker_rest_interval` seconds, and written only if something changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from controllers.aws.errors import AwsError, Ec2NotFound
from controllers.cml.errors import CmlError
from controllers.labs.kind import LabRecord, records_of_worker
from controllers.workers.claims import Claims
from controllers.workers.cml_side import CmlSide, LicenseStep, trouble_of
from controllers.workers.conditions import FAILED_CHECKS
from controllers.workers.decisions import KEEPABLE, LAUNCHES_MOST, Goal, goal_of, may_license, may_retry, over
from controllers.workers.departure import Departure
from controllers.workers.kind import INSTANCE_FINALIZER, LABS, WORKERS, LabWorker
from controllers.workers.phases import SERVING, Phase, Reasons
from controllers.workers.provisioning import Held, Provisioner, Sighting, reason_of
from controllers.workers.settings import WorkerSettings
from controllers.workers.work import Work, forget_instance
from lrm.cache import Change
from lrm.crashpoints import crash_point
from lrm.reconcile import Context, Controller, Key, Result, Trigger

CRASH_POINTS = ("workers.adopt.claimed", "workers.adopt.recorded")


class WorkersController(Controller[LabWorker]):
    """See the module."""

    name = WORKERS
    lock_name = WORKERS
    model = LabWorker
    finalizer = INSTANCE_FINALIZER
    workers = 16  # each mostly waits for EC2 or for a CML that may not answer

    def __init__(self, provisioner: Provisioner, cml: CmlSide, claims: Claims, settings: WorkerSettings) -> None:
        self._ec2 = provisioner
        self._cml = cml
        self._claims = claims
        self._settings = settings
        self._departure = Departure(provisioner, cml, claims, settings, busy=is_busy, check=self.check)

    def triggers(self) -> Sequence[Trigger]:
        """A lab that starts makes a worker Active; the last one that stops lets it rest, or go on draining."""
        return (Trigger(LabRecord, _worker_of_started),)

    def wakes(self, change: Change) -> bool:
        """What the labs' sync writes of itself is no reason to ask EC2 and CML."""
        old, new = change.old, change.new
        if old is None or new is None or old.resource is None or new.resource is None:
            return True
        return _concerning(old.resource) != _concerning(new.resource)

    async def reconcile(self, resource: LabWorker, ctx: Context) -> Result:
        return await self._step(Work(resource, ctx))

    async def finalize(self, resource: LabWorker, ctx: Context) -> Result:
        return await self._departure.finalize(Work(resource, ctx))

    async def _step(self, work: Work) -> Result:
        await work.settle()
        phase = work.phase
        if phase is Phase.TERMINATED:
            return await self._departure.rest_in_peace(work)
        if phase is Phase.FAILED:
            return await self._failed(work)
        if phase is Phase.PENDING:
            return await self._pending(work)
        if phase in {Phase.UNLICENSING, Phase.STOPPING, Phase.TERMINATING_EC2}:
            return await self._departure.step(work)
        try:
            sighting = await self._ec2.look(work, by_tag=phase not in SERVING | {Phase.STOPPED, Phase.DRAINING})
            if sighting.surplus:
                await self._ec2.remove(work, sighting.surplus)
            if sighting.instance is not None and work.worker.spec.adopts:
                await self._ec2.mark(work, sighting.instance)
        except AwsError as error:
            await work.ec2_trouble(reason_of(error), str(error))
            sighting = None
        if sighting is not None and sighting.instance is not None:
            await self._ec2.record(work, sighting.instance)
        if sighting is not None and not sighting.surplus:
            await self._ec2.remove(work, ())
        return await self._by_phase(work, sighting)

    async def _by_phase(self, work: Work, sighting: Sighting | None) -> Result:  # noqa: PLR0911 - a step of the life: each way out says what is next
        match work.phase:
            case Phase.PROVISIONING_EC2:
                return await self._provisioning(work, sighting)
            case Phase.EC2_READY:
                return await self._ec2_ready(work, sighting)
            case Phase.STARTING:
                return await self._starting(work, sighting)
            case Phase.LICENSING:
                return await self._licensing(work, sighting)
            case Phase.READY | Phase.READY_UNLICENSED | Phase.ACTIVE:
                return await self._serving(work, sighting)
            case Phase.DRAINING:
                return await self._departure.draining(work, sighting)
            case Phase.STOPPED:
                return await self._stopped(work, sighting)
        work.log.error("worker.unknown_phase", phase=work.worker.status.phase)
        return self._rest()  # a newer lrm's phase: that one is to act

    # The way up

    async def _pending(self, work: Work) -> Result:
        goal, worker = goal_of(work.worker), work.worker
        if goal is Goal.TERMINATED:
            return await self._departure.leave(work, Reasons.TERMINATION_REQUESTED)
        if worker.spec.adopts:
            return await self._adopt(work)
        if goal is not Goal.READY:
            return self._rest()  # nothing is launched only to be stopped; a change of the spec wakes us
        if work.ctx.observe_only:
            await work.ec2_trouble(Reasons.OBSERVE_ONLY, "LRM_OBSERVE_ONLY is set: nothing is launched")
            return self._rest()
        return await self._launch(work, entering=True)

    async def _launch(self, work: Work, *, entering: bool = False) -> Result:
        try:
            sighting = await self._ec2.look(work, by_tag=True)
            if sighting.instance is not None:
                await self._ec2.record(work, sighting.instance)
                await self._ec2.remove(work, sighting.surplus)
                if not entering:
                    return Result.after(0)
            if entering:
                await self._ec2.check_brake(work)
                return await work.enter(Phase.PROVISIONING_EC2, Reasons.LAUNCHING)
            await self._ec2.launch(work)
        except Held as held:
            await work.ec2_trouble(held.reason, str(held))
            return self._rest()  # room comes when another instance ends: nobody tells, so look again
        except AwsError as error:
            await work.ec2_trouble(reason_of(error), str(error))
            if error.definite_refusal and not error.retryable:
                return await work.fail(reason_of(error), str(error))
            return self._backoff(work)
        return self._soon()

    async def _provisioning(self, work: Work, sighting: Sighting | None) -> Result:  # noqa: PLR0911 - a step of the life: each way out says what is next
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
        if sighting is not None and (sighting.gone or (instance is not None and instance.state == "shutting-down")):
            why = instance.state_reason if instance is not None else ""
            return await self._launch_ended(work, why)
        if self._is_over(
            work, work.worker.status.timestamps.provisioning_started_at, self._settings.worker_ec2_deadline
        ):
            trouble = ec2.last_error
            limit = f"the instance did not run within {self._settings.worker_ec2_deadline:g} s"
            message = f"{limit}: {trouble.message}" if trouble else limit
            return await work.fail(trouble.reason if trouble else Reasons.EC2_TIMEOUT, message)
        if sighting is not None and ec2.instance_id is None:
            return await self._launch(work)
        return self._soon()

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
        return self._backoff(work)

    async def _adopt(self, work: Work) -> Result:  # noqa: PLR0911 - a step of the life: each way out says what is next
        instance_id = work.worker.spec.aws.instance_id or ""
        try:
            instance = await self._ec2.describe(work, instance_id)
        except Ec2NotFound as error:
            return await work.fail(Reasons.INSTANCE_NOT_FOUND, str(error))
        except AwsError as error:
            await work.ec2_trouble(reason_of(error), str(error))
            return self._soon()
        if instance.state not in KEEPABLE:
            return await work.fail(Reasons.INSTANCE_TERMINATED, f"{instance_id} is {instance.state}")
        refusal = self._ec2.belongs_elsewhere(work, instance)
        if refusal:
            return await work.fail(Reasons.ADOPTION_REFUSED, f"{instance_id} is not adopted: {refusal}")
        holder = await self._claims.take(instance_id, work.worker, work.ctx)
        if holder:
            return await work.fail(Reasons.CLAIMED_BY_ANOTHER, f"{instance_id} is claimed by {holder}")
        crash_point("workers.adopt.claimed")
        await self._ec2.record(work, instance, lambda w: setattr(w.status.ec2, "adopted", True))
        crash_point("workers.adopt.recorded")
        if instance.state == "stopped":
            return await work.enter(Phase.STOPPED, Reasons.ADOPTED)
        if instance.state == "stopping":
            return self._soon()
        return await work.enter(Phase.STARTING, Reasons.ADOPTED)

    async def _ec2_ready(self, work: Work, sighting: Sighting | None) -> Result:
        del sighting  # Starting looks for itself
        goal = goal_of(work.worker)
        if goal is Goal.TERMINATED:
            return await self._departure.leave(work, Reasons.TERMINATION_REQUESTED)
        if goal is Goal.STOPPED:
            return await work.enter(Phase.STOPPING, Reasons.STOP_REQUESTED)
        return await work.enter(Phase.STARTING, Reasons.BOOTING)

    async def _starting(self, work: Work, sighting: Sighting | None) -> Result:
        goal, times = goal_of(work.worker), work.worker.status.timestamps
        if goal is Goal.TERMINATED:
            return await self._departure.leave(work, Reasons.TERMINATION_REQUESTED)
        if goal is Goal.STOPPED:
            return await work.enter(Phase.STOPPING, Reasons.STOP_REQUESTED)
        if ended := await self._ended(work, sighting):
            return ended
        instance = sighting.instance if sighting else None
        if instance is None or instance.state != "running":
            if times.boot_started_at is not None and instance is not None:
                await work.write(lambda w: setattr(w.status.timestamps, "boot_started_at", None))
            if self._is_over(work, times.ec2_started_at, self._settings.worker_ec2_deadline):
                limit = f"the instance did not run within {self._settings.worker_ec2_deadline:g} s"
                return await work.fail(Reasons.EC2_TIMEOUT, limit)
            if instance is not None and instance.state == "stopped" and not work.ctx.observe_only:
                try:
                    await self._ec2.start(work, instance.id)
                except AwsError as error:
                    await work.ec2_trouble(reason_of(error), str(error))
            return self._soon()
        if times.boot_started_at is None:
            now = work.now
            await work.write(lambda w: setattr(w.status.timestamps, "boot_started_at", now))
        return await self._booting(work)

    async def _booting(self, work: Work) -> Result:
        try:
            report = await self._cml.ask(work, full=True)
        except CmlError as error:
            reason, message = trouble_of(error) or (None, "")
        else:
            if report is not None:
                await self._cml.note(work, report)
                return await self._booted(work, licensed=report.licensing.is_licensed)
            reason, message = Reasons.BOOTING, "CML answers and is not ready yet"
        if reason is not None:
            await self._cml.note_trouble(work, reason, message, counts=False, most=FAILED_CHECKS)
        if self._is_over(work, work.worker.status.timestamps.boot_started_at, self._settings.worker_boot_deadline):
            trouble = work.worker.status.cml.last_error
            limit = f"CML was not ready within {self._settings.worker_boot_deadline:g} s"
            return await work.fail(Reasons.BOOT_TIMEOUT, f"{limit}: {trouble.message}" if trouble else limit)
        return self._soon()

    async def _booted(self, work: Work, *, licensed: bool) -> Result:
        if licensed:
            await work.enter(Phase.LICENSING, Reasons.LICENSED)
            return await work.enter(Phase.READY, Reasons.LICENSED)
        if may_license(work.worker) and not work.ctx.observe_only:
            return await work.enter(Phase.LICENSING, Reasons.LICENSE_REGISTERING, _fresh_registration)
        reason = Reasons.LICENSE_FAILED if work.worker.spec.wants_license else Reasons.NO_LICENSE_WANTED
        return await work.enter(Phase.READY_UNLICENSED, reason)

    async def _licensing(self, work: Work, sighting: Sighting | None) -> Result:
        if goal_of(work.worker) is not Goal.READY:
            return await work.enter(Phase.DRAINING, Reasons.DRAINING)
        if ended := await self._ended(work, sighting):
            return ended
        if self._is_off(sighting):
            return await work.enter(Phase.READY_UNLICENSED, Reasons.INSTANCE_STOPPED)
        try:
            step = await self._cml.license(work)
        except CmlError as error:
            step = LicenseStep.WAITING
            if trouble := trouble_of(error):
                await self._cml.note_trouble(work, *trouble, counts=False, most=FAILED_CHECKS)
            if self._is_over(
                work, work.worker.status.timestamps.licensing_started_at, self._settings.worker_license_deadline
            ):
                await self._cml.license_failed(work, Reasons.LICENSE_TIMEOUT, f"CML could not be asked: {error}")
                step = LicenseStep.FAILED
        if step is LicenseStep.DONE:
            return await work.enter(Phase.READY, Reasons.LICENSED, _licensed)
        if step is LicenseStep.FAILED:
            return await work.enter(Phase.READY_UNLICENSED, Reasons.LICENSE_FAILED)
        return self._soon()

    # At work

    async def _serving(self, work: Work, sighting: Sighting | None) -> Result:
        goal = goal_of(work.worker)
        if goal is not Goal.READY:
            return await work.enter(Phase.DRAINING, Reasons.DRAINING)
        if ended := await self._ended(work, sighting):
            return ended
        if self._is_off(sighting):
            self._cml.sessions.retire(work.worker.uid)
            return await work.enter(Phase.STOPPED, Reasons.INSTANCE_STOPPED)
        healthy = await self.check(work)
        if healthy and work.phase is Phase.READY_UNLICENSED:
            if work.worker.status.cml.licensed:
                return await work.enter(Phase.READY, Reasons.LICENSED)
            if may_license(work.worker) and not work.ctx.observe_only:
                return await work.enter(Phase.LICENSING, Reasons.LICENSE_REGISTERING, _fresh_registration)
        busy = is_busy(work)
        if busy and work.phase is not Phase.ACTIVE:
            await work.enter(Phase.ACTIVE, Reasons.SERVING)
        elif not busy and work.phase is Phase.ACTIVE:
            back = Phase.READY if work.worker.status.cml.licensed else Phase.READY_UNLICENSED
            await work.enter(back, Reasons.SERVING)
        return self._rest() if healthy and sighting is not None else self._uneasy()

    async def check(self, work: Work) -> bool:
        """The health check: ask CML, and count the failures in a row."""
        try:
            report = await self._cml.ask(work, full=work.worker.status.cml.system_info is None)
        except CmlError as error:
            if trouble := trouble_of(error):
                await self._cml.note_trouble(work, *trouble, counts=True, most=FAILED_CHECKS)
            return False
        if report is None:
            message = "CML answers and is not ready"
            await self._cml.note_trouble(work, Reasons.CML_NOT_READY, message, counts=True, most=FAILED_CHECKS)
            return False
        await self._cml.note(work, report)
        return True

    async def _stopped(self, work: Work, sighting: Sighting | None) -> Result:
        goal = goal_of(work.worker)
        if goal is Goal.TERMINATED:
            return await self._departure.leave(work, Reasons.TERMINATION_REQUESTED)
        if ended := await self._ended(work, sighting):
            return ended
        if goal is Goal.READY and not work.ctx.observe_only:
            return await work.enter(Phase.STARTING, Reasons.START_REQUESTED)
        running = sighting is not None and sighting.instance is not None and sighting.instance.state == "running"
        if running and goal is Goal.STOPPED and not work.ctx.observe_only:
            # Started behind our back. The only way from Stopped is through Starting.
            await work.enter(Phase.STARTING, Reasons.INSTANCE_RUNNING)
            return await work.enter(Phase.STOPPING, Reasons.STOP_REQUESTED)
        return self._rest()

    async def _failed(self, work: Work) -> Result:
        goal, ec2 = goal_of(work.worker), work.worker.status.ec2
        if goal is Goal.TERMINATED:
            return await self._departure.leave(work, Reasons.TERMINATION_REQUESTED)
        gone = False
        try:
            # One that was launched and never seen may show itself late; a deletion must know of it.
            if ec2.instance_id is not None or ec2.sent_at is not None:
                sighting = await self._ec2.look(work, by_tag=ec2.instance_id is None)
                gone = sighting.gone
                if sighting.instance is not None:
                    await self._ec2.record(work, sighting.instance)
        except AwsError as error:
            await work.ec2_trouble(reason_of(error), str(error))
            return self._rest()
        if not may_retry(work.worker):
            return self._rest()  # a change of spec or annotation wakes us
        if ec2.instance_id is None or gone:
            return await work.enter(Phase.PENDING, Reasons.RETRY, forget_ended if gone else None)
        if goal is Goal.STOPPED:
            return await work.enter(Phase.STOPPING, Reasons.STOP_REQUESTED)
        return await work.enter(Phase.STARTING, Reasons.RETRY)

    async def _ended(self, work: Work, sighting: Sighting | None) -> Result | None:
        """Fail if the instance is proved to have ended; everything on it is lost, which only a person may accept."""
        if sighting is None:
            return None
        instance = sighting.instance
        if not sighting.gone and (instance is None or instance.state != "shutting-down"):
            return None
        known = work.worker.status.ec2.instance_id
        why = f": {instance.state_reason}" if instance is not None and instance.state_reason else ""
        message = f"{known} was terminated outside of lrm{why}"
        return await work.fail(Reasons.INSTANCE_TERMINATED, message, _note_ended)

    def _is_off(self, sighting: Sighting | None) -> bool:
        return sighting is not None and sighting.instance is not None and sighting.instance.state == "stopped"

    def _is_over(self, work: Work, since: Any, seconds: float) -> bool:
        """Whether a deadline has passed; observing only, nothing can have moved, so none does."""
        return not work.ctx.observe_only and over(since, seconds, work.now)

    def _soon(self) -> Result:
        return Result.after(self._settings.worker_poll_interval)

    def _rest(self) -> Result:
        return Result.after(self._settings.worker_rest_interval)

    def _uneasy(self) -> Result:
        """After a failed look: sooner than at rest, and not so soon that three of them are one outage of seconds."""
        return Result.after(max(self._settings.worker_poll_interval, self._settings.worker_rest_interval / 4))

    def _backoff(self, work: Work) -> Result:
        """Longer between tries the longer it has been tried, so that a full account is not asked every 5 s."""
        began = work.worker.status.timestamps.provisioning_started_at
        tried = (work.now - began).total_seconds() if began is not None else 0.0
        return Result.after(max(self._settings.worker_poll_interval, min(60.0, tried / 5)))


def is_busy(work: Work) -> bool:
    """Whether a lab instance is placed on the worker, or a lab runs on it."""
    worker = work.worker
    if worker.status.allocations:
        return True
    records = records_of_worker(work.ctx.cache, worker.namespace, worker.name)
    return any(_is_started(r) for r in records)


def _is_started(record: LabRecord) -> bool:
    return record.status.state == "STARTED" and record.status.missing_since is None


def _worker_of_started(change: Change) -> Iterable[Key]:
    old, new = (i.resource if i is not None else None for i in (change.old, change.new))
    before = isinstance(old, LabRecord) and _is_started(old)
    after = isinstance(new, LabRecord) and _is_started(new)
    record = new or old
    if before != after and isinstance(record, LabRecord):
        yield record.namespace, record.spec.worker_ref


def _concerning(resource: Any) -> dict[str, Any]:
    """An object without what the labs' sync alone writes."""
    wire: dict[str, Any] = resource.wire()
    wire["metadata"].pop("resourceVersion", None)
    status = {k: v for k, v in wire["status"].items() if not k.startswith(LABS)}
    status["conditions"] = [c for c in status.get("conditions", ()) if c["type"] != "LabsSynced"]
    return {**wire, "status": status}


def _fresh_registration(worker: LabWorker) -> None:
    worker.status.cml.registration = None


def _licensed(worker: LabWorker) -> None:
    worker.status.cml.licensed, worker.status.cml.registration = True, None


def _note_ended(worker: LabWorker) -> None:
    worker.status.ec2.state = "terminated"
    worker.status.ec2.public_ip = worker.status.ec2.private_ip = None


def forget_ended(worker: LabWorker) -> None:
    """Let the ended instance go, so that the next launch is a new attempt."""
    forget_instance(worker)
    worker.status.ec2.launch = worker.status.ec2.sent_at = None
