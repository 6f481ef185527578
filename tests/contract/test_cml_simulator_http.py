"""The simulator as an HTTP server: booting, power, faults, input checks, TLS, the control surface, the command."""

from __future__ import annotations

import asyncio
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from aiohttp import web

from controllers.cml.simulator import Account, Options, Simulator
from controllers.cml.simulator.command import parse
from equipment import certificates
from equipment.waiting import until
from lrm.testing import VirtualClock

READY = Options(boot_bad_gateway=0, boot_not_ready=0, accounts=(Account("student", "student-secret"),))
ADMIN = {"username": "admin", "password": "admin-secret"}
STUDENT = {"username": "student", "password": "student-secret"}
NO_LAB = "90f84e38-a71c-4d57-8d90-00fa8a197385"


@asynccontextmanager
async def simulated(options: Options = READY, clock: VirtualClock | None = None) -> AsyncIterator[Simulator]:
    async with Simulator.run(options, clock=clock or VirtualClock()) as simulator:
        yield simulator


@asynccontextmanager
async def session(
    simulator: Simulator, name: str = "root", who: dict[str, str] = ADMIN
) -> AsyncIterator[httpx.AsyncClient]:
    """A client that is logged in, its paths relative to `/api/v0/`."""
    async with httpx.AsyncClient(base_url=f"{simulator.url_of(name)}/api/v0/", timeout=30) as http:
        token = (await http.post("authenticate", json=who)).json()
        http.headers["Authorization"] = f"Bearer {token}"
        yield http


async def test_a_machine_that_boots_refuses_then_shows_the_proxy_then_is_not_ready_then_ready() -> None:
    clock = VirtualClock()
    options = Options(boot_refused=1, boot_bad_gateway=2, boot_not_ready=3)
    async with simulated(options, clock) as simulator, httpx.AsyncClient(base_url=simulator.url) as http:
        with pytest.raises(httpx.TransportError):
            await http.get("/i-1/api/v0/system_information")
        await clock.advance(1)
        page = await http.get("/i-1/api/v0/system_information")
        assert (page.status_code, page.headers["content-type"]) == (502, "text/html; charset=utf-8")
        assert "502 Bad Gateway" in page.text
        assert (await http.post("/i-1/api/v0/authenticate", json=ADMIN)).status_code == 502
        await clock.advance(2)
        assert (await http.get("/i-1/api/v0/system_information")).json()["ready"] is False
        assert (await http.post("/i-1/api/v0/authenticate", json=ADMIN)).status_code == 200
        await clock.advance(3)
        assert (await http.get("/i-1/api/v0/system_information")).json()["ready"] is True
        with pytest.raises(httpx.TransportError):
            await http.get("/i-2/api/v0/system_information")


async def test_instances_share_nothing_and_each_keeps_its_identity() -> None:
    async with simulated() as simulator, session(simulator, "i-1") as one, session(simulator, "i-2") as two:
        made = (await one.post("labs", json={"title": "mine"})).json()
        assert (await two.get(f"labs/{made['id']}")).status_code == 404
        identities = {(await http.get("licensing")).json()["udi"]["product_uuid"] for http in (one, one, two)}
        assert len(identities) == 2
        stranger = await two.get("labs", headers=dict(one.headers))
        assert stranger.status_code == 401, "a token of another instance"


