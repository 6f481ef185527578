"""A leader's process in a scene: tasks that can end anywhere."""

from __future__ import annotations

import asyncio


async def end(*tasks: asyncio.Task[None] | None) -> None:
    """The process ends, however far it is; what ended it before is not asked about."""
    ending = [task for task in tasks if task is not None]
    for task in ending:
        task.cancel()
    if ending:
        await asyncio.wait(ending)
    for task in ending:
        if not task.cancelled():
            task.exception()
