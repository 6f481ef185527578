"""Bookmarks on a real Redis: what it keeps, what it refuses, and what its failures cost (a second, never the work)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

import pytest
import redis.asyncio as redis
from structlog.testing import capture_logs

from equipment.footprint import Footprint
from equipment.waiting import until
from lrm.bookmarks import Bookmarks
from lrm.devservers import RedisServer
from lrm.election import StaticElection, Term
from storage.clock import SystemClock
from storage.errors import RedisFailed, StoreReset
from storage.memory import MemoryStorage, Snapshot
from storage.redis_bookmarks import EXPIRES_SECONDS, ProcessBookmarks, RedisBookmarks, Save, SavedBookmark

CLOCK = SystemClock()
EVERY = 0.02


def bookmark(revision: int, term: int = 5, *, cluster_id: str = "c", epoch: str = "") -> SavedBookmark:
    return SavedBookmark(cluster_id, epoch, revision, term, "2026-01-01T00:00:00Z")


@asynccontextmanager
async def opened(server: RedisServer, root: str = "/lrm") -> AsyncIterator[RedisBookmarks]:
    store = RedisBookmarks(server.url, CLOCK, root=root)
    try:
        yield store
    finally:
        await store.aclose()


@pytest.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[RedisBookmarks]:
    async with opened(redis_server) as store:
        yield store


@pytest.fixture
async def raw(redis_server: RedisServer) -> AsyncIterator[redis.Redis]:
    async with redis.from_url(redis_server.url) as client:
        yield client


async def saved(store: RedisBookmarks, value: SavedBookmark, replaces: SavedBookmark | None = None) -> str:
    (outcome,) = await store.save([Save("w", value, replaces)])
    return outcome


async def test_each_save_is_judged_by_what_redis_holds(store: RedisBookmarks) -> None:
    held = bookmark(100, term=5)
    table = [
        (bookmark(101, 5), None, "saved", "a step forward"),
        (bookmark(100, 5), None, "saved", "the same again renews it"),
        (bookmark(99, 5), None, "behind", "never back within a term"),
        (bookmark(99, 6), None, "behind", "nor for a later term: what was handled stays handled"),
        (bookmark(200, 4), None, "older term", "a deposed leader moves nothing"),
        (bookmark(3, 1, epoch="restored"), None, "saved", "another epoch begins anew, term included"),
        (bookmark(3, 1, cluster_id="d"), None, "saved", "so does another cluster"),
        (bookmark(3, 1), held, "saved", "so does what was proved to be of another line"),
        (bookmark(3, 1), bookmark(99, 5), "older term", "but not when somebody has saved since the proof"),
    ]
    for value, replaces, outcome, why in table:
        await saved(store, bookmark(1, epoch="before"))
        await saved(store, held)
        assert await saved(store, value, replaces) == outcome, why
        assert await store.load("w") == (value if outcome == "saved" else held), why


async def test_keys_bear_the_root_and_installations_do_not_see_each_other(
    redis_server: RedisServer, raw: redis.Redis
) -> None:
    """One root is another's beginning, one holds characters that a pattern would take for its own."""
    roots = {"/lrm": 1, "/lrm:bookmark": 2, "/l*m": 3, "/team/a[1]": 4}
    for root, revision in roots.items():
        async with opened(redis_server, root) as one:
            assert await saved(one, bookmark(revision)) == "saved"
    assert sorted(await raw.keys()) == [
        b"l*m:bookmark:w",
        b"lrm:bookmark:bookmark:w",
        b"lrm:bookmark:w",
        b"team/a[1]:bookmark:w",
    ]
    for root, revision in roots.items():
        async with opened(redis_server, root) as one:
            assert (await one.all())["w"] == bookmark(revision)


async def test_they_expire_a_week_after_the_last_sign_of_life(store: RedisBookmarks, raw: redis.Redis) -> None:
    key = store.key("w")
    for value, why in ((bookmark(7), "saved"), (bookmark(6), "behind, by a watcher that lives")):
        await saved(store, value)
        assert EXPIRES_SECONDS - 10 < await raw.ttl(key) <= EXPIRES_SECONDS, why
        await raw.expire(key, 100)
    await saved(store, bookmark(9, term=1))
    assert await raw.ttl(key) <= 100, "a deposed one keeps nothing alive"


async def test_a_value_that_is_no_bookmark_counts_as_none_and_is_replaced(
    store: RedisBookmarks, raw: redis.Redis
) -> None:
    key = store.key("w")
    lies: list[str] = ["garbage", "[]", '{"cluster_id":"c","epoch":"","revision":1e999,"term":1,"saved_at":""}']
    for lie in lies:
        await raw.set(key, lie)
        assert await store.load("w") is None
        assert await saved(store, bookmark(3)) == "saved", lie
    await raw.delete(key)
    await raw.hset(key, "revision", "7")
    assert await store.load("w") is None
    assert await store.all() == {}
    assert await saved(store, bookmark(3)) == "saved"
    assert await store.load("w") == bookmark(3)


