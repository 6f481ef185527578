"""Tools for tests of lrm and of its plug-ins: time that moves when it is told to.

Nothing here runs in a daemon.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

_SETTLE_ROUNDS = 50
"""Turns of the event loop after each timer: enough for chains of tasks that wake each other without input or output."""


class VirtualClock:
    """A clock that stands still until `advance`; timers then fire in order, each seeing its own time."""

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self._start = start
        self._time = 0.0
        self._wall_offset = 0.0
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = itertools.count()

    def now(self) -> datetime:
        """Wall time: the start plus what has been advanced, plus jumps."""
        return self._start + timedelta(seconds=self._time + self._wall_offset)

    def monotonic(self) -> float:
        """Seconds advanced so far; `jump_wall` does not touch it."""
        return self._time

    def jump_wall(self, seconds: float) -> None:
        """Move wall time alone, as a wrong NTP step does."""
        self._wall_offset += seconds

    def stall(self, seconds: float) -> None:
        """Let time pass as for a process that was paused: no timer fires before the next `advance`."""
        self._time += seconds

    async def sleep(self, seconds: float) -> None:
        """Wait until the clock was advanced by so much; zero and less only yields."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._at(seconds, lambda: None if woken.done() else woken.set_result(None))
        await woken

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[Any]:
        """As `asyncio.timeout`, on this clock."""
        return self._timeout(seconds)

    @asynccontextmanager
    async def _timeout(self, seconds: float | None) -> AsyncIterator[asyncio.Timeout]:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as scope:
            over = False

            def fire() -> None:
                if not over:
                    scope.reschedule(loop.time())

            if seconds is not None:
                self._at(max(seconds, 0.0), fire)
            try:
                yield scope
            finally:
                over = True

    def _at(self, seconds: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (self._time + seconds, next(self._sequence), callback))

    async def advance(self, seconds: float) -> None:
        """Let `seconds` pass: fire each timer at its time and let the tasks that it wakes run."""
        target = self._time + seconds
        await self.settle()
        while self._timers and self._timers[0][0] <= target:
            when, _, callback = heapq.heappop(self._timers)
            self._time = max(self._time, when)
            callback()
            await self.settle()
        self._time = target
        await self.settle()

    async def settle(self) -> None:
        """Let every task that can run do so, without moving time."""
        for _ in range(_SETTLE_ROUNDS):
            await asyncio.sleep(0)
