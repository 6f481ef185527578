"""A storage whose only way to etcd leads through a fault proxy, and the writes that can be lost on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from equipment.etcd import Change, Gateway
from equipment.fault_proxy import FaultProxy, Request
from equipment.waiting import until
from lrm.devservers import EtcdServer
from storage.base import Guard
from storage.errors import StorageError, Unavailable
from storage.etcd import EtcdStorage

OLD, OWN, OTHER = b"old", b"own", b"other"
"""What the key holds first, what the storage under test writes, what somebody else writes."""


@dataclass
class Scene:
    """A storage whose only way to etcd leads through the proxy, one key that is there and one guard."""

    proxy: FaultProxy
    storage: EtcdStorage
    direct: Gateway
    root: str
    expected: int = 0
    guard: Guard | None = None

    @property
    def key(self) -> str:
        return f"{self.root}/r/key"

    async def prepare(self, *, exists: bool) -> None:
        created = await self.direct.put(f"{self.root}/r/guard", b"")
        self.guard = Guard(f"{self.root}/r/guard", created)
        if exists:
            self.expected = await self.direct.put(self.key, OLD)
            await self.answered()

    async def answered(self) -> None:
        """Let the storage see the present, over a connection that it keeps, however short its patience is."""

        async def once() -> bool:
            try:
                await self.storage.exists(self.key)
            except Unavailable:
                return False
            return True

        await until(once, "an answer within the patience of the storage")

    async def written(self) -> list[Change]:
        """What has happened to the key since it was prepared."""
        last = await self.direct.put(f"{self.root}/r/end", b"")
        first = self.guard.create_revision if self.guard else 1
        return [
            change
            for change in await self.direct.history(f"{self.root}/r/", first, last)
            if change.key == self.key and change.revision > self.expected
        ]


async def _create(scene: Scene) -> int:
    assert scene.guard
    return (await scene.storage.create(scene.key, OWN, guards=(scene.guard,))).revision


async def _update(scene: Scene) -> int:
    assert scene.guard
    write = scene.storage.update(scene.key, OWN, expected_revision=scene.expected, guards=(scene.guard,))
    return (await write).revision


async def _delete(scene: Scene) -> int:
    assert scene.guard
    return await scene.storage.delete(scene.key, expected_revision=scene.expected, guards=(scene.guard,))


async def _set(scene: Scene) -> int:
    return await scene.storage.set(scene.key, OWN)


async def _swap(scene: Scene) -> int:
    return (await scene.storage.compare_and_swap(scene.key, OLD, OWN)).revision


Write = Callable[[Scene], Awaitable[int]]
WRITES: dict[str, Write] = {"create": _create, "update": _update, "delete": _delete, "set": _set, "swap": _swap}


def is_write(request: Request) -> bool:
    """Whether a request can change a key: a read that goes through raft's log is a transaction too, and cannot."""
    if request.path in {"/v3/kv/put", "/v3/kv/deleterange"}:
        return True
    if request.path != "/v3/kv/txn" or b'"VERSION"' in request.body:
        return False
    return b"request_put" in request.body or b"request_delete_range" in request.body


@asynccontextmanager
async def scene_at(etcd: EtcdServer, root: str, *, request_timeout: float = 5.0) -> AsyncIterator[Scene]:
    """A scene on an etcd; what was held is released at the end, and nothing is left."""
    async with FaultProxy(etcd.endpoint) as proxy:
        storage = EtcdStorage([proxy.endpoint], root=root, request_timeout=request_timeout)
        try:
            yield Scene(proxy, storage, Gateway(etcd.endpoint), root)
        finally:
            proxy.clear()
            await storage.aclose()


async def outcome_of(call: Awaitable[int]) -> int | StorageError:
    try:
        async with asyncio.timeout(30):
            return await call
    except StorageError as error:
        return error
