"""Many watchers over one cache: a ring of past revisions from which each reads at its own pace.

A subscription delivers every change of a kind after a revision, whole revisions in order, or raises `HistoryGone`; it
never skips. What the ring no longer holds is replayed from the store and joined to the ring without gap or repeat. A
subscription buffers nothing itself: a slow reader falls behind in the ring, then out of it, and delays nobody.
A revision may carry several changes, and an event's resourceVersion does not prove that its siblings were seen: a
subscription from N repeats N's own changes when there were several. Called by the API's watches.
"""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

from lrm.cache import Cache, CacheUpdate, Change, Item
from lrm.errors import CacheBehind, HistoryGone, Undecodable
from lrm.kind import Kind
from lrm.resource import AnyResource
from storage.base import Batch, Entry, Event, Watch
from storage.clock import Clock
from storage.errors import Compacted, FutureRevision, StoreReset

Selector = Callable[[AnyResource], bool]
"""Whether an object is one that the watcher wants."""

_SCAN_SLICE = 500
"""Revisions that a reader looks at before it lets others run."""
_PRUNE_STEP = 64
_REPLAYS = 4
_REPLAY_MOST = 8
"""A replay may take so many times the wait for one revision: a slow reader must not hold one of the few for long."""


@dataclass(frozen=True, slots=True)
class RingLimits:
    """How much history the ring keeps, in changes; the time rule applies between the two numbers."""

    seconds: float = 75.0
    """A client that lists (60 s at most) and then watches finds its place."""
    least: int = 2_048
    most: int = 100_000


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """What a watcher is told; `revision` is the resourceVersion to show, the deleting one for DELETED."""

    type: Literal["ADDED", "MODIFIED", "DELETED"]
    item: Item
    revision: int


@dataclass(frozen=True, slots=True)
class Delivery:
    """A watcher has now seen everything up to the end of `revision`; without events it is a bookmark."""

    revision: int
    events: tuple[WatchEvent, ...] = ()


@dataclass(frozen=True, slots=True)
class _Past:
    revision: int
    changes: tuple[Change, ...]
    at: float


class Fanout:
    """See the module; made before or after the cache's first list, subscribed to after it."""

    def __init__(
        self,
        cache: Cache,
        clock: Clock,
        *,
        limits: RingLimits = RingLimits(),
        bookmark_seconds: float = 15.0,
        replay_seconds: float = 30.0,
    ) -> None:
        self.cache = cache
        self.clock = clock
        self.bookmark_seconds = bookmark_seconds
        self.replay_seconds = replay_seconds
        self.replays = asyncio.Semaphore(_REPLAYS)
        self._limits = limits
        self._ring: list[_Past] = []
        self._first = 0
        """The absolute index of the ring's oldest revision; readers keep absolute indexes."""
        self._held = 0
        self._news: dict[str, asyncio.Event] = {kind.plural: asyncio.Event() for kind in cache.registry}
        self._synced = cache.synced
        self.floor = cache.revision
        """The ring holds every change above this revision."""
        self.head = cache.revision
        self.unproven = 0
        """The store's history below this revision may be another one than clients have seen: it is not replayed."""
        self.broken = 0
        """Counts relists; a subscription does not outlive one."""
        self.stopped = False
        self.readers = 0
        """Open subscriptions."""
        self._unsubscribe = cache.subscribe(self._on_update)

    def stop(self) -> None:
        """End every subscription: readers see the end of their iteration."""
        if not self.stopped:
            self.stopped = True
            self._unsubscribe()
            self._wake(self._news)

    @asynccontextmanager
    async def subscribe(
        self,
        kind: Kind[Any],
        namespace: str = "",
        selector: Selector | None = None,
        after_revision: int = 0,
        *,
        repeat: bool = True,
    ) -> AsyncIterator[Subscription]:
        """Every change after a revision; `repeat` False when the caller has surely seen all of that revision.

        Entering and iterating raise `HistoryGone`, and what the store raises while history is replayed.
        """
        if not self._synced:
            raise CacheBehind(f"the cache is not filled yet: {self.cache.error}")
        if after_revision > self.head:
            raise HistoryGone(f"revision {after_revision} has not happened yet: the cache is at {self.head}")
        async with AsyncExitStack() as stack:
            subscription = Subscription(self, _View(kind, namespace, selector), after_revision, repeat=repeat)
            await subscription.open(stack)
            self.readers += 1
            try:
                yield subscription
            finally:
                self.readers -= 1

    def news(self, plural: str) -> asyncio.Event:
        """Set when something happens to a kind after this call."""
        return self._news[plural]

    def index_after(self, revision: int) -> int:
        """The absolute index of the first revision in the ring above `revision`."""
        return self._first + bisect.bisect_right(self._ring, revision, key=lambda p: p.revision)

    def at(self, index: int) -> _Past | None:
        """The past revision at an absolute index, None after the newest. Raises `HistoryGone` for a forgotten one."""
        place = index - self._first
        if place < 0:
            raise HistoryGone("this watch was too slow: the history it had still to read is no longer kept")
        return self._ring[place] if place < len(self._ring) else None

    def changes_at(self, revision: int) -> tuple[Change, ...]:
        """What happened at exactly this revision, as far as the ring knows."""
        past = self.at(self.index_after(revision - 1))
        return past.changes if past and past.revision == revision else ()

    def _on_update(self, update: CacheUpdate) -> None:
        self.head = update.revision
        if update.relisted:
            self._first += len(self._ring)
            self._ring, self._held = [], 0
            if self._synced:
                self.unproven = self.floor = update.revision
                self.broken += 1
            self._synced, self.floor = True, update.revision
            self._wake(self._news)
        elif update.changes:
            self._ring.append(_Past(update.revision, update.changes, self.clock.monotonic()))
            self._held += len(update.changes)
            self._prune()
            self._wake({change.kind.plural for change in update.changes})

    def _wake(self, plurals: Any) -> None:
        for plural in list(plurals):
            woken, self._news[plural] = self._news[plural], asyncio.Event()
            woken.set()

    def _prune(self) -> None:
        """Forget whole revisions from the old end, several at a time."""
        horizon = self.clock.monotonic() - self._limits.seconds
        held, drop = self._held, 0
        for past in self._ring[:-1]:
            fewer = held - len(past.changes)
            if held <= self._limits.most and (fewer < self._limits.least or past.at > horizon):
                break
            held, drop = fewer, drop + 1
        if drop >= _PRUNE_STEP or (held != self._held and self._held > self._limits.most):
            self.floor = self._ring[drop - 1].revision
            del self._ring[:drop]
            self._first += drop
            self._held = held