@pytest.mark.parametrize(
    ("method", "path", "body", "named", "why"),
    [
        ("POST", "authenticate", {"username": "a"}, "password", "a missing key"),
        ("POST", "authenticate", {**ADMIN, "otp": 1}, "otp", "an unknown key"),
        ("POST", "authenticate", {"username": 1, "password": "p"}, "username", "a wrong type"),
        ("POST", "authenticate", b"{", "JSON", "no JSON"),
        ("POST", "authenticate", b"", "JSON", "no body"),
        ("POST", "labs", {"title": ""}, "title", "too short"),
        ("POST", "labs", {"lab_title": "t"}, "lab_title", "the name that only reading uses"),
        ("POST", "labs", {"owner": "me"}, "owner", "no UUID"),
        ("POST", "labs", [], "body", "no object"),
        ("POST", "licensing/registration", {"token": "not allowed!"}, "token", "a bad character"),
        ("POST", "licensing/registration", {"token": "t", "reregister": "yes"}, "reregister", "text for a bool"),
        ("PUT", "licensing/product_license", {"product": "x"}, "body", "an object for a string"),
        ("PUT", "licensing/transport", {"ssms": None}, "proxy", "a required part"),
        ("PUT", "licensing/transport", {"proxy": {"server": "h"}}, "port", "both keys are needed"),
        ("GET", "labs/lab-1", None, "lab_id", "an id that cannot be one is not a 404"),
        ("GET", "labs?show_all=perhaps", None, "show_all", "no boolean"),
        ("POST", "import?title=" + "x" * 65, b"", "title", "too long"),
    ],
)
async def test_input_that_is_not_as_documented_is_a_400_that_names_it(
    method: str, path: str, body: Any, named: str, why: str
) -> None:
    async with simulated() as simulator, session(simulator) as http:
        content = body if isinstance(body, bytes) else orjson.dumps(body) if body is not None else None
        answer = await http.request(method, path, content=content)
        assert answer.status_code == 400, why
        problem = answer.json()
        assert problem["code"] == 400
        listed = orjson.loads(problem["description"])["Input validation failed"]
        assert any(named in str(p) for p in listed), why


async def test_what_a_session_may_not_do_is_refused_in_the_documented_way() -> None:
    async with (
        simulated() as simulator,
        session(simulator) as admin,
        session(simulator, who=STUDENT) as student,
        httpx.AsyncClient(base_url=f"{simulator.url}/api/v0/") as nobody,
    ):
        assert (await nobody.get("labs")).status_code == 401
        assert (await nobody.get("labs", headers={"Authorization": "Bearer x.y.z"})).status_code == 401
        assert (await nobody.get("system_information")).status_code == 200
        assert (await nobody.post("authenticate", json={**ADMIN, "password": "no"})).status_code == 403
        assert (await nobody.get("no/such/thing")).status_code == 404
        assert (await nobody.delete("labs")).status_code == 405
        for method, path in (("GET", "licensing"), ("POST", "users"), ("GET", "diagnostics/labs")):
            assert (await student.request(method, path, json={})).status_code == 403
        theirs = (await student.post("labs", json={"title": "theirs"})).json()
        ours = (await admin.post("labs", json={"title": "ours"})).json()
        assert (await student.get("labs", params={"show_all": True})).json() == [theirs["id"]]
        assert list((await student.get("populate_lab_tiles")).json()["lab_tiles"]) == [theirs["id"]]
        assert (await admin.get("labs")).json() == [ours["id"]]
        assert set((await admin.get("labs", params={"show_all": True})).json()) == {theirs["id"], ours["id"]}
        missing = await student.get(f"labs/{ours['id']}")
        assert missing.status_code == 404
        assert missing.json()["description"] == f"Lab not found: {ours['id']}"
        user = (await admin.get("users/student/id")).json()
        view = {"users": [{"id": user, "permissions": ["lab_view"]}], "groups": []}
        assert (await admin.patch(f"labs/{ours['id']}/associations", json=view)).status_code == 200
        assert (await student.get(f"labs/{ours['id']}")).json()["effective_permissions"] == ["lab_view"]
        assert (await student.put(f"labs/{ours['id']}/start")).status_code == 403
        assert (await student.get("labs")).json() == [theirs["id"]], "own labs only without show_all"


