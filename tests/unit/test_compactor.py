"""No history younger than the retention is ever forgotten, whatever clocks, leaders and stores do; older history is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipment.widget import registry
from lrm.cache import Cache
from lrm.compactor import BARRIER_SECONDS, Compactor, Samples
from lrm.election import StaticElection, Term
from lrm.testing import VirtualClock
from storage.base import Entry, Guard, Health
from storage.errors import NoSpace, NotFound, StoreReset, Unavailable
from storage.memory import MemoryStorage

HOUR = 3600.0
LINE = ("cluster", "epoch")
KEY = "/lrm/compactor"


class TroubledStorage(MemoryStorage):
    """A store that can be full (the alarm is raised, puts are refused) or away."""

    full = False
    away = False
    compacting: asyncio.Event | None = None

    async def _turn(self) -> None:
        if self.away:
            raise Unavailable("no member answers")
        await super()._turn()

    async def health(self) -> Health:
        health = await super().health()
        if self.away:
            return Health(ok=False, revision=0, notes=("No member answers.",))
        alarms = ("NOSPACE",) if self.full else ()
        return replace(health, members=tuple(replace(m, alarms=alarms) for m in health.members))

    async def create(self, key: str, value: bytes, *, lease: int = 0, guards: tuple[Guard, ...] = ()) -> Entry:
        self._refuse_if_full()
        return await super().create(key, value, lease=lease, guards=guards)

    async def update(self, key: str, value: bytes, *, expected_revision: int, guards: tuple[Guard, ...] = ()) -> Entry:
        self._refuse_if_full()
        return await super().update(key, value, expected_revision=expected_revision, guards=guards)

    async def compact(self, revision: int) -> None:
        if self.compacting:
            await self.compacting.wait()
        await super().compact(revision)

    def _refuse_if_full(self) -> None:
        if self.full:
            raise NoSpace("full")

    @property
    def compacted(self) -> int:
        return self._state.compacted


@dataclass
class Scene:
    """A store in which a revision is written each minute, and when each was."""

    clock: VirtualClock = field(default_factory=VirtualClock)
    written: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store = TroubledStorage(clock=self.clock)

    def compactor(self, *, is_led: bool = False, **options: Any) -> Compactor:
        """One as a daemon has that has just started."""
        cache = Cache(self.store, registry(), self.clock)
        options = {"every": 300.0, "retention": HOUR, **options}
        return Compactor(self.store, cache, self.clock, root="/lrm", is_led=lambda: is_led, **options)

    async def lead(self) -> Term:
        return await StaticElection(
            self.store, self.clock, root="/lrm", lock_name="compactor", identity="test"
        ).acquire()

    @asynccontextmanager
    async def leading(self, compactor: Compactor | None = None) -> AsyncIterator[Compactor]:
        """A term of a compactor; of a new process unless one is given."""
        compactor, term = compactor or self.compactor(), await self.lead()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(compactor.run(term))
            yield compactor
            term.lost()

    async def minutes(self, minutes: int, *, writing: bool = True) -> None:
        """Let time pass; each minute writes, and nothing that is younger than the retention may be gone."""
        for _ in range(minutes):
            if writing:
                self.written[await self.store.set("/lrm/r/x", b"x")] = self.clock.monotonic()
            await self.clock.advance(60)
            self.judge()

    async def write_barrier(self, instance: str) -> None:
        """As the live watch of a daemon does."""
        self.store._instance = instance
        async with self.store.watch("/lrm/r/", await self.store.current_revision(), live=True) as watch:
            waiting = asyncio.create_task(watch.barrier())
            async for _ in watch:
                break
            await self.clock.settle()
            assert waiting.cancel() or waiting.done()

    def judge(self, retention: float = HOUR) -> None:
        now = self.clock.monotonic()
        young = [r for r, at in self.written.items() if now - at < retention]
        # Compacting to a revision keeps its state: a reader may go on from it, and from all that is later.
        assert self.store.compacted <= min(young, default=self.store.compacted), "younger history was forgotten"

    def kept_minutes(self) -> float:
        """How old the oldest history is that can be read."""
        readable = [at for r, at in self.written.items() if r >= self.store.compacted]
        return (self.clock.monotonic() - min(readable)) / 60


@contextmanager
def ended(task: asyncio.Task[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        task.cancel()


async def test_history_older_than_an_hour_is_forgotten_and_younger_is_not() -> None:
    scene = Scene()
    async with scene.leading() as compactor:
        await scene.minutes(59)
        assert scene.store.compacted == 0
        await scene.minutes(31)
        assert 60 <= scene.kept_minutes() <= 67, "five minutes between two compactions, one between two looks"
        described = compactor.describe()
    assert described["compactedRevision"] == scene.store.compacted
    assert described["compactedAt"]
    assert described["compactions"] == 7
    assert described["error"] == ""


@pytest.mark.parametrize("jump", [-86400.0, -1800.0, 1800.0, 86400.0])
async def test_setting_the_wall_clock_changes_nothing(jump: float) -> None:
    """Set, and set right again, within one leader's life and over a change of leader."""
    scene = Scene()
    async with scene.leading():
        await scene.minutes(30)
        scene.clock.jump_wall(jump)
        await scene.minutes(30)
    async with scene.leading():
        await scene.minutes(10)
        scene.clock.jump_wall(-jump)
        await scene.minutes(20)
    assert 60 <= scene.kept_minutes() <= 70


