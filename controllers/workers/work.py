"""One reconcile of one worker: its present state, the time, and the only way to change its status.

Every change goes through `write`, which also says which generation was acted on and sets the conditions, in the same
compare-and-swap; a change that changes nothing is not written. `enter` and `fail` add the phase and its timestamps.
Whether a time is over is asked here alone: just after the wall clock was set, none is.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from controllers.failure import Failure
from controllers.workers.conditions import refresh, tell_of_clock
from controllers.workers.decisions import may_hold_seat, over, problem, retry_of
from controllers.workers.kind import LabWorker
from controllers.workers.phases import Conditions, Phase, Reasons
from controllers.workers.status import Timestamps
from lrm.controller import Context, Result
from lrm.crashpoints import crash_point

Change = Callable[[LabWorker], None]

CRASH_POINTS = tuple(f"workers.entered.{phase}" for phase in Phase if phase is not Phase.PENDING)
"""Between the write that enters a phase and the first step in it."""

_NO_TIME = datetime.min.replace(tzinfo=UTC)

_BEGINS: dict[Phase, str] = {
    Phase.PROVISIONING_EC2: "provisioning_started_at",
    Phase.STARTING: "ec2_started_at",
    Phase.LICENSING: "licensing_started_at",
    Phase.READY: "ready_at",
    Phase.READY_UNLICENSED: "ready_at",
    Phase.DRAINING: "draining_started_at",
    Phase.UNLICENSING: "unlicensing_started_at",
    Phase.STOPPING: "stopping_started_at",
    Phase.STOPPED: "stopped_at",
    Phase.TERMINATING_EC2: "terminating_started_at",
    Phase.TERMINATED: "terminated_at",
}


class Work:
    """See the module."""

    def __init__(self, worker: LabWorker, ctx: Context, *, asked: bool = False) -> None:
        self.worker = worker
        self.ctx = ctx
        self.asked = asked
        """Whether a person wants everything looked at now, as at a worker that is not at rest."""
        self.wish = (worker.metadata.generation, retry_of(worker))
        """Generation and retry annotation that this reconcile began with; what is stored may be ahead of them."""

    @property
    def now(self) -> datetime:
        return self.ctx.clock.now()

    @property
    def due_by(self) -> datetime:
        """The time to judge deadlines by: the present; none at all, while what the wall clock says is in doubt."""
        now = self.now  # before the question whether it can be believed
        return _NO_TIME if self.ctx.wall_jumped else now

    @property
    def observe_only(self) -> bool:
        """Whether nothing of this worker may be changed outside, by the daemon's settings or by its own spec."""
        return self.ctx.observe_only or self.worker.spec.observe_only

    def over(self, since: datetime | None, seconds: float) -> bool:
        """Whether more than `seconds` have passed since; for all that cannot be taken back."""
        return over(since, seconds, self.due_by)

    @property
    def log(self) -> Any:
        return self.ctx.log

    @property
    def phase(self) -> Phase | str:
        return self.worker.phase

    async def write(self, change: Change) -> None:
        """Change the status. The change may be applied more than once, each time to what the store then holds."""
        now, jumped = self.now, self.ctx.wall_jumped

        def mutate(worker: LabWorker) -> None:
            change(worker)
            worker.status.observed_generation = max(self.wish[0], worker.status.observed_generation)
            refresh(worker, now)
            tell_of_clock(worker, now, jumped=jumped)

        before = self.worker.status.phase
        self.worker = await self.ctx.client.update_status(self.worker, mutate)
        after = self.worker.status.phase
        if after != before:
            reason = self.worker.status.phase_history[-1].reason
            self.log.info("worker.phase", source=before, to=after, reason=reason)
            failure = self.worker.status.failure
            if after == Phase.FAILED and failure is not None:
                self.warn(reason, f"failed in {failure.phase}: {failure.message}")
            else:
                self.ctx.events.record(self.worker, "Normal", reason, f"went from {before} to {after}")
            crash_point(f"workers.entered.{after}")

    async def settle(self) -> None:
        """Write what the spec alone changes: the observed generation and the conditions."""
        await self.write(lambda _: None)

    async def enter(self, phase: Phase, reason: str, change: Change | None = None) -> Result:
        """Go to a phase, after `change`, in one write; look again at once."""
        now = self.now

        def both(worker: LabWorker) -> None:
            if change is not None:
                change(worker)
            enter(worker, phase, reason, now)

        await self.write(both)
        return Result.after(0)

    async def fail(self, reason: str, message: str, change: Change | None = None) -> Result:
        """Give up until a person changes something."""
        now, (generation, retry) = self.now, self.wish
        self.log.error("worker.failed", phase=self.worker.status.phase, reason=reason, detail=message)

        def failing(worker: LabWorker) -> None:
            if change is not None:
                change(worker)
            worker.status.failure = Failure(
                reason=reason,
                message=message,
                at=now,
                phase=worker.status.phase,
                generation=generation,
                retry=retry,
            )
            enter(worker, Phase.FAILED, reason, now)

        await self.write(failing)
        return Result.after(0)

    async def ec2_trouble(self, reason: str, message: str) -> None:
        """Record what is wrong with EC2; the same again costs no write."""
        now = self.now

        def note(worker: LabWorker) -> None:
            worker.status.ec2.last_error = problem(worker.status.ec2.last_error, reason, message, now)

        before = self.worker.status.ec2.last_error
        await self.write(note)
        if self.worker.status.ec2.last_error != before:
            self.warn(reason, message)

    async def lose_seat(self, message: str) -> None:
        """Report a seat that can be given back no more; nothing, where there is none or it is not ours to give."""
        if may_hold_seat(self.worker) and not self.observe_only:
            sure = self.worker.status.cml.licensed
            await self.leaked_seat(Reasons.DEREGISTRATION_FAILED, message, sure=sure)

    async def leaked_seat(self, reason: str, message: str, *, sure: bool = True) -> None:
        """Report that Smart Licensing still counts this worker's licence, or that this is not known."""
        now = self.now
        message = f"{self.worker.status.ec2.instance_id}: {message}"
        self.log.warning("worker.license_seat_leaked", reason=reason, detail=message)

        def note(worker: LabWorker) -> None:
            unlicensed(worker)
            worker.status.set_condition(Conditions.LICENSE_SEAT_LEAKED, sure or None, reason, message, now=now)

        await self.write(note)
        self.warn(Conditions.LICENSE_SEAT_LEAKED, f"{reason}: {message}")

    def warn(self, reason: str, message: str) -> None:
        """Tell people of a trouble, as an event."""
        self.ctx.events.record(self.worker, "Warning", reason, message)


