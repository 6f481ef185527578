"""Garbage collection where it is at home: behind the API on a real etcd, and beside the labs of a worker."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from controllers.labs.kind import LabRecord
from controllers.workers.kind import INSTANCE_FINALIZER, LabWorker
from equipment.api import GROUP, Served, path_of, served
from equipment.gc_scene import collecting
from equipment.labs_world import LabsWorld, labs_world
from equipment.waiting import until
from lrm.cache import CacheUpdate
from lrm.devservers import EtcdServer
from storage.etcd import EtcdStorage


@pytest.fixture
async def api(etcd: EtcdServer, etcd_root: str) -> AsyncIterator[Served]:
    storage = EtcdStorage([etcd.endpoint], root=etcd_root)
    try:
        async with (
            served(storage, root=etcd_root) as api,
            collecting(storage, api.cache, api.api.clock, root=etcd_root),
        ):
            yield api
    finally:
        await storage.aclose()


async def family(api: Served) -> None:
    """An owner with two children, one of which is held."""
    owner = await api.make("owner")
    reference = {"apiVersion": GROUP, "kind": "Telescope", "name": "owner", "uid": owner["metadata"]["uid"]}
    reference["blockOwnerDeletion"] = True
    await api.make("free", ownerReferences=[reference])
    await api.make("held", ownerReferences=[reference], finalizers=["example.io/hold"])


async def names(api: Served) -> list[str]:
    return [item["metadata"]["name"] for item in (await api.get(path_of())).body["items"]]


async def become(api: Served, wanted: list[str]) -> None:
    async def are() -> bool:
        return await names(api) == wanted

    await until(are, f"only {wanted} to be left")


async def test_background_foreground_and_orphan(api: Served) -> None:
    await family(api)
    gone = await api.call("DELETE", path_of("owner"))
    assert gone.body["kind"] == "Status", "it does not wait for its children"
    await become(api, ["held"])
    await api.merge(path_of("held"), {"metadata": {"finalizers": None}})
    await become(api, [])

    await family(api)
    waiting = await api.call("DELETE", path_of("owner"), {"propagationPolicy": "Foreground"})
    assert waiting.body["metadata"]["finalizers"] == ["foregroundDeletion"]
    await become(api, ["held", "owner"])
    await api.merge(path_of("held"), {"metadata": {"finalizers": None}})
    await become(api, [])

    await family(api)
    assert (await api.call("DELETE", path_of("owner"), {"propagationPolicy": "Orphan"})).status == 200
    await become(api, ["free", "held"])
    for item in (await api.get(path_of())).body["items"]:
        assert "ownerReferences" not in item["metadata"]
        assert "deletionTimestamp" not in item["metadata"]


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LabsWorld]:
    async with labs_world(monkeypatch) as world, collecting(world.storage, world.cache, world.clock):
        yield world


async def test_a_worker_that_is_deleted_in_the_foreground_takes_its_records_along_and_no_lab(world: LabsWorld) -> None:
    """A record's deletionTimestamp would delete its lab; what holds the worker has to end first."""
    worker = await world.worker()
    labs = [world.machine().add_lab(f"lab {i}") for i in range(3)]
    await world.sync()
    marked: list[str] = []

    def watch(update: CacheUpdate) -> None:
        changed = [change.new.resource for change in update.changes if change.new]
        marked.extend(r.name for r in changed if isinstance(r, LabRecord) and r.deleting)

    end = world.cache.subscribe(watch)
    await world.client.delete(worker, propagation="Foreground")
    await world.sync()
    assert len(await world.records()) == 3, "the worker is on its way, and its labs are as they were"
    await world.client.remove_finalizer(await world.get_worker(), INSTANCE_FINALIZER)

    async def over() -> bool:
        return not await world.client.list(LabWorker) and not await world.records()

    await until(over, "the end of the worker and its records")
    await world.cache.barrier(30)
    end()
    assert not marked
    assert set(world.machine().labs) == {lab.id for lab in labs}


async def test_records_of_a_worker_that_was_torn_away_are_forgotten(world: LabsWorld) -> None:
    """Whoever takes a worker's finalizers off by force leaves records that nobody else would ever finish."""
    worker = await world.worker()
    labs = [world.machine().add_lab(f"lab {i}") for i in range(3)]
    await world.sync()
    records = await world.records()
    world.fault("status", method="DELETE", path=f"/labs/{labs[0].id}", status=503)
    await world.client.delete(records[labs[0].id])
    await world.client.forget(worker)
    for record in records.values():
        await world.gone(record)
    assert set(world.machine().labs) == {lab.id for lab in labs}