async def test_a_redis_that_forgot_the_script_is_given_it_again(store: RedisBookmarks, raw: redis.Redis) -> None:
    await saved(store, bookmark(1))
    await raw.script_flush()
    await store.save([Save("w", bookmark(2)), Save("v", bookmark(4))])
    assert await store.all() == {"w": bookmark(2), "v": bookmark(4)}


async def test_a_redis_that_is_full_or_read_only_is_an_error_in_its_own_words(
    store: RedisBookmarks, raw: redis.Redis
) -> None:
    await saved(store, bookmark(1))
    await raw.config_set("maxmemory", "1")
    with pytest.raises(RedisFailed, match=r"OOM|maxmemory"):
        await saved(store, bookmark(2))
    await raw.config_set("maxmemory", "0")
    assert await saved(store, bookmark(2)) == "saved"
    await raw.execute_command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(RedisFailed, match=r"read only|READONLY"):
        await saved(store, bookmark(3))
    await raw.execute_command("REPLICAOF", "NO", "ONE")
    assert await saved(store, bookmark(3)) == "saved"


async def test_a_password_is_never_told(redis_server: RedisServer, raw: redis.Redis) -> None:
    await raw.config_set("requirepass", "right")
    url = redis_server.url.replace("redis://", "redis://:hunter2@")
    store = RedisBookmarks(url, CLOCK)
    with pytest.raises(RedisFailed) as caught:
        await store.load("w")
    await store.aclose()
    assert "hunter2" not in str(caught.value)


async def test_a_redis_that_hangs_costs_a_second_a_call_and_its_late_answers_are_nobodys(
    redis_server: RedisServer,
) -> None:
    before = Footprint.now()
    async with opened(redis_server) as store:
        await store.save([Save("w", bookmark(1)), Save("v", bookmark(2))])
        redis_server.pause()
        for call in (lambda: store.load("w"), lambda: saved(store, bookmark(9)), store.all):
            async with asyncio.timeout(20):
                with pytest.raises(RedisFailed, match="1 s"):
                    await call()
        redis_server.resume()
        assert await store.load("v") == bookmark(2)
        assert await store.load("w") in {bookmark(1), bookmark(9)}
        assert await saved(store, bookmark(10)) == "saved"
        redis_server.kill()
        with pytest.raises(RedisFailed):
            await store.load("w")
    await before.is_all_that_is_left()


async def test_a_cancelled_call_ends_wherever_it_is_and_harms_no_other(store: RedisBookmarks) -> None:
    """The client library's pipelines swallow cancellations; a daemon that stops would wait for ever."""

    async def work() -> None:
        while True:
            await saved(store, bookmark(1))
            await store.load("w")

    for turns in range(0, 200, 3):
        task = asyncio.create_task(work())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=20)
        assert task.cancelled(), turns
    assert await store.load("w") == bookmark(1)


class Watcher:
    """One daemon's view: its bookmarks, the term that it leads in, and a position that the test moves."""

    def __init__(self, server: RedisServer, storage: MemoryStorage) -> None:
        self.storage = storage
        self.store = RedisBookmarks(server.url, CLOCK)
        self.bookmarks = Bookmarks(self.store, storage, CLOCK, every=EVERY)
        self.bookmark = self.bookmarks.of("w")
        self.position = 0
        self.saving = asyncio.create_task(self.bookmarks.run())

    async def lead(self) -> Term:
        election = StaticElection(self.storage, CLOCK, root="/lrm", lock_name="w", identity="me")
        return await election.acquire()

    async def begin(self, term: Term | None = None) -> int | None:
        return await self.bookmark.begin(term or await self.lead(), lambda: self.position)

    async def reach(self, revision: int) -> None:
        """Move, and wait until Redis holds it."""
        self.position = revision
        await until(self.holds(revision), f"revision {revision} saved")

    def holds(self, revision: int):  # noqa: ANN201
        async def held() -> bool:
            now = await self.store.load("w")
            return now is not None and now.revision == revision

        return held

    async def die(self) -> None:
        """As with kill -9: nothing more is saved."""
        self.saving.cancel()
        await asyncio.wait([self.saving])
        await self.store.aclose()


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage()


