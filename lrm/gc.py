"""Garbage collection by owner references: what belonged to an object that is gone goes too.

Promises: an object is deleted only when reads of the store show that each of its owners is gone (no such key, or
another uid there) or is being deleted in the foreground, and only in the state in which it was judged; one owner that
is alive, or that this daemon cannot judge, keeps it, and a paused object is left as it is. An owner deleted in the
foreground goes after the dependants that block it; one whose dependants are to be orphaned goes after their references
to it. Every write is fenced by the term and can be repeated, so that a collector may die anywhere. Owners in a circle
are kept until someone deletes one of them; then they end without waiting for each other. The cache only says where to
look. The daemon runs it under its lock; deletion policies come from `lrm.writes.for_delete`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import structlog

from lrm.cache import Cache, CacheUpdate, Change, Item
from lrm.client import Client
from lrm.crashpoints import crash_point
from lrm.election import Term
from lrm.errors import (
    CacheBehind,
    Forbidden,
    Invalid,
    NotLeading,
    ResourceConflict,
    ResourceNotFound,
    RetryLater,
    Undecodable,
)
from lrm.events import Events, Recorder
from lrm.owners import Owner, Owners, Standing, kind_of
from lrm.queue import WorkQueue
from lrm.registry import Registry
from lrm.resource import AnyResource, OwnerReference
from lrm.writes import FOREGROUND_FINALIZER, ORPHAN_FINALIZER, Propagation, waits_for_dependants
from storage.base import Storage
from storage.clock import Clock
from storage.errors import NoSpace, StorageError, Unavailable

log = structlog.get_logger(__name__)

LOCK = "gc"

CRASH_POINTS = (
    "gc.reference-dropped",
    "gc.child-deleted",
    "gc.child-forgotten",
    "gc.child-orphaned",
    "gc.owner-released",
)
"""Where a collection can be killed; each is after one write and before the next."""

_WORKERS = 4
_DEADLINE = 120.0
"""Seconds for one object; an owner with many dependants to orphan goes on where it was cut off."""
_PAGE = 500

Place = tuple[str, str, str]
"""(plural, namespace, name) of an object."""


@dataclass
class Stats:
    """Counters since the process began."""

    collected: int = 0
    """Objects whose deletion was asked for because their owners are gone or wait for it."""
    orphaned: int = 0
    """Objects that were let go by an owner that was deleted with the policy Orphan."""
    forgotten: int = 0
    """Objects of kinds with `forgotten_with_owner` whose keys were deleted."""
    released: int = 0
    """Owners whose deletion policy was carried out."""
    errors: int = 0


class GarbageCollector:
    """See the module; `run` may be called again with a later term."""

    name = "gc"
    lock_name = LOCK

    def __init__(
        self,
        storage: Storage,
        registry: Registry,
        cache: Cache,
        client: Client,
        clock: Clock,
        *,
        resync: float = 300.0,
        events: Events | None = None,
    ) -> None:
        """`resync` is the seconds between two looks through the whole cache, in case something was not heard of."""
        self.stats = Stats()
        self.queue: WorkQueue[Place] = WorkQueue(clock)
        self._storage = storage
        self._registry = registry
        self._cache = cache
        self._client = client
        self._clock = clock
        self._resync = resync
        self._events = events
        self._owners = Owners(storage, registry)
        self._gate = asyncio.Lock()
        self._store_was_away = False

    async def run(self, term: Term) -> None:
        """Collect until the term ends (returns) or the task is cancelled; the queue starts empty each time."""
        self.queue = WorkQueue(self._clock)
        await self._cache.catch_up(self.name)
        unsubscribe = self._cache.subscribe(self._on_update)
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(self._work(term)) for _ in range(_WORKERS)]
                running.append(tasks.create_task(self._sweep_now_and_then()))
                await term.wait_lost()
                self.queue.close()
                for task in running:
                    task.cancel()
        finally:
            unsubscribe()

    async def drain(self, seconds: float) -> None:
        """Begin nothing more and let what is in hand end, for so long at most."""
        if not await self.queue.drain(seconds):
            log.warning("gc.drain_timed_out", left=self.queue.processing)

    def finalizers(self) -> dict[str, Any]:
        """How many objects wait for their dependants, are in hand, and were let go by this daemon."""
        policies = {FOREGROUND_FINALIZER, ORPHAN_FINALIZER}
        deleting = [r for k in self._registry for i in self._cache.items(k) if (r := i.resource) and r.deleting]
        return {
            "name": self.name,
            "finalizer": f"{FOREGROUND_FINALIZER}, {ORPHAN_FINALIZER}",
            "pending": sum(not policies.isdisjoint(r.metadata.finalizers) for r in deleting),
            "processing": self.queue.processing,
            "completed": self.stats.released,
        }

    def describe(self) -> dict[str, Any]:
        """Its entry in the status: what waits, what is in hand, and the counters of `Stats`."""
        return {
            "name": self.name,
            "lock": self.lock_name,
            "queued": len(self.queue),
            "delayed": self.queue.waiting,
            "processing": self.queue.processing,
            "oldestQueuedSeconds": round(self.queue.oldest(), 3),
            "longestRunningSeconds": round(self.queue.longest_running(), 3),
            "collected": self.stats.collected,
            "orphaned": self.stats.orphaned,
            "forgotten": self.stats.forgotten,
            "errors": self.stats.errors,
        }

    # What to look at: the cache's view, which is never acted upon

    async def _sweep_now_and_then(self) -> None:
        while True:
            self._sweep()
            await self._clock.sleep(self._resync)

    def _sweep(self) -> None:
        for kind in self._registry:
            for item in self._cache.items(kind):
                self._consider(item)

    def _on_update(self, update: CacheUpdate) -> None:
        # An opaque value that is gone, or can be read now, may have been anybody's owner or dependant.
        if update.relisted or any(c.old is not None and c.old.resource is None for c in update.changes):
            self._sweep()
            return
        for change in update.changes:
            self._on_change(change)

    def _on_change(self, change: Change) -> None:
        old = change.old.resource if change.old else None
        new = change.new.resource if change.new else None
        if change.new is not None:
            self._consider(change.new)
        if old is not None and (new is None or _policy(old) != _policy(new)):
            for item in self._cache.dependants(old.uid):
                self._consider(item)
        for reference in old.metadata.owner_references if old is not None else ():
            owner = self._owner_item(change.item.namespace, reference)
            if owner is not None:
                self._consider(owner)

    def _consider(self, item: Item) -> None:
        """Queue an object about which, as far as the cache knows, something is to be done."""
        resource = item.resource
        if resource is None or resource.paused:
            return
        if self._wants_end(resource) or self._lacks_an_owner(item, resource):
            self.queue.add(_place(item))

    def _wants_end(self, resource: AnyResource) -> bool:
        """Whether a deletion policy of this object can be carried out now."""
        if resource.deleting and ORPHAN_FINALIZER in resource.metadata.finalizers:
            return True
        return waits_for_dependants(resource) and not self._blocked(resource)

    def _lacks_an_owner(self, item: Item, resource: AnyResource) -> bool:
        if resource.deleting and not item.kind.forgotten_with_owner:
            return False
        for reference in resource.metadata.owner_references:
            kind = kind_of(self._registry, reference)
            if kind is None:
                continue
            owner = self._cache.item(kind, item.namespace, reference.name)
            if owner is not None and owner.resource is None:
                continue
            if owner is None or owner.resource is None or owner.resource.uid != reference.uid:
                return True
            if waits_for_dependants(owner.resource) and (
                not item.kind.forgotten_with_owner or _held_by_dependants_alone(owner.resource)
            ):
                return True
        return False

    def _owner_item(self, namespace: str, reference: OwnerReference) -> Item | None:
        kind = kind_of(self._registry, reference)
        item = self._cache.item(kind, namespace, reference.name) if kind is not None else None
        if item is None or item.resource is None or item.resource.uid != reference.uid:
            return None
        return item

    def _blocked(self, owner: AnyResource) -> bool:
        """Whether a dependant holds an owner that is being deleted in the foreground.

        One that cannot be read may: it does if it as much as mentions the owner. One that in turn waits for this owner
        does not, or both would wait for ever.
        """
        children = (item.resource for item in self._cache.dependants(owner.uid))
        if any(child is not None and self._blocks(child, owner) for child in children):
            return True
        mark = owner.uid.encode()
        return any(item.namespace == owner.namespace and mark in item.entry.value for item in self._cache.opaque())

    def _blocks(self, child: AnyResource, owner: AnyResource) -> bool:
        if child.namespace != owner.namespace or child.uid == owner.uid:
            return False
        blocks = any(r.uid == owner.uid and r.block_owner_deletion for r in child.metadata.owner_references)
        return blocks and not (waits_for_dependants(child) and self._is_ancestor(child, owner))

    def _is_ancestor(self, candidate: AnyResource, resource: AnyResource) -> bool:
        known: set[str] = set()
        above = [resource]
        for descendant in above:  # grows while it is walked
            for reference in descendant.metadata.owner_references:
                if reference.uid == candidate.uid:
                    return True
                owner = self._owner_item(resource.namespace, reference)
                if owner is not None and owner.resource is not None and reference.uid not in known:
                    known.add(reference.uid)
                    above.append(owner.resource)
        return False

    # What is done: judged by the store

    async def _work(self, term: Term) -> None:
        while (place := await self._next()) is not None:
            try:
                await self._one(place, term)
            finally:
                self.queue.done(place)
            await self._clock.sleep(0)  # an object with nothing to do never waits: let others have the loop

    async def _next(self) -> Place | None:
        """The next object; after the store was away none before it answers again."""
        async with self._gate:
            if self._store_was_away:
                await self._cache.catch_up(self.name)
                self._store_was_away = False
        return await self.queue.get()

    async def _one(self, place: Place, term: Term) -> None:
        bound = log.bind(plural=place[0], namespace=place[1], name=place[2])
        client = self._client.bind(owner=self.name, fence=term)
        try:
            term.check()
            async with self._clock.timeout(_DEADLINE):
                await self._settle(place, client, bound, Recorder(self._events, self.name, term))
        except NotLeading as error:
            bound.warning("gc.not_leading", detail=str(error))
            term.lost()
        except ResourceNotFound:
            self.queue.discard(place)
        except (ResourceConflict, CacheBehind) as error:
            bound.info("gc.again", detail=str(error), delay=self.queue.add_failed(place))
        except Forbidden as error:
            bound.warning("gc.protected", detail=str(error))  # a change of the object wakes us
            self.queue.forget_failures(place)
        except (StorageError, Invalid, Undecodable, RetryLater, TimeoutError) as error:
            self._store_was_away |= isinstance(error, Unavailable) and not isinstance(error, NoSpace)
            self.stats.errors += 1
            bound.warning(
                "gc.failed", error=str(error) or f"not done in {_DEADLINE:g} s", delay=self.queue.add_failed(place)
            )
        except Exception:  # noqa: BLE001 - one object's trouble must not end the collection of all others
            self.stats.errors += 1
            bound.exception("gc.failed", delay=self.queue.add_failed(place))
        else:
            self.queue.forget_failures(place)

    async def _settle(self, place: Place, client: Client, bound: Any, events: Recorder) -> None:
        plural, namespace, name = place
        kind = self._registry.by_plural(plural)
        if kind is None:
            raise LookupError(f"no kind {plural} is known")
        resource: AnyResource = await client.get(kind.model, namespace, name)
        if resource.paused:
            return  # the end of the pause wakes us
        owned = resource.metadata.owner_references and (kind.forgotten_with_owner or not resource.deleting)
        if owned and await self._judge(resource, client, bound, events):
            return
        if resource.deleting and ORPHAN_FINALIZER in resource.metadata.finalizers:
            await self._orphan_dependants(resource, client, bound)
        elif waits_for_dependants(resource):
            await self._release_owner(resource, client, bound)

    async def _judge(self, resource: AnyResource, client: Client, bound: Any, events: Recorder) -> bool:
        """Delete an object none of whose owners wants it any more, in exactly the state that is judged.

        True when something was written, here or by whoever was faster.
        """
        references = resource.metadata.owner_references
        owners = [(r, await self._owners.find(resource.namespace, r)) for r in references]
        unwanted = [r for r, owner in owners if owner.standing in (Standing.GONE, Standing.WAITING)]
        if len(unwanted) < len(references):
            if unwanted:
                await self._drop(resource, unwanted, client)
                bound.info("gc.references_dropped", owners=[r.uid for r in unwanted])
            return bool(unwanted)
        waiting = [owner for _, owner in owners if owner.standing is Standing.WAITING]
        if self._registry.of_object(resource).forgotten_with_owner:
            if not all(_held_by_dependants_alone(owner.resource) for owner in waiting):
                return False  # a change of the owner wakes us
            await client.forget(resource, retry=False)
            self.stats.forgotten += 1
            bound.info("gc.forgotten", uid=resource.uid)
            crash_point("gc.child-forgotten")
            return True
        policy = self._policy_below(resource, waiting)
        await client.delete(resource, propagation=policy, retry=False)
        self.stats.collected += 1
        bound.info("gc.collected", uid=resource.uid, policy=policy, owners=[r.uid for r in references])
        owned_by = ", ".join(f"{r.kind}/{r.name}" for r in references)
        events.record(resource, "Normal", "Collected", f"deletion was asked for: it belonged to {owned_by}")
        crash_point("gc.child-deleted")
        return True

    def _policy_below(self, resource: AnyResource, waiting: list[Owner]) -> Propagation:
        """In the foreground a tree goes from its leaves up, except where an object says that its own are to stay."""
        foreground = bool(waiting) and ORPHAN_FINALIZER not in resource.metadata.finalizers
        return "Foreground" if foreground and self._cache.dependants(resource.uid) else ""

    async def _drop(self, resource: AnyResource, unwanted: list[OwnerReference], client: Client) -> None:
        def drop(r: AnyResource) -> None:
            r.metadata.owner_references = [x for x in r.metadata.owner_references if x not in unwanted]

        await client.update(resource, drop, retry=False)
        crash_point("gc.reference-dropped")

    async def _orphan_dependants(self, owner: AnyResource, client: Client, bound: Any) -> None:
        """Let all dependants go, then the owner: not before a list at one revision shows none that refers to it."""

        def let_go(r: AnyResource) -> None:
            r.metadata.owner_references = [x for x in r.metadata.owner_references if x.uid != owner.uid]

        while dependants := await self._dependants_in_store(owner):
            for child in dependants:
                try:
                    await client.update(child, let_go)
                except ResourceNotFound:
                    continue  # it has ended by itself
                self.stats.orphaned += 1
                crash_point("gc.child-orphaned")
        await client.remove_finalizer(owner, ORPHAN_FINALIZER)
        self.stats.released += 1
        bound.info("gc.owner_released", uid=owner.uid, policy="Orphan")
        crash_point("gc.owner-released")

    async def _release_owner(self, owner: AnyResource, client: Client, bound: Any) -> None:
        """Let an owner go whose blocking dependants are gone from everything that was written before now."""
        try:
            await self._cache.barrier()
        except NoSpace:
            if any(self._blocks(child, owner) for child in await self._dependants_in_store(owner)):
                return  # its end wakes us
        if self._blocked(owner):
            return  # a change of who blocks it wakes us
        await client.remove_finalizer(owner, FOREGROUND_FINALIZER)
        self.stats.released += 1
        bound.info("gc.owner_released", uid=owner.uid, policy="Foreground")
        crash_point("gc.owner-released")

    async def _dependants_in_store(self, owner: AnyResource) -> list[AnyResource]:
        """All objects that refer to an owner, by a list at one revision.

        Raises `RetryLater` for one that this daemon cannot read and that mentions the owner: it may refer to it.
        """
        mark, own_key = owner.uid.encode(), self._registry.key_of(owner)
        found: list[AnyResource] = []
        token = ""
        while True:
            page = await self._storage.list(self._registry.prefix, limit=_PAGE, continue_token=token)
            for entry in page.entries:
                kind, namespace, _ = self._registry.parse_key(entry.key)
                if mark not in entry.value or namespace != owner.namespace or entry.key == own_key:
                    continue
                try:
                    resource = kind.decode(entry) if kind is not None else None
                except Undecodable:
                    resource = None
                if resource is None:
                    raise RetryLater(f"{entry.key} cannot be read by this version and may belong to {own_key}")
                if any(r.uid == owner.uid for r in resource.metadata.owner_references):
                    found.append(resource)
            token = page.continue_token
            if not token:
                return found


def _place(item: Item) -> Place:
    return item.kind.plural, item.namespace, item.name


def _policy(resource: AnyResource) -> tuple[bool, list[str]]:
    """The part of an object on which its dependants' fate depends."""
    return resource.deleting, resource.metadata.finalizers


def _held_by_dependants_alone(owner: AnyResource | None) -> bool:
    return owner is not None and owner.metadata.finalizers == [FOREGROUND_FINALIZER]
