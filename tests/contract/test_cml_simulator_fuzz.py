"""Random bodies to every operation that takes one: refused or carried out as documented, never a defect."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import orjson
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controllers.cml.simulator import Options, Simulator
from controllers.cml.simulator.routing import Route
from controllers.cml.simulator.server import ROUTES
from lrm.testing import VirtualClock

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from(["iosv", "physical", "0.3.0", "lab_view", "READY", "n0", "i0", "text", "admin", "x" * 5000]),
)
KEYS = st.sampled_from(
    [
        *("title", "owner", "description", "notes", "groups", "associations", "users", "id", "permissions", "label"),
        *("node_definition", "x", "y", "interfaces", "nodes", "links", "lab", "version", "annotations", "type"),
        *("username", "password", "token", "reregister", "proxy", "server", "port", "ssms", "node", "slot", "name"),
        *("members", "admission_state", "opt_in", "src_int", "dst_int", "latency", "loss", "parameters", "tags"),
    ]
)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(KEYS, v, max_size=6), max_leaves=20)
WRITING = [r for r in ROUTES if r.method in ("POST", "PUT", "PATCH") and not r.template.endswith("/logout")]


def _encoded(value: Any, *, as_yaml: bool) -> bytes:
    try:
        return yaml.safe_dump(value).encode() if as_yaml else orjson.dumps(value)
    except (TypeError, ValueError):
        return str(value).encode(errors="replace")


@pytest.mark.parametrize("examples", [150, pytest.param(3000, marks=pytest.mark.soak)])
def test_no_body_whatsoever_breaks_the_simulator(examples: int) -> None:
    """Each answer is one of CML's statuses; what the simulator would have failed at is raised when it stops."""
    with asyncio.Runner() as runner:
        context = Simulator.run(Options(boot_bad_gateway=0, boot_not_ready=0), clock=VirtualClock())
        simulator = runner.run(context.__aenter__())
        http = httpx.AsyncClient(base_url=f"{simulator.url}/api/v0/")
        machine = simulator.machine()
        lab = machine.add_lab("target", nodes=2)
        link, (node, other) = next(iter(lab.links.values())), lab.nodes.values()
        group = runner.run(_login_and_group(http))
        ids = {
            "lab_id": lab.id,
            "node_id": node.id,
            "interface_id": other.interfaces[0].id,
            "link_id": link.id,
            "user_id": machine.admin.id,
            "group_id": group,
            "compute_id": machine.compute_id,
            "timeout": "900",
        }

        @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(st.sampled_from(WRITING), VALUES, st.booleans())
        def attack(route: Route, value: Any, as_yaml: bool) -> None:
            path = "/".join(ids[s[1:-1]] if s.startswith("{") else s for s in route.template.strip("/").split("/"))
            machine.admin.password, machine.admin.username, machine.admin.admin = "admin-secret", "admin", True
            content = _encoded(value, as_yaml=as_yaml)
            answer = runner.run(http.request(route.method, path, content=content))
            assert answer.status_code in (200, 201, 204, 400, 403, 404, 409), (route, content, answer.text)
            seen = runner.run(http.get("populate_lab_tiles"))
            assert seen.status_code == 200

        try:
            attack()
        finally:
            runner.run(http.aclose())
            runner.run(context.__aexit__(None, None, None))


async def _login_and_group(http: httpx.AsyncClient) -> str:
    login = await http.post("authenticate", json={"username": "admin", "password": "admin-secret"})
    http.headers["Authorization"] = f"Bearer {login.json()}"
    made: str = (await http.post("groups", json={"name": "target"})).json()["id"]
    return made