async def test_leaders_that_change_more_often_than_hourly_compact_all_the_same() -> None:
    """Each is a new process that remembers nothing: it loses a minute of age at most."""
    scene = Scene()
    for _ in range(12):
        async with scene.leading():
            await scene.minutes(10)
    assert scene.store.compacted
    assert scene.kept_minutes() <= 60 + 12 + 10


async def test_a_night_without_any_daemon_makes_nothing_older() -> None:
    """Nobody knows how long it was; and then nobody wrote either."""
    scene = Scene()
    async with scene.leading():
        await scene.minutes(30)
    await scene.clock.advance(8 * HOUR)
    async with scene.leading():
        await scene.minutes(20)
        assert scene.store.compacted == 0
        await scene.minutes(20)
        assert scene.store.compacted


async def test_a_standby_takes_over_with_samples_of_its_own() -> None:
    scene = Scene()
    standby = scene.compactor(is_led=True)
    watching = asyncio.create_task(standby.watch())
    with ended(watching):
        await scene.minutes(65)
        assert scene.store.compacted == 0
        async with scene.leading(standby):
            await scene.minutes(1)
            assert scene.store.compacted


async def test_a_restored_store_makes_what_was_known_worthless() -> None:
    """Also where the new line has outgrown the old one's revisions before anybody looks: the cache has seen it."""
    scene = Scene()
    cache = Cache(scene.store, registry(), scene.clock)
    compactor = Compactor(scene.store, cache, scene.clock, root="/lrm", every=300, retention=HOUR, is_led=lambda: False)
    with ended(asyncio.create_task(cache.run())):
        async with scene.leading(compactor):
            await scene.minutes(2)
            snapshot = scene.store.snapshot()
            await scene.minutes(55)
            scene.store.restore(snapshot)
            scene.written = {r: at for r, at in scene.written.items() if r <= snapshot.revision}
            await scene.clock.advance(1)
            for _ in range(400):
                scene.written[await scene.store.set("/lrm/r/x", b"x")] = scene.clock.monotonic()
        async with scene.leading(compactor):
            await scene.minutes(58)
            assert scene.store.compacted <= snapshot.revision
            await scene.minutes(10)
            assert scene.store.compacted > snapshot.revision


async def test_a_revision_that_falls_makes_what_was_known_worthless() -> None:
    scene = Scene()
    async with scene.leading() as compactor:
        await scene.minutes(2)
        snapshot = scene.store.snapshot()
        await scene.minutes(55)
        scene.store.restore(snapshot)
        scene.written = {r: at for r, at in scene.written.items() if r <= snapshot.revision}
        with contextlib.suppress(StoreReset):
            await scene.store.get(KEY)
        await scene.minutes(50)
        assert scene.store.compacted <= snapshot.revision
        assert compactor.error == ""


