"""LabRecords through the API of a real daemon: what users see, may do and may not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from controllers.cml.simulator import Machine, Simulator
from controllers.workers.kind import LabWorker
from equipment.daemons import DaemonProcess
from equipment.labs_world import FAST, PASSWORD_ENV, instance_of, labs_world
from equipment.waiting import until
from lrm.devservers import EtcdServer
from storage.etcd import EtcdStorage

API = "/apis/lab.neuroglia.io/v1/namespaces/default"
MERGE = {"Content-Type": "application/merge-patch+json"}


@dataclass
class Served:
    daemon: DaemonProcess
    machine: Machine

    async def get(self, path: str) -> Any:
        status, document = await self.daemon.request("GET", f"{API}/{path}")
        assert status == 200, document
        return document

    async def records(self, query: str = "") -> dict[str, Any]:
        return {r["spec"]["labId"]: r for r in (await self.get(f"labrecords{query}"))["items"]}

    async def patch(self, name: str, document: dict[str, Any]) -> tuple[int, Any]:
        return await self.daemon.request("PATCH", f"{API}/labrecords/{name}", document, headers=MERGE)

    async def mirrored(self, count: int) -> dict[str, Any]:
        async def there() -> dict[str, Any] | None:
            records = await self.records()
            return records if len(records) == count else None

        found = await until(there, f"{count} records")
        assert found is not None
        return found


@pytest.fixture
async def served(
    server_dir: Path, etcd: EtcdServer, etcd_root: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Served]:
    async with Simulator.run(FAST) as simulator:
        storage = EtcdStorage([etcd.endpoint], root=etcd_root)
        async with labs_world(monkeypatch, storage=storage, root=etcd_root, simulator=simulator) as world:
            world.term.lost()  # the daemon alone acts
            await world.worker()
            worker: LabWorker = await world.get_worker()
        await storage.aclose()
        daemon = DaemonProcess(
            server_dir,
            endpoint=etcd.endpoint,
            root=etcd_root,
            plugins="equipment.labs_plugin",
            LRM_SECRETS_ALLOW=PASSWORD_ENV,
            LRM_LABS_REFRESH_INTERVAL="0.2",
            LRM_LABS_STEP_INTERVAL="0.05",
            **{PASSWORD_ENV: FAST.password},
        )
        try:
            await daemon.start_ready()
            yield Served(daemon, simulator.machine(instance_of(worker.name)))
        finally:
            await daemon.end()


async def test_the_life_of_records_as_users_see_it(served: Served) -> None:
    machine = served.machine
    kept, other, doomed = (machine.add_lab(t, nodes=2) for t in ("kept", "other", "doomed"))
    await served.mirrored(3)

    async def counted() -> Any:
        worker = await served.get("labworkers/w1")
        return worker if worker["status"].get("labsCount") == 3 else None

    await until(counted, "the end of the sync")

    # What is served, and by which questions it is found
    records = await served.records()
    record = records[kept.id]
    worker = await served.get("labworkers/w1")
    assert record["status"]["lastSyncedAt"] <= worker["status"]["labsSyncedAt"]
    assert record["status"]["title"] == "kept"
    assert worker["status"]["labsCount"] == 3
    for query, found in {
        "?fieldSelector=spec.workerRef%3Dw1": 3,
        "?fieldSelector=spec.workerRef%3Dw2": 0,
        f"?fieldSelector=spec.labId%3D{other.id}": 1,
        "?fieldSelector=status.state%3Ddefined_on_core": 3,
        "?fieldSelector=status.phase%3DMissing": 0,
    }.items():
        assert len(await served.records(query)) == found, query

    # Nobody makes one, and nobody moves one
    name = record["metadata"]["name"]
    made = {
        "apiVersion": "lab.neuroglia.io/v1",
        "kind": "LabRecord",
        "metadata": {"name": "w1-x"},
        "spec": {"workerRef": "w1", "labId": "x"},
    }
    status, refusal = await served.daemon.request("POST", f"{API}/labrecords", made)
    assert (status, "sync" in refusal["message"]) == (403, True)
    status, refusal = await served.patch(name, {"spec": {"labId": other.id}})
    assert status == 422
    assert "spec.labId" in {c["field"] for c in refusal["details"]["causes"]}

    # A wish is carried out, and the mirror follows
    assert (await served.patch(name, {"spec": {"desiredState": "started"}}))[0] == 200

    async def started() -> bool:
        return (await served.records())[kept.id]["status"]["state"] == "STARTED"

    await until(started, "the wish and the mirror of it")

    # Deleting a record deletes its lab, forgetting does not
    doomed_name = records[doomed.id]["metadata"]["name"]
    assert (await served.daemon.request("DELETE", f"{API}/labrecords/{doomed_name}"))[0] in {200, 202}
    await served.mirrored(2)
    assert doomed.id not in machine.labs
    other_name = records[other.id]["metadata"]["name"]
    forget = {"metadata": {"annotations": {"lab.neuroglia.io/forget": "true"}}}
    assert (await served.patch(other_name, forget))[0] == 200
    assert (await served.daemon.request("DELETE", f"{API}/labrecords/{other_name}"))[0] in {200, 202}

    async def forgotten_and_found_again() -> bool:
        found = (await served.records()).get(other.id)
        return found is not None and found["metadata"]["uid"] != records[other.id]["metadata"]["uid"]

    await until(forgotten_and_found_again, "the record to go, and the lab to be found by the next sync")
    assert other.id in machine.labs
