"""Every operation of the simulator, walked once per version and held against CML's own API document."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from controllers.cml.simulator import Account, Options, Simulator
from controllers.cml.simulator.server import ROUTES
from controllers.cml.simulator.unsimulated import UNSIMULATED
from equipment.cml_openapi import CmlDocument
from lrm.testing import VirtualClock

DOCUMENT = CmlDocument.load_or_skip()

TOPOLOGY = {
    "lab": {"version": "0.3.0", "title": "walked", "description": "d", "notes": "n"},
    "nodes": [
        {
            "id": "n0",
            "label": "r0",
            "x": 0,
            "y": 0,
            "node_definition": "iosv",
            "ram": 1024,
            "tags": ["core"],
            "configuration": [{"name": "ios_config.txt", "content": "hostname r0"}],
            "interfaces": [
                {"id": "i0", "type": "loopback", "label": "Loopback0"},
                {"id": "i1", "type": "physical", "slot": 0, "mac_address": "52:54:00:00:00:01"},
                {"id": "i2", "type": "physical", "slot": 1},
            ],
        },
        {
            "id": "n1",
            "label": "s0",
            "x": 10,
            "y": -5,
            "node_definition": "unmanaged_switch",
            "interfaces": [{"id": "i0", "type": "physical", "slot": 0}],
        },
        {"id": "n2", "label": "odd", "x": 1, "y": 1, "node_definition": "not-installed", "configuration": "x"},
    ],
    "links": [{"id": "l0", "n1": "n0", "i1": "i1", "n2": "n1", "i2": "i0", "conditioning": {"latency": 10}}],
    "annotations": [{"type": "text", "text_content": "hello"}, {"type": "line", "x1": 1, "y1": 2}],
    "smart_annotations": [{"tag": "core"}],
}


_SINCE_210 = (("GET", "interfaces"), ("DELETE", "layer3_addresses"))


@dataclass
class Walker:
    """A client that believes nothing: each request and each answer is validated."""

    http: httpx.AsyncClient
    version: str
    token: str = ""
    walked: set[tuple[str, str]] = field(default_factory=set)

    async def __call__(self, method: str, path: str, expected: int = 200, body: Any = None, **query: Any) -> Any:
        newer = self.version.startswith("2.10")
        # 2.10 has these and the document of 2.9 does not.
        beyond = newer and path.count("/") == 3 and (method, path.rsplit("/", 1)[-1]) in _SINCE_210
        if not beyond:
            DOCUMENT.validate_request(method, path, query, body)
            self.walked.add((method, DOCUMENT.template_of(method, path)))
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        response = await self.http.request(method, path.lstrip("/"), json=body, params=query, headers=headers)
        assert response.status_code == expected, response.text
        answer: Any = None
        if response.content:
            is_json = response.headers["content-type"] == "application/json"
            answer = response.json() if is_json else response.text
        if not newer or path == "/authentication":
            DOCUMENT.validate_response(method, path, response.status_code, answer)
        return answer


@asynccontextmanager
async def walking(version: str) -> AsyncIterator[tuple[Walker, Simulator, VirtualClock]]:
    clock = VirtualClock()
    options = Options(
        version=version, boot_bad_gateway=0, boot_not_ready=0, accounts=(Account("student", "student-secret"),)
    )
    async with (
        Simulator.run(options, clock=clock) as simulator,
        httpx.AsyncClient(base_url=f"{simulator.url}/api/v0/") as http,
    ):
        yield Walker(http, version), simulator, clock


def test_every_documented_operation_is_simulated_or_refused_by_name() -> None:
    """Nothing of CML's API is forgotten, and nothing is both."""
    simulated = {(r.method, r.template) for r in ROUTES if r.since == (0, 0)}
    assert simulated | set(UNSIMULATED) == DOCUMENT.operations()
    assert not simulated & set(UNSIMULATED)


@pytest.mark.parametrize("version", ["2.9.1+build.7", "2.10.0+build.3"])
async def test_every_answer_of_a_walk_is_as_documented(version: str) -> None:
    """All simulated operations, good and refused; answers of 2.10 are not held against a document of 2.9."""
    async with walking(version) as (walk, _, clock):
        await _walk_in(walk)
        await _walk_system(walk)
        await _walk_licensing(walk, clock)
        await _walk_people(walk)
        await _walk_labs(walk, clock)
        await _walk_elements(walk, clock)
        if version.startswith("2.10"):
            assert (await walk("GET", "/authentication"))["admin"] is True
        assert await walk("DELETE", "/logout") is True
        await walk("GET", "/authok", 401)
        since = (0, 0) if version.startswith("2.9") else (2, 10)
        expected = {(r.method, r.template) for r in ROUTES if r.since <= since} & (
            DOCUMENT.operations() | {("GET", "/authentication")}
        )
        assert walk.walked == expected


