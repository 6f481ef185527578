"""The pools' controller: makes and ends workers until each pool has the size that `decide` says.

Intent before effect: a decision is one write of the status, with the names of the workers that it concerns; then it is
carried out, and only when nothing of it is left is the next one made. Whoever goes on after a crash finds the
names: creating one again meets the worker that is there, deleting one again changes nothing. Names are random and never
given twice. A worker is created under a guard on its pool and removed in exactly the state that was judged; it drains
before it ends. A pool that is deleted ends its workers first and goes last.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta

from controllers.pools.conditions import (
    CLOCK_JUMPED,
    OBSERVE_ONLY,
    SCALING_LIMITED,
    UNDECODABLE_WORKER,
    UNKNOWN_TIME_ZONE,
    WORKER_REFUSED,
    limit_of,
    observe,
    tell_limit,
)
from controllers.pools.decisions import (
    Decision,
    Direction,
    Reason,
    Roster,
    decide,
    is_removable,
    lead_of,
    roster,
)
from controllers.pools.demand import Demand, Load, labs_are_known
from controllers.pools.hours import UnknownTimeZone
from controllers.pools.kind import (
    LONGEST_LEAD,
    NAMES_TOLD,
    POOL_FINALIZER,
    POOLS,
    LabWorkerPool,
    ScalingDecision,
    new_worker,
)
from controllers.pools.launches import stuck_by
from controllers.pools.settings import PoolSettings
from controllers.workers.kind import DRAIN_ANNOTATION, LAB_WORKER, WAKE_ANNOTATION, LabWorker
from lrm.cache import Cache, Change
from lrm.controller import Context, Controller, Key, Result, Trigger
from lrm.crashpoints import crash_point
from lrm.errors import Forbidden, Invalid, ResourceExists, ResourceNotFound
from lrm.model import rfc3339
from lrm.writes import ORPHAN_FINALIZER

CRASH_POINTS = (
    "pools.decided",
    "pools.created",
    "pools.all-created",
    "pools.marked",
    "pools.removed",
    "pools.woken",
    "pools.carried-out",
)
"""Where a pool's work can be killed; each is after one write and before the next."""

_ROUTINE = {Reason.COOLDOWN, Reason.OUTSIDE_HOURS, Reason.HOSTS_LABS, OBSERVE_ONLY}
"""What holds a decision back as it was meant to; nobody needs to do anything."""
_REFUSED_FOR = timedelta(minutes=10)
"""How long workers that were refused are not tried again while the pool's spec stays as it is."""
_PLAN_LIFE = timedelta(minutes=2)
"""How long what was decided may still be begun: long enough for the next leader, too short for a person's pause."""
_SUFFIX_LETTERS = "bcdfghjklmnpqrstvwxz2456789"
_SUFFIX_LENGTH = 10
_NAME_MOST = 63


def new_suffix() -> str:
    """Ten letters and digits that spell no word: 27¹⁰ of them, so that none comes twice."""
    return "".join(random.SystemRandom().choices(_SUFFIX_LETTERS, k=_SUFFIX_LENGTH))


