"""`kill -9` between every two writes of a garbage collection: the next collector ends what was begun, and no more."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from equipment.daemons import DaemonProcess
from equipment.gc_scene import KINDS, SHADOWS, Shadow, reference
from equipment.waiting import until
from equipment.widget import Note, Widget, WidgetSpec, WidgetStatus
from lrm.client import Client
from lrm.crashpoints import EXIT_CODE
from lrm.devservers import EtcdServer
from lrm.gc import CRASH_POINTS
from lrm.registry import Registry
from lrm.resource import ObjectMeta
from storage.clock import SystemClock
from storage.etcd import EtcdStorage

SAMPLE = "gc.child-orphaned"


class Store:
    """What a user does to the store, while no daemon runs or while one does."""

    def __init__(self, storage: EtcdStorage, root: str) -> None:
        self.registry = Registry(KINDS, root=root)
        self.client = Client(storage, self.registry, SystemClock())

    async def make(self, name: str, *owners: Any, model: type[Any] = Widget) -> Any:
        meta = ObjectMeta(name=name, owner_references=[reference(owner) for owner in owners])
        spec = WidgetSpec.model_validate({"labTrack": "ccna"})
        return await self.client.create(model(metadata=meta, spec=spec, status=WidgetStatus()))

    async def all(self) -> dict[str, Any]:
        models: Iterable[type[Any]] = (Widget, Note, Shadow)
        return {thing.name: thing for model in models for thing in await self.client.list(model)}


@asynccontextmanager
async def store(etcd: EtcdServer, root: str) -> AsyncIterator[Store]:
    storage = EtcdStorage([etcd.endpoint], root=root)
    try:
        yield Store(storage, root)
    finally:
        await storage.aclose()


@pytest.mark.parametrize("point", [p if p == SAMPLE else pytest.param(p, marks=pytest.mark.soak) for p in CRASH_POINTS])
async def test_killed_while_it_collects_the_next_one_goes_on(
    server_dir: Path, etcd: EtcdServer, etcd_root: str, point: str
) -> None:
    assert SHADOWS.forgotten_with_owner
    daemon = DaemonProcess(server_dir, endpoint=etcd.endpoint, root=etcd_root, plugins="equipment.gc_plugin")
    try:
        async with store(etcd, etcd_root) as s:
            keep = await s.make("keep")
            background = await s.make("background")
            for name in ("child-1", "child-2"):
                await s.make(name, background)
            await s.make("record", background, model=Shadow)
            await s.make("shared", background, keep)
            orphaning = await s.make("orphaning")
            for name in ("orphan-1", "orphan-2"):
                await s.make(name, orphaning, model=Note)
            foreground = await s.make("foreground")
            await s.make("blocking", foreground)
            await s.client.delete(background)
            await s.client.delete(orphaning, propagation="Orphan")
            await s.client.delete(foreground, propagation="Foreground")

            daemon.start(LRM_CRASH_AT=point)
            assert await daemon.exit_code(40) == EXIT_CODE, daemon.log()[-2000:]
            await daemon.start_ready()

            async def over() -> bool:
                return set(await s.all()) == {"keep", "shared", "orphan-1", "orphan-2"}

            await until(over, "what has no owner any more to be gone")
            left = await s.all()
            assert left["shared"].metadata.owner_references == [reference(keep)]
            for name in ("orphan-1", "orphan-2"):
                assert not left[name].metadata.owner_references
                assert not left[name].deleting
    finally:
        await daemon.end()