class Subscription:
    """One reader's place: iterate it for deliveries. It ends when the fan-out stops."""

    def __init__(self, fanout: Fanout, view: _View, after: int, *, repeat: bool) -> None:
        self.revision = after
        """Everything up to here was delivered."""
        self._fanout = fanout
        self._view = view
        self._repeat = repeat
        self._broken = fanout.broken
        self._index = 0
        self._first: list[Delivery] = []
        self._replay: AsyncIterator[Batch] | None = None
        self._replay_stack: AsyncExitStack | None = None
        self._replay_until = 0.0
        self._bookmark_at = fanout.clock.monotonic() + fanout.bookmark_seconds

    async def open(self, stack: AsyncExitStack) -> None:
        """Find the place in the ring, or begin a replay that leads there. Raises `HistoryGone`."""
        fanout, after = self._fanout, self.revision
        if after < fanout.unproven:
            raise HistoryGone(f"the cache was filled anew at revision {fanout.unproven}, after {after}")
        if after > fanout.floor or (after == fanout.floor and not self._repeat):
            self._index = fanout.index_after(after)
            if self._repeat:
                self._repeat_siblings(fanout.changes_at(after), after)
            return
        await self._begin_replay(stack)

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Delivery:
        """The next revision with something to tell, or a bookmark."""
        if self._first:
            return self._first.pop()
        scanned = 0
        while True:
            if self._fanout.broken != self._broken:
                raise HistoryGone("the cache was filled anew: list again")
            if self._fanout.stopped:
                raise StopAsyncIteration
            if self._replay is not None:
                delivery = await self._next_replayed(self._replay)
            else:
                delivery = await self._next_in_ring()
            if delivery and delivery.events:
                return delivery
            if self._fanout.clock.monotonic() >= self._bookmark_at:
                self._bookmark_at = self._fanout.clock.monotonic() + self._fanout.bookmark_seconds
                return Delivery(self.revision)
            scanned += 1
            if scanned % _SCAN_SLICE == 0:
                await self._fanout.clock.sleep(0)

    async def _next_in_ring(self) -> Delivery | None:
        """The next past revision, else wait until there is one or a bookmark is due."""
        news = self._fanout.news(self._view.kind.plural)
        past = self._fanout.at(self._index)
        if past is None:
            self.revision = max(self.revision, self._fanout.head)
            wait = self._bookmark_at - self._fanout.clock.monotonic()
            if wait > 0:
                await self._wait(news, wait)
            if self._fanout.at(self._index) is None and self._fanout.broken == self._broken:
                self.revision = max(self.revision, self._fanout.head)
            return None
        self._index += 1
        if past.revision <= self.revision:  # the replay has delivered it already
            return None
        self.revision = past.revision
        return Delivery(past.revision, tuple(self._view.events(past.changes)))

    async def _wait(self, news: asyncio.Event, seconds: float) -> None:
        try:
            async with self._fanout.clock.timeout(seconds):
                await news.wait()
        except TimeoutError:
            return

    async def _begin_replay(self, stack: AsyncExitStack) -> None:
        fanout = self._fanout
        self._replay_stack = await stack.enter_async_context(AsyncExitStack())
        try:
            async with fanout.clock.timeout(fanout.replay_seconds):
                await self._replay_stack.enter_async_context(_held(fanout.replays))
                start = max(self.revision - (1 if self._repeat else 0), 1)
                watch: Watch = await self._replay_stack.enter_async_context(
                    fanout.cache.storage.watch(fanout.cache.registry.prefix, start)
                )
                # So that the replay has an event to meet the ring at, however quiet the store is.
                await fanout.cache.barrier()
        except (Compacted, FutureRevision, StoreReset) as error:
            raise HistoryGone(f"the store cannot replay what came after revision {self.revision}: {error}") from error
        except TimeoutError as error:
            raise HistoryGone("the history was not replayed in time: too many watches ask for old revisions") from error
        self._replay = aiter(watch)
        self._replay_until = fanout.clock.monotonic() + _REPLAY_MOST * fanout.replay_seconds

    async def _next_replayed(self, replay: AsyncIterator[Batch]) -> Delivery | None:
        fanout = self._fanout
        if fanout.clock.monotonic() > self._replay_until:
            raise HistoryGone("this watch was too slow to read the old history that it asked for")
        try:
            async with fanout.clock.timeout(fanout.replay_seconds):
                batch = await anext(replay)
        except (Compacted, FutureRevision, StoreReset) as error:
            raise HistoryGone(f"the store cannot replay what came after revision {self.revision}: {error}") from error
        except TimeoutError as error:
            raise HistoryGone("the history was not replayed in time") from error
        changes = [c for event in batch.events for c in self._change_of(event)]
        if batch.revision == self.revision:
            self._repeat_siblings(tuple(changes), batch.revision)
            return self._first.pop() if self._first else None
        if batch.revision < self.revision:
            return None
        self.revision = batch.revision
        if batch.revision >= fanout.floor:
            self._index = fanout.index_after(batch.revision)
            self._replay = None
            if self._replay_stack:
                await self._replay_stack.aclose()
        return Delivery(batch.revision, tuple(self._view.events(changes)))

    def _repeat_siblings(self, changes: tuple[Change, ...], revision: int) -> None:
        mine = [c for c in changes if c.kind is self._view.kind]
        if len(mine) > 1:
            self._first.append(Delivery(revision, tuple(self._view.events(mine))))

    def _change_of(self, event: Event) -> Iterator[Change]:
        kind, namespace, name = self._fanout.cache.registry.parse_key(event.entry.key)
        if kind is not self._view.kind:
            return
        entry, previous = event.entry, event.previous
        old = _item(kind, namespace, name, previous) if previous else None
        if event.kind == "delete":
            if old is None:
                raise HistoryGone(f"the store no longer knows what was deleted at revision {entry.revision}")
            yield Change("DELETED", kind, entry.revision, old, None)
            return
        if old is None and entry.create_revision != entry.revision:
            raise HistoryGone(f"the store no longer knows what changed at revision {entry.revision}")
        new = _item(kind, namespace, name, entry)
        yield Change("MODIFIED" if old else "ADDED", kind, entry.revision, old, new)