class PoolsController(Controller[LabWorkerPool]):
    """See the module."""

    name = POOLS
    lock_name = POOLS
    model = LabWorkerPool
    finalizer = POOL_FINALIZER

    def __init__(
        self, cache: Cache, demand: Demand, settings: PoolSettings, *, suffix: Callable[[], str] = new_suffix
    ) -> None:
        self._cache = cache
        self._demand = demand
        self._interval = settings.pool_interval
        self._suffix = suffix
        self.poll = settings.pool_interval

    def triggers(self) -> Sequence[Trigger]:
        """What becomes of a worker concerns its pool."""
        return (Trigger(LabWorker, _pools_of),)

    async def reconcile(self, resource: LabWorkerPool, ctx: Context) -> Result:
        workers = self._workers(resource)
        load = self._load(resource, workers, ctx)
        team = roster(resource, workers, load)
        if opaque := self._opaque(resource):
            await self._note(resource, team, opaque, ctx)
            return Result.after(self._interval)
        status = resource.status
        if status.planned_names or status.removing or status.waking:
            if ctx.observe_only or _is_outdated(resource, ctx):
                ctx.log.info("pool.decision_dropped", planned=status.planned_names, removing=status.removing)
                await ctx.client.update_status(resource, _forget_all)
                return Result.after(0)
            return await self._carry_out(resource, team, load, ctx)
        decision, limit = self._decide(resource, workers, load, ctx)
        refused = self._refused_lately(resource, ctx) if decision is not None and decision.create else None
        if decision is None or not decision.acts or refused or ctx.observe_only:
            if refused:
                limit = refused
            elif decision is not None and decision.acts:
                limit = (OBSERVE_ONLY, f"{decision.direction}: {decision.message}")
            await self._note(resource, team, limit, ctx)
            return Result.after(self._interval)
        resource = await self._record(resource, decision, team, ctx)
        crash_point("pools.decided")
        return await self._carry_out(resource, team, load, ctx)

    async def finalize(self, resource: LabWorkerPool, ctx: Context) -> Result:
        """End all workers, drained unless the pool's own drain annotation is "false"; done when none is left."""
        if ORPHAN_FINALIZER in resource.metadata.finalizers:
            return Result.done()  # the collector takes the owner off the workers, and they stay
        workers = self._workers(resource)
        if not workers:
            await ctx.cache.barrier()
            workers = self._workers(resource)
        opaque = self._opaque(resource)
        if not workers and not opaque:
            return Result.done()
        drains = resource.metadata.annotations.get(DRAIN_ANNOTATION, "true")
        held = [w for w in workers if not await self._end(w, drains, ctx, exactly=False)]
        team = roster(resource, workers, self._load(resource, workers, ctx))
        protected = ("WorkersProtected", f"protected: {', '.join(w.name for w in held[:3])}") if held else None
        await self._note(resource, team, protected or opaque or ("", ""), ctx)
        return Result.after(self._interval)  # the last worker that goes wakes us

    def _workers(self, pool: LabWorkerPool) -> list[LabWorker]:
        return self._cache.by_index(LabWorker, "owner", pool.uid)

    def _opaque(self, pool: LabWorkerPool) -> tuple[str, str] | None:
        """What stands against any decision while a worker of the namespace cannot be decoded here: it may be ours.

        A newer version may have written it, and it serves: without it in the count another would be launched.
        """
        found = [i.name for i in self._cache.opaque() if i.kind is LAB_WORKER and i.namespace == pool.namespace]
        if not found:
            return None
        return (UNDECODABLE_WORKER, f"workers that this version cannot read may be the pool's: {', '.join(found[:3])}")

    def _load(self, pool: LabWorkerPool, workers: Sequence[LabWorker], ctx: Context) -> Load:
        now = ctx.clock.now()
        horizon = now + timedelta(seconds=LONGEST_LEAD)
        return self._demand.load(pool, workers, now=now, until=now + lead_of(pool), horizon=horizon)

    def _decide(
        self, pool: LabWorkerPool, workers: Sequence[LabWorker], load: Load, ctx: Context
    ) -> tuple[Decision | None, tuple[str, str]]:
        """A decision, or none and what stands against making one: reason and message."""
        now = ctx.clock.now()
        if ctx.wall_jumped:
            return None, (CLOCK_JUMPED, "the wall clock was set a moment ago: cooldowns and hours are not believed yet")
        try:
            decision = decide(pool, workers, load, now)
        except UnknownTimeZone as error:
            return None, (UNKNOWN_TIME_ZONE, str(error))
        return decision, limit_of(decision)

    def _refused_lately(self, pool: LabWorkerPool, ctx: Context) -> tuple[str, str] | None:
        """What was said against the workers of this very spec, unless that is long ago: the rules may be others now."""
        told, last = pool.status.condition(SCALING_LIMITED), pool.status.last_decision
        if told is None or last is None or (told.status, told.reason) != ("True", WORKER_REFUSED):
            return None
        if told.observed_generation != pool.metadata.generation or ctx.clock.now() - last.at >= _REFUSED_FOR:
            return None
        return WORKER_REFUSED, told.message

    # A decision, and its effect

    async def _record(self, pool: LabWorkerPool, decision: Decision, team: Roster, ctx: Context) -> LabWorkerPool:
        """Write what is going to be done; holds only for the state of the pool that it was decided on."""
        now = ctx.clock.now()
        names = [self._name(pool) for _ in range(decision.create)]
        removing, waking = list(decision.remove), list(decision.wake)
        told = ScalingDecision(
            at=now,
            generation=pool.metadata.generation,
            direction=decision.direction.value,
            reason=decision.reason.value,
            message=decision.message,
            source=decision.before,
            to=decision.after,
            created=names[:NAMES_TOLD],
            removed=removing[:NAMES_TOLD],
            woken=waking[:NAMES_TOLD],
            replaced=decision.replaced,
        )

        def mutate(pool: LabWorkerPool) -> None:
            status = pool.status
            status.planned_names, status.removing, status.waking = names, removing, waking
            if decision.direction in (Direction.UP, Direction.WAKE):
                status.last_scale_up_at = now
            if decision.direction is Direction.DOWN:
                status.last_scale_down_at = now
            status.decided(told)
            observe(pool, team, now)
            tell_limit(pool, "", "", now)

        recorded = await ctx.client.update_status(pool, mutate, retry=False)
        change = {"source": told.source, "to": told.to, "created": names, "removed": removing, "woken": waking}
        ctx.log.info("pool.scaling", direction=told.direction, reason=told.reason, detail=told.message, **change)
        words = f"{told.reason}, {told.source} to {told.to} workers: {told.message}"
        ctx.events.record(recorded, "Normal", f"Scaling{told.direction}", words)
        return recorded

    def _name(self, pool: LabWorkerPool) -> str:
        stem = pool.name[: _NAME_MOST - _SUFFIX_LENGTH - 1].rstrip("-.")
        return f"{stem}-{self._suffix()}"

    async def _carry_out(self, pool: LabWorkerPool, team: Roster, load: Load, ctx: Context) -> Result:
        """Do what is left of the last decision, then forget its names.

        What was decided before a crash is held against the present: nothing is created above the maximum, and what
        has come to host labs stays.
        """
        known = {w.name for w in (*team.members, *team.leaving)}
        missing = [name for name in pool.status.planned_names if name not in known]
        doomed = [w for w in team.members if w.name in pool.status.removing]
        room = pool.spec.max_workers - len(team.members)
        if len(missing) > room:
            room += await self._remove(doomed, load, ctx)
            doomed = []
        try:
            for name in missing[: max(0, room)]:
                await self._create(pool, name, ctx)
                crash_point("pools.created")
        except Invalid as error:
            # The pool is being deleted or is gone, or a rule for workers is stricter than it was for the template.
            await self._give_up(pool, team, (WORKER_REFUSED, str(error)), ctx)
            return Result.after(self._interval)
        crash_point("pools.all-created")
        await self._remove(doomed, load, ctx)
        await self._wake([w for w in team.asleep if w.name in pool.status.waking], pool, ctx)
        done = {*pool.status.planned_names, *pool.status.removing, *pool.status.waking}
        await ctx.client.update_status(pool, lambda p: _forget(p, done))
        crash_point("pools.carried-out")
        return Result.after(0)

    async def _give_up(self, pool: LabWorkerPool, team: Roster, limit: tuple[str, str], ctx: Context) -> None:
        """Forget what is left of the last decision, so that the next one is of the pool as it is then."""
        await ctx.client.update_status(pool, _forget_all)
        await self._note(pool, team, limit, ctx)

    async def _create(self, pool: LabWorkerPool, name: str, ctx: Context) -> None:
        """Make one planned worker. Raises `Invalid` where it is refused."""
        worker = new_worker(pool, name, drains=DRAIN_ANNOTATION)
        try:
            await ctx.client.create(worker)
        except ResourceExists:
            # Ours from before a crash; a stranger's name is left alone, and the next decision takes another.
            there = await ctx.client.get(LabWorker, pool.namespace, name)
            if pool.uid not in {o.uid for o in there.metadata.owner_references}:
                ctx.log.warning("pool.name_taken", worker=name)

    async def _remove(self, doomed: Iterable[LabWorker], load: Load, ctx: Context) -> int:
        """Ask for the end of workers that may still be ended; how many that were."""
        removed = 0
        for worker in doomed:
            if not is_removable(worker, load.of(worker)):
                ctx.log.info("pool.worker_spared", worker=worker.name)
                continue
            removed += await self._end(worker, "true", ctx, exactly=True)
        return removed

    async def _wake(self, asleep: Iterable[LabWorker], pool: LabWorkerPool, ctx: Context) -> None:
        """Lift the pause of workers that idleness has stopped; the word is the decision's time, so it is given once."""
        last = pool.status.last_decision
        word = rfc3339(last.at) if last is not None else rfc3339(ctx.clock.now())

        def tell(w: LabWorker) -> None:
            w.metadata.annotations[WAKE_ANNOTATION] = word

        for worker in asleep:
            with suppress(ResourceNotFound):  # gone meanwhile: the next decision takes another
                await ctx.client.update(worker, tell)
            crash_point("pools.woken")

    async def _end(self, worker: LabWorker, drains: str, ctx: Context, *, exactly: bool) -> bool:
        """Delete a worker after it was told whether to drain, `exactly` in this state; False where it is protected."""
        if worker.deleting and worker.metadata.annotations.get(DRAIN_ANNOTATION) == drains:
            return True

        def tell(w: LabWorker) -> None:
            w.metadata.annotations[DRAIN_ANNOTATION] = drains

        try:
            told = await ctx.client.update(worker, tell, retry=not exactly)
            if told is None or told.deleting:
                return True
            crash_point("pools.marked")
            await ctx.client.delete(told, retry=not exactly)
        except ResourceNotFound:
            return True
        except Forbidden as error:
            ctx.log.warning("pool.worker_protected", worker=worker.name, detail=str(error))
            return False
        ctx.log.info("pool.worker_removed", worker=worker.name)
        crash_point("pools.removed")
        return True

    async def _note(self, pool: LabWorkerPool, team: Roster, limit: tuple[str, str], ctx: Context) -> None:
        """Write what is observed, if it has changed."""
        now = ctx.clock.now()

        def mutate(pool: LabWorkerPool) -> None:
            observe(pool, team, now)
            tell_limit(pool, *limit, now)

        before = pool.status.condition("ScalingLimited")
        noted = await ctx.client.update_status(pool, mutate)
        if limit[0] and (before is None or before.reason != limit[0]):
            ctx.events.record(noted, "Normal" if limit[0] in _ROUTINE else "Warning", limit[0], limit[1])


