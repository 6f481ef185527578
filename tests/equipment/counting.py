"""Counts the writes to resources that a cache sees during a block, and exactly those.

The watch of a cache runs behind the store, so both ends of the block wait for it: a write before the block is never
counted, and one within it always is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from lrm.cache import Cache, CacheUpdate, Change


def by_kind(change: Change) -> str:
    """The plural and the type of a change."""
    return f"{change.kind.plural} {change.type}"


@asynccontextmanager
async def counting(cache: Cache, label: Callable[[Change], str] = by_kind) -> AsyncIterator[Counter[str]]:
    """How many writes of each label were made in the block; complete when the block has ended."""
    seen: Counter[str] = Counter()

    def count(update: CacheUpdate) -> None:
        seen.update(label(change) for change in update.changes)

    await cache.barrier(30)
    end = cache.subscribe(count)
    try:
        yield seen
        await cache.barrier(30)
    finally:
        end()
