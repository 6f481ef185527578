"""Makes labs of LabImports: exactly one for each, whatever dies or gets lost on the way, and removes what is over.

A lab is made under a title that no other has (`lrm-import-{uid}`) and gets its own title once its id is in the status.
So an import whose answer was lost is found again by exact title; it is sent again only when a complete list did not
have it `labs_import_settle` later. Should CML carry out an earlier try after all, the surplus is removed by its mark.
Deleting a LabImport that is under way takes back nothing: a lab that was made meanwhile is a lab like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress

from controllers.cml.client import CmlClient
from controllers.cml.errors import (
    CmlBadAnswer,
    CmlCircuitOpen,
    CmlClosed,
    CmlError,
    CmlInvalid,
    CmlLoginThrottled,
    CmlNotFound,
    CmlOutcomeUnknown,
    CmlRefused,
)
from controllers.cml.inventory import read_inventory
from controllers.cml.models import Lab
from controllers.cml.sessions import CmlSessions
from controllers.labs.homes import OBSERVING, Away, Gone, Home, identified, is_failure
from controllers.labs.imports_kind import (
    FAILED,
    HELD,
    IMPORTED,
    IMPORTING,
    LAB_IMPORTS,
    LAB_LABEL,
    PENDING,
    READY,
    WARNINGS_KEPT,
    WORKER_LABEL,
    LabImport,
    ended,
    kept_name,
    mark_of,
    waits_to_be_asked,
)
from controllers.labs.kind import LABS, REFRESH_ANNOTATION, LabRecord, printable, record_of_lab
from controllers.labs.settings import LabsSettings
from controllers.labs.shares import FULL_AGAIN, Shares
from controllers.workers.kind import LabWorker, serving
from controllers.workers.phases import Phase
from lrm.cache import Cache, Change
from lrm.controller import Context, Controller, Key, Result, Trigger
from lrm.crashpoints import crash_point
from lrm.errors import ResourceNotFound, RetryLater
from lrm.resource import PROTECT_ANNOTATION

IMPORT_CRASH_POINTS = (
    "labs.import-intended",
    "labs.import-sent",
    "labs.import-noted",
    "labs.import-renamed",
    "labs.import-told",
)
"""Where an import can be killed, in order."""

WORKER_NOT_FOUND = "WorkerNotFound"
_LOOKS = 10
"""How often a lab is looked for before its import is sent again."""
_TO_ONE_CML = 2
"""Imports to one worker that are in hand at once."""


class LabImportsController(Controller[LabImport]):
    """See the module."""

    name = LAB_IMPORTS
    lock_name = LABS
    model = LabImport
    workers = 16
    resync = 3600.0

    hints: Shares
    """Of the workers' CMLs: a slow one does not hold up the imports to the others."""

    def __init__(self, *, cache: Cache, sessions: CmlSessions, settings: LabsSettings) -> None:
        self._cache = cache
        self._sessions = sessions
        self._settings = settings
        self.hints = Shares(_TO_ONE_CML)

    def triggers(self) -> Sequence[Trigger]:
        """A worker that serves again, or is gone, concerns the imports that wait for it; a lab's end its copy."""
        return (Trigger(LabWorker, self._waiting_for), Trigger(LabRecord, self._kept_of))

    def settled(self, order: LabImport) -> bool:
        """Nothing is to be imported; the end of its time can wait for `poll` seconds."""
        return ended(order) or waits_to_be_asked(order)

    async def reconcile(self, order: LabImport, ctx: Context) -> Result:
        """Take the import to its end; remove it when its time is over."""
        if order.deleting:
            return Result.done()  # somebody else's finalizer holds it
        if order.status.phase == FAILED and not ended(order):
            order = await self._enter(order, ctx, PENDING, "SpecChanged", "its spec has changed")
        if not ended(order) and waits_to_be_asked(order):
            order = await self._enter(order, ctx, HELD, "Held", "kept until the annotation asks for it")
        elif not ended(order):
            return await self._carry_out(order, ctx)
        return await self._expire(order, ctx)

    async def _carry_out(self, order: LabImport, ctx: Context) -> Result:
        place = self._place_of(order, ctx)
        if isinstance(place, Gone):
            return await self._fail(order, ctx, place.reason, place.message)
        if isinstance(place, Away):
            return await self._wait(order, ctx, place)
        with self.hints.one_of(place.worker.uid, (order.namespace, order.name)) as let_in:
            return await self._try(order, place.worker, ctx) if let_in else Result.after(FULL_AGAIN)

    async def _try(self, order: LabImport, worker: LabWorker, ctx: Context) -> Result:
        """Go on with an import; what CML says to it is told."""
        try:
            return await self._import(order, worker, ctx)
        except CmlOutcomeUnknown as error:
            await self._tell(order, ctx, "OutcomeUnknown", f"it is looked for: {error}")
            return Result.after(self._settings.labs_step_interval)
        except (CmlRefused, CmlInvalid, CmlNotFound) as error:
            return await self._fail(order, ctx, "Refused", str(error))
        except CmlError as error:
            told = order.status.condition(READY)
            if isinstance(error, CmlCircuitOpen | CmlLoginThrottled):  # not having asked is no news after a failure
                if told is None or not is_failure(told.reason):
                    why = f"{error.why}; it is asked again in a while"
                    await self._tell(order, ctx, type(error).__name__, why)
            elif not isinstance(error, CmlClosed):
                await self._tell(order, ctx, type(error).__name__, str(error))
            raise RetryLater(f"import {order.name} on {order.spec.worker_ref}: {error}") from error

    def _place_of(self, order: LabImport, ctx: Context) -> Home | Away | Gone:
        """The worker that is to have the lab, as far as the cache knows."""
        name = order.spec.worker_ref
        worker = self._cache.get(LabWorker, order.namespace, name)
        if worker is None:
            return Away(WORKER_NOT_FOUND, f"there is no worker {name} that this version can read")
        sent_to, runs_on, phase = order.status.instance_id, worker.status.ec2.instance_id, worker.status.phase
        gone = (
            (worker.deleting or phase == Phase.TERMINATED, Gone("WorkerGone", f"the worker {name} is being ended")),
            (
                order.status.lab_id is not None and sent_to != runs_on,
                Gone("InstanceReplaced", f"the lab went with {sent_to}: the worker {name} no longer runs on it"),
            ),
        )
        away = (
            (ctx.observe_only or worker.spec.observe_only, OBSERVING),
            (not serving(worker), Away("WorkerNotServing", f"the worker {name} is {phase}")),
            (not identified(worker), Away("CMLNotIdentified", f"it is not settled which CML answers for {name}")),
        )
        return next((place for applies, place in (*gone, *away) if applies), Home(worker))

    async def _wait(self, order: LabImport, ctx: Context, place: Away) -> Result:
        """Tell what it waits for, and wait; for a worker that nobody knows no longer than it would be kept."""
        if place.reason != WORKER_NOT_FOUND:
            await self._tell(order, ctx, place.reason, place.message)
            return Result.after(self.resync)
        await self._tell(order, ctx, place.reason, place.message, None)
        told, now = order.status.condition(READY), ctx.clock.now()
        since = told.last_transition_time if told is not None and told.status == "Unknown" else now
        left = self._ttl(order) - (now - since).total_seconds()
        if ctx.wall_jumped:
            left = max(left, self.poll)
        if left <= 0:
            return await self._fail(order, ctx, place.reason, place.message)
        return Result.after(min(left, self.resync))

    def _ttl(self, order: LabImport) -> float:
        return order.spec.ttl_seconds or self._settings.labs_import_ttl

    async def _import(self, order: LabImport, worker: LabWorker, ctx: Context) -> Result:
        """Find the lab or make it, and finish it."""
        ctx.check_leading()
        client = self._sessions.client_for(worker)
        if order.status.lab_id is None and _sent_to(order, worker):
            found = await _marked(order, worker, client, whole=True)
            if found:
                order = await self._note(order, ctx, found[0].id, ())
            else:
                wait = self._settling(order, ctx)
                if wait > 0:
                    # A list of a big CML is heavy: ten looks are enough to be done soon after the lab is there.
                    pause = max(self._settings.labs_step_interval, self._settings.labs_import_settle / _LOOKS)
                    return Result.after(min(wait, pause))
        if order.status.lab_id is None:
            order = await self._send(order, worker, client, ctx)
        return await self._finish(order, worker, client, ctx)

    def _settling(self, order: LabImport, ctx: Context) -> float:
        """Seconds for which a try may still be carried out by CML; times prove nothing after a step of wall time."""
        settle, sent = self._settings.labs_import_settle, order.status.sent_at
        left = settle - (ctx.clock.now() - sent).total_seconds() if sent is not None else 0.0
        return max(left, self._settings.labs_step_interval) if ctx.wall_jumped else min(left, settle)

    async def _send(self, order: LabImport, worker: LabWorker, client: CmlClient, ctx: Context) -> LabImport:
        """Intend, send, and note the new lab's id."""
        now, first = ctx.clock.now(), not _sent_to(order, worker)

        def intend(i: LabImport) -> None:
            i.status.enter(IMPORTING, "Sending", now)
            i.status.sent_at, i.status.instance_id = now, worker.status.ec2.instance_id
            i.status.attempts += 1

        order = await ctx.client.update_status(order, intend)
        crash_point("labs.import-intended")
        ctx.check_leading(ctx.creating_timeout)
        ctx.log.info("lab.importing", worker=worker.name, title=printable(order.spec.title))
        try:
            result = await client.import_lab(mark_of(order), order.spec.topology, timeout=ctx.creating_timeout)
        except CmlOutcomeUnknown:
            raise
        except CmlError:
            if first:  # it was certainly not carried out, and nothing else was ever sent: nothing is to be looked for
                await ctx.client.update_status(order, lambda i: setattr(i.status, "sent_at", None))
            raise
        crash_point("labs.import-sent")
        return await self._note(order, ctx, result.id, result.warnings)

    async def _note(self, order: LabImport, ctx: Context, lab_id: str, warnings: Sequence[str]) -> LabImport:
        def note(i: LabImport) -> None:
            i.status.lab_id = lab_id
            i.status.warnings = [w[:1000] for w in warnings[:WARNINGS_KEPT]]

        noted = await ctx.client.update_status(order, note)
        crash_point("labs.import-noted")
        return noted

    async def _finish(self, order: LabImport, worker: LabWorker, client: CmlClient, ctx: Context) -> Result:
        """Give the lab its title, have it mirrored, and tell."""
        lab_id, now = order.status.lab_id or "", ctx.clock.now()
        message = f"lab {lab_id}"
        ctx.check_leading()
        if order.status.attempts > 1:
            await self._remove_surplus(order, worker, client, ctx)
        try:
            await client.rename_lab(lab_id, order.spec.title)
        except CmlNotFound:
            return await self._fail(order, ctx, "LabGone", f"the lab {lab_id} was deleted before it had its title")
        except CmlRefused as error:
            message = f"lab {lab_id}, under the title {mark_of(order)}: {error}"
        crash_point("labs.import-renamed")
        with suppress(ResourceNotFound):
            asked = {REFRESH_ANNOTATION: f"import-{order.uid}"}
            await ctx.client.update(worker, lambda w: w.metadata.annotations.update(asked))
        generation = order.metadata.generation

        def done(i: LabImport) -> None:
            i.status.enter(IMPORTED, "Imported", now)
            i.status.completed_at, i.status.observed_generation = now, generation
            i.status.set_condition(READY, True, "Imported", message, now=now, generation=generation)

        order = await ctx.client.update_status(order, done)
        crash_point("labs.import-told")
        ctx.log.info("lab.imported", lab=lab_id, worker=worker.name, title=printable(order.spec.title))
        ctx.events.record(order, "Normal", "Imported", message)
        return await self._expire(order, ctx)

    async def _remove_surplus(self, order: LabImport, worker: LabWorker, client: CmlClient, ctx: Context) -> None:
        """Remove the labs of earlier tries; one that CML does not let go stays, under its mark, and is told of."""
        for surplus in await _marked(order, worker, client):
            if surplus.id == order.status.lab_id:
                continue
            try:
                await client.delete_lab(surplus.id)
            except CmlNotFound:
                continue
            except CmlRefused as error:
                ctx.log.warning("lab.import_surplus_left", lab=surplus.id, worker=worker.name, error=str(error))
                ctx.events.record(order, "Warning", "SurplusLeft", f"lab {surplus.id} of an earlier try: {error}")
            else:
                ctx.log.warning("lab.import_surplus_removed", lab=surplus.id, worker=worker.name)

    async def _fail(self, order: LabImport, ctx: Context, reason: str, message: str) -> Result:
        """Given up, until the spec changes."""
        now, generation = ctx.clock.now(), order.metadata.generation

        def failed(i: LabImport) -> None:
            i.status.enter(FAILED, reason, now)
            i.status.sent_at = i.status.lab_id = None
            i.status.completed_at, i.status.observed_generation = now, generation
            i.status.set_condition(READY, False, reason, message[:500], now=now, generation=generation)

        order = await ctx.client.update_status(order, failed)
        ctx.log.warning("lab.import_failed", worker=order.spec.worker_ref, reason=reason, error=message)
        ctx.events.record(order, "Warning", reason, message)
        return await self._expire(order, ctx)

    async def _expire(self, order: LabImport, ctx: Context) -> Result:
        """Remove it when its time is over; until then look again."""
        if order.status.phase != IMPORTED and self._lab_is_going(order):
            return Result.after(self.resync)  # its end wakes us
        if order.status.phase == HELD and LAB_LABEL in order.metadata.labels and order.status.completed_at is None:
            now = ctx.clock.now()
            order = await ctx.client.update_status(order, lambda i: setattr(i.status, "completed_at", now))
        began = order.status.completed_at or order.metadata.creation_timestamp or ctx.clock.now()
        left = self._ttl(order) - (ctx.clock.now() - began).total_seconds()
        if ctx.wall_jumped:
            left = max(left, self.poll)
        if order.metadata.annotations.get(PROTECT_ANNOTATION, "false") != "false":
            left = self.resync
        if left > 0:
            return Result.after(min(left, self.resync))
        await ctx.client.delete(order, retry=False)
        ctx.log.info("lab.import_removed", phase=order.status.phase)
        return Result.done()

    async def _enter(self, order: LabImport, ctx: Context, phase: str, reason: str, message: str) -> LabImport:
        now = ctx.clock.now()

        def enter(i: LabImport) -> None:
            i.status.enter(phase, reason, now)
            if phase == PENDING:
                i.status.completed_at = None
            i.status.set_condition(READY, False, reason, message, now=now)

        return await ctx.client.update_status(order, enter)

    async def _tell(
        self, order: LabImport, ctx: Context, reason: str, message: str, ready: bool | None = False
    ) -> None:
        """What it waits for; the same again is no write."""
        now = ctx.clock.now()
        await ctx.client.update_status(
            order, lambda i: i.status.set_condition(READY, ready, reason, message[:500], now=now)
        )

    def _lab_is_going(self, order: LabImport) -> bool:
        """Whether it keeps the topology of a lab that is still to be deleted."""
        worker, lab_id = (order.metadata.labels.get(label, "") for label in (WORKER_LABEL, LAB_LABEL))
        record = record_of_lab(self._cache, order.namespace, worker, lab_id)
        return record is not None and record.deleting and order.name == kept_name(record.uid)

    def _kept_of(self, change: Change) -> Iterable[Key]:
        """What was kept of a lab whose record is gone: its time begins."""
        if change.new is None and change.old is not None and isinstance(change.old.resource, LabRecord):
            record = change.old.resource
            if self._cache.get(LabImport, record.namespace, kept_name(record.uid)) is not None:
                yield record.namespace, kept_name(record.uid)

    def _waiting_for(self, change: Change) -> Iterable[Key]:
        """The imports that wait for a worker which may be able to take them now."""
        if _takes(change.old and change.old.resource) == _takes(change.new and change.new.resource):
            return
        item = change.item
        for order in self._cache.by_index(LabImport, "worker", f"{item.namespace}/{item.name}"):
            if not self.settled(order):
                yield order.namespace, order.name


