"""`/api/lab-instances/`: the flat face of LabInstanceRequests."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest

from controllers.instances.admission import admission
from controllers.instances.kind import LAB_INSTANCE_REQUEST, LabInstanceRequest
from controllers.instances.openapi import OPERATIONS
from controllers.instances.routes import add_instance_routes
from controllers.instances.settings import InstanceSettings
from equipment.api import Served, served, tokens_file
from lrm.cache import Cache
from lrm.registry import Registry
from storage.clock import SystemClock
from storage.memory import MemoryStorage

PATH = "/api/lab-instances/"
BODY: dict[str, Any] = {
    "name": "my-python-lab",
    "namespace": "default",
    "lab_template": "python:3.9-alpine",
    "student_email": "student@university.edu",
    "duration_minutes": 60,
    "environment": {"LAB_TYPE": "python-basics"},
}


def entry(name: str, role: str, *namespaces: str) -> dict[str, Any]:
    digest = hashlib.sha256(f"{name}-token".encode()).hexdigest()
    return {"name": name, "sha256": digest, "role": role, "namespaces": list(namespaces)}


@pytest.fixture
async def api() -> AsyncIterator[Served]:
    async with served(
        MemoryStorage(), routes=(add_instance_routes,), operations=OPERATIONS, kinds=(LAB_INSTANCE_REQUEST,)
    ) as it:
        yield it


async def ask(api: Served, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    data = orjson.dumps(body) if body is not None else None
    sent = {"Content-Type": "application/json", **headers}
    async with api.session.request(method, api.url + path, data=data, headers=sent) as reply:
        return reply.status, orjson.loads(await reply.read())


async def enter(api: Served, name: str, *phases: str) -> None:
    """What the instances' controller would write."""
    client = api.client.bind(owner="instances", fence=None)
    for phase in phases:
        request = await client.get(LabInstanceRequest, "default", name)
        await client.update_status(request, lambda r, phase=phase: r.status.enter(phase, "Test", datetime.now(UTC)))  # type: ignore[misc]


async def test_what_is_posted_flat_is_a_resource_and_is_answered_flat(api: Served) -> None:
    status, created = await ask(api, "POST", PATH, BODY)
    assert status == 201
    assert {k: created[k] for k in BODY} == BODY
    assert (created["phase"], created["access_url"], created["runtime"]) == ("PENDING", None, "Container")
    stored = await api.client.get(LabInstanceRequest, "default", "my-python-lab")
    assert stored.spec.lab_template.image == "python:3.9-alpine"
    assert stored.spec.environment == {"LAB_TYPE": "python-basics"}
    assert created["uid"] == stored.uid
    assert await ask(api, "GET", f"{PATH}my-python-lab") == (200, created)
    assert await ask(api, "GET", PATH) == (200, [created])
    assert await ask(api, "GET", PATH.rstrip("/")) == (200, [created])


async def test_filters_narrow_the_list_whatever_their_case(api: Served) -> None:
    for name, student in (("a", "ann@x.edu"), ("b", "bob@x.edu"), ("c", "ann@x.edu")):
        assert (await ask(api, "POST", PATH, {**BODY, "name": name, "student_email": student}))[0] == 201
    await enter(api, "a", "Scheduling", "Provisioning", "Running")

    async def names(query: str) -> list[str]:
        status, found = await ask(api, "GET", f"{PATH}?{query}")
        assert status == 200
        return [one["name"] for one in found]

    assert await names("phase=RUNNING") == ["a"]
    assert await names("phase=pending") == ["b", "c"]
    assert await names("student_email=ANN@x.edu") == ["a", "c"]
    assert await names("student_email=ann@x.edu&phase=Pending") == ["c"]
    assert await names("namespace=other") == []


