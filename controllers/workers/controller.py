"""The workers' controller: brings each LabWorker from Pending to Ready, keeps it there, and lets it go.

Each reconcile looks at EC2, then at CML, and takes one step; what takes time is begun and looked at again. Outside
effects happen only after leadership was checked and, where they create, after the intent is in the status. Here is
the time of service, and what happens in each phase by whom; the way up is `arrival`, the way down `departure`. A
worker at rest is looked at every `worker_rest_interval` seconds, and written only if something changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from controllers.aws.errors import AwsError
from controllers.cml.errors import CmlError
from controllers.labs.kind import REFRESH_ANNOTATION, LabRecord
from controllers.workers.arrival import Arrival
from controllers.workers.claims import Claims
from controllers.workers.cml_side import CmlSide
from controllers.workers.conditions import FAILED_CHECKS
from controllers.workers.decisions import Goal, at_rest, goal_of, may_license, may_retry, retry_of
from controllers.workers.departure import Departure
from controllers.workers.idle import IdleDetector
from controllers.workers.kind import INSTANCE_FINALIZER, LAB_WORKER, LABS, METRICS, WORKERS, LabWorker
from controllers.workers.pace import Pace
from controllers.workers.phases import Phase, Reasons
from controllers.workers.provisioning import Provisioner, Sighting, fail_if_ended, is_off, reason_of, tell_of_seat
from controllers.workers.queries import is_started, started_labs
from controllers.workers.settings import WorkerSettings
from controllers.workers.turns import Crowded
from controllers.workers.work import Work, forget_ended, fresh_registration
from lrm.cache import Change
from lrm.controller import Context, Controller, Key, Result, Trigger
from lrm.resource import RECONCILE_ANNOTATION


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
        self._pace = Pace(settings)
        self.poll = settings.worker_rest_interval
        self.hints = provisioner.looks.hints
        cml.sessions.turns.listen(self.hints.tell)
        self._honoured: dict[str, str] = {}
        """The last value of the annotation reconcile-now that was heard, by uid."""
        self._idle = IdleDetector(cml, settings)
        self._departure = Departure(provisioner, cml, claims, self._pace, busy=is_busy, check=self.check)
        self._arrival = Arrival(provisioner, cml, claims, self._departure, self._pace)

    def triggers(self) -> Sequence[Trigger]:
        """A lab that starts makes a worker Active; the last one that stops lets it rest, or go on draining."""
        return (Trigger(LabRecord, _worker_of_started),)

    def wakes(self, change: Change) -> bool:
        """What the labs' sync and the metrics write of themselves is no reason to ask EC2 and CML."""
        old, new = change.old, change.new
        if old is None or new is None or old.resource is None or new.resource is None:
            return True
        return _concerning(old.resource) != _concerning(new.resource)

    def settled(self, resource: LabWorker) -> bool:
        """At rest, and held: what is outside is looked at again by the time it would have been anyway."""
        return self.finalizer in resource.metadata.finalizers and at_rest(resource)

    async def reconcile(self, resource: LabWorker, ctx: Context) -> Result:
        wish = resource.metadata.annotations.get(RECONCILE_ANNOTATION)
        work = Work(resource, ctx, asked=wish is not None and self._honoured.get(resource.uid) != wish)
        try:
            result = await self._step(work)
        except Crowded:
            return self._pace.uneasy()  # told earlier, if all goes well
        if wish is not None:
            self._honoured[resource.uid] = wish
        return result

    async def finalize(self, resource: LabWorker, ctx: Context) -> Result:
        self._honoured.pop(resource.uid, None)
        try:
            return await self._departure.finalize(Work(resource, ctx))
        except Crowded:
            return self._pace.uneasy()

    async def _step(self, work: Work) -> Result:
        await work.settle()
        await self._idle.lift(work)
        phase = work.phase
        if phase is Phase.TERMINATED:
            return await self._departure.rest_in_peace(work)
        if phase is Phase.FAILED:
            return await self._failed(work)
        if phase is Phase.PENDING:
            return await self._arrival.pending(work)
        if phase in {Phase.UNLICENSING, Phase.STOPPING, Phase.TERMINATING_EC2}:
            return await self._departure.step(work)
        return await self._by_phase(work, await self._ec2.see(work))

    async def _by_phase(self, work: Work, sighting: Sighting | None) -> Result:  # noqa: PLR0911 - one way out per phase
        match work.phase:
            case Phase.PROVISIONING_EC2:
                return await self._arrival.provisioning(work, sighting)
            case Phase.EC2_READY:
                return await self._arrival.ec2_ready(work, sighting)
            case Phase.STARTING:
                return await self._arrival.starting(work, sighting)
            case Phase.LICENSING:
                return await self._arrival.licensing(work, sighting)
            case Phase.READY | Phase.READY_UNLICENSED | Phase.ACTIVE:
                return await self._serving(work, sighting)
            case Phase.DRAINING:
                await self._idle.reconsider(work, lambda: is_busy(work))
                return await self._departure.draining(work, sighting)
            case Phase.STOPPED:
                return await self._stopped(work, sighting)
        work.log.error("worker.unknown_phase", phase=work.worker.status.phase)
        return self._pace.rest()  # a newer lrm's phase: that one is to act

    # At work

    async def _serving(self, work: Work, sighting: Sighting | None) -> Result:  # noqa: PLR0911 - each way out says what is next
        goal = goal_of(work.worker)
        if goal is not Goal.READY:
            return await self._departure.begin(work)
        if ended := await fail_if_ended(work, sighting):
            return ended
        if is_off(sighting):
            self._cml.sessions.retire(work.worker.uid)
            return await work.enter(Phase.STOPPED, Reasons.INSTANCE_STOPPED)
        healthy = await self.check(work)
        if healthy and work.phase is Phase.READY_UNLICENSED:
            if work.worker.status.cml.licensed:
                return await work.enter(Phase.READY, Reasons.LICENSED)
            if may_license(work.worker) and not work.observe_only:
                return await work.enter(Phase.LICENSING, Reasons.LICENSE_REGISTERING, fresh_registration)
        busy = is_busy(work)
        if busy and work.phase is not Phase.ACTIVE:
            await work.enter(Phase.ACTIVE, Reasons.SERVING)
        elif not busy and work.phase is Phase.ACTIVE:
            back = Phase.READY if work.worker.status.cml.licensed else Phase.READY_UNLICENSED
            await work.enter(back, Reasons.SERVING)
        if healthy and await self._idle.pause_if_idle(work, lambda: is_busy(work)):
            return Result.after(0)
        return self._pace.rest() if healthy and sighting is not None else self._pace.uneasy()

    async def check(self, work: Work) -> bool:
        """The health check: ask CML, and count the failures in a row."""
        try:
            report = await self._cml.check(work)
        except CmlError as error:
            await self._cml.note_error(work, error, counts=True, most=FAILED_CHECKS)
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
        if ended := await fail_if_ended(work, sighting):
            return ended
        running = sighting is not None and sighting.instance is not None and sighting.instance.state == "running"
        if goal is Goal.READY and (running or not work.observe_only):
            return await work.enter(Phase.STARTING, Reasons.START_REQUESTED)
        if running and goal is Goal.STOPPED and not work.observe_only:
            # Started behind our back. The only way from Stopped is through Starting.
            await work.enter(Phase.STARTING, Reasons.INSTANCE_RUNNING)
            return await work.enter(Phase.STOPPING, Reasons.STOP_REQUESTED)
        return self._pace.rest()

    async def _failed(self, work: Work) -> Result:  # noqa: PLR0911 - each way out says what is next
        goal, ec2 = goal_of(work.worker), work.worker.status.ec2
        if goal is Goal.TERMINATED:
            return await self._departure.leave(work, Reasons.TERMINATION_REQUESTED)
        gone = ending = False
        try:
            # One that was launched and never seen may show itself late; a deletion must know of it.
            if ec2.instance_id is not None or ec2.sent_at is not None:
                sighting = await self._ec2.look(work)
                await tell_of_seat(work, sighting)
                # Another one that carries the uid is recorded, and then it is that one which a retry starts.
                ending = sighting.has_ended and not sighting.gone
                gone = sighting.gone and (sighting.instance is None or sighting.instance.id == ec2.instance_id)
                if sighting.instance is not None:
                    await self._ec2.record(work, sighting.instance)
                await self._ec2.remove(work, sighting.surplus)
        except AwsError as error:
            await work.ec2_trouble(reason_of(error), str(error))
            return self._pace.rest()
        if not may_retry(work.worker):
            return self._pace.rest()  # a change of spec or annotation wakes us
        if ending:
            return self._pace.soon()  # it cannot be started any more, and is not yet to be replaced
        failure = work.worker.status.failure
        asked = failure is not None and failure.retry != retry_of(work.worker)
        why = Reasons.RETRY if asked else Reasons.SPEC_CHANGED
        if work.worker.status.ec2.instance_id is None or gone:
            return await work.enter(Phase.PENDING, why, forget_ended if gone else None)
        if goal is Goal.STOPPED:
            return await work.enter(Phase.STOPPING, Reasons.STOP_REQUESTED)
        return await work.enter(Phase.STARTING, why)


def is_busy(work: Work) -> bool:
    """Whether a lab instance is placed on the worker, or a lab runs on it."""
    return bool(work.worker.status.allocations or started_labs(work.ctx.cache, work.worker))


def _worker_of_started(change: Change) -> Iterable[Key]:
    old, new = (i.resource if i is not None else None for i in (change.old, change.new))
    before = isinstance(old, LabRecord) and is_started(old)
    after = isinstance(new, LabRecord) and is_started(new)
    record = new or old
    if before != after and isinstance(record, LabRecord):
        yield record.namespace, record.spec.worker_ref


def _concerning(resource: Any) -> dict[str, Any]:
    """An object without what concerns or is written by the labs' sync and the metrics alone."""
    wire: dict[str, Any] = resource.wire()
    wire["metadata"].pop("resourceVersion", None)
    wire["metadata"].get("annotations", {}).pop(REFRESH_ANNOTATION, None)
    status = {k: v for k, v in wire["status"].items() if LAB_WORKER.owner_of(k) not in {LABS, METRICS}}
    status["conditions"] = [c for c in status.get("conditions", ()) if c["type"] != "LabsSynced"]
    return {**wire, "status": status}
