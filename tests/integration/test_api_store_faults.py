"""The API while its store dies, stalls, loses replies or is full: true answers, and recovery without help."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from equipment.api import GROUP, Served, path_of, served, telescope, told
from equipment.etcd import Gateway
from equipment.fault_proxy import FaultProxy, How, When
from equipment.waiting import until
from lrm.devservers import EtcdServer
from storage.etcd import EtcdStorage


@pytest.fixture
async def own_etcd(server_dir: Path) -> AsyncIterator[EtcdServer]:
    async with EtcdServer(server_dir / "etcd") as server:
        yield server


@asynccontextmanager
async def api_on(endpoint: str, root: str = "/lrm", *, barrier_seconds: float = 1.0) -> AsyncIterator[Served]:
    storage = EtcdStorage(
        [endpoint],
        root=root,
        instance="api-test",
        request_timeout=1.0,
        liveness_silence=1.0,
        liveness_deadline=1.0,
    )
    async with served(storage, root=root, barrier_seconds=barrier_seconds) as api:
        yield api
    await storage.aclose()


async def recovered(api: Served) -> None:
    async def consistent() -> bool:
        return (await api.get(path_of())).status == 200

    await until(consistent, "consistent reads again")


async def test_a_store_that_dies_and_comes_back(own_etcd: EtcdServer) -> None:
    async with api_on(own_etcd.endpoint) as api:
        version = (await api.make("a"))["metadata"]["resourceVersion"]
        async with api.watch(path_of(), resourceVersion=version) as watch:
            own_etcd.kill()
            for answer in (
                await api.post(path_of(), telescope("b")),
                await api.merge(path_of("a"), {"spec": {"tracking": True}}),
                await api.call("DELETE", path_of("a")),
                await api.post(f"/apis/{GROUP}", telescope("b")),
                await api.get(path_of("a")),
            ):
                assert (answer.status, answer.body["reason"]) == (503, "ServiceUnavailable")
                assert int(answer.headers["Retry-After"]) > 0
            late = await api.get(path_of())
            assert (late.status, late.body["reason"]) == (504, "Timeout")
            assert int(late.headers["Retry-After"]) > 0
            cached = await api.get(path_of(), params={"resourceVersion": "0"})
            assert [i["metadata"]["name"] for i in cached.body["items"]] == ["a"]
            older = await api.get(path_of(), params={"resourceVersion": version})
            assert older.status == 200, "what the cache has already needs no store"
            assert (await api.get("/apis")).status == 200
            async with api.watch(path_of(), resourceVersion="0") as present:
                assert await present.take(1) == [("ADDED", "a")]
            await own_etcd.start()
            await recovered(api)
            await api.make("c")
            assert told(await watch.next(20)) == ("ADDED", "c"), "nothing was lost, and nothing of the refused was made"


async def test_a_store_that_stalls_in_a_write_leaves_an_unknown_outcome(own_etcd: EtcdServer) -> None:
    """504 without Retry-After: the client must look before it writes again."""
    async with api_on(own_etcd.endpoint) as api:
        await api.make("a")
        assert (await api.get(path_of())).status == 200
        own_etcd.pause()
        async with asyncio.timeout(30):
            answer = await api.post(path_of(), telescope("b"))
        assert (answer.status, answer.body["reason"]) == (504, "Timeout")
        assert "may have been made" in answer.body["message"]
        assert "Retry-After" not in answer.headers
        late = await api.get(path_of())
        assert (late.status, "Retry-After" in late.headers) == (504, True)
        own_etcd.resume()
        await recovered(api)


async def test_a_lost_reply_is_settled_and_the_client_hears_the_truth(own_etcd: EtcdServer) -> None:
    async with FaultProxy(own_etcd.endpoint) as proxy, api_on(proxy.endpoint) as api:
        await api.make("a")
        for name, call in (
            ("create", lambda: api.post(path_of(), telescope("b"))),
            ("patch", lambda: api.merge(path_of("a"), {"spec": {"tracking": True}})),
            ("delete", lambda: api.call("DELETE", path_of("a"))),
        ):
            writes_only = lambda request: b"request_put" in request.body or b"request_delete" in request.body  # noqa: E731
            rule = proxy.inject(When.AFTER, How.RESET, path="/v3/kv/txn", matches=writes_only)
            answer = await call()
            assert rule.hits == 1, name
            assert answer.status in (200, 201), (name, answer.raw)
        assert [i["metadata"]["name"] for i in (await api.get(path_of())).body["items"]] == ["b"]


async def test_a_list_waits_for_a_cache_that_lags_behind_the_store(own_etcd: EtcdServer) -> None:
    """Another daemon has written; this one's watch is stuck. Stale data is served only to who asked for it."""
    async with FaultProxy(own_etcd.endpoint) as proxy, api_on(proxy.endpoint, barrier_seconds=20.0) as api:
        await api.make("a")
        assert (await api.get(path_of())).status == 200
        proxy.freeze("/v3/watch")
        gateway = Gateway(own_etcd.endpoint)
        value, _ = await gateway.get("/lrm/r/telescopes/default/a") or (b"", 0)
        await gateway.put("/lrm/r/telescopes/default/b", value.replace(b'"name":"a"', b'"name":"b"'))
        stale = await api.get(path_of(), params={"resourceVersion": "0"})
        assert [i["metadata"]["name"] for i in stale.body["items"]] == ["a"]
        asks_the_store = proxy.inject(When.BEFORE, How.PASS, path="/v3/kv", held=True)
        listing = asyncio.create_task(api.get(path_of()))
        await asks_the_store.hit()
        assert not listing.done()
        proxy.thaw()
        asks_the_store.release.set()
        listed = await listing
        assert [i["metadata"]["name"] for i in listed.body["items"]] == ["a", "b"]


