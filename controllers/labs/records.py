"""What is done to labs on behalf of their records: deletion, operations, and desiredState once for each change of it.

Promises: a deletionTimestamp means that the lab is stopped, wiped and deleted in CML, each step sent and then looked
for, and the record goes as soon as CML says 404; that word counts only under an admin's session, from whom CML hides
nothing. With the annotation `lab.neuroglia.io/forget` the record goes and the lab stays. A record whose CML is gone
goes at once; one whose CML is away waits, and says for what. A wish sends each step once: what students do with the
lab afterwards, or meanwhile, is not fought. What is mirrored of the lab is the sync's to write.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import NamedTuple

from controllers.cml.client import CmlClient
from controllers.cml.errors import (
    CmlBadAnswer,
    CmlCircuitOpen,
    CmlClosed,
    CmlError,
    CmlForbidden,
    CmlLoginThrottled,
    CmlNotFound,
    CmlRefused,
    CmlUnavailable,
)
from controllers.cml.sessions import CmlSessions
from controllers.labs.desired import DEFINED_ON_CORE, REACHED, WAIT, Step, next_step
from controllers.labs.homes import OBSERVING, Away, Gone, Home, can_be_asked, holds_up, home_of, is_failure
from controllers.labs.keeping import keep_topology
from controllers.labs.kind import (
    DESIRED_STATE,
    FAILED,
    LAB_DELETED,
    LAB_FINALIZER,
    LAB_RECORDS,
    LABS,
    RUNNING,
    SUCCEEDED,
    WAITING,
    Acting,
    LabRecord,
    forgets,
    printable,
    records_of_worker,
)
from controllers.labs.measures import LabMeasures
from controllers.labs.settings import LabsSettings
from controllers.labs.shares import FULL_AGAIN, Shares
from controllers.labs.wishes import Wish, open_wish, tell_operation, unsettled, withdraw
from controllers.workers.kind import LabWorker
from lrm.cache import Cache, Change
from lrm.controller import Context, Controller, Key, Result, Trigger
from lrm.crashpoints import crash_point
from lrm.errors import RetryLater

DELETION_CRASH_POINTS = (
    "labs.topology-kept",
    "labs.stop-sent",
    "labs.wipe-sent",
    "labs.before-delete",
    "labs.delete-sent",
    "labs.lab-gone",
)
"""Where the deletion of a lab can be killed, in order."""
STEP_CRASH_POINT = "labs.step-sent"
"""Where a wish can be killed: CML has taken the step, the record does not know it."""
_NOT_ASKED = (CmlCircuitOpen, CmlLoginThrottled, CmlClosed)
"""Errors that are no news of a CML: nothing was sent to it."""
_OF_ONE_CML = 4
"""Records of one worker that are in hand at once."""


class _Note(NamedTuple):
    """What is to be told of a wish or, where there is none, of the deletion."""

    wish: Wish | None
    reason: str
    message: str
    result: str = RUNNING
    """Of the wish's operation, if it has one."""