async def test_an_unsimulated_operation_is_a_501() -> None:
    async with walking("2.9.1") as (walk, _, _):
        await _walk_in(walk)
        answer = await walk("GET", "/keys/console", 501)
        assert "not simulated" in answer["description"]


async def _walk_in(walk: Walker) -> None:
    await walk("GET", "/authok", 401)
    await walk("POST", "/authenticate", 403, {"username": "admin", "password": "wrong"})
    walk.token = await walk("POST", "/authenticate", body={"username": "admin", "password": "admin-secret"})
    await walk("GET", "/authok")
    walk.token = (await walk("POST", "/auth_extended", body={"username": "admin", "password": "admin-secret"}))["token"]
    await walk("GET", "/web_session_timeout")
    await walk("PATCH", "/web_session_timeout/900")


async def _walk_system(walk: Walker) -> None:
    assert (await walk("GET", "/system_information"))["ready"] is True
    for path in ("/system_stats", "/system_health", "/telemetry", "/telemetry/events", "/system/notices", "/lab_repos"):
        await walk("GET", path)
    await walk("GET", "/resource_pools")
    await walk("GET", "/resource_pool_usage")
    (host,) = await walk("GET", "/system/compute_hosts")
    one = f"/system/compute_hosts/{host['id']}"
    await walk("GET", one)
    await walk("PATCH", one, 409, {"admission_state": "UNREGISTERED"})
    await walk("PATCH", one, 200, {"admission_state": "ONLINE"})
    assert (await walk("GET", "/system_information"))["ready"] is False
    await walk("PATCH", one, 200, {"admission_state": "READY"})
    await walk("DELETE", one, 409)
    await walk("GET", "/system/compute_hosts/90f84e38-a71c-4d57-8d90-00fa8a197385", 404)
    await walk("GET", "/system/compute_hosts/configuration")
    await walk("PATCH", "/system/compute_hosts/configuration", 200, {"admission_state": "READY"})
    await walk("GET", "/system/maintenance_mode")
    assert (await walk("PATCH", "/system/maintenance_mode", 200, {"maintenance_mode": True}))["maintenance_mode"]
    await walk("POST", "/authenticate", 403, {"username": "student", "password": "student-secret"})
    await walk("PATCH", "/system/maintenance_mode", 200, {"maintenance_mode": False})
    await walk("PUT", "/telemetry", 200, {"opt_in": False})


async def _walk_licensing(walk: Walker, clock: VirtualClock) -> None:
    await walk("GET", "/licensing")
    features = await walk("GET", "/licensing/features")
    await walk("DELETE", "/licensing/deregistration", 400)
    await walk("PUT", "/licensing/registration/renew", 400)
    await walk("PUT", "/licensing/product_license", 204, "CML_Enterprise")
    await walk("PUT", "/licensing/product_license", 400, "CML_Unknown")
    await walk("PUT", "/licensing/transport", 204, {"proxy": {"server": None, "port": None}, "ssms": None})
    await walk("POST", "/licensing/registration", 204, {"token": "abc"})
    await walk("POST", "/licensing/registration", 409, {"token": "abc"})
    await walk("PUT", "/licensing/registration/renew", 409)
    await walk("DELETE", "/licensing/deregistration", 409)
    await walk("GET", "/licensing")
    await clock.advance(10)
    status = await walk("GET", "/licensing")
    assert (status["registration"]["status"], status["authorization"]["status"]) == ("COMPLETED", "IN_COMPLIANCE")
    await walk("PUT", "/licensing/registration/renew", 204)
    await walk("PUT", "/licensing/authorization/renew", 204)
    await walk("PATCH", "/licensing/features", 204, [{"id": features[0]["id"], "count": 1}])
    await walk("PATCH", "/licensing/features", 400, [{"id": "other", "count": 1}])
    await walk("DELETE", "/licensing/deregistration", 204)


