"""Watches over HTTP: nothing is missed, nothing repeated, and every end is told."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson
import pytest

from equipment.api import TELESCOPE, Served, Telescope, path_of, served, telescope, told
from equipment.waiting import until
from lrm.cache import CacheUpdate
from lrm.fanout import RingLimits
from storage.etcd import EtcdStorage
from storage.memory import MemoryStorage


@pytest.fixture(params=["memory", "etcd"])
async def api(request: pytest.FixtureRequest, etcd_root: str) -> AsyncIterator[Served]:
    if request.param == "memory":
        async with served(MemoryStorage(), root=etcd_root, bookmark_seconds=0.3) as it:
            yield it
        return
    etcd = await request.getfixturevalue("shared_etcds").get("3.5.1")
    storage = EtcdStorage([etcd.endpoint], root=etcd_root, instance="api-test")
    async with served(storage, root=etcd_root, bookmark_seconds=0.3) as it:
        yield it
    await storage.aclose()


async def test_a_watch_from_a_list_misses_and_repeats_nothing(api: Served) -> None:
    await api.make("a")
    version = (await api.get(path_of())).body["metadata"]["resourceVersion"]
    made = await api.make("b")
    async with api.watch(path_of(), resourceVersion=version) as watch:
        await api.merge(path_of("b"), {"spec": {"tracking": True}})
        deleted = await api.call("DELETE", path_of("a"))
        first, second, third = [await watch.next() for _ in range(3)]
    assert first == {"type": "ADDED", "object": made}
    assert (told(second), second["object"]["spec"]["tracking"]) == (("MODIFIED", "b"), True)
    assert told(third) == ("DELETED", "a")
    assert deleted.status == 200
    versions = [int(e["object"]["metadata"]["resourceVersion"]) for e in (first, second, third)]
    assert versions == sorted(versions)
    assert versions[2] > versions[1], "a deletion carries the revision that deleted"


async def test_a_watch_without_a_version_begins_with_what_is_there(api: Served) -> None:
    await api.make("a")
    await api.make("b", "other")
    for params in ({}, {"resourceVersion": "0"}):
        async with api.watch(path_of(namespace=""), **params) as watch:
            assert sorted(await watch.take(2)) == [("ADDED", "a"), ("ADDED", "b")]
            await api.make("c")
            assert await watch.take(1) == [("ADDED", "c")]
            await api.call("DELETE", path_of("c"))
            assert await watch.take(1) == [("DELETED", "c")]


async def test_a_streaming_list_ends_its_beginning_with_a_bookmark(api: Served) -> None:
    await api.make("a")
    params = {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan", "allowWatchBookmarks": "true"}
    async with api.watch(path_of(), **params) as watch:
        assert await watch.take(1) == [("ADDED", "a")]
        mark = await watch.next()
        assert mark["type"] == "BOOKMARK"
        assert mark["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}


async def test_bookmarks_are_for_those_who_allow_them(api: Served) -> None:
    made = await api.make("a")
    head = made["metadata"]["resourceVersion"]
    async with (
        api.watch(path_of(plural="sightings"), resourceVersion=head, allowWatchBookmarks="true") as asking,
        api.watch(path_of(), resourceVersion=head) as quiet,
    ):
        later = (await api.make("b", "elsewhere"))["metadata"]["resourceVersion"]
        async with asyncio.timeout(30):
            while True:
                mark = await asking.next()
                assert (mark["type"], mark["object"]["kind"]) == ("BOOKMARK", "Sighting")
                if int(mark["object"]["metadata"]["resourceVersion"]) >= int(later):
                    break
        await api.make("c")
        assert await quiet.take(1) == [("ADDED", "c")]


async def test_selectors_turn_entering_into_added_and_leaving_into_deleted(api: Served) -> None:
    await api.make("a", labels={"on": "no"})
    async with (
        api.watch(path_of(), labelSelector="on=yes") as labels,
        api.watch(path_of(), fieldSelector="status.phase=ready") as fields,
        api.watch(path_of(), fieldSelector="metadata.name=a") as one,
    ):
        await api.make("b", labels={"on": "yes"})
        await api.merge(path_of("a"), {"metadata": {"labels": {"on": "yes"}}})
        await api.merge(
            path_of("a", sub="status"), {"status": {"phase": "Ready"}}, params={"fieldManager": "telescopes"}
        )
        left = await api.merge(path_of("a"), {"metadata": {"labels": {"on": "no"}}})
        await api.call("DELETE", path_of("a"))
        assert await labels.take(3) == [("ADDED", "b"), ("ADDED", "a"), ("MODIFIED", "a")]
        gone = await labels.next()
        assert told(gone) == ("DELETED", "a")
        assert gone["object"]["metadata"]["labels"] == {"on": "yes"}
        assert gone["object"]["metadata"]["resourceVersion"] == left.body["metadata"]["resourceVersion"]
        assert await fields.take(3) == [("ADDED", "a"), ("MODIFIED", "a"), ("DELETED", "a")]
        assert [kind for kind, _ in await one.take(5)] == ["ADDED", *["MODIFIED"] * 3, "DELETED"]


async def test_a_table_watch_sends_rows(api: Served) -> None:
    await api.make("a")
    accept = {"Accept": "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"}
    async with api.session.get(api.url + path_of(), params={"watch": "1"}, headers=accept) as reply:
        first = orjson.loads(await reply.content.readline())
        assert first["object"]["kind"] == "Table"
        assert first["object"]["columnDefinitions"][0]["name"] == "Name"
        await api.make("b")
        second = orjson.loads(await reply.content.readline())
        assert second["object"]["rows"][0]["cells"][0] == "b"
        assert second["object"]["columnDefinitions"] == []


async def test_a_watch_ends_in_order_when_its_time_is_over(api: Served) -> None:
    async with api.watch(path_of(), timeoutSeconds="1") as watch:
        assert await watch.ended() == b""


async def test_a_watch_cannot_be_asked_for_by_head(api: Served) -> None:
    async with api.session.head(api.url + path_of(), params={"watch": "true"}) as reply:
        assert reply.status == 405
    async with api.session.head(api.url + path_of()) as reply:
        assert reply.status == 200


async def test_history_before_this_daemon_is_replayed_and_joined(api: Served) -> None:
    """A second daemon on the same store: its ring begins later than what its client asks for."""
    made = [await api.make(f"t{i}", labels={"n": str(i)}) for i in range(4)]
    await api.call("DELETE", path_of("t0"))
    async with (
        served(api.storage, root=api.registry.root, bookmark_seconds=0.3) as second,
        second.watch(path_of(), resourceVersion=made[1]["metadata"]["resourceVersion"]) as watch,
    ):
        assert await watch.take(3) == [("ADDED", "t2"), ("ADDED", "t3"), ("DELETED", "t0")]
        await second.make("later")
        assert await watch.take(1) == [("ADDED", "later")]


async def test_a_quiet_store_does_not_keep_a_replay_from_joining(api: Served) -> None:
    made = await api.make("a")
    async with (
        served(api.storage, root=api.registry.root, bookmark_seconds=0.3) as second,
        second.watch(
            path_of(), resourceVersion=made["metadata"]["resourceVersion"], allowWatchBookmarks="true"
        ) as watch,
    ):
        assert (await watch.next())["type"] == "BOOKMARK"
        assert second.fanout.replays._value == 4, "the replay's stream is given back"


async def test_expired_history_is_410_and_says_so_in_the_answer(api: Served) -> None:
    old = (await api.make("a"))["metadata"]["resourceVersion"]
    head = int((await api.make("b"))["metadata"]["resourceVersion"])
    await api.storage.compact(head)
    async with served(api.storage, root=api.registry.root) as second:
        for version in (old, "900000000"):
            expired = await second.get(path_of(), params={"watch": "true", "resourceVersion": version})
            assert (expired.status, expired.body["reason"], expired.body["code"]) == (410, "Expired", 410)


async def test_a_relist_under_an_open_watch_ends_it_with_an_error_event(api: Served) -> None:
    made = await api.make("a")
    async with api.watch(path_of(), resourceVersion=made["metadata"]["resourceVersion"]) as watch:
        api.cache._publish(CacheUpdate(api.cache.revision, (), relisted=True))
        error = await watch.next()
        assert (error["type"], error["object"]["reason"], error["object"]["code"]) == ("ERROR", "Expired", 410)
        assert await watch.ended() == b""


async def test_siblings_of_a_shared_revision_are_not_lost_to_who_saw_one_of_them() -> None:
    storage = MemoryStorage()
    async with served(storage) as api:
        await api.make("a")
        value = (await storage.get(api.registry.key(TELESCOPE, "default", "a"))).value
        changes = [
            (
                api.registry.key(TELESCOPE, "default", name),
                value.replace(b'"name":"a"', b'"name":"%b"' % name.encode()),
                0,
            )
            for name in ("x", "y")
        ]
        storage._commit(changes)  # as group commit will: one revision, two objects
        async with api.watch(path_of(), resourceVersion="1") as watch:
            seen = [await watch.next() for _ in range(3)]
        version = seen[1]["object"]["metadata"]["resourceVersion"]
        assert seen[2]["object"]["metadata"]["resourceVersion"] == version
        async with api.watch(path_of(), resourceVersion=version) as watch:
            assert await watch.take(2) == [("ADDED", "x"), ("ADDED", "y")]
        whole = (await api.get(path_of())).body["metadata"]["resourceVersion"]
        assert int(whole) > int(version), "a list's version is the end of a revision"


async def test_a_slow_client_is_ended_and_neither_writer_nor_others_wait() -> None:
    """It reads nothing while more happens than all buffers hold; then it hears 410, or is cut off."""
    limits = RingLimits(seconds=0, least=64, most=128)
    async with served(MemoryStorage(), limits=limits, write_seconds=1.0) as api:
        version = (await api.make("a"))["metadata"]["resourceVersion"]
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        connection.connect(("127.0.0.1", int(api.url.rpartition(":")[2])))
        head = (
            f"GET {path_of()}?watch=true&resourceVersion={version} HTTP/1.1",
            "Host: localhost",
            "Connection: close",
        )
        connection.sendall("\r\n".join([*head, "", ""]).encode())
        async with api.watch(path_of(), resourceVersion=version) as quick:
            await api.post(path_of(), telescope("big", annotations={"x": "y" * 100_000}))
            assert await quick.take(1) == [("ADDED", "big")]
            for i in range(300):
                answer = await api.merge(path_of("big"), {"metadata": {"labels": {"i": str(i)}}})
                assert answer.status == 200
                assert told(await quick.next()) == ("MODIFIED", "big")
        rest = await asyncio.to_thread(_drain, connection)
        assert b'"code":410' in rest or not rest.endswith(b"0\r\n\r\n")
        assert rest.count(b'"MODIFIED"') < 300, "what it did not take in time was not kept for it"


async def test_a_client_that_takes_nothing_is_cut_off_and_one_that_has_gone_is_noticed() -> None:
    async with served(MemoryStorage(), write_seconds=0.5, bookmark_seconds=0.2) as api:
        version = (await api.make("a"))["metadata"]["resourceVersion"]
        head = f"GET {path_of()}?watch=true&resourceVersion={version} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        for reads in (False, True):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
            connection.connect(("127.0.0.1", int(api.url.rpartition(":")[2])))
            connection.sendall(head)
            await until(lambda: api.fanout.readers == 1, "the watch")
            if reads:
                connection.close()
            else:
                await api.post(path_of(), telescope("big", annotations={"x": "y" * 100_000}))
                for i in range(100):
                    await api.merge(path_of("big"), {"metadata": {"labels": {"i": str(i)}}})
            await until(lambda: api.fanout.readers == 0, "the end of the watch")
            if not reads:
                rest = await asyncio.to_thread(_drain, connection)
                assert not rest.endswith(b"0\r\n\r\n"), "cut off, not ended as if all had been told"


def _drain(connection: socket.socket) -> bytes:
    """Everything until the server closes, or resets."""
    connection.settimeout(15)  # the server must end it: a connection left open fails the test
    found = bytearray()
    try:
        while chunk := connection.recv(1 << 20):
            found += chunk
    except ConnectionResetError:
        pass
    finally:
        connection.close()
    return bytes(found)


async def test_too_many_watches_are_told_429_and_leave_room_when_they_end() -> None:
    async with served(MemoryStorage(), max_watches=2) as api:
        await api.make("a")
        async with api.watch(path_of()), api.watch(path_of()):
            refused = await api.get(path_of(), params={"watch": "true"})
            assert (refused.status, refused.body["reason"]) == (429, "TooManyRequests")
            assert "Retry-After" in refused.headers
            assert (await api.get(path_of())).status == 200

        async def served_again() -> bool:
            # A client that has gone is noticed at the next event.
            await api.merge(path_of("a"), {"metadata": {"labels": {"t": str(time.monotonic_ns())}}})
            return (await api.get(path_of(), params={"watch": "true", "timeoutSeconds": "1"})).status == 200

        await until(served_again, "a place for another watch")


async def test_stopping_the_api_ends_its_watches_at_once() -> None:
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession() as session:
        async with served(MemoryStorage()) as api:
            reply = await session.get(api.url + path_of(), params={"watch": "true"})
            began = loop.time()
        assert await reply.read() == b""
        assert loop.time() - began < 9, "its clients have ten seconds to end by themselves"


async def test_many_writers_and_watchers_agree(api: Served) -> None:
    """Every watcher ends with the state of the store, whatever it watched from."""
    version = (await api.make("t0"))["metadata"]["resourceVersion"]

    async def writer(number: int) -> None:
        for i in range(20):
            name = f"w{number}-{i % 3}"
            created = await api.post(path_of(), telescope(name))
            if created.status == 409:
                if i % 2:
                    assert (await api.call("DELETE", path_of(name))).status == 200
                else:
                    assert (await api.merge(path_of(name), {"metadata": {"labels": {"i": str(i)}}})).status == 200

    async def watcher() -> dict[str, Any]:
        state: dict[str, Any] = {"t0": ...}
        async with api.watch(path_of(), resourceVersion=version) as watch:
            while True:
                event = await watch.next()
                kind, name = told(event)
                if name == "the-end":
                    return state
                if kind == "DELETED":
                    assert name in state
                    del state[name]
                else:
                    assert (kind == "ADDED") is (name not in state)
                    state[name] = event["object"]

    async with asyncio.TaskGroup() as tasks:
        watchers = [tasks.create_task(watcher()) for _ in range(4)]
        async with asyncio.TaskGroup() as writers:
            for number in range(4):
                writers.create_task(writer(number))
        await api.make("the-end")
    items = {i["metadata"]["name"]: i for i in (await api.get(path_of())).body["items"]}
    del items["the-end"]
    for each in watchers:
        state = {**each.result(), "t0": items["t0"]}
        assert state == items
    assert Telescope.model_validate(items["t0"])