class LabRecordsController(Controller[LabRecord]):
    """See the module."""

    name = LAB_RECORDS
    lock_name = LABS
    model = LabRecord
    finalizer = LAB_FINALIZER
    workers = 32
    deadline = 180.0
    resync = 3600.0

    hints: Shares
    """Of the workers' CMLs: a slow one does not hold up the labs of the others."""

    def __init__(
        self, *, cache: Cache, sessions: CmlSessions, settings: LabsSettings, measures: LabMeasures | None = None
    ) -> None:
        self._cache = cache
        self._sessions = sessions
        self._settings = settings
        self._measures = measures or LabMeasures()
        self.hints = Shares(_OF_ONE_CML)

    def triggers(self) -> Sequence[Trigger]:
        """A worker that can be asked again, or is gone, concerns the records that wait for it."""
        return (Trigger(LabWorker, self._waiting_for),)

    def wakes(self, change: Change) -> bool:
        """Records that a sync has merely refreshed need nothing."""
        record = change.new.resource if change.new else None
        return isinstance(record, LabRecord) and (record.deleting or unsettled(record))

    def settled(self, record: LabRecord) -> bool:
        """No wish is open, and the record is held: there is nothing to do for it."""
        return self.finalizer in record.metadata.finalizers and not unsettled(record)

    async def reconcile(self, record: LabRecord, ctx: Context) -> Result:
        """Carry out the record's operation, or bring its lab to its desired state."""
        wish = open_wish(record)
        if wish is None:
            if unsettled(record):
                await self._settle(record, ctx, None)
            return Result.done()
        home = _acted_on(home_of(record, self._cache), ctx)
        if isinstance(home, Gone):
            return await self._settle(record, ctx, wish, home.reason, home.message)
        if isinstance(home, Away):
            await self._tell(record, ctx, _Note(wish, home.reason, home.message, WAITING))
            return Result.after(self.resync)
        with self.hints.one_of(home.worker.uid, (record.namespace, record.name)) as let_in:
            return await self._fulfil(record, wish, home, ctx) if let_in else Result.after(FULL_AGAIN)

    async def _fulfil(self, record: LabRecord, wish: Wish, home: Home, ctx: Context) -> Result:
        """One step towards what is wished; what CML says to it is told."""
        try:
            return await self._approach(record, wish, home, ctx)
        except (CmlNotFound, CmlRefused) as error:
            return await self._settle(record, ctx, wish, _refusal(error), str(error))
        except CmlBadAnswer as error:  # it can be asked, and never says anything of use
            if self._is_over(wish.acting(record), ctx):
                return await self._settle(record, ctx, wish, "TimedOut", str(error)[:500])
            raise await self._held_up(record, ctx, wish, error, tried=True) from error
        except CmlError as error:
            raise await self._held_up(record, ctx, wish, error) from error

    async def finalize(self, record: LabRecord, ctx: Context) -> Result:
        """Delete the lab, one step at a time; done when CML has it no more."""
        lab_id = record.spec.lab_id
        if forgets(record):
            await ctx.client.forget(record)
            ctx.log.info("lab.forgotten", lab=lab_id, worker=record.spec.worker_ref)
            return Result.after(self._settings.labs_step_interval)  # to see that the key is gone
        home = _acted_on(home_of(record, self._cache), ctx)
        if isinstance(home, Gone):
            ctx.log.info("lab.gone_with_its_cml", lab=lab_id, worker=record.spec.worker_ref, reason=home.reason)
            return Result.done()
        if isinstance(home, Away):
            await self._tell(record, ctx, _Note(None, home.reason, home.message))
            return Result.after(self.resync)
        with self.hints.one_of(home.worker.uid, (record.namespace, record.name)) as let_in:
            return await self._remove(record, home, ctx) if let_in else Result.after(FULL_AGAIN)

    async def _remove(self, record: LabRecord, home: Home, ctx: Context) -> Result:
        """One step towards the lab's end; what CML says to it is told."""
        lab_id = record.spec.lab_id
        try:
            if await self._delete(record, home, ctx):
                crash_point("labs.lab-gone")
                self._measures.deleted()
                ctx.log.info(
                    "lab.deleted", lab=lab_id, worker=record.spec.worker_ref, title=printable(record.status.title)
                )
                return Result.done()
        except CmlError as error:
            self._measures.delete_failed()
            ctx.log.warning("lab.delete_failed", lab=lab_id, worker=record.spec.worker_ref, error=str(error))
            if not isinstance(error, _NOT_ASKED):
                ctx.events.record(record, "Warning", "DeleteFailed", str(error))
            raise await self._held_up(record, ctx, None, error) from error
        return Result.after(self._settings.labs_step_interval)

    async def _delete(self, record: LabRecord, home: Home, ctx: Context) -> bool:
        """Send the next step towards the lab's end; whether it has come."""
        lab_id = record.spec.lab_id
        client = self._sessions.client_for(home.worker)
        ctx.check_leading()
        state = await _state_of(client, lab_id)
        if state is None:
            return True
        step = next_step(DEFINED_ON_CORE, state)
        record = await keep_topology(record, client, ctx, self._settings)
        if step is WAIT:
            if holds_up(_told(record, None)):
                await self._tell(record, ctx, _Note(None, "Deleting", f"the lab is {state}"))
            return False
        reason = "Deleting" if step is REACHED else str(step)
        await self._tell(record, ctx, _Note(None, reason, f"the lab is {state}"))
        ctx.check_leading()
        try:
            if step is Step.STOP:
                ctx.log.info("lab.deleting", lab=lab_id, worker=home.worker.name, step="stop")
                await client.stop_lab(lab_id)
                crash_point("labs.stop-sent")
            elif step is Step.WIPE:
                ctx.log.info("lab.deleting", lab=lab_id, worker=home.worker.name, step="wipe")
                await client.wipe_lab(lab_id)
                crash_point("labs.wipe-sent")
            else:
                ctx.log.info("lab.deleting", lab=lab_id, worker=home.worker.name, step="delete")
                crash_point("labs.before-delete")
                await client.delete_lab(lab_id)
                crash_point("labs.delete-sent")
        except CmlNotFound:
            ctx.log.info("lab.went_meanwhile", lab=lab_id, worker=home.worker.name)
        # What CML answered to the step proves little; what it says of the lab now counts.
        return await _state_of(client, lab_id) is None

    async def _approach(self, record: LabRecord, wish: Wish, home: Home, ctx: Context) -> Result:
        """Take the next step towards the wished state, unless it was taken for this wish already."""
        lab_id, now = record.spec.lab_id, ctx.clock.now()
        client = self._sessions.client_for(home.worker)
        ctx.check_leading()
        state = await client.lab_state(lab_id)
        step = next_step(wish.state, state)
        if step is REACHED:
            ctx.log.info("lab.desired_state_reached", lab=lab_id, worker=home.worker.name, state=state)
            return await self._settle(record, ctx, wish, message=f"the lab is {state}")
        acting = wish.acting(record)
        if self._is_over(acting, ctx):
            return await self._settle(record, ctx, wish, "TimedOut", f"it is still {state}, and is left so")
        if isinstance(step, Step) and not _taken(acting, step):
            ctx.check_leading()
            ctx.log.info("lab.changing_state", lab=lab_id, worker=home.worker.name, step=str(step), state=state)
            try:
                await _send(client, step, lab_id)
            except CmlUnavailable as error:  # CML has just told the lab's state: it is this step that has no answer
                raise await self._held_up(record, ctx, wish, error, tried=True) from error
            crash_point(STEP_CRASH_POINT)
            sent = Acting(
                generation=record.metadata.generation,
                since=acting.since if acting else now,
                step=str(step),
                operation=wish.operation.id if wish.operation else "",
            )
            await self._tell(record, ctx, _Note(wish, str(step), f"{wish.state} is wanted"), acting=sent)
        elif holds_up(_told(record, wish)):
            going = _Note(wish, acting.step if acting and acting.step else "UnderWay", f"the lab is {state}")
            await self._tell(record, ctx, going, acting=acting)
        return Result.after(self._settings.labs_step_interval)

    async def _settle(
        self, record: LabRecord, ctx: Context, wish: Wish | None, reason: str = "", message: str = ""
    ) -> Result:
        """The wish is done with: reached without a reason, given up with one. None: it was taken back."""
        generation, wanted, now = record.metadata.generation, record.spec.desired_state, ctx.clock.now()
        operation = wish.operation if wish is not None else None

        def note(r: LabRecord) -> None:
            status = r.status
            status.acting = None
            if operation is not None:
                tell_operation(r, operation, FAILED if reason else SUCCEEDED, message, now)
            else:
                withdraw(r, now)
                status.acted_state = wanted
            if status.acted_state == wanted:
                status.observed_generation = generation
            if wish is not None:
                told = reason or "Reached"
                status.set_condition(DESIRED_STATE, not reason, told, message, now=now, generation=generation)
            elif wanted is None:
                status.conditions = [c for c in status.conditions if c.type != DESIRED_STATE]

        settled = await ctx.client.update_status(record, note)
        return Result.after(self._settings.labs_step_interval) if open_wish(settled) else Result.done()

    async def _tell(self, record: LabRecord, ctx: Context, what: _Note, *, acting: Acting | None = None) -> None:
        """Say in a condition what is going on; saying the same again is no write."""
        generation, now, wish = record.metadata.generation, ctx.clock.now(), what.wish
        condition, status = (LAB_DELETED, False) if wish is None else (DESIRED_STATE, None)

        def note(r: LabRecord) -> None:
            r.status.set_condition(condition, status, what.reason, what.message, now=now, generation=generation)
            r.status.acting = acting
            if wish is not None and wish.operation is not None:
                tell_operation(r, wish.operation, what.result, what.message, now)
            elif wish is not None:
                r.status.acted_state = wish.state

        await ctx.client.update_status(record, note)

    def _is_over(self, acting: Acting | None, ctx: Context) -> bool:
        """Whether CML has had its time for what it was asked for."""
        patience = timedelta(seconds=self._settings.labs_step_timeout)
        return acting is not None and ctx.clock.now() - acting.since > patience

    async def _held_up(
        self, record: LabRecord, ctx: Context, wish: Wish | None, error: CmlError, *, tried: bool = False
    ) -> RetryLater:
        """Say what CML's failure was; what to raise, so that it is tried again, ever later.

        With `tried` the time that CML has begins, if it has not yet: it is not merely away. What was not asked is told
        without a time, as that would be hours old, and only where nothing is told that failed.
        """
        acting = wish.acting(record) if wish is not None else None
        if isinstance(error, CmlCircuitOpen | CmlLoginThrottled):
            if not is_failure(_told(record, wish)):
                why = f"{error.why}; it is asked again in a while"
                await self._tell(record, ctx, _Note(wish, type(error).__name__, why, WAITING), acting=acting)
        elif not isinstance(error, CmlClosed):
            if acting is None and wish is not None and tried:
                acting = Acting(
                    generation=record.metadata.generation,
                    since=ctx.clock.now(),
                    step="",
                    operation=wish.operation.id if wish.operation else "",
                )
            await self._tell(record, ctx, _Note(wish, type(error).__name__, str(error)[:500], WAITING), acting=acting)
        return RetryLater(f"lab {record.spec.lab_id} of {record.spec.worker_ref}: {error}")

    def _waiting_for(self, change: Change) -> Iterable[Key]:
        """The records that wait for a worker which has changed in a way that may end their wait."""
        if _asked_like(change.old and change.old.resource) == _asked_like(change.new and change.new.resource):
            return
        item = change.item
        for record in records_of_worker(self._cache, item.namespace, item.name):
            if record.deleting or unsettled(record):
                yield record.namespace, record.name


