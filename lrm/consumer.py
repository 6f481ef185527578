"""Every event of some kinds, in the store's order, to one handler: for what must not miss a change, such as exports.

The handler gets one delivery at a time and in order of revisions, at least once while the store keeps the history: what
it has returned from is not repeated after a clean stop, but may be after a crash. A delivery that fails is tried again
in place for as long as it fails. After a gap (the history was compacted, the store was restored, or there is no
bookmark) the handler gets one RESYNC, the current state as SYNC deliveries, and goes on with what follows that state:
**deletions inside the gap are not reported one by one**; what no SYNC has named since the RESYNC is gone. Objects that
cannot be decoded and kinds that this daemon does not know are passed over. Started by the daemon, like controllers.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import structlog

from lrm.bookmarks import Bookmarks
from lrm.election import Term
from lrm.errors import Fenced, NotLeading, RetryLater, Undecodable
from lrm.kind import Kind
from lrm.model import rfc3339
from lrm.queue import BACKOFF_FIRST, BACKOFF_MOST, BACKOFF_SPREAD
from lrm.registry import Registry
from lrm.resource import AnyResource
from storage.base import Batch, Entry, Event, Line, Page, Storage, Watch
from storage.clock import Clock
from storage.errors import Compacted, FutureRevision, GuardFailed, StorageError, StoreReset

log = structlog.get_logger(__name__)

_EXPECTED = (OSError, RetryLater, StorageError)
"""What a handler raises when the world outside fails; anything else is told with its traceback, once."""
_REPLAY_SILENCE = 1.0
_STORE_RETRY_FIRST, _STORE_RETRY_MOST = 0.2, 5.0


@dataclass(frozen=True, slots=True)
class Delivery:
    """What happened to one object, at `revision`; a RESYNC concerns none."""

    type: Literal["ADDED", "MODIFIED", "DELETED", "RESYNC", "SYNC"]
    revision: int
    """That of the event; of a SYNC the one at which the object was written last; of a RESYNC that of the state."""
    kind: Kind[Any] | None = None
    namespace: str = ""
    name: str = ""
    resource: AnyResource | None = None
    """Sealed. The last state for DELETED, None where the store no longer has it."""


Handler = Callable[[Delivery], Awaitable[None]]
"""Returns when the delivery is done with; whatever it raises, it is called with the same one again."""


@dataclass(slots=True)
class ConsumerStats:
    """Counters since the process began."""

    delivered: int = 0
    failures: int = 0
    resyncs: int = 0
    undecodable: int = 0


@dataclass(slots=True)
class _Failing:
    """A delivery that the handler has not taken yet."""

    delivery: Delivery
    since: str
    tries: int
    error: str


class EventConsumer:
    """Feeds one handler while a term lasts; its bookmark bears its name."""

    def __init__(  # noqa: PLR0917 - six things that every consumer is made of
        self,
        name: str,
        handler: Handler,
        storage: Storage,
        registry: Registry,
        clock: Clock,
        bookmarks: Bookmarks,
        *,
        lock_name: str = "",
        kinds: Iterable[Kind[Any]] | None = None,
        deadline: float = 120.0,
    ) -> None:
        """`lock_name` is `name` unless given; `kinds` are all unless given; `deadline` is seconds for one delivery."""
        self.name = name
        self.lock_name = lock_name or name
        self.stats = ConsumerStats()
        self._handler = handler
        self._storage = storage
        self._registry = registry
        self._clock = clock
        self._bookmarks = bookmarks
        self._bookmark = bookmarks.of(name)
        self._kinds = frozenset(k.plural for k in (registry if kinds is None else kinds))
        self._deadline = deadline
        self._line = Line("", "", 0)
        """Where `_position` belongs to."""
        self._position = 0
        """Every event up to here was handled; 0 while a gap is to be closed."""
        self._failing: _Failing | None = None
        self._undecodable: set[str] = set()
        """Keys whose values were reported, so that each is logged once."""
        self._draining = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    async def run(self, term: Term) -> None:
        """Deliver until the term ends or the task is cancelled, then save the bookmark."""
        self._draining.clear()
        try:
            async with asyncio.TaskGroup() as tasks:
                following = tasks.create_task(self._follow(term), name=f"consumer {self.name}")
                await term.wait_lost()
                following.cancel()
        finally:
            self._failing = None
            self._idle.set()
            await self._bookmark.end()

    async def drain(self, seconds: float) -> None:
        """Begin no other revision; return when the one in hand was delivered, or its delivery has failed."""
        self._draining.set()
        try:
            async with self._clock.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            log.warning("consumer.drain_timed_out", consumer=self.name, position=self._position)

    def describe(self) -> dict[str, Any]:
        failing = self._failing
        return {
            "name": self.name,
            "lock": self.lock_name,
            "position": self._position,
            "delivered": self.stats.delivered,
            "failures": self.stats.failures,
            "resyncs": self.stats.resyncs,
            "undecodable": self.stats.undecodable,
            "failing": failing
            and {
                "revision": failing.delivery.revision,
                "type": failing.delivery.type,
                "object": _object(failing.delivery),
                "since": failing.since,
                "tries": failing.tries,
                "error": failing.error,
            },
        }

    async def _follow(self, term: Term) -> None:
        """From the bookmark on, through every failure of the store; returns when drained or no longer leading."""
        self._position = 0
        # The line first: should it change right now, the bookmark of the new one is not taken for one of the old.
        self._line = await self._bookmarks.line()
        self._position = await self._bookmark.begin(term, lambda: self._position) or 0
        log.info("consumer.begins", consumer=self.name, after=self._position or None, term=term.number)
        delay = _STORE_RETRY_FIRST
        while not self._draining.is_set():
            before = self._position
            try:
                await self._watch(term)
            except NotLeading as error:
                log.warning("consumer.not_leading", consumer=self.name, detail=str(error))
                term.lost()
                return
            except Compacted as error:
                self._lost_history(error)
            except (StoreReset, FutureRevision) as error:
                self._lost_history(error)
                self._bookmark.rebase()
            except StorageError as error:
                delay = _STORE_RETRY_FIRST if self._position != before else delay
                log.warning("consumer.store_failed", consumer=self.name, error=str(error), delay=delay)
                await self._clock.sleep(delay)
                delay = min(delay * 2, _STORE_RETRY_MOST)

    def _lost_history(self, error: StorageError) -> None:
        log.warning("consumer.gap", consumer=self.name, after=self._position, reason=str(error))
        self._position = 0

    async def _watch(self, term: Term) -> None:
        """Deliver what comes after the position, a revision at a time; after a gap first the state that there is.

        The watch is opened, and proved to be of the line that the state is of, before the gap is told: so it is told
        once, and what happens while the state is delivered is on its way. Raises what ends the watch.
        """
        async with AsyncExitStack() as replay:
            await replay.enter_async_context(self._bookmarks.replays)
            state = None
            if not self._position:
                self._line = await self._storage.line()
                state = await self._storage.list(self._registry.prefix)
            after = state.revision if state else self._position
            async with self._storage.watch(self._registry.prefix, after) as watch:
                head = await self._storage.line()
                if not head.same_history(self._line) or head.revision < after:
                    raise StoreReset("the store began another line while it was not watched")
                if after >= head.revision or state:
                    await replay.aclose()
                if state and not await self._resync(term, state):
                    return
                while True:
                    batch = await self._next(watch, replay)
                    if self._draining.is_set():
                        return
                    with _Busy(self._idle):
                        if not await self._deliver_all(term, batch.events, replay):
                            return
                        self._position = batch.revision
                    if self._position >= head.revision:
                        await replay.aclose()

    async def _next(self, watch: Watch, replay: AsyncExitStack) -> Batch:
        """The watch's next revision; when none comes for a while all that is old was read."""
        coming = aiter(watch)
        try:
            async with self._clock.timeout(_REPLAY_SILENCE):
                return await anext(coming)
        except TimeoutError:
            await replay.aclose()
        return await anext(coming)

    async def _resync(self, term: Term, state: Page) -> bool:
        """Deliver a RESYNC and the state; False when draining came between."""
        self.stats.resyncs += 1
        objects = filter(None, (self._of_entry("SYNC", entry) for entry in state.entries))
        for delivery in chain((Delivery("RESYNC", state.revision),), objects):
            if self._draining.is_set():
                return False
            with _Busy(self._idle):
                if not await self._deliver(term, delivery):
                    return False
        self._position = state.revision
        return True

    async def _deliver_all(self, term: Term, events: Iterable[Event], replay: AsyncExitStack) -> bool:
        """All events of one revision; False when draining came between."""
        for event in events:
            delivery = self._of_event(event)
            if delivery and not await self._deliver(term, delivery, replay):
                return False
        return True

    async def _deliver(self, term: Term, delivery: Delivery, replay: AsyncExitStack | None = None) -> bool:
        """Call the handler until it returns; False when draining ended the tries. Raises `NotLeading`."""
        tries = 0
        while True:
            term.check()
            try:
                async with self._clock.timeout(self._deadline):
                    await self._handler(delivery)
            except NotLeading:
                raise
            except GuardFailed as error:
                if error.guard.key == term.key:
                    raise Fenced(f"no longer leading: {error.guard.key} has another holder") from error
                self._failed(delivery, tries, error)
            except Exception as error:  # noqa: BLE001 - a handler's mistake must not end the loop: logged and tried again
                self._failed(delivery, tries, error)
            else:
                self.stats.delivered += 1
                self._failing = None
                return True
            if replay:
                await replay.aclose()  # Who stands still reads nothing: another one's turn.
            if await self._drained_within(_backoff(tries)):
                return False
            tries += 1

    def _failed(self, delivery: Delivery, tries: int, error: Exception) -> None:
        reason = str(error) or f"{type(error).__name__} (the deadline is {self._deadline:g} s)"
        since = self._failing.since if self._failing else rfc3339(self._clock.now())
        self._failing = _Failing(delivery, since, tries + 1, reason)
        self.stats.failures += 1
        log.warning(
            "consumer.delivery_failed",
            consumer=self.name,
            revision=delivery.revision,
            type=delivery.type,
            object=_object(delivery),
            tries=tries + 1,
            error=reason,
            exc_info=tries == 0 and not isinstance(error, _EXPECTED) and error,
        )

    async def _drained_within(self, seconds: float) -> bool:
        try:
            async with self._clock.timeout(seconds):
                await self._draining.wait()
        except TimeoutError:
            return False
        return True

    def _of_event(self, event: Event) -> Delivery | None:
        if event.kind == "put":
            entry = event.entry
            return self._of_entry("ADDED" if entry.create_revision == entry.revision else "MODIFIED", entry)
        kind, namespace, name = self._registry.parse_key(event.entry.key)
        if kind is None or kind.plural not in self._kinds:
            return None
        last = self._decode(kind, event.previous) if event.previous else None
        self._undecodable.discard(event.entry.key)
        return Delivery("DELETED", event.entry.revision, kind, namespace, name, last)

    def _of_entry(self, type_: Literal["ADDED", "MODIFIED", "SYNC"], entry: Entry) -> Delivery | None:
        kind, namespace, name = self._registry.parse_key(entry.key)
        if kind is None or kind.plural not in self._kinds:
            return None
        resource = self._decode(kind, entry)
        return Delivery(type_, entry.revision, kind, namespace, name, resource) if resource else None

    def _decode(self, kind: Kind[Any], entry: Entry) -> AnyResource | None:
        """None, and counted, for a value that this daemon cannot decode."""
        try:
            resource: AnyResource = kind.decode(entry).seal()
        except Undecodable as error:
            self.stats.undecodable += 1
            if entry.key not in self._undecodable:
                log.warning("consumer.undecodable", consumer=self.name, revision=entry.revision, error=str(error))
            self._undecodable.add(entry.key)
            return None
        self._undecodable.discard(entry.key)
        return resource


class _Busy:
    """Clears an event for as long as something is in hand."""

    def __init__(self, idle: asyncio.Event) -> None:
        self._idle = idle

    def __enter__(self) -> None:
        self._idle.clear()

    def __exit__(self, *exc: object) -> None:
        self._idle.set()


def _backoff(tries: int) -> float:
    spread = 1 + BACKOFF_SPREAD * random.uniform(-1, 1)  # noqa: S311 - spreads retries, keeps no secret
    return min(BACKOFF_FIRST * 2.0 ** min(tries, 20), BACKOFF_MOST) * spread


def _object(delivery: Delivery) -> str:
    return f"{delivery.kind.plural}/{delivery.namespace}/{delivery.name}" if delivery.kind else ""