async def _walk_people(walk: Walker) -> None:
    users = await walk("GET", "/users")
    assert {u["username"] for u in users} == {"admin", "student"}
    made = await walk("POST", "/users", 201, {"username": "eve", "password": "p", "fullname": "Eve"})
    one = f"/users/{made['id']}"
    await walk("GET", one)
    await walk("GET", f"/users/{made['username']}/id")
    change = {"email": "e@x.org", "password": {"old_password": "", "new_password": "q"}}
    assert (await walk("PATCH", one, 200, change))["email"] == "e@x.org"
    group = await walk("POST", "/groups", 201, {"name": "class a", "members": [made["id"]]})
    await walk("POST", "/groups", 400, {"name": "class a"})
    assert await walk("GET", f"{one}/groups") == [group["id"]]
    await walk("GET", "/groups")
    this = f"/groups/{group['id']}"
    await walk("GET", this)
    assert await walk("GET", "/groups/class a/id") == group["id"]
    assert await walk("GET", f"{this}/members") == [made["id"]]
    await walk("GET", f"{this}/labs")
    await walk("PATCH", this, 200, {"description": "changed"})
    await walk("DELETE", this, 204)
    await walk("DELETE", one, 204)
    await walk("GET", one, 404)


async def _walk_labs(walk: Walker, clock: VirtualClock) -> None:
    group = await walk("POST", "/groups", 201, {"name": "class b"})
    made = await walk("POST", "/labs", body={"title": "first", "notes": "n"})
    await walk("POST", "/labs")
    lab = f"/labs/{made['id']}"
    assert len(await walk("GET", "/labs", show_all="true")) == 2
    await walk("GET", lab)
    await walk("GET", "/labs/90f84e38-a71c-4d57-8d90-00fa8a197385", 404)
    assert (await walk("PATCH", lab, 200, {"title": "second"}))["lab_title"] == "second"
    rights = {"groups": [{"id": group["id"], "permissions": ["lab_view"]}], "users": []}
    assert await walk("PATCH", f"{lab}/associations", 200, rights) == rights
    for what in ("associations", "groups", "annotations", "smart_annotations", "connector_mappings", "resource_pools"):
        await walk("GET", f"{lab}/{what}")
    assert await walk("GET", f"/groups/{group['id']}/labs") == [made["id"]]
    await walk("GET", f"/groups/{group['id']}")
    imported = await walk("POST", "/import", body=TOPOLOGY, title="imported")
    assert len(imported["warnings"]) == 1
    lab = f"/labs/{imported['id']}"
    for what in ("tile", "topology", "lab_element_state", "state", "events", "layer3_addresses", "annotations"):
        await walk("GET", f"{lab}/{what}")
    await walk("GET", f"{lab}/topology", exclude_configurations="true")
    await walk("GET", f"{lab}/smart_annotations")
    assert (await walk("GET", f"{lab}/find/node/label/r0")) is not None
    assert (await walk("GET", f"{lab}/find/node/label/none")) is None
    assert len(await walk("GET", f"{lab}/find_all/node/tag/core")) == 1
    await walk("PUT", f"{lab}/start", 204)
    assert await walk("GET", f"{lab}/check_if_converged") is False
    await walk("GET", "/diagnostics/node_launch_queue")
    await clock.advance(10)
    assert await walk("GET", f"{lab}/check_if_converged") is True
    assert await walk("GET", f"{lab}/state") == "STARTED"
    for what in ("simulation_stats", "events", "tile", "lab_element_state"):
        await walk("GET", f"{lab}/{what}")
    await walk("GET", "/populate_lab_tiles")
    await walk("GET", "/system_stats")
    await walk("GET", "/system/compute_hosts")
    await walk("GET", "/users")
    await walk("GET", "/nodes", operational="true", exclude_configurations="true")
    await walk("GET", "/nodes")
    for category in ("computes", "labs", "lab_events", "services", "node_definitions", "user_list", "licensing"):
        await walk("GET", f"/diagnostics/{category}")
    await walk("GET", "/diagnostics/startup_scheduler")
    await walk("GET", "/telemetry/events")
    await walk("DELETE", lab, 400)
    await walk("PUT", f"{lab}/wipe", 400)
    await walk("PUT", f"{lab}/stop", 204)
    await clock.advance(1)
    await walk("DELETE", lab, 400)
    text = await walk("GET", f"{lab}/download")
    assert text.startswith("lab:")
    await walk("PUT", f"{lab}/wipe", 204)
    await clock.advance(1)
    await walk("DELETE", lab, 204)
    await walk("DELETE", lab, 404)
    await walk("DELETE", f"/groups/{group['id']}", 204)


