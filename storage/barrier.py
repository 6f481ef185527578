"""How a live watch learns that it has delivered everything up to now: it writes a key and waits for that key's news.

One write serves every caller that asked before it began (single flight): a caller joins only a write that starts after
it asked, so what it had seen elsewhere is covered. A cancelled or failed write is taken over by the next caller in
line. The revision counts as delivered when the consumer's iterator was given it, not when the socket had it.
Promises 7 and 10 of `storage.base`; used by the live watches of both backends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from storage.clock import Clock
from storage.errors import StorageError, Unavailable


class Barriers:
    """The barriers of one live watch: `write` puts the key and returns its revision."""

    def __init__(self, write: Callable[[], Awaitable[int]], clock: Clock, delivered: int) -> None:
        self._write = write
        self._clock = clock
        self._delivered = delivered
        self._waiters: set[tuple[int, asyncio.Future[None]]] = set()
        self._line = asyncio.Lock()
        self._asked = 0
        self._covered = 0
        self._covered_revision = 0
        self._ended: StorageError | None = None

    @property
    def pending(self) -> int:
        """How many callers wait now."""
        return len(self._waiters)

    async def wait(self, timeout: float) -> int:
        """Write (or join a write that starts from now on) and wait until its revision was delivered."""
        try:
            async with self._clock.timeout(timeout):
                revision = await self.write_or_join()
                await self._until_delivered(revision)
        except TimeoutError:
            raise Unavailable(f"no barrier came back within {timeout:g} s") from None
        return revision

    async def write_or_join(self) -> int:
        """The revision of a barrier that was written after this call began."""
        self._raise_if_ended()
        self._asked += 1
        mine = self._asked
        async with self._line:
            self._raise_if_ended()
            if self._covered < mine:
                # Everyone who has asked until this moment is served by the write that begins now.
                covers = self._asked
                revision = await self._write()
                self._covered, self._covered_revision = covers, revision
            return self._covered_revision

    def delivered(self, revision: int) -> None:
        """The consumer was given everything up to `revision`."""
        self._delivered = max(self._delivered, revision)
        for waiter in [w for w in self._waiters if w[0] <= self._delivered]:
            if not waiter[1].done():
                waiter[1].set_result(None)

    def end(self, error: StorageError) -> None:
        """Every waiter and every later caller hears `error`."""
        self._ended = self._ended or error
        for _, woken in self._waiters:
            if not woken.done():
                woken.set_exception(self._ended)

    async def _until_delivered(self, revision: int) -> None:
        self._raise_if_ended()
        if revision <= self._delivered:
            return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = (revision, woken)
        self._waiters.add(waiter)
        try:
            await woken
        finally:
            self._waiters.discard(waiter)
            if woken.done() and not woken.cancelled():
                woken.exception()  # Marked as read: the waiter may have been cancelled at the same moment.

    def _raise_if_ended(self) -> None:
        if self._ended:
            raise self._ended
