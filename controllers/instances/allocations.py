"""What of each LabWorker is reserved for which lab instance: `status.allocations`, its only truth.

Promises: no write makes the sum of what is reserved exceed what the worker has in that very state, whatever the caller
knew; an entry is removed only while it is the one that was judged. An entry is known by its uid and `since`: whoever
reserves writes a new time, even where an entry is already, so that a reservation and the removal of a leftover that
meet cannot both succeed. `AllocationsController` removes what releasing has missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from weakref import WeakValueDictionary

from controllers.instances.kind import INSTANCES, LabInstanceRequest, Need, WorkerRef
from controllers.instances.places import closed, foreign_labs, place_of
from controllers.instances.scheduler import Amount
from controllers.instances.scheduling import NoRoom
from controllers.workers.kind import LabWorker
from controllers.workers.status import Allocation
from lrm.cache import Cache, Change
from lrm.controller import Context, Controller, Key, Result, Trigger
from lrm.errors import ResourceNotFound

_LOOK_AGAIN = 5.0
"""Seconds between two looks at what may stand for nothing, or is on its way to be written down or given back."""


class Allocations:
    """Writes `status.allocations`; one of this process's writes to a worker at a time, others' may come between."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def reserve(self, place: WorkerRef, request: LabInstanceRequest, need: Need, ctx: Context) -> None:
        """Take room under the request's uid; what it had there is replaced. Raises `NoRoom`."""
        worker = self._cache.get(LabWorker, place.namespace, place.name)
        if worker is None or worker.uid != place.uid:
            raise NoRoom(f"the worker {place.name} is gone")
        uid, now = request.uid, ctx.clock.now()

        def take(w: LabWorker) -> None:
            foreign = foreign_labs(self._cache, w.namespace, w.name)
            before = w.status.allocations.pop(uid, None)
            _check_room(w, place, need, foreign)
            w.status.allocations[uid] = Allocation(
                cpu=need.cpu, memory=need.memory, slots=need.slots, nodes=need.nodes, since=_later(now, before)
            )

        try:
            async with self._lock(worker):
                await ctx.client.update_status(worker, take)
        except ResourceNotFound as error:
            raise NoRoom(f"the worker {place.name} is gone") from error

    async def release(self, request: LabInstanceRequest, ctx: Context) -> None:
        """Give back what is reserved for it, on whichever workers; without a write where nothing is."""
        for worker in self.holders(request.uid):
            await self._remove(worker, lambda entries: [request.uid] if request.uid in entries else [], ctx)

    async def remove(self, worker: LabWorker, judged: dict[str, datetime | None], ctx: Context) -> None:
        """Remove the entries that were judged, by uid and `since`; one that was written anew stays."""
        await self._remove(
            worker,
            lambda entries: [u for u, since in judged.items() if u in entries and entries[u].since == since],
            ctx,
        )

    def holders(self, uid: str) -> list[LabWorker]:
        """The workers on which something is reserved under a uid, as far as the cache knows."""
        return self._cache.by_index(LabWorker, "allocation", uid)

    async def _remove(
        self, worker: LabWorker, chosen: Callable[[dict[str, Allocation]], Sequence[str]], ctx: Context
    ) -> None:
        def drop(w: LabWorker) -> None:
            for uid in chosen(w.status.allocations):
                del w.status.allocations[uid]

        try:
            async with self._lock(worker):
                await ctx.client.update_status(worker, drop)
        except ResourceNotFound:
            return  # and its entries with it

    def _lock(self, worker: LabWorker) -> asyncio.Lock:
        return self._locks.setdefault(worker.uid, asyncio.Lock())


def _check_room(worker: LabWorker, place: WorkerRef, need: Need, foreign: Amount) -> None:
    offered = place_of(worker, foreign)
    if why := closed(worker):
        raise NoRoom(f"the worker {worker.name} takes no labs now: {why}")
    if offered.ref != place:
        raise NoRoom(f"the worker {worker.name} is on another instance now")
    if not offered.free.holds(need):
        raise NoRoom(f"the worker {worker.name} has no room any more")