async def test_tiles_are_fresh_whatever_changes() -> None:
    """They are remembered between changes; each thing that they show is changed here once, by each way there is."""
    async with simulated() as simulator, session(simulator) as http:
        lab = (await http.post("labs", json={"title": "one"})).json()["id"]
        admin = (await http.get("users/admin/id")).json()

        async def tile() -> dict[str, Any]:
            found: dict[str, Any] = (await http.get("populate_lab_tiles")).json()["lab_tiles"][lab]
            assert found == (await http.get(f"labs/{lab}/tile")).json()
            assert {k: found[k] for k in found if k != "topology"} == (await http.get(f"labs/{lab}")).json()
            return found

        assert (await tile())["lab_title"] == "one"
        await http.patch(f"labs/{lab}", json={"title": "two"})
        assert (await tile())["lab_title"] == "two"
        node = {"label": "a", "x": 0, "y": 0, "node_definition": "alpine"}
        node_id = (await http.post(f"labs/{lab}/nodes", json=node)).json()["id"]
        assert (await tile())["node_count"] == 1
        await http.patch(f"labs/{lab}/nodes/{node_id}", json={"label": "b"})
        assert (await tile())["topology"]["nodes"][0]["label"] == "b"
        await http.put(f"labs/{lab}/start")
        assert (await tile())["topology"]["nodes"][0]["state"] == "QUEUED"
        rights = [{"id": lab, "permissions": ["lab_view"]}]
        group = (await http.post("groups", json={"name": "g", "associations": rights})).json()["id"]
        assert [g["id"] for g in (await tile())["groups"]] == [group]
        await http.delete(f"groups/{group}")
        assert (await tile())["groups"] == []
        await http.patch(f"users/{admin}", json={"fullname": "Somebody Else"})
        assert (await tile())["owner_fullname"] == "Somebody Else"


async def test_the_extended_login_and_the_newer_check_tell_who_one_is() -> None:
    newer = Options(version="2.10.0", boot_bad_gateway=0, boot_not_ready=0)
    async with simulated(newer) as simulator, session(simulator) as http:
        who = (await http.post("auth_extended", json=ADMIN)).json()
        assert (who["username"], who["admin"], who["error"]) == ("admin", True, None)
        header = {"Authorization": f"Bearer {who['token']}"}
        told = (await http.get("authentication", headers=header)).json()
        assert told == {"username": "admin", "id": who["id"], "admin": True}
    async with simulated() as older, session(older) as http:
        assert (await http.get("authentication")).status_code == 404


@pytest.mark.parametrize(
    ("how", "expected", "why"),
    [
        ({"kind": "status", "status": 503}, 503, "any status"),
        ({"kind": "status"}, 500, "the server's own error"),
        ({"kind": "html"}, 502, "the proxy's page"),
        ({"kind": "html", "status": 504}, 504, "another page of the proxy"),
        ({"kind": "status", "status": 429, "method": "POST"}, 200, "of another method"),
        ({"kind": "status", "status": 429, "path": "/labs/*"}, 200, "of another path"),
        ({"kind": "status", "status": 429, "instance": "i-9"}, 200, "of another instance"),
    ],
)
async def test_a_fault_strikes_what_it_names_and_nothing_else(how: dict[str, Any], expected: int, why: str) -> None:
    async with simulated() as simulator, session(simulator) as http:
        fault = simulator.faults.add(**how)
        answer = await http.get("labs")
        assert answer.status_code == expected, why
        if how["kind"] == "html":
            assert answer.headers["content-type"].startswith("text/html")
        simulator.faults.clear(fault)
        assert (await http.get("labs")).status_code == 200


async def test_a_fault_with_a_number_of_times_ends_by_itself() -> None:
    async with simulated() as simulator, session(simulator) as http:
        simulator.faults.add("status", status=503, path="/labs", times=2)
        assert [(await http.get("labs")).status_code for _ in range(4)] == [503, 503, 200, 200]


async def test_a_dropped_request_is_not_done_and_a_dropped_answer_is() -> None:
    async with simulated() as simulator, session(simulator) as http:
        machine = simulator.machine()
        simulator.faults.add("drop", method="POST", path="/labs", times=1)
        with pytest.raises(httpx.TransportError):
            await http.post("labs", json={"title": "lost"})
        assert machine.labs == {}
        simulator.faults.add("drop-answer", method="POST", path="/labs", times=1)
        with pytest.raises(httpx.TransportError):
            await http.post("labs", json={"title": "made"})
        assert [lab.title for lab in machine.labs.values()] == ["made"]
        assert [(e["method"], e["status"]) for e in machine.log if e["path"] == "/labs"] == [("POST", 0), ("POST", 200)]


