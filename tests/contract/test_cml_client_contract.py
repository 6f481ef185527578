"""The CML client keeps CML's own API document, and gets along with the simulator from login to deletion."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
import pytest
from aiohttp import web

from controllers.cml.client import CmlClient, Credentials, Deregistration, Timeouts
from controllers.cml.errors import (
    CmlAuthError,
    CmlBadAnswer,
    CmlForbidden,
    CmlIdentityMismatch,
    CmlNotFound,
    CmlNotReady,
    CmlOutcomeUnknown,
    CmlRefused,
    CmlUnreachable,
)
from controllers.cml.inventory import read_inventory
from controllers.cml.simulator import Account, Options, Simulator
from equipment.cml_openapi import CmlDocument
from equipment.scripted_cml import PASSWORD, USERNAME, ScriptedCml, page
from equipment.waiting import until
from lrm.testing import VirtualClock

DOCUMENT = CmlDocument.load_or_skip()
LAB = "90f84e38-a71c-4d57-8d90-00fa8a197385"
YAML = """
lab: {version: 0.3.0, title: from the file, description: d, notes: n}
nodes:
  - {id: n0, label: r0, x: 0, y: 0, node_definition: iosv, interfaces: [{id: i0, type: physical, slot: 0}]}
  - {id: n1, label: r1, x: 9, y: 0, node_definition: iosv, interfaces: [{id: i0, type: physical, slot: 0}]}
links:
  - {id: l0, n1: n0, i1: i0, n2: n1, i2: i0}
"""
JSON = '{"lab": {"version": "0.3.0", "title": "j"}, "nodes": [], "links": []}'

Call = Callable[[CmlClient], Awaitable[Any]]
Script = tuple[str, str, Any] | None
"""Method, path and JSON answer (None: 204 without a body); no script where the server's own answers will do."""
IMPORTED = {"id": LAB, "warnings": None}
STOPPED = {"state": "STOPPED", "lab_title": "x"}
CALLS: dict[str, tuple[Call, Script]] = {
    "system_information": (lambda c: c.system_information(), None),
    "system_stats": (lambda c: c.system_stats(), ("GET", "/system_stats", {})),
    "system_health": (lambda c: c.system_health(), ("GET", "/system_health", {})),
    "telemetry_events": (lambda c: c.telemetry_events(), ("GET", "/telemetry/events", [])),
    "licensing": (lambda c: c.licensing(), None),
    "set_product_license": (lambda c: c.set_product_license("CML_Enterprise"), None),
    "register again": (
        lambda c: c.register("aB3+/%=-", reregister=True, timeout=5),
        ("POST", "/licensing/registration", None),
    ),
    "register": (lambda c: c.register("token", timeout=5), ("POST", "/licensing/registration", None)),
    "deregister": (lambda c: c.deregister(), None),
    "lab_ids": (lambda c: c.lab_ids(), None),
    "lab_ids of mine": (lambda c: c.lab_ids(show_all=False), None),
    "lab_ids_answer": (lambda c: c.lab_ids_answer(), None),
    "tiles": (lambda c: c.tiles(), None),
    "lab": (lambda c: c.lab(LAB), ("GET", f"/labs/{LAB}", STOPPED)),
    "lab_state": (lambda c: c.lab_state(LAB), ("GET", f"/labs/{LAB}/state", "STOPPED")),
    "converged": (lambda c: c.converged(LAB), ("GET", f"/labs/{LAB}/check_if_converged", True)),
    "node_states": (
        lambda c: c.node_states(LAB),
        ("GET", f"/labs/{LAB}/lab_element_state", {"nodes": {LAB: "BOOTED"}}),
    ),
    "download": (lambda c: c.download(LAB), ("GET", f"/labs/{LAB}/download", "lab: {}")),
    "nodes": (lambda c: c.nodes(), ("GET", "/nodes", [])),
    "list_labs": (lambda c: c.list_labs(), None),
    "find_labs_by_title": (lambda c: c.find_labs_by_title("x"), None),
    "start_lab": (lambda c: c.start_lab(LAB), None),
    "stop_lab": (lambda c: c.stop_lab(LAB), None),
    "wipe_lab": (lambda c: c.wipe_lab(LAB), None),
    "rename_lab": (lambda c: c.rename_lab(LAB, "ä&?/ x"), ("PATCH", f"/labs/{LAB}", STOPPED)),
    "delete_lab": (lambda c: c.delete_lab(LAB), None),
    "import_lab": (lambda c: c.import_lab("lrm-ä&?/ x", YAML, timeout=5), ("POST", "/import", IMPORTED)),
    "import_lab of JSON": (lambda c: c.import_lab("lrm-1", JSON, timeout=5), ("POST", "/import", IMPORTED)),
    "identity": (lambda c: c.identity(), None),
    "proven_session": (lambda c: c.proven_session(again=True), None),
}


