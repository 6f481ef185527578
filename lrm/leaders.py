"""Who leads which lock, as the store shows it: a mirror of `{root}/leader/` kept by a watch of its own.

Standbys wait on it, a term that another has replaced is ended by it, and status and metrics are answered from it.
It is a mirror: only a create under `{root}/leader/` decides who leads, and only the guard of a write whether it counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson
import structlog

from lrm.errors import NotLeading
from storage.base import Batch, Entry, Storage, Watch, check_generation
from storage.clock import Clock
from storage.errors import Compacted, FutureRevision, StorageError, StoreReset

if TYPE_CHECKING:
    from lrm.election import Term

log = structlog.get_logger(__name__)

_RETRY_FIRST = 0.2
_RETRY_MOST = 5.0


@dataclass(frozen=True, slots=True)
class Holder:
    """Whoever holds a lock."""

    identity: str
    acquired: str
    """RFC 3339, as the holder wrote it."""
    term: int
    """The create_revision of the leader key."""
    lease: int
    """0 for a static leader."""


class Leaders:
    """See the module; `run` fills it and keeps it current."""

    def __init__(self, storage: Storage, clock: Clock, *, root: str) -> None:
        self.prefix = f"{root}/leader/"
        self.revision = 0
        self.error = "not read yet"
        """Why the mirror may be behind; empty while it follows the store."""
        self._storage = storage
        self._clock = clock
        self._entries: dict[str, Entry] = {}
        self._free_since: dict[str, float] = {}
        self._expected: set[str] = set()
        self._terms: set[Term] = set()
        self._moved = asyncio.Event()
        self._watch: Watch | None = None
        self._deaf_since = clock.monotonic()
        self._listed = False
        self._lists = 0
        self._generation = 0

    def key(self, lock_name: str) -> str:
        """The leader key of a lock."""
        return f"{self.prefix}{lock_name}"

    def expect(self, lock_name: str) -> None:
        """A lock that should have a holder: from now on its absence is timed."""
        self._expected.add(lock_name)
        if self.key(lock_name) not in self._entries:
            self._free_since.setdefault(lock_name, self._clock.monotonic())

    @property
    def locks(self) -> list[str]:
        """Every lock that is held or should be."""
        return sorted(self._expected | {key.removeprefix(self.prefix) for key in self._entries})

    def holder(self, lock_name: str) -> Holder | None:
        """Who holds a lock; None when it is free."""
        entry = self._entries.get(self.key(lock_name))
        return _holder(entry) if entry else None

    @property
    def deaf_seconds(self) -> float:
        """For how long the mirror can have heard of no change; 0 while its watch has a stream."""
        return self._clock.monotonic() - self._deaf_since if self._watch is None else self._watch.lost_seconds

    def absent_seconds(self, lock_name: str) -> float:
        """For how long a lock has had no leader that is known of; 0 while it has one.

        Whoever held it when the mirror was cut off may not do so any more, and so counts for as long as it is; a term
        of this process is known by its own clock.
        """
        if any(term.lock_name == lock_name and _lasts(term) for term in self._terms):
            return 0.0
        since = self._free_since.get(lock_name)
        return max(self.deaf_seconds, 0.0 if since is None else self._clock.monotonic() - since)

    async def wait_free(self, lock_name: str, revision: int, *, own_lease: int) -> None:
        """Return when, as of `revision` or later, the lock has no holder but what `own_lease` left.

        Also when it had to be read anew meanwhile: then `revision` may mean nothing any more.
        """
        lists, key = self._lists, self.key(lock_name)
        while self._lists == lists:
            entry = self._entries.get(key)
            if self.revision >= revision and (entry is None or entry.lease == own_lease):
                return
            await self._moved.wait()

    @contextmanager
    def following(self, term: Term) -> Iterator[None]:
        """End a term as soon as the store shows that its key is gone or another's."""
        self._terms.add(term)
        try:
            if self.revision >= term.number:
                self._check(term)
            yield
        finally:
            self._terms.discard(term)

    async def run(self) -> None:
        """Mirror until cancelled."""
        delay = _RETRY_FIRST
        while True:
            try:
                if not self._listed:
                    await self._list()
                async with self._storage.watch(self.prefix, self.revision) as watch:
                    check_generation(self._storage, self._generation)
                    self._watch, self.error, delay = watch, "", _RETRY_FIRST
                    async for batch in watch:
                        self._apply(batch)
            except (Compacted, FutureRevision, StoreReset) as error:
                log.info("leaders.relist", reason=str(error))
                self._listed, self.error = False, str(error)
            except StorageError as error:
                self.error = str(error)
                tell = log.warning if delay == _RETRY_FIRST else log.debug
                tell("leaders.store_failed", error=str(error))
                self._end_watch()
                await self._clock.sleep(delay)
                delay = min(delay * 2, _RETRY_MOST)
            finally:
                self._end_watch()

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch, self._deaf_since = None, self._clock.monotonic()

    async def _list(self) -> None:
        reset = self._storage.generation != self._generation
        self._generation = self._storage.generation
        page = await self._storage.list(self.prefix)
        self._entries = {entry.key: entry for entry in page.entries}
        self.revision, self._listed, self._lists = page.revision, True, self._lists + 1
        # A term won while this list was under way is not in it. After a restore a term may be of a line that has ended:
        # its number says nothing there, its key does.
        for term in tuple(self._terms):
            if reset or self.revision >= term.number:
                self._check(term)
        self._publish()

    def _apply(self, batch: Batch) -> None:
        self.revision = batch.revision
        for event in batch.events:
            if event.kind == "delete":
                self._entries.pop(event.entry.key, None)
            else:
                self._entries[event.entry.key] = event.entry
        for term in tuple(self._terms):
            if self.revision >= term.number:
                self._check(term)
        self._publish()

    def _check(self, term: Term) -> None:
        entry = self._entries.get(term.key)
        if entry is None or entry.create_revision != term.number:
            term.lost()

    def _publish(self) -> None:
        now = self._clock.monotonic()
        for lock_name in self._expected:
            if self.key(lock_name) in self._entries:
                self._free_since.pop(lock_name, None)
            else:
                self._free_since.setdefault(lock_name, now)
        self._moved, moved = asyncio.Event(), self._moved
        moved.set()


def _lasts(term: Term) -> bool:
    try:
        term.check()
    except NotLeading:
        return False
    return True


def _holder(entry: Entry) -> Holder:
    """A value that is not ours to read still has a term and a lease."""
    try:
        value = orjson.loads(entry.value)
        identity, acquired = str(value["identity"]), str(value["acquired"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        identity, acquired = "", ""
    return Holder(identity, acquired, entry.create_revision, entry.lease)