async def test_a_full_store_still_answers_consistent_lists_and_takes_deletions(own_etcd: EtcdServer) -> None:
    async with api_on(own_etcd.endpoint) as api:
        for name in ("a", "b", "c"):
            await api.make(name)
        gateway = Gateway(own_etcd.endpoint)
        member = (await gateway.status())["header"]["member_id"]
        alarm = {"memberID": member, "alarm": "NOSPACE"}
        await gateway.call("maintenance/alarm", {"action": "ACTIVATE", **alarm})
        refused = await api.post(path_of(), telescope("d"))
        assert (refused.status, refused.body["reason"]) == (503, "ServiceUnavailable")
        assert int(refused.headers["Retry-After"]) >= 10
        assert (await api.call("DELETE", path_of("a"))).status == 200
        listed = await api.get(path_of())
        assert [i["metadata"]["name"] for i in listed.body["items"]] == ["b", "c"], "the deletion is in it"
        page = await api.get(path_of(), params={"limit": "1"})
        token = page.body["metadata"]["continue"]
        rest = await api.get(path_of(), params={"limit": "1", "continue": token})
        assert [i["metadata"]["name"] for i in rest.body["items"]] == ["c"]
        async with api.watch(path_of(), resourceVersion=listed.body["metadata"]["resourceVersion"]) as watch:
            await api.call("DELETE", path_of("b"))
            assert told(await watch.next()) == ("DELETED", "b")
        await gateway.call("maintenance/alarm", {"action": "DEACTIVATE", **alarm})
        await recovered(api)
        await api.make("d")


async def test_compaction_during_an_outage_ends_watches_and_new_ones_go_on(own_etcd: EtcdServer) -> None:
    """The cache could not see what it missed, so no watcher may believe that it did."""
    async with FaultProxy(own_etcd.endpoint) as proxy, api_on(proxy.endpoint) as api:
        made = await api.make("a")
        version = made["metadata"]["resourceVersion"]
        async with api.watch(path_of(), resourceVersion=version) as watch:
            await proxy.refuse()
            proxy.abort()
            gateway = Gateway(own_etcd.endpoint)
            value, _ = await gateway.get("/lrm/r/telescopes/default/a") or (b"", 0)
            await gateway.put("/lrm/r/telescopes/default/b", value.replace(b'"name":"a"', b'"name":"b"'))
            await gateway.compact(await gateway.delete("/lrm/r/telescopes/default/a"))
            await proxy.listen()
            error = await watch.next(20)
            assert (error["type"], error["object"]["code"]) == ("ERROR", 410)
        await recovered(api)
        assert [i["metadata"]["name"] for i in (await api.get(path_of())).body["items"]] == ["b"]
        expired = await api.get(path_of(), params={"watch": "true", "resourceVersion": version})
        assert expired.status == 410
