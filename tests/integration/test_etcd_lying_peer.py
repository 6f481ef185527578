"""The watch in front of a peer that splits, repeats, disorders, cuts and invents: whole revisions, once, in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from equipment.scripted_etcd import Script, ScriptedEtcd, line, news
from storage.base import Batch, Watch
from storage.errors import Compacted, OutcomeUnknown, PermissionDenied, StoreReset, Unavailable
from storage.etcd import EtcdStorage

PREFIX = "/lrm/r/"


@pytest.fixture
async def peer() -> AsyncIterator[ScriptedEtcd]:
    async with ScriptedEtcd() as scripted:
        yield scripted


@pytest.fixture
async def storage(peer: ScriptedEtcd) -> AsyncIterator[EtcdStorage]:
    backend = EtcdStorage([peer.endpoint], liveness_silence=0.3, liveness_deadline=0.3, request_timeout=2)
    yield backend
    await backend.aclose()


async def take(watch: Watch, revision: int) -> list[tuple[int, list[str]]]:
    """Batches until one has reached a revision, as (revision, names of its keys)."""
    taken: list[Batch] = []
    async with asyncio.timeout(30):
        while not taken or taken[-1].revision < revision:
            taken.append(await anext(watch))
    return [(b.revision, [e.entry.key.removeprefix(PREFIX) for e in b.events]) for b in taken]


def k(name: str) -> str:
    return PREFIX + name


WHOLE = news((11, k("a")), (12, k("b")), (12, k("c")), (13, k("d")))
EXPECTED = [(11, ["a"]), (12, ["b", "c"]), (13, ["d"])]


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
async def test_lines_are_whole_however_they_are_cut(peer: ScriptedEtcd, storage: EtcdStorage, size: int) -> None:
    peer.scripts.append(Script([WHOLE[i : i + size] for i in range(0, len(WHOLE), size)]))
    async with storage.watch(PREFIX, 10) as watch:
        assert await take(watch, 13) == EXPECTED


async def test_a_revision_split_over_fragments_is_delivered_whole(peer: ScriptedEtcd, storage: EtcdStorage) -> None:
    fragments = [
        news((11, k("a")), (12, k("b")), fragment=True),
        news((12, k("c")), fragment=True),
        news((12, k("d")), (13, k("e"))),
    ]
    peer.scripts.append(Script([b"".join(fragments)]))
    async with storage.watch(PREFIX, 10) as watch:
        assert await take(watch, 13) == [(11, ["a"]), (12, ["b", "c", "d"]), (13, ["e"])]


async def test_a_revision_cut_off_by_a_lost_stream_comes_again_whole(peer: ScriptedEtcd, storage: EtcdStorage) -> None:
    peer.scripts += [
        Script([news((11, k("a")), (12, k("b")), fragment=True)]),
        Script([news((12, k("b")), (12, k("c"))), WHOLE], close=False),
    ]
    async with storage.watch(PREFIX, 10) as watch:
        assert await take(watch, 13) == EXPECTED
    assert peer.starts == [11, 12]


async def test_what_was_delivered_before_is_dropped_and_counted(peer: ScriptedEtcd, storage: EtcdStorage) -> None:
    peer.scripts += [Script([news((5, k("old"))), WHOLE]), Script([WHOLE, news((14, k("e")))], close=False)]
    async with storage.watch(PREFIX, 10) as watch:
        assert await take(watch, 14) == [*EXPECTED, (14, ["e"])]
        assert watch.dropped == 5
        assert watch.resumed == 1


@pytest.mark.parametrize(
    "lie",
    [
        b"this is not json\n",
        b'{"result":5}\n',
        b"[]\n",
        b'{"error":{"grpc_code":14,"http_code":503,"message":"transport is closing"}}\n',
        b'{"result":{"canceled":true,"cancel_reason":"etcdserver: mvcc: watcher is gone"}}\n',
        b'{"result":{"events":[{"kv":{"key":',
        news((14, k("late")), (13, k("early"))),
    ],
    ids=["no json", "no result", "a list", "an error", "a cancellation", "half a line", "disorder"],
)
async def test_a_stream_that_lies_is_replaced_and_nothing_is_lost(
    peer: ScriptedEtcd, storage: EtcdStorage, lie: bytes
) -> None:
    peer.scripts += [Script([news((11, k("a"))), lie]), Script([WHOLE], close=False)]
    async with storage.watch(PREFIX, 10) as watch:
        assert await take(watch, 13) == EXPECTED
    assert peer.starts == [11, 12]


@pytest.mark.parametrize(
    "lie",
    [
        b'{"result":{"events":[{"kv":{"key":"L2xybS9yL2E=","mod_revision":"eleven"}}]}}\n',
        b'{"result":{"events":[{"kv":{"key":"!","mod_revision":"11"}}]}}\n',
        b'{"result":{"events":["what"]}}\n',
        b'{"result":{"events":[{"kv":7}]}}\n',
    ],
    ids=["a revision", "a key", "an event", "a kv"],
)
async def test_an_event_that_cannot_be_read_is_an_error_and_no_silence(
    peer: ScriptedEtcd, storage: EtcdStorage, lie: bytes
) -> None:
    peer.scripts += [Script([lie]), Script([WHOLE])]
    async with storage.watch(PREFIX, 10) as watch:
        assert await take(watch, 13) == EXPECTED


async def test_a_watch_that_etcd_cancels_for_compaction_is_compacted(peer: ScriptedEtcd, storage: EtcdStorage) -> None:
    peer.scripts.append(Script([news((11, k("a"))), line(canceled=True, compact_revision="40")], close=False))
    async with storage.watch(PREFIX, 10) as watch:
        assert await take(watch, 11) == [(11, ["a"])]
        with pytest.raises(Compacted) as caught:
            await anext(watch)
        assert caught.value.oldest == 40
        with pytest.raises(Compacted):
            await anext(watch)


async def test_a_watch_that_is_not_permitted_is_told_so(peer: ScriptedEtcd, storage: EtcdStorage) -> None:
    """A cancelled watch may be one whose right has expired: it is opened once more, and that is refused for good."""
    refused = line(canceled=True, created=True, cancel_reason="etcdserver: permission denied")
    peer.scripts += [Script([news((11, k("a"))), refused], close=False), Script(first=refused)]
    async with storage.watch(PREFIX, 10) as watch:
        assert await take(watch, 11) == [(11, ["a"])]
        with pytest.raises(PermissionDenied):
            await anext(watch)


@pytest.mark.parametrize("lie", [{}, {"header": {}}, {"header": {"revision": "x"}}, {"header": 5}])
async def test_an_answer_without_a_revision_is_no_answer_and_no_reset(
    peer: ScriptedEtcd, storage: EtcdStorage, lie: dict[str, object]
) -> None:
    await storage.current_revision()
    peer.lies += [lie, lie]
    assert await storage.current_revision() == peer.revision
    peer.lies += [lie]
    with pytest.raises(OutcomeUnknown):
        await storage.set("/lrm/a", b"")


async def test_a_stale_read_is_read_again_and_is_no_reset(peer: ScriptedEtcd, storage: EtcdStorage) -> None:
    """Old etcds can answer one from the past after a pause; raft's log, which is asked then, cannot."""
    await storage.current_revision()
    peer.lies += [{"header": {"revision": "5"}, "kvs": []}]
    assert await storage.current_revision() == peer.revision
    assert peer.lies == []


