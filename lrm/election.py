"""Who may act: a leader holds one key per lock, and that key's create_revision is its term and its fence.

Only the static election is here: for one daemon per installation. It takes the lock from whoever held it, so a second
static daemon fences the first. A term that has ended stays ended; whoever wants to lead again acquires a new one.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Protocol

import orjson
import structlog

from lrm.errors import NotLeading
from lrm.model import rfc3339
from storage.base import Entry, Event, Guard, Storage
from storage.clock import Clock
from storage.errors import AlreadyExists, Conflict, NotFound, OutcomeUnknown, StorageError, Unavailable

log = structlog.get_logger(__name__)

_RETRY = 0.5


class Term(Protocol):
    """A stretch of leadership; also the fence of every write made in it."""

    lock_name: str
    identity: str
    key: str
    number: int
    """The create_revision of the leader key."""
    acquired: datetime

    def guard(self) -> Guard:
        """The guard for a write. Raises `NotLeading`."""
        ...

    def check(self, needs: float = 0.0) -> None:
        """Raise `NotLeading` unless this term surely lasts `needs` seconds more."""
        ...

    def lost(self) -> None:
        """End the term: another leader was seen."""
        ...

    async def wait_lost(self) -> None:
        """Return when the term has ended."""
        ...


class Election(Protocol):
    """How a daemon comes to lead a lock."""

    lock_name: str

    async def acquire(self) -> Term:
        """Wait until this process leads."""
        ...

    async def release(self, term: Term) -> None:
        """Give the lock up, under a compare."""
        ...


class StaticTerm:
    """A term without a lease: it lasts until someone else takes the key."""

    def __init__(self, lock_name: str, identity: str, entry: Entry, acquired: datetime) -> None:
        self.lock_name = lock_name
        self.identity = identity
        self.key = entry.key
        self.number = entry.create_revision
        self.acquired = acquired
        self._ended = asyncio.Event()

    def guard(self) -> Guard:
        self.check()
        return Guard(self.key, self.number)

    def check(self, needs: float = 0.0) -> None:  # noqa: ARG002 - a static term has no end in time
        if self._ended.is_set():
            raise NotLeading(f"{self.identity} no longer leads {self.lock_name}")

    def lost(self) -> None:
        self._ended.set()

    async def wait_lost(self) -> None:
        await self._ended.wait()


class StaticElection:
    """Takes the lock at once, whoever had it; for installations with one daemon."""

    def __init__(self, storage: Storage, clock: Clock, *, root: str, lock_name: str, identity: str) -> None:
        self.lock_name = lock_name
        self._storage = storage
        self._clock = clock
        self._key = f"{root}/leader/{lock_name}"
        self._identity = identity

    async def acquire(self) -> StaticTerm:
        """Delete the leader key and create it anew: two writes, since etcd takes one key once in a transaction."""
        while True:
            acquired = self._clock.now()
            value = orjson.dumps({"identity": self._identity, "acquired": rfc3339(acquired)})
            try:
                await self._clear()
                entry = await self._storage.create(self._key, value)
            except (AlreadyExists, Conflict) as error:
                log.info("election.contended", lock=self.lock_name, detail=str(error))
            except (Unavailable, OutcomeUnknown) as error:
                log.warning("election.store_failed", lock=self.lock_name, error=str(error))
            else:
                log.info("election.acquired", lock=self.lock_name, identity=self._identity, term=entry.create_revision)
                return StaticTerm(self.lock_name, self._identity, entry, acquired)
            await self._clock.sleep(_RETRY)

    async def release(self, term: Term) -> None:
        """Delete the key if it is still this term's; a store that is away keeps it for the next daemon to take."""
        term.lost()
        try:
            entry = await self._storage.get(self._key)
            if entry.create_revision == term.number:
                await self._storage.delete(self._key, expected_revision=entry.revision)
        except (NotFound, Conflict):
            return
        except StorageError as error:
            log.warning("election.not_released", lock=self.lock_name, error=str(error))

    async def observe(self, term: Term) -> None:
        """End the term as soon as the store shows another holder; runs beside the work, until cancelled."""
        after = term.number
        while True:
            try:
                async with self._storage.watch(self._key, after) as watch:
                    async for batch in watch:
                        after = batch.revision
                        if any(self._ends(term, event) for event in batch.events):
                            term.lost()
                            return
            except StorageError as error:
                log.info("election.observe_again", lock=self.lock_name, reason=str(error))
                await self._clock.sleep(_RETRY)
            try:
                # History may be gone: the key itself tells, as of a revision that is not later than the read.
                after = await self._storage.current_revision()
                if await self._replaced(term):
                    term.lost()
                    return
            except StorageError as error:
                log.warning("election.observe_failed", lock=self.lock_name, error=str(error))

    async def succeeded(self, term: Term) -> bool:
        """Whether a later term than this one exists, once this one has ended.

        False where the key is absent, or older: then the store was restored to before this term, and nobody leads.
        A successor deletes the key before it creates its own, so an absent one is looked at twice.
        """
        absent = 0
        while True:
            try:
                return (await self._storage.get(self._key)).create_revision > term.number
            except NotFound:
                absent += 1
                if absent > 1:
                    return False
            except StorageError as error:
                log.warning("election.store_failed", lock=self.lock_name, error=str(error))
            await self._clock.sleep(_RETRY)

    def _ends(self, term: Term, event: Event) -> bool:
        """Whether this event is the end of the term; a watch also brings locks whose names begin alike."""
        if event.entry.key != self._key:
            return False
        return event.kind == "delete" or event.entry.create_revision != term.number

    async def _clear(self) -> None:
        try:
            held = await self._storage.get(self._key)
        except NotFound:
            return
        await self._storage.delete(self._key, expected_revision=held.revision)

    async def _replaced(self, term: Term) -> bool:
        try:
            return (await self._storage.get(self._key)).create_revision != term.number
        except NotFound:
            return True