async def test_half_an_answer_comes_as_half_a_json_or_as_a_broken_connection() -> None:
    async with simulated() as simulator, session(simulator) as http:
        simulator.machine().add_lab("one")
        simulator.faults.add("truncate", path="/labs", times=1)
        answer = await http.get("labs")
        assert answer.status_code == 200
        with pytest.raises(orjson.JSONDecodeError):
            orjson.loads(answer.content)
        simulator.faults.add("cut", path="/labs", times=1)
        with pytest.raises(httpx.RemoteProtocolError):
            await http.get("labs")
        assert len((await http.get("labs")).json()) == 1


async def test_lists_can_lie_by_being_empty_or_half() -> None:
    async with simulated() as simulator, session(simulator) as http:
        for n in range(4):
            simulator.machine().add_lab(str(n))
        empty = simulator.faults.add("empty", path="/labs")
        assert (await http.get("labs")).json() == []
        simulator.faults.clear(empty)
        simulator.faults.add("half")
        assert len((await http.get("labs")).json()) == 2
        assert len((await http.get("populate_lab_tiles")).json()["lab_tiles"]) == 2


async def test_a_delayed_request_is_carried_out_late_even_when_nobody_waits() -> None:
    clock = VirtualClock()
    async with simulated(clock=clock) as simulator, session(simulator) as http:
        fault = simulator.faults.add("delay", seconds=30, path="/labs", method="POST")
        machine = simulator.machine()
        with pytest.raises(httpx.ReadTimeout):
            await http.post("labs", json={"title": "late"}, timeout=0.2)
        assert (fault.hits, machine.labs) == (1, {})
        await clock.advance(30)
        await until(lambda: machine.labs, "the late request is carried out")
        machine.faults.add("delay", seconds=30, path="/authok")
        waiting = asyncio.create_task(http.get("authok"))
        await until(lambda: machine.counts["GET /authok"], "the second request has come")
        machine.power_off()
        await clock.advance(30)
        with pytest.raises(httpx.TransportError):
            await waiting


async def test_another_identity_another_rank_and_ended_sessions_can_be_switched_on() -> None:
    async with simulated() as simulator, session(simulator) as http:
        machine = simulator.machine()
        true = (await http.get("licensing")).json()["udi"]["product_uuid"]
        fault = simulator.faults.add("identity")
        assert (await http.get("licensing")).json()["udi"]["product_uuid"] != true
        simulator.faults.clear(fault)
        assert (await http.get("licensing")).json()["udi"]["product_uuid"] == true
        student = machine.directory.named("student")
        assert student is not None
        machine.add_lab("theirs", owner=student.id)
        fault = simulator.faults.add("not-admin")
        assert (await http.get("labs", params={"show_all": "true"})).json() == []
        assert (await http.get("licensing")).status_code == 403
        assert (await http.post("auth_extended", json=ADMIN)).json()["admin"] is False
        simulator.faults.clear(fault)
        assert len((await http.get("labs", params={"show_all": "true"})).json()) == 1
        async with httpx.AsyncClient(base_url=f"{simulator.url}/_sim/") as control:
            assert (await control.post("instances/root/expire-tokens")).json()["expired"] >= 1
        assert (await http.get("labs")).status_code == 401


async def test_a_registration_can_hang_and_its_service_be_out_of_reach() -> None:
    clock = VirtualClock()
    async with simulated(clock=clock) as simulator, session(simulator) as http:
        stuck = simulator.faults.add("registration-stuck")
        assert (await http.post("licensing/registration", json={"token": "t"})).status_code == 204
        await clock.advance(1000)
        assert (await http.get("licensing")).json()["registration"]["status"] == "IN_PROGRESS"
        simulator.faults.clear(stuck)
        assert (await http.get("licensing")).json()["registration"]["status"] == "COMPLETED"
        simulator.faults.add("ssms-unreachable")
        assert (await http.delete("licensing/deregistration")).status_code == 202
        again = await http.delete("licensing/deregistration")
        assert (again.status_code, again.content) == (400, b"")


