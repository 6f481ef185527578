"""A plug-in for tests of the daemon: Widgets whose status follows their spec, by a controller with a finalizer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from equipment.widget import NOTES, WIDGETS, Phase, Widget
from lrm.controller import Context, Controller, Result
from lrm.plugin import Plugin, PluginContext


class Follow(Controller[Widget]):
    name = "widgets"
    lock_name = "widgets"
    model = Widget
    finalizer = "test.neuroglia.io/follow"

    async def reconcile(self, resource: Widget, ctx: Context) -> Result:
        now = ctx.clock.now()

        def follow(w: Widget) -> None:
            w.status.seen = w.spec.count
            w.status.observed_generation = w.metadata.generation
            w.status.enter(Phase.READY, "Followed", now)
            w.status.set_condition("Ready", status=True, reason="Followed", message="", now=now)

        await ctx.client.update_status(resource, follow)
        return Result.done()


@asynccontextmanager
async def controllers(_context: PluginContext) -> AsyncIterator[Sequence[Controller[Any]]]:
    yield (Follow(),)


plugin = Plugin(name="widgets", kinds=(WIDGETS, NOTES), controllers=controllers)