def _later(now: datetime, before: Allocation | None) -> datetime:
    """Now, but never the time that an entry had."""
    since = before.since if before is not None else None
    return now if since is None or since < now else since + timedelta(microseconds=1)


class AllocationsController(Controller[LabWorker]):
    """Removes entries that stand for nothing: what a leader left that died, or a request that was forced away.

    At the second look, for whoever leads gives most of them back by himself. The cache shows workers and requests at
    one revision, which is not behind what was written before the judgement. An entry that a place is being given for
    just now is passed over: by this leader alone can that be, and it knows.
    """

    name = "instance-allocations"
    lock_name = INSTANCES
    owner = INSTANCES
    model = LabWorker

    def __init__(self, cache: Cache, allocations: Allocations, promised: Callable[[str], bool]) -> None:
        """`promised`: whether a request, by its uid, is being given a place."""
        self._cache = cache
        self._allocations = allocations
        self._promised = promised
        self._suspects: dict[str, dict[str, datetime | None]] = {}
        """By worker: what was a stray at the last look."""

    def triggers(self) -> Sequence[Trigger]:
        """A request that ended, went elsewhere, or waits again."""
        return (Trigger(LabInstanceRequest, self._by_request),)

    def wakes(self, change: Change) -> bool:
        """Only entries matter."""
        old, new = (item.resource if item else None for item in (change.old, change.new))
        if not isinstance(new, LabWorker):
            return False
        return bool(new.status.allocations) and not (
            isinstance(old, LabWorker) and old.status.allocations == new.status.allocations
        )

    def settled(self, worker: LabWorker) -> bool:
        """Nothing is reserved there."""
        return not worker.status.allocations

    def _by_request(self, change: Change) -> Iterable[Key]:
        if change.type == "ADDED":
            return
        request = change.item.resource
        old, new = (item.resource if item else None for item in (change.old, change.new))
        if not isinstance(request, LabInstanceRequest) or not isinstance(old, LabInstanceRequest):
            return
        if isinstance(new, LabInstanceRequest) and (old.status.worker_ref, old.status.phase, old.spec) == (
            new.status.worker_ref,
            new.status.phase,
            new.spec,
        ):
            return
        for worker in self._allocations.holders(request.uid):
            yield worker.namespace, worker.name

    async def reconcile(self, worker: LabWorker, ctx: Context) -> Result:
        """Judge every entry; what stood for nothing at the last look too is removed."""
        suspected = self._suspects.pop(worker.uid, {})
        strays = self._strays(worker)
        if not strays:
            return Result.done()
        if strays.items() & suspected.items():
            await ctx.cache.barrier()
            current = ctx.cache.get(LabWorker, worker.namespace, worker.name)
            if current is None or current.uid != worker.uid:
                return Result.done()
            strays = self._strays(current)
            judged = {
                uid: since
                for uid, since in strays.items()
                if (uid, since) in suspected.items() and not self._promised(uid)
            }
            if judged:
                ctx.log.warning("allocations.stray", uids=sorted(judged))
                await self._allocations.remove(current, judged, ctx)
            strays = {uid: since for uid, since in strays.items() if uid not in judged}
        if not strays:
            return Result.done()
        self._suspects[worker.uid] = strays
        return Result.after(_LOOK_AGAIN)

    def _strays(self, worker: LabWorker) -> dict[str, datetime | None]:
        """The entries whose requests have no lab here, with their times."""
        entries = worker.status.allocations.items()
        return {uid: entry.since for uid, entry in entries if self._is_stray(worker, uid)}

    def _is_stray(self, worker: LabWorker, uid: str) -> bool:
        """Whether the request that an entry is for has no lab here: it waits, is over, is elsewhere or gone."""
        found = self._cache.by_index(LabInstanceRequest, "uid", uid)
        if not found:
            # One that this version cannot read may be anybody's.
            return not any(item.kind is self._kind for item in self._cache.opaque())
        ref = found[0].status.worker_ref
        return ref is None or (ref.kind, ref.uid) != ("LabWorker", worker.uid)

    @property
    def _kind(self) -> object:
        return self._cache.registry.of(LabInstanceRequest)
