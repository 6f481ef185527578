"""Gives out places: one pass of the scheduler at a time, over what the cache shows and what was promised since.

Promises: a place that was chosen is kept for its request until the cache shows what became of it, so no slot is
promised twice; whoever asks is answered by a pass that began after he asked, together with everybody who asked
meanwhile. On LabWorkers the truth is `allocations`, where a reservation is checked once more against the very state it
changes. The engine has none: what is used there follows from the requests that have their place on it, and from
promises; one leader at a time gives out places, after a barrier, so nothing is missing from these.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from controllers.instances.allocations import Allocations
from controllers.instances.kind import LabInstanceRequest, Need, WorkerRef, placed
from controllers.instances.phases import PLACED, Reasons
from controllers.instances.places import (
    ENGINE,
    EngineTold,
    engine_place,
    foreign_labs,
    gives_room,
    place_of,
    student_of,
    waits,
    wanted_of,
    wants_place,
)
from controllers.instances.scheduler import Amount, Held, Place, Quota, Rules, Wanted, plan, who_fits
from controllers.instances.scheduling import NoRoom, Waits
from controllers.instances.settings import InstanceSettings
from controllers.labs.kind import LabRecord
from controllers.workers.kind import LabWorker
from lrm.cache import Cache, CacheUpdate, Change
from lrm.controller import Context, Hints, Key
from storage.clock import Clock

_TURN = 0.005
"""Seconds of planning after which others on the event loop have theirs."""


@dataclass(frozen=True, slots=True)
class _Promise:
    """A place that was chosen for a request, which is not seen to have it yet."""

    place: WorkerRef
    need: Need
    request: LabInstanceRequest
    """As it was when it asked."""


@dataclass(slots=True)
class _Ask:
    """Somebody who waits for a decision."""

    request: LabInstanceRequest
    decision: WorkerRef | Waits | None = None


class Placing:
    """The `Placer` of the instances' controller; made once per process, and forgets all with each term."""

    def __init__(
        self,
        cache: Cache,
        allocations: Allocations,
        settings: InstanceSettings,
        clock: Clock,
        *,
        engine: EngineTold = lambda: None,
        hints: Hints | None = None,
    ) -> None:
        """`hints` are the controller's, for what no change of the store tells; `engine`, what it has."""
        self._cache = cache
        self._allocations = allocations
        self._settings = settings
        self._clock = clock
        self._engine = engine
        self._hints = hints or Hints()
        self._epoch: tuple[int, int] | None = None
        self._promises: dict[str, _Promise] = {}
        self._asks: dict[str, _Ask] = {}
        self._turn = asyncio.Lock()
        self._last = ("", "")
        self._workers: dict[Key, Place] = {}
        """Workers as places, without promises, as of the last look; what changed since is in `_changed`."""
        self._changed: set[Key] = {(worker.namespace, worker.name) for worker in cache.all(LabWorker)}
        cache.subscribe(self._on_update)
        self._waiting: dict[str, tuple[Key, Wanted]] = {}
        """Everything that waits, by uid."""
        for request in cache.all(LabInstanceRequest):
            self._note(request)
        self._woken_at = -1
        """The revision of the cache at which it was last said who has a place now."""

    # What the controller asks

    async def choose(self, request: LabInstanceRequest, ctx: Context) -> WorkerRef | Waits:
        """Its place among all that wait, by `status.need`: the one promised or reserved already, else the best."""
        self._begin(ctx)
        if request.status.need is None:
            return Waits(Reasons.PREPARING, "it is not known yet what it needs")
        kept = self._kept_promise(request, request.status.need)
        if kept is not None:
            return kept
        # A change that gives room wakes whom the cache shows as waiting: so it must show who is told to wait.
        await self._cache.wait_for(request.revision)
        ask = self._asks[request.uid] = _Ask(request)
        try:
            # Whoever else is about to ask is heard in the same pass.
            await self._clock.sleep(0)
            async with self._turn:
                if ask.decision is None:
                    await self._pass()
        finally:
            if self._asks.get(request.uid) is ask:
                del self._asks[request.uid]
        if ask.decision is None:
            raise AssertionError("a pass decides for everybody who asked before it")
        return ask.decision

    async def reserve(self, place: WorkerRef, request: LabInstanceRequest, ctx: Context) -> None:
        """Take room there under the request's uid. Raises `NoRoom`; another error leaves open whether it was taken."""
        self._begin(ctx)
        need, promise = request.status.need, self._promises.get(request.uid)
        if need is None or promise is None or promise.place != place or promise.need != need:
            raise NoRoom(f"{place.name} is not promised to it any more")
        if place.kind == "Engine":
            return
        try:
            await self._allocations.reserve(place, request, need, ctx)
        except NoRoom:
            self._withdraw(request)
            raise

    async def release(self, request: LabInstanceRequest, ctx: Context) -> None:
        """Give back whatever is promised to it or reserved for it, wherever; without a write where nothing is."""
        self._begin(ctx)
        self._prune()
        if request.uid in self._promises:
            self._withdraw(request)
        await self._allocations.release(request, ctx)

    def wakes(self, change: Change) -> list[Key]:
        """Those that wait and have a place after a change.

        All of them for each state of the cache, once: whoever is told of one of its changes knows them.
        """
        now, early = self._clock.now(), self._settings.instances_early_start
        if not self._waiting or self._woken_at == self._cache.revision or not gives_room(change, now, early):
            return []
        self._woken_at = self._cache.revision
        return self._who_fits()

    def promised(self, uid: str) -> bool:
        """Whether a request is being given a place just now, by this leader."""
        self._prune()
        return uid in self._promises

    # How it knows

    def _on_update(self, update: CacheUpdate) -> None:
        for change in update.changes:
            if change.kind.model is LabWorker:
                self._changed.add((change.item.namespace, change.item.name))
            old, new = (item.resource if item else None for item in (change.old, change.new))
            if isinstance(old, LabInstanceRequest):
                self._waiting.pop(old.uid, None)
            if isinstance(new, LabInstanceRequest):
                self._note(new)
            for record in (old, new):
                if isinstance(record, LabRecord):
                    self._changed.add((record.namespace, record.spec.worker_ref))

    def _note(self, request: LabInstanceRequest) -> None:
        if waits(request):
            wanted = wanted_of(request, self._settings.instances_early_start)
            self._waiting[request.uid] = ((request.namespace, request.name), wanted)

    def _begin(self, ctx: Context) -> None:
        """A new term, or another line of the store's history, begins with nothing: it has passed a barrier."""
        [guard] = ctx.guards()
        epoch = (guard.create_revision, self._cache.storage.generation)
        if epoch != self._epoch:
            self._epoch, self._last, self._woken_at = epoch, ("", ""), -1
            self._promises.clear()

    def _prune(self) -> None:
        """Drop the promises whose outcome the cache shows: placed, gone, or not wanted any more."""
        now, early = self._clock.now(), self._settings.instances_early_start
        kind = self._cache.registry.of(LabInstanceRequest)
        for uid, promise in list(self._promises.items()):
            asked = promise.request
            item = self._cache.item(kind, asked.namespace, asked.name)
            if item is None:
                del self._promises[uid]
                continue
            current = item.resource
            if not isinstance(current, LabInstanceRequest):
                continue  # this version cannot read what it has become
            # A place is written down only in the very state that asked: one that the cache shows later decides.
            later = current.revision > asked.revision
            if current.uid != uid or placed(current) or (later and not wants_place(current, now, early)):
                del self._promises[uid]

    def _kept_promise(self, request: LabInstanceRequest, need: Need) -> WorkerRef | None:
        """The place that is promised to it already; a promise that cannot be kept is dropped."""
        promise = self._promises.get(request.uid)
        if promise is None:
            return None
        if promise.need == need and self._can_keep(promise):
            self._promises[request.uid] = _Promise(promise.place, need, request)
            return promise.place
        self._withdraw(request)
        return None

    def _withdraw(self, request: LabInstanceRequest) -> None:
        """A promise is not taken up: no change tells those that it kept waiting, so they are told here."""
        del self._promises[request.uid]
        for key in self._who_fits():
            if key != (request.namespace, request.name):
                self._hints.tell(key)

    def _can_keep(self, promise: _Promise) -> bool:
        uid, place = promise.request.uid, self._place_named(promise.place)
        if place is None or place.closed or place.ref != promise.place:
            return False
        worker = self._cache.get(LabWorker, place.ref.namespace, place.ref.name)
        reserved = worker.status.allocations.get(uid) if worker is not None else None
        free = place.free + reserved if reserved is not None else place.free
        return free.holds(promise.need)

    def _place_named(self, ref: WorkerRef) -> Place | None:
        """A place as the cache shows it, without promises."""
        if ref.kind == "Engine":
            return engine_place(self._engine(), self._settings, self._used_on_engine())
        worker = self._cache.get(LabWorker, ref.namespace, ref.name)
        return place_of(worker, foreign_labs(self._cache, ref.namespace, ref.name)) if worker is not None else None

    async def _pass(self) -> None:
        """Decide for everybody who has asked."""
        self._prune()
        asks = dict(self._asks)
        waiting = self._all_waiting(asks)
        places, rules = self._known(waiting, asks)
        began = self._clock.monotonic()
        for uid, decision in plan(waiting, places, rules, asks.keys()):
            ask = asks.get(uid)
            if ask is not None and self._asks.get(uid) is ask:
                self._decide(ask, decision)
            if self._clock.monotonic() - began > _TURN:
                await self._clock.sleep(0)
                began = self._clock.monotonic()

    def _decide(self, ask: _Ask, decision: WorkerRef | Waits) -> None:
        ask.decision, need = decision, ask.request.status.need
        if isinstance(decision, WorkerRef) and need is not None:
            self._promises[ask.request.uid] = _Promise(decision, need, ask.request)
            self._last = (decision.namespace, decision.name)

    def _all_waiting(self, asks: Mapping[str, _Ask]) -> list[Wanted]:
        """All that wait and were promised nothing; those who ask are as they say, and ready."""
        early = self._settings.instances_early_start
        asking = (wanted_of(ask.request, early) for ask in asks.values())
        return [
            *(replace(wanted, ready=True, begins=None, ends=None) for wanted in asking),
            *(w for uid, (_, w) in self._waiting.items() if uid not in asks and uid not in self._promises),
        ]

    def _who_fits(self) -> list[Key]:
        """Those that wait and would have a place if all of them asked now."""
        self._prune()
        waiting = self._all_waiting({})
        return [self._waiting[uid][0] for uid in who_fits(waiting, *self._known(waiting, {}))]

    def _known(self, waiting: Iterable[Wanted], asks: Mapping[str, _Ask]) -> tuple[list[Place], Rules]:
        """All places as they are with what was promised on them, and the rules."""
        for key in self._changed:
            worker = self._cache.get(LabWorker, *key)
            if worker is None:
                self._workers.pop(key, None)
            else:
                self._workers[key] = place_of(worker, foreign_labs(self._cache, *key))
        self._changed.clear()
        places = dict(self._workers)
        engine = engine_place(self._engine(), self._settings, self._used_on_engine())
        if engine is not None:
            places[engine.order] = engine
        for uid, promise in self._promises.items():
            place = places.get((promise.place.namespace, promise.place.name))
            if place is not None and not self._is_reserved(uid, promise.place):
                places[place.order] = replace(place, used=place.used + promise.need)
        held = {
            uid: Held(self._workers[worker.namespace, worker.name].ref, Amount() + worker.status.allocations[uid])
            for uid in asks
            for worker in self._allocations.holders(uid)
        }
        rules = Rules(self._clock.now(), self._settings.instances_placement, self._quota(waiting), self._last, held)
        if self._settings.docker_host:
            rules = replace(rules, no_engine="the engine for containers does not answer")
        return list(places.values()), rules

    def _is_reserved(self, uid: str, place: WorkerRef) -> bool:
        """Whether a promise is in the worker's books already."""
        worker = self._cache.get(LabWorker, place.namespace, place.name) if place.kind == "LabWorker" else None
        return worker is not None and uid in worker.status.allocations

    def _used_on_engine(self) -> Amount:
        used = Amount()
        told = self._engine()
        for request in self._cache.by_index(LabInstanceRequest, "worker", f"{ENGINE.namespace}/{ENGINE.name}"):
            ref = request.status.worker_ref
            if told is None or ref is None or ref.uid in ("", told.id):  # what is on another engine takes nothing here
                used += request.status.need or Need()
        return used

    def _quota(self, waiting: Iterable[Wanted]) -> Quota:
        """The limits, and how many have or are promised a place."""
        per_student, per_namespace = (
            self._settings.instances_most_per_student,
            self._settings.instances_most_per_namespace,
        )
        students: Counter[tuple[str, str]] = Counter()
        namespaces: Counter[str] = Counter()
        for promise in self._promises.values():
            request = promise.request
            students[request.namespace, student_of(request)] += 1
            namespaces[request.namespace] += 1
        if per_student:
            for student in {wanted.student for wanted in waiting}:
                for request in self._cache.by_index(LabInstanceRequest, "student", student):
                    students[request.namespace, student] += request.status.phase in PLACED
        if per_namespace:
            for phase in PLACED:
                for request in self._cache.by_index(LabInstanceRequest, "phase", phase.value):
                    namespaces[request.namespace] += 1
        return Quota(per_student, per_namespace, students, namespaces)
