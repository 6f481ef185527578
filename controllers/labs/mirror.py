"""One sync of one worker: brings its records up to a list of its labs, and counts what came of it.

Promises: a record is made under a guard on its worker and in one write with what was seen; a lab as it was costs no
write; a few writes are under way at once (`writing`); errors of single records are collected, everything else ends the
sync. What is to be done `sync.difference` says. Called by the labs controller, under its leader's fence.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from controllers.cml.models import Lab
from controllers.labs.history import first_status, is_news, mark_listed, mark_missing, observe
from controllers.labs.kind import LAB_FINALIZER, LabRecord, LabRecordSpec, printable, record_name
from controllers.labs.sync import Difference, Removal, Tombstone
from controllers.labs.telling import Telling
from controllers.labs.writing import Failures, write_each
from controllers.workers.kind import LabWorker
from controllers.workers.phases import Phase
from lrm.controller import Context
from lrm.crashpoints import crash_point
from lrm.errors import ResourceExists, ResourceNotFound
from lrm.resource import ObjectMeta
from storage.base import Guard

_AT_A_TIME = 200
"""Labs that are compared before anything else gets its turn: some five milliseconds."""
_NAMED = 20
"""Ids of labs in one line of the log."""


@dataclass
class Mirror:
    """See the module; the counts are of writes that were made."""

    worker: LabWorker
    ctx: Context
    guard: Guard
    """The worker's key: no record is made for a worker that has gone."""
    at: datetime
    """When CML was asked; what came of it holds for this time."""
    keep: int
    """Operations kept for each lab."""
    telling: Telling
    gate: asyncio.Semaphore
    """Shared by all syncs."""
    created: int = 0
    updated: int = 0
    missing: int = 0
    removed: int = 0
    waiting: int = 0
    """Records that this list lacks and that stay, written or not."""
    ended: int = 0
    """Of those removed, the ones whose labs lrm itself had no more use for."""
    failures: Failures = field(default_factory=Failures)

    @property
    def news(self) -> bool:
        """Whether anything had to be written."""
        return bool(self.created or self.updated or self.missing or self.removed)

    @property
    def orphans(self) -> int:
        """Records whose labs went without lrm's doing."""
        return self.missing + self.removed - self.ended

    async def bring_up_to(self, found: Difference) -> None:
        """First what is there, then what is not."""
        log, failures = self.ctx.log, self.failures
        self.waiting = len(found.tombstones)
        changed = await self._changed(found.seen)
        # A worker on its way out gets no more records to take along, unless it waits for its labs to end.
        if not self.worker.deleting or self.worker.status.phase == Phase.DRAINING:
            await write_each(found.create, lambda lab: lab.id, self._create, failures, self.gate)
        await write_each(changed, lambda pair: _lab_of(pair[0]), lambda pair: self._update(*pair), failures, self.gate)
        await write_each(found.listed, _lab_of, self._mark_listed, failures, self.gate)
        if found.orphans:
            gone = [_lab_of(r.record) for r in found.removals] + [_lab_of(t.record) for t in found.tombstones]
            log.warning(
                "labs.orphans_found",
                worker=self.worker.name,
                count=found.orphans,
                labs=gone[:_NAMED],
                removing=len(found.removals),
                cautious=found.cautious,
            )
        await write_each(found.ended, _lab_of, self._end, failures, self.gate)
        await write_each(found.tombstones, lambda t: _lab_of(t.record), self._mark, failures, self.gate)
        failed = "labs.orphan_removal_failed"
        await write_each(found.removals, lambda r: _lab_of(r.record), self._remove, failures, self.gate, failed=failed)
        self.telling.close()

    @property
    def _instance_id(self) -> str:
        return self.worker.status.ec2.instance_id or ""

    async def _changed(self, seen: Sequence[tuple[LabRecord, Lab]]) -> list[tuple[LabRecord, Lab]]:
        """Those that have to be written; the event loop is given back in between."""
        changed: list[tuple[LabRecord, Lab]] = []
        for first in range(0, len(seen), _AT_A_TIME):
            some = seen[first : first + _AT_A_TIME]
            changed += [(r, lab) for r, lab in some if is_news(r.status, lab, self._instance_id)]
            await self.ctx.clock.sleep(0)
        return changed

    async def _create(self, lab: Lab) -> None:
        worker = self.worker
        record = LabRecord(
            metadata=ObjectMeta(
                name=record_name(worker.name, lab.id),
                namespace=worker.namespace,
                finalizers=[LAB_FINALIZER],
                owner_references=[worker.as_owner()],
            ),
            spec=LabRecordSpec(worker_ref=worker.name, lab_id=lab.id),
            status=first_status(lab, instance_id=self._instance_id, now=self.at),
        )
        try:
            made = await self.ctx.client.create(record, guards=(self.guard,), with_status=True)
        except ResourceExists:
            # Nobody else makes records, so the cache has this one as a value that it cannot decode: leave it alone.
            self.failures.by_lab[lab.id] = f"its record {record.name} exists and cannot be read by this version"
            self.ctx.log.warning("labs.record_unreadable", lab=lab.id, record=record.name)
            return
        self.created += 1
        self.telling.created(made)
        self.ctx.log.debug("labs.record_created", lab=lab.id, title=printable(lab.title), state=lab.state)
        crash_point("labs.record-created")

    async def _update(self, record: LabRecord, lab: Lab) -> None:
        try:
            after = await self.ctx.client.update_status(
                record, lambda r: observe(r.status, lab, instance_id=self._instance_id, now=self.at, keep=self.keep)
            )
        except ResourceNotFound:
            return  # it was deleted while we looked
        self.updated += 1
        self.telling.changed(record, after)
        if after.status.state != record.status.state:
            self.ctx.log.info(
                "labs.state_changed",
                lab=lab.id,
                title=printable(lab.title),
                before=record.status.state,
                state=after.status.state,
            )
        crash_point("labs.record-updated")

    async def _mark_listed(self, record: LabRecord) -> None:
        try:
            await self.ctx.client.update_status(record, lambda r: mark_listed(r.status, now=self.at))
        except ResourceNotFound:
            return  # it was deleted while we looked
        self.updated += 1
        crash_point("labs.record-updated")

    async def _mark(self, tombstone: Tombstone) -> None:
        record = tombstone.record
        seen = self.worker.status.labs_synced_at or record.status.first_seen_at
        try:
            await self.ctx.client.update_status(
                record, lambda r: mark_missing(r.status, tombstone.lists, seen=seen, now=self.at)
            )
        except ResourceNotFound:
            return  # it was deleted while we looked
        self.missing += 1
        if record.status.missing_since is None:
            self.telling.missing(record)
        crash_point("labs.record-marked")

    async def _remove(self, removal: Removal) -> None:
        await self.ctx.client.forget(removal.record)
        self.removed += 1
        self.telling.vanished(removal.record, removal.proof)
        self.ctx.log.info("labs.orphan_removed", lab=_lab_of(removal.record), proof=removal.proof)
        crash_point("labs.record-removed")

    async def _end(self, record: LabRecord) -> None:
        await self.ctx.client.forget(record)
        self.removed += 1
        self.ended += 1
        self.ctx.log.info("labs.record_ended", lab=_lab_of(record), title=printable(record.status.title))
        crash_point("labs.record-removed")


def _lab_of(record: LabRecord) -> str:
    return record.spec.lab_id