def test_every_call_of_the_client_is_in_the_table() -> None:
    methods = {
        name
        for name, member in inspect.getmembers(CmlClient, inspect.iscoroutinefunction)
        if not name.startswith("_") and name not in {"aclose", "listen"}  # pushes are not in the document
    }
    assert methods == {name.partition(" ")[0] for name in CALLS}


def validate(cml: ScriptedCml) -> None:
    """Hold everything that was sent against the document."""
    for seen in cml.seen:
        body: Any = None
        if seen.body:
            json = seen.headers.get("Content-Type") == "application/json"
            body = orjson.loads(seen.body) if json else seen.body.decode()
        DOCUMENT.validate_request(seen.method, seen.path, seen.query, body)


@pytest.mark.parametrize("name", CALLS)
async def test_a_request_is_one_that_the_document_allows(name: str) -> None:
    call, script = CALLS[name]
    async with ScriptedCml.run() as cml, CmlClient(cml.url, Credentials(USERNAME, PASSWORD)) as client:
        if script is not None:
            method, path, told = script
            cml.on(method, path, web.Response(status=204) if told is None else web.json_response(told))
        await call(client)
        assert [p for p in cml.paths() if p != "POST /auth_extended"]
        validate(cml)


async def test_the_logins_of_every_version_are_ones_that_the_document_allows() -> None:
    async with ScriptedCml.run() as cml:
        cml.valid_tokens.add("old")
        cml.on("POST", "/auth_extended", page(404))
        cml.on("POST", "/authenticate", web.json_response("old"))
        async with CmlClient(cml.url, Credentials(USERNAME, PASSWORD)) as client:
            await client.lab_ids()
        assert [s.path for s in cml.seen] == ["/auth_extended", "/authenticate", "/authentication", "/authok", "/labs"]
        validate(cml)


@pytest.fixture(params=["2.9.1+build.7", "2.10.0+build.1"])
async def simulator(request: pytest.FixtureRequest) -> AsyncIterator[Simulator]:
    options = Options(
        version=request.param, boot_bad_gateway=0, boot_not_ready=0, registration=0.05, node_queued=0.01,
        node_boot=0.05, node_stop=0.02, node_wipe=0.02, accounts=(Account("student", "student-secret"),),
    )  # fmt: skip
    async with Simulator.run(options) as made:
        yield made


@pytest.fixture
async def client(simulator: Simulator) -> AsyncIterator[CmlClient]:
    async with CmlClient(simulator.url, Credentials("admin", "admin-secret"), jitter=lambda: 0.0) as made:
        yield made


async def test_a_lab_is_imported_started_converged_stopped_wiped_and_deleted(client: CmlClient) -> None:
    result = await client.import_lab("lrm-1", YAML, timeout=5)
    (lab,) = await client.find_labs_by_title("lrm-1")
    assert (lab.id, lab.state, lab.node_count, lab.link_count) == (result.id, "DEFINED_ON_CORE", 2, 1)
    assert (await client.lab(lab.id)).description == "d"
    assert "r0" in await client.download(lab.id)
    await client.rename_lab(lab.id, "renamed")
    assert [found.id for found in await client.find_labs_by_title("renamed")] == [lab.id]
    await client.start_lab(lab.id)
    await until(lambda: client.converged(lab.id), "the lab has started")
    assert set((await client.node_states(lab.id)).values()) == {"BOOTED"}
    assert await client.lab_state(lab.id) == "STARTED"
    assert all(n.is_booted for n in await client.nodes() if n.lab_id == lab.id)
    with pytest.raises(CmlRefused):
        await client.delete_lab(lab.id)
    await client.stop_lab(lab.id)
    await until(lambda: client.converged(lab.id), "the lab has stopped")
    await client.wipe_lab(lab.id)
    await until(lambda: client.converged(lab.id), "the lab is wiped")
    await client.delete_lab(lab.id)
    for gone in (client.delete_lab, client.lab, client.lab_state):
        with pytest.raises(CmlNotFound):
            await gone(lab.id)
    assert lab.id not in await client.lab_ids()