@dataclass(frozen=True, slots=True)
class _View:
    """What of a revision's changes a watcher sees: entering its selection is ADDED, leaving it DELETED."""

    kind: Kind[Any]
    namespace: str
    selector: Selector | None

    def events(self, changes: tuple[Change, ...] | list[Change]) -> Iterator[WatchEvent]:
        for change in changes:
            if change.kind is self.kind and self.namespace in ("", change.item.namespace):
                event = self._event(change)
                if event:
                    yield event

    def _event(self, change: Change) -> WatchEvent | None:
        """None where nothing changes for the watcher.

        An object that cannot be decoded is not announced, and not reported as gone either; what follows such a state
        is told to everybody who may have seen the object before it.
        """
        old, new, revision = change.old, change.new, change.revision
        if new is None:
            return WatchEvent("DELETED", change.item, revision) if old and self._wants(old, blind=True) else None
        if new.resource is None:
            return None
        had = old is not None and self._wants(old, blind=True)
        if self._wants(new, blind=False):
            return WatchEvent("MODIFIED" if had else "ADDED", new, revision)
        if had:
            gone = old if old and old.resource is not None else new
            return WatchEvent("DELETED", gone, revision)
        return None

    def _wants(self, item: Item, *, blind: bool) -> bool:
        if item.resource is None:
            return blind
        return self.selector is None or self.selector(item.resource)


@asynccontextmanager
async def _held(semaphore: asyncio.Semaphore) -> AsyncIterator[None]:
    async with semaphore:
        yield


def _item(kind: Kind[Any], namespace: str, name: str, entry: Entry) -> Item:
    try:
        return Item(kind, namespace, name, entry, kind.decode(entry).seal())
    except Undecodable as error:
        return Item(kind, namespace, name, entry, None, str(error))
