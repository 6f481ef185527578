"""A few threads for blocking calls whose callers may leave at any time.

Promises: at most `slots` calls run at once; the event loop never waits for one; a caller that is cancelled or runs out
of time leaves at once, what its call returns later is dropped, and a call that has not yet begun to send never does
(`Ticket`). Does not promise to stop a blocking call: it keeps its slot until its own socket timeout ends it. The
threads are daemons, so that a hanging peer cannot hold up the end of the process, as `ThreadPoolExecutor` lets it.
Called by `controllers.aws.calls`.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Abandoned(Exception):  # noqa: N818 - it is a signal to the thread, seen by nobody else
    """The caller has left before anything was sent; nothing will be."""


class Ticket:
    """What caller and thread agree on: whether the request may still leave, and whether it has."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sent = False
        self._abandoned = False

    @property
    def sent(self) -> bool:
        """Whether the request has left, or may have."""
        return self._sent

    def begin_send(self) -> None:
        """Called by the thread before each attempt; raises `Abandoned` when the caller has left."""
        with self._lock:
            if self._abandoned:
                raise Abandoned
            self._sent = True

    def abandon(self) -> bool:
        """Called by a caller that leaves; returns whether anything was sent, which then can no longer change."""
        with self._lock:
            self._abandoned = True
            return self._sent


class Threads:
    """The pool; one event loop uses it."""

    def __init__(self, slots: int, name: str) -> None:
        self._slots = asyncio.Semaphore(slots)
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._started = 0
        self._idle = 0
        self._closed = False

    @property
    def busy(self) -> int:
        """Calls that hold a thread now, those of callers that have left included."""
        return self._started - self._idle

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread and return or raise what it does; waits for a free slot first."""
        if not self._closed:
            await self._slots.acquire()
            if self._closed:  # meanwhile: no thread would take the job
                self._slots.release()
        if self._closed:
            raise RuntimeError(f"{self._name} is closed")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def give_back(result: T | None, error: BaseException | None) -> None:
            self._idle += 1
            self._slots.release()
            if answer.done():  # the caller has left
                return
            if error is None:
                answer.set_result(result)  # type: ignore[arg-type]  # T may be None
            else:
                answer.set_exception(error)

        def job() -> None:
            result: T | None = None
            error: BaseException | None = None
            try:
                result = work()
            except BaseException as raised:  # noqa: BLE001 - it is raised again, where the caller is
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                loop.call_soon_threadsafe(give_back, result, error)

        if self._idle:
            self._idle -= 1
        else:
            self._started += 1
            threading.Thread(target=self._work, name=f"{self._name}-{self._started}", daemon=True).start()
        self._jobs.put(job)
        return await answer

    def close(self) -> None:
        """Accept nothing more and let each thread end after what it is doing; does not wait."""
        if not self._closed:
            self._closed = True
            for _ in range(self._started):
                self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