async def test_a_topology_in_json_is_imported_too_and_a_wrong_one_is_refused_with_its_reason(client: CmlClient) -> None:
    assert (await client.import_lab("lrm-2", JSON, timeout=5)).id in await client.lab_ids()
    before = await client.lab_ids()
    with pytest.raises(CmlRefused) as caught:
        await client.import_lab("lrm-3", "lab: {version: 0.3.0}\nnodes: []\nlinks: []\nsurprise: 1\n", timeout=5)
    assert caught.value.status == 400
    assert caught.value.description
    assert await client.lab_ids() == before


async def test_a_licence_is_registered_seen_and_given_back(client: CmlClient) -> None:
    assert await client.deregister() is Deregistration.ALREADY
    await client.set_product_license("CML_Enterprise")
    await client.register("licence-token", timeout=5)

    async def licensed() -> bool:
        return (await client.licensing()).is_licensed

    await until(licensed, "the licence is in compliance")
    assert (await client.system_health()).is_licensed
    assert await client.deregister() is Deregistration.DONE
    assert not (await client.licensing()).is_registered


async def test_a_leaked_seat_is_told(simulator: Simulator, client: CmlClient) -> None:
    await client.register("licence-token", timeout=5)

    async def registered() -> bool:
        return (await client.licensing()).is_registered

    await until(registered)
    simulator.faults.add("ssms-unreachable")
    assert await client.deregister() is Deregistration.SEAT_LEAKED


async def test_what_the_machine_reports_is_read(simulator: Simulator, client: CmlClient) -> None:
    simulator.machine().add_lab("busy", nodes=2, running=True)
    information = await client.system_information()
    assert information.ready
    assert information.version == simulator.options.version
    stats = await client.system_stats()
    assert stats.totals.cpu.count == simulator.options.cpus
    assert stats.totals.memory.total == simulator.options.memory_bytes
    assert (await client.system_health()).controller.valid is True
    events = await client.telemetry_events()
    assert events
    assert all(e.timestamp is not None and e.category for e in events)


async def test_a_steady_inventory_of_the_simulator_is_two_requests(simulator: Simulator, client: CmlClient) -> None:
    machine = simulator.machine()
    labs = {machine.add_lab(f"lab {n}").id for n in range(5)}
    identity = await client.identity()
    assert (await read_inventory(client, identity)).complete
    machine.log.clear()
    inventory = await read_inventory(client, identity, labs)
    assert inventory.complete, inventory.why_incomplete
    assert inventory.ids == labs
    assert [entry["path"] for entry in machine.log] == ["/populate_lab_tiles", "/labs"]


async def test_a_lab_removed_behind_our_back_is_proven_absent(simulator: Simulator, client: CmlClient) -> None:
    machine = simulator.machine()
    kept, removed = machine.add_lab("kept"), machine.add_lab("removed")
    identity = await client.identity()
    await read_inventory(client, identity)
    machine.remove(removed)
    inventory = await read_inventory(client, identity, {kept.id, removed.id})
    assert (inventory.complete, inventory.ids, inventory.absent) == (True, {kept.id}, {removed.id})


@pytest.mark.parametrize("fault", ["empty", "half"])
async def test_a_list_that_lacks_labs_which_are_there_removes_nothing(
    simulator: Simulator, client: CmlClient, fault: Any
) -> None:
    labs = {simulator.machine().add_lab(f"lab {n}").id for n in range(6)}
    identity = await client.identity()
    simulator.faults.add(fault, path="/labs")
    inventory = await read_inventory(client, identity, labs)
    assert not inventory.complete
    assert inventory.absent == frozenset()