def _sent_to(order: LabImport, worker: LabWorker) -> bool:
    """Whether this instance's CML may have the lab already."""
    return order.status.sent_at is not None and order.status.instance_id == worker.status.ec2.instance_id


async def _marked(order: LabImport, worker: LabWorker, client: CmlClient, *, whole: bool = False) -> list[Lab]:
    """The labs that tries of this import have made and that bear its mark still, the oldest first.

    `whole` raises `CmlBadAnswer` where none is found in a list that does not prove that there is none.
    """
    identity = worker.status.cml.identity
    inventory = await read_inventory(client, identity.product_uuid if identity else None)
    found = [lab for lab in inventory.labs.values() if lab.title == mark_of(order)]
    why = inventory.why_incomplete or ("CML does not tell the titles of all labs" if inventory.unread else "")
    if whole and not found and why:
        raise CmlBadAnswer(200, f"it cannot be seen whether the lab was made: {why}")
    return sorted(found, key=lambda lab: (lab.created.timestamp() if lab.created else 0.0, lab.id))


def _takes(worker: object) -> object:
    """The parts of a worker on which a waiting import depends."""
    if not isinstance(worker, LabWorker):
        return None
    observed, ec2 = worker.spec.observe_only, worker.status.ec2
    return (
        worker.uid,
        worker.deleting,
        serving(worker),
        identified(worker),
        worker.status.phase,
        ec2.instance_id,
        observed,
    )
