"""The daemon's picture of all objects: listed once, then kept by one watch; controllers and the API read from it.

It shows every kind at one revision. Objects are sealed and shared: never change one, `thaw` it. Only a DELETE event,
or absence from a complete list at one revision, is a deletion; a failed list or a broken watch changes nothing.
After `Compacted` or `StoreReset` it lists again and tells the difference. What cannot be decoded is kept as an opaque
item, counted, and logged once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import structlog

from lrm.errors import CacheBehind, Undecodable
from lrm.kind import Kind, R
from lrm.registry import Registry
from lrm.resource import AnyResource
from storage.base import Batch, Entry, Event, Storage, Watch, check_generation
from storage.clock import Clock
from storage.errors import Compacted, FutureRevision, NoSpace, StorageError, StoreReset

log = structlog.get_logger(__name__)

_PAGE = 500
_RETRY_FIRST, _RETRY_MOST = 0.2, 5.0
_DEAF_RECHECK = 0.2
_CATCH_UP_RETRY = 0.5
_BARRIER_AFTER = 0.2
"""Seconds to wait for a revision before a barrier is written: the revision may lie outside the watched prefix."""
BARRIER_TIMEOUT = 3.0
"""Seconds that a consistent read waits for the cache."""


@dataclass(frozen=True, slots=True)
class Item:
    """A key as the cache holds it; `resource` is None where the value cannot be decoded."""

    kind: Kind[Any]
    namespace: str
    name: str
    entry: Entry
    resource: AnyResource | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to one object at `revision`; a replaced incarnation is a DELETED and an ADDED."""

    type: Literal["ADDED", "MODIFIED", "DELETED"]
    kind: Kind[Any]
    revision: int
    old: Item | None
    new: Item | None

    @property
    def item(self) -> Item:
        """The state after the change; for DELETED the last one known."""
        return cast("Item", self.new or self.old)


@dataclass(frozen=True, slots=True)
class CacheUpdate:
    """All changes of one revision; `relisted` means that history before it is not known to the cache.

    `reset` means that the store began another line: revisions of before say nothing any more. `missed` means that the
    subscriber failed in the update before, which is `relisted` for it then: it cannot know what of it was not heard.
    """

    revision: int
    changes: tuple[Change, ...]
    relisted: bool = False
    reset: bool = False
    missed: bool = False


Subscriber = Callable[[CacheUpdate], None]
"""Called in order, on the event loop, after the cache holds the changes; must not block or raise.

One that raises all the same is logged once, costs nobody else anything, and is told at once that it missed something.
"""


@dataclass
class _Shelf:
    """One kind's items and indexes."""

    kind: Kind[Any]
    items: dict[tuple[str, str], Item] = field(default_factory=dict)
    index: dict[tuple[str, str], dict[tuple[str, str], None]] = field(default_factory=dict)

    def put(self, item: Item) -> None:
        place = (item.namespace, item.name)
        self.drop(place)
        self.items[place] = item
        for entry in _index_entries(item):
            self.index.setdefault(entry, {})[place] = None

    def drop(self, place: tuple[str, str]) -> Item | None:
        item = self.items.pop(place, None)
        if item:
            for entry in _index_entries(item):
                holders = self.index.get(entry, {})
                holders.pop(place, None)
                if not holders:
                    self.index.pop(entry, None)
        return item