async def test_the_list_of_a_user_who_is_no_admin_is_not_complete(simulator: Simulator) -> None:
    simulator.machine().add_lab("of the admin")
    async with CmlClient(simulator.url, Credentials("student", "student-secret")) as client:
        assert await client.lab_ids() == ()
        assert client.session is not None
        assert client.session.admin is False
        with pytest.raises(CmlForbidden):
            await client.licensing()
        # Without the right to read the licence there is no identity, and without identity no inventory.
        with pytest.raises(CmlForbidden):
            await read_inventory(client, simulator.machine().product_uuid)


async def test_an_admin_demoted_in_the_middle_and_another_cml_at_the_address_are_noticed(
    simulator: Simulator, client: CmlClient
) -> None:
    labs = {simulator.machine().add_lab(f"lab {n}").id for n in range(3)}
    identity = await client.identity()
    await read_inventory(client, identity)
    for kind, error in (("not-admin", CmlForbidden), ("identity", CmlIdentityMismatch)):
        faults = [
            simulator.faults.add(kind, product_uuid="564d4a4c-0000-4000-8000-00000000000b"),  # type: ignore[arg-type]
            simulator.faults.add("empty", path="/labs"),
            simulator.faults.add("status", path="/labs/*", status=404, description="Lab not found"),
        ]
        with pytest.raises(error):
            await read_inventory(client, identity, labs)
        for fault in faults:
            simulator.faults.clear(fault)


async def test_an_expired_token_and_a_restart_are_survived(simulator: Simulator, client: CmlClient) -> None:
    await client.identity()
    simulator.machine().directory.close_sessions()
    await client.lab_ids()
    simulator.machine().power_off()
    with pytest.raises(CmlUnreachable):
        await client.lab_ids()
    simulator.machine().power_on()
    await client.lab_ids()
    assert client.session is not None
    assert client.session.serial == 3


async def test_a_boot_is_seen_as_unreachable_then_not_ready_then_ready() -> None:
    clock = VirtualClock()
    options = Options(boot_refused=2, boot_bad_gateway=2, boot_not_ready=2)
    async with Simulator.run(options, clock=clock) as simulator:
        one = Timeouts(attempt=5)
        async with CmlClient(simulator.url_of("i-1"), Credentials("admin", "admin-secret"), timeouts=one) as client:
            with pytest.raises(CmlUnreachable):
                await client.system_information()
            await clock.advance(2)
            with pytest.raises(CmlNotReady):
                await client.system_information()
            await clock.advance(2)
            assert not (await client.system_information()).ready
            await clock.advance(2)
            assert (await client.system_information()).ready


@pytest.mark.parametrize(
    ("kind", "how", "error"),
    [
        ("status", {"status": 500}, CmlBadAnswer),
        ("html", {}, CmlNotReady),
        ("truncate", {}, CmlBadAnswer),
        ("cut", {}, CmlBadAnswer),
        ("drop", {}, CmlUnreachable),
        ("drop-answer", {}, CmlUnreachable),
        ("status", {"status": 403}, CmlForbidden),
        ("status", {"status": 401}, CmlAuthError),
    ],
)
async def test_a_fault_in_a_read_has_its_own_error(
    simulator: Simulator, client: CmlClient, kind: Any, how: dict[str, Any], error: type[Exception]
) -> None:
    simulator.machine().add_lab("x")
    simulator.faults.add(kind, method="GET", path="/labs", **how)
    with pytest.raises(error):
        await client.lab_ids()


async def test_an_import_whose_answer_is_lost_is_unknown_and_the_lab_is_found_by_looking(
    simulator: Simulator, client: CmlClient
) -> None:
    simulator.faults.add("drop-answer", method="POST", path="/import", times=1)
    with pytest.raises(CmlOutcomeUnknown):
        await client.import_lab("lrm-9", YAML, timeout=5)
    assert len(await client.find_labs_by_title("lrm-9")) == 1
