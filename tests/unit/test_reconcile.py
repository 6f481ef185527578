"""The runner: level-driven, one reconcile per key, own writes visible, finalizers, deadlines, leadership."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from equipment.runner_world import WidgetController, world
from equipment.widget import Note, Phase, Widget, registry, widget
from lrm.cache import Cache
from lrm.client import Client
from lrm.clock import WallJumps
from lrm.controller import Context, Hints, Result
from lrm.election import StaticElection
from lrm.errors import ResourceNotFound, TerminalError
from lrm.reconcile import Runner
from lrm.testing import VirtualClock
from storage.base import Batch, Entry, Guard, Watch
from storage.clock import SystemClock
from storage.errors import Unavailable
from storage.memory import MemoryStorage


async def test_existing_and_new_objects_are_reconciled_and_unchanged_ones_are_left_alone() -> None:
    seen: list[tuple[str, int]] = []

    async def step(w: Widget, _ctx: Context) -> Result:
        seen.append((w.name, w.metadata.generation))
        return Result.done()

    async with world(WidgetController(step), widget("old")) as it:
        await it.until(lambda: seen == [("old", 1)])
        made = await it.client.create(widget("new"))
        await it.until(lambda: ("new", 1) in seen)
        await it.client.update(made, lambda w: setattr(w.spec, "count", 5))
        await it.until(lambda: ("new", 2) in seen)
        await it.quiet()
        assert seen == [("old", 1), ("new", 1), ("new", 2)]


async def test_the_echo_of_an_own_write_does_not_wake_the_key_but_a_foreign_one_does() -> None:
    runs = 0

    async def step(w: Widget, ctx: Context) -> Result:
        nonlocal runs
        runs += 1
        await ctx.client.update_status(w, lambda x: setattr(x.status, "seen", runs))
        return Result.done()

    async with world(WidgetController(step), widget()) as it:
        await it.until(lambda: runs == 1)
        await it.quiet()
        assert runs == 1
        stored = await it.client.get(Widget, "default", "w1")
        await it.client.update(stored, lambda w: w.metadata.annotations.update(a="b"))
        await it.until(lambda: runs == 2)
        await it.quiet()
        assert runs == 2


async def test_a_foreign_write_during_a_reconcile_is_not_missed() -> None:
    entered, leave = asyncio.Event(), asyncio.Event()
    counts: list[int] = []

    async def step(w: Widget, ctx: Context) -> Result:
        counts.append(w.spec.count)
        if len(counts) == 1:
            entered.set()
            await leave.wait()
            await ctx.client.update_status(w, lambda x: setattr(x.status, "seen", 1))
        return Result.done()

    async with world(WidgetController(step), widget()) as it:
        await entered.wait()
        stored = await it.client.get(Widget, "default", "w1")
        await it.client.update(stored, lambda w: setattr(w.spec, "count", 9))
        await it.cache.barrier(30)
        leave.set()
        await it.until(lambda: counts == [1, 9])
        await it.quiet()
        assert counts == [1, 9]


async def test_a_reconcile_always_sees_what_it_wrote_last() -> None:
    seen: list[int] = []

    async def step(w: Widget, ctx: Context) -> Result:
        seen.append(w.status.seen)
        if w.status.seen < 20:
            await ctx.client.update_status(w, lambda x: setattr(x.status, "seen", x.status.seen + 1))
            return Result.after(0.0001)
        return Result.done()

    async with world(WidgetController(step), widget()) as it:
        await it.until(lambda: seen[-1:] == [20])
        assert seen == list(range(21))


async def test_finalizer_is_there_before_the_first_reconcile_and_goes_only_when_cleaned_up() -> None:
    seen: list[list[str]] = []
    cleaned: list[str] = []

    async def step(w: Widget, _ctx: Context) -> Result:
        seen.append(list(w.metadata.finalizers))
        return Result.done()

    async def cleanup(w: Widget, _ctx: Context) -> Result:
        cleaned.append(w.name)
        return Result.after(0.01) if len(cleaned) < 3 else Result.done()

    controller = WidgetController(step, finalizer="test.io/clean", cleanup=cleanup)
    async with world(controller, widget()) as it:
        await it.until(lambda: seen == [["test.io/clean"]])
        stored = await it.client.get(Widget, "default", "w1")
        await it.client.delete(stored)
        await it.until(lambda: it.cache.get(Widget, "default", "w1") is None)
        assert len(cleaned) == 3
        with pytest.raises(ResourceNotFound):
            await it.client.get(Widget, "default", "w1")
        assert len(seen) == 1


async def test_an_object_deleted_before_the_finalizer_was_added_is_not_cleaned_up() -> None:
    cleaned: list[str] = []

    async def step(_w: Widget, _ctx: Context) -> Result:
        return Result.done()

    async def cleanup(w: Widget, _ctx: Context) -> Result:
        cleaned.append(w.name)
        return Result.done()

    foreign = widget()
    foreign.metadata.finalizers = ["someone.io/else"]
    storage_made = WidgetController(step, finalizer="test.io/clean", cleanup=cleanup)
    async with world(storage_made) as it:
        it.runner.queue.close()
        made = await it.client.create(foreign)
        await it.client.delete(made)
        await it.quiet()
        assert cleaned == []


async def test_failures_are_retried_with_growing_delay_and_terminal_errors_are_not() -> None:
    tries: dict[str, int] = {}

    async def step(w: Widget, _ctx: Context) -> Result:
        tries[w.name] = tries.get(w.name, 0) + 1
        if w.name == "terminal":
            raise TerminalError("BadSpec", "will never work")
        if tries[w.name] < 3:
            raise RuntimeError("not yet")
        return Result.done()

    async with world(WidgetController(step), widget("flaky"), widget("terminal")) as it:
        await it.until(lambda: tries.get("flaky") == 3)
        await it.quiet()
        assert tries == {"flaky": 3, "terminal": 1}
        assert it.runner.stats.failures == 2
        assert it.runner.stats.terminal == 1


async def test_a_reconcile_over_its_deadline_is_cancelled_and_tried_again() -> None:
    cancelled: list[bool] = []

    async def step(_w: Widget, _ctx: Context) -> Result:
        if not cancelled:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(True)
                raise
        return Result.done()

    async with world(WidgetController(step), widget()) as it:
        await it.until(lambda: it.runner.stats.reconciles == 2)
        assert cancelled == [True]


async def test_other_kinds_wake_the_keys_they_map_to() -> None:
    seen: list[str] = []

    async def step(w: Widget, _ctx: Context) -> Result:
        seen.append(w.name)
        return Result.done()

    async with world(WidgetController(step), widget()) as it:
        await it.until(lambda: seen == ["w1"])
        await it.client.create(Note.model_validate({**widget().wire(), "kind": "Note"}))
        await it.until(lambda: seen == ["w1", "w1"])


async def test_a_deposed_leader_stops_reconciling_and_writes_nothing() -> None:
    hold = asyncio.Event()
    outcomes: list[str] = []

    async def step(w: Widget, ctx: Context) -> Result:
        await hold.wait()
        try:
            await ctx.client.update_status(w, lambda x: setattr(x.status, "seen", 1))
        except Exception as error:
            outcomes.append(type(error).__name__)
            raise
        return Result.done()

    async with world(WidgetController(step), widget()) as it:
        await it.until(lambda: it.runner.queue.processing == 1)
        await it.election.acquire()
        hold.set()
        async with asyncio.timeout(30):
            await it.running
        assert outcomes == ["Fenced"]
        assert (await it.client.get(Widget, "default", "w1")).status.seen == 0


async def test_no_reconcile_starts_before_the_caches_hold_all_that_was_written_before() -> None:
    first_seen: list[Phase] = []

    async def step(w: Widget, _ctx: Context) -> Result:
        first_seen.append(w.status.phase)
        return Result.done()

    storage, clock = MemoryStorage(), SystemClock()
    client = Client(storage, registry(), clock, owner="widgets")
    made = await client.create(widget())
    cache = Cache(storage, registry(), clock)
    runner = Runner(WidgetController(step), client, cache, clock)
    term = await StaticElection(storage, clock, root="/lrm", lock_name="w", identity="x").acquire()
    running = asyncio.create_task(runner.run(term))
    await asyncio.sleep(0.05)
    assert first_seen == []
    await client.update_status(made, lambda w: setattr(w.status, "phase", Phase.READY))
    caching = asyncio.create_task(cache.run())
    async with asyncio.timeout(30):
        while not first_seen:
            await asyncio.sleep(0.005)
    assert first_seen == [Phase.READY]
    for task in (running, caching):
        task.cancel()
    await asyncio.gather(running, caching, return_exceptions=True)


async def test_drain_lets_the_reconcile_in_hand_end_and_starts_no_other() -> None:
    leave = asyncio.Event()
    ended: list[str] = []

    async def step(w: Widget, _ctx: Context) -> Result:
        await leave.wait()
        ended.append(w.name)
        return Result.done()

    controller = WidgetController(step)
    controller.workers = 1
    async with world(controller, widget("a"), widget("b")) as it:
        await it.until(lambda: it.runner.queue.processing == 1)
        draining = asyncio.create_task(it.runner.drain(5))
        await asyncio.sleep(0)
        leave.set()
        await draining
        assert ended == ["a"]


async def test_after_a_restore_of_the_store_every_key_is_reconciled_again() -> None:
    """What a key wrote on a line of history that has ended is not waited for on the new one."""
    runs = 0

    async def step(w: Widget, ctx: Context) -> Result:
        nonlocal runs
        runs += 1
        await ctx.client.update_status(w, lambda x: setattr(x.status, "seen", runs))
        return Result.after(0.05)

    async with world(WidgetController(step), widget()) as it:
        await it.until(lambda: runs >= 2)
        snapshot = it.storage.snapshot()
        for i in range(100):
            await it.storage.set(f"/lrm/other/{i}", b"x")
        before = runs
        await it.until(lambda: runs >= before + 2)
        it.storage.restore(snapshot)
        await it.until(lambda: not it.cache.current or it.cache.revision < 100)
        before = runs
        await it.until(lambda: runs >= before + 5, seconds=2.5)


async def test_a_foreign_change_hidden_under_an_own_write_by_a_relist_is_not_missed() -> None:
    entered, leave = asyncio.Event(), asyncio.Event()
    counts: list[int] = []

    async def step(w: Widget, ctx: Context) -> Result:
        counts.append(w.spec.count)
        if len(counts) == 1:
            entered.set()
            await leave.wait()
            await ctx.client.update_status(w, lambda x: setattr(x.status, "seen", 7))
        return Result.done()

    storage, clock = MemoryStorage(), SystemClock()
    client = Client(storage, registry(), clock, owner="widgets")
    await client.create(widget())
    cache = Cache(storage, registry(), clock)
    caching = asyncio.create_task(cache.run())
    controller = WidgetController(step)
    controller.deadline = 10
    runner = Runner(controller, client, cache, clock)
    term = await StaticElection(storage, clock, root="/lrm", lock_name="w", identity="x").acquire()
    running = asyncio.create_task(runner.run(term))
    async with asyncio.timeout(30):
        await entered.wait()
        caching.cancel()
        await asyncio.gather(caching, return_exceptions=True)
        stored = await client.get(Widget, "default", "w1")
        await client.update(stored, lambda w: setattr(w.spec, "count", 9))
        leave.set()
        while runner.queue.processing:
            await asyncio.sleep(0.005)
        await storage.compact(await storage.current_revision())
        caching = asyncio.create_task(cache.run())
        while counts != [1, 9]:
            await asyncio.sleep(0.005)
    for task in (running, caching):
        task.cancel()
    await asyncio.gather(running, caching, return_exceptions=True)


async def test_a_jump_of_the_wall_is_told_to_reconciles_for_a_minute() -> None:
    clock = VirtualClock()
    jumps = WallJumps(clock)
    assert not jumps.lately()
    await clock.advance(3600)
    assert not jumps.lately()
    clock.jump_wall(-20)
    assert not jumps.lately()
    clock.jump_wall(40)
    assert jumps.lately()
    await clock.advance(59)
    assert jumps.lately()
    await clock.advance(2)
    assert not jumps.lately()
    clock.jump_wall(-3600)
    assert jumps.lately()


class AwayStorage(MemoryStorage):
    """A store whose barriers and updates fail while it is away."""

    away = False

    async def update(self, key: str, value: bytes, *, expected_revision: int, guards: tuple[Guard, ...] = ()) -> Entry:
        self._here()
        return await super().update(key, value, expected_revision=expected_revision, guards=guards)

    @asynccontextmanager
    async def watch(self, prefix: str, after_revision: int, *, live: bool = False) -> AsyncIterator[Watch]:
        async with super().watch(prefix, after_revision, live=live) as watch:
            yield AwayWatch(self, watch)

    def _here(self) -> None:
        if self.away:
            raise Unavailable("away")


class AwayWatch:
    def __init__(self, storage: AwayStorage, watch: Watch) -> None:
        self._storage = storage
        self._watch = watch

    def __aiter__(self) -> AsyncIterator[Batch]:
        return self._watch.__aiter__()

    async def barrier(self, timeout: float = 3.0) -> int:
        self._storage._here()
        return await self._watch.barrier(timeout)


async def test_while_the_store_is_away_nothing_is_started_and_a_stop_does_not_wait_for_it() -> None:
    runs = 0

    async def step(w: Widget, ctx: Context) -> Result:
        nonlocal runs
        runs += 1
        await ctx.client.update_status(w, lambda x: setattr(x.status, "seen", runs))
        return Result.after(0.01)

    controller = WidgetController(step)
    controller.workers = 1
    storage = AwayStorage()
    async with world(controller, widget(), storage=storage) as it:
        await it.until(lambda: runs >= 3)
        storage.away = True
        await it.until(lambda: it.runner.stats.failures > 0)
        before = runs
        await asyncio.sleep(1.5)  # several backoffs of the key pass
        assert runs == before
        async with asyncio.timeout(20):
            await it.runner.drain(60)


async def test_after_the_store_was_away_work_goes_on_by_itself() -> None:
    runs = 0

    async def step(w: Widget, ctx: Context) -> Result:
        nonlocal runs
        runs += 1
        await ctx.client.update_status(w, lambda x: setattr(x.status, "seen", runs))
        return Result.after(0.01)

    storage = AwayStorage()
    async with world(WidgetController(step), widget(), storage=storage) as it:
        await it.until(lambda: runs >= 3)
        storage.away = True
        await it.until(lambda: it.runner.stats.failures > 0)
        storage.away = False
        before = runs
        await it.until(lambda: runs >= before + 3)


async def test_a_hint_from_outside_the_store_has_an_object_looked_at_while_somebody_leads() -> None:
    runs, hints = 0, Hints()

    async def step(_w: Widget, _ctx: Context) -> Result:
        nonlocal runs
        runs += 1
        return Result.done()

    controller = WidgetController(step)
    controller.hints = hints
    async with world(controller, widget()) as it:
        await it.until(lambda: runs == 1)
        await it.quiet()
        hints.tell(("default", "w1"))
        await it.until(lambda: runs == 2)
        hints.tell(("default", "nobody"))
        await it.quiet()
        assert runs == 2
    hints.tell(("default", "w1"))
    assert runs == 2, "nobody listens any more"
