"""The watch of the memory backend: a queue that the store fills and one consumer empties.

The queue is not bounded: it lives in the process of the test that fills it. Leases end while a consumer waits, because
the waiting is cut at the next lease's end. Called by `storage.memory` only.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

from storage.barrier import Barriers
from storage.base import Batch, is_barrier_key
from storage.clock import Clock
from storage.errors import StorageError


class MemoryWatch:
    """One open watch; `offer` and `end` are the store's side, the rest the consumer's."""

    def __init__(
        self,
        prefix: str,
        after: int,
        clock: Clock,
        write_barrier: Callable[[], Awaitable[int]] | None,
        until_next_expiry: Callable[[], float | None],
    ) -> None:
        self._prefix = prefix
        self._clock = clock
        self._until_next_expiry = until_next_expiry
        self._barriers = Barriers(write_barrier, clock, after) if write_barrier else None
        self._queue: deque[Batch] = deque()
        self._woken = asyncio.Event()
        self._ended: StorageError | None = None

    def offer(self, batch: Batch) -> None:
        """Queue what of a revision lies below the prefix; a barrier's event becomes a revision without events."""
        below = [e for e in batch.events if e.entry.key.startswith(self._prefix)]
        if below:
            shown = tuple(e for e in below if not is_barrier_key(e.entry.key))
            self._queue.append(Batch(batch.revision, shown))
            self._woken.set()

    def wake(self) -> None:
        """Make the consumer look again at how long it may wait."""
        self._woken.set()

    def end(self, error: StorageError) -> None:
        """Let the consumer and all barriers hear `error`; what is queued is not delivered any more."""
        self._ended = self._ended or error
        self._queue.clear()
        if self._barriers:
            self._barriers.end(error)
        self._woken.set()

    def __aiter__(self) -> AsyncIterator[Batch]:
        return self

    async def __anext__(self) -> Batch:
        while True:
            wait = self._until_next_expiry()
            if self._ended:
                raise self._ended
            if self._queue:
                batch = self._queue.popleft()
                if self._barriers:
                    self._barriers.delivered(batch.revision)
                return batch
            self._woken.clear()
            try:
                async with self._clock.timeout(wait):
                    await self._woken.wait()
            except TimeoutError:
                continue

    @property
    def lost_seconds(self) -> float:
        return 0.0

    async def barrier(self, timeout: float = 3.0) -> int:
        if self._barriers is None:
            raise RuntimeError("only a live watch has a barrier")
        return await self._barriers.wait(timeout)
