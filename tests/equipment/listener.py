"""A consumer of a storage's watch that keeps what it was given, to be compared with etcd's own history."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import groupby

from equipment.etcd import Gateway
from equipment.waiting import until
from storage.base import Batch, Watch
from storage.etcd import EtcdStorage

Delivery = tuple[int, tuple[tuple[str, bytes | None], ...]]
"""A revision with its changes in order: key, and value or None for a deletion."""


class Listener:
    """`revision` is how far it has come; `deliveries` leaves out the batches that only say that."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.batches: list[Batch] = []
        self.revision = 0
        self.may_read = asyncio.Event()
        self.may_read.set()
        self.error: Exception | None = None

    @property
    def deliveries(self) -> list[Delivery]:
        return [
            (
                batch.revision,
                tuple((e.entry.key, e.entry.value if e.kind == "put" else None) for e in batch.events),
            )
            for batch in self.batches
            if batch.events
        ]

    async def run(self) -> None:
        try:
            async for batch in self.watch:
                self.batches.append(batch)
                self.revision = batch.revision
                await self.may_read.wait()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    async def reach(self, revision: int, timeout: float = 40.0) -> None:
        """Wait until everything up to a revision has come; an error of the watch is raised."""

        def there() -> bool:
            if self.error is not None:
                raise self.error
            return self.revision >= revision

        await until(there, f"revision {revision}, the last that came is {self.revision}", timeout)

    async def fails(self, timeout: float = 40.0) -> Exception:
        """Wait for the error that ends the watch."""
        return await until(lambda: self.error, "the watch ends with an error", timeout)


@asynccontextmanager
async def listening(storage: EtcdStorage, prefix: str, after: int, *, live: bool = True) -> AsyncIterator[Listener]:
    """Watch in a task of its own until the end of the block."""
    async with storage.watch(prefix, after, live=live) as watch:
        listener = Listener(watch)
        task = asyncio.create_task(listener.run(), name="listener")
        try:
            yield listener
        finally:
            task.cancel()
            await asyncio.wait({task})


async def told_by_etcd(direct: Gateway, prefix: str, after: int, last: int) -> list[Delivery]:
    """What a watch on `prefix` after a revision has to deliver up to `last`, which is the revision of a write there."""
    changes = await direct.history(prefix, after + 1, last)
    visible = [change for change in changes if "/.barrier/" not in change.key]
    grouped = groupby(visible, lambda change: change.revision)
    return [(revision, tuple((change.key, change.value) for change in group)) for revision, group in grouped]
