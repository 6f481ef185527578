"""One runner over a memory store, for tests of what it promises."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from equipment.widget import Note, Widget, registry
from lrm.bookmarks import Bookmark
from lrm.cache import Cache, Change
from lrm.client import Client
from lrm.controller import Context, Controller, Result, Trigger
from lrm.election import StaticElection, StaticTerm
from lrm.reconcile import Runner
from storage.clock import SystemClock
from storage.memory import MemoryStorage

Step = Callable[[Widget, Context], Awaitable[Result]]


class WidgetController(Controller[Widget]):
    name = "widgets"
    lock_name = "widgets"
    model = Widget
    deadline = 0.5

    def __init__(self, step: Step, *, finalizer: str = "", cleanup: Step | None = None) -> None:
        self.finalizer = finalizer
        self._step = step
        self._cleanup = cleanup

    def settled(self, resource: Widget) -> bool:
        return resource.spec.colour == "settled"

    def wakes(self, change: Change) -> bool:
        resource = change.item.resource
        return resource is None or "asleep" not in resource.metadata.labels

    def triggers(self) -> list[Trigger]:
        return [Trigger(Note, lambda change: [(change.item.namespace, change.item.name)])]

    async def reconcile(self, resource: Widget, ctx: Context) -> Result:
        return await self._step(resource, ctx)

    async def finalize(self, resource: Widget, ctx: Context) -> Result:
        return await self._cleanup(resource, ctx) if self._cleanup else Result.done()


@dataclass
class World:
    storage: MemoryStorage
    client: Client
    cache: Cache
    runner: Runner[Widget]
    election: StaticElection
    term: StaticTerm
    running: asyncio.Task[None]

    async def until(self, condition: Callable[[], bool], seconds: float = 30) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)

    async def quiet(self) -> None:
        """Until the cache holds everything written and the queue has nothing in it and nothing in hand."""
        await self.cache.barrier(30)
        await self.until(lambda: len(self.runner.queue) == 0 and self.runner.queue.processing == 0)
        await self.cache.barrier(30)


@asynccontextmanager
async def world(
    controller: WidgetController,
    *existing: Widget,
    observe_only: bool = False,
    storage: MemoryStorage | None = None,
    bookmark: Bookmark | None = None,
) -> AsyncIterator[World]:
    storage, clock = storage or MemoryStorage(), SystemClock()
    client = Client(storage, registry(), clock, owner="widgets")
    for resource in existing:
        await client.create(resource)
    cache = Cache(storage, registry(), clock)
    caching = asyncio.create_task(cache.run())
    runner = Runner(controller, client, cache, clock, observe_only=observe_only, bookmark=bookmark)
    election = StaticElection(storage, clock, root="/lrm", lock_name="widgets", identity="test")
    term = await election.acquire()
    running = asyncio.create_task(runner.run(term))
    try:
        yield World(storage, client, cache, runner, election, term, running)
    finally:
        for task in (running, caching):
            task.cancel()
        await asyncio.gather(running, caching, return_exceptions=True)