def _acted_on(home: Home | Away | Gone, ctx: Context) -> Home | Away | Gone:
    """Where the lab is, as far as anything may be done there."""
    observed = isinstance(home, Home) and (ctx.observe_only or home.worker.spec.observe_only)
    return OBSERVING if observed else home


async def _state_of(client: CmlClient, lab_id: str) -> str | None:
    """The lab's state, None when CML has no such lab; `CmlForbidden` where that may mean "none for you"."""
    try:
        return await client.lab_state(lab_id)
    except CmlNotFound as error:
        session = client.session
        if session is None or session.admin is not True:
            client.renew_session()  # the next login may tell
            raise CmlForbidden(404, "the session is not proven to be an admin's, so a 404 proves nothing") from error
        return None


async def _send(client: CmlClient, step: Step, lab_id: str) -> None:
    if step is Step.START:
        await client.start_lab(lab_id)
    elif step is Step.STOP:
        await client.stop_lab(lab_id)
    else:
        await client.wipe_lab(lab_id)


def _refusal(error: CmlNotFound | CmlRefused) -> str:
    """The reason under which CML's no is told."""
    if isinstance(error, CmlNotFound):
        return "LabNotFound"
    return "Forbidden" if isinstance(error, CmlForbidden) else "Refused"


def _told(record: LabRecord, wish: Wish | None) -> str:
    """The reason under which it is told how far this wish has come, or the deletion; empty where nothing is told."""
    told = record.status.condition(DESIRED_STATE if wish is not None else LAB_DELETED)
    return told.reason if told is not None and told.observed_generation == record.metadata.generation else ""


def _taken(acting: Acting | None, step: Step) -> bool:
    """Whether CML has accepted this step already: a stop comes before a wipe and is not sent again after it."""
    return acting is not None and (acting.step == step or (step is Step.STOP and acting.step == Step.WIPE))


def _asked_like(worker: object) -> object:
    if not isinstance(worker, LabWorker):
        return None
    ec2 = worker.status.ec2
    observed = worker.spec.observe_only
    return worker.uid, can_be_asked(worker), worker.status.phase, ec2.instance_id, ec2.state, observed