async def _walk_elements(walk: Walker, clock: VirtualClock) -> None:
    lab = f"/labs/{(await walk('POST', '/labs'))['id']}"
    new = {"x": 1, "y": 2, "label": "a", "node_definition": "alpine", "configuration": "one"}
    a = (await walk("POST", f"{lab}/nodes", body=new, populate_interfaces="true"))["id"]
    b = (await walk("POST", f"{lab}/nodes", body={**new, "label": "b"}))["id"]
    one = f"{lab}/nodes/{a}"
    for query in ({}, {"data": "true"}, {"data": "true", "operational": "true", "exclude_configurations": "true"}):
        await walk("GET", f"{lab}/nodes", **query)
    for query in ({}, {"operational": "true"}, {"simplified": "true"}, {"exclude_configurations": "false"}):
        await walk("GET", one, **query)
    await walk("GET", f"{lab}/nodes/90f84e38-a71c-4d57-8d90-00fa8a197385", 400)
    assert await walk("PATCH", one, 200, {"label": "aa", "ram": 512}) == a
    for query in ({}, {"data": "true"}, {"data": "true", "operational": "true"}):
        await walk("GET", f"{one}/interfaces", **query)
    made = await walk("POST", f"{lab}/interfaces", body={"node": b})
    assert made["slot"] == 0
    several = await walk("POST", f"{lab}/interfaces", body={"node": b, "slot": 2})
    assert [i["slot"] for i in several] == [0, 1, 2]
    port = f"{lab}/interfaces/{made['id']}"
    await walk("GET", port)
    await walk("GET", port, operational="true")
    await walk("PATCH", port, 200, {"mac_address": "52:54:00:00:00:02"})
    await walk("GET", f"{port}/state")
    other = (await walk("GET", f"{one}/interfaces"))[0]
    link_id = (await walk("POST", f"{lab}/links", body={"src_int": made["id"], "dst_int": other}))["id"]
    link = f"{lab}/links/{link_id}"
    await walk("GET", f"{lab}/links")
    await walk("GET", f"{lab}/links", data="true")
    await walk("GET", link)
    await walk("GET", f"{link}/condition")
    await walk("PATCH", f"{link}/condition", 200, {"latency": 5})
    await walk("GET", f"{link}/condition")
    await walk("DELETE", f"{link}/condition", 204)
    await walk("PUT", f"{one}/state/start", 204)
    await walk("PUT", f"{lab}/nodes/{b}/state/start", 204)
    assert await walk("GET", f"{one}/check_if_converged") is False
    assert await walk("GET", f"{link}/check_if_converged") is False
    await clock.advance(10)
    assert await walk("GET", f"{one}/state") == {"state": "BOOTED", "progress": "Booted"}
    await walk("PUT", f"{link}/state/stop", 204)
    await walk("PUT", f"{link}/state/start", 204)
    await walk("PUT", f"{port}/state/stop", 204)
    assert (await walk("GET", link))["state"] == "STOPPED"
    await walk("PUT", f"{port}/state/start", 204)
    assert (await walk("GET", link))["state"] == "STARTED"
    await walk("GET", f"{one}/layer3_addresses")
    await walk("DELETE", one, 400)
    await walk("PUT", f"{one}/wipe_disks", 400)
    await walk("PUT", f"{one}/state/stop", 204)
    await walk("PUT", f"{lab}/nodes/{b}/state/stop", 204)
    await clock.advance(1)
    await walk("PUT", f"{one}/wipe_disks", 204)
    await clock.advance(1)
    if walk.version.startswith("2.10"):
        assert len(await walk("GET", f"{lab}/interfaces")) == 7
        await walk("DELETE", f"{lab}/layer3_addresses", 204)
    await walk("GET", f"{lab}/topology", exclude_configurations="false")
    await walk("DELETE", port, 204)
    await walk("GET", link, 404)
    link_id = (await walk("POST", f"{lab}/links", body={"src_int": several[1]["id"], "dst_int": other}))["id"]
    await walk("DELETE", f"{lab}/links/{link_id}", 204)
    await walk("DELETE", one, 204)
    await walk("GET", f"{lab}/events")