async def test_a_new_epoch_makes_what_was_written_down_worthless() -> None:
    """As after a restore that was declared: numbers of the former line say nothing."""
    scene = Scene()
    async with scene.leading():
        await scene.minutes(40)
    await scene.store.set("/lrm/epoch", b"another")
    async with scene.leading():
        await scene.minutes(30)
        assert scene.store.compacted == 0


async def test_samples_that_nobody_can_read_are_replaced() -> None:
    scene = Scene()
    for rubbish in (b"{", b"[]", b'{"clusterId":"","epoch":"","samples":[7]}', b"\xff"):
        await scene.store.set(KEY, rubbish)
        async with scene.leading() as compactor:
            await scene.minutes(1)
            assert compactor.error == ""
        assert orjson.loads((await scene.store.get(KEY)).value)["samples"]


async def test_samples_of_revisions_that_do_not_exist_are_not_believed() -> None:
    scene = Scene()
    async with scene.leading():
        await scene.minutes(1)
    document = orjson.loads((await scene.store.get(KEY)).value)
    document["samples"] = [{"ageSeconds": 9000, "revision": 10**6}]
    await scene.store.set(KEY, orjson.dumps(document))
    async with scene.leading() as compactor:
        await scene.minutes(70)
        assert compactor.error == ""
        assert scene.store.compacted


async def test_barriers_of_daemons_that_are_gone_are_deleted() -> None:
    scene = Scene()
    await scene.write_barrier("gone")
    await scene.write_barrier("here")
    async with scene.leading() as compactor:
        await scene.minutes(50)
        await scene.write_barrier("here")
        await scene.minutes(20)
        with pytest.raises(NotFound):
            await scene.store.get("/lrm/r/.barrier/gone")
        assert await scene.store.get("/lrm/r/.barrier/here"), "written 20 minutes ago"
        assert compactor.describe()["barriersDeleted"] == 1


async def test_a_deposed_leader_writes_nothing_down_and_stops() -> None:
    scene = Scene()
    async with scene.leading() as compactor:
        await scene.minutes(2)
        kept = await scene.store.get(KEY)
        await scene.lead()
        await scene.minutes(2)
        assert (await scene.store.get(KEY)) == kept
        assert compactor.describe()["compactions"] == 0


async def test_a_full_store_is_compacted_by_the_leader_although_nothing_can_be_written_down() -> None:
    scene = Scene()
    async with scene.leading() as compactor:
        await scene.minutes(50)
        scene.store.full = True
        await scene.minutes(20, writing=False)
        assert scene.store.compacted
        assert "full" in compactor.error
        scene.store.full = False
        await scene.minutes(2)
        assert compactor.error == ""


@pytest.mark.parametrize("remembers", [True, False], ids=["with samples of its own", "with what was written down"])
async def test_without_a_leader_any_daemon_compacts_a_full_store(remembers: bool) -> None:
    """Out of space no election can be won, so the daemon cannot lead first."""
    scene = Scene()
    daemon = scene.compactor()
    watching = asyncio.create_task((daemon if remembers else scene.compactor()).watch())
    with ended(watching):
        if remembers:
            await scene.minutes(70)
        else:
            async with scene.leading(scene.compactor(compacts=False, every=1e9)):
                pass
            async with scene.leading() as leader:
                await scene.minutes(59)
            assert leader.describe()["compactions"] == 0
            daemon = scene.compactor()
            watching.cancel()
            watching = asyncio.create_task(daemon.watch())
            await scene.minutes(5)
        assert scene.store.compacted == 0, "while there is space it is not this daemon's to do"
        scene.store.full = True
        await scene.minutes(8, writing=False)
        assert scene.store.compacted
        assert daemon.describe()["compactions"] in (1, 2), "at most once in five minutes"
    watching.cancel()


@pytest.mark.parametrize(("is_led", "compacts"), [(True, True), (False, False)], ids=["led", "switched off"])
async def test_a_full_store_is_left_alone_where_it_is_anothers_task(is_led: bool, compacts: bool) -> None:
    scene = Scene()
    daemon = scene.compactor(is_led=is_led, compacts=compacts)
    with ended(asyncio.create_task(daemon.watch())):
        await scene.minutes(70)
        scene.store.full = True
        await scene.minutes(10, writing=False)
        assert scene.store.compacted == 0
        assert daemon.out_of_space


