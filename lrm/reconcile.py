"""The loop that makes the world match the objects: one runner per controller, level-driven, fenced.

It promises: one reconcile per key at a time; each with a deadline; never before the caches hold what this controller
wrote last; none after leadership ended; the finalizer is on the object before `reconcile` sees it, and goes only after
`finalize` is done. A write's own echo does not wake its key: what is to be looked at again, `Result.after` says.
A new term begins with what has changed since the last leader's bookmark; an object with the annotation `paused` is left
alone, and a new value of `reconcile-now` is heard at once, whatever backoff its object is in.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Generic

import structlog

from lrm.bookmarks import Bookmark, Watermark
from lrm.cache import Cache, CacheUpdate, Change
from lrm.client import Client, Written
from lrm.clock import WallJumps
from lrm.controller import Context, Controller, Key, Result, Trigger
from lrm.election import Term
from lrm.errors import CacheBehind, NotLeading, ResourceConflict, ResourceNotFound, RetryLater, TerminalError
from lrm.events import Events, Recorder
from lrm.kind import R
from lrm.queue import WorkQueue
from lrm.resource import RECONCILE_ANNOTATION
from storage.clock import Clock
from storage.errors import GuardFailed, NoSpace, OutcomeUnknown, StorageError, StoreReset, Unavailable

log = structlog.get_logger(__name__)

_RESYNC_SPREAD = 0.1
_NOT_ATTEMPTED = (Unavailable, OutcomeUnknown, GuardFailed, StoreReset)
"""After these the store had no part in the attempt; what it refuses for good, it will refuse again."""
_IN_HAND = "in hand"
"""Marks what was seen of a key while a worker had it: its own writes are told from others' only at the end."""


@dataclass
class Stats:
    """Counters since the process began."""

    reconciles: int = 0
    failures: int = 0
    terminal: int = 0
    finalized: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Outcome:
    """Of one reconcile: what it wrote, and whether the events before it count as attended to."""

    written: Written
    attempted: bool


@dataclass
class _Echoes:
    """What a key's own writes look like when they come back through the watch."""

    own: set[int] = field(default_factory=set)
    seen_meanwhile: set[int] = field(default_factory=set)


