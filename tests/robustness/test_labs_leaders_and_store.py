"""A sync that loses its leadership or its store half-way: nothing is done twice, and it is finished later."""

from __future__ import annotations

from pathlib import Path

import pytest

from controllers.labs.kind import LABS
from equipment.fault_proxy import FaultProxy
from equipment.labs_world import labs_world
from equipment.waiting import until
from lrm.cache import CacheUpdate
from lrm.devservers import EtcdServer
from lrm.election import StaticElection
from storage.etcd import EtcdStorage
from storage.memory import MemoryStorage


async def test_a_deposed_leader_in_the_middle_of_a_sync_writes_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """It had the list in hand when another took over: what it does with it is refused by the store."""
    storage = MemoryStorage()
    async with labs_world(monkeypatch, storage=storage) as world:
        await world.worker()
        await world.sync()
        for n in range(20):
            world.machine().add_lab(f"Lab {n}")
        world.fault("delay", path="/labs", seconds=0.4, times=1)
        await world.ask()
        await until(lambda: any(e["path"] == "/labs" and e["status"] == 0 for e in world.machine().log))
        other = StaticElection(storage, world.clock, root="/lrm", lock_name=LABS, identity="another")
        term = await other.acquire()
        async with world.counting() as writes:
            await world.term.wait_lost()
            await until(lambda: not world.labs.queue.processing)
            await world.cache.barrier(30)
        assert dict(writes) == {}
        assert not await world.records()
        world.simulator.faults.clear()
        await other.release(term)
        async with labs_world(monkeypatch, storage=storage, simulator=world.simulator) as later:
            await later.sync()
            assert len(await later.records()) == 20


async def test_a_store_that_goes_away_in_the_middle_of_a_sync_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, server_dir: Path, etcd: EtcdServer, etcd_root: str
) -> None:
    async with FaultProxy(etcd.endpoint) as proxy:
        storage = EtcdStorage([proxy.endpoint], root=etcd_root, request_timeout=3)
        try:
            async with labs_world(monkeypatch, storage=storage, root=etcd_root) as world:
                await world.worker()
                await world.sync()
                labs = [world.machine().add_lab(f"Lab {n}") for n in range(300)]
                seen = 0

                def count(update: CacheUpdate) -> None:
                    nonlocal seen
                    seen += len(update.changes)

                end = world.cache.subscribe(count)
                await world.ask()
                await until(lambda: seen > 20, "the sync to write")
                end()
                await proxy.refuse()
                await until(lambda: world.labs.stats.failures > 0, "the sync to fail")
                assert len(world.known()) < len(labs)
                await proxy.listen()
                await world.sync(timeout=60)
                records = await world.records()
                assert set(records) == {lab.id for lab in labs}
                assert all(r.status.operation_history == [] for r in records.values())
        finally:
            await storage.aclose()
