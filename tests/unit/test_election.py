"""Who leads: leases and their deadline, campaigns, hand-over, static leaders, and the mirror that shows it all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson
import pytest

from lrm.election import Deposed, LeaderElection, LeaseElection, StaticElection, Term
from lrm.errors import NotLeading, RetryLater
from lrm.leaders import Leaders
from lrm.lease import DaemonLease, Session, check_times
from lrm.testing import VirtualClock
from storage.base import Entry, Guard, Lease, Page
from storage.errors import GuardFailed, OutcomeUnknown, Unavailable
from storage.memory import MemoryStorage


class Store(MemoryStorage):
    """A store whose keepalives and creates can be made to fail, before or after they were carried out."""

    away = False
    lose_creates = 0
    lose_keepalives = False

    async def keep_alive(self, lease: int) -> int:
        if self.away:
            raise Unavailable("no member answers")
        ttl = await super().keep_alive(lease)
        if self.lose_keepalives:
            raise Unavailable("the answer was lost")
        return ttl

    async def grant_lease(self, ttl: int) -> Lease:
        if self.away:
            raise Unavailable("no member answers")
        return await super().grant_lease(ttl)

    async def create(self, key: str, value: bytes, *, lease: int = 0, guards: tuple[Guard, ...] = ()) -> Entry:
        if self.away:
            raise Unavailable("no member answers")
        entry = await super().create(key, value, lease=lease, guards=guards)
        if self.lose_creates:
            self.lose_creates -= 1
            raise OutcomeUnknown("the answer was lost")
        return entry


class Candidate:
    """One daemon's part in elections, without the daemon."""

    def __init__(
        self, storage: Store, clock: VirtualClock, name: str, *, locks: tuple[str, ...] = ("widgets",)
    ) -> None:
        self.name = name
        self.leaders = Leaders(storage, clock, root="/lrm")
        self.lease = DaemonLease(storage, clock, lease_duration=15, renew_deadline=10, retry_period=2)
        self.calls: list[str] = []
        self.elections = {
            lock: LeaderElection(
                LeaseElection(storage, clock, lock_name=lock, identity=name, lease=self.lease, leaders=self.leaders),
                self.leaders,
                on_started_leading=lambda t: self.calls.append(f"started {t.lock_name}"),
                on_stopped_leading=lambda t: self.calls.append(f"stopped {t.lock_name}"),
            )
            for lock in locks
        }
        self.tasks: list[asyncio.Task[None]] = []

    async def work(self, term: Term) -> None:
        await term.wait_lost()

    def start(self) -> None:
        self.tasks = [
            asyncio.create_task(self.lease.run()),
            asyncio.create_task(self.leaders.run()),
            *(asyncio.create_task(e.run(self.work)) for e in self.elections.values()),
        ]

    @property
    def leads(self) -> list[str]:
        return [lock for lock, election in self.elections.items() if election.is_leader]

    async def stop(self) -> None:
        """In the daemon's order: elections, then the lease."""
        for task in [*reversed(self.tasks)]:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def storage(clock: VirtualClock) -> Store:
    return Store(clock=clock)


@asynccontextmanager
async def running(*candidates: Candidate) -> AsyncIterator[None]:
    for candidate in candidates:
        candidate.start()
    try:
        yield
    finally:
        for candidate in candidates:
            await candidate.stop()


