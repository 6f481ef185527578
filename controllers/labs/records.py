"""What is done to labs on behalf of their records: deletion, and desiredState once per generation.

Promises: a deletionTimestamp means that the lab is stopped, wiped and deleted in CML, each step sent and then looked
for, and the record goes as soon as CML says 404; that word counts only under an admin's session, from whom CML hides
nothing. With the annotation `lab.neuroglia.io/forget` the record goes and the lab stays. A record whose CML is gone
goes at once; one whose CML is away waits, and says for what. A desiredState sends each step once: what students do
with the lab afterwards, or meanwhile, is not fought. What is mirrored of the lab is the sync's to write.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import NamedTuple

from controllers.cml.client import CmlClient
from controllers.cml.errors import (
    CmlCircuitOpen,
    CmlClosed,
    CmlError,
    CmlForbidden,
    CmlLoginThrottled,
    CmlNotFound,
    CmlRefused,
)
from controllers.cml.sessions import CmlSessions
from controllers.labs.desired import DEFINED_ON_CORE, REACHED, WAIT, Step, next_step
from controllers.labs.homes import Away, Gone, Home, can_be_asked, home_of
from controllers.labs.kind import (
    DESIRED_STATE,
    LAB_DELETED,
    LAB_FINALIZER,
    LAB_RECORDS,
    LABS,
    Acting,
    LabRecord,
    forgets,
    printable,
    records_of_worker,
)
from controllers.labs.settings import LabsSettings
from controllers.workers.kind import LabWorker
from lrm.cache import Cache, Change
from lrm.crashpoints import crash_point
from lrm.errors import RetryLater
from lrm.reconcile import Context, Controller, Key, Result, Trigger

DELETION_CRASH_POINTS = (
    "labs.stop-sent",
    "labs.wipe-sent",
    "labs.before-delete",
    "labs.delete-sent",
    "labs.lab-gone",
)
"""Where the deletion of a lab can be killed, in order."""
STEP_CRASH_POINT = "labs.step-sent"
"""Where a desiredState can be killed: CML has taken the step, the record does not know it."""

_Topic = tuple[str, bool | None]
_WISH: _Topic = (DESIRED_STATE, None)
_DELETION: _Topic = (LAB_DELETED, False)


class _Note(NamedTuple):
    """What a condition is to say."""

    condition: str
    status: bool | None
    reason: str
    message: str


class LabRecordsController(Controller[LabRecord]):
    """See the module."""

    name = LAB_RECORDS
    lock_name = LABS
    model = LabRecord
    finalizer = LAB_FINALIZER
    workers = 8
    resync = 3600.0

    def __init__(self, *, cache: Cache, sessions: CmlSessions, settings: LabsSettings) -> None:
        self._cache = cache
        self._sessions = sessions
        self._settings = settings

    def triggers(self) -> Sequence[Trigger]:
        """A worker that can be asked again, or is gone, concerns the records that wait for it."""
        return (Trigger(LabWorker, self._waiting_for),)

    def wakes(self, change: Change) -> bool:
        """Records that a sync has merely refreshed need nothing."""
        record = change.new.resource if change.new else None
        return isinstance(record, LabRecord) and (record.deleting or _unsettled(record))

    def settled(self, record: LabRecord) -> bool:
        """No wish is open, and the record is held: there is nothing to do for it."""
        return self.finalizer in record.metadata.finalizers and not _unsettled(record)

    async def reconcile(self, record: LabRecord, ctx: Context) -> Result:
        """Bring the lab to its desired state, once for each generation of the spec."""
        if not _unsettled(record):
            return Result.done()
        if record.spec.desired_state is None:
            await self._settle(record, ctx)
            return Result.done()
        home = _acted_on(home_of(record, self._cache), ctx)
        if isinstance(home, Gone):
            await self._settle(record, ctx, home.reason, home.message)
            return Result.done()
        if isinstance(home, Away):
            await self._tell(record, ctx, _Note(*_WISH, home.reason, home.message))
            return Result.after(self.resync)
        try:
            return await self._approach(record, home, ctx)
        except CmlNotFound:
            await self._settle(record, ctx, "LabNotFound", "CML has no such lab")
        except CmlForbidden as error:
            await self._settle(record, ctx, "Forbidden", str(error))
        except CmlRefused as error:
            await self._settle(record, ctx, "Refused", str(error))
        except CmlError as error:
            await self._hold_up(record, ctx, _WISH, error)
        return Result.done()

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
            await self._tell(record, ctx, _Note(*_DELETION, home.reason, home.message))
            return Result.after(self.resync)
        try:
            if await self._delete(record, home, ctx):
                crash_point("labs.lab-gone")
                ctx.log.info(
                    "lab.deleted", lab=lab_id, worker=record.spec.worker_ref, title=printable(record.status.title)
                )
                return Result.done()
        except CmlError as error:
            ctx.log.warning("lab.delete_failed", lab=lab_id, worker=record.spec.worker_ref, error=str(error))
            await self._hold_up(record, ctx, _DELETION, error)
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
        if step is WAIT:
            return False
        reason = "Deleting" if step is REACHED else str(step)
        await self._tell(record, ctx, _Note(*_DELETION, reason, f"the lab is {state}"))
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

    async def _approach(self, record: LabRecord, home: Home, ctx: Context) -> Result:
        """Take the next step towards the desired state, unless it was taken for this generation already."""
        wanted, lab_id, now = str(record.spec.desired_state), record.spec.lab_id, ctx.clock.now()
        client = self._sessions.client_for(home.worker)
        ctx.check_leading()
        state = await client.lab_state(lab_id)
        step = next_step(wanted, state)
        if step is REACHED:
            ctx.log.info("lab.desired_state_reached", lab=lab_id, worker=home.worker.name, state=state)
            await self._settle(record, ctx)
            return Result.done()
        acting = _acting(record)
        if acting is not None and now - acting.since > timedelta(seconds=self._settings.labs_step_timeout):
            await self._settle(record, ctx, "TimedOut", f"it is still {state}, and is left so")
            return Result.done()
        if isinstance(step, Step) and not _taken(acting, step):
            ctx.check_leading()
            ctx.log.info("lab.changing_state", lab=lab_id, worker=home.worker.name, step=str(step), state=state)
            if step is Step.START:
                await client.start_lab(lab_id)
            elif step is Step.STOP:
                await client.stop_lab(lab_id)
            else:
                await client.wipe_lab(lab_id)
            crash_point(STEP_CRASH_POINT)
            sent = Acting(generation=record.metadata.generation, since=acting.since if acting else now, step=str(step))
            await self._tell(record, ctx, _Note(DESIRED_STATE, None, str(step), f"{wanted} is wanted"), acting=sent)
        return Result.after(self._settings.labs_step_interval)

    async def _settle(self, record: LabRecord, ctx: Context, reason: str = "", message: str = "") -> None:
        """This generation is done with: reached without a reason, given up with one."""
        generation, wanted, now = record.metadata.generation, record.spec.desired_state, ctx.clock.now()

        def note(r: LabRecord) -> None:
            r.status.observed_generation = generation
            r.status.acting = None
            if wanted is None:
                r.status.conditions = [c for c in r.status.conditions if c.type != DESIRED_STATE]
                return
            r.status.set_condition(
                DESIRED_STATE,
                not reason,
                reason or "Reached",
                message or f"the lab was brought to {wanted}",
                now=now,
                generation=generation,
            )

        await ctx.client.update_status(record, note)

    async def _tell(self, record: LabRecord, ctx: Context, what: _Note, *, acting: Acting | None = None) -> None:
        """Say in a condition what is going on; saying the same again is no write."""
        generation, now = record.metadata.generation, ctx.clock.now()

        def note(r: LabRecord) -> None:
            r.status.set_condition(
                what.condition, what.status, what.reason, what.message, now=now, generation=generation
            )
            r.status.acting = acting

        await ctx.client.update_status(record, note)

    async def _hold_up(self, record: LabRecord, ctx: Context, what: _Topic, error: CmlError) -> None:
        """Say what CML's failure was, and try again ever later. Always raises."""
        if not isinstance(error, CmlCircuitOpen | CmlLoginThrottled | CmlClosed):  # not having asked is no news
            note = _Note(*what, type(error).__name__, str(error)[:500])
            await self._tell(record, ctx, note, acting=_acting(record))
        raise RetryLater(f"lab {record.spec.lab_id} of {record.spec.worker_ref}: {error}")

    def _waiting_for(self, change: Change) -> Iterable[Key]:
        """The records that wait for a worker which has changed in a way that may end their wait."""
        if _asked_like(change.old and change.old.resource) == _asked_like(change.new and change.new.resource):
            return
        item = change.item
        for record in records_of_worker(self._cache, item.namespace, item.name):
            if record.deleting or _unsettled(record):
                yield record.namespace, record.name


_OBSERVING = Away("ObserveOnly", "nothing is changed on a CML that is only observed")


def _acted_on(home: Home | Away | Gone, ctx: Context) -> Home | Away | Gone:
    """Where the lab is, as far as anything may be done there."""
    observed = isinstance(home, Home) and (ctx.observe_only or home.worker.spec.observe_only)
    return _OBSERVING if observed else home


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


def _unsettled(record: LabRecord) -> bool:
    return record.status.observed_generation != record.metadata.generation


def _acting(record: LabRecord) -> Acting | None:
    """How far this generation's desiredState has come; an earlier generation's steps do not count."""
    acting = record.status.acting
    return acting if acting is not None and acting.generation == record.metadata.generation else None


def _taken(acting: Acting | None, step: Step) -> bool:
    """Whether CML has accepted this step already: a stop comes before a wipe and is not sent again after it."""
    return acting is not None and (acting.step == step or (step is Step.STOP and acting.step == Step.WIPE))


def _asked_like(worker: object) -> object:
    if not isinstance(worker, LabWorker):
        return None
    ec2 = worker.status.ec2
    observed = worker.spec.observe_only
    return worker.uid, can_be_asked(worker), worker.status.phase, ec2.instance_id, ec2.state, observed
