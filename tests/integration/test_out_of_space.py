"""An etcd that is full: what goes on, what is refused, who compacts, and that the runbook's commands end it."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from equipment.daemons import WIDGETS, DaemonProcess, widget_document
from equipment.etcd import WHEEL, Gateway, binary
from equipment.waiting import until
from lrm.devservers import EtcdServer, etcd_binary

RUNBOOK = Path(__file__).parents[2] / "docs" / "runbooks" / "etcd-out-of-space.md"
QUOTA = 4 * 1024 * 1024
LEASE = 5.0
RETENTION = 6.0
SPEED = {
    "LRM_LEADER": "lease",
    "LRM_LEASE_DURATION": str(LEASE),
    "LRM_RENEW_DEADLINE": "3",
    "LRM_RETRY_PERIOD": "0.5",
    "LRM_COMPACT_EVERY": "0.5",
    "LRM_COMPACT_RETENTION": str(RETENTION),
    "LRM_ETCD_SILENCE": "1",
    "LRM_ETCD_QUOTA_BYTES": str(QUOTA),
}


@dataclass
class World:
    """One small etcd and two daemons, one of which leads everything."""

    etcd: EtcdServer
    leader: DaemonProcess
    standby: DaemonProcess

    @property
    def gateway(self) -> Gateway:
        return Gateway(self.etcd.endpoint)

    async def fill(self) -> int:
        """Write until etcd refuses, all of it history of one key; the last revision."""
        for _ in range(1000):
            try:
                revision = await self.gateway.put("/somebody-else", os.urandom(64 * 1024))
            except RuntimeError as error:
                if "database space exceeded" in str(error):
                    return revision
                raise
        raise AssertionError("etcd took more than its quota")

    async def is_compacted(self, revision: int) -> bool:
        """Whether nothing before `revision` can be read."""
        try:
            await self.gateway.call("kv/range", {"key": "AA==", "revision": str(revision - 1)})
        except RuntimeError as error:
            return "compacted" in str(error)
        return False


async def locks(daemon: DaemonProcess) -> dict[str, dict[str, Any]]:
    _, document = await daemon.request("GET", "/api/status/leader")
    return {lock["lock_name"]: lock for lock in document["locks"]}


async def leads_all(daemon: DaemonProcess) -> bool:
    held = await locks(daemon)
    return {"widgets", "gc", "compactor"} <= held.keys() and all(lock["is_leader"] for lock in held.values())


async def is_ready(daemon: DaemonProcess, name: str) -> bool:
    _, widget = await daemon.request("GET", f"{WIDGETS}/{name}")
    return bool(widget["status"]["phase"] == "Ready")


async def compactor(daemon: DaemonProcess) -> dict[str, Any]:
    _, document = await daemon.request("GET", "/api/status/status")
    return next(c for c in document["controllers"] if c["name"] == "compactor")


async def notes(daemon: DaemonProcess) -> str:
    _, document = await daemon.request("GET", "/api/status/health")
    return " ".join(document["notes"])


@asynccontextmanager
async def world(folder: Path, version: str) -> AsyncIterator[World]:
    server = EtcdServer(folder / "etcd", binary=binary(version), args=[f"--quota-backend-bytes={QUOTA}"])
    async with server:
        a, b = (DaemonProcess(folder, endpoint=server.endpoint, root="/lrm", **SPEED) for _ in range(2))
        try:
            await a.start_ready()
            await until(lambda: leads_all(a), "the first leads")
            await b.start_ready()
            yield World(server, a, b)
        finally:
            await asyncio.gather(a.end(), b.end())


def versions(quick: str) -> list[Any]:
    """One in every run; all of them in the long one."""
    others = (v for v in ("3.4", WHEEL, "current") if v != quick)
    return [quick, *(pytest.param(v, marks=pytest.mark.soak) for v in others)]


async def refused_and_served(*daemons: DaemonProcess) -> None:
    """While the store is full, whichever daemon is asked."""
    for daemon in daemons:
        code, headers, body = await daemon.exchange("POST", WIDGETS, widget_document("late"))
        assert (code, body["reason"]) == (503, "ServiceUnavailable")
        assert "out of space" in body["message"]
        assert int(headers["Retry-After"]) >= 10
        code, listed = await daemon.request("GET", WIDGETS)
        assert code == 200
        assert "early" in [item["metadata"]["name"] for item in listed["items"]]


async def by_the_book(endpoint: str) -> None:
    """Every command of the runbook, in its order, as it is written there."""
    path = f"{etcd_binary().parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "ETCDCTL_ENDPOINTS": endpoint, "ETCDCTL_API": "3"}
    blocks = re.findall(r"```sh\n(.*?)```", RUNBOOK.read_text(), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        shell = await asyncio.create_subprocess_exec(
            "sh", "-euc", block, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        said = (await shell.communicate())[0].decode()
        assert shell.returncode == 0 or "required revision has been compacted" in said, (block, said)


async def recovered(world: World, daemon: DaemonProcess) -> None:
    await by_the_book(world.etcd.endpoint)
    await until(lambda: leads_all(daemon), "all is led")
    code, body = await daemon.request("POST", WIDGETS, widget_document("afterwards"))
    assert code == 201, body
    await until(lambda: is_ready(daemon, "afterwards"), "it is reconciled")
    told = await notes(daemon)
    assert "out of space" not in told
    assert "quota" not in told


@pytest.mark.parametrize("version", versions(WHEEL))
async def test_a_full_etcd_keeps_its_leaders_and_is_compacted_by_them(server_dir: Path, version: str) -> None:
    async with world(server_dir, version) as it:
        assert (await it.leader.request("POST", WIDGETS, widget_document("early")))[0] == 201
        await until(lambda: is_ready(it.leader, "early"))
        before = await locks(it.leader)
        filled = await it.fill()
        await refused_and_served(it.leader, it.standby)
        for daemon in (it.leader, it.standby):
            told = await notes(daemon)
            assert "docs/runbooks/etcd-out-of-space.md" in told
            assert "MiB of its quota" in told
        # The retention is longer than the lease: leaders that could not renew would be gone by then.
        assert RETENTION > LEASE
        await until(lambda: it.is_compacted(filled), "the leader compacts", 40)
        assert await locks(it.leader) == before, "the same terms"
        assert (await compactor(it.standby))["compactions"] == 0
        await refused_and_served(it.leader, it.standby)
        _, metrics = await it.leader.request("GET", "/metrics")
        assert f'lrm_store_alarm{{alarm="NOSPACE",member="{it.etcd.endpoint}"}} 1.0' in metrics
        assert f'lrm_store_quota_bytes{{member="{it.etcd.endpoint}"}} 4.194304e+06' in metrics
        await recovered(it, it.leader)
        for daemon in (it.leader, it.standby):
            assert "Traceback" not in daemon.log()


@pytest.mark.parametrize("version", versions("current"))
async def test_without_a_leader_the_standby_compacts_a_full_etcd_and_leads_afterwards(
    server_dir: Path, version: str
) -> None:
    async with world(server_dir, version) as it:
        assert (await it.leader.request("POST", WIDGETS, widget_document("early")))[0] == 201
        await until(lambda: is_ready(it.standby, "early"))
        filled = await it.fill()
        it.leader.process.kill()
        await until(lambda: it.is_compacted(filled), "the standby compacts", 40)
        held = await locks(it.standby)
        assert held["compactor"]["holder"] is None
        assert held["compactor"]["seconds_without_leader"] > 0
        assert (await compactor(it.standby))["compactions"] >= 1
        await refused_and_served(it.standby)
        await recovered(it, it.standby)
        assert "Traceback" not in it.standby.log()