class Ec2:
    """A state service as the simulated AWS has one."""

    def __init__(self) -> None:
        self.states: dict[str, dict[str, str]] = {}
        self.asked = 0
        self.down = False

    async def handle(self, request: web.Request) -> web.Response:
        self.asked += 1
        if self.down:
            return web.Response(status=503)
        state = self.states.get(request.match_info["id"])
        return web.json_response(state) if state else web.Response(status=404)

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_get("/instances/{id}", self.handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/instances"
        finally:
            await runner.cleanup()


async def test_only_instances_that_ec2_calls_running_are_alive() -> None:
    """Pending, stopped and unknown ones drop connections; a start boots anew; a termination forgets."""
    ec2, clock = Ec2(), VirtualClock()
    async with ec2.serve() as url:
        options = Options(boot_bad_gateway=1, boot_not_ready=0, ec2_state_url=url)
        async with simulated(options, clock) as simulator, httpx.AsyncClient(base_url=simulator.url) as http:

            async def ask(path: str = "system_information") -> int:
                await clock.advance(1)
                try:
                    return (await http.get(f"/i-1/api/v0/{path}")).status_code
                except httpx.TransportError:
                    return 0

            assert await ask() == 0, "no such instance"
            ec2.states["i-1"] = {"state": "pending", "launch": "2026-01-01T00:00:00Z"}
            assert await ask() == 0
            assert simulator.fleet.machines == {}
            ec2.states["i-1"] = {"state": "running", "launch": "2026-01-01T00:00:00Z"}
            assert [await ask(), await ask()] == [502, 200]
            machine = simulator.machine("i-1")
            lab = machine.add_lab("kept", nodes=1, running=True)
            ec2.down = True
            assert await ask() == 200, "a cloud API that fails does not switch hosts off"
            ec2.down = False
            for state in ("stopping", "stopped"):
                ec2.states["i-1"]["state"] = state
                assert await ask() == 0
            ec2.states["i-1"] = {"state": "running", "launch": "2026-01-01T01:00:00Z"}
            assert [await ask(), await ask()] == [502, 200]
            assert (simulator.machine("i-1"), machine.boots, lab.state) == (machine, 2, "STOPPED")
            ec2.states["i-1"]["launch"] = "2026-01-01T02:00:00Z"
            assert [await ask(), await ask()] == [502, 200], "stopped and started unseen"
            assert machine.boots == 3
            ec2.states["i-1"]["state"] = "terminated"
            assert await ask() == 0
            assert simulator.fleet.machines == {}
            assert (await http.get("/api/v0/system_information")).status_code in (200, 502), "the root is no instance"


async def test_ec2_is_asked_once_for_many_requests_at_once() -> None:
    ec2 = Ec2()
    ec2.states["i-1"] = {"state": "running", "launch": "a"}
    async with ec2.serve() as url:
        options = Options(boot_bad_gateway=0, boot_not_ready=0, ec2_state_url=url)
        async with simulated(options) as simulator, httpx.AsyncClient(base_url=simulator.url) as http:
            answers = await asyncio.gather(*(http.get("/i-1/api/v0/system_information") for _ in range(20)))
            assert {a.status_code for a in answers} == {200}
            assert ec2.asked == 1


async def test_tls_is_served_from_a_given_certificate(tmp_path: Path) -> None:
    made = certificates.make(tmp_path)
    options = Options(
        boot_bad_gateway=0, boot_not_ready=0, tls_cert=str(made.server.cert), tls_key=str(made.server.key)
    )
    async with simulated(options) as simulator:
        assert simulator.url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=str(made.ca))
        async with httpx.AsyncClient(verify=trusting) as http:
            assert (await http.get(f"{simulator.url}/api/v0/system_information")).status_code == 200
        async with httpx.AsyncClient() as http:
            with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
                await http.get(f"{simulator.url}/api/v0/system_information")