class Runner(Generic[R]):
    """Runs one controller while a term lasts."""

    def __init__(
        self,
        controller: Controller[R],
        client: Client,
        cache: Cache,
        clock: Clock,
        *,
        observe_only: bool = False,
        renew_deadline: float = 10.0,
        bookmark: Bookmark | None = None,
        events: Events | None = None,
    ) -> None:
        self.controller = controller
        self.name = controller.name
        self.lock_name = controller.lock_name
        self.stats = Stats()
        self.queue: WorkQueue[Key] = WorkQueue(clock)
        self._client = client
        self._cache = cache
        self._clock = clock
        self._observe_only = observe_only
        self._renew_deadline = renew_deadline
        self._triggers = {t.model: t.keys for t in controller.triggers()}
        self._jumps = WallJumps(clock)
        self._written: dict[Key, Written] = {}
        self._echoes: dict[Key, _Echoes] = {}
        self._bookmark = bookmark
        self._events = events
        self._watermark: Watermark[tuple[str, ...]] = Watermark()
        self._finalizing: set[Key] = set()
        self._kind = cache.registry.of(controller.model)
        self._paused: set[Key] = set()
        """What was found paused when its turn came."""
        self._gate = asyncio.Lock()
        self._store_was_away = False
        self._mistakes: set[str] = set()
        """Questions in which the controller has failed, so that each is logged once."""
        self._seen = 0
        """The revision of the last update; what comes with a list may have begun right after it."""
        self._resets = 0
        """Lines of the store's history that have ended; revisions of a former one mean nothing."""

    async def run(self, term: Term) -> None:
        """Reconcile until the term ends (returns) or the task is cancelled; the queue starts empty each time."""
        self.queue = WorkQueue(self._clock)
        self._written.clear()
        self._echoes.clear()
        self._watermark.clear()
        self._seen = 0
        generation = self._cache.storage.generation
        subscription = ExitStack()
        try:
            resumed = await self._bookmark.begin(term, self._position) if self._bookmark else None
            await self._cache.catch_up(self.name)
            subscription.callback(self._cache.subscribe(self._on_update))
            if self.controller.hints:
                subscription.callback(self.controller.hints.listen(self.queue.add))
            if self._bookmark and self._cache.storage.generation != generation:
                self._bookmark.rebase()
                resumed = None
            self._seen = self._cache.revision
            self._first_pass(resumed)
            async with asyncio.TaskGroup() as tasks:
                workers = [tasks.create_task(self._work(term)) for _ in range(self.controller.workers)]
                await term.wait_lost()
                self.queue.close()
                for worker in workers:
                    worker.cancel()
        finally:
            subscription.close()
            self._paused.clear()
            if self._bookmark:
                await self._bookmark.end()

    async def drain(self, seconds: float) -> None:
        """Give out no more keys and let the reconciles in hand end, for so long at most."""
        if not await self.queue.drain(seconds):
            log.warning("reconcile.drain_timed_out", controller=self.controller.name, left=self.queue.processing)

    def finalizers(self) -> dict[str, Any]:
        """How many objects wait for this controller's finalizer, are in its hand, and were let go by it."""
        finalizer = self.controller.finalizer
        deleting = [r for r in self._cache.all(self.controller.model) if r.deleting]
        return {
            "name": self.name,
            "finalizer": finalizer,
            "pending": sum(finalizer in r.metadata.finalizers for r in deleting) if finalizer else 0,
            "processing": len(self._finalizing),
            "completed": self.stats.finalized,
        }

    def describe(self) -> dict[str, Any]:
        queue, stats = self.queue, self.stats
        return {
            "name": self.name,
            "lock": self.lock_name,
            "queued": len(queue),
            "delayed": queue.waiting,
            "processing": queue.processing,
            "oldestQueuedSeconds": round(queue.oldest(), 3),
            "longestRunningSeconds": round(queue.longest_running(), 3),
            "reconciles": stats.reconciles,
            "failures": stats.failures,
            "terminal": stats.terminal,
            "finalized": stats.finalized,
            "paused": len(self._paused),
            "secondsTotal": round(stats.seconds, 3),
        }

    def _first_pass(self, resumed: int | None) -> None:
        """Every object once: first what changed after the bookmark, then what is not settled; the rest over `poll`."""
        unsettled: list[Key] = []
        for resource in self._cache.all(self.controller.model):
            key, revision = (resource.namespace, resource.name), int(resource.metadata.resource_version)
            if resumed is None or revision > resumed:
                # Its revision is that of its last event; which was the first that nobody attended to is not known.
                self._watermark.saw(key, (resumed or 0) + 1)
                self.queue.add(key)
            elif resource.deleting or not self._safely(self.controller.settled, resource, False):
                unsettled.append(key)
            else:
                self.queue.add_after(key, self.controller.poll * random.random())  # noqa: S311 - spreads work
        for key in unsettled:
            self.queue.add(key)

    def _position(self) -> int:
        """The bookmark: every event up to here has been attended to; 0 before the first pass has begun."""
        return self._watermark.at(self._cache.revision) if self._seen else 0

    def _on_update(self, update: CacheUpdate) -> None:
        if update.relisted:
            # An own revision may hide a foreign one below it, or belong to a line that has ended.
            for echoes in self._echoes.values():
                echoes.own.clear()
        if update.reset:
            self._resets += 1
            self._written.clear()
            self._watermark.clear()
            if self._bookmark:
                self._bookmark.rebase()
        if update.reset or update.missed:
            self._first_pass(None)
        # What a list tells is of its last event; the first that was missed came right after what was seen before.
        missed = 1 if update.reset else self._seen + 1 if update.relisted else 0
        self._seen = update.revision
        for change in update.changes:
            model, since = change.kind.model, missed or change.revision
            if model is self.controller.model:
                self._on_own_change(change, since, relisted=update.relisted)
            mapper = self._triggers.get(model)
            if mapper is not None:
                for key in self._safely(mapper, change, ()):
                    self._watermark.saw(key, since)
                    self.queue.add(key)

    def _on_own_change(self, change: Change, since: int, *, relisted: bool) -> None:
        key = (change.item.namespace, change.item.name)
        echoes = self._echoes.get(key)
        if echoes is not None and not relisted:
            if change.revision in echoes.own:
                echoes.own.discard(change.revision)
                return
            if self.queue.in_hand(key):
                echoes.seen_meanwhile.add(change.revision)
                self._watermark.saw((*key, _IN_HAND), change.revision)
                return
        asked = _asked(change)
        if asked:
            self.queue.forget_failures(key)
        if asked or change.type == "DELETED" or self._safely(self.controller.wakes, change, True):
            self._watermark.saw(key, since)
            self.queue.add(key)

    def _safely(self, asked: Callable[[Any], Any], about: Any, otherwise: Any) -> Any:
        """What a controller says, or `otherwise` where it fails: its mistake must not end the daemon. Logged once."""
        try:
            answer = asked(about)
            return answer if isinstance(answer, bool) else tuple(answer)
        except Exception:
            if asked.__qualname__ not in self._mistakes:
                log.exception("reconcile.mistake", controller=self.name, asked=asked.__qualname__)
            self._mistakes.add(asked.__qualname__)
            return otherwise

    async def _work(self, term: Term) -> None:
        while (key := await self._next()) is not None:
            self._echoes.setdefault(key, _Echoes())
            self._watermark.begin(key)
            outcome = _Outcome(Written(), attempted=False)
            try:
                outcome = await self._one(key, term)
            finally:
                self._watermark.end(key, attempted=outcome.attempted)
                self._settle_echoes(key, outcome.written)
                self.queue.done(key)
            # A reconcile with nothing to do never waits: without this, thousands of them would hold the loop up.
            await self._clock.sleep(0)

    async def _next(self) -> Key | None:
        """The next key; after the store was away none before it answers again, instead of failing key by key.

        The wait stands before the key is taken: a stop waits for keys in hand, and must not wait for the store.
        """
        async with self._gate:
            if self._store_was_away:
                await self._cache.catch_up(self.name)
                self._store_was_away = False
        return await self.queue.get()

    def _settle_echoes(self, key: Key, written: Written) -> None:
        echoes = self._echoes[key]
        own = written.revisions.get(self._cache.registry.key(self._kind, *key), set())
        echoes.own = {r for r in echoes.own | own if r > self._cache.revision}
        if foreign := echoes.seen_meanwhile - own:
            self._watermark.saw(key, min(foreign))
            self.queue.add(key)
        self._watermark.forget((*key, _IN_HAND))
        echoes.seen_meanwhile = set()
        if not echoes.own:
            del self._echoes[key]

    async def _one(self, key: Key, term: Term) -> _Outcome:
        name, queue = self.controller.name, self.queue
        bound = log.bind(controller=name, namespace=key[0], name=key[1], reconcile=uuid.uuid4().hex[:8])
        client = self._client.bind(owner=self.controller.owner or name, fence=term)
        started, line, attempted = self._clock.monotonic(), self._resets, True
        try:
            await self._own_writes_visible(key)
            resource = self._cache.get(self.controller.model, *key)
            self._paused.discard(key)
            if resource is None:
                queue.discard(key)
                self._written.pop(key, None)
                return _Outcome(client.written, attempted)
            if resource.paused:
                self._paused.add(key)
                queue.forget_failures(key)
                return _Outcome(client.written, attempted)
            term.check()
            context = Context(
                client=client,
                cache=self._cache,
                clock=self._clock,
                term=term,
                observe_only=self._observe_only,
                renew_deadline=self._renew_deadline,
                jumps=self._jumps,
                bound_log=bound,
                events=Recorder(self._events, name, term),
            )
            self.stats.reconciles += 1
            async with self._clock.timeout(self.controller.deadline):
                result = await self._step(resource, context)
        except NotLeading as error:
            bound.warning("reconcile.not_leading", detail=str(error))
            attempted = False
            term.lost()
        except TerminalError as error:
            self.stats.terminal += 1
            bound.error("reconcile.terminal", reason=error.reason, detail=str(error))
            queue.forget_failures(key)
        except (ResourceConflict, ResourceNotFound, CacheBehind) as error:
            attempted = False
            bound.info("reconcile.again", detail=str(error), delay=queue.add_failed(key))
        except (RetryLater, StorageError, TimeoutError) as error:
            attempted = not isinstance(error, _NOT_ATTEMPTED)
            self._store_was_away |= isinstance(error, Unavailable) and not isinstance(error, NoSpace)
            self.stats.failures += 1
            reason = str(error) or f"deadline of {self.controller.deadline} s"
            bound.warning("reconcile.failed", error=reason, delay=queue.add_failed(key))
        except Exception:  # noqa: BLE001 - a controller's mistake must not end the loop: it is logged and retried
            self.stats.failures += 1
            bound.exception("reconcile.failed", delay=queue.add_failed(key))
        else:
            queue.forget_failures(key)
            spread = 1 + _RESYNC_SPREAD * random.uniform(-1, 1)  # noqa: S311 - spreads work, keeps no secret
            queue.add_after(key, self.controller.resync * spread if result.again is None else result.again)
        finally:
            self.stats.seconds += self._clock.monotonic() - started
            self._remember(key, client, line)
        return _Outcome(client.written, attempted)

    def _remember(self, key: Key, client: Client, line: int) -> None:
        """What the caches must hold before the key's next reconcile."""
        if line != self._resets:
            client.written = Written(unknown=True)  # its revisions are of a line that has ended
        if client.written.highest or client.written.unknown:
            self._written[key] = client.written

    async def _step(self, resource: R, ctx: Context) -> Result:
        finalizer = self.controller.finalizer
        if resource.deleting:
            if finalizer and finalizer not in resource.metadata.finalizers:
                return Result.done()
            if not finalizer:
                return await self.controller.reconcile(resource, ctx)
            return await self._finalize(resource, ctx)
        if finalizer and finalizer not in resource.metadata.finalizers:
            resource = (await ctx.client.add_finalizer(resource, finalizer)).seal()
        return await self.controller.reconcile(resource, ctx)

    async def _finalize(self, resource: R, ctx: Context) -> Result:
        key, finalizer = (resource.namespace, resource.name), self.controller.finalizer
        self._finalizing.add(key)
        try:
            result = await self.controller.finalize(resource, ctx)
            if result.again is None:
                await ctx.client.remove_finalizer(resource, finalizer)
                self.stats.finalized += 1
                ctx.log.info("reconcile.finalized", finalizer=finalizer)
        finally:
            self._finalizing.discard(key)
        return result

    async def _own_writes_visible(self, key: Key) -> None:
        written = self._written.get(key)
        if written is None:
            return
        if written.unknown:
            await self._cache.barrier()
        await self._cache.wait_for(written.highest)
        self._written.pop(key, None)


def _asked(change: Change) -> bool:
    """Whether a person has asked for a reconcile: by a new value of the annotation, or by ending a pause."""
    new = change.new.resource if change.new else None
    if new is None:
        return False
    old = change.old.resource if change.old else None
    wish, wished = (r.metadata.annotations.get(RECONCILE_ANNOTATION) if r else None for r in (new, old))
    return (wish is not None and wish != wished) or (old is not None and old.paused and not new.paused)


__all__ = ["Context", "Controller", "Key", "Result", "Runner", "Stats", "Trigger"]
