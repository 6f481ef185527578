"""The plug-in that the measured daemons load: Widgets whose reconciles are noted, with the time, in a file.

Times are of the monotonic clock, which on Linux is one for all processes, so a note of one daemon can be compared with
what the bench or another daemon did: when it began, when it ended, which process, what. A note is one short append,
which the kernel keeps whole.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from equipment.widget import NOTES, WIDGETS, Phase, Widget
from lrm.controller import Context, Controller, Result
from lrm.plugin import Plugin, PluginContext
from lrm.settings import LrmSettings
from storage.clock import Clock

FINALIZER = "test.neuroglia.io/bench"
LOCK = "widgets"
"""The controller's name and that of its lock."""
READY = "cache-ready"
"""What a daemon notes when its cache was filled once; everything else is the name of a reconciled Widget."""


class BenchSettings(LrmSettings):
    """Where to note."""

    bench_ledger: Path


class Notes:
    """The file, open for appending."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._clock = clock

    def add(self, what: str, began: float) -> None:
        """Note what has just ended."""
        os.write(self._file, f"{began:.6f} {self._clock.monotonic():.6f} {os.getpid()} {what}\n".encode())

    def close(self) -> None:
        os.close(self._file)


def follow(widget: Widget, now: Any) -> None:
    """The status that this controller wants: that of its spec."""
    widget.status.seen = widget.spec.count
    widget.status.observed_generation = widget.metadata.generation
    widget.status.enter(Phase.READY, "Followed", now)
    widget.status.set_condition("Ready", status=True, reason="Followed", message="", now=now)


class Follow(Controller[Widget]):
    name = LOCK
    lock_name = LOCK
    model = Widget
    finalizer = FINALIZER

    def __init__(self, notes: Notes) -> None:
        self._notes = notes

    def settled(self, resource: Widget) -> bool:
        return resource.status.observed_generation == resource.metadata.generation

    async def reconcile(self, resource: Widget, ctx: Context) -> Result:
        began, now = ctx.clock.monotonic(), ctx.clock.now()
        await ctx.client.update_status(resource, lambda widget: follow(widget, now))
        self._notes.add(resource.name, began)
        return Result.done()


@asynccontextmanager
async def controllers(context: PluginContext) -> AsyncIterator[Sequence[Controller[Any]]]:
    notes = Notes(context.settings.bench_ledger, context.clock)

    async def note_ready() -> None:
        began = context.clock.monotonic()
        await context.cache.wait_synced()
        notes.add(READY, began)

    try:
        async with asyncio.TaskGroup() as tasks:
            noting = tasks.create_task(note_ready())
            yield (Follow(notes),)
            noting.cancel()
    finally:
        notes.close()


plugin = Plugin(name="bench", kinds=(WIDGETS, NOTES), controllers=controllers, settings=BenchSettings)