async def test_the_control_surface_does_what_a_user_of_cml_would() -> None:
    clock = VirtualClock()
    async with (
        simulated(clock=clock) as simulator,
        session(simulator, "i-1") as http,
        httpx.AsyncClient(base_url=f"{simulator.url}/_sim/") as control,
    ):
        new = {"title": "class", "count": 3, "nodes": 2, "running": True, "owner": "student"}
        ids = (await control.post("instances/i-1/labs", json=new)).json()
        tiles = (await http.get("populate_lab_tiles")).json()["lab_tiles"]
        assert set(ids) == set(tiles)
        assert {(t["state"], t["owner_username"], t["node_count"], t["link_count"]) for t in tiles.values()} == {
            ("STARTED", "student", 2, 1)
        }
        change = {"title": "renamed", "state": "STOPPED"}
        assert (await control.patch(f"instances/i-1/labs/{ids[0]}", json=change)).json()["state"] == "STOPPED"
        tile = (await http.get("populate_lab_tiles")).json()["lab_tiles"][ids[0]]
        assert (tile["lab_title"], tile["state"]) == ("renamed", "STOPPED")
        assert {n["state"] for n in tile["topology"]["nodes"]} == {"STOPPED"}
        assert (await control.delete(f"instances/i-1/labs/{ids[1]}")).status_code == 204
        assert set((await http.get("labs", params={"show_all": True})).json()) == {ids[0], ids[2]}
        counted = (await control.get("instances/i-1/requests")).json()
        assert counted["counts"] == {"POST /authenticate": 1, "GET /populate_lab_tiles": 2, "GET /labs": 1}
        assert (counted["total"], counted["log"][-1]["status"]) == (4, 200)
        assert (await control.get("counters")).json()["i-1"]["total"] == 4
        assert (await control.delete("instances/i-1/requests")).status_code == 204
        assert (await control.get("instances/i-1")).json()["requests"] == 0
        load = {"cpu_percent": 91.5, "memory_percent": 50.0}
        assert (await control.patch("instances/i-1", json=load)).status_code == 200
        stats = (await http.get("system_stats")).json()["all"]
        assert stats["cpu"]["percent"] == 91.5
        assert stats["memory"]["used"] == stats["memory"]["total"] / 2
        fault = (await control.post("faults", json={"kind": "status", "status": 418, "instance": "i-1"})).json()
        assert (await http.get("labs")).status_code == 418
        assert (await control.get("faults")).json()[0]["hits"] == 1
        assert (await control.delete(f"faults/{fault['id']}")).status_code == 204
        assert (await control.patch("instances/i-1", json={"powered": False})).json()["stage"] == "off"
        with pytest.raises(httpx.TransportError):
            await http.get("labs")
        assert (await control.post("instances/i-1/reboot")).json()["boots"] == 2
        assert (await http.get("labs")).status_code == 401, "a reboot ends every session"
        assert [m["name"] for m in (await control.get("instances")).json()] == ["i-1"]
        assert (await control.delete("instances/i-1")).status_code == 204
        assert (await control.get("instances")).json() == []


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "why"),
    [
        ("GET", "instances/i-9", None, 404, "reading makes no instance"),
        ("POST", "instances/-x/labs", {}, 400, "no name of an instance"),
        ("POST", "instances/i-1/labs", {"colour": "red"}, 400, "an unknown key"),
        ("POST", "instances/i-1/labs", {"owner": "nobody"}, 400, "no such user"),
        ("POST", "faults", {"kind": "earthquake"}, 400, "no such fault"),
        ("POST", "faults", {"kind": "delay", "seconds": -1}, 400, "back in time"),
        ("PATCH", "instances/i-1", {"cpu_percent": 101}, 400, "more than all"),
        ("DELETE", "faults/x", None, 404, "no number"),
        ("DELETE", "faults/7", None, 404, "no such number"),
        ("GET", "nothing", None, 404, "no such page"),
    ],
)
async def test_the_control_surface_refuses_what_it_does_not_know(
    method: str, path: str, body: Any, status: int, why: str
) -> None:
    async with simulated() as simulator, httpx.AsyncClient(base_url=f"{simulator.url}/_sim/") as control:
        assert (await control.request(method, path, json=body)).status_code == status, why


