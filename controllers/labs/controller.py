"""The sync: mirrors the labs of every worker that runs a CML into LabRecords, with two calls a worker.

Promises: a worker is synced at the interval, when somebody asks, and soon after its CML pushed (`hints`); removal
follows `sync.difference` alone; whatever fails is told in the worker's `labsSyncError`, changes no record, and is tried
again, ever later. `labsSyncedAt` moves only when every lab of a complete list is in its record. Deleting a worker ends
with all its records forgotten, once its instance is gone or left. One sync per worker at a time is the queue's promise.
The writes of one sync are `mirror`'s. Changes nothing in CML: deletion of labs is `records`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta

from opentelemetry.trace import Span, Tracer, get_tracer

from controllers.cml.errors import CmlCircuitOpen, CmlClosed, CmlError, CmlLoginThrottled
from controllers.cml.inventory import Inventory, read_inventory
from controllers.cml.sessions import CmlSessions
from controllers.labs.due import apart, apart_if_many, asked_for, at_rest, due_in, interval_of
from controllers.labs.hints import PushHints
from controllers.labs.homes import can_be_asked
from controllers.labs.kind import DESIRED_STATE, LABS, READY, LabRecord, records_of_worker
from controllers.labs.measures import LabMeasures
from controllers.labs.mirror import Mirror
from controllers.labs.settings import LabsSettings
from controllers.labs.sync import difference
from controllers.labs.telling import Telling
from controllers.labs.writing import AT_ONCE_IN_ALL, Failures, write_each
from controllers.workers.kind import INSTANCE_FINALIZER, RECORDS_FINALIZER, LabWorker
from controllers.workers.phases import Phase
from controllers.workers.status import LabsSync
from lrm.cache import Cache, Change
from lrm.controller import Context, Controller, Key, Result, Trigger
from lrm.crashpoints import crash_point
from lrm.errors import NotLeading, RetryLater
from lrm.resource import AnyResource
from storage.base import Guard
from storage.clock import Clock
from storage.errors import GuardFailed

CRASH_POINTS = (
    "labs.listed",
    "labs.record-created",
    "labs.record-updated",
    "labs.record-marked",
    "labs.record-removed",
    "labs.records-written",
    "labs.worker-written",
    "labs.record-forgotten",
)
"""Where a sync or a worker's farewell can be killed, in order; each is between two writes."""

LABS_SYNCED = "LabsSynced"


