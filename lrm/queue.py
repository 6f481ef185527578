"""The work queue of one controller: which keys are to be reconciled, in what order, and when.

First in, first out; a key is in it once; a key in hand is given to nobody else, and if it was added meanwhile it is
queued again when it is put back. Delays and backoff are the queue's: the loop over it never sleeps. One event loop,
no locks. Not bounded by a number: it holds each existing object's key at most once.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from storage.clock import Clock

K = TypeVar("K", bound=Hashable)

BACKOFF_FIRST = 0.2
"""Seconds before the first retry of a key; doubles with each failure in a row."""
BACKOFF_MOST = 60.0
_DRAIN_LOOK = 0.02
_STALE_TIMERS = 64
"""Timers whose keys came earlier that may stay before they are swept out."""
BACKOFF_SPREAD = 0.2
"""Share by which a delay is spread in both directions, so that keys that failed together do not return together."""


class WorkQueue(Generic[K]):
    """See the module."""

    def __init__(self, clock: Clock, *, spread: Callable[[], float] = random.random) -> None:
        self._clock = clock
        self._spread = spread
        self._queued: OrderedDict[K, float] = OrderedDict()  # key → since when it waits
        self._dirty: set[K] = set()
        self._processing: dict[K, float] = {}  # key → since when it is in hand
        self._failures: dict[K, int] = {}
        self._due: dict[K, float] = {}  # key → when it is added, the earliest asked for
        self._timers: list[tuple[float, int, K]] = []
        self._sequence = itertools.count()
        self._line = asyncio.Lock()
        """Of all workers that wait only the first in line watches the clock: a key that falls due wakes one of them."""
        self._wake = asyncio.Event()
        self._closed = False

    def add(self, key: K) -> None:
        """Reconcile a key as soon as a worker is free."""
        self._due.pop(key, None)
        if self._closed:
            return
        if key in self._processing:
            self._dirty.add(key)
        elif key not in self._queued:
            self._queued[key] = self._clock.monotonic()
            self._wake.set()

    def add_after(self, key: K, seconds: float) -> None:
        """Reconcile a key after a delay, or earlier if it is added meanwhile."""
        if seconds <= 0:
            self.add(key)
            return
        due = self._clock.monotonic() + seconds
        if key in self._queued or self._due.get(key, due + 1) <= due:
            return
        self._due[key] = due
        heapq.heappush(self._timers, (due, next(self._sequence), key))
        if len(self._timers) > 2 * len(self._due) + _STALE_TIMERS:
            self._timers = [timer for timer in self._timers if self._due.get(timer[2]) == timer[0]]
            heapq.heapify(self._timers)
        if self._timers[0][2] == key:
            self._wake.set()

    def add_failed(self, key: K) -> float:
        """Reconcile a key again with growing delay; the seconds until then."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        delay = min(BACKOFF_FIRST * 2.0 ** min(failures - 1, 30), BACKOFF_MOST)
        delay *= 1 + BACKOFF_SPREAD * (2 * self._spread() - 1)
        self.add_after(key, delay)
        return delay

    def forget_failures(self, key: K) -> None:
        """The key succeeded: its next failure starts the backoff anew."""
        self._failures.pop(key, None)

    def failures(self, key: K) -> int:
        """Failures of a key in a row."""
        return self._failures.get(key, 0)

    def discard(self, key: K) -> None:
        """The object is gone: nothing about it is to be remembered, but one in hand stays in hand."""
        self._failures.pop(key, None)
        self._due.pop(key, None)

    async def get(self) -> K | None:
        """Take the next key in hand; None when the queue was closed."""
        async with self._line:
            while not self._closed:
                self._promote()
                if self._queued:
                    key, _ = self._queued.popitem(last=False)
                    self._processing[key] = self._clock.monotonic()
                    return key
                self._wake.clear()
                next_due = self._timers[0][0] - self._clock.monotonic() if self._timers else None
                try:
                    async with self._clock.timeout(next_due):
                        await self._wake.wait()
                except TimeoutError:
                    continue
        return None

    def done(self, key: K) -> None:
        """Put a key back; it is queued again if it was added while in hand."""
        del self._processing[key]
        if key in self._dirty:
            self._dirty.discard(key)
            self.add(key)

    def in_hand(self, key: K) -> bool:
        """Whether a worker has this key."""
        return key in self._processing

    def close(self) -> None:
        """Give out no more keys; those who wait get None."""
        self._closed = True
        self._wake.set()

    async def drain(self, seconds: float) -> bool:
        """Close, and wait until nothing is in hand; False when something still was after so many seconds."""
        self.close()
        try:
            async with self._clock.timeout(seconds):
                while self._processing:
                    await self._clock.sleep(_DRAIN_LOOK)
        except TimeoutError:
            return False
        return True

    def clear(self) -> None:
        """Drop everything that is not in hand."""
        self._queued.clear()
        self._dirty.clear()
        self._failures.clear()
        self._due.clear()
        self._timers.clear()

    def __len__(self) -> int:
        return len(self._queued)

    @property
    def waiting(self) -> int:
        """Keys whose delay has not passed."""
        return len(self._due)

    @property
    def processing(self) -> int:
        """Keys in hand."""
        return len(self._processing)

    def oldest(self) -> float:
        """Seconds that the first key has been waiting for a worker."""
        first = next(iter(self._queued.values()), None)
        return 0.0 if first is None else self._clock.monotonic() - first

    def longest_running(self) -> float:
        """Seconds that the longest reconcile has been running."""
        return max((self._clock.monotonic() - since for since in self._processing.values()), default=0.0)

    def _promote(self) -> None:
        now = self._clock.monotonic()
        while self._timers and self._timers[0][0] <= now:
            due, _, key = heapq.heappop(self._timers)
            if self._due.get(key) == due:
                self.add(key)
