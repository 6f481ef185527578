"""Who may act: a leader holds one key per lock, and that key's create_revision is its term and its fence.

Two ways to come by the key, behind one interface. `LeaseElection`, for several daemons: the key stands under the
daemon's lease (`lrm.lease`), so a daemon that dies or hangs loses it. `StaticElection`, for one daemon: it takes the
key from whoever held it, so a second static daemon fences the first. A term that has ended stays ended; whoever wants
to lead again acquires a new one. `LeaderElection` goes on doing that, and tells when leading starts and stops.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Protocol

import orjson
import structlog

from lrm.errors import LrmError, NotLeading
from lrm.leaders import Leaders
from lrm.lease import DaemonLease, Session
from lrm.model import rfc3339
from storage.base import Entry, Guard, Storage
from storage.clock import Clock
from storage.errors import (
    AlreadyExists,
    Conflict,
    LeaseNotFound,
    NotFound,
    StorageError,
)

log = structlog.get_logger(__name__)

_RETRY = 0.5


class Deposed(LrmError):  # noqa: N818 - it says what happened
    """Another daemon has taken a static lock; two static daemons must not share an installation."""


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
        """Raise `NotLeading` when the term has ended, `RetryLater` when it may not last `needs` seconds more."""
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
        """Wait until this process leads, in a term that is newer than any before. Raises `Deposed`."""
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


class LeaseTerm(StaticTerm):
    """A term that ends with the session of its lease at the latest."""

    def __init__(self, lock_name: str, identity: str, entry: Entry, acquired: datetime, session: Session) -> None:
        super().__init__(lock_name, identity, entry, acquired)
        self._session = session
        session.on_end(self.lost)

    def check(self, needs: float = 0.0) -> None:
        super().check()
        self._session.check(needs)


class LeaseElection:
    """Campaigns for a lock whenever it is free, with a key under the daemon's lease."""

    def __init__(
        self,
        storage: Storage,
        clock: Clock,
        *,
        lock_name: str,
        identity: str,
        lease: DaemonLease,
        leaders: Leaders,
    ) -> None:
        self.lock_name = lock_name
        self._storage = storage
        self._clock = clock
        self._identity = identity
        self._lease = lease
        self._leaders = leaders
        self._key = leaders.key(lock_name)

    async def acquire(self) -> LeaseTerm:
        """Create the leader key as soon as it is free.

        A key that is there under our own lease is what an attempt left whose answer never came, or a term that ended
        before its lease did: nobody acts under it, and it is replaced, so that the new term is a new number.
        """
        while True:
            session = await self._lease.session()
            acquired = self._clock.now()
            value = _leader_value(self._identity, acquired)
            try:
                entry = await self._storage.create(self._key, value, lease=session.lease)
            except AlreadyExists as error:
                await self._make_way(session, error.current)
            except LeaseNotFound:
                session.end("the store does not know it any more")
            except StorageError as error:
                await self._again(error)
            else:
                if session.left > 0:
                    log.info("election.acquired", lock=self.lock_name, identity=self._identity, term=entry.revision)
                    return LeaseTerm(self.lock_name, self._identity, entry, acquired, session)

    async def release(self, term: Term) -> None:
        """Delete the key if it is still this term's; a store that is away drops it with the lease."""
        await _release(self._storage, term)

    async def _make_way(self, session: Session, held: Entry) -> None:
        """Return when another attempt is worth it."""
        if held.lease != session.lease:
            await self._leaders.wait_free(self.lock_name, held.revision, own_lease=session.lease)
            return
        try:
            await self._storage.delete(self._key, expected_revision=held.revision)
        except Conflict:
            return
        except StorageError as error:
            await self._again(error)

    async def _again(self, error: StorageError) -> None:
        log.warning("election.store_failed", lock=self.lock_name, error=str(error))
        await self._clock.sleep(_RETRY)