def _forget(pool: LabWorkerPool, done: set[str]) -> None:
    status = pool.status
    status.planned_names = [name for name in status.planned_names if name not in done]
    status.removing = [name for name in status.removing if name not in done]
    status.waking = [name for name in status.waking if name not in done]


def _is_outdated(pool: LabWorkerPool, ctx: Context) -> bool:
    """Whether what is left of the last decision was decided for another spec, or too long ago to be believed."""
    last = pool.status.last_decision
    if last is None or last.generation != pool.metadata.generation or ctx.wall_jumped:
        return True
    return not timedelta(0) <= ctx.clock.now() - last.at < _PLAN_LIFE


def _forget_all(pool: LabWorkerPool) -> None:
    status = pool.status
    status.planned_names, status.removing, status.waking = [], [], []


def _pools_of(change: Change) -> Iterable[Key]:
    """The pools that own a worker, before or after a change that is news to them.

    What is measured of it is not: a fleet's refresh writes a thousand workers, and a pool looks at that in its turn.
    """
    old, new = (item.resource if item is not None else None for item in (change.old, change.new))
    if isinstance(old, LabWorker) and isinstance(new, LabWorker) and _standing(old) == _standing(new):
        return ()
    owners = (o for r in (old, new) if r is not None for o in r.metadata.owner_references)
    return {(change.item.namespace, o.name) for o in owners if o.kind == "LabWorkerPool"}


def _standing(worker: LabWorker) -> tuple[object, ...]:
    """All of a worker that decides what it is to its pool, but for its load."""
    meta, status = worker.metadata, worker.status
    paused = status.idle.paused_at if status.idle is not None else None
    return (
        worker.deleting,
        worker.spec.desired_phase,
        worker.spec.max_concurrent_labs,
        meta.annotations,
        meta.owner_references,
        status.phase,
        status.ec2.instance_id,
        status.ec2.state,
        bool(status.allocations),
        labs_are_known(worker),
        stuck.reason if (stuck := stuck_by(worker)) else None,
        paused,
    )