def enter(worker: LabWorker, phase: Phase, reason: str, now: datetime) -> None:
    """Enter a phase and begin what begins with it."""
    status = worker.status
    status.enter(phase.value, reason, now)
    times = status.timestamps
    begins = _BEGINS.get(phase)
    if begins is not None and not (begins == "ready_at" and times.ready_at is not None):
        setattr(times, begins, now)
    if phase is not Phase.FAILED:
        status.failure = None
    if phase is Phase.STARTING:
        status.timestamps = Timestamps(
            provisioning_started_at=times.provisioning_started_at, ec2_started_at=times.ec2_started_at
        )
        status.cml.failed_checks = 0
    if phase is Phase.PROVISIONING_EC2:
        status.ec2.launches = 0
    if phase in {Phase.STOPPED, Phase.TERMINATED}:
        forget_running(worker)


def forget_running(worker: LabWorker) -> None:
    """Clear what is true of a running machine only: addresses, checks, the CML's present state.

    What was measured of it is the fleet metrics' to clear, who hear of the phase.
    """
    status = worker.status
    status.ec2.public_ip = status.ec2.private_ip = status.ec2.checks = None
    cml = status.cml
    cml.ready, cml.api_url, cml.system_info, cml.health, cml.failed_checks = False, None, None, None, 0
    cml.last_error = None


def forget_instance(worker: LabWorker) -> None:
    """Clear what belongs to one instance: the CML's identity goes with it."""
    forget_running(worker)
    ec2, cml = worker.status.ec2, worker.status.cml
    ec2.instance_id = ec2.owner_id = ec2.state = ec2.first_seen_at = None
    cml.identity = cml.version = None
    unlicensed(worker)
    worker.status.capacity = worker.status.idle = None


def forget_ended(worker: LabWorker) -> None:
    """Let an instance that has ended go, so that the next launch is a new attempt."""
    forget_instance(worker)
    worker.status.ec2.launch = worker.status.ec2.sent_at = None


def fresh_registration(worker: LabWorker) -> None:
    """Begin a registration that owes nothing to an earlier one."""
    worker.status.cml.registration = None


def unlicensed(worker: LabWorker) -> None:
    """Note that there is no licence any more, and nothing on its way."""
    cml = worker.status.cml
    cml.licensed, cml.registration, cml.deregistration_sent_at = False, None, None


def licensed_now(worker: LabWorker) -> None:
    """Note that CML said so, before the next report does."""
    worker.status.cml.licensed, worker.status.cml.registration = True, None
