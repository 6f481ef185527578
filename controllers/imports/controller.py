"""The imports' controller: makes a LabWorker for each existing instance that an import names, once.

Each run looks at EC2 and at all workers in the store, writes down what it is going to make, makes it under names that
follow from the instances' ids, and writes down what came of it. So it can die anywhere, and a repeat finds what is
there. Imports are carried out one at a time, so that two of them see each other's workers; that one instance has one
worker is in the end decided by the claim that the worker takes. Nothing outside is changed here: adopting, and with it
every mark in EC2, is the workers' controller's.
"""

from __future__ import annotations

from collections.abc import Mapping

from controllers.aws.ec2 import Ec2, Ec2Instance
from controllers.aws.errors import AwsError
from controllers.imports.kind import (
    DONE,
    FAILED,
    IMPORTS,
    PENDING,
    SKIPPED_KEPT,
    Imported,
    LabWorkerImport,
    Skipped,
    worker_of,
)
from controllers.imports.selection import Plan, Reasons, plan
from controllers.workers.claims import Claims, holding
from controllers.workers.kind import LabWorker
from controllers.workers.phases import Reasons as WorkerReasons
from controllers.workers.provisioning import UNDECODABLE_WORKER, reason_of
from lrm.cache import Change
from lrm.controller import Context, Controller, Result
from lrm.crashpoints import crash_point
from lrm.errors import Invalid, ResourceExists, RetryLater, Undecodable
from lrm.resource import RECONCILE_ANNOTATION

CRASH_POINTS = ("imports.planned", "imports.created", "imports.made")

_READY = "Ready"
"""The condition: whether the last run came to its end, and if not why."""


Wish = tuple[int, str | None]
"""Generation and value of the reconcile-now annotation: what asks for a run."""


