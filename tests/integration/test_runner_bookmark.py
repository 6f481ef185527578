"""A runner and its bookmark on a real Redis: the next leader begins where the last one ended."""

from __future__ import annotations

from equipment.runner_world import WidgetController, world
from equipment.widget import Widget, registry, widget
from lrm.bookmarks import Bookmarks
from lrm.client import Client
from lrm.controller import Context, Result
from lrm.devservers import RedisServer
from storage.clock import SystemClock
from storage.memory import MemoryStorage
from storage.redis_bookmarks import RedisBookmarks


async def test_a_term_begins_with_what_changed_then_with_what_is_unsettled_and_spreads_the_rest(
    redis_server: RedisServer,
) -> None:
    seen: list[str] = []

    async def step(w: Widget, _ctx: Context) -> Result:
        seen.append(w.name)
        return Result.done()

    storage, clock = MemoryStorage(), SystemClock()
    store = RedisBookmarks(redis_server.url, clock, root="/term-begins")
    first = Bookmarks(store, storage, clock, every=60)
    async with world(WidgetController(step), storage=storage, bookmark=first.of("widgets")) as it:
        colours = {"a": None, "b": None, "c": "settled", "d": "settled", "e": "settled"}
        made = [await it.client.create(widget(n, colour=c)) for n, c in colours.items()]
        await it.until(lambda: sorted(seen) == list("abcde"))
        await it.quiet()
    assert (await store.all())["widgets"].revision >= int(made[-1].metadata.resource_version)
    await Client(storage, registry(), clock).update(made[3], lambda w: setattr(w.spec, "count", 7))
    seen.clear()
    controller = WidgetController(step)
    controller.workers, controller.poll = 1, 0.3
    second = Bookmarks(store, storage, clock, every=60)
    async with world(controller, storage=storage, bookmark=second.of("widgets")) as it:
        await it.until(lambda: len(seen) == 5)
        assert seen[:3] == ["d", "a", "b"]
        assert sorted(seen[3:]) == ["c", "e"]
    await store.aclose()
