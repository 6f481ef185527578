"""The documents of endpoints that serve no kind: nothing is served that they do not tell, nor told that is not served.

That each answer has the described code and form is looked at by every test that serves them (`equipment.described`).
"""

from __future__ import annotations

import asyncio
import re
from datetime import datetime
from typing import Any

import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openapi_spec_validator import OpenAPIV30SpecValidator

from controllers.labs.bulk import bulk_order
from controllers.plugin import plugin
from equipment.api import Served, served
from equipment.described import documents_of
from lrm.api import core_operations
from lrm.api.app import build_app
from lrm.api.call import Api
from lrm.errors import Invalid
from storage.memory import MemoryStorage

OPERATIONS = (*core_operations.OPERATIONS, *plugin.operations)
CREATE, BULK = "/api/lab-instances/", "/api/v1/workers/region/{region}/workers/{worker}/labs/bulk"


def product(**settings: Any) -> Any:
    return served(MemoryStorage(), kinds=plugin.kinds, routes=plugin.routes, operations=plugin.operations, **settings)


@pytest.fixture
async def api() -> Any:
    async with product() as it:
        yield it


def routes_of(app: web.Application) -> set[tuple[str, str]]:
    """Method and path of what is served below /api, and of what plug-ins serve below a kind's objects."""
    found = set()
    for route in app.router.routes():
        path = route.resource.canonical if route.resource is not None else ""
        below = path.startswith("/api/") or path == "/api" or (path.startswith("/apis/") and "{group}" not in path)
        if below and route.method != "HEAD":
            found.add((route.method.lower(), path.rstrip("/")))
    return found


def told(operations: Any = OPERATIONS) -> set[tuple[str, str]]:
    return {(o.method, o.path.rstrip("/")) for o in operations}


async def test_every_endpoint_is_described_and_every_description_is_served(api: Served) -> None:
    app = build_app(api.api)
    assert routes_of(app) == told()
    assert len(OPERATIONS) == len({o.name for o in OPERATIONS}) == len(told()), "each once, under a name of its own"


async def test_an_endpoint_that_nobody_described_would_be_found(api: Served) -> None:
    def more(app: web.Application, _api: Api) -> None:
        async def nothing(_request: web.Request) -> web.Response:
            return web.Response()

        app.router.add_put("/api/lab-instances/{name}", nothing)

    async with served(MemoryStorage(), kinds=plugin.kinds, routes=(*plugin.routes, more)) as it:
        assert routes_of(build_app(it.api)) - told() == {("put", "/api/lab-instances/{name}")}


async def test_the_index_leads_to_valid_documents_with_the_bearers_scheme(api: Served) -> None:
    index = (await api.get("/openapi/v3")).body["paths"]
    assert {"api", "api/v1", "api/status", "api/lab-instances", "apis/lab.neuroglia.io/v1"} == set(index)
    for place in index.values():
        document = (await api.get(place["serverRelativeURL"])).body
        assert [e.message for e in OpenAPIV30SpecValidator(document).iter_errors()] == []
        [scheme] = document["security"][0]
        assert document["components"]["securitySchemes"][scheme]["scheme"] == "bearer"


async def test_parameters_have_their_words_and_bounds(api: Served) -> None:
    documents = documents_of(api.api, OPERATIONS)
    listing = documents["api/lab-instances"]["paths"]["/api/lab-instances/"]["get"]
    [phase] = [p for p in listing["parameters"] if p["name"] == "phase"]
    assert "RUNNING" in phase["schema"]["enum"]
    bulk = documents["api/v1"]["paths"][BULK]["post"]
    assert {"in": "path", "required": True}.items() <= next(
        p for p in bulk["parameters"] if p["name"] == "worker"
    ).items()
    assert next(p for p in bulk["parameters"] if p["name"] == "wait")["schema"]["maximum"] == 20
    for operation in OPERATIONS:
        inside = documents[operation.document]["paths"][operation.path][operation.method]
        placed = {p["name"] for p in inside["parameters"] if p["in"] == "path"}
        assert {f"{{{name}}}" for name in placed} == {part for part in operation.path.split("/") if part[:1] == "{"}


async def test_a_parameter_that_is_not_described_is_refused_and_not_ignored(api: Served) -> None:
    """Who writes `dryrun`, or a precondition that is none here, is not to find that it was done all the same."""
    for operation in plugin.operations:
        path = re.sub(r"{(\w+)}", lambda part: "start" if part[1] == "action" else "x", operation.path)
        answer = await api.call(operation.method.upper(), f"{path}?undescribed=1")
        assert (answer.status, "'undescribed'" in answer.body["message"]) == (400, True), (operation.name, answer.raw)


