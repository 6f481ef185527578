"""A worker's EC2 instance: looked for, launched, adopted, started, stopped, ended.

Promises that of all instances which carry a worker's uid one survives, and that none is lost: the attempt and its
parameters are in the status before RunInstances is called, what carries the uid is looked for before each launch and
at every look, surplus is ended and reported. An error of EC2's is an error, never "terminated"; that an instance is
gone is believed only under `absence_proves`, and only with credentials of the account that had it. Observing only,
nothing here changes anything in EC2. All that asks EC2 may raise `Crowded` and has done nothing then, but for
RunInstances, which is sent once its intent is recorded. Called by the workers' controller.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from controllers.aws.calls import READ_TIMEOUT
from controllers.aws.ec2 import LIVE_STATES, Ec2, Ec2Instance, LaunchParameters
from controllers.aws.errors import (
    AwsAccountForbidden,
    AwsAuthError,
    AwsBadInput,
    AwsCapacity,
    AwsError,
    AwsIdempotentMismatch,
    AwsNotFound,
    AwsOutcomeUnknown,
    AwsQuota,
    AwsThrottled,
    AwsUnavailable,
    AwsUnknownAccount,
    AwsUnknownRegion,
    AwsWrongAccount,
    AwsWrongState,
    Ec2NotFound,
)
from controllers.aws.place import Place
from controllers.workers.decisions import (
    INSTALLATION_TAG,
    UID_TAG,
    Goal,
    absence_proves,
    addresses_of,
    choose,
    goal_of,
    in_doubt,
    next_launch,
    tags_of,
)
from controllers.workers.kind import LAB_WORKER, LabWorker
from controllers.workers.looks import Ec2Looks
from controllers.workers.phases import Conditions, Phase, Reasons
from controllers.workers.settings import WorkerSettings
from controllers.workers.turns import Turns
from controllers.workers.work import Change, Work, forget_instance
from lrm.controller import Result
from lrm.crashpoints import crash_point
from lrm.errors import RetryLater
from storage.clock import Clock

CRASH_POINTS = (
    "workers.launch.looked",
    "workers.launch.recorded",
    "workers.launch.sent",
    "workers.launch.known",
    "workers.surplus.ended",
    "workers.start.sent",
    "workers.stop.sent",
)
"""Between every two steps of a launch, in their order, and after each other change in EC2."""

UNDECODABLE_WORKER = "UndecodableWorker"
"""Nothing is taken over, as a worker that this version cannot read may have it."""

_STATES = (*LIVE_STATES, "terminated")
_SURPLUS_KEPT = 10
_ELSEWHERE_TIMEOUT = 5.0
"""Seconds that a launch waits for other regions and accounts to say what they have of the installation."""
_SILENT_SECONDS = 30.0
_EMPTY = frozenset({Phase.PENDING, Phase.PROVISIONING_EC2, Phase.EC2_READY, Phase.STARTING})
"""Nothing was on the instance yet: where it ended and another one carries the uid, that one takes its place."""

_REASONS: tuple[tuple[type[AwsError], str], ...] = (
    (AwsQuota, "QuotaExceeded"),
    (AwsCapacity, "InsufficientCapacity"),
    (AwsThrottled, "Throttled"),
    (AwsWrongAccount, "WrongAccount"),
    (AwsAuthError, "AWSAuthFailed"),
    (AwsUnknownAccount, "UnknownAccount"),
    (AwsUnknownRegion, "UnknownRegion"),
    (AwsAccountForbidden, "AccountForbidden"),
    (AwsBadInput, Reasons.LAUNCH_REFUSED),
    (AwsNotFound, Reasons.LAUNCH_REFUSED),
    (AwsWrongState, "WrongState"),
    (AwsUnavailable, "AWSUnavailable"),
    (AwsOutcomeUnknown, "OutcomeUnknown"),
)


def reason_of(error: AwsError) -> str:
    """The reason of a condition for an error of AWS."""
    return next((reason for kind, reason in _REASONS if isinstance(error, kind)), "AWSError")


@dataclass(frozen=True, slots=True)
class Sighting:
    """What a look at EC2 showed. `gone`: it is proved that the recorded instance is no more, or has ended.

    `instance` is then the recorded one as it ended, or another one that carries the worker's uid.
    """

    instance: Ec2Instance | None = None
    surplus: tuple[Ec2Instance, ...] = ()
    gone: bool = False

    @property
    def has_ended(self) -> bool:
        """Whether the recorded instance is gone, or beyond recall."""
        return self.gone or (self.instance is not None and self.instance.state == "shutting-down")


class Held(Exception):  # noqa: N818 - not an error: a brake is on
    """Nothing was launched, for a reason that is no fault of EC2's."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Provisioner:
    """See the module."""

    def __init__(self, ec2: Ec2, settings: WorkerSettings, installation: str) -> None:
        self._ec2 = ec2
        self._settings = settings
        self._installation = installation
        self.looks = Ec2Looks(ec2, settings, installation)
        self._turns = Turns(self.looks.hints)
        # Counting launches and recording one more is one step, else N of them at once would each find room.
        self._brake = asyncio.Lock()
        self._silent_until: dict[Place, float] = {}
        """Until when, monotonic, a place that gave no answer is not asked how many instances it has."""

    async def see(self, work: Work) -> Sighting | None:
        """Look, and do what follows in every phase: end the surplus, mark, record. None when EC2 could not be asked.

        At rest, a look that all workers share is enough where it shows the instance as it is recorded.
        """
        try:
            self._check_named(work)
            confirmed = await self.looks.confirm(work)
            sighting = Sighting(confirmed) if confirmed is not None else await self.look(work)
            await self.remove(work, sighting.surplus)
            if sighting.instance is not None and work.worker.spec.adopts:
                await self.mark(work, sighting.instance)
        except AwsError as error:
            await work.ec2_trouble(reason_of(error), str(error))
            return None
        await tell_of_seat(work, sighting)
        instance = sighting.instance
        takes_over = instance is not None and instance.id != work.worker.status.ec2.instance_id
        if instance is not None and (not sighting.gone or not takes_over or work.phase in _EMPTY):
            await self.record(work, instance)
            return replace(sighting, gone=sighting.gone and not takes_over)
        return sighting

    async def look(self, work: Work) -> Sighting:
        """What EC2 says of the worker's instance, and which others carry its uid. Raises `AwsError`."""
        self._check_named(work)
        worker, recorded = work.worker, work.worker.status.ec2.instance_id
        # One question in most cases: what launches finds by tag what it recorded, too.
        found = [] if worker.spec.adopts else await self._carriers(work)
        known = next((i for i in found if i.id == recorded), None)
        if recorded is not None and known is None:
            known = await self._describe(work, recorded)
            if known is not None:
                found.append(known)
            elif not await self._absence_proves(work):
                # Not in sight yet. Whatever else carries the uid must wait: the recorded one has the labs.
                return Sighting()
        # One that adopts has launched nothing: whatever else carries its tags is a copy that somebody made.
        kept, surplus = choose(found, recorded)
        if kept is not None:
            return Sighting(kept, surplus, gone=recorded is not None and kept.id != recorded)
        return Sighting(known, gone=recorded is not None and (known is None or known.state == "terminated"))

    async def record(self, work: Work, instance: Ec2Instance, change: Change | None = None) -> None:
        """Take what EC2 said of the instance into the status; the same again costs no write."""
        now = work.now

        def note(worker: LabWorker) -> None:
            note_instance(worker, instance)
            worker.status.ec2.first_seen_at = worker.status.ec2.first_seen_at or now
            worker.status.ec2.sent_at = None
            if change is not None:
                change(worker)

        await work.write(note)

    async def launch(self, work: Work) -> None:
        """Launch the instance, or repeat the launch whose outcome is in doubt; call it when a look found none.

        Raises `Held` for a brake, `AwsError` for EC2's refusal or silence; the status says how far it came.
        """
        if work.observe_only:
            raise Held(Reasons.OBSERVE_ONLY, "nothing is launched while this worker is only observed")
        self._check_named(work)
        crash_point("workers.launch.looked")
        doubtful_since = await self._intend(work)
        if goal_of(work.worker) is not Goal.READY:
            return  # the wish changed meanwhile, and the intent was not written
        crash_point("workers.launch.recorded")
        parameters = LaunchParameters.from_json(work.worker.status.ec2.launch or {})
        timeout = work.ctx.creating_timeout
        work.ctx.check_leading(timeout)
        try:
            with self.looks.changing(work):
                instance = await self._ec2.run_instance(work.worker.spec.place, parameters, timeout=timeout)
        except AwsIdempotentMismatch:
            await self._after_mismatch(work)
            return
        except AwsError as error:
            if error.definite_refusal:
                # It settles this call. An earlier one of the same attempt stays as doubtful as it was.
                await work.write(lambda w: setattr(w.status.ec2, "sent_at", doubtful_since))
            raise
        crash_point("workers.launch.sent")
        work.log.info("worker.launched", instance=instance.id, attempt=work.worker.status.ec2.attempt)
        await work.write(lambda w: note_instance(w, instance))
        crash_point("workers.launch.known")

    async def remove(self, work: Work, surplus: tuple[Ec2Instance, ...]) -> None:
        """End the instances that are too many, and say so in the status."""
        for instance in surplus:
            if work.observe_only:
                break
            await self.terminate(work, instance.id)
            crash_point("workers.surplus.ended")
            work.log.warning("worker.surplus_removed", instance=instance.id, launched=str(instance.launch_time))
        now, ids = work.now, [i.id for i in surplus]
        reported = work.worker.status.condition(Conditions.SURPLUS_INSTANCES)
        if not surplus and (reported is None or reported.status == "False"):
            return

        def note(worker: LabWorker) -> None:
            ec2 = worker.status.ec2
            ec2.surplus = list(dict.fromkeys([*ec2.surplus, *ids]))[-_SURPLUS_KEPT:]
            done = "left alone, as it is only observed" if work.observe_only else "ended"
            message = f"more than one instance carried this worker's uid; {done}: {', '.join(ec2.surplus)}"
            worker.status.set_condition(
                Conditions.SURPLUS_INSTANCES, bool(ids), Reasons.SURPLUS_REMOVED, message, now=now
            )

        await work.write(note)

    async def start(self, work: Work, instance_id: str) -> None:
        work.ctx.check_leading()
        with self._turns.turn(work), self.looks.changing(work):
            await self._ec2.start(work.worker.spec.place, instance_id)
        crash_point("workers.start.sent")
        work.log.info("worker.instance_started", instance=instance_id)

    async def stop(self, work: Work, instance_id: str) -> None:
        work.ctx.check_leading()
        with self._turns.turn(work), self.looks.changing(work):
            await self._ec2.stop(work.worker.spec.place, instance_id)
        crash_point("workers.stop.sent")
        work.log.info("worker.instance_stopped", instance=instance_id)

    async def terminate(self, work: Work, instance_id: str) -> None:
        """Ask EC2 to end an instance; that it is told of as ended, only a look can say."""
        work.ctx.check_leading()
        with self._turns.turn(work), self.looks.changing(work):
            await self._ec2.terminate(work.worker.spec.place, instance_id)
        work.log.info("worker.instance_terminated", instance=instance_id)

    async def describe(self, work: Work, instance_id: str) -> Ec2Instance:
        """One instance, for adoption. Raises `Ec2NotFound`."""
        self._check_named(work)
        work.ctx.check_leading()
        with self._turns.turn(work):
            return await self._ec2.describe_instance(work.worker.spec.place, instance_id)

    async def mark(self, work: Work, instance: Ec2Instance) -> None:
        """Give an adopted instance this worker's tags, if it lacks them."""
        wanted = {**work.worker.spec.aws.tags, **tags_of(work.worker, self._installation)}
        if not work.observe_only and not wanted.items() <= instance.tags.items():
            work.ctx.check_leading()
            with self._turns.turn(work), self.looks.changing(work):
                await self._ec2.create_tags(work.worker.spec.place, instance.id, wanted)

    async def unmark(self, work: Work) -> None:
        """Take the tags by which they count as this installation's from all instances of the worker."""
        self._check_named(work)
        recorded = work.worker.status.ec2.instance_id
        marked = {recorded, *(i.id for i in await self._carriers(work))} - {None}
        for instance_id in sorted(str(m) for m in marked):
            work.ctx.check_leading()
            try:
                tags = tags_of(work.worker, self._installation)
                with self._turns.turn(work), self.looks.changing(work):
                    await self._ec2.delete_tags(work.worker.spec.place, instance_id, tags)
            except Ec2NotFound:
                if instance_id == recorded and not await self._absence_proves(work):
                    raise  # not in sight yet: its marks are

    async def live(self, work: Work) -> list[Ec2Instance]:
        """Every instance of this worker that may still cost something: by tag, and the recorded one."""
        self._check_named(work)
        found = await self._carriers(work)
        recorded = work.worker.status.ec2.instance_id
        if recorded is not None and all(i.id != recorded for i in found):
            instance = await self._describe(work, recorded)
            if instance is not None:
                found.append(instance)
            elif not await self._absence_proves(work):
                raise Ec2NotFound("InvalidInstanceID.NotFound", f"EC2 does not show {recorded} yet")
        return [i for i in found if i.state != "terminated"]

    async def belongs_elsewhere(self, work: Work, instance: Ec2Instance) -> str:
        """Why an instance must not be adopted, by its tags; empty when it may be.

        Raises `RetryLater` while a worker that this version cannot read may be the one that the tags name.
        """
        installation = instance.tags.get(INSTALLATION_TAG, "")
        if installation not in ("", self._installation):
            return f"its tag {INSTALLATION_TAG} names another installation"
        uid = instance.tags.get(UID_TAG, "")
        if uid in ("", work.worker.uid):
            return ""
        others = [w for w in work.ctx.cache.all(LabWorker) if w.uid == uid]
        if others:
            return f"it is the instance of {others[0].namespace}/{others[0].name}"
        opaque = next((i for i in work.ctx.cache.items(LAB_WORKER) if i.resource is None), None)
        if opaque is not None:
            name = f"{opaque.namespace}/{opaque.name}"
            message = f"{instance.id} may be the instance of {name}, a worker that this version cannot read"
            await work.ec2_trouble(UNDECODABLE_WORKER, message)
            raise RetryLater(message)
        return ""

    def _check_named(self, work: Work) -> None:
        """Raise `AwsError` where the worker's namespace may not name its account: before all that leads to an act."""
        self._ec2.check_named(work.worker.spec.place, work.worker.namespace)

    async def _intend(self, work: Work) -> object:
        """Record the attempt and what it sends; return since when an earlier call of it is in doubt."""
        trace = self._settings.worker_trace_timeout
        now, due_by, before = work.now, work.due_by, work.worker.status.ec2
        doubtful_since = before.sent_at if in_doubt(before, due_by, trace) else None
        told = await self._told_of_ours(work) if doubtful_since is None else None
        async with self._brake:
            if told is not None:
                self._check_room(work, told)

            def intend(worker: LabWorker) -> None:
                if goal_of(worker) is not Goal.READY:
                    return
                ec2 = worker.status.ec2
                attempt, parameters = next_launch(worker, self._installation, now=due_by, trace_timeout=trace)
                ec2.attempt, ec2.launch, ec2.sent_at = attempt, parameters.to_json(), now

            await work.write(intend)
            # The next launch counts this one from the cache.
            await work.ctx.cache.wait_for(work.worker.revision)
        return doubtful_since

    async def check_brake(self, work: Work) -> None:
        """Raise `Held` when the installation has as many instances as it may; `AwsError` where EC2 does not say."""
        self._check_room(work, await self._told_of_ours(work))

    def _check_room(self, work: Work, told: set[str]) -> None:
        """The same, with what EC2 told. What was launched since then is in the status of its worker."""
        most, concerned = self._settings.max_instances, _concerned(work)
        ids = {
            w.status.ec2.instance_id
            for w in concerned
            if w.status.ec2.instance_id and w.status.ec2.state != "terminated"
        }
        underway = sum(in_doubt(w.status.ec2, work.due_by, self._settings.worker_trace_timeout) for w in concerned)
        if len(ids | told) + underway >= most:
            raise Held(
                Reasons.MAX_INSTANCES, f"the installation has reached its limit of {most} instances (LRM_MAX_INSTANCES)"
            )

    async def _told_of_ours(self, work: Work) -> set[str]:
        """Ids of the installation's instances that cost something, as EC2 tells now. Raises `AwsError`."""
        here = work.worker.spec.place
        work.ctx.check_leading()
        with self._turns.turn(work):
            ids = await self._ours(here)
        async with asyncio.TaskGroup() as tasks:
            elsewhere = {w.spec.place for w in _concerned(work)} - {here}
            asked = [tasks.create_task(self._ours_elsewhere(place, work.ctx.clock)) for place in sorted(elsewhere)]
        return ids.union(*(task.result() for task in asked))

    async def _ours(self, place: Place, timeout: float = READ_TIMEOUT) -> set[str]:
        """Ids of the installation's instances that cost something in a place. Raises `AwsError`."""
        found = await self._ec2.find_by_tags(place, {INSTALLATION_TAG: self._installation}, timeout=timeout)
        return {i.id for i in found if i.state != "shutting-down"}

    async def _ours_elsewhere(self, place: Place, clock: Clock) -> set[str]:
        """The same of a place that must not stop a launch in another; none if it gives no answer.

        Then its workers' statuses are what is counted, and others do not wait for it again at once.
        """
        if clock.monotonic() < self._silent_until.get(place, 0.0):
            return set()
        try:
            return await self._ours(place, _ELSEWHERE_TIMEOUT)
        except AwsError:
            self._silent_until[place] = clock.monotonic() + _SILENT_SECONDS
            return set()

    async def _after_mismatch(self, work: Work) -> None:
        """The token is spent: it belongs to another launch, or to an instance that has ended. Look, then go on."""
        kept, _ = choose(await self._carriers(work), None)
        if kept is not None:
            await self.record(work, kept)
            return

        def spent(worker: LabWorker) -> None:
            worker.status.ec2.launch = worker.status.ec2.sent_at = None

        await work.write(spent)

    async def _carriers(self, work: Work) -> list[Ec2Instance]:
        work.ctx.check_leading()
        tags = {UID_TAG: work.worker.uid, INSTALLATION_TAG: self._installation}
        with self._turns.turn(work):
            return await self._ec2.find_by_tags(work.worker.spec.place, tags, states=_STATES)

    async def _describe(self, work: Work, instance_id: str) -> Ec2Instance | None:
        """The instance, or None when EC2 says that there is none; what that means is the caller's to judge."""
        try:
            return await self.describe(work, instance_id)
        except Ec2NotFound:
            return None

    async def _absence_proves(self, work: Work) -> bool:
        """Whether it means anything that EC2 knows no recorded instance. Raises `AwsError`."""
        settings, ec2 = self._settings, work.worker.status.ec2
        if not absence_proves(
            ec2,
            work.due_by,
            gone_after=settings.worker_gone_after,
            trace_timeout=settings.worker_trace_timeout,
        ):
            return False
        if ec2.owner_id is not None:
            work.ctx.check_leading()
            with self._turns.turn(work):
                await self._ec2.check_owner(work.worker.spec.place, ec2.owner_id)
        return True


