"""What the daemon says of itself must come while its probes still listen."""

from __future__ import annotations

import asyncio

from equipment.widget import registry
from lrm.bookmarks import Bookmarks
from lrm.cache import Cache
from lrm.leaders import Leaders
from lrm.model import rfc3339
from lrm.outside import OutsideHealth
from lrm.settings import Settings
from lrm.status import DaemonStatus
from lrm.testing import VirtualClock
from storage.base import Health
from storage.memory import MemoryStorage
from storage.redis_bookmarks import ProcessBookmarks, RedisBookmarks


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
        outside=OutsideHealth(clock),
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


async def test_a_party_outside_that_does_not_answer_is_named_and_degrades() -> None:
    clock = VirtualClock()
    storage, outside = MemoryStorage(clock=clock), OutsideHealth(clock)
    status = DaemonStatus(
        Settings(redis_url=""),
        clock,
        storage=storage,
        cache=(cache := Cache(storage, registry(), clock)),
        leaders=Leaders(storage, clock, root="/lrm"),
        bookmarks=Bookmarks(ProcessBookmarks(), storage, clock, every=1),
        outside=outside,
    )
    following = asyncio.create_task(cache.run())
    await cache.barrier()
    assert ((told := await status.health())["status"], told["outside"]) == ("ok", [])
    outside.up("engine")
    since = rfc3339(clock.now())
    await clock.advance(60)
    outside.down("engine", "no such socket")
    down = rfc3339(clock.now())
    await clock.advance(60)
    outside.down("engine", "connection refused")
    told = await status.health()
    assert (told["status"], told["notes"]) == ("degraded", ["engine: connection refused"])
    assert told["outside"] == [{"name": "engine", "ok": False, "since": down, "error": "connection refused"}]
    assert down != since
    assert status.ready() == (True, ""), "what does not need it goes on"
    outside.up("engine")
    told = await status.health()
    assert (told["status"], told["outside"][0]["ok"], told["outside"][0]["since"] > down) == ("ok", True, True)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
