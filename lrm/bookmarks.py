"""How far each watcher has come, kept in Redis so that its next leader goes on there instead of at the beginning.

A bookmark says "everything up to this revision was handled" and counts only on the line of history (cluster and epoch)
on which it was made, and not above the store's head. Nothing waits for Redis: away, full or slow, it costs a second at
the begin and at the end of a term; what could not be saved is saved once it can. Redis is not the judge of leadership:
a save that is refused for an older term ends the saving, not the term.
Not known here: what handling is. A reconciler's position comes from a `Watermark`, an event consumer's is its own.
A store rolled back without `lrm restore-done` is noticed while its revisions are lower than before; not later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, TypeVar

import structlog

from lrm.election import Term
from lrm.model import rfc3339
from storage.base import Line, Storage
from storage.clock import Clock
from storage.errors import RedisFailed, StorageError
from storage.redis_bookmarks import Outcome, ProcessBookmarks, RedisBookmarks, Save, SavedBookmark

log = structlog.get_logger(__name__)

K = TypeVar("K", bound=Hashable)

Position = Callable[[], int]
"""The revision up to which everything was handled, 0 while that is not known; called on the event loop."""

REPLAYS = 4
"""Watchers of one daemon that may read old history at once."""
_LAST_SAVE_SECONDS = 1.0
_RENEW_SECONDS = 60.0
"""After so long an unmoved bookmark is written again: against its expiry, and for a Redis that lost its data."""
_PURGE_AGAIN_SECONDS = 3600.0
_STORE_RETRY = 0.5


class Bookmarks:
    """A daemon's bookmarks; `run` saves those that moved, all in one round trip."""

    def __init__(
        self, store: RedisBookmarks | ProcessBookmarks, storage: Storage, clock: Clock, *, every: float
    ) -> None:
        """`every`: seconds between two saves."""
        self.store = store
        self.storage = storage
        self.clock = clock
        self.error = ""
        """Why Redis took or gave no bookmark when it was last asked; empty when it did."""
        self.replays = asyncio.Semaphore(REPLAYS)
        """Held by a watcher while it reads history that lies behind it."""
        self._every = every
        self._known: dict[str, Bookmark] = {}
        self.followed: dict[str, Bookmark] = {}
        """Those between their `begin` and `end`."""
        self._purge_at = clock.monotonic()

    def of(self, watcher: str) -> Bookmark:
        """The bookmark of a watcher; one object for each name."""
        return self._known.setdefault(watcher, Bookmark(watcher, self))

    async def run(self) -> None:
        """Save what moved, for ever; ends only by cancellation."""
        while True:
            await self.clock.sleep(self._every)
            try:
                await self.save(tuple(self.followed.values()))
                for bookmark in tuple(self.followed.values()):
                    await bookmark.judge()
                await self._purge()
            except RedisFailed as error:
                self.failed(error)
            except StorageError as error:
                log.debug("bookmarks.store_failed", error=str(error))

    async def line(self) -> Line:
        """The store's line; waits for a store that is away."""
        told = False
        while True:
            try:
                return await self.storage.line()
            except StorageError as error:
                if not told:
                    log.warning("bookmarks.waiting_for_store", error=str(error))
                told = True
                await self.clock.sleep(_STORE_RETRY)

    async def save(self, bookmarks: Iterable[Bookmark]) -> None:
        """Raises `RedisFailed`: what was not saved is still due."""
        due = [(b, save) for b in bookmarks if (save := b.due())]
        if not due:
            return
        outcomes = await self.store.save([save for _, save in due])
        if self.error:
            log.info("bookmarks.saved_again", after=self.error)
            self.error = ""
        for (bookmark, save), outcome in zip(due, outcomes, strict=True):
            bookmark.answered(save.bookmark, outcome)

    def purge_soon(self) -> None:
        """The line has changed: what is of another one can go."""
        self._purge_at = self.clock.monotonic()

    async def _purge(self) -> None:
        """Delete the bookmarks of other lines, which nobody can use: once, and again after the line has changed."""
        if self.clock.monotonic() < self._purge_at:
            return
        due, found = self._purge_at, await self.store.all()
        self.error = ""
        line = await self.storage.line()  # asked after the bookmarks were read, so none is of a line to come
        for watcher, saved in found.items():
            if not saved.same_history(line):
                log.info("bookmarks.purged", watcher=watcher, revision=saved.revision, epoch=saved.epoch)
                await self.store.forget(watcher, saved)
        if self._purge_at == due:  # else the line has changed again meanwhile
            self._purge_at = self.clock.monotonic() + _PURGE_AGAIN_SECONDS

    def failed(self, error: RedisFailed) -> None:
        """Remember the error; it is logged once an outage."""
        if not self.error:
            log.warning("bookmarks.not_saved", error=str(error))
        self.error = str(error)


