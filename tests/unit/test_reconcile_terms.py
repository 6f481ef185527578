"""What a term begins with, what its bookmark may say, and what people can ask of a runner by annotation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from equipment.runner_world import WidgetController, World, world
from equipment.widget import Note, Widget, registry, widget
from lrm.cache import Cache, Change
from lrm.client import Client
from lrm.controller import Context, Result, Trigger
from lrm.election import StaticElection
from lrm.errors import CacheBehind, NotLeading, ResourceConflict, RetryLater
from lrm.reconcile import Runner
from lrm.resource import PAUSE_ANNOTATION, RECONCILE_ANNOTATION
from storage.base import Batch, Watch
from storage.clock import SystemClock
from storage.errors import OutcomeUnknown, TooLarge, Unavailable
from storage.memory import MemoryStorage


def annotate(key: str, value: str | None) -> Callable[[Widget], None]:
    def change(w: Widget) -> None:
        if value is None:
            del w.metadata.annotations[key]
        else:
            w.metadata.annotations[key] = value

    return change


def paused(name: str) -> Widget:
    made = widget(name)
    made.metadata.annotations[PAUSE_ANNOTATION] = "true"
    return made


async def test_a_paused_object_is_neither_reconciled_nor_cleaned_up_until_the_pause_ends() -> None:
    steps: list[str] = []

    async def step(w: Widget, _ctx: Context) -> Result:
        steps.append(f"reconcile {w.name}")
        return Result.done()

    async def cleanup(w: Widget, _ctx: Context) -> Result:
        steps.append(f"finalize {w.name}")
        return Result.done()

    async with world(WidgetController(step, finalizer="test/f", cleanup=cleanup), paused("p"), widget("w")) as it:
        await it.until(lambda: steps == ["reconcile w"])
        held = await it.client.get(Widget, "default", "p")
        await it.client.update(held, lambda w: setattr(w.spec, "count", 9))
        await it.quiet()
        assert it.runner.describe()["paused"] == 1
        assert not (await it.client.get(Widget, "default", "p")).metadata.finalizers
        await it.client.update(held, annotate(PAUSE_ANNOTATION, "false"))
        await it.until(lambda: steps == ["reconcile w", "reconcile p"])
        held = await it.client.get(Widget, "default", "p")
        await it.client.update(held, annotate(PAUSE_ANNOTATION, "true"))
        await it.client.delete(held)
        await it.quiet()
        assert steps == ["reconcile w", "reconcile p"]
        assert it.runner.finalizers()["pending"] == 1
        held = await it.client.get(Widget, "default", "p")
        await it.client.update(held, annotate(PAUSE_ANNOTATION, None))
        await it.until(lambda: steps[-1] == "finalize p")
        await it.quiet()
        assert it.cache.get(Widget, "default", "p") is None
        assert it.runner.finalizers() == {
            "name": "widgets",
            "finalizer": "test/f",
            "pending": 0,
            "processing": 0,
            "completed": 1,
        }


async def test_a_pause_ends_also_for_a_controller_that_is_not_woken_by_annotations() -> None:
    seen: list[str] = []

    async def step(w: Widget, _ctx: Context) -> Result:
        seen.append(w.name)
        return Result.done()

    asleep = paused("w1")
    asleep.metadata.labels["asleep"] = "yes"
    async with world(WidgetController(step), asleep) as it:
        await it.quiet()
        held = await it.client.get(Widget, "default", "w1")
        await it.client.update(held, annotate("other", "x"))
        await it.quiet()
        assert seen == []
        await it.client.update(held, annotate(PAUSE_ANNOTATION, None))
        await it.until(lambda: seen == ["w1"])
        await it.client.update(held, annotate("other", "y"))
        await it.quiet()
        assert seen == ["w1"]
        await it.client.update(held, annotate(RECONCILE_ANNOTATION, "1"))
        await it.until(lambda: seen == ["w1", "w1"])


async def test_reconcile_now_ends_a_backoff() -> None:
    tries = 0

    async def step(_w: Widget, _ctx: Context) -> Result:
        nonlocal tries
        tries += 1
        if tries < 5:
            raise RetryLater("the world outside is not ready")
        return Result.done()

    async with world(WidgetController(step), widget()) as it:
        for expected in range(1, 5):
            await it.until(lambda expected=expected: tries == expected)
            held = await it.client.get(Widget, "default", "w1")
            await it.client.update(held, annotate(RECONCILE_ANNOTATION, str(expected)))
        await it.until(lambda: tries == 5)
        await it.quiet()
        assert it.runner.queue.waiting <= 1, "only the resync"


async def position(it: World) -> int:
    await it.cache.barrier(30)
    return it.runner._position()


async def test_the_position_stays_below_what_was_not_attempted_and_passes_what_was() -> None:
    hold, fail = asyncio.Event(), ["store", "outside", "mistake"]

    async def step(w: Widget, ctx: Context) -> Result:
        if w.name == "held":
            await hold.wait()
        if w.name == "failing" and fail:
            match fail.pop(0):
                case "store":
                    raise Unavailable("no member answers")
                case "outside":
                    raise RetryLater("not yet")
                case _:
                    raise RuntimeError("a defect")
        await ctx.client.update_status(w, lambda x: setattr(x.status, "seen", x.spec.count))
        return Result.done()

    controller = WidgetController(step)
    controller.deadline = 30
    async with world(controller) as it:
        await it.until(lambda: it.runner._seen > 0)  # the first pass is over
        held = await it.client.create(widget("held"))
        other = await it.client.create(widget("other", count=3))
        await it.until(lambda: it.runner.stats.reconciles == 2 and it.runner.queue.processing == 1)
        below = int(held.metadata.resource_version) - 1
        assert await position(it) == below
        # A foreign write to what is in hand waits for an attempt of its own.
        foreign = await it.client.update(held, lambda w: setattr(w.spec, "count", 9))
        assert foreign is not None
        assert await position(it) == below
        hold.set()
        await it.until(lambda: it.runner.stats.reconciles == 3)
        await it.quiet()
        assert it.runner._position() == it.cache.revision
        # Own writes move it too, and so do failures that were not the store's.
        failing = await it.client.create(widget("failing"))
        await it.until(lambda: fail == [])
        await it.until(lambda: it.runner.queue.processing == 0 and it.runner.queue.waiting == 3)
        assert await position(it) > int(failing.metadata.resource_version)
        await it.client.create(Note.model_validate({**other.wire(), "kind": "Note", "metadata": {"name": "other"}}))
        await it.quiet()
        assert it.runner._position() == it.cache.revision


async def test_a_failure_of_the_store_leaves_the_position_where_it_was() -> None:
    away = True

    async def step(_w: Widget, _ctx: Context) -> Result:
        if away:
            raise Unavailable("no member answers")
        return Result.done()

    async with world(WidgetController(step)) as it:
        await it.until(lambda: it.runner._seen > 0)
        made = await it.client.create(widget())
        await it.until(lambda: it.runner.stats.failures >= 2)
        assert await position(it) == int(made.metadata.resource_version) - 1
        away = False
        await it.until(lambda: it.runner._position() == it.cache.revision)


async def test_what_the_store_refuses_for_good_holds_no_bookmark_back() -> None:
    async def step(_w: Widget, _ctx: Context) -> Result:
        raise TooLarge("a value of 2 MiB")

    async with world(WidgetController(step)) as it:
        await it.until(lambda: it.runner._seen > 0)
        made = await it.client.create(widget())
        await it.until(lambda: it.runner.stats.failures >= 1)
        await it.until(lambda: it.runner._position() >= int(made.metadata.resource_version))


@pytest.mark.parametrize(
    "error",
    [
        NotLeading("deposed"),
        ResourceConflict("widgets", "w1"),
        CacheBehind("not yet"),
        OutcomeUnknown("the reply was lost"),
    ],
)
async def test_an_attempt_that_was_none_holds_the_bookmark_back(error: Exception) -> None:
    raised = asyncio.Event()

    async def step(_w: Widget, _ctx: Context) -> Result:
        raised.set()
        raise error

    async with world(WidgetController(step)) as it:
        await it.until(lambda: it.runner._seen > 0)
        made = await it.client.create(widget())
        await it.until(raised.is_set)
        assert await position(it) == int(made.metadata.resource_version) - 1


async def test_an_object_that_another_one_lacks_is_looked_for_with_growing_delay() -> None:
    async def step(w: Widget, ctx: Context) -> Result:
        await ctx.client.get(Widget, w.namespace, "nobody")
        return Result.done()

    async with world(WidgetController(step), widget()) as it:
        await it.until(lambda: it.runner.queue.failures(("default", "w1")) == 2)


class Mistaken(WidgetController):
    """Fails in every question but the work itself."""

    def settled(self, resource: Widget) -> bool:
        raise KeyError(resource.name)

    def wakes(self, change: Change) -> bool:
        raise KeyError(change.item.name)

    def triggers(self) -> list[Trigger]:
        def fail(change: Change) -> list[tuple[str, str]]:
            raise KeyError(change.item.name)

        return [Trigger(Note, fail)]


async def test_a_controllers_mistakes_end_neither_its_runner_nor_the_cache() -> None:
    seen: list[int] = []

    async def step(w: Widget, _ctx: Context) -> Result:
        seen.append(w.spec.count)
        return Result.done()

    async with world(Mistaken(step), widget(count=1)) as it:
        await it.until(lambda: seen == [1])
        held = await it.client.get(Widget, "default", "w1")
        await it.client.create(Note.model_validate({**held.wire(), "kind": "Note", "metadata": {"name": "n"}}))
        await it.client.update(held, lambda w: setattr(w.spec, "count", 2))
        await it.until(lambda: seen == [1, 2])
        assert not it.running.done()


async def test_a_runner_that_failed_over_an_update_looks_at_everything_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    async def step(w: Widget, _ctx: Context) -> Result:
        seen.append(w.name)
        return Result.done()

    async with world(WidgetController(step), widget("old")) as it:
        await it.until(lambda: seen == ["old"])
        with monkeypatch.context() as broken:
            broken.setattr(it.runner, "_on_own_change", None)  # what is not callable stands for any defect
            await it.client.create(widget("new"))
            await it.until(lambda: sorted(seen) == ["new", "old", "old"])
        await it.client.create(widget("later"))
        await it.until(lambda: seen[3:] == ["later"])
        assert not it.running.done()


class Late(MemoryStorage):
    """A store whose live watches deliver nothing until they are let."""

    def __init__(self) -> None:
        super().__init__()
        self.let = asyncio.Event()
        self.let.set()

    def watch(self, prefix: str, after_revision: int, *, live: bool = False) -> AbstractAsyncContextManager[Watch]:
        opened = super().watch(prefix, after_revision, live=live)
        return self._held(opened) if live else opened

    @asynccontextmanager
    async def _held(self, opened: AbstractAsyncContextManager[Watch]) -> AsyncIterator[Watch]:
        async with opened as watch:
            take = watch.__anext__

            async def taken() -> Batch:
                await self.let.wait()
                return await take()

            class Held:
                barrier = watch.barrier
                lost_seconds = 0.0

                def __aiter__(self) -> AsyncIterator[Batch]:
                    return self  # type: ignore[return-value]

                async def __anext__(self) -> Batch:
                    return await taken()

            yield Held()  # type: ignore[misc]


async def test_a_new_term_reconciles_nothing_before_its_cache_holds_its_predecessors_last_write() -> None:
    seen: list[int] = []

    async def step(w: Widget, _ctx: Context) -> Result:
        seen.append(w.spec.count)
        return Result.done()

    storage, clock = Late(), SystemClock()
    client = Client(storage, registry(), clock, owner="widgets")
    made = await client.create(widget(count=1))
    cache = Cache(storage, registry(), clock)
    caching = asyncio.create_task(cache.run())
    await cache.wait_following()
    await asyncio.sleep(0.05)
    storage.let.clear()
    await client.update(made, lambda w: setattr(w.spec, "count", 2))  # by the leader before us
    term = await StaticElection(storage, clock, root="/lrm", lock_name="w", identity="x").acquire()
    running = asyncio.create_task(Runner(WidgetController(step), client, cache, clock).run(term))
    await asyncio.sleep(0.2)
    assert seen == []
    storage.let.set()
    async with asyncio.timeout(30):
        while not seen:
            await asyncio.sleep(0.01)
    assert seen == [2]
    for task in (running, caching):
        task.cancel()
    await asyncio.gather(running, caching, return_exceptions=True)
