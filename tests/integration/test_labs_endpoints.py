"""The endpoints about a worker's labs: what they answer, whom they serve, and that they only write resources."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from structlog.testing import capture_logs

from controllers.cml.errors import CmlCircuitOpen, CmlError
from controllers.cml.simulator.labs import Lab
from controllers.labs.bulk import BULK_MOST
from controllers.labs.imports_kind import LabImport
from controllers.labs.kind import LABS
from controllers.workers.kind import LabWorker
from equipment.api import Answer, Served, tokens_file
from equipment.labs_api import labs_api, labs_path
from equipment.labs_world import FAST, LabsWorld, instance_of, labs_world
from equipment.waiting import until
from lrm.client import Client
from lrm.resource import PAUSE_ANNOTATION, PROTECT_ANNOTATION, ObjectMeta

KEYS = {
    *("id", "title", "description", "notes", "state", "owner", "owner_username"),
    *("node_count", "link_count", "created", "modified", "groups", "last_synced"),
}
TOPOLOGY = "lab: {title: inside, version: 0.2.0}\nnodes: []\nlinks: []\n"
YAML = {"Content-Type": "application/yaml"}
NO_LAB = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LabsWorld]:
    async with labs_world(monkeypatch, labs_import_settle=0.3) as world:
        yield world


@pytest.fixture
async def api(world: LabsWorld) -> AsyncIterator[Served]:
    async with labs_api(world) as api:
        yield api


async def labs_of(world: LabsWorld, *titles: str, running: bool = False, nodes: int = 2) -> list[Lab]:
    """A worker and its labs, mirrored."""
    await world.worker()
    labs = [world.machine().add_lab(title, nodes=nodes, running=running) for title in titles]
    await world.sync()
    return labs


async def enter(world: LabsWorld, phase: str) -> None:
    def step(w: LabWorker) -> None:
        w.status.enter(phase, "Test", world.clock.now())

    await world.change_worker(step)


async def circuit_is_open(world: LabsWorld, lab: Lab) -> bool:
    try:
        await world.sessions.client_for(await world.get_worker()).lab_state(lab.id)
    except CmlError as error:
        return isinstance(error, CmlCircuitOpen)
    return False


async def listed(api: Served) -> dict[str, Any]:
    answer = await api.get(labs_path())
    assert answer.status == 200, answer.raw
    return {lab["id"]: lab for lab in answer.body}


async def post(api: Served, rest: str, body: Any = None, **options: Any) -> Answer:
    return await api.call("POST", labs_path(rest), body, **options)


# The list


async def test_the_list_has_the_known_keys_and_its_age_and_needs_no_cml(world: LabsWorld, api: Served) -> None:
    (lab,) = await labs_of(world, "Ärger \x07 😀", running=True)
    world.fault("drop", path="*")
    answer = await api.get(labs_path())
    (shown,) = answer.body
    assert set(shown) == KEYS
    assert (shown["id"], shown["title"], shown["state"], shown["node_count"]) == (lab.id, lab.title, "STARTED", 2)
    record = await world.record(lab.id)
    assert shown["owner"] == record.status.owner_fullname
    assert shown["last_synced"] is not None
    assert int(answer.headers["Age"]) < 60
    assert not answer.warnings

    def hour_ago(w: LabWorker) -> None:
        assert w.status.labs_synced_at is not None
        w.status.labs_synced_at -= timedelta(hours=1)

    await Client(world.storage, world.registry, world.clock, owner=LABS).update_status(
        await world.get_worker(), hour_ago
    )
    assert 3600 <= int((await api.get(labs_path())).headers["Age"]) < 3660
    await world.failing_sync()
    stale = await api.get(labs_path("?resourceVersion=0"))
    assert (stale.status, len(stale.body)) == (200, 1)
    assert "the last sync failed" in stale.warnings[0]


async def test_a_lab_that_is_known_to_be_missing_does_not_look_present(world: LabsWorld, api: Served) -> None:
    """Most labs are missing, so nothing is proven yet: each stays in the list, under the same keys, and says so."""
    labs = await labs_of(world, *(f"lab {n}" for n in range(12)), running=True)
    gone = {lab.id for lab in labs[:7]}
    for lab in labs[:7]:
        world.machine().remove(lab)
    answer = await post(api, "/refresh")
    assert (answer.body["synced"], answer.body["removed"], answer.body["missing"]) == (5, 0, 7)
    shown = await listed(api)
    assert {lab_id: lab["state"] for lab_id, lab in shown.items()} == {
        lab.id: "Missing" if lab.id in gone else "STARTED" for lab in labs
    }
    assert all(set(lab) == KEYS for lab in shown.values())


async def test_a_worker_is_found_by_name_or_instance_in_its_region_and_namespace_only(
    world: LabsWorld, api: Served
) -> None:
    await labs_of(world, "one")
    for path, status in {
        labs_path(): 200,
        labs_path(worker=instance_of("w1")): 200,
        labs_path("?namespace=default"): 200,
        labs_path("?namespace=other"): 404,
        labs_path("?namespace=No_Label"): 400,
        labs_path(worker="w2"): 404,
        labs_path(region="eu-west-1"): 404,
        labs_path("?dryRun=All"): 400,
        labs_path("?Namespace=default"): 400,
    }.items():
        answer = await api.get(path)
        assert (answer.status, path) == (status, path)
        if status == 404:
            assert answer.body["reason"] == "NotFound"
    assert (await api.call("PUT", labs_path())).status == 405


async def test_roles_hold_and_what_was_refused_leaves_no_trace(world: LabsWorld, tmp_path: Path) -> None:
    (lab,) = await labs_of(world, "one")
    tokens = [
        {"name": role, "sha256": hashlib.sha256(role.encode()).hexdigest(), "role": role, "namespaces": namespaces}
        for role, namespaces in (("viewer", None), ("manager", ["default"]), ("controller", ["other"]))
    ]
    files = {"tokens_file": tokens_file(tmp_path, *tokens), "audit_file": tmp_path / "audit.log"}
    writes = [
        ("POST", "/refresh", None),
        ("POST", "/import", TOPOLOGY),
        ("POST", "/bulk", {"action": "stop", "labs": [lab.id]}),
        ("POST", f"/{lab.id}/start", None),
        ("DELETE", f"/{lab.id}", None),
    ]
    async with labs_api(world, **files) as api:

        async def ask(who: str, method: str, rest: str, body: Any = None) -> int:
            headers = {"Authorization": f"Bearer {who}"} if who else {}
            return (await api.call(method, labs_path(rest), body, headers=headers)).status

        async with world.counting() as seen:
            for method, rest, body in writes:
                for who, status in (("", 401), ("viewer", 403), ("controller", 403)):
                    assert (await ask(who, method, rest, body), who, rest) == (status, who, rest)
        assert not seen
        assert await ask("viewer", "GET", "") == 200
        assert await ask("controller", "GET", "") == 403
        assert await ask("viewer", "GET", f"/{lab.id}/download") == 200
        assert await ask("manager", "POST", f"/{lab.id}/start") == 200
        assert await ask("manager", "DELETE", f"/{lab.id}") == 200
    lines = [orjson.loads(line) for line in (tmp_path / "audit.log").read_bytes().splitlines()]
    done = [(e["who"], o["name"], o["note"]) for e in lines if e["code"] == 200 for o in e["objects"]]
    assert done == [("manager", f"w1-{lab.id}", "start"), ("manager", f"w1-{lab.id}", "delete")]
    assert sum(e["code"] == 403 for e in lines) == 2 * len(writes) + 1


# Refresh


async def test_a_refresh_tells_what_its_sync_came_to(world: LabsWorld, api: Served) -> None:
    kept, changed, gone = await labs_of(world, "kept", "changed", "gone")
    world.machine().add_lab("new")
    world.edit(changed, title="changed a bit")
    world.machine().remove(gone)
    answer = await post(api, "/refresh")
    assert answer.status == 200
    counts = {name: answer.body[name] for name in ("synced", "created", "updated", "removed", "missing")}
    assert counts == {"synced": 3, "created": 1, "updated": 1, "removed": 1, "missing": 0}
    assert {lab["title"] for lab in (await listed(api)).values()} == {kept.title, "changed a bit", "new"}


async def test_a_refresh_that_takes_longer_says_where_to_look_and_why(world: LabsWorld, api: Served) -> None:
    await labs_of(world, "one")
    world.fault("status", path="*/labs", status=500)
    await world.failing_sync()
    world.simulator.faults.clear()
    world.fault("delay", path="*/labs", seconds=3600)
    answer = await post(api, "/refresh?wait=0.1")
    assert (answer.status, answer.body["result"]) == (202, "Accepted")
    assert "500" in answer.body["message"], "of the try before: this one has not ended"
    assert answer.headers["Location"] == answer.body["resource"]
    assert (await api.get(answer.body["resource"])).body["metadata"]["name"] == "w1"


@pytest.mark.parametrize("kind", ["html", "truncate"])
async def test_nobody_waits_for_the_next_try_of_a_sync_that_has_failed(
    world: LabsWorld, api: Served, kind: str
) -> None:
    await labs_of(world, "one", "two")
    rule = world.fault(kind, path="*/labs")
    for again in (1, 2):  # the same failure as before is told as one of this order too
        answer = await post(api, "/refresh")
        assert (answer.status, answer.body["result"], rule.hits >= again) == (202, "Waiting", True)
        assert (await world.get_worker()).status.labs_sync_error in answer.body["message"]
        assert answer.headers["Location"] == answer.body["resource"]
    world.simulator.faults.clear()
    assert (await post(api, "/refresh")).status == 200


async def test_a_refresh_of_a_worker_that_does_not_serve_is_not_waited_for(world: LabsWorld, api: Served) -> None:
    await labs_of(world, "one")
    await enter(world, "Stopped")
    answer = await post(api, "/refresh")
    assert (answer.status, answer.body["result"]) == (202, "Waiting")
    assert "Stopped" in answer.body["message"]
    await enter(world, "Starting")
    await world.client.update(await world.get_worker(), lambda w: w.metadata.annotations.update({PAUSE_ANNOTATION: ""}))
    answer = await post(api, "/refresh")
    assert (answer.status, answer.body["result"]) == (202, "Waiting")
    assert "paused" in answer.body["message"]


async def test_two_refreshes_at_once_both_end(world: LabsWorld, api: Served) -> None:
    await labs_of(world, "one")
    answers = await asyncio.gather(*(post(api, "/refresh") for _ in range(4)))
    assert [a.status for a in answers] == [200] * 4


async def test_all_workers_are_refreshed_at_once_with_a_result_for_each(world: LabsWorld, api: Served) -> None:
    for name in ("w1", "w2", "w3"):
        await world.worker(name)
        await world.sync(name)
        world.machine(name).add_lab(f"new on {name}")
    await world.change_worker(lambda w: w.status.enter("Stopped", "Test", world.clock.now()), "w3")
    answer = await api.call("POST", "/api/v1/workers/labs/refresh")
    assert (answer.status, answer.body["action"]) == (202, "refresh")
    told = {r["worker"]: (r["namespace"], r["result"]) for r in answer.body["results"]}
    assert told == {"w1": ("default", "Accepted"), "w2": ("default", "Accepted"), "w3": ("default", "Waiting")}
    assert "Stopped" in answer.body["results"][2]["message"]

    async def mirrored() -> bool:
        return [len(await world.records(name)) for name in ("w1", "w2", "w3")] == [1, 1, 0]

    await until(mirrored, "the labs of those that serve, within no interval")
    await world.settled()
    await world.storage.set(world.registry.key_of(await world.get_worker("w2")), b'{"spec": 7}')
    async with world.counting() as writes:
        answer = await api.call("POST", "/api/v1/workers/region/us-east-1/labs/refresh")
        told = {r["worker"]: (r["result"], "decode" in r["message"]) for r in answer.body["results"]}
        assert (answer.status, told["w2"], told["w1"]) == (207, ("Failed", True), ("Accepted", False))
        await world.settled()
    assert writes["labworkers MODIFIED"] == 2, "an order, and what came of it; nothing for one that is off"


async def test_who_refreshes_all_workers_refreshes_those_that_are_theirs(world: LabsWorld, tmp_path: Path) -> None:
    made = await world.worker()
    for name, namespace in (("far", "lab-a"), ("near", "lab-b")):
        spec = made.spec.model_copy(update={"region": "eu-west-1"} if name == "far" else {})
        await world.client.create(LabWorker(metadata=ObjectMeta(name=name, namespace=namespace), spec=spec))
    tokens = [
        {"name": who, "sha256": hashlib.sha256(who.encode()).hexdigest(), "role": role, "namespaces": namespaces}
        for who, role, namespaces in (
            ("all", "manager", None),
            ("some", "manager", ["lab-a", "lab-b"]),
            ("reader", "viewer", None),
        )
    ]
    here, everywhere = "/api/v1/workers/region/eu-west-1/labs/refresh", "/api/v1/workers/labs/refresh"
    async with labs_api(world, tokens_file=tokens_file(tmp_path, *tokens)) as api:
        for who, path, expected in (
            ("all", everywhere, ["w1", "far", "near"]),
            ("all", here, ["far"]),
            ("all", "/api/v1/workers/region/mars/labs/refresh", []),
            ("some", everywhere, ["far", "near"]),
            ("some", f"{everywhere}?namespace=lab-b", ["near"]),
            ("some", f"{everywhere}?namespace=default", 403),
            ("some", f"{everywhere}?namespace=No_Label", 400),
            ("all", f"{everywhere}?dryRun=All", 400),
            ("all", f"{everywhere}?wait=0", 400),
            ("reader", everywhere, 403),
        ):
            answer = await api.call("POST", path, headers={"Authorization": f"Bearer {who}"})
            found = [r["worker"] for r in answer.body["results"]] if answer.status == 202 else answer.status
            assert found == expected, (who, path)
            assert bool(answer.warnings) is (found == [])


# One lab


async def test_a_lab_is_started_stopped_wiped_and_deleted(world: LabsWorld, api: Served) -> None:
    lab, other = await labs_of(world, "one", "other")
    for action, state in (("start", "STARTED"), ("start", "STARTED"), ("stop", "STOPPED"), ("wipe", "DEFINED_ON_CORE")):
        answer = await post(api, f"/{lab.id}/{action}")
        assert (answer.status, answer.body["lab_id"], answer.body["result"]) == (200, lab.id, "Succeeded"), answer.raw
        assert (lab.state, answer.body["message"]) == (state, f"the lab is {state}")
    again = await post(api, f"/{lab.id}/stop")
    assert (again.status, again.body["message"]) == (200, "the lab is DEFINED_ON_CORE"), "not brought to STOPPED"
    gone = await api.call("DELETE", labs_path(f"/{lab.id}"))
    assert gone.status == 200
    assert (gone.body["lab_id"], gone.body["message"]) == (lab.id, "Lab deleted successfully")
    assert set(await listed(api)) == {other.id} == set(world.machine().labs)
    with capture_logs() as logs:
        for method, rest in (("DELETE", f"/{lab.id}"), ("POST", f"/{lab.id}/start"), ("POST", f"/{NO_LAB}/stop")):
            assert (await api.call(method, labs_path(rest))).status == 404
    not_found = [(line["worker"], line["lab"]) for line in logs if line["event"] == "labs.record_not_found"]
    assert not_found == [("w1", lab.id), ("w1", lab.id), ("w1", NO_LAB)]
    assert (await post(api, "/no-lab/start")).status == 404
    assert (await post(api, f"/{other.id}/explode")).status == 404


async def test_the_same_order_several_times_at_once_is_one(world: LabsWorld, api: Served) -> None:
    lab, _ = await labs_of(world, "one", "other")
    world.fault("delay", method="PUT", path=f"/labs/{lab.id}/start", seconds=0.3)
    answers = await asyncio.gather(*(post(api, f"/{lab.id}/start") for _ in range(3)))
    assert [(a.status, a.body["result"]) for a in answers] == [(200, "Succeeded")] * 3
    assert world.machine().counts["PUT /labs/{lab_id}/start"] == 1
    order = {"action": "stop", "labs": "all"}
    both = await asyncio.gather(*(post(api, "/bulk", order) for _ in range(2)))
    assert [a.status for a in both] == [200, 200], [a.raw for a in both]


async def test_an_order_that_goes_on_after_a_failure_is_waited_for_again_until_another_takes_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with labs_world(monkeypatch, options=replace(FAST, node_stop=3600)) as world, labs_api(world) as api:
        (lab,) = await labs_of(world, "one", running=True)
        assert (await post(api, f"/{lab.id}/stop?wait=0")).status == 202
        await until(lambda: world.machine().counts["PUT /labs/{lab_id}/stop"] == 1)
        world.fault("status", path=f"/labs/{lab.id}/state", status=500, times=2)
        assert (await post(api, f"/{lab.id}/stop")).body["result"] == "Waiting"

        async def goes_on() -> bool:
            told = (await world.record(lab.id)).status.operation
            return told is not None and told.result == "Running"

        await until(goes_on)
        await world.cache.barrier(30)
        assert (await post(api, f"/{lab.id}/stop?wait=0.1")).body["result"] == "Accepted"
        wiping = asyncio.create_task(post(api, f"/{lab.id}/wipe"))

        async def ordered() -> bool:
            operation = (await world.record(lab.id)).spec.operation
            return operation is not None and operation.verb == "Wipe"

        await until(ordered)
        assert (await post(api, f"/{lab.id}/start?wait=0")).status == 202
        replaced = await wiping
        assert (replaced.status, replaced.body["message"]) == (409, "another took its place")


async def test_cmls_no_is_told_as_a_conflict(world: LabsWorld, api: Served) -> None:
    (lab,) = await labs_of(world, "one")
    world.fault("status", method="PUT", path=f"/labs/{lab.id}/start", status=400, description="no licence left")
    answer = await post(api, f"/{lab.id}/start")
    assert (answer.status, answer.body["reason"]) == (409, "Conflict")
    assert "no licence left" in answer.body["message"]


async def test_a_deletion_that_cml_keeps_failing_says_so_in_its_answer_and_in_one_event(
    world: LabsWorld, api: Served
) -> None:
    (lab,) = await labs_of(world, "one")
    record = await world.record(lab.id)
    world.fault("status", path=f"/labs/{lab.id}/state", status=500, description="out of disk")

    async def tried_twice() -> bool:
        return sum(entry["path"] == f"/labs/{lab.id}/state" for entry in world.machine().log) >= 2

    first = await api.call("DELETE", labs_path(f"/{lab.id}?wait=0"))
    assert (first.status, first.body["result"]) == (202, "Accepted")
    await until(tried_twice, "the deletion to be tried again")
    await world.settled()
    answer = await api.call("DELETE", labs_path(f"/{lab.id}"))
    assert (answer.status, answer.body["result"]) == (202, "Waiting")
    assert "500" in answer.body["message"]
    assert "out of disk" in answer.body["message"]
    failed = [told for told in await world.told(record.name) if told[1] == "DeleteFailed"]
    assert len(failed) == 1
    assert failed[0][0] == "Warning"
    assert "out of disk" in failed[0][2]
    world.simulator.faults.clear()
    await world.gone(record)


async def test_what_has_to_wait_for_the_worker_is_taken_at_once_and_done_later(world: LabsWorld, api: Served) -> None:
    lab, doomed = await labs_of(world, "one", "doomed")
    await enter(world, "Stopped")
    for method, rest in (("POST", f"/{lab.id}/start"), ("DELETE", f"/{doomed.id}")):
        answer = await api.call(method, labs_path(rest))
        assert (answer.status, answer.body["result"]) == (202, "Waiting"), answer.raw
        assert "Stopped" in answer.body["message"]
        assert (await api.get(answer.headers["Location"])).status == 200
    for phase in ("Starting", "ReadyUnlicensed"):
        await enter(world, phase)
    await until(lambda: lab.state == "STARTED" and doomed.id not in world.machine().labs)


@pytest.mark.parametrize(("kind", "open_circuit"), [("html", False), ("drop", True)])
async def test_nobody_waits_for_the_next_try_of_an_order_of_which_one_has_failed(
    world: LabsWorld, api: Served, kind: str, open_circuit: bool
) -> None:
    lab, doomed = await labs_of(world, "one", "doomed")
    world.fault(kind, path="*")
    if open_circuit:
        await until(lambda: circuit_is_open(world, lab))
    orders = (("POST", f"/{lab.id}/start", None), ("DELETE", f"/{doomed.id}", None), ("POST", "/import", TOPOLOGY))
    answers = [await api.call(method, labs_path(rest), body) for method, rest, body in orders]
    assert [(a.status, a.body["result"]) for a in answers] == [(202, "Waiting")] * 3, [a.raw for a in answers]
    for answer in answers:
        assert (answer.body["message"] != "", (await api.get(answer.headers["Location"])).status) == (True, 200)
    assert (answers[0].body["message"] == f"{CmlCircuitOpen.why}; it is asked again in a while") is open_circuit
    world.simulator.faults.clear()

    def done() -> bool:
        return lab.state == "STARTED" and {m.title for m in world.machine().labs.values()} == {"one", "inside"}

    if not open_circuit:  # that would take the circuit's time
        await until(done, "all of them, though nobody waits")


async def test_an_order_is_carried_out_though_nobody_waits_for_it(world: LabsWorld, api: Served) -> None:
    lab, other = await labs_of(world, "one", "other")
    asked = asyncio.create_task(post(api, f"/{lab.id}/start"))

    async def ordered() -> bool:
        return (await world.record(lab.id)).spec.operation is not None

    await until(ordered)
    asked.cancel()
    answer = await post(api, f"/{other.id}/start?wait=0")
    assert answer.status == 202
    await until(lambda: lab.state == other.state == "STARTED")
    for query in ("wait=21", "wait=x", "wait=-1", "nonsense=1", "title=of-imports"):
        assert (await post(api, f"/{lab.id}/stop?{query}")).status == 400
    assert lab.state == "STARTED"


async def test_a_protected_record_and_one_on_its_way_are_refused(world: LabsWorld, api: Served) -> None:
    lab, leaving = await labs_of(world, "one", "leaving")
    await world.client.update(
        await world.record(lab.id), lambda r: r.metadata.annotations.update({PROTECT_ANNOTATION: "true"})
    )
    assert (await api.call("DELETE", labs_path(f"/{lab.id}"))).status == 403
    await enter(world, "Stopped")
    assert (await api.call("DELETE", labs_path(f"/{leaving.id}"))).status == 202
    assert (await post(api, f"/{leaving.id}/start")).status == 403
    assert set(world.machine().labs) == {lab.id, leaving.id}


async def test_what_cannot_be_decoded_is_told_and_not_taken_for_absent(world: LabsWorld, api: Served) -> None:
    lab, other = await labs_of(world, "one", "other")
    await world.storage.set(world.registry.key_of(await world.record(lab.id)), b'{"spec": 7}')
    answer = await api.get(labs_path())
    assert ([shown["id"] for shown in answer.body], "cannot decode" in answer.warnings[0]) == ([other.id], True)
    await world.storage.set(world.registry.key_of(await world.get_worker()), b'{"spec": 7}')
    assert (await api.get(labs_path())).status == 500


async def test_a_daemon_that_stops_keeps_nobody_waiting(world: LabsWorld, api: Served) -> None:
    (lab,) = await labs_of(world, "one")
    world.fault("delay", path=f"/labs/{lab.id}/state", seconds=3600)
    asked = asyncio.create_task(post(api, f"/{lab.id}/start"))

    async def ordered() -> bool:
        return (await world.record(lab.id)).spec.operation is not None

    await until(ordered)
    api.fanout.stop()
    assert (await asked).status == 202


# Many labs


async def test_a_bulk_order_has_a_result_for_each(world: LabsWorld, api: Served) -> None:
    labs = await labs_of(world, *(f"Lab {n}" for n in range(6)))
    ids = [lab.id for lab in labs]
    started = await post(api, "/bulk", {"action": "start", "labs": [*ids, ids[0]]})
    assert started.status == 200, started.raw
    assert [(r["lab_id"], r["result"]) for r in started.body["results"]] == [(i, "Succeeded") for i in ids]
    assert {lab.state for lab in labs} == {"STARTED"}
    world.fault("status", method="PUT", path=f"/labs/{ids[0]}/wipe", status=403, description="not this one")
    mixed = await post(api, "/bulk", {"action": "wipe", "labs": [ids[0], NO_LAB, ids[1]]})
    assert mixed.status == 207
    assert [r["result"] for r in mixed.body["results"]] == ["Failed", "Failed", "Succeeded"]
    assert "not this one" in mixed.body["results"][0]["message"]
    gone = await post(api, "/bulk", {"action": "delete", "labs": ids[1:]})
    assert (gone.status, set(world.machine().labs)) == (200, {ids[0]}), gone.raw
    assert set(await listed(api)) == {ids[0]}
    everything = await post(api, "/bulk", {"action": "stop", "labs": "all"})
    assert [r["lab_id"] for r in everything.body["results"]] == [ids[0]]
    await enter(world, "Stopped")
    later = await post(api, "/bulk", {"action": "delete", "labs": ids[:1]})
    assert (later.status, later.body["results"][0]["result"]) == (202, "Waiting")


async def test_all_labs_are_started_however_many_they_are(world: LabsWorld, api: Served) -> None:
    labs = await labs_of(world, *(f"Lab {n}" for n in range(BULK_MOST + 1)), nodes=0)
    started = await post(api, "/bulk?wait=0", {"action": "start", "labs": "all"})
    assert {r["lab_id"] for r in started.body["results"]} == {lab.id for lab in labs}, started.raw
    assert all(record.spec.operation for record in (await world.records()).values())


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"action": "explode", "labs": [NO_LAB]}, "action"),
        ({"action": ["stop"], "labs": [NO_LAB]}, "action"),
        ({"action": "stop", "labs": []}, "labs"),
        ({"action": "delete", "labs": "all"}, "labs"),
        ({"action": "wipe", "labs": "all"}, "labs"),
        ({"action": "stop", "labs": [NO_LAB, 7]}, "labs"),
        ({"action": "stop", "labs": [str(n) for n in range(501)]}, "labs"),
        ({"action": "stop", "labs": [NO_LAB], "force": True}, "force"),
    ],
)
async def test_a_bulk_order_that_makes_no_sense_is_refused(
    world: LabsWorld, api: Served, body: dict[str, Any], field: str
) -> None:
    await world.worker()
    answer = await post(api, "/bulk", body)
    assert (answer.status, set(answer.causes)) == (422, {field})


# Import and download


async def test_a_topology_is_imported_and_comes_back_by_download(world: LabsWorld, api: Served) -> None:
    (lab,) = await labs_of(world, "BGP")
    sent = await api.get(labs_path(f"/{lab.id}/download"))
    assert (sent.status, sent.headers["Content-Type"]) == (200, "application/yaml; charset=utf-8")
    made = await post(api, "/import", sent.raw, headers=YAML)
    assert made.status == 201, made.raw
    again = world.machine().labs[made.body["lab_id"]]
    assert (again.title, len(again.nodes), made.body["title"]) == ("BGP", 2, "BGP")
    named = await post(api, "/import?title=Mine", TOPOLOGY, headers=YAML)
    assert world.machine().labs[named.body["lab_id"]].title == "Mine"
    await until(lambda: len(world.known()) == 3, "the records, without a refresh")


async def test_an_import_whose_answer_is_lost_makes_one_lab(world: LabsWorld, api: Served) -> None:
    await world.worker()
    world.fault("drop-answer", method="POST", path="/import", times=1)
    made = await post(api, "/import", TOPOLOGY)
    assert (made.status, list(world.machine().labs)) == (201, [made.body["lab_id"]])


async def test_an_import_with_a_name_is_taken_once(world: LabsWorld, api: Served) -> None:
    await world.worker()
    made, again = [await post(api, "/import?name=mine", TOPOLOGY) for _ in range(2)]
    assert (made.status, made.body["import"]) == (201, "mine")
    assert (again.status, again.body["reason"]) == (409, "AlreadyExists")
    assert (await post(api, "/import?name=No%20Name", TOPOLOGY)).status == 422
    assert len(world.machine().labs) == 1


async def test_what_is_no_topology_or_too_large_is_refused_and_not_kept(world: LabsWorld, api: Served) -> None:
    await world.worker()
    for body, status in (
        ("not: [yaml", 422),
        ("just text", 422),
        (b"\xff\xfe", 422),
        (TOPOLOGY + "#" * 512 * 1024, 413),
        (TOPOLOGY.replace("inside", "x" * 65), 422),
        (TOPOLOGY.replace("title: inside, ", ""), 422),
    ):
        answer = await post(api, "/import", body, headers=YAML)
        assert (answer.status, body[:20]) == (status, body[:20])
    for text, field in (
        (r'lab: {title: "a\u0007", version: 0.2.0}', "title"),
        (r'lab: {title: a, description: "\e[2J", version: 0.2.0}', "topology.lab.description"),
        (r'lab: {title: a, notes: "one\n\ttwo \x9b", version: 0.2.0}', "topology.lab.notes"),
        (r"lab: {title: a, notes: [1], version: 0.2.0}", "topology"),
    ):
        answer = await post(api, "/import", f"{text}\nnodes: []\nlinks: []\n", headers=YAML)
        assert (answer.status, answer.body["details"]["causes"][0]["field"]) == (422, field), answer.raw
    assert (await post(api, "/import?title=%07", TOPOLOGY, headers=YAML)).status == 422
    assert not await world.client.list(LabImport)
    refused = await post(api, "/import", "lab: {title: x, version: '9'}\nnodes: []\nlinks: []", headers=YAML)
    assert (refused.status, refused.body["reason"]) == (409, "Conflict")
    assert not world.machine().labs


@pytest.mark.parametrize(
    ("kind", "how", "status"),
    [
        ("drop", {}, 503),
        ("html", {"status": 502}, 503),
        ("status", {"status": 404, "description": "Lab not found"}, 404),
        ("status", {"status": 403}, 403),
        ("status", {"status": 500}, 502),
        ("html", {"status": 200}, 502),
    ],
    ids=["away", "booting", "gone", "forbidden", "stumbles", "a page"],
)
async def test_a_download_tells_what_cml_did_not_give(
    world: LabsWorld, api: Served, kind: str, how: dict[str, Any], status: int
) -> None:
    (lab,) = await labs_of(world, "one")
    world.fault(kind, path="*/download", **how)
    answer = await api.get(labs_path(f"/{lab.id}/download"))
    assert (answer.status, answer.body["kind"]) == (status, "Status")


async def test_a_download_from_a_worker_that_does_not_serve_is_not_tried(world: LabsWorld, api: Served) -> None:
    (lab,) = await labs_of(world, "one")
    await enter(world, "Stopped")
    world.machine().log.clear()
    answer = await api.get(labs_path(f"/{lab.id}/download"))
    assert (answer.status, "Stopped" in answer.body["message"]) == (503, True)
    assert not world.machine().log