class Bookmark:
    """One watcher's; between `begin` and `end` its position is followed and saved."""

    def __init__(self, watcher: str, bookmarks: Bookmarks) -> None:
        self.watcher = watcher
        self.refused = False
        """Whether Redis held one of a later term when it was last asked; under this one it is asked once a minute."""
        self._bookmarks = bookmarks
        self._clock = bookmarks.clock
        self._term: Term | None = None
        self._position: Position | None = None
        self._line: Line | None = None
        """The line that positions are of; None after `rebase` until it was read."""
        self._judged = False
        """Whether what Redis holds was compared with that line; before that nothing is saved."""
        self._disproved: SavedBookmark | None = None
        """What Redis held and is not of that line, though cluster and epoch say so."""
        self._rebases = 0
        self._saved: SavedBookmark | None = None
        self._sent = 0
        self._renew_at = 0.0

    async def begin(self, term: Term, position: Position) -> int | None:
        """Follow `position` from now on, and return the revision to resume after; None when there is none to trust.

        It is not asked for before this has returned, and must be of the line that the store is on when this is called,
        or of a later one. Redis being away is None, too (after a second at most), unless this process knows itself
        where it was. Waits for the store.
        """
        self._term, self._position = term, position
        self._disproved, self._judged, self._sent, self.refused = None, False, 0, False
        rebases, loaded = self._rebases, True
        try:
            held = await self._bookmarks.store.load(self.watcher)
        except RedisFailed as error:
            self._bookmarks.failed(error)
            held, loaded = self._saved, False
        self._line = line = await self._bookmarks.line()
        if rebases != self._rebases:
            self._line = None
        elif loaded:
            self._compare(held, line)
        self._bookmarks.followed[self.watcher] = self
        valid = held is not None and held.same_history(line) and held.revision <= line.revision
        self._saved = held if valid else None
        return self._saved.revision if self._saved else None

    async def end(self) -> None:
        """Save once more, within a second, and stop following; never raises for Redis or the store."""
        try:
            if self._bookmarks.followed.pop(self.watcher, None) is None:
                return
            async with self._clock.timeout(_LAST_SAVE_SECONDS):
                await self.judge()
                await self._bookmarks.save((self,))
        except RedisFailed as error:
            self._bookmarks.failed(error)
        except TimeoutError:
            self._bookmarks.failed(RedisFailed(f"not saved within {_LAST_SAVE_SECONDS:g} s"))
        except StorageError as error:
            log.info("bookmarks.last_not_saved", watcher=self.watcher, error=str(error))
        finally:
            self._term = self._position = None

    def rebase(self) -> None:
        """The store has begun another line (`StoreReset`), and positions are of that one from now on.

        What Redis holds is worth nothing any more, and is replaced even if its revision is higher.
        """
        self._rebases += 1
        self._line, self._judged = None, False
        self._saved, self._sent, self.refused = None, 0, False
        self._bookmarks.purge_soon()

    def describe(self, current_version: int, found: SavedBookmark | None = None) -> dict[str, Any]:
        """One watcher of /api/status/bookmarks; `found` is what another daemon has saved of it."""
        saved = found or self._saved
        return {
            "watcher": self.watcher,
            "bookmark": saved.revision if saved else None,
            "current_version": current_version,
            "lag": max(0, current_version - saved.revision) if saved else None,
            "term": saved.term if saved else None,
            "saved_at": saved.saved_at if saved else None,
            "following": self.watcher in self._bookmarks.followed,
            "error": "redis holds a bookmark of a later term" if self.refused else self._bookmarks.error,
        }

    async def judge(self) -> None:
        """Compare what Redis holds with the store's line, where that is still to be done before the first save.

        Redis is read first: what it holds then, and lies above the head that is read later, is of another line.
        """
        term, rebases = self._term, self._rebases
        if self._judged or term is None or self._position is None or self._position() <= 0:
            return
        held = await self._bookmarks.store.load(self.watcher)
        line = await self._bookmarks.storage.line()
        if self._rebases != rebases or self._term is not term or (self._line and not self._line.same_history(line)):
            return  # positions are, or are about to be told to be, of another line
        rebased, self._line = self._line is None, line
        self._compare(held, line)
        if rebased and held and held.same_history(line) and held.term <= term.number:
            self._disproved = held  # saved by this term, or one before it: before the change

    def due(self) -> Save | None:
        """What is to be saved now, if anything."""
        if self._term is None or self._position is None or self._line is None:
            return None
        revision = self._position()
        still = self.refused or revision == self._sent
        if not self._judged or revision <= 0 or (still and self._clock.monotonic() < self._renew_at):
            return None
        value = SavedBookmark(
            cluster_id=self._line.cluster_id,
            epoch=self._line.epoch,
            revision=revision,
            term=self._term.number,
            saved_at=rfc3339(self._clock.now()),
        )
        return Save(self.watcher, value, self._disproved)

    def answered(self, value: SavedBookmark, outcome: Outcome) -> None:
        """Take in what Redis made of a save."""
        if self._line is None or not value.same_history(self._line):
            return  # the line changed while the save was under way
        self._sent, self._renew_at = value.revision, self._clock.monotonic() + _RENEW_SECONDS
        if outcome == "saved":
            self._saved, self._disproved, self.refused = value, None, False
        elif outcome == "behind":
            self._judged = False  # a predecessor's, which was further; or of no line that ever was
        else:
            self._judged = False
            if not self.refused:
                log.warning("bookmarks.older_term", watcher=self.watcher, term=value.term)
            self.refused = True

    def _compare(self, held: SavedBookmark | None, line: Line) -> None:
        """Judge what Redis held before `line` was read."""
        above = held is not None and held.same_history(line) and held.revision > line.revision
        self._judged, self._disproved = True, held if above else None