def _concerned(work: Work) -> list[LabWorker]:
    """The other workers that have an instance, or may."""
    others = (w for w in work.ctx.cache.all(LabWorker) if w.uid != work.worker.uid)
    return [w for w in others if w.status.ec2.attempt or w.status.ec2.instance_id]


def note_instance(worker: LabWorker, instance: Ec2Instance) -> None:
    """Take one instance's description into a status; another instance than before takes the old one's CML with it."""
    ec2 = worker.status.ec2
    if ec2.instance_id != instance.id:
        sent_at = ec2.sent_at
        forget_instance(worker)
        ec2.instance_id = instance.id
        # Kept until the instance was described: until then its absence proves nothing.
        ec2.sent_at = sent_at
    ec2.owner_id = instance.owner or ec2.owner_id
    ec2.state = instance.state
    ec2.public_ip, ec2.private_ip = addresses_of(instance)
    ec2.last_error = None


async def tell_of_seat(work: Work, sighting: Sighting) -> None:
    """Report the licence of an instance that has ended; before anything else is put in its place."""
    if sighting.has_ended:
        await work.lose_seat("the instance has ended with its licence")


async def fail_if_ended(work: Work, sighting: Sighting | None) -> Result | None:
    """Fail if the instance is proved to have ended: what was on it is lost, and only a person may accept that."""
    if sighting is None or not sighting.has_ended:
        return None
    instance, known = sighting.instance, work.worker.status.ec2.instance_id
    if instance is not None and instance.id != known:
        why = f"; {instance.id} carries this worker's uid too"
    else:
        why = f": {instance.state_reason}" if instance is not None and instance.state_reason else ""
    return await work.fail(Reasons.INSTANCE_TERMINATED, f"{known} was terminated outside of lrm{why}", note_ended)


def is_off(sighting: Sighting | None) -> bool:
    """Whether EC2 was heard to say that the instance is stopped."""
    return sighting is not None and sighting.instance is not None and sighting.instance.state == "stopped"


def note_ended(worker: LabWorker) -> None:
    """Take it down that the recorded instance has ended."""
    worker.status.ec2.state = "terminated"
    worker.status.ec2.public_ip = worker.status.ec2.private_ip = None
