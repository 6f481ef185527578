"""The fault proxy does to a connection what it says, seen by a client that is not ours: aiohttp against a real etcd."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from equipment.etcd import Gateway
from equipment.fault_proxy import FaultProxy, How, When
from equipment.waiting import until
from lrm.devservers import EtcdServer

PUT = "/v3/kv/put"


@pytest.mark.parametrize("how", [How.CLOSE, How.RESET])
async def test_a_request_dropped_before_forwarding_has_no_effect(etcd: EtcdServer, etcd_root: str, how: How) -> None:
    async with FaultProxy(etcd.endpoint) as proxy:
        rule = proxy.inject(When.BEFORE, how, PUT)
        with pytest.raises((aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)):
            await Gateway(proxy.endpoint).put(f"{etcd_root}/a", b"1")
        await rule.hit()
    assert await Gateway(etcd.endpoint).get(f"{etcd_root}/a") is None


@pytest.mark.parametrize("how", [How.CLOSE, How.RESET])
async def test_a_reply_dropped_after_forwarding_was_carried_out(etcd: EtcdServer, etcd_root: str, how: How) -> None:
    async with FaultProxy(etcd.endpoint) as proxy:
        proxy.inject(When.AFTER, how, PUT)
        with pytest.raises((aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)):
            await Gateway(proxy.endpoint).put(f"{etcd_root}/a", b"1")
    found = await Gateway(etcd.endpoint).get(f"{etcd_root}/a")
    assert found is not None
    assert found[0] == b"1"


async def test_only_the_chosen_request_is_struck(etcd: EtcdServer, etcd_root: str) -> None:
    """`skip`, `times`, path and body decide; everything else passes untouched."""
    async with FaultProxy(etcd.endpoint) as proxy:
        gateway = Gateway(proxy.endpoint)
        rule = proxy.inject(When.BEFORE, How.REPLACE, PUT, skip=1, reply=b'{"error":"no"}')
        await gateway.put(f"{etcd_root}/a", b"1")
        with pytest.raises(RuntimeError, match="503"):
            await gateway.put(f"{etcd_root}/a", b"2")
        await gateway.put(f"{etcd_root}/a", b"3")
        assert (rule.seen, rule.hits) == (3, 1)
        assert (await gateway.get(f"{etcd_root}/a") or (b"",))[0] == b"3"
        assert proxy.counts[PUT] == 3


async def test_a_held_request_is_carried_out_late_though_its_client_has_gone(etcd: EtcdServer, etcd_root: str) -> None:
    async with FaultProxy(etcd.endpoint) as proxy:
        rule = proxy.inject(When.BEFORE, How.PASS, PUT, held=True)
        writing = asyncio.create_task(Gateway(proxy.endpoint).put(f"{etcd_root}/late", b"1"))
        await rule.hit()
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        direct = Gateway(etcd.endpoint)
        assert await direct.get(f"{etcd_root}/late") is None
        rule.release.set()
        await until(lambda: direct.get(f"{etcd_root}/late"), "the late write")


async def test_a_truncated_reply_breaks_off(etcd: EtcdServer, etcd_root: str) -> None:
    async with FaultProxy(etcd.endpoint) as proxy:
        proxy.inject(When.AFTER, How.TRUNCATE, PUT, keep=150)
        with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError)):
            await Gateway(proxy.endpoint).put(f"{etcd_root}/a", b"1")


async def test_silence_keeps_the_connection_open_and_answers_nothing(etcd: EtcdServer, etcd_root: str) -> None:
    async with FaultProxy(etcd.endpoint) as proxy:
        rule = proxy.inject(When.AFTER, How.SILENCE, PUT)
        writing = asyncio.create_task(Gateway(proxy.endpoint).put(f"{etcd_root}/a", b"1"))
        await rule.hit()
        assert await Gateway(etcd.endpoint).get(f"{etcd_root}/a") is not None
        assert not writing.done()
        assert proxy.connections == 1
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)


async def test_a_stream_passes_as_it_comes_and_can_be_frozen_and_reset(etcd: EtcdServer, etcd_root: str) -> None:
    async with FaultProxy(etcd.endpoint) as proxy, aiohttp.ClientSession() as session:
        key = Gateway(etcd.endpoint)
        create = {"create_request": {"key": "AA==", "range_end": "AA=="}}
        async with session.post(f"{proxy.endpoint}/v3/watch", json=create) as stream:
            assert b'"created":true' in await stream.content.readline()
            await key.put(f"{etcd_root}/a", b"1")
            assert b'"events"' in await stream.content.readline()
            proxy.freeze()
            await key.put(f"{etcd_root}/a", b"2")
            reading = asyncio.create_task(stream.content.readline())
            assert not (await asyncio.wait([reading], timeout=0.2))[0], "a frozen proxy carries nothing"
            proxy.thaw()
            assert b'"events"' in await reading
            assert proxy.abort("/v3/watch") == 1
            with pytest.raises(aiohttp.ClientError):
                await stream.content.readline()


async def test_a_proxy_that_refuses_looks_dead_and_comes_back_on_its_port(etcd: EtcdServer, etcd_root: str) -> None:
    async with FaultProxy(etcd.endpoint) as proxy:
        await proxy.refuse()
        with pytest.raises(aiohttp.ClientConnectorError):
            await Gateway(proxy.endpoint).revision()
        await proxy.listen()
        assert await Gateway(proxy.endpoint).revision() > 0
