"""Work that outlasts a step of the controller: pulls, and stops that wait for a container's own end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from types import TracebackType
from typing import Any, Self

import structlog

log = structlog.get_logger(__name__)

Work = Callable[[], Coroutine[Any, Any, None]]


class Chores:
    """One piece of work for each key at a time; what is in hand when it is closed is cancelled."""

    def __init__(self) -> None:
        self._tasks = asyncio.TaskGroup()
        self._in_hand: dict[Hashable, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._in_hand.values():
            task.cancel()
        await self._tasks.__aexit__(kind, error, trace)

    def begin(self, key: Hashable, work: Work, then: Callable[[], None] = lambda: None) -> None:
        """Have it done, unless it is being done, and call `then` once it is not in hand any more.

        Its errors are its own to handle; a defect is logged.
        """
        if key not in self._in_hand:
            self._in_hand[key] = self._tasks.create_task(self._do(key, work, then))

    def busy(self, key: Hashable) -> bool:
        """Whether it is being done."""
        return key in self._in_hand

    async def _do(self, key: Hashable, work: Work, then: Callable[[], None]) -> None:
        try:
            await work()
        except Exception:
            # A defect costs this piece of work, not the daemon; whoever needs it begins it anew.
            log.exception("containers.chore_defect", chore=str(key))
        finally:
            del self._in_hand[key]
            then()