class SyncFailed(RetryLater):
    """A sync came to nothing, for a reason of few; it is told in the worker's status and tried again, ever later."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class LabsController(Controller[LabWorker]):
    """See the module."""

    name = LABS
    lock_name = LABS
    model = LabWorker
    finalizer = RECORDS_FINALIZER
    workers = 32
    deadline = 300.0

    hints: PushHints
    """What CMLs have pushed; filled by `push`."""

    def __init__(
        self,
        *,
        cache: Cache,
        sessions: CmlSessions,
        settings: LabsSettings,
        clock: Clock,
        measures: LabMeasures | None = None,
        tracer: Tracer | None = None,
        is_ended: Callable[[LabRecord], bool] = lambda _: False,
    ) -> None:
        """`is_ended`: whether lrm itself made a record's lab, and has no more use for it."""
        self._cache = cache
        self._sessions = sessions
        self._settings = settings
        self._measures = measures or LabMeasures()
        self._tracer = tracer or get_tracer("controllers.labs")
        self._is_ended = is_ended
        self._gate = asyncio.Semaphore(AT_ONCE_IN_ALL)
        self.hints = PushHints(clock, interval=settings.labs_push_interval)
        self.poll = min(self.poll, settings.labs_refresh_interval)
        self._synced: set[str] = set()
        """Uids of the workers that this process has synced; one that is gone is dropped when it goes."""

    def triggers(self) -> Sequence[Trigger]:
        """A lab that was brought to its desired state is looked at again by the sync."""
        return (Trigger(LabRecord, _reached),)

    def wakes(self, change: Change) -> bool:
        """Only what a sync or a farewell depends on: a worker's status moves often."""
        if change.old is None or change.new is None:
            return True
        return _concerns(change.old.resource) != _concerns(change.new.resource)

    def settled(self, worker: LabWorker) -> bool:
        """No CML to ask, or labs in their records that nobody wants synced before their time; and held."""
        if self.finalizer not in worker.metadata.finalizers:
            return False
        if not can_be_asked(worker):
            return True
        records = self._records(worker)
        return worker.status.phase != Phase.DRAINING and not worker.status.labs_sync_error and at_rest(worker, records)

    async def reconcile(self, worker: LabWorker, ctx: Context) -> Result:
        """Sync the worker's labs if that is due."""
        if not can_be_asked(worker):
            return Result.done()  # a change of its phase or identity wakes us; its records stay
        return await self._mirror(worker, ctx)

    async def finalize(self, worker: LabWorker, ctx: Context) -> Result:
        """Forget all records of a worker whose instance is settled, those that are being deleted too."""
        if INSTANCE_FINALIZER in worker.metadata.finalizers:
            # Its going wakes us. Until then the labs live on, and a drain wants to know which of them run.
            return await self._mirror(worker, ctx) if can_be_asked(worker) else Result.after(self.resync)
        self._synced.discard(worker.uid)
        self.hints.forget(worker.uid)
        records = self._records(worker)
        failures = Failures()

        async def forget(record: LabRecord) -> None:
            await ctx.client.forget(record)
            crash_point("labs.record-forgotten")

        await write_each(records, _lab_of, forget, failures, self._gate)
        if failures:
            raise RetryLater(failures.sentence())
        ctx.log.info("labs.records_forgotten", worker=worker.name, records=len(records))
        return Result.done()

    async def _mirror(self, worker: LabWorker, ctx: Context) -> Result:
        by_the_clock, _ = self._due_in(worker, ctx)
        pushed = self.hints.due_in(worker.uid)
        wait = by_the_clock if pushed is None else min(pushed, by_the_clock)
        if wait > 0:
            return Result.after(wait)
        began = ctx.clock.monotonic()
        self.hints.begin(worker.uid)
        try:
            with self._span(worker) as span:
                worker, mirror = await self._sync(worker, ctx, span)
        except GuardFailed:
            return Result.done()  # the worker went or was made anew meanwhile; its deletion wakes us
        except BaseException as error:  # a deadline that is over is a cancellation here
            self.hints.failed(worker.uid)
            if _leads(ctx):
                self._measures.sync_failed(ctx.clock.monotonic() - began, _reason(error))
            raise
        self._synced.add(worker.uid)
        self.hints.end(worker.uid, news=mirror.news)
        self._measures.synced(
            ctx.clock.monotonic() - began,
            created=mirror.created,
            updated=mirror.updated,
            missing=mirror.missing,
            removed=mirror.removed,
            orphans=mirror.orphans,
        )
        by_the_clock, interval = self._due_in(worker, ctx)
        wait, pushed = max(by_the_clock, apart(interval)), self.hints.due_in(worker.uid)
        return Result.after(wait if pushed is None else min(pushed, wait))

    def _span(self, worker: LabWorker) -> AbstractContextManager[Span]:
        about = {"lrm.worker": worker.name, "lrm.namespace": worker.namespace, "cloud.region": worker.spec.region}
        return self._tracer.start_as_current_span("labs.sync", attributes=about)

    def _interval(self, worker: LabWorker, ctx: Context) -> float:
        return interval_of(worker, self._records(worker), self._settings, ctx.clock.now())

    def _due_in(self, worker: LabWorker, ctx: Context) -> tuple[float, float]:
        """Seconds until the next sync by the clock, and the interval that this goes by."""
        records, now = self._records(worker), ctx.clock.now()
        interval = interval_of(worker, records, self._settings, now)
        first, held = worker.uid not in self._synced, self.hints.held_for(worker.uid)
        return due_in(worker, records, interval=interval, now=now, first=first, held=held), interval

    def _records(self, worker: LabWorker) -> list[LabRecord]:
        return records_of_worker(self._cache, worker.namespace, worker.name)

    async def _sync(self, worker: LabWorker, ctx: Context, span: Span) -> tuple[LabWorker, Mirror]:
        try:
            return await self._synced_with(worker, ctx, span)
        except CmlError as error:
            raise await self._failed(worker, ctx, type(error).__name__, problem_of(error, worker)) from error

    async def _synced_with(self, worker: LabWorker, ctx: Context, span: Span) -> tuple[LabWorker, Mirror]:
        item = self._cache.item(self._cache.registry.of(LabWorker), worker.namespace, worker.name)
        identity = worker.status.cml.identity
        if item is None or identity is None:
            raise RetryLater(f"the worker {worker.name} changed while its sync began")
        mirror = Mirror(
            worker,
            ctx,
            Guard(item.entry.key, item.entry.create_revision),
            ctx.clock.now(),
            self._settings.labs_history_length,
            Telling(ctx.events, worker, self._cache),
            self._gate,
        )
        had = self._records(worker)
        before = {record.spec.lab_id for record in had}
        ctx.check_leading()
        ctx.log.debug("labs.sync_started", worker=worker.name)
        client = self._sessions.client_for(worker)
        inventory = await read_inventory(
            client, identity.product_uuid, {record.spec.lab_id for record in had if not record.deleting}
        )
        crash_point("labs.listed")
        interval = self._interval(worker, ctx)
        # After a step of wall time, times prove nothing: the list of a moment ago may seem to be an hour old.
        found = difference(
            self._records(worker),
            before,
            inventory,
            at=mirror.at,
            apart=timedelta(seconds=apart(interval)),
            apart_if_many=timedelta(seconds=apart_if_many(interval)),
            is_ended=self._is_ended,
            held=ctx.wall_jumped,
        )
        span.set_attribute("labs.synced", len(inventory.ids))
        try:
            await mirror.bring_up_to(found)
        finally:
            for name in ("created", "updated", "missing", "removed"):
                span.set_attribute(f"labs.{name}", getattr(mirror, name))
        crash_point("labs.records-written")
        return await self._conclude(mirror, inventory), mirror

    async def _conclude(self, mirror: Mirror, inventory: Inventory) -> LabWorker:
        """Write down how it went: one write per worker and sync."""
        worker, ctx = mirror.worker, mirror.ctx
        mirror.failures.by_lab.update(inventory.unread)
        if mirror.failures:
            raise await self._failed(worker, ctx, "LabsNotMirrored", mirror.failures.sentence())
        if not inventory.complete:
            self._sessions.client_for(worker).renew_session()  # the user may be an admin by now
            why = f"the list of labs proves nothing about those that it lacks: {inventory.why_incomplete}"
            raise await self._failed(worker, ctx, "ListIncomplete", why)

        message = "every lab has its record"
        if mirror.waiting:
            message += f"; records whose labs are not listed, and that go when more lists prove it: {mirror.waiting}"

        def note(w: LabWorker) -> None:
            w.status.labs_count = len(inventory.ids)
            w.status.labs_synced_at = mirror.at
            w.status.labs_sync_error = None
            w.status.labs_asked = asked_for(worker)
            w.status.labs_last_sync = LabsSync(
                synced=len(inventory.ids),
                created=mirror.created,
                updated=mirror.updated,
                removed=mirror.removed,
                missing=mirror.waiting,
            )
            w.status.set_condition(LABS_SYNCED, status=True, reason="Synced", message=message, now=ctx.clock.now())

        worker = await ctx.client.update_status(worker, note)
        crash_point("labs.worker-written")
        tell = ctx.log.info if mirror.news else ctx.log.debug  # at rest it would be a line per worker and interval
        tell(
            "labs.synced",
            worker=worker.name,
            synced=len(inventory.ids),
            created=mirror.created,
            updated=mirror.updated,
            missing=mirror.missing,
            removed=mirror.removed,
            seconds=round((ctx.clock.now() - mirror.at).total_seconds(), 3),
            without_tiles=inventory.why_no_tiles or None,
        )
        return worker

    async def _failed(self, worker: LabWorker, ctx: Context, reason: str, problem: str | None) -> SyncFailed:
        """Tell in the worker's status why its labs could not be synced; the error to raise.

        The error is told at once; the condition turns when the labs are overdue, so that one bad answer flips nothing.
        """
        now, synced = ctx.clock.now(), worker.status.labs_synced_at
        overdue = synced is None or (now - synced).total_seconds() > 2 * self._interval(worker, ctx)

        def note(w: LabWorker) -> None:
            w.status.labs_sync_error = problem
            w.status.labs_tried = asked_for(worker)
            if overdue:
                w.status.set_condition(LABS_SYNCED, status=False, reason=reason, message=problem or reason, now=now)

        await ctx.client.update_status(worker, note)
        return SyncFailed(reason, f"labs of {worker.name}: {problem or reason}")