@pytest.fixture
async def watchers(redis_server: RedisServer, storage: MemoryStorage) -> AsyncIterator[Iterator[Watcher]]:
    made: list[Watcher] = []

    def make() -> Iterator[Watcher]:
        while True:
            made.append(Watcher(redis_server, storage))
            yield made[-1]

    yield make()
    for watcher in made:
        await watcher.die()


async def roll_back(storage: MemoryStorage, snapshot: Snapshot) -> None:
    """Restore, and let one who asks hear of it: the next one's question is answered."""
    storage.restore(snapshot)
    with suppress(StoreReset):
        await storage.current_revision()


async def grow(storage: MemoryStorage, writes: int) -> int:
    for _ in range(writes):
        await storage.set("/lrm/r/widgets/default/a", b"{}")
    return await storage.current_revision()


async def test_the_next_leader_resumes_where_the_last_save_was(
    watchers: Iterator[Watcher], storage: MemoryStorage
) -> None:
    one, two, three = next(watchers), next(watchers), next(watchers)
    assert await one.begin() is None, "the first has nothing to resume from"
    head = await grow(storage, 10)
    await one.reach(head - 5)
    await one.die()
    assert await two.begin() == head - 5
    two.position = head - 2
    await two.bookmark.end()
    two.position = head
    told = two.bookmark.describe(head)
    assert (told["bookmark"], told["current_version"], told["lag"], told["following"]) == (head - 2, head, 2, False)
    assert await three.begin() == head - 2, "a clean stop saves at once, and nothing after it"


async def test_an_unmoved_position_is_not_written_again(watchers: Iterator[Watcher], storage: MemoryStorage) -> None:
    one = next(watchers)
    await one.begin()
    head = await grow(storage, 5)
    await one.reach(head - 1)
    before = await one.store.load("w")
    other = one.bookmarks.of("other")
    await other.begin(await one.lead(), lambda: head)
    await until(lambda: other.describe(head)["bookmark"] == head, "the other one saved")
    assert await one.store.load("w") == before


async def test_a_new_epoch_ends_the_old_bookmark_and_a_small_term_begins_the_new_one(
    watchers: Iterator[Watcher], storage: MemoryStorage
) -> None:
    one, two = next(watchers), next(watchers)
    early = await two.lead()
    await grow(storage, 50)
    await one.begin()
    head = await grow(storage, 10)
    await one.reach(head)
    await one.die()
    await storage.set("/lrm/epoch", b"restored")
    assert await two.begin(early) is None
    await two.reach(early.number + 1)


async def test_a_store_rolled_back_below_the_bookmark_gives_none_and_takes_lower_ones(
    watchers: Iterator[Watcher], storage: MemoryStorage
) -> None:
    """Nobody said restore-done: the head, lower than the bookmark, tells."""
    one, two = next(watchers), next(watchers)
    snapshot = storage.snapshot()
    await grow(storage, 50)
    await one.begin()
    await one.reach(await storage.current_revision())
    await one.die()
    await roll_back(storage, snapshot)
    assert await two.begin() is None
    await two.reach(await storage.current_revision())


async def test_a_rollback_under_a_leader_is_followed_once_it_knows_of_it(
    watchers: Iterator[Watcher], storage: MemoryStorage
) -> None:
    one = next(watchers)
    await one.begin()
    snapshot = storage.snapshot()
    await grow(storage, 50)
    old = await storage.current_revision()
    await one.reach(old)
    await roll_back(storage, snapshot)
    one.position = 0
    one.bookmark.rebase()
    await grow(storage, 60)  # the new line has passed the old bookmark: only the leader can know
    await one.reach(old - 3)


async def test_a_changed_epoch_saves_nothing_before_the_watcher_knows(
    watchers: Iterator[Watcher], storage: MemoryStorage, redis_server: RedisServer
) -> None:
    """Redis was away at the begin, so the line is compared only now; the position is still one of the old line."""
    one = next(watchers)
    redis_server.kill()
    head = await grow(storage, 10)
    assert await one.begin() is None
    one.position = head
    await storage.set("/lrm/epoch", b"restored")
    await redis_server.start()
    other = one.bookmarks.of("other")
    await other.begin(await one.lead(), lambda: head)
    await until(lambda: other.describe(head)["bookmark"], "another one is saved meanwhile")
    assert await one.store.load("w") is None
    one.bookmark.rebase()
    await one.reach(head + 1)
    held = await one.store.load("w")
    assert held is not None
    assert held.epoch == "restored"


