"""What a client leaves behind: the tasks of this event loop and the sockets of this process."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from equipment.waiting import until

_EQUIPMENT = ("fault-proxy", "tcp-link")


@dataclass(frozen=True, slots=True)
class Footprint:
    """`before = Footprint.now()`, then what is tested, then `await before.is_all_that_is_left()`."""

    tasks: frozenset[asyncio.Task[object]]
    sockets: frozenset[str]

    @classmethod
    def now(cls) -> Self:
        tasks = (task for task in asyncio.all_tasks() if not task.get_name().startswith(_EQUIPMENT))
        return cls(frozenset(tasks), frozenset(_sockets()))

    async def is_all_that_is_left(self, timeout: float = 15.0) -> None:
        """Closing takes a few turns of the loop; what is there after `timeout` seconds has leaked."""

        def gone() -> bool:
            now = Footprint.now()
            return now.tasks <= self.tasks and now.sockets <= self.sockets

        try:
            await until(gone, timeout=timeout)
        except AssertionError:
            now = Footprint.now()
            tasks, sockets = sorted(map(str, now.tasks - self.tasks)), sorted(now.sockets - self.sockets)
            raise AssertionError(f"left behind: {tasks} {sockets}") from None


def _sockets() -> list[str]:
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one through which the folder is read is gone by now
            target = str(descriptor.readlink())
            if target.startswith("socket:"):
                found.append(target)
    return found