@pytest.mark.parametrize(
    ("query", "told"),
    [
        pytest.param("colour=red", "there are namespace, phase, student_email", id="no filter"),
        pytest.param("phase=bogus", "there are PENDING, SCHEDULING, PROVISIONING, RUNNING, STOPPING", id="no phase"),
        pytest.param("student_email=ann", "looks like student@university.edu", id="no address"),
    ],
)
async def test_a_filter_that_can_match_nothing_is_refused_with_what_there_is(
    api: Served, query: str, told: str
) -> None:
    status, answer = await ask(api, "GET", f"{PATH}?{query}")
    assert (status, answer["reason"]) == (400, "BadRequest")
    assert told in answer["message"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        pytest.param({"student_email": "nobody"}, "student_email", id="no address"),
        pytest.param({"student_email": None}, "student_email", id="nobody's"),
        pytest.param({"duration_minutes": 0}, "duration_minutes", id="no time"),
        pytest.param({"duration_minutes": 10**6}, "duration_minutes", id="for years"),
        pytest.param({"lab_template": "NOT AN IMAGE"}, "lab_template", id="no image"),
        pytest.param({"lab_template": {"image": "NO IMAGE"}}, "lab_template.image", id="no image in a template"),
        pytest.param({"lab_template": None}, "lab_template", id="of nothing"),
        pytest.param({"environment": {"A": "x\u0007y"}}, "environment", id="control characters"),
        pytest.param({"environment": {"1A": "x"}}, "environment", id="no variable"),
        pytest.param({"scheduled_start_time": "tomorrow"}, "scheduled_start_time", id="no time of day"),
        pytest.param({"scheduled_start_time": "2026-01-01T10:00:00"}, "scheduled_start_time", id="no zone"),
        pytest.param({"lab_template": {"topologyUrl": "ftp://x/y"}}, "lab_template.topologyUrl", id="no web address"),
        pytest.param({"lab_template": {"topologyFile": "x.yaml"}}, "lab_template.topologyFile", id="no whole path"),
        pytest.param({"colour": "red"}, "colour", id="an unknown field"),
        pytest.param({"name": "Not A Name"}, "name", id="no name"),
        pytest.param({"namespace": 3}, "namespace", id="no namespace"),
    ],
)
async def test_what_is_wrong_is_refused_with_its_flat_name(api: Served, change: dict[str, Any], field: str) -> None:
    status, told = await ask(api, "POST", PATH, {**BODY, **change})
    assert status == 422, told
    assert field in [cause["field"] for cause in told["details"]["causes"]], told
    assert "pattern" not in told["message"], "it tells what is wrong, not how that is found"
    assert await ask(api, "GET", PATH) == (200, []), "nothing that was refused has left a trace"


async def test_a_start_in_the_past_is_accepted_with_a_warning() -> None:
    storage, clock = MemoryStorage(), SystemClock()
    cache = Cache(storage, Registry((LAB_INSTANCE_REQUEST,), root="/lrm"), clock)
    rules = admission(InstanceSettings(instances_most_per_student=0), cache, clock)
    async with served(storage, routes=(add_instance_routes,), kinds=(LAB_INSTANCE_REQUEST,), admission=rules) as api:
        body = {**BODY, "scheduled_start_time": "2020-01-01T10:00:00Z"}
        async with api.session.post(api.url + PATH, json=body) as reply:
            assert reply.status == 201
            (told,) = reply.headers.getall("Warning")
            assert '"scheduled_start_time: 2020-01-01T10:00:00Z is past: the lab starts as soon as' in told


async def test_deleting_tells_whether_it_is_gone(api: Served) -> None:
    await ask(api, "POST", PATH, BODY)
    stored = await api.client.get(LabInstanceRequest, "default", "my-python-lab")
    await api.client.add_finalizer(stored, "lab.neuroglia.io/lab-instance")
    assert (await ask(api, "DELETE", f"{PATH}my-python-lab"))[0] == 202
    stored = await api.client.get(LabInstanceRequest, "default", "my-python-lab")
    await api.client.remove_finalizer(stored, "lab.neuroglia.io/lab-instance")
    assert (await ask(api, "DELETE", f"{PATH}my-python-lab"))[0] == 404
    await ask(api, "POST", PATH, BODY)
    assert (await ask(api, "DELETE", f"{PATH}my-python-lab"))[0] == 200