class StaticElection:
    """Takes the lock at once, whoever had it; for installations with one daemon."""

    def __init__(self, storage: Storage, clock: Clock, *, root: str, lock_name: str, identity: str) -> None:
        self.lock_name = lock_name
        self._storage = storage
        self._clock = clock
        self._key = f"{root}/leader/{lock_name}"
        self._identity = identity
        self._last = 0

    async def acquire(self) -> StaticTerm:
        """Delete the leader key and create it anew: two writes, since etcd takes one key once in a transaction.

        Raises `Deposed` when this election has led before and a later term than that exists.
        """
        while True:
            acquired = self._clock.now()
            try:
                await self._clear()
                entry = await self._storage.create(self._key, _leader_value(self._identity, acquired))
            except (AlreadyExists, Conflict) as error:
                log.info("election.contended", lock=self.lock_name, detail=str(error))
            except StorageError as error:
                log.warning("election.store_failed", lock=self.lock_name, error=str(error))
            else:
                log.info("election.acquired", lock=self.lock_name, identity=self._identity, term=entry.revision)
                self._last = entry.create_revision
                return StaticTerm(self.lock_name, self._identity, entry, acquired)
            await self._clock.sleep(_RETRY)

    async def release(self, term: Term) -> None:
        """Delete the key if it is still this term's; a store that is away keeps it for the next daemon to take."""
        await _release(self._storage, term)

    async def _clear(self) -> None:
        """Remove whoever holds the key, unless that is a successor of ours.

        Absent, or older than our own term, it is nobody's who came after us: the store was restored. One that bears our
        identity is ours: the answer to its creation was lost. But a successor deletes the key before it creates its
        own, so after a term of ours an absent one is looked at twice.
        """
        try:
            held = await self._held(looks=2 if self._last else 1)
        except NotFound:
            return
        if self._last and held.create_revision > self._last and _holder(held) != self._identity:
            raise Deposed(
                f"another daemon has taken the lock {self.lock_name}; this one was started with LRM_LEADER=static"
            )
        await self._storage.delete(self._key, expected_revision=held.revision)

    async def _held(self, *, looks: int) -> Entry:
        while True:
            try:
                return await self._storage.get(self._key)
            except NotFound:
                looks -= 1
                if not looks:
                    raise
                await self._clock.sleep(_RETRY)


class LeaderElection:
    """Leads a lock again and again: one term, the work in it, the next term."""

    def __init__(
        self,
        election: Election,
        leaders: Leaders,
        *,
        fit: Callable[[], Awaitable[None]] | None = None,
        on_started_leading: Callable[[Term], None] = lambda _term: None,
        on_stopped_leading: Callable[[Term], None] = lambda _term: None,
    ) -> None:
        """`fit` returns when this process could do the work: only then it campaigns."""
        self.term: Term | None = None
        """The present term; None while another leads, or nobody."""
        self.terms = 0
        """Terms since the process began."""
        self._stopping = False
        self._election = election
        self._leaders = leaders
        self._fit = fit
        self._on_started = on_started_leading
        self._on_stopped = on_stopped_leading

    @property
    def lock_name(self) -> str:
        return self._election.lock_name

    @property
    def is_leader(self) -> bool:
        """Whether this process leads, and may still trust that it does."""
        if self.term is None:
            return False
        try:
            self.term.check()
        except NotLeading:
            return False
        return True

    def stop(self) -> None:
        """Begin no further term; the present one goes on."""
        self._stopping = True

    async def run(self, work: Callable[[Term], Awaitable[None]]) -> None:
        """Do the work in every term that is won, until cancelled or stopped. Raises `Deposed`.

        The work returns when its term is lost. The key is given back after it has ended, so that a successor never
        meets it.
        """
        self._leaders.expect(self.lock_name)
        while not self._stopping:
            if self._fit is not None:
                await self._fit()
            term = await self._election.acquire()
            self.term, self.terms = term, self.terms + 1
            try:
                with self._leaders.following(term):
                    self._on_started(term)
                    await work(term)
            finally:
                term.lost()
                self.term = None
                self._on_stopped(term)
                log.info("election.stopped_leading", lock=self.lock_name, term=term.number)
                await self._election.release(term)


def _leader_value(identity: str, acquired: datetime) -> bytes:
    return orjson.dumps({"identity": identity, "acquired": rfc3339(acquired)})


def _holder(entry: Entry) -> str:
    """The identity in a leader key's value; empty where another program has written it."""
    try:
        return str(orjson.loads(entry.value)["identity"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""


async def _release(storage: Storage, term: Term) -> None:
    term.lost()
    try:
        entry = await storage.get(term.key)
        if entry.create_revision == term.number:
            await storage.delete(term.key, expected_revision=entry.revision)
    except (NotFound, Conflict):
        return
    except StorageError as error:
        log.warning("election.not_released", lock=term.lock_name, error=str(error))