@pytest.mark.parametrize(
    ("times", "why"),
    [
        ((2.9, 1, 0.1), "below the least"),
        ((15, 12, 2), "must stay below"),
        ((15, 10, 4), "must stay below"),
        ((15, 2, 1.5), "at least twice"),
    ],
)
def test_durations_that_cannot_work_are_refused(times: tuple[float, float, float], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_times(*times)


@pytest.mark.parametrize("times", [(15, 10, 2), (3, 1, 0.5), (15, 11.9, 2)])
def test_durations_that_work_are_taken(times: tuple[float, float, float]) -> None:
    check_times(*times)


async def test_one_leads_and_the_next_begins_at_once_when_it_stops(storage: Store, clock: VirtualClock) -> None:
    one, two = Candidate(storage, clock, "one"), Candidate(storage, clock, "two")
    async with running(one):
        await clock.advance(1)
        async with running(two):
            await clock.advance(60)
            assert (one.leads, two.leads) == (["widgets"], [])
            assert two.leaders.holder("widgets").identity == "one"  # type: ignore[union-attr]
            first = one.elections["widgets"].term
            await one.stop()
            assert one.calls == ["started widgets", "stopped widgets"]
            await clock.advance(0.01)
            assert two.leads == ["widgets"]
            second = two.elections["widgets"].term
            assert first is not None
            assert second is not None
            assert second.number > first.number
            with pytest.raises(NotLeading):
                first.check()


async def test_two_daemons_lead_different_locks_under_one_lease_each(storage: Store, clock: VirtualClock) -> None:
    one = Candidate(storage, clock, "one", locks=("a",))
    two = Candidate(storage, clock, "two", locks=("a", "b", "c"))
    async with running(one):
        await clock.advance(1)
        async with running(two):
            await clock.advance(5)
            assert (one.leads, two.leads) == (["a"], ["b", "c"])
            leases = {k: (await storage.get(f"/lrm/leader/{k}")).lease for k in "abc"}
            assert leases["b"] == leases["c"] != leases["a"] != 0
            assert orjson.loads((await storage.get("/lrm/leader/b")).value)["identity"] == "two"


async def test_a_leader_that_cannot_renew_stops_before_the_store_lets_another_begin(
    storage: Store, clock: VirtualClock
) -> None:
    one, two = Candidate(storage, clock, "one"), Candidate(storage, clock, "two")
    async with running(one):
        await clock.advance(1)
        async with running(two):
            await clock.advance(3)
            term = one.elections["widgets"].term
            assert term is not None
            stopped = began = 0.0
            # Renewed in the store, but the answers are lost: the leader may count on answered ones only.
            storage.lose_keepalives = True
            started = clock.monotonic()
            while not stopped:
                await clock.advance(0.1)
                if not one.leads:
                    stopped = clock.monotonic() - started
            assert 7.9 < stopped <= 10.1
            with pytest.raises(NotLeading):
                term.guard()
            storage.lose_keepalives = False
            while not began:
                await clock.advance(0.1)
                if one.leads or two.leads:
                    began = clock.monotonic() - started
            assert began >= stopped


async def test_a_paused_process_knows_by_the_clock_alone(storage: Store, clock: VirtualClock) -> None:
    """No timer has run and no answer has come: the first check after the pause already refuses."""
    one = Candidate(storage, clock, "one")
    async with running(one):
        await clock.advance(1)
        term = one.elections["widgets"].term
        assert term is not None
        term.check(needs=7)
        clock.stall(10.5)
        with pytest.raises(NotLeading):
            term.check()
        with pytest.raises(NotLeading):
            term.guard()
        assert not one.leads


async def test_a_call_that_needs_longer_than_the_lease_is_trusted_waits_and_keeps_the_lead(
    storage: Store, clock: VirtualClock
) -> None:
    one = Candidate(storage, clock, "one")
    async with running(one):
        await clock.advance(1)
        storage.away = True
        await clock.advance(6)
        term = one.elections["widgets"].term
        assert term is not None
        with pytest.raises(RetryLater, match="this call needs 5 s"):
            term.check(needs=5)
        term.check()
        storage.away = False
        await clock.advance(2)
        term.check(needs=5)
        assert one.elections["widgets"].terms == 1


async def test_a_lease_that_the_store_has_dropped_is_lost_at_once(storage: Store, clock: VirtualClock) -> None:
    one = Candidate(storage, clock, "one")
    async with running(one):
        await clock.advance(1)
        entry = await storage.get("/lrm/leader/widgets")
        await storage.revoke(entry.lease)
        await clock.advance(2.1)
        assert one.calls[:2] == ["started widgets", "stopped widgets"]
        await clock.advance(1)
        assert one.leads == ["widgets"]
        assert one.elections["widgets"].terms == 2
        assert (await storage.get("/lrm/leader/widgets")).lease != entry.lease


async def test_a_key_that_another_took_ends_the_term_though_the_lease_lives(
    storage: Store, clock: VirtualClock
) -> None:
    one = Candidate(storage, clock, "one")
    async with running(one):
        await clock.advance(1)
        term = one.elections["widgets"].term
        assert term is not None
        entry = await storage.get(term.key)
        await storage.delete(term.key, expected_revision=entry.revision)
        other = await storage.create(term.key, b"a person's hand")
        await clock.advance(0.1)
        assert one.leads == []
        with pytest.raises(NotLeading):
            term.guard()
        assert one.leaders.holder("widgets").term == other.create_revision  # type: ignore[union-attr]
        await storage.delete(term.key, expected_revision=other.revision)
        await clock.advance(0.1)
        assert one.leads == ["widgets"]


async def test_a_key_of_ours_whose_answer_was_lost_is_replaced_by_a_new_term(
    storage: Store, clock: VirtualClock
) -> None:
    storage.lose_creates = 1
    one = Candidate(storage, clock, "one")
    async with running(one):
        await clock.advance(0.2)
        lost = (await storage.get("/lrm/leader/widgets")).create_revision
        await clock.advance(2)
        term = one.elections["widgets"].term
        assert term is not None
        assert term.number > lost
        assert (await storage.get(term.key)).create_revision == term.number


async def test_after_an_outage_longer_than_the_lease_someone_leads_again(storage: Store, clock: VirtualClock) -> None:
    one, two = Candidate(storage, clock, "one"), Candidate(storage, clock, "two")
    async with running(one, two):
        await clock.advance(1)
        storage.away = True
        await clock.advance(30)
        assert not one.leads + two.leads
        assert one.leaders.absent_seconds("widgets") > 10
        storage.away = False
        await clock.advance(2)
        assert len(one.leads + two.leads) == 1
        assert one.leaders.absent_seconds("widgets") == 0


async def test_a_deposed_lease_leader_writes_nothing(storage: Store, clock: VirtualClock) -> None:
    one = Candidate(storage, clock, "one")
    async with running(one):
        await clock.advance(1)
        term = one.elections["widgets"].term
        assert term is not None
        guard = term.guard()
        await storage.create("/lrm/r/mine", b"1", guards=(guard,))
        await storage.revoke((await storage.get(term.key)).lease)
        with pytest.raises(GuardFailed):
            await storage.create("/lrm/r/ghost", b"1", guards=(guard,))


async def test_a_restored_store_ends_the_term_and_the_lock_is_won_anew(storage: Store, clock: VirtualClock) -> None:
    snapshot = storage.snapshot()
    one = Candidate(storage, clock, "one")
    async with running(one):
        await clock.advance(1)
        for i in range(20):
            await storage.set(f"/lrm/x{i}", b"")
        storage.restore(snapshot)
        await clock.advance(20)
        term = one.elections["widgets"].term
        assert term is not None
        assert (await storage.get(term.key)).create_revision == term.number
        assert one.elections["widgets"].terms == 2


async def test_a_static_leader_notices_its_successor_and_is_deposed(storage: Store, clock: VirtualClock) -> None:
    leaders = Leaders(storage, clock, root="/lrm")
    mirror = asyncio.create_task(leaders.run())
    statics = {
        (lock, who): StaticElection(storage, clock, root="/lrm", lock_name=lock, identity=who)
        for lock, who in (("labs", "one"), ("labs", "two"), ("labs2", "three"))
    }
    election = LeaderElection(statics["labs", "one"], leaders)

    async def work(term: Term) -> None:
        await term.wait_lost()

    leading = asyncio.create_task(election.run(work))
    await clock.advance(1)
    await storage.compact(await storage.set("/lrm/x", b"2"))
    await statics["labs2", "three"].acquire()
    await clock.advance(5)
    assert election.is_leader
    second = await statics["labs", "two"].acquire()
    await clock.advance(1)
    with pytest.raises(Deposed, match="another daemon has taken the lock labs"):
        await leading
    assert (await storage.get(second.key)).create_revision == second.number
    mirror.cancel()


async def test_a_restored_store_is_no_successor_of_a_static_leader(storage: Store, clock: VirtualClock) -> None:
    one = StaticElection(storage, clock, root="/lrm", lock_name="x", identity="one")
    old = await one.acquire()
    snapshot = storage.snapshot()
    await one.acquire()
    storage.restore(snapshot)
    again = asyncio.create_task(one.acquire())
    await clock.advance(2)
    assert (await again).number != old.number
    entry = await storage.get("/lrm/leader/x")
    await storage.delete("/lrm/leader/x", expected_revision=entry.revision)
    again = asyncio.create_task(one.acquire())
    await clock.advance(2)
    await again


async def test_the_lock_is_not_lost_for_ever_to_a_key_of_ours_that_arrived_late(
    storage: Store, clock: VirtualClock
) -> None:
    """Our create was lost on its way, another won; it gives the lock back, and only then our create arrives."""
    one = Candidate(storage, clock, "one")
    async with running(one):
        await clock.advance(1)
        session = await one.lease.session()
        entry = await storage.get("/lrm/leader/widgets")
        await storage.delete("/lrm/leader/widgets", expected_revision=entry.revision)
        other = await storage.create("/lrm/leader/widgets", b"another daemon")
        await clock.advance(1)
        assert not one.leads
        # Both changes come to the mirror in one go.
        await storage.delete("/lrm/leader/widgets", expected_revision=other.revision)
        late = await storage.create("/lrm/leader/widgets", b"late", lease=session.lease)
        await clock.advance(1)
        assert one.leads == ["widgets"]
        term = one.elections["widgets"].term
        assert term is not None
        assert term.number > late.create_revision


async def test_a_static_leader_whose_answer_was_lost_does_not_take_itself_for_its_successor(
    storage: Store, clock: VirtualClock
) -> None:
    one = StaticElection(storage, clock, root="/lrm", lock_name="x", identity="one")
    first = await one.acquire()
    storage.lose_creates = 1
    acquiring = asyncio.create_task(one.acquire())
    await clock.advance(2)
    assert (await acquiring).number > first.number


async def test_a_process_that_is_not_fit_does_not_campaign_and_one_that_stops_begins_no_other_term(
    storage: Store, clock: VirtualClock
) -> None:
    one = Candidate(storage, clock, "one")
    fit = asyncio.Event()

    async def until_fit() -> None:
        await fit.wait()

    backend = LeaseElection(storage, clock, lock_name="other", identity="one", lease=one.lease, leaders=one.leaders)
    one.elections["other"] = LeaderElection(backend, one.leaders, fit=until_fit)
    async with running(one):
        await clock.advance(5)
        assert one.leads == ["widgets"]
        fit.set()
        await clock.advance(1)
        assert one.leads == ["widgets", "other"]
        election = one.elections["other"]
        election.stop()
        assert election.is_leader
        assert election.term is not None
        election.term.lost()
        await clock.advance(30)
        assert one.leads == ["widgets"]
        assert election.terms == 1
        assert not await storage.exists("/lrm/leader/other")


async def test_a_term_is_not_ended_by_a_list_that_was_read_before_it_was_won(
    storage: Store, clock: VirtualClock
) -> None:
    listing, go_on = asyncio.Event(), asyncio.Event()

    class Slow(Store):
        async def list(self, prefix: str, *, limit: int = 0, continue_token: str = "", revision: int = 0) -> Page:
            page = await super().list(prefix, limit=limit, continue_token=continue_token, revision=revision)
            listing.set()
            await go_on.wait()
            return page

    store = Slow(clock=clock)
    one = Candidate(store, clock, "one")
    async with running(one):
        await clock.advance(1)
        assert listing.is_set()
        assert one.leads == ["widgets"]
        go_on.set()
        await clock.advance(5)
        assert one.elections["widgets"].terms == 1


async def test_a_mirror_that_is_cut_off_does_not_vouch_for_the_leader_it_knew(
    storage: Store, clock: VirtualClock
) -> None:
    one, two = Candidate(storage, clock, "one"), Candidate(storage, clock, "two")
    async with running(one):
        await clock.advance(1)
        async with running(two):
            await clock.advance(1)
            assert two.leaders.absent_seconds("widgets") == 0
            two.leaders._end_watch()
            await clock.advance(70)
            assert two.leaders.absent_seconds("widgets") == pytest.approx(70)
            assert two.leaders.holder("widgets").identity == "one"  # type: ignore[union-attr]
            one.leaders._end_watch()
            assert one.leaders.absent_seconds("widgets") == 0, "its own term it knows by its own clock"


async def test_the_trust_in_a_lease_never_reaches_its_granted_end(storage: Store, clock: VirtualClock) -> None:
    """The store may grant less than was asked for."""
    session = Session(clock, 7, renew_deadline=10)
    session.renewed(clock.monotonic(), ttl=5)
    assert session.left == pytest.approx(4)
    session.renewed(clock.monotonic(), ttl=60)
    assert session.left == pytest.approx(10)
    await clock.advance(10)
    with pytest.raises(NotLeading):
        session.check()
    session.renewed(clock.monotonic(), ttl=60)
    assert session.left == 0, "one that has ended never comes back"