class Watermark(Generic[K]):
    """The position of a watcher that handles keys in any order: below it nothing is left that was not attempted.

    A key is attempted by one at a time. What is seen while it is in hand is not covered by that attempt.
    """

    def __init__(self) -> None:
        self._waiting: dict[K, int] = {}
        self._in_hand: dict[K, int] = {}

    def saw(self, key: K, revision: int) -> None:
        """An event of a key: to be attempted."""
        _lower(self._waiting, key, revision)

    def begin(self, key: K) -> None:
        """An attempt begins; it covers what was seen of the key so far."""
        if key in self._waiting:
            _lower(self._in_hand, key, self._waiting.pop(key))

    def end(self, key: K, attempted: bool) -> None:
        """The attempt is over; when it was none (`attempted` False), all that it was to cover still waits."""
        if key in self._in_hand:
            revision = self._in_hand.pop(key)
            if not attempted:
                _lower(self._waiting, key, revision)

    def forget(self, key: K) -> None:
        """Nothing of this key needs an attempt."""
        self._waiting.pop(key, None)
        self._in_hand.pop(key, None)

    def clear(self) -> None:
        """Forget every key."""
        self._waiting.clear()
        self._in_hand.clear()

    def at(self, head: int) -> int:
        """The watermark, with `head` the revision up to which events were seen; one look at each waiting key."""
        lowest = min((r for seen in (self._waiting, self._in_hand) for r in seen.values()), default=head + 1)
        return min(head, lowest - 1)


def _lower(revisions: dict[K, int], key: K, revision: int) -> None:
    revisions[key] = min(revisions.get(key, revision), revision)
