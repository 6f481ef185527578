"""A store, its cache and a garbage collector on a clock that moves when it is told to; objects of three kinds.

Widgets and Notes are ordinary; Shadows are forgotten with their owners. Time never reaches the collector's resync
unless a test moves it there, so what happens comes of what was heard.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from equipment.widget import NOTES, WIDGETS, Note, Widget, WidgetSpec, WidgetStatus
from lrm.cache import Cache
from lrm.client import Client
from lrm.election import StaticElection, StaticTerm
from lrm.errors import ResourceNotFound
from lrm.events import Events
from lrm.gc import LOCK, GarbageCollector
from lrm.kind import Kind
from lrm.registry import Registry
from lrm.resource import ObjectMeta, OwnerReference, Resource
from lrm.testing import VirtualClock
from storage.base import Storage
from storage.clock import Clock
from storage.memory import MemoryStorage


class Shadow(Resource[WidgetSpec, WidgetStatus]):
    api_version: str = "test.neuroglia.io/v1"
    kind: str = "Shadow"


SHADOWS: Kind[Shadow] = Kind(
    model=Shadow, plural="shadows", singular="shadow", transitions=WIDGETS.transitions, forgotten_with_owner=True
)
KINDS: tuple[Kind[Any], ...] = (WIDGETS, NOTES, SHADOWS)
Any3 = Widget | Note | Shadow


class GcScene:
    """See the module."""

    def __init__(self, storage: MemoryStorage, clock: VirtualClock) -> None:
        self.storage = storage
        self.clock = clock
        self.registry = Registry(KINDS)
        self.client = Client(storage, self.registry, clock)
        self.cache = Cache(storage, self.registry, clock)
        self.events = Events(storage, clock, root="/lrm")
        """Written only where a test runs it."""
        self.collector = self.new_collector()
        self.term: StaticTerm | None = None
        self._running: list[asyncio.Task[None]] = []

    def new_collector(self) -> GarbageCollector:
        return GarbageCollector(self.storage, self.registry, self.cache, self.client, self.clock, events=self.events)

    async def start(self) -> None:
        """Lead and collect, as a daemon that has just come up; one that runs already is deposed and does not know."""
        self.collector = self.new_collector()
        election = StaticElection(self.storage, self.clock, root="/lrm", lock_name=LOCK, identity="test")
        self.term = await election.acquire()
        self._running.append(asyncio.create_task(self.collector.run(self.term)))

    async def kill(self) -> None:
        """End every collector wherever it is."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        self._running.clear()

    async def returned(self) -> None:
        """Return when every collector has by itself."""
        await asyncio.gather(*self._running)

    async def settle(self, seconds: float = 2.0) -> None:
        """Let everything happen that happens within these seconds."""
        for _ in range(4):
            await self.clock.advance(seconds / 4)

    async def make(
        self,
        name: str,
        *owners: Any3,
        model: type[Any3] = Widget,
        finalizers: Iterable[str] = (),
        block: bool = True,
        **metadata: Any,
    ) -> Any:
        """A stored object that belongs to `owners`."""
        references = [reference(owner, block=block) for owner in owners]
        meta = ObjectMeta(name=name, finalizers=list(finalizers), owner_references=references, **metadata)
        spec = WidgetSpec.model_validate({"labTrack": "ccna"})
        return await self.client.create(model(metadata=meta, spec=spec, status=WidgetStatus()))

    async def now(self, thing: Any3) -> Any:
        """This incarnation of an object as the store has it; None when it is gone."""
        try:
            found: Any = await self.client.get(type(thing), thing.namespace, thing.name)
        except ResourceNotFound:
            return None
        return found if found.uid == thing.uid else None

    async def names(self) -> set[str]:
        """The names of everything that exists."""
        page = await self.storage.list(self.registry.prefix)
        return {entry.key.rpartition("/")[2] for entry in page.entries}

    async def release(self, thing: Any3, finalizer: str = "test/hold") -> None:
        await self.client.remove_finalizer(thing, finalizer)


def reference(owner: Any3, *, block: bool = True) -> OwnerReference:
    found = owner.as_owner()
    found.block_owner_deletion = block
    return found


@asynccontextmanager
async def gc_scene(
    storage: MemoryStorage | None = None, *, clock: VirtualClock | None = None
) -> AsyncIterator[GcScene]:
    """A scene whose cache and collector run."""
    clock = clock or VirtualClock()
    scene = GcScene(storage or MemoryStorage(clock=clock), clock)
    caching = asyncio.create_task(scene.cache.run())
    await scene.start()
    await clock.settle()
    try:
        yield scene
    finally:
        await scene.kill()
        caching.cancel()
        await asyncio.gather(caching, return_exceptions=True)


@asynccontextmanager
async def collecting(
    storage: Storage, cache: Cache, clock: Clock, *, root: str = "/lrm"
) -> AsyncIterator[GarbageCollector]:
    """A collector at work beside whatever else uses this store and cache."""
    client = Client(storage, cache.registry, clock)
    collector = GarbageCollector(storage, cache.registry, cache, client, clock)
    election = StaticElection(storage, clock, root=root, lock_name=LOCK, identity="test")
    running = asyncio.create_task(collector.run(await election.acquire()))
    try:
        yield collector
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
