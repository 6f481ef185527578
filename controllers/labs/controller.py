"""The sync: mirrors the labs of every worker that runs a CML into LabRecords, with two calls a worker.

Promises: a record is made under a guard on its worker and in one write with what was seen; a lab at rest costs no
write; removal follows `sync.difference` alone; whatever fails is told in the worker's `labsSyncError`, changes no
record, and is tried again, ever later. `labsSyncedAt` moves only when every lab of a complete list is in its record.
Deleting a worker ends with all its records forgotten, once its instance is gone or left. One sync per worker at a time
is the queue's promise. Does not touch CML: records and deletion of labs are `records`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from controllers.cml.errors import CmlCircuitOpen, CmlClosed, CmlError, CmlLoginThrottled
from controllers.cml.inventory import Inventory, read_inventory
from controllers.cml.models import Lab
from controllers.cml.sessions import CmlSessions
from controllers.labs.due import apart, asked_for, at_rest, due_in
from controllers.labs.history import first_status, is_news, mark_listed, mark_missing, observe
from controllers.labs.homes import can_be_asked
from controllers.labs.kind import (
    DESIRED_STATE,
    LAB_FINALIZER,
    LABS,
    READY,
    LabRecord,
    LabRecordSpec,
    printable,
    record_name,
    records_of_worker,
)
from controllers.labs.settings import LabsSettings
from controllers.labs.sync import Difference, Removal, Tombstone, difference
from controllers.labs.writing import Failures, write_each
from controllers.workers.kind import INSTANCE_FINALIZER, RECORDS_FINALIZER, LabWorker
from controllers.workers.phases import Phase
from lrm.cache import Cache, Change
from lrm.crashpoints import crash_point
from lrm.errors import ResourceExists, ResourceNotFound, RetryLater
from lrm.reconcile import Context, Controller, Key, Result, Trigger
from lrm.resource import AnyResource, ObjectMeta
from storage.base import Guard
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


@dataclass
class _Sync:
    """One sync of one worker: what it works on and what came of it."""

    worker: LabWorker
    ctx: Context
    guard: Guard
    at: datetime
    """When CML was asked; what came of it holds for this time."""
    created: int = 0
    updated: int = 0
    failures: Failures = field(default_factory=Failures)

    @property
    def instance_id(self) -> str:
        return self.worker.status.ec2.instance_id or ""


class LabsController(Controller[LabWorker]):
    """See the module."""

    name = LABS
    lock_name = LABS
    model = LabWorker
    finalizer = RECORDS_FINALIZER
    workers = 32
    deadline = 300.0

    def __init__(self, *, cache: Cache, sessions: CmlSessions, settings: LabsSettings) -> None:
        self._cache = cache
        self._sessions = sessions
        self._settings = settings
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
        records = records_of_worker(self._cache, worker.namespace, worker.name)
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
        records = records_of_worker(self._cache, worker.namespace, worker.name)
        failures = Failures()

        async def forget(record: LabRecord) -> None:
            await ctx.client.forget(record)
            crash_point("labs.record-forgotten")

        await write_each(records, _lab_of, forget, failures)
        if failures:
            raise RetryLater(failures.sentence())
        ctx.log.info("labs.records_forgotten", worker=worker.name, records=len(records))
        return Result.done()

    async def _mirror(self, worker: LabWorker, ctx: Context) -> Result:
        wait = self._due_in(worker, ctx)
        if wait > 0:
            return Result.after(wait)
        try:
            worker = await self._sync(worker, ctx)
        except CmlError as error:
            await self._failed(worker, ctx, type(error).__name__, _problem(error, worker))
        except GuardFailed:
            return Result.done()  # the worker went or was made anew meanwhile; its deletion wakes us
        self._synced.add(worker.uid)
        return Result.after(max(self._due_in(worker, ctx), apart(self._interval(worker))))

    def _interval(self, worker: LabWorker) -> float:
        interval = self._settings.labs_refresh_interval
        if worker.status.phase == Phase.DRAINING:
            interval = min(interval, self._settings.labs_drain_interval)
        return interval

    def _due_in(self, worker: LabWorker, ctx: Context) -> float:
        return due_in(
            worker,
            records_of_worker(self._cache, worker.namespace, worker.name),
            interval=self._interval(worker),
            now=ctx.clock.now(),
            first=worker.uid not in self._synced,
        )

    async def _sync(self, worker: LabWorker, ctx: Context) -> LabWorker:
        item = self._cache.item(self._cache.registry.of(LabWorker), worker.namespace, worker.name)
        identity = worker.status.cml.identity
        if item is None or identity is None:
            raise RetryLater(f"the worker {worker.name} changed while its sync began")
        sync = _Sync(worker, ctx, Guard(item.entry.key, item.entry.create_revision), ctx.clock.now())
        had = records_of_worker(self._cache, worker.namespace, worker.name)
        before = {record.spec.lab_id for record in had}
        ctx.check_leading()
        client = self._sessions.client_for(worker)
        inventory = await read_inventory(
            client, identity.product_uuid, {record.spec.lab_id for record in had if not record.deleting}
        )
        crash_point("labs.listed")
        records = records_of_worker(self._cache, worker.namespace, worker.name)
        least = timedelta(seconds=apart(self._interval(worker)))
        # After a step of wall time, times prove nothing: the list of a moment ago may seem to be an hour old.
        found = difference(records, before, inventory, at=sync.at, apart=least, held=ctx.wall_jumped)
        await self._write(sync, found)
        crash_point("labs.records-written")
        return await self._conclude(sync, inventory, found)

    async def _write(self, sync: _Sync, found: Difference) -> None:
        """Bring the records up to the list: first what is there, then what is not."""
        log, failures = sync.ctx.log, sync.failures
        changed = [(r, lab) for r, lab in found.seen if is_news(r.status, lab, sync.instance_id)]
        # A worker on its way out gets no more records to take along, unless it waits for its labs to end.
        if not sync.worker.deleting or sync.worker.status.phase == Phase.DRAINING:
            await write_each(found.create, lambda lab: lab.id, lambda lab: self._create(sync, lab), failures)
        await write_each(changed, lambda pair: pair[0].spec.lab_id, lambda pair: self._update(sync, *pair), failures)
        await write_each(found.listed, _lab_of, lambda record: self._mark_listed(sync, record), failures)
        if found.orphans:
            gone = [r.record.spec.lab_id for r in found.removals] + [t.record.spec.lab_id for t in found.tombstones]
            log.warning(
                "labs.orphans_found",
                worker=sync.worker.name,
                count=found.orphans,
                labs=gone[:20],
                removing=len(found.removals),
                cautious=found.cautious,
            )
        await write_each(found.tombstones, lambda t: _lab_of(t.record), lambda t: self._mark(sync, t), failures)
        await write_each(found.removals, lambda r: _lab_of(r.record), lambda r: self._remove(sync, r), failures)

    async def _create(self, sync: _Sync, lab: Lab) -> None:
        worker = sync.worker
        record = LabRecord(
            metadata=ObjectMeta(
                name=record_name(worker.name, lab.id),
                namespace=worker.namespace,
                finalizers=[LAB_FINALIZER],
                owner_references=[worker.as_owner()],
            ),
            spec=LabRecordSpec(worker_ref=worker.name, lab_id=lab.id),
            status=first_status(lab, instance_id=sync.instance_id, now=sync.at),
        )
        try:
            await sync.ctx.client.create(record, guards=(sync.guard,), with_status=True)
        except ResourceExists:
            # Nobody else makes records, so the cache has this one as a value that it cannot decode: leave it alone.
            sync.failures.by_lab[lab.id] = f"its record {record.name} exists and cannot be read by this version"
            sync.ctx.log.warning("labs.record_unreadable", lab=lab.id, record=record.name)
            return
        sync.created += 1
        sync.ctx.log.info("labs.record_created", lab=lab.id, title=printable(lab.title), state=lab.state)
        crash_point("labs.record-created")

    async def _update(self, sync: _Sync, record: LabRecord, lab: Lab) -> None:
        keep = self._settings.labs_history_length
        try:
            after = await sync.ctx.client.update_status(
                record, lambda r: observe(r.status, lab, instance_id=sync.instance_id, now=sync.at, keep=keep)
            )
        except ResourceNotFound:
            return  # it was deleted while we looked
        sync.updated += 1
        if after.status.state != record.status.state:
            sync.ctx.log.info(
                "labs.state_changed",
                lab=lab.id,
                title=printable(lab.title),
                before=record.status.state,
                state=after.status.state,
            )
        crash_point("labs.record-updated")

    async def _mark_listed(self, sync: _Sync, record: LabRecord) -> None:
        try:
            await sync.ctx.client.update_status(record, lambda r: mark_listed(r.status, now=sync.at))
        except ResourceNotFound:
            return  # it was deleted while we looked
        crash_point("labs.record-updated")

    async def _mark(self, sync: _Sync, tombstone: Tombstone) -> None:
        seen = sync.worker.status.labs_synced_at or tombstone.record.status.first_seen_at
        try:
            await sync.ctx.client.update_status(
                tombstone.record, lambda r: mark_missing(r.status, tombstone.lists, seen=seen, now=sync.at)
            )
        except ResourceNotFound:
            return  # it was deleted while we looked
        crash_point("labs.record-marked")

    async def _remove(self, sync: _Sync, removal: Removal) -> None:
        await sync.ctx.client.forget(removal.record)
        sync.ctx.log.info("labs.record_removed", lab=removal.record.spec.lab_id, proof=removal.proof)
        crash_point("labs.record-removed")

    async def _conclude(self, sync: _Sync, inventory: Inventory, found: Difference) -> LabWorker:
        """Write down how it went: one write per worker and sync."""
        worker, ctx = sync.worker, sync.ctx
        sync.failures.by_lab.update(inventory.unread)
        if sync.failures:
            await self._failed(worker, ctx, "LabsNotMirrored", sync.failures.sentence())
        if not inventory.complete:
            self._sessions.client_for(worker).renew_session()  # the user may be an admin by now
            why = f"the list of labs proves nothing about those that it lacks: {inventory.why_incomplete}"
            await self._failed(worker, ctx, "ListIncomplete", why)

        def note(w: LabWorker) -> None:
            w.status.labs_count = len(inventory.ids)
            w.status.labs_synced_at = sync.at
            w.status.labs_sync_error = None
            w.status.labs_asked = asked_for(worker)
            w.status.set_condition(
                LABS_SYNCED, status=True, reason="Synced", message="every lab has its record", now=ctx.clock.now()
            )

        worker = await ctx.client.update_status(worker, note)
        crash_point("labs.worker-written")
        changed = sync.created or sync.updated or found.orphans
        tell = ctx.log.info if changed else ctx.log.debug  # at rest it would be a line per worker and interval
        tell(
            "labs.synced",
            worker=worker.name,
            synced=len(inventory.ids),
            created=sync.created,
            updated=sync.updated,
            missing=len(found.tombstones),
            removed=len(found.removals),
            seconds=round((ctx.clock.now() - sync.at).total_seconds(), 3),
            without_tiles=inventory.why_no_tiles or None,
        )
        return worker

    async def _failed(self, worker: LabWorker, ctx: Context, reason: str, problem: str | None) -> None:
        """Tell in the worker's status why its labs could not be synced, and try again. Always raises.

        The error is told at once; the condition turns when the labs are overdue, so that one bad answer flips nothing.
        """
        now, synced = ctx.clock.now(), worker.status.labs_synced_at
        overdue = synced is None or (now - synced).total_seconds() > 2 * self._settings.labs_refresh_interval

        def note(w: LabWorker) -> None:
            w.status.labs_sync_error = problem
            if overdue:
                w.status.set_condition(LABS_SYNCED, status=False, reason=reason, message=problem or reason, now=now)

        await ctx.client.update_status(worker, note)
        raise RetryLater(f"labs of {worker.name}: {problem or reason}")


def _problem(error: CmlError, worker: LabWorker) -> str | None:
    """What to tell of an error. Not having asked is no news: what was found when we asked stays."""
    if isinstance(error, CmlClosed):  # our own doing: the worker changed, and the next try has a client for it
        return worker.status.labs_sync_error
    if isinstance(error, CmlCircuitOpen | CmlLoginThrottled):
        return worker.status.labs_sync_error or type(error).__name__
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
