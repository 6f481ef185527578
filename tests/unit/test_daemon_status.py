"""What the daemon says of itself must come while its probes still listen."""

from __future__ import annotations

import asyncio

from equipment.widget import registry
from lrm.bookmarks import Bookmarks
from lrm.cache import Cache
from lrm.leaders import Leaders
from lrm.settings import Settings
from lrm.status import DaemonStatus
from lrm.testing import VirtualClock
from storage.base import Health
from storage.memory import MemoryStorage
from storage.redis_bookmarks import RedisBookmarks


class HangingStorage(MemoryStorage):
    """A store whose servers take requests and never answer."""

    async def health(self) -> Health:
        await asyncio.Event().wait()
        raise AssertionError("nothing wakes it")


async def test_a_store_that_hangs_is_told_within_seconds() -> None:
    clock = VirtualClock()
    storage = HangingStorage(clock=clock)
    settings = Settings(redis_url="redis://127.0.0.1:1/0")
    bookmarks = Bookmarks(RedisBookmarks(settings.redis_url, clock), storage, clock, every=1)
    status = DaemonStatus(
        settings,
        clock,
        storage=storage,
        cache=Cache(storage, registry(), clock),
        leaders=Leaders(storage, clock, root="/lrm"),
        bookmarks=bookmarks,
    )
    asked = asyncio.create_task(status.health())
    await clock.advance(1.9)
    assert not asked.done()
    await clock.advance(0.2)
    async with asyncio.timeout(30):
        told = await asked
    assert told["status"] == "unhealthy"
    assert "etcd does not answer" in told["problems"]
    assert any("did not answer within 2 s" in note for note in told["notes"])