async def test_a_store_that_is_away_is_told_and_tried_again() -> None:
    scene = Scene()
    async with scene.leading() as compactor:
        await scene.minutes(30)
        scene.store.away = True
        await scene.clock.advance(600)
        assert "no member answers" in compactor.error.lower()
        scene.store.away = False
        await scene.minutes(40)
        assert compactor.error == ""
        assert scene.store.compacted


async def test_a_standby_tells_only_what_is_wrong_now() -> None:
    scene = Scene()
    standby = scene.compactor(is_led=True)
    with ended(asyncio.create_task(standby.watch())):
        scene.store.away = True
        await scene.clock.advance(61)
        assert "No member answers" in standby.error
        scene.store.away = False
        await scene.clock.advance(61)
        assert standby.error == ""


async def test_a_drain_waits_for_the_turn_in_hand_and_none_follows() -> None:
    scene = Scene()
    async with scene.leading() as compactor:
        await scene.minutes(59)
        scene.store.compacting = asyncio.Event()
        await scene.clock.advance(120)
        draining = asyncio.create_task(compactor.drain(30))
        await scene.clock.advance(29)
        assert not draining.done()
        scene.store.compacting.set()
        await scene.clock.settle()
        assert draining.done()
        done = scene.store.compacted
        assert done
        await scene.minutes(20)
        assert scene.store.compacted == done


async def test_a_drain_ends_although_the_turn_does_not() -> None:
    scene = Scene()
    async with scene.leading() as compactor:
        await scene.minutes(59)
        scene.store.compacting = asyncio.Event()
        await scene.clock.advance(120)
        draining = asyncio.create_task(compactor.drain(30))
        await scene.clock.advance(31)
        assert draining.done()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.floats(0.1, 400)),
        st.tuples(st.just("write"), st.integers(1, 20)),
        st.tuples(st.just("look"), st.none()),
        st.tuples(st.just("restart"), st.floats(0, 5000)),
    ),
    max_size=60,
)


@given(steps, st.floats(10, 2000))
def test_a_revision_is_never_taken_for_older_than_it_is(steps: list[tuple[str, Any]], age: float) -> None:
    """Restarts take over what was written down, on a monotonic clock that begins anywhere."""
    samples, revision, now, offset = Samples(reach=2000, spacing=10), 1, 0.0, 0.0
    born = {1: 0.0}
    for step, value in steps:
        if step == "wait":
            now += value
        elif step == "write":
            for _ in range(value):
                revision += 1
                born[revision] = now
        elif step == "look":
            samples.saw(LINE, revision, now + offset)
        else:
            ages = [(float(int(a)), r) for a, r in samples.ages(now + offset)]
            now, offset = now + 3.0, value - now
            samples = Samples(reach=2000, spacing=10)
            samples.saw(LINE, revision, now + offset)
            samples.add(ages, now + offset)
        found = samples.older_than(age, now + offset)
        assert found == 0 or now - born[found] >= age - 1e-6
        assert len(samples) <= 2000 / 10 + 2


def test_samples_stay_few_and_lose_at_most_their_spacing() -> None:
    samples = Samples(reach=BARRIER_SECONDS, spacing=0.001)
    for second in range(6_000):
        samples.saw(LINE, second + 1, float(second))
    assert len(samples) <= 502
    assert 6_000 - 600 - 9 <= samples.older_than(600, 5_999) <= 6_000 - 600


def test_another_line_or_a_lower_revision_begins_anew() -> None:
    samples = Samples(reach=HOUR, spacing=60)
    samples.saw(LINE, 100, 0)
    samples.saw(LINE, 200, 1000)
    samples.saw(LINE, 150, 2000)
    assert samples.ages(2000) == [(0, 150)]
    samples.saw(("cluster", "later"), 300, 3000)
    assert samples.ages(3000) == [(0, 300)]
