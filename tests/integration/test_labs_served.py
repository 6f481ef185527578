"""LabRecords through the API of a real daemon: what users see, may do and may not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from equipment.labs_api import labs_path
from equipment.labs_daemon import API, LabsDaemon, labs_daemon
from equipment.waiting import until
from lrm.devservers import EtcdServer


@pytest.fixture
async def served(
    server_dir: Path, etcd: EtcdServer, etcd_root: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[LabsDaemon]:
    async with labs_daemon(server_dir, etcd, etcd_root, monkeypatch) as served:
        yield served


async def test_the_life_of_records_as_users_see_it(served: LabsDaemon) -> None:
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

    # The endpoints of the worker's labs are faces of the same records
    async def ask(method: str, rest: str, body: Any = None) -> tuple[int, Any]:
        return await served.daemon.request(method, labs_path(rest), body)

    status, labs = await ask("GET", "")
    assert (status, {lab["id"] for lab in labs}) == (200, set(machine.labs))
    status, told = await ask("POST", f"/{other.id}/start")
    assert (status, other.state, told["result"]) == (200, "STARTED", "Succeeded")
    status, topology = await ask("GET", f"/{other.id}/download")
    assert status == 200
    status, made = await ask("POST", "/import?title=copy", topology)
    assert (status, machine.labs[made["lab_id"]].title) == (201, "copy")
    status, told = await ask("DELETE", f"/{other.id}")
    assert (status, other.id in machine.labs) == (200, False)
    assert (await ask("POST", "/refresh"))[1]["synced"] == 2