async def test_redis_away_is_none_within_a_second_an_error_and_one_log_line_and_it_catches_up(
    watchers: Iterator[Watcher], storage: MemoryStorage, redis_server: RedisServer
) -> None:
    one, two = next(watchers), next(watchers)
    await one.begin()
    head = await grow(storage, 20)
    await one.reach(head - 10)
    redis_server.pause()
    with capture_logs() as logs:
        async with asyncio.timeout(10):
            assert await two.begin() is None
        two.position = head - 5
        assert "redis" in two.bookmarks.error
        assert "redis" in two.bookmark.describe(head)["error"]
        redis_server.kill()
        await until(lambda: "1 s" not in two.bookmarks.error, "another kind of failure in the same outage")
    assert [line["event"] for line in logs if line["log_level"] == "warning"].count("bookmarks.not_saved") <= 2
    await redis_server.start()
    await until(two.holds(head - 5), "saved once redis is back")
    await until(lambda: two.bookmarks.error == "")
    redis_server.kill()
    assert await two.begin() == head - 5, "its own last place, which it knows without redis"
    two.position = head
    async with asyncio.timeout(10):
        await two.bookmark.end()


async def test_a_save_for_an_older_term_ends_the_saving_not_the_term(
    watchers: Iterator[Watcher], storage: MemoryStorage
) -> None:
    one, two = next(watchers), next(watchers)
    term = await one.lead()
    await one.begin(term)
    head = await grow(storage, 20)
    await one.reach(head - 15)
    await two.begin()
    await two.reach(head - 10)
    with capture_logs() as logs:
        one.position = head - 5
        await until(lambda: one.bookmark.refused)
        one.position = head
        await one.bookmark.end()
    assert [line["event"] for line in logs].count("bookmarks.older_term") == 1
    assert "later term" in one.bookmark.describe(head)["error"]
    assert await two.holds(head - 10)()
    term.check()


async def test_a_successor_that_is_behind_leaves_what_its_predecessor_has_handled(
    watchers: Iterator[Watcher], storage: MemoryStorage
) -> None:
    one, two = next(watchers), next(watchers)
    await one.begin()
    head = await grow(storage, 20)
    await one.reach(head - 5)
    await one.die()
    await two.begin()
    two.position = head - 10
    other = two.bookmarks.of("other")
    await other.begin(await two.lead(), lambda: head)
    await until(lambda: other.describe(head)["bookmark"])
    assert await two.holds(head - 5)()
    await two.reach(head)


async def test_bookmarks_of_other_lines_are_purged_and_no_others(
    watchers: Iterator[Watcher], storage: MemoryStorage, store: RedisBookmarks
) -> None:
    line = await storage.line()
    mine = SavedBookmark(line.cluster_id, line.epoch, 1, 1, "2026-01-01T00:00:00Z")
    await store.save([Save("gone", bookmark(9)), Save("kept", mine)])
    next(watchers)

    async def purged() -> bool:
        return await store.all() == {"kept": mine}

    await until(purged)


async def test_a_refusal_ends_with_what_caused_it(
    watchers: Iterator[Watcher], storage: MemoryStorage, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bookmark of a later term that nobody holds: another program's, or of a line that was not declared ended."""
    monkeypatch.setattr("lrm.bookmarks._RENEW_SECONDS", 0.1)
    one = next(watchers)
    await one.begin()
    head = await grow(storage, 20)
    await one.store.save([Save("w", bookmark(head - 15, 900, cluster_id=(await storage.line()).cluster_id))])
    one.position = head - 5
    await until(lambda: one.bookmark.refused)
    await raw.flushall()
    await until(one.holds(head - 5), "saved again")
    assert not one.bookmark.refused
    assert one.bookmark.describe(head)["error"] == ""


@pytest.mark.parametrize("answer", [b":no\r\n", b"$no\r\n", b"*no\r\n", b"\xff\xfe\r\n", b"*1\r\n:1\r\n"])
async def test_a_peer_that_speaks_no_redis_is_an_error_like_any_other(answer: bytes) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(4096):
            writer.write(answer)
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        store = RedisBookmarks(f"redis://127.0.0.1:{port}/0", CLOCK)
        for call in (store.load("w"), store.all(), store.save([Save("w", bookmark(1))])):
            with pytest.raises(RedisFailed):
                await call
        await store.aclose()


async def test_without_redis_bookmarks_last_as_long_as_the_process(storage: MemoryStorage) -> None:
    bookmarks = Bookmarks(ProcessBookmarks(), storage, CLOCK, every=EVERY)
    head = await grow(storage, 5)
    election = StaticElection(storage, CLOCK, root="/lrm", lock_name="w", identity="me")
    assert await bookmarks.of("w").begin(await election.acquire(), lambda: head) is None
    await bookmarks.of("w").end()
    assert await bookmarks.of("w").begin(await election.acquire(), lambda: head) == head
    await bookmarks.of("w").end()
    assert bookmarks.error == ""
