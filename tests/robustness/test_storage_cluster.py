"""Members that die, hang and come back under load: what was told stays true, and the watch misses nothing."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest

from equipment.cluster import EtcdCluster
from equipment.etcd import VERSIONS, WHEEL, Gateway, binary
from equipment.ledger import Ledger
from equipment.listener import listening, told_by_etcd
from equipment.waiting import until
from storage.errors import OutcomeUnknown, Unavailable
from storage.etcd import EtcdStorage

PREFIX = "/t/r/"


def _storage(cluster: EtcdCluster, request_timeout: float = 3.0) -> EtcdStorage:
    times = {"request_timeout": request_timeout, "liveness_silence": 1.0, "liveness_deadline": 1.0}
    return EtcdStorage(cluster.endpoints, root="/t", **times)


def _versions(sample: str) -> list[object]:
    return [pytest.param(version, marks=() if version == sample else pytest.mark.soak) for version in VERSIONS]


@pytest.mark.slow
@pytest.mark.parametrize("version", _versions("current"))
async def test_the_leader_killed_under_load_costs_no_truth(server_dir: Path, version: str) -> None:
    await _disturb_the_leader(server_dir, version, hang=False)


@pytest.mark.slow
@pytest.mark.parametrize("version", _versions(WHEEL))
async def test_the_leader_hanging_under_load_costs_no_truth(server_dir: Path, version: str) -> None:
    """It is paused, another one is elected, and it wakes up with old news: old etcds would read from the past then."""
    await _disturb_the_leader(server_dir, version, hang=True)


async def _disturb_the_leader(folder: Path, version: str, *, hang: bool) -> None:
    async with EtcdCluster(folder, binary(version)) as cluster:
        ledger = Ledger(PREFIX)
        victim = cluster.members[await cluster.leader()]
        survivor = next(member for member in cluster.members.values() if member is not victim)
        direct = Gateway(survivor.endpoint)
        await ledger.lead(direct)
        first = ledger.guard.create_revision - 1
        async with aclosing(_storage(cluster)) as storage, listening(storage, PREFIX, first) as listener:
            async with ledger.writers([storage], 6):
                await ledger.succeed(100)
                if hang:
                    victim.pause()
                else:
                    victim.kill()
                await ledger.succeed(100)
                if hang:
                    victim.resume()
                else:
                    await victim.start()
                await ledger.succeed(100)
            last = await direct.put(f"{PREFIX}end", b"")
            await listener.reach(last)
            assert listener.deliveries == await told_by_etcd(direct, PREFIX, first, last)
        ledger.check(await direct.history(PREFIX, first, last))
        assert ledger.told["OutcomeUnknown"] <= 12, ledger.told


@pytest.mark.slow
async def test_without_a_majority_calls_fail_in_time_and_recover_by_themselves(server_dir: Path) -> None:
    """Two of three die: reads are unavailable, writes at best unknown; nothing is to be done when they are back."""
    async with EtcdCluster(server_dir, binary(WHEEL)) as cluster:
        a, b, c = cluster.members.values()
        revision = await Gateway(a.endpoint).put(f"{PREFIX}a", b"1")
        async with (
            aclosing(_storage(cluster, request_timeout=0.6)) as storage,
            listening(storage, PREFIX, revision) as listener,
        ):
            b.kill()
            c.kill()
            clock = asyncio.get_running_loop().time
            began = clock()
            with pytest.raises(Unavailable):
                await storage.get(f"{PREFIX}a")
            with pytest.raises((Unavailable, OutcomeUnknown)):
                await storage.update(f"{PREFIX}a", b"2", expected_revision=revision)
            with pytest.raises((Unavailable, OutcomeUnknown)):
                await storage.create(f"{PREFIX}b", b"2")
            with pytest.raises(Unavailable):
                await listener.watch.barrier(timeout=1.0)
            assert clock() - began < 20
            health = await storage.health()
            assert not health.ok
            assert sum(bool(member.error) for member in health.members) >= 2
            async with asyncio.TaskGroup() as group:
                group.create_task(b.start())
                group.create_task(c.start())

            async def back() -> bool:
                return (await storage.health()).ok

            await until(back, "the store is healthy again")
            last = await Gateway(a.endpoint).put(f"{PREFIX}end", b"")
            await listener.reach(last)
            assert listener.deliveries == await told_by_etcd(Gateway(a.endpoint), PREFIX, revision, last)