async def test_there_is_a_limit_to_the_machines_that_strangers_can_make() -> None:
    options = Options(boot_bad_gateway=0, boot_not_ready=0, max_instances=2)
    async with simulated(options) as simulator, httpx.AsyncClient(base_url=simulator.url) as http:
        statuses = [(await http.get(f"/i-{n}/api/v0/system_information")).status_code for n in range(3)]
        assert statuses == [200, 200, 507]


async def test_a_body_that_is_too_large_never_reaches_the_api() -> None:
    async with simulated() as simulator, session(simulator) as http:
        answer = await http.post("import", content=b"#" * (20 * 1024**2 + 1))
        assert (answer.status_code, answer.headers["content-type"]) == (413, "text/html; charset=utf-8")
        assert simulator.machine().labs == {}


async def test_a_defect_of_the_simulator_is_not_taken_for_one_of_cml() -> None:
    with pytest.raises(ExceptionGroup) as raised:  # noqa: PT012 - the server must be left for its defects to be raised
        async with simulated() as simulator, session(simulator) as http:
            lab = simulator.machine().add_lab("broken")
            lab.extras["annotations"] = {"no", "json"}
            answer = await http.get(f"labs/{lab.id}/annotations")
            assert (answer.status_code, answer.json()["code"]) == (500, 500)
            assert "encountered an unexpected error" in answer.json()["description"]
    assert isinstance(raised.value.exceptions[0], TypeError)


async def test_the_command_serves_until_it_is_told_to_stop() -> None:
    """`python -m controllers.cml.simulator` says its address, answers, and ends with 0 on SIGTERM."""
    arguments = ("--port", "0", "--password", "other", "--boot-bad-gateway", "0", "--boot-not-ready", "0")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "controllers.cml.simulator", *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            said = (await process.stdout.readline()).decode().split()
        assert said[0] == "ready"
        async with httpx.AsyncClient(base_url=f"{said[1]}/i-1/api/v0/") as http:
            login = await http.post("authenticate", json={"username": "admin", "password": "other"})
            assert login.status_code == 200
        second = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "controllers.cml.simulator", "--port", said[1].rpartition(":")[2]),
            stderr=asyncio.subprocess.PIPE,
        )
        _, complaint = await second.communicate()
        assert second.returncode == 1
        assert complaint.decode().startswith("error: cannot serve on 127.0.0.1:")
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def test_every_option_has_its_flag() -> None:
    """Also those that are not numbers or text."""
    options = parse(["--port", "9", "--token-seconds", "1.5", "--account", "eve:p", "--account", "bob:q:admin"])
    assert (options.port, options.token_seconds) == (9, 1.5)
    assert options.accounts == (Account("eve", "p"), Account("bob", "q", admin=True))
    with pytest.raises(ValueError, match="version"):
        parse(["--version", "latest"])
    with pytest.raises(ValueError, match="node_boot"):
        parse(["--node-boot", "-1"])
    with pytest.raises(ValueError, match="together"):
        parse(["--tls-cert", "x"])
    with pytest.raises(SystemExit):
        parse(["--account", "eve"])


async def test_missing_labs_are_404_for_every_operation() -> None:
    async with simulated() as simulator, session(simulator) as http:
        for method, path in (("GET", ""), ("DELETE", ""), ("PUT", "/start"), ("PUT", "/stop"), ("PUT", "/wipe")):
            answer = await http.request(method, f"labs/{NO_LAB}{path}")
            assert (answer.status_code, answer.json()["description"]) == (404, f"Lab not found: {NO_LAB}")