async def test_a_store_that_went_back_is_told_to_every_watch_once(peer: ScriptedEtcd, storage: EtcdStorage) -> None:
    peer.scripts += [Script([WHOLE], close=False), Script([WHOLE], close=False)]
    async with storage.watch(PREFIX, 10) as one, storage.watch(PREFIX, 10) as two:
        assert await take(one, 13) == await take(two, 13) == EXPECTED
        peer.revision = 7
        with pytest.raises(StoreReset):
            await storage.current_revision()
        for watch in (one, two):
            with pytest.raises(StoreReset):
                await anext(watch)
    assert await storage.current_revision() == 7
    async with storage.watch(PREFIX, 7):
        pass


async def test_a_silent_stream_whose_barrier_does_not_come_is_replaced(
    peer: ScriptedEtcd, storage: EtcdStorage
) -> None:
    peer.scripts += [Script([news((11, k("a")))], close=False), Script([WHOLE], close=False)]
    async with storage.watch(PREFIX, 10, live=True) as watch:
        assert await take(watch, 13) == EXPECTED
    assert peer.starts == [11, 12]


async def test_a_member_without_end_of_line_is_left(
    peer: ScriptedEtcd, storage: EtcdStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.etcd_stream._MAX_LINE", 1000)
    peer.scripts += [Script([b"x" * 600, b"y" * 600], close=False), Script([WHOLE], close=False)]
    async with storage.watch(PREFIX, 10) as watch:
        assert await take(watch, 13) == EXPECTED


async def test_an_endless_reply_is_not_read_into_memory(
    peer: ScriptedEtcd, storage: EtcdStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.etcd_gateway.MAX_RESPONSE_BYTES", 10)
    with pytest.raises(Exception, match="larger than"):
        await storage.get("/lrm/a")


async def test_no_member_at_all_is_unavailable_in_time() -> None:
    async with ScriptedEtcd() as peer:
        endpoint = peer.endpoint
    storage = EtcdStorage([endpoint], request_timeout=0.3)
    with pytest.raises(Unavailable):
        async with storage.watch(PREFIX, 0):
            pass
    with pytest.raises(Unavailable):
        await storage.get("/a")
    assert not (await storage.health()).ok
    await storage.aclose()