class Cache:
    """See the module. `run` is its one task; everything else may be called at any time."""

    def __init__(self, storage: Storage, registry: Registry, clock: Clock) -> None:
        self._storage = storage
        self._registry = registry
        self._clock = clock
        self._shelves = {kind.plural: _Shelf(kind) for kind in registry}
        self._subscribers: list[Subscriber] = []
        self._mistakes: set[str] = set()
        """Subscribers that have raised, so that each is logged once."""
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []
        self._watch: Watch | None = None
        self._watching = asyncio.Event()
        """Set while `_watch` is there."""
        self._synced = asyncio.Event()
        self._undecodable: set[str] = set()
        """Keys whose values were reported, so that each is logged once."""
        self._need_list = True
        self._generation = 0
        """The store's when it was listed."""
        self._reset = False
        """The store began another line, which is not listed yet."""
        self._deaf_since = clock.monotonic()
        self.revision = 0
        self.error: str = "the first list is not complete"
        """Why the cache is not being kept up to date just now; empty while it is."""

    @property
    def deaf_seconds(self) -> float:
        """For how long nothing of the store's changes can have been heard; 0 while a watch has a stream."""
        return self._clock.monotonic() - self._deaf_since if self._watch is None else self._watch.lost_seconds

    @property
    def storage(self) -> Storage:
        """The store that this cache follows."""
        return self._storage

    @property
    def registry(self) -> Registry:
        """The kinds that it holds."""
        return self._registry

    @property
    def current(self) -> bool:
        """Whether `revision` is one of the store's line: not between a reset and the list that follows it."""
        return not self._reset

    @property
    def synced(self) -> bool:
        """Whether the first list was complete."""
        return self._synced.is_set()

    async def wait_synced(self) -> None:
        """Return when the first list is complete."""
        await self._synced.wait()

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Be told of each revision from now on; the result ends it."""
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber)

    def get(self, model: type[R], namespace: str, name: str) -> R | None:
        """One object, or None when the cache has none (or only an undecodable value)."""
        item = self.item(self._registry.of(model), namespace, name)
        return cast("R | None", item.resource) if item else None

    def all(self, model: type[R], namespace: str = "") -> list[R]:
        """All decodable objects of a kind, in one namespace or all, in key order."""
        items = self.items(self._registry.of(model), namespace)
        return [cast("R", i.resource) for i in items if i.resource is not None]

    def by_index(self, model: type[R], index: str, value: str) -> list[R]:
        """The objects found under a value: `owner` (uid), `label` (key=value), or an index of the kind."""
        shelf = self._shelves[self._registry.of(model).plural]
        places = sorted(shelf.index.get((index, value), ()))
        return [cast("R", shelf.items[p].resource) for p in places]

    def item(self, kind: Kind[Any], namespace: str, name: str) -> Item | None:
        return self._shelves[kind.plural].items.get((namespace, name))

    def items(self, kind: Kind[Any], namespace: str = "") -> list[Item]:
        """All items of a kind, opaque ones too, in key order."""
        items = self._shelves[kind.plural].items
        return [items[p] for p in sorted(items) if not namespace or p[0] == namespace]

    def namespaces(self) -> set[str]:
        """The namespaces in use."""
        return {place[0] for shelf in self._shelves.values() for place in shelf.items}

    def counts(self) -> dict[str, int]:
        """Objects by plural."""
        return {plural: len(shelf.items) for plural, shelf in self._shelves.items()}

    def dependants(self, uid: str) -> list[Item]:
        """The objects of any kind that name this owner."""
        shelves = self._shelves.values()
        return [shelf.items[place] for shelf in shelves for place in shelf.index.get(("owner", uid), ())]

    def opaque(self) -> list[Item]:
        """The items whose values this daemon cannot decode."""
        found = (self._registry.parse_key(key) for key in sorted(self._undecodable))
        items = (self.item(kind, namespace, name) for kind, namespace, name in found if kind is not None)
        return [item for item in items if item is not None]

    @property
    def undecodable(self) -> int:
        """How many stored values this daemon cannot decode."""
        return sum(item.resource is None for shelf in self._shelves.values() for item in shelf.items.values())

    async def wait_for(self, revision: int, timeout: float = BARRIER_TIMEOUT) -> None:
        """Return when the cache holds `revision`. Raises `CacheBehind` after `timeout` seconds, `StoreReset`."""
        if self.revision >= revision and not self._reset:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((revision, waiter))
        try:
            async with self._clock.timeout(timeout):
                try:
                    async with self._clock.timeout(min(_BARRIER_AFTER, timeout)):
                        await asyncio.shield(waiter)
                except TimeoutError:
                    if self._watch is not None:
                        await self._watch.barrier(timeout)
                    await waiter
        except TimeoutError as error:
            why = f": {self.error}" if self.error else ""
            raise CacheBehind(f"the cache is at revision {self.revision}, not yet at {revision}{why}") from error
        finally:
            waiter.cancel()
            self._waiters = [w for w in self._waiters if w[1] is not waiter]

    async def barrier(self, timeout: float = BARRIER_TIMEOUT) -> int:
        """Return once the cache holds everything written before this call, and the revision that proves it.

        Raises `CacheBehind`, `Unavailable`, `StoreReset`.
        """
        started = self._clock.monotonic()
        watch = await self._following(timeout)
        revision = await watch.barrier(max(0.05, timeout - (self._clock.monotonic() - started)))
        await self.wait_for(revision, max(0.05, timeout - (self._clock.monotonic() - started)))
        return revision

    async def catch_up(self, who: str) -> None:
        """Return once the cache holds everything written before this call, however long the store is away.

        A store that is out of space takes no barrier; then the cache is believed as it is, for the work that frees
        space must go on. `who` waits is told in the log.
        """
        await self.wait_synced()
        told = False
        while True:
            try:
                await self.barrier()
            except NoSpace:
                return
            except (CacheBehind, StorageError) as error:
                if not told:
                    log.warning("cache.waiting_for_store", who=who, reason=str(error))
                told = True
                await self._clock.sleep(_CATCH_UP_RETRY)
            else:
                return

    async def wait_following(self) -> None:
        """Return once the cache was filled and hears the store."""
        await self.wait_synced()
        while self.deaf_seconds > 0:
            await self._clock.sleep(_DEAF_RECHECK)

    async def _following(self, timeout: float) -> Watch:
        """The open watch: while it is being opened anew, callers wait for it. Raises `CacheBehind`."""
        try:
            async with self._clock.timeout(timeout):
                while self._watch is None:
                    await self._watching.wait()
        except TimeoutError as error:
            raise CacheBehind(f"the cache is not following the store: {self.error}") from error
        return self._watch

    async def run(self) -> None:
        """List, watch, and begin again after any failure; ends only by cancellation."""
        delay = _RETRY_FIRST
        try:
            while True:
                try:
                    if self._need_list:
                        await self._relist()
                    async with self._storage.watch(self._registry.prefix, self.revision, live=True) as watch:
                        check_generation(self._storage, self._generation)
                        self._watch, self.error, delay = watch, "", _RETRY_FIRST
                        self._watching.set()
                        async for batch in watch:
                            self._apply(batch)
                except (Compacted, FutureRevision, StoreReset) as error:
                    self._lost_history(error)
                except StorageError as error:
                    self.error = str(error)
                    tell = log.warning if delay == _RETRY_FIRST else log.debug
                    tell("cache.store_failed", error=str(error), relist=self._need_list)
                    await self._clock.sleep(delay)
                    delay = min(delay * 2, _RETRY_MOST)
                finally:
                    if self._watch is not None:
                        self._deaf_since = self._clock.monotonic()
                    self._watch = None
                    self._watching.clear()
        finally:
            self.error = "stopped"
            self._fail_waiters(CacheBehind("the cache has stopped"))

    def _lost_history(self, error: StorageError) -> None:
        log.warning("cache.relist", reason=type(error).__name__, detail=str(error))
        self._need_list, self.error = True, str(error)
        if isinstance(error, StoreReset):
            self._reset = True
            self._fail_waiters(error)

    async def _relist(self) -> None:
        listed: dict[str, Item] = {}
        token, revision = "", 0
        self._generation = self._storage.generation
        while True:
            page = await self._storage.list(self._registry.prefix, limit=_PAGE, continue_token=token)
            for entry in page.entries:
                item = self._item(entry)
                if item:
                    listed[entry.key] = item
            revision, token = page.revision, page.continue_token
            if not token:
                break
        self._replace(listed, revision)
        self._need_list = False
        self._synced.set()

    def _replace(self, listed: Mapping[str, Item], revision: int) -> None:
        known = {item.entry.key: item for shelf in self._shelves.values() for item in shelf.items.values()}
        changes: list[Change] = []
        for key, old in known.items():
            new = listed.get(key)
            if new is None or new.entry.create_revision != old.entry.create_revision:
                changes.append(self._delete(old, revision))
        for key, new in listed.items():
            before = known.get(key)
            if before is None or before.entry != new.entry:
                changes.append(self._put(new))
        self._undecodable = {key for key, item in listed.items() if item.resource is None}
        reset, self._reset = self._reset, False
        self._publish(CacheUpdate(revision, tuple(changes), relisted=True, reset=reset))

    def _apply(self, batch: Batch) -> None:
        changes = [change for event in batch.events for change in self._changes(event)]
        self._publish(CacheUpdate(batch.revision, tuple(changes)))

    def _changes(self, event: Event) -> Iterator[Change]:
        kind, namespace, name = self._registry.parse_key(event.entry.key)
        if kind is None:
            return
        old = self.item(kind, namespace, name)
        if event.kind == "delete":
            self._undecodable.discard(event.entry.key)
            if old:
                yield self._delete(old, event.entry.revision)
            return
        if old and old.entry.create_revision != event.entry.create_revision:
            yield self._delete(old, event.entry.revision)
        new = self._item(event.entry)
        if new:
            yield self._put(new)

    def _put(self, item: Item) -> Change:
        old = self.item(item.kind, item.namespace, item.name)
        self._shelves[item.kind.plural].put(item)
        return Change("MODIFIED" if old else "ADDED", item.kind, item.entry.revision, old, item)

    def _delete(self, item: Item, revision: int) -> Change:
        self._shelves[item.kind.plural].drop((item.namespace, item.name))
        return Change("DELETED", item.kind, revision, item, None)

    def _item(self, entry: Entry) -> Item | None:
        kind, namespace, name = self._registry.parse_key(entry.key)
        if kind is None:
            return None
        try:
            resource = kind.decode(entry).seal()
        except Undecodable as error:
            if entry.key not in self._undecodable:
                log.exception("cache.undecodable", key=entry.key, revision=entry.revision)
            self._undecodable.add(entry.key)
            return Item(kind, namespace, name, entry, None, str(error))
        self._undecodable.discard(entry.key)
        return Item(kind, namespace, name, entry, resource)

    def _publish(self, update: CacheUpdate) -> None:
        self.revision = update.revision
        for subscriber in tuple(self._subscribers):
            if not self._told(subscriber, update):
                missed = CacheUpdate(update.revision, (), relisted=True, reset=update.reset, missed=True)
                self._told(subscriber, missed)
        for revision, waiter in self._waiters:
            if revision <= self.revision and not waiter.done():
                waiter.set_result(None)

    def _told(self, subscriber: Subscriber, update: CacheUpdate) -> bool:
        """Whether a subscriber took an update: its mistake must end neither the cache nor the daemon."""
        try:
            subscriber(update)
        except Exception:
            who = getattr(subscriber, "__qualname__", repr(subscriber))
            if who not in self._mistakes:
                log.exception("cache.mistake", subscriber=who, revision=update.revision)
            self._mistakes.add(who)
            return False
        return True

    def _fail_waiters(self, error: Exception) -> None:
        for _, waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(error)


def _index_entries(item: Item) -> Iterator[tuple[str, str]]:
    resource = item.resource
    if resource is None:
        return
    for owner in resource.metadata.owner_references:
        yield "owner", owner.uid
    for key, value in resource.metadata.labels.items():
        yield "label", f"{key}={value}"
    for name, values in item.kind.indexes.items():
        for value in values(resource):
            yield name, value