class ImportsController(Controller[LabWorkerImport]):
    """See the module."""

    name = IMPORTS
    lock_name = IMPORTS
    model = LabWorkerImport
    workers = 1  # one import at a time sees what the others made

    def __init__(self, ec2: Ec2, claims: Claims, installation: str) -> None:
        self._ec2 = ec2
        self._claims = claims
        self._installation = installation

    def wakes(self, change: Change) -> bool:
        """Only a new wish is a reason to look."""
        new = change.new.resource if change.new else None
        return isinstance(new, LabWorkerImport) and _is_due(new)

    def settled(self, resource: LabWorkerImport) -> bool:
        return not _is_due(resource)

    async def reconcile(self, resource: LabWorkerImport, ctx: Context) -> Result:
        """Carry an import out, if that was not done for this generation and this value of the annotation."""
        if not _is_due(resource):
            return Result.done()
        wish = _wish(resource)
        try:
            found = await self._find(resource, ctx)
        except AwsError as error:
            if error.definite_refusal and not error.retryable:
                return await self._give_up(resource, ctx, wish, (_reason_of(error), str(error)))
            await self._note(resource, ctx, _reason_of(error), str(error))
            raise RetryLater(f"EC2 cannot be asked: {error}") from error
        claims = await self._claims.everyone()  # before the workers: whoever claims later is among them
        try:
            workers = await ctx.client.list(LabWorker, whole=True)
        except Undecodable as error:
            message = f"any instance may be the one of a worker that this version cannot read: {error}"
            await self._note(resource, ctx, UNDECODABLE_WORKER, message)
            raise RetryLater(message) from error
        chosen = plan(resource, found, workers, holding(claims, workers), self._installation)
        # What comes back may have a newer spec: it is told of this run, and this run goes on with its own.
        stored = await self._intend(resource, ctx, chosen, found)
        crash_point("imports.planned")
        try:
            imported, late = await self._make(resource, ctx, chosen, found)
        except Invalid as error:
            return await self._give_up(stored, ctx, wish, ("InvalidTemplate", str(error)))
        crash_point("imports.made")
        await self._tell(stored, ctx, wish, imported, (*chosen.skipped, *late))
        return Result.done()

    async def _find(self, of: LabWorkerImport, ctx: Context) -> dict[str, Ec2Instance]:
        """The instances that EC2 knows, by id, those that are named or all that fit."""
        ctx.check_leading()
        spec = of.spec
        self._ec2.check_named(spec.place, of.namespace)
        if spec.instance_ids:
            return await self._ec2.describe_instances(spec.place, spec.instance_ids)
        return {i.id: i for i in await self._ec2.find(spec.place, tags=spec.tags, image_id=spec.ami_id or "")}

    async def _intend(
        self, of: LabWorkerImport, ctx: Context, chosen: Plan, found: Mapping[str, Ec2Instance]
    ) -> LabWorkerImport:
        now = ctx.clock.now()

        def planned(resource: LabWorkerImport) -> None:
            status = resource.status
            status.enter(PENDING, "Importing", now)
            status.found, status.planned = len(found), list(chosen.imports)
            status.imported, status.skipped, status.skipped_count = [], [], 0

        return await ctx.client.update_status(of, planned)

    async def _make(
        self, of: LabWorkerImport, ctx: Context, chosen: Plan, found: Mapping[str, Ec2Instance]
    ) -> tuple[list[Imported], list[Skipped]]:
        """Make the workers; those that are there already are as good. Raises `Invalid` for the template's mistake."""
        imported: list[Imported] = []
        late: list[Skipped] = []
        for one in chosen.imports:
            if one.instance_id in found:
                try:
                    await ctx.client.create(worker_of(of, found[one.instance_id]))
                except ResourceExists:
                    there = await ctx.client.get(LabWorker, of.namespace, one.worker)
                    if there.spec.aws.instance_id != one.instance_id:
                        late.append(Skipped(instance_id=one.instance_id, reason=Reasons.NAME_TAKEN))
                        continue
                else:
                    ctx.log.info("import.worker_made", instance=one.instance_id, worker=one.worker)
                crash_point("imports.created")
            imported.append(one)
        return imported, late

    async def _tell(
        self,
        of: LabWorkerImport,
        ctx: Context,
        wish: Wish,
        imported: list[Imported],
        skipped: tuple[Skipped, ...],
    ) -> None:
        now = ctx.clock.now()
        message = f"{len(imported)} of {of.status.found} instances have workers, {len(skipped)} were left alone"

        def done(resource: LabWorkerImport) -> None:
            status = resource.status
            status.enter(DONE, "Imported", now)
            status.planned, status.imported = [], imported
            status.skipped, status.skipped_count = list(skipped[:SKIPPED_KEPT]), len(skipped)
            status.observed_generation, status.asked = wish
            status.completed_at = now
            status.set_condition(_READY, True, "Imported", message, now=now, generation=wish[0])

        await ctx.client.update_status(of, done)
        ctx.log.info("import.done", found=of.status.found, imported=len(imported), skipped=len(skipped))
        ctx.events.record(of, "Normal", "Imported", message)

    async def _give_up(self, of: LabWorkerImport, ctx: Context, wish: Wish, why: tuple[str, str]) -> Result:
        """Until the spec changes or a person asks again; `why` is a reason and a message."""
        now, (reason, message) = ctx.clock.now(), why

        def failed(resource: LabWorkerImport) -> None:
            status = resource.status
            status.enter(PENDING, "Importing", now)
            status.enter(FAILED, reason, now)
            status.observed_generation, status.asked = wish
            status.set_condition(_READY, False, reason, message, now=now, generation=wish[0])

        await ctx.client.update_status(of, failed)
        ctx.log.error("import.failed", reason=reason, detail=message)
        ctx.events.record(of, "Warning", reason, message)
        return Result.done()

    async def _note(self, of: LabWorkerImport, ctx: Context, reason: str, message: str) -> None:
        """Say what holds it up; the same again costs no write."""
        now = ctx.clock.now()
        await ctx.client.update_status(of, lambda r: r.status.set_condition(_READY, False, reason, message, now=now))


def _wish(of: LabWorkerImport) -> Wish:
    return of.metadata.generation, of.metadata.annotations.get(RECONCILE_ANNOTATION)


def _is_due(of: LabWorkerImport) -> bool:
    """Whether this wish has not been carried out or given up yet."""
    told = of.status.observed_generation, of.status.asked
    return not of.deleting and (of.status.phase == PENDING or told != _wish(of))


def _reason_of(error: AwsError) -> str:
    reason = reason_of(error)
    return "AWSRefused" if reason == WorkerReasons.LAUNCH_REFUSED else reason
