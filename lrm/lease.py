"""The daemon's one lease: every lock that it holds stands under it, so one keepalive renews them all.

A granted lease is trusted until a deadline on the monotonic clock: the send time of the last keepalive that was
answered, plus the lesser of `renew_deadline` and the granted TTL less a second. The store ends it later than that at
the earliest, so whoever stops at the deadline has stopped before anyone else can begin. Every check computes it anew:
a process that was paused needs no timer to find out. A session that has ended never comes back; another one is granted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

import structlog

from lrm.errors import NotLeading, RetryLater
from storage.base import Storage
from storage.clock import Clock
from storage.errors import LeaseNotFound, NoSpace, StorageError

log = structlog.get_logger(__name__)

_RETRY_MOST = 0.5
_REVOKE_SECONDS = 2.0
_LEAST_LEASE = 3.0


def check_times(lease_duration: float, renew_deadline: float, retry_period: float) -> None:
    """Raise ValueError for durations (seconds) with which a healthy leader could lose its lease, or keep it too long.

    Leases are whole seconds in etcd and expire on a half-second tick, so under 3 s there is no room for a retry.
    """
    if lease_duration < _LEAST_LEASE:
        raise ValueError(f"lease_duration {lease_duration:g} s is below the least of {_LEAST_LEASE:g} s")
    if renew_deadline + retry_period >= lease_duration - 1:
        raise ValueError(
            f"renew_deadline {renew_deadline:g} s + retry_period {retry_period:g} s must stay below"
            f" lease_duration {lease_duration:g} s - 1 s, or a leader could outlive its lease"
        )
    if 2 * retry_period > renew_deadline:
        raise ValueError(
            f"renew_deadline {renew_deadline:g} s must be at least twice retry_period {retry_period:g} s,"
            " or one renewal that is late ends the lease"
        )


class Session:
    """One granted lease, from its grant to its end."""

    def __init__(self, clock: Clock, lease: int, renew_deadline: float) -> None:
        self.lease = lease
        self._clock = clock
        self._renew_deadline = renew_deadline
        self._deadline = clock.monotonic()
        self._ended = asyncio.Event()
        self._on_end: list[Callable[[], None]] = []

    def renewed(self, sent: float, ttl: int) -> None:
        """A grant or keepalive that was sent at `sent` was answered with a TTL in seconds."""
        self._deadline = sent + min(self._renew_deadline, ttl - 1.0)

    @property
    def left(self) -> float:
        """Seconds for which this lease is trusted; none when it has ended."""
        return 0.0 if self._ended.is_set() else max(0.0, self._deadline - self._clock.monotonic())

    def check(self, needs: float = 0.0) -> None:
        """Raise `NotLeading` past the deadline, `RetryLater` where less than `needs` seconds are left."""
        left = self.left
        if left <= 0:
            self.end("the deadline has passed")
            raise NotLeading("the lease was not renewed in time")
        if left < needs:
            raise RetryLater(f"the lease is trusted for {left:.1f} s more, and this call needs {needs:g} s")

    def end(self, reason: str) -> None:
        """Trust it no more, for ever; everything that stands under it ends at once."""
        if self._ended.is_set():
            return
        log.info("lease.ended", lease=f"{self.lease:x}", reason=reason)
        self._ended.set()
        for callback in self._on_end:
            callback()

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call back when this session ends; at once if it has."""
        if self._ended.is_set():
            callback()
        else:
            self._on_end.append(callback)

    async def wait_ended(self) -> None:
        """Return when the session has ended."""
        await self._ended.wait()


class DaemonLease:
    """Has a session whenever the store allows; `run` keeps it alive."""

    def __init__(
        self, storage: Storage, clock: Clock, *, lease_duration: float, renew_deadline: float, retry_period: float
    ) -> None:
        check_times(lease_duration, renew_deadline, retry_period)
        self._storage = storage
        self._clock = clock
        self._ttl = round(lease_duration)
        self._renew_deadline = renew_deadline
        self._retry_period = retry_period
        self._session: Session | None = None
        self._granted = asyncio.Event()

    async def session(self) -> Session:
        """The present session; waits while there is none."""
        while self._session is None or self._session.left <= 0:
            await self._granted.wait()
            if self._session is None or self._session.left <= 0:
                await self._clock.sleep(0)  # it is about to be replaced
        return self._session

    async def run(self) -> None:
        """Grant, keep alive, and begin again when a session has ended; until cancelled, which gives the lease back."""
        while True:
            session = await self._grant()
            self._session = session
            self._granted.set()
            try:
                async with asyncio.TaskGroup() as tasks:
                    work = [tasks.create_task(self._keep_alive(session)), tasks.create_task(self._expire(session))]
                    await session.wait_ended()
                    for task in work:
                        task.cancel()
            finally:
                self._granted.clear()
                self._session = None
                session.end("the daemon stops")
                await self._revoke(session)

    async def _grant(self) -> Session:
        told = False
        while True:
            sent = self._clock.monotonic()
            try:
                lease = await self._storage.grant_lease(self._ttl)
            except StorageError as error:
                # An unknown outcome too: a lease that nobody knows runs out by itself.
                if not told:
                    log.warning("lease.not_granted", error=str(error), no_space=isinstance(error, NoSpace))
                told = True
                await self._clock.sleep(min(self._retry_period, _RETRY_MOST))
                continue
            session = Session(self._clock, lease.id, self._renew_deadline)
            session.renewed(sent, lease.ttl)
            if session.left > 0:
                return session

    async def _keep_alive(self, session: Session) -> None:
        while True:
            await self._clock.sleep(self._retry_period)
            while True:
                sent = self._clock.monotonic()
                try:
                    # A member that hangs must leave time to ask another.
                    async with self._clock.timeout(self._renew_deadline / 3):
                        session.renewed(sent, await self._storage.keep_alive(session.lease))
                    break
                except LeaseNotFound:
                    session.end("the store does not know it any more")
                    return
                except (StorageError, TimeoutError) as error:
                    reason, left = str(error) or "no answer in time", round(session.left, 1)
                    log.warning("lease.not_renewed", lease=f"{session.lease:x}", error=reason, left=left)
                await self._clock.sleep(min(self._retry_period, _RETRY_MOST))

    async def _expire(self, session: Session) -> None:
        while (left := session.left) > 0:
            await self._clock.sleep(left)
        session.end("it was not renewed in time")

    async def _revoke(self, session: Session) -> None:
        """Let successors begin before the TTL has run out, if the store answers soon."""
        with suppress(StorageError, TimeoutError):
            async with self._clock.timeout(_REVOKE_SECONDS):
                await self._storage.revoke(session.lease)