def body_schema(api: Served, path: str) -> dict[str, Any]:
    """The schema of a body."""
    [operation] = [o for o in OPERATIONS if o.path == path and o.method == "post"]
    document = documents_of(api.api, OPERATIONS)[operation.document]
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    found: dict[str, Any] = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return found


def values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """What a schema allows."""
    match schema:
        case {"enum": words}:
            return st.sampled_from(words)
        case {"anyOf": choices}:
            return st.one_of(*(values(choice) for choice in choices))
        case {"type": "string", "format": "date-time"}:
            return st.datetimes(datetime(2030, 1, 1), datetime(2031, 1, 1)).map(lambda t: t.isoformat() + "Z")  # noqa: DTZ001 - the zone is added
        case {"type": "string"}:
            return st.text(st.characters(codec="utf-8", categories=("L", "N")), max_size=schema.get("maxLength", 20))
        case {"type": "integer"}:
            low, high = schema.get("minimum", 0), schema.get("maximum", 2**31)
            return st.integers(low, high) | st.sampled_from([low, high])
        case {"type": "array"}:
            return st.lists(values(schema["items"]), min_size=schema.get("minItems", 0), max_size=20, unique=True)
        case _:
            raise AssertionError(f"no values are known for {schema}")


ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=5),
    lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=3), v, max_size=2),
    max_leaves=4,
)
EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


async def test_a_bulk_order_of_the_described_form_is_taken_and_another_is_not(api: Served) -> None:
    """But for `all`, which is for starting and stopping: words say that."""
    schema = body_schema(api, BULK)
    properties = schema["properties"]
    assert (schema["additionalProperties"], set(schema["required"])) == (False, {"action", "labs"})

    @EXAMPLES
    @given(st.fixed_dictionaries({name: values(inner) for name, inner in properties.items()}))
    def taken(body: dict[str, Any]) -> None:
        if body["labs"] == "all" and body["action"] in ("wipe", "delete"):
            with pytest.raises(Invalid, match="labs"):
                bulk_order(body)
        else:
            order = bulk_order(body)
            assert (order.action, order.labs) == (body["action"], body["labs"])

    @EXAMPLES
    @given(st.fixed_dictionaries({}, optional={"action": ODD, "labs": ODD, "more": ODD}))
    def refused(body: dict[str, Any]) -> None:
        with pytest.raises(Invalid):
            bulk_order(body)

    taken()
    refused()


def test_a_lab_instance_of_the_described_form_is_taken_and_none_breaks_the_handler() -> None:
    """Texts that have rules of their own (addresses, images) are drawn from a few that keep them."""
    with asyncio.Runner() as runner:
        context = product()
        api: Served = runner.run(context.__aenter__())
        schema = body_schema(api, CREATE)
        drawn: dict[str, st.SearchStrategy[Any]] = {
            "name": st.just(""),
            "namespace": st.sampled_from(["default", "lab"]),
            "lab_template": st.sampled_from(["python:3.9-alpine", {"image": "nginx", "ports": [80]}]),
            "student_email": st.sampled_from(["student@university.edu", "a@b.ch"]),
            "environment": st.dictionaries(st.sampled_from(["A", "LAB_TYPE"]), st.sampled_from(["", "x y"])),
        }
        fields = {n: drawn[n] if n in drawn else values(inner) for n, inner in schema["properties"].items()}
        must = schema["required"]

        def post(body: dict[str, Any]) -> int:
            return runner.run(api.post(CREATE + "?dryRun=All", body)).status

        @EXAMPLES
        @given(
            st.fixed_dictionaries(
                {n: v for n, v in fields.items() if n in must},
                optional={n: v for n, v in fields.items() if n not in must},
            )
        )
        def taken(body: dict[str, Any]) -> None:
            assert post(body) == 201

        @EXAMPLES
        @given(st.data())
        def not_broken(data: st.DataObject) -> None:
            body = data.draw(
                st.fixed_dictionaries({}, optional={n: v | ODD for n, v in fields.items()} | {"more": ODD})
            )
            assert post(body) in (201, 400, 422)

        taken()
        not_broken()
        most = schema["properties"]["duration_minutes"]["maximum"]
        good = {"lab_template": "nginx", "student_email": "a@b.ch", "duration_minutes": most}
        assert (post(good), post({**good, "duration_minutes": most + 1}), post({**good, "more": 1})) == (201, 422, 422)
        runner.run(context.__aexit__(None, None, None))


async def test_the_daemons_state_and_the_core_answer_as_they_are_described(api: Served) -> None:
    """What is wrong is told when the served application ends."""
    for operation in core_operations.OPERATIONS:
        path = operation.path.replace("{namespace}", "default").replace("{name}", "nothing")
        assert (await api.call("GET", path)).status in (200, 404), path
    api.status.state, api.status.is_ready = "unhealthy", False
    assert (await api.get("/api/status/health")).status == 503
    assert (await api.get("/api/status/ready")).status == 503