def _leads(ctx: Context) -> bool:
    """Whether the term lasts: a sync that its end has cut short is no trouble of a CML."""
    try:
        ctx.check_leading()
    except NotLeading:
        return False
    return True


def _reason(error: BaseException) -> str:
    """One word of few for what ended a sync."""
    if isinstance(error, asyncio.CancelledError):
        return "DeadlineExceeded"
    return str(getattr(error, "reason", type(error).__name__))


def problem_of(error: CmlError, worker: LabWorker) -> str | None:
    """What to tell of an error. Not having asked is no news: what was found when we asked stays.

    So it names no time: what is said at first is still there after hours of the same.
    """
    if isinstance(error, CmlClosed):  # our own doing: the worker changed, and the next try has a client for it
        return worker.status.labs_sync_error
    if isinstance(error, CmlCircuitOpen | CmlLoginThrottled):
        return worker.status.labs_sync_error or f"{error.why}; it is asked again in a while"
    return str(error)[:500]


def _lab_of(record: LabRecord) -> str:
    return record.spec.lab_id


def _concerns(worker: AnyResource | None) -> object:
    """The parts of a worker on which a sync or its farewell depends."""
    if not isinstance(worker, LabWorker):
        return None
    ready = worker.status.condition(READY)
    return (
        worker.metadata.generation,
        worker.metadata.deletion_timestamp,
        tuple(worker.metadata.finalizers),
        asked_for(worker),
        can_be_asked(worker),
        worker.status.phase == Phase.DRAINING,
        bool(worker.status.allocations),
        (ready.status, ready.last_transition_time) if ready else None,
    )


def _reached(change: Change) -> Iterable[Key]:
    """The worker of a record whose lab has just been brought to its desired state."""
    if change.old is None or change.new is None:
        return
    old, new = change.old.resource, change.new.resource
    if isinstance(old, LabRecord) and isinstance(new, LabRecord):
        before, after = old.status.condition(DESIRED_STATE), new.status.condition(DESIRED_STATE)
        if after and after.status == "True" and (before is None or before.status != "True"):
            yield new.namespace, new.spec.worker_ref
