"""A daemon that can renew its lease and hears nothing: it must not lead, and must not go on leading."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from equipment.fault_proxy import FaultProxy, How, When
from equipment.waiting import until
from equipment.widget_plugin import plugin
from lrm.daemon import Daemon
from lrm.devservers import EtcdServer
from lrm.settings import Settings

WATCH = "/v3/watch"


@asynccontextmanager
async def running(endpoint: str, name: str) -> AsyncIterator[Daemon]:
    settings = Settings(
        etcd_endpoints=(endpoint,),
        redis_url="",
        api_port=0,
        instance_id=name,
        lease_duration=3,
        renew_deadline=1.5,
        retry_period=0.3,
        etcd_silence=0.5,
        auth_tokens_file=None,
    )
    daemon = Daemon(settings, [plugin])
    ready = asyncio.Event()
    task = asyncio.create_task(daemon.run(ready=ready))
    try:
        await ready.wait()
        yield daemon
    finally:
        daemon.stop()
        await task


def leads(daemon: Daemon) -> bool:
    election = daemon.status.elections.get("widgets")
    return election is not None and election.is_leader


async def test_who_hears_nothing_does_not_lead_and_gives_up_leading(
    server_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrm.daemon._LIVENESS_DEADLINE", 0.5)
    async with (
        EtcdServer(server_dir / "etcd") as etcd,
        FaultProxy(etcd.endpoint) as proxy,
        running(proxy.endpoint, "one") as one,
    ):
        await until(lambda: leads(one), "one leads")
        async with running(etcd.endpoint, "two") as two:
            await until(lambda: two.cache.synced, "two is warm")
            proxy.inject(When.BEFORE, How.RESET, WATCH, times=0)
            proxy.abort(WATCH)
            await until(lambda: leads(two), "two has taken over")
            assert not leads(one)
            await until(lambda: one.cache.deaf_seconds > 1, "one hears nothing")
            assert one.status.leader()["error"].startswith("the store is not heard")
            assert one.leaders.absent_seconds("widgets") > 1
        await asyncio.sleep(1)
        assert not leads(one), "though the lock is free and its lease is alive"
        assert one.lease._session is not None
        proxy.clear()
        await until(lambda: leads(one), "one hears again")