async def test_deleting_goes_by_dry_runs_and_preconditions_and_the_record_says_so(tmp_path: Path) -> None:
    audit = tmp_path / "audit.log"
    async with served(
        MemoryStorage(),
        routes=(add_instance_routes,),
        operations=OPERATIONS,
        kinds=(LAB_INSTANCE_REQUEST,),
        audit_file=audit,
    ) as api:
        created, one = (await ask(api, "POST", PATH, BODY))[1], f"{PATH}my-python-lab"
        other = {"kind": "DeleteOptions", "preconditions": {"uid": "another"}}
        for query, body, code in (
            ("?dryRun=All", None, 200),
            ("", {"kind": "DeleteOptions", "dryRun": ["All"]}, 200),
            ("", other, 409),
            ("?nonsense=1", None, 400),
            ("?Namespace=default", None, 400),
            ("?dryRun=no", None, 422),
        ):
            assert ((await ask(api, "DELETE", one + query, body))[0], query) == (code, query)
            assert await ask(api, "GET", one) == (200, created), "nothing of it has deleted anything"
        mine = {"preconditions": {"uid": created["uid"]}}
        assert await ask(api, "DELETE", f"{one}?propagationPolicy=Background", mine) == (200, created)
        assert (await ask(api, "GET", one))[0] == 404
    lines = [orjson.loads(line) for line in audit.read_bytes().splitlines()]
    told = [(line["code"], o.get("result"), o.get("note")) for line in lines[1:] for o in line["objects"]]
    rehearsed = (200, "deleted", "dry run")
    refused = [(code, None, None) for code in (409, 400, 400, 422)]
    assert told == [rehearsed, rehearsed, *refused, (200, "deleted", "Background")]


@pytest.mark.parametrize(
    ("query", "body", "code"),
    [
        pytest.param("?namespace=lab", {}, 201, id="the query says where"),
        pytest.param("", {"namespace": "lab"}, 201, id="the body says where"),
        pytest.param("?namespace=lab", {"namespace": "lab"}, 201, id="both say the same"),
        pytest.param("?namespace=lab", {"namespace": "default"}, 400, id="they contradict each other"),
        pytest.param("?namespace=No_Label", {}, 400, id="no namespace"),
        pytest.param("?nonsense=1", {"namespace": "lab"}, 400, id="a parameter that nobody would heed"),
    ],
)
async def test_a_new_one_is_made_where_query_or_body_say(
    api: Served, query: str, body: dict[str, Any], code: int
) -> None:
    sent = {k: v for k, v in BODY.items() if k != "namespace"} | body
    assert (await ask(api, "POST", PATH + query, sent))[0] == code
    made = (await ask(api, "GET", PATH))[1]
    assert [m["namespace"] for m in made] == (["lab"] if code == 201 else [])


async def test_one_of_that_name_is_a_conflict_and_none_a_name_of_its_own(api: Served) -> None:
    await ask(api, "POST", PATH, BODY)
    status, told = await ask(api, "POST", PATH, BODY)
    assert (status, told["reason"]) == (409, "AlreadyExists")
    status, made = await ask(api, "POST", PATH, {k: v for k, v in BODY.items() if k != "name"})
    assert status == 201
    assert made["name"].startswith("lab-")


async def test_rights_hold_as_for_the_resource(tmp_path: Path) -> None:
    tokens = tokens_file(tmp_path, entry("teacher", "manager", "lab"), entry("student", "viewer", "lab"))
    async with served(
        MemoryStorage(),
        routes=(add_instance_routes,),
        operations=OPERATIONS,
        kinds=(LAB_INSTANCE_REQUEST,),
        tokens_file=tokens,
        audit_file=tmp_path / "audit.log",
    ) as api:
        teacher, student = ({"Authorization": f"Bearer {who}-token"} for who in ("teacher", "student"))
        inside = {**BODY, "namespace": "lab"}
        assert (await ask(api, "POST", PATH, inside))[0] == 401
        assert (await ask(api, "POST", PATH, inside, **student))[0] == 403
        assert (await ask(api, "POST", PATH, BODY, **teacher))[0] == 403
        assert (await ask(api, "POST", PATH, inside, **teacher))[0] == 201
        assert (await ask(api, "GET", f"{PATH}?namespace=lab", **student))[0] == 200
        for everywhere in (PATH, "/apis/lab.neuroglia.io/v1/labinstancerequests"):
            status, told = await ask(api, "GET", everywhere, **student)
            assert status == 403
            assert (
                "in all namespaces, but in lab: name one (kubectl -n lab; on other paths ?namespace=lab)"
                in told["message"]
            )
        assert (await ask(api, "DELETE", f"{PATH}my-python-lab?namespace=lab", **student))[0] == 403
        recorded = [orjson.loads(line) for line in (tmp_path / "audit.log").read_bytes().splitlines()]
        assert any("my-python-lab" in orjson.dumps(line).decode() for line in recorded)
