"""How long an event loop let others wait by its own doing, whatever else runs on the machine.

A loop is held by what its thread computes and by what it waits for outside of the selector: a sleep, a socket, a lock.
The first is the thread's own clock of the processor. The second is seen from a thread beside it, which looks whether
the loop's one has slept since the look before while its turn is overdue. A thread that wants a processor is not
asleep, and one that wants the interpreter wakes every few milliseconds to say so.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

_TURN = 0.002
"""Seconds between two turns of the loop that are timed."""
_LOOK = 0.015
"""Seconds between two looks at the loop's thread: some of Python's switch intervals (5 ms)."""


class LoopLag:
    """In seconds: `held`, the longest that the loop was by its own doing, and `wall`, the same with all else in it."""

    def __init__(self) -> None:
        self.wall = 0.0
        self.held = 0.0
        self._turn = 0
        self._waited = 0.0
        """Within this turn."""

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Watch this thread's loop meanwhile."""
        end = threading.Event()
        beside = threading.Thread(target=self._look, args=(threading.current_thread(), end), name="loop-lag")
        beside.start()
        task = asyncio.create_task(self._take_turns())
        try:
            yield
        finally:
            end.set()
            beside.join()
            task.cancel()
            await asyncio.wait([task])

    async def _take_turns(self) -> None:
        while True:
            self._turn, self._waited = self._turn + 1, 0.0
            began, used = time.perf_counter(), time.thread_time()
            await asyncio.sleep(_TURN)
            self.wall = max(self.wall, time.perf_counter() - began - _TURN)
            self.held = max(self.held, time.thread_time() - used + self._waited)

    def _look(self, loop: threading.Thread, end: threading.Event) -> None:
        status = Path(f"/proc/self/task/{loop.native_id}/status")
        seen, last = (-1, ""), 0.0
        while not end.wait(_LOOK):
            told = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
            now, turn = time.perf_counter(), self._turn
            # A sleep that was begun is counted, so the same number and asleep is the same sleep.
            asleep, sleeps = told["State"][0] in "SD", told["voluntary_ctxt_switches"]
            if asleep and seen == (turn, sleeps):
                self._waited += now - last
            seen, last = (turn, sleeps), now
