"""Objects over HTTP: create, read, change, delete, and everything that is refused without leaving a trace."""

from __future__ import annotations

import asyncio
import gzip
import io
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from yarl import URL

from equipment.api import GROUP, Served, Sighting, Telescope, path_of, served, telescope
from storage.base import Guard
from storage.memory import MemoryStorage


@pytest.fixture
async def api() -> AsyncIterator[Served]:
    async with served(MemoryStorage()) as it:
        yield it


async def stored(api: Served) -> dict[str, bytes]:
    """Everything that is in the store."""
    return {e.key: e.value for e in (await api.storage.list("/")).entries}


async def test_an_object_is_created_read_listed_and_deleted(api: Served) -> None:
    created = await api.post(path_of(), telescope(labels={"a": "b"}))
    assert created.status == 201
    made = created.body
    assert made["metadata"]["generation"] == 1
    assert made["metadata"]["uid"]
    assert made["status"]["phase"] == "Pending"
    read = await api.get(path_of("hubble"))
    assert (read.status, read.body) == (200, made)
    listed = (await api.get(path_of())).body
    assert (listed["kind"], listed["apiVersion"]) == ("TelescopeList", GROUP)
    assert listed["items"] == [made]
    assert int(listed["metadata"]["resourceVersion"]) >= int(made["metadata"]["resourceVersion"])
    gone = await api.call("DELETE", path_of("hubble"))
    assert (gone.status, gone.body["status"]) == (200, "Success")
    assert gone.body["details"]["uid"] == made["metadata"]["uid"]
    missing = await api.get(path_of("hubble"))
    assert (missing.status, missing.body["reason"]) == (404, "NotFound")
    assert missing.body["message"] == 'telescopes.astro.example.io "hubble" not found'


async def test_the_resource_version_is_never_part_of_the_stored_value(api: Served) -> None:
    made = await api.make()
    [(key, value)] = (await stored(api)).items()
    assert key == "/lrm/r/telescopes/default/hubble"
    assert "resourceVersion" not in orjson.loads(value)["metadata"]
    entry = await api.storage.get(key)
    assert made["metadata"]["resourceVersion"] == str(entry.revision)


async def test_yaml_goes_in_and_comes_out(api: Served) -> None:
    body = f"""
apiVersion: {GROUP}
kind: Telescope
metadata: {{name: hubble, annotations: {{made: 2026-01-31T09:00:00Z, really: yes}}}}
spec:
  site: on
  mirror: {{diameter_cm: 240}}
"""
    made = await api.post(path_of(), body, content_type="application/yaml", headers={"Accept": "application/yaml"})
    assert made.status == 201
    assert made.headers["Content-Type"].startswith("application/yaml")
    assert b"really: 'yes'" in made.raw
    read = (await api.get(path_of("hubble"))).body
    assert read["metadata"]["annotations"] == {"made": "2026-01-31T09:00:00Z", "really": "yes"}
    assert read["spec"]["site"] == "on"
    again = await api.call("PUT", path_of("hubble"), made.raw, content_type="application/yaml")
    assert (again.status, again.body) == (200, read)


async def test_generate_name_makes_names_of_its_own(api: Served) -> None:
    document = telescope()
    document["metadata"] = {"generateName": "t-"}
    names = {(await api.post(path_of(), document)).body["metadata"]["name"] for _ in range(3)}
    assert len(names) == 3
    assert all(name.startswith("t-") for name in names)


async def test_a_second_create_of_a_name_is_409_already_exists(api: Served) -> None:
    await api.make()
    again = await api.post(path_of(), telescope(site="ground"))
    assert (again.status, again.body["reason"]) == (409, "AlreadyExists")
    assert (await api.get(path_of("hubble"))).body["spec"]["site"] == "orbit"


async def test_put_replaces_spec_and_metadata_and_leaves_the_status(api: Served) -> None:
    made = await api.make(labels={"a": "b"})
    wanted = {**made, "status": {"phase": "Ready", "azimuth": 5}}
    wanted["metadata"] = {**made["metadata"], "labels": {"c": "d"}, "generation": 99}
    wanted["spec"] = {**made["spec"], "tracking": True}
    put = await api.call("PUT", path_of("hubble"), wanted)
    assert put.status == 200
    assert put.body["metadata"]["labels"] == {"c": "d"}
    assert put.body["metadata"]["generation"] == 2
    assert put.body["status"] == made["status"]


async def test_a_manifest_that_is_put_again_lets_go_of_nothing(api: Served) -> None:
    """Finalizers are not in anybody's manifest; only who has read the object can mean their absence."""
    document = telescope()
    made = await api.make()
    held = {"metadata": {"finalizers": ["astro.example.io/mirror"], "ownerReferences": []}}
    patched = await api.call("PATCH", path_of("hubble"), held, content_type="application/merge-patch+json")
    assert patched.status == 200, patched.body
    assert (await api.call("DELETE", path_of("hubble"))).status == 200
    again = await api.call("PUT", path_of("hubble"), document)
    assert again.status == 200, again.body
    assert again.body["metadata"]["finalizers"] == ["astro.example.io/mirror"]
    assert again.body["metadata"]["uid"] == made["metadata"]["uid"]
    whole = again.body
    del whole["metadata"]["finalizers"]
    assert (await api.call("PUT", path_of("hubble"), whole)).status == 200
    assert (await api.get(path_of("hubble"))).status == 404


async def test_a_put_for_an_older_state_is_409(api: Served) -> None:
    made = await api.make()
    await api.merge(path_of("hubble"), {"spec": {"tracking": True}})
    late = await api.call("PUT", path_of("hubble"), made)
    assert (late.status, late.body["reason"]) == (409, "Conflict")
    made["metadata"].pop("resourceVersion")
    assert (await api.call("PUT", path_of("hubble"), made)).status == 200
    made["metadata"]["uid"] = "another"
    assert (await api.call("PUT", path_of("hubble"), made)).status == 409


async def test_a_write_that_changes_nothing_keeps_the_resource_version(api: Served) -> None:
    made = await api.make()
    for answer in (
        await api.call("PUT", path_of("hubble"), made),
        await api.merge(path_of("hubble"), {"spec": {"site": "orbit"}}),
        await api.merge(path_of("hubble"), {}),
    ):
        assert (answer.status, answer.body) == (200, made)


async def test_merge_patch_takes_wire_names_and_snake_case(api: Served) -> None:
    await api.make()
    for patch in ({"spec": {"mirror": {"diameterCm": 250}}}, {"spec": {"mirror": {"diameter_cm": 260}}}):
        answer = await api.merge(path_of("hubble"), patch)
        assert answer.status == 200
        assert answer.body["spec"]["mirror"]["diameterCm"] == next(iter(patch["spec"]["mirror"].values()))
    removed = await api.merge(path_of("hubble"), {"metadata": {"labels": None}, "spec": {"note": None}})
    assert removed.status == 200


async def test_json_patch(api: Served) -> None:
    await api.make(labels={"a": "b"})
    steps = [
        {"op": "test", "path": "/spec/site", "value": "orbit"},
        {"op": "add", "path": "/metadata/labels/c", "value": "d"},
        {"op": "replace", "path": "/spec/mirror/diameterCm", "value": 7},
    ]
    answer = await api.call("PATCH", path_of("hubble"), steps, content_type="application/json-patch+json")
    assert answer.status == 200
    assert answer.body["metadata"]["labels"] == {"a": "b", "c": "d"}
    assert answer.body["spec"]["mirror"]["diameterCm"] == 7
    steps[0]["value"] = "ground"
    refused = await api.call("PATCH", path_of("hubble"), steps, content_type="application/json-patch+json")
    assert (refused.status, refused.body["reason"]) == (422, "Invalid")


async def test_a_patch_with_a_resource_version_holds_for_that_state_alone(api: Served) -> None:
    made = await api.make()
    version = made["metadata"]["resourceVersion"]
    patch = {"metadata": {"resourceVersion": version}, "spec": {"tracking": True}}
    assert (await api.merge(path_of("hubble"), patch)).status == 200
    late = await api.merge(path_of("hubble"), {**patch, "spec": {"tracking": False}})
    assert (late.status, late.body["reason"]) == (409, "Conflict")
    assert (await api.get(path_of("hubble"))).body["spec"]["tracking"] is True


async def test_two_storms_of_patches_leave_every_change(api: Served) -> None:
    """Patches are computed anew when another writer was faster; none is lost."""
    await api.make()

    async def writer(label: str) -> None:
        for i in range(25):
            answer = await api.merge(path_of("hubble"), {"metadata": {"labels": {f"{label}{i}": "x"}}})
            assert answer.status == 200, answer.raw

    await asyncio.gather(writer("a"), writer("b"), writer("c"))
    labels = (await api.get(path_of("hubble"))).body["metadata"]["labels"]
    assert set(labels) == {f"{w}{i}" for w in "abc" for i in range(25)}


async def test_two_read_modify_write_clients_with_retry_leave_both_changes(api: Served) -> None:
    await api.make()

    async def writer(label: str) -> int:
        conflicts = 0
        for i in range(10):
            while True:
                document = (await api.get(path_of("hubble"))).body
                document["metadata"].setdefault("labels", {})[f"{label}{i}"] = "x"
                answer = await api.call("PUT", path_of("hubble"), document)
                if answer.status == 200:
                    break
                assert answer.body["reason"] == "Conflict"
                conflicts += 1
        return conflicts

    conflicts = await asyncio.gather(writer("a"), writer("b"))
    labels = (await api.get(path_of("hubble"))).body["metadata"]["labels"]
    assert set(labels) == {f"{w}{i}" for w in "ab" for i in range(10)}
    assert sum(conflicts) > 0


async def test_deleting_waits_for_finalizers_and_the_last_one_takes_the_key(api: Served) -> None:
    await api.make(finalizers=["example.io/hold"])
    marked = await api.call("DELETE", path_of("hubble"), {"kind": "DeleteOptions", "propagationPolicy": "Background"})
    assert (marked.status, marked.body["kind"]) == (200, "Telescope")
    assert marked.body["metadata"]["deletionTimestamp"]
    frozen = await api.merge(path_of("hubble"), {"spec": {"tracking": True}})
    assert (frozen.status, frozen.body["reason"]) == (403, "Forbidden")
    added = await api.merge(path_of("hubble"), {"metadata": {"finalizers": ["example.io/hold", "example.io/more"]}})
    assert added.status == 403
    again = await api.call("DELETE", path_of("hubble"))
    assert again.body["metadata"]["resourceVersion"] == marked.body["metadata"]["resourceVersion"]
    last = await api.merge(path_of("hubble"), {"metadata": {"finalizers": None}})
    assert last.status == 200
    assert (await api.get(path_of("hubble"))).status == 404
    assert await stored(api) == {}


async def test_delete_keeps_to_its_preconditions(api: Served) -> None:
    made = (await api.make())["metadata"]
    for preconditions in ({"uid": "another"}, {"resourceVersion": "1"}, {"uid": made["uid"], "resourceVersion": "1"}):
        refused = await api.call("DELETE", path_of("hubble"), {"preconditions": preconditions})
        assert (refused.status, refused.body["reason"]) == (409, "Conflict")
    right = {"uid": made["uid"], "resourceVersion": made["resourceVersion"]}
    assert (await api.call("DELETE", path_of("hubble"), {"preconditions": right})).status == 200


class ChangesFirst(MemoryStorage):
    """A store in which somebody else is always a little faster than the first deletion."""

    overtaken = False

    async def delete(self, key: str, *, expected_revision: int, guards: tuple[Guard, ...] = ()) -> int:
        if not self.overtaken:
            self.overtaken = True
            await self.set(key, (await self.get(key)).value.replace(b'"tracking":false', b'"tracking":true'))
        return await super().delete(key, expected_revision=expected_revision, guards=guards)


async def test_a_deletion_of_one_state_does_not_delete_another_that_came_meanwhile() -> None:
    async with served(ChangesFirst()) as api:
        version = (await api.make())["metadata"]["resourceVersion"]
        late = await api.call("DELETE", path_of("hubble"), {"preconditions": {"resourceVersion": version}})
        assert (late.status, late.body["reason"]) == (409, "Conflict")
        assert (await api.get(path_of("hubble"))).body["spec"]["tracking"] is True
    async with served(ChangesFirst()) as api:
        await api.make()
        assert (await api.call("DELETE", path_of("hubble"))).status == 200, "whatever its state"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"propagationPolicy": "Sideways"}, 422),
        ({"propagationPolicy": ["Orphan"]}, 422),
        ({"orphanDependents": "yes"}, 422),
        ({"orphanDependents": True, "propagationPolicy": "Orphan"}, 422),
        ({"dryRun": ["Some"]}, 422),
        ({"dryRun": "All"}, 422),
        ({"preconditions": 5}, 422),
        ({"preconditions": {"uid": 5}}, 422),
        ({"kind": "Telescope"}, 400),
        (b"[]", 400),
        (b"{", 400),
    ],
)
async def test_delete_options_that_mean_nothing_delete_nothing(api: Served, body: Any, code: int) -> None:
    await api.make()
    assert (await api.call("DELETE", path_of("hubble"), body)).status == code
    assert (await api.get(path_of("hubble"))).status == 200


async def test_a_protected_object_cannot_be_deleted(api: Served) -> None:
    await api.make(annotations={"lab.neuroglia.io/protect": "true"})
    refused = await api.call("DELETE", path_of("hubble"))
    assert (refused.status, refused.body["reason"]) == (403, "Forbidden")
    assert "lab.neuroglia.io/protect" in refused.body["message"]


async def test_a_deletion_says_what_becomes_of_dependants_and_the_last_word_holds(api: Served) -> None:
    await api.make("owner", finalizers=["example.io/hold"])

    async def finalizers_after(body: dict[str, Any], **options: Any) -> list[str]:
        answer = await api.call("DELETE", path_of("owner"), body, **options)
        assert answer.status == 200, answer.raw
        found: list[str] = answer.body["metadata"]["finalizers"]
        return found

    assert await finalizers_after({"propagationPolicy": "Orphan", "dryRun": ["All"]}) == ["example.io/hold", "orphan"]
    assert await finalizers_after({}) == ["example.io/hold"]
    assert await finalizers_after({"propagationPolicy": "Foreground"}) == ["example.io/hold", "foregroundDeletion"]
    assert await finalizers_after({}) == ["example.io/hold", "foregroundDeletion"]
    assert await finalizers_after({"orphanDependents": True}) == ["example.io/hold", "orphan"]
    background = {"params": {"propagationPolicy": "Background"}}
    assert await finalizers_after({"propagationPolicy": "Orphan"}, **background) == ["example.io/hold"]


async def test_an_owner_must_exist_and_live_when_an_object_is_given_to_it(api: Served) -> None:
    owner = (await api.make("owner", finalizers=["example.io/hold"]))["metadata"]
    right = {"apiVersion": GROUP, "kind": "Telescope", "name": "owner", "uid": owner["uid"]}
    wrong = {
        "another incarnation": {**right, "uid": "of-another-incarnation"},
        "no such name": {**right, "name": "nobody"},
        "no such kind": {**right, "kind": "Observatory"},
    }
    for why, reference in wrong.items():
        document = telescope("child", ownerReferences=[right, reference])
        for params in ({}, {"dryRun": "All"}):
            refused = await api.post(path_of(), document, params=params)
            assert (refused.status, [*refused.causes]) == (422, ["metadata.ownerReferences[1]"]), why
        refused = await api.post(f"/apis/{GROUP}", document)
        assert (refused.status, [*refused.causes]) == (422, ["[0].metadata.ownerReferences[1]"]), why
    await api.make("child", ownerReferences=[right])
    child = (await api.get(path_of("child"))).body["metadata"]
    circle = {"metadata": {"ownerReferences": [{**right, "name": "child", "uid": child["uid"]}]}}
    for params in ({}, {"dryRun": "All"}):
        refused = await api.merge(path_of("owner"), circle, params=params)
        assert refused.status == 422
        assert "own dependants" in refused.body["message"]
    await api.call("DELETE", path_of("owner"))
    late = await api.post(path_of(), telescope("late", ownerReferences=[right]))
    assert late.status == 422
    assert "is being deleted" in late.body["message"]
    assert [e["metadata"]["name"] for e in (await api.get(path_of())).body["items"]] == ["child", "owner"]


async def test_a_kind_that_only_the_system_creates_is_403_with_the_reason(api: Served) -> None:
    document = {"metadata": {"name": "comet"}, "spec": {"telescope": "hubble"}}
    refused = await api.post(path_of(plural="sightings"), document)
    assert (refused.status, refused.body["reason"]) == (403, "Forbidden")
    assert "they appear when something is seen" in refused.body["message"]
    assert await stored(api) == {}


async def test_what_is_computed_when_served_is_in_every_answer_and_never_in_the_store(api: Served) -> None:
    await api.make()
    seen = await api.client.create(
        Sighting.model_validate({"metadata": {"name": "comet"}, "spec": {"telescope": "hubble"}})
    )
    path = path_of("comet", plural="sightings")
    async with api.watch(path_of(plural="sightings")) as watch:
        first = await watch.next()
        listed = (await api.get(path_of(plural="sightings"))).body["items"][0]
        changed = (await api.merge(path, {"metadata": {"labels": {"a": "b"}}})).body
        second = await watch.next()
    for shown in (first["object"], listed, changed, second["object"], (await api.get(path)).body):
        assert shown["status"]["seenFrom"] == "orbit"
    assert b"seenFrom" not in (await api.storage.get(api.registry.key_of(seen))).value


async def test_unknown_fields_of_a_newer_version_stay_and_are_served(api: Served) -> None:
    """During a rolling upgrade an old daemon serves, patches and replaces what a newer one wrote."""
    await api.make()
    key = "/lrm/r/telescopes/default/hubble"
    newer = orjson.loads((await api.storage.get(key)).value)
    newer["spec"]["laser"] = {"watts": 5}
    newer["status"]["forecast"] = "clear"
    await api.storage.set(key, orjson.dumps(newer))
    read = (await api.get(path_of("hubble"))).body
    assert (read["spec"]["laser"], read["status"]["forecast"]) == ({"watts": 5}, "clear")
    patched = await api.merge(path_of("hubble"), {"spec": {"tracking": True}})
    assert (patched.status, patched.body["spec"]["laser"]) == (200, {"watts": 5})
    assert (await api.call("PUT", path_of("hubble"), patched.body)).status == 200
    status = await api.merge(
        path_of("hubble", sub="status"), {"status": {"azimuth": 3}}, params={"fieldManager": "telescopes"}
    )
    assert (status.status, status.body["status"]["forecast"]) == (200, "clear")
    stranger = await api.merge(path_of("hubble"), {"spec": {"maser": 1}})
    assert stranger.causes == {"spec.maser": 'unknown field "spec.maser"'}
    assert orjson.loads((await api.storage.get(key)).value)["spec"]["laser"] == {"watts": 5}


async def test_a_value_that_cannot_be_decoded_is_named_and_never_touched(api: Served) -> None:
    await api.make("good")
    key = "/lrm/r/telescopes/default/bad"
    await api.storage.set(key, b'{"spec": 5}')
    single = await api.get(path_of("bad"))
    assert (single.status, single.body["reason"]) == (500, "InternalError")
    assert key in single.body["message"]
    listed = await api.get(path_of())
    assert [item["metadata"]["name"] for item in listed.body["items"]] == ["good"]
    assert any(key in warning for warning in listed.warnings)
    for answer in (
        await api.call("PUT", path_of("bad"), telescope("bad")),
        await api.merge(path_of("bad"), {"spec": {}}),
        await api.call("DELETE", path_of("bad")),
    ):
        assert answer.status == 500
    assert (await api.storage.get(key)).value == b'{"spec": 5}'


async def test_a_dry_run_decides_everything_and_writes_nothing(api: Served) -> None:
    made = await api.make()
    before = await stored(api)
    all_of_it = {"dryRun": "All"}
    created = await api.post(path_of(), telescope("other"), params=all_of_it)
    assert (created.status, created.body["metadata"]["name"]) == (201, "other")
    assert (await api.post(path_of(), telescope(), params=all_of_it)).status == 409
    patched = await api.merge(path_of("hubble"), {"spec": {"tracking": True}}, params=all_of_it)
    assert patched.body["spec"]["tracking"] is True
    assert patched.body["metadata"]["generation"] == 2
    refused = await api.merge(path_of("hubble"), {"spec": {"site": "ground"}}, params=all_of_it)
    assert refused.causes == {"spec.site": "is immutable"}
    put = await api.call("PUT", path_of("hubble"), made, params=all_of_it)
    assert put.status == 200
    status = await api.merge(
        path_of("hubble", sub="status"),
        {"status": {"azimuth": 1}},
        params={**all_of_it, "fieldManager": "telescopes"},
    )
    assert status.body["status"]["azimuth"] == 1
    gone = await api.call("DELETE", path_of("hubble"), params=all_of_it)
    assert gone.body["status"] == "Success"
    assert (await api.call("DELETE", path_of("hubble"), {"dryRun": ["All"]})).status == 200
    assert (await api.post(path_of(), telescope("x"), params={"dryRun": "Some"})).status == 422
    assert await stored(api) == before


BAD_BODIES: list[tuple[str, Any, str, int, set[str]]] = [
    ("malformed YAML", "a: [1", "application/yaml", 400, set()),
    ("malformed JSON", b"{", "application/json", 400, set()),
    ("empty", b"", "application/json", 400, set()),
    ("empty YAML", "# nothing", "application/yaml", 400, set()),
    ("not an object", b"[1]", "application/json", 400, set()),
    ("two documents for one object", "a: 1\n---\nb: 2", "application/yaml", 400, set()),
    ("duplicate key", b'{"metadata":{},"metadata":{}}', "application/json", 400, set()),
    ("wrong content type", b"<a/>", "application/xml", 415, set()),
    ("form", b"a=b", "application/x-www-form-urlencoded", 415, set()),
    ("another kind", {**telescope(), "kind": "Sighting"}, "application/json", 400, set()),
    ("another version", {**telescope(), "apiVersion": "astro.example.io/v2"}, "application/json", 400, set()),
    ("another namespace", telescope(namespace="other"), "application/json", 400, set()),
    ("metadata is a list", {**telescope(), "metadata": []}, "application/json", 422, {"metadata"}),
    ("no name", telescope(""), "application/json", 422, {"metadata.name"}),
    ("bad name", telescope("Hubble_1"), "application/json", 422, {"metadata.name"}),
    ("too long a name", telescope("a" * 64), "application/json", 422, {"metadata.name"}),
    ("a path for a name", telescope("../../leader/x"), "application/json", 422, {"metadata.name"}),
    (
        "a path for a generated name",
        {**telescope(), "metadata": {"generateName": "../x/"}},
        "application/json",
        422,
        {"metadata.generateName"},
    ),
    (
        "too long a generated name",
        {**telescope(), "metadata": {"generateName": "a" * 56}},
        "application/json",
        422,
        {"metadata.generateName"},
    ),
    (
        "resourceVersion on create",
        telescope(resourceVersion="5"),
        "application/json",
        422,
        {"metadata.resourceVersion"},
    ),
    ("no spec", {"metadata": {"name": "x"}}, "application/json", 422, {"spec"}),
    ("spec is text", {**telescope(), "spec": "x"}, "application/json", 422, {"spec"}),
    (
        "several at once",
        {
            "metadata": {"name": "X", "labels": {"a b": "c", "ok": "not ok!"}},
            "spec": {"sight": "x", "mirror": {"diameterCm": "wide", "coating": "Tin", "shape": 1}},
        },
        "application/json",
        422,
        {"spec.site", "spec.sight", "spec.mirror.diameterCm", "spec.mirror.coating", "spec.mirror.shape"}
        | {"metadata.name", "metadata.labels", "metadata.labels.ok"},
    ),
    (
        "several of metadata at once",
        telescope("X", labels={"a b": "c", "ok": "not ok!"}, finalizers=["no good!"]),
        "application/json",
        422,
        {"metadata.name", "metadata.labels", "metadata.labels.ok", "metadata.finalizers[0]"},
    ),
    ("unknown top field", {**telescope(), "extra": 1}, "application/json", 422, {"extra"}),
    (
        "both spellings",
        {**telescope(), "spec": {"site": "x", "mirror": {"diameterCm": 1, "diameter_cm": 2}}},
        "application/json",
        422,
        {"spec.mirror.diameterCm"},
    ),
]


@pytest.mark.parametrize(
    ("body", "content_type", "code", "fields"), [c[1:] for c in BAD_BODIES], ids=[c[0] for c in BAD_BODIES]
)
async def test_bad_input_is_a_status_that_names_each_field_and_stores_nothing(
    api: Served, body: Any, content_type: str, code: int, fields: set[str]
) -> None:
    refused = await api.post(path_of(), body, content_type=content_type)
    assert refused.status == code, refused.raw
    assert (refused.body["kind"], refused.body["status"], refused.body["code"]) == ("Status", "Failure", code)
    if fields:
        assert set(refused.causes) == fields
    assert await stored(api) == {}


async def test_a_body_without_a_content_type_is_415(api: Served) -> None:
    async with api.session.post(api.url + path_of(), data=b"{}", skip_auto_headers=["Content-Type"]) as reply:
        assert reply.status == 415


async def test_too_large_a_body_is_413_told_or_streamed(api: Served) -> None:
    document = telescope(annotations={"a": "x" * (1024 * 1024)})
    headers = {"Content-Type": "application/json"}
    async with api.session.post(api.url + path_of(), data=io.BytesIO(orjson.dumps(document)), headers=headers) as reply:
        assert reply.status == 413

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 65536

    async with api.session.post(api.url + path_of(), data=chunks(), headers=headers) as reply:
        assert reply.status == 413
        assert (await reply.json())["reason"] == "RequestEntityTooLarge"


async def test_a_body_that_unpacks_to_too_much_is_413(api: Served) -> None:
    bomb = gzip.compress(b" " * (64 * 1024 * 1024))
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    async with api.session.post(api.url + path_of(), data=bomb, headers=headers) as reply:
        assert reply.status in (400, 413)


async def test_a_value_that_the_store_does_not_take_is_413(api: Served) -> None:
    """Under the body's limit and over the store's: YAML may be shorter than what it says."""
    tags = "".join(f"k{i}: *v\n    " for i in range(40))
    metadata = f"metadata: {{name: hubble, annotations: {{v: &v {'x' * 30_000}}}}}"
    body = f"{metadata}\nspec:\n  site: s\n  mirror: {{diameterCm: 1}}\n  tags:\n    {tags}"
    refused = await api.post(path_of(), body, content_type="application/yaml")
    assert (refused.status, refused.body["reason"]) == (413, "RequestEntityTooLarge")
    assert await stored(api) == {}


async def test_a_body_that_does_not_come_is_given_up() -> None:
    async with served(MemoryStorage(), body_seconds=0.2) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(api.url.rpartition(":")[2]))
        headers = ("Host: 127.0.0.1", "Content-Type: application/json", "Content-Length: 50")
        writer.write("\r\n".join([f"POST {path_of()} HTTP/1.1", *headers, "", "{"]).encode())
        async with asyncio.timeout(30):
            assert b" 408 " in await reader.readline()
        writer.close()
        assert await stored(api) == {}


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/apis/astro.example.io/v1/namespaces/default/comets", 404),
        ("/apis/astro.example.io/v2/namespaces/default/telescopes", 404),
        ("/apis/other.io/v1", 404),
        ("/apis/other.io", 404),
        ("/nothing", 404),
        (path_of(namespace="No_Label"), 400),
        (path_of(namespace="a" * 64), 400),
        (path_of("..%2F..%2Fleader%2Fx"), 404),
        (path_of("Hubble"), 404),
        (path_of() + "?limit=-1", 400),
        (path_of() + "?limit=1e3", 400),
        (path_of() + "?limit=%D9%A3", 400),
        (path_of() + "?resourceVersion=abc", 400),
        (path_of() + "?resourceVersion=-1", 400),
        (path_of() + "?resourceVersion=99999999999999999999", 400),
        (path_of() + "?resourceVersion=5&resourceVersionMatch=Sometimes", 422),
        (path_of() + "?resourceVersionMatch=Exact", 422),
        (path_of() + "?resourceVersion=0&resourceVersionMatch=Exact", 422),
        (path_of() + "?continue=!!!", 400),
        (path_of() + "?continue=WzEsImEiLCIiLCJ4Il0", 400),
        (path_of() + "?continue=W10", 400),
        (path_of() + "?labelSelector=%3D", 400),
        (path_of() + "?fieldSelector=spec.nothing%3D1", 400),
        (path_of() + "?watch=maybe", 400),
        (path_of() + "?watch=true&timeoutSeconds=soon", 400),
    ],
)
async def test_a_bad_path_or_query_is_a_status(api: Served, path: str, code: int) -> None:
    async with api.session.get(URL(api.url + path, encoded=True)) as reply:
        body = await reply.json()
        assert (reply.status, body["kind"], body["code"]) == (code, "Status", code)


async def test_a_name_in_a_path_cannot_reach_other_keys(api: Served) -> None:
    await api.make()
    value = (await api.storage.get("/lrm/r/telescopes/default/hubble")).value
    for key in ("default/a/b", "default/../x", "default/UP"):
        await api.storage.set(f"/lrm/r/telescopes/{key}", value)
    for name in ("a%2Fb", "..%2Fx", "UP"):
        for method in ("GET", "DELETE"):
            async with api.session.request(method, URL(api.url + path_of(name), encoded=True)) as reply:
                assert reply.status == 404
    assert len(await stored(api)) == 4


async def test_verbs_that_are_not_served_are_405_with_those_that_are(api: Served) -> None:
    for method, path in (("DELETE", path_of()), ("POST", path_of(namespace="")), ("PUT", "/version")):
        refused = await api.call(method, path, {})
        assert (refused.status, refused.body["reason"]) == (405, "MethodNotAllowed")
        assert "GET" in refused.headers["Allow"]


async def test_patches_in_languages_that_are_not_spoken_are_415_with_those_that_are(api: Served) -> None:
    await api.make()
    for content_type, told in (
        ("application/strategic-merge-patch+json", "merge-patch+json"),
        ("application/apply-patch+yaml", "server-side apply is not served yet"),
        ("application/json", "merge-patch+json"),
    ):
        refused = await api.call("PATCH", path_of("hubble"), {}, content_type=content_type)
        assert refused.status == 415
        assert told in refused.body["message"]


async def test_a_patch_cannot_rename_or_move_or_retype(api: Served) -> None:
    made = await api.make()
    for patch in (
        {"metadata": {"name": "other"}},
        {"metadata": {"namespace": "other"}},
        {"kind": "Sighting"},
        {"apiVersion": "astro.example.io/v2"},
    ):
        assert (await api.merge(path_of("hubble"), patch)).status == 400
    assert (await api.merge(path_of("hubble"), {"metadata": {"uid": "x"}})).status == 409
    ignored = {"metadata": {"generation": 50, "creationTimestamp": None, "deletionTimestamp": "2026-01-01T00:00:00Z"}}
    assert (await api.merge(path_of("hubble"), ignored)).body == made


async def test_field_validation_can_be_relaxed(api: Served) -> None:
    document = telescope()
    document["spec"]["colour"] = "red"
    strict = await api.post(path_of(), document)
    assert strict.causes == {"spec.colour": 'unknown field "spec.colour"'}
    warned = await api.post(path_of(), document, params={"fieldValidation": "Warn"})
    assert warned.status == 201
    assert "colour" not in warned.body["spec"]
    assert any("spec.colour" in warning for warning in warned.warnings)
    document["metadata"]["name"] = "other"
    ignored = await api.post(path_of(), document, params={"fieldValidation": "Ignore"})
    assert (ignored.status, ignored.warnings) == (201, [])
    assert (await api.post(path_of(), document, params={"fieldValidation": "Maybe"})).status == 422


async def test_status_is_written_by_its_owner_alone(api: Served) -> None:
    made = await api.make()
    path = path_of("hubble", sub="status")
    mine = await api.merge(path, {"status": {"phase": "Ready", "azimuth": 7}}, params={"fieldManager": "telescopes"})
    assert mine.status == 200
    assert (mine.body["status"]["azimuth"], mine.body["spec"]) == (7, made["spec"])
    assert mine.body["metadata"]["generation"] == 1
    foreign = await api.merge(path, {"status": {"cloudCover": 7}}, params={"fieldManager": "telescopes"})
    assert (foreign.status, foreign.body["reason"]) == (403, "Forbidden")
    assert "status.cloudCover (owned by weather)" in foreign.body["message"]
    nobody = await api.merge(path, {"status": {"azimuth": 8}})
    assert nobody.status == 403
    forced = await api.merge(
        path, {"status": {"cloudCover": 7}}, params={"fieldManager": "telescopes", "force": "true"}
    )
    assert forced.status == 200
    assert any("status.cloudCover (owned by weather)" in w for w in forced.warnings)
    assert (await api.get(path)).body == forced.body


async def test_status_and_spec_do_not_leak_into_each_other(api: Served) -> None:
    made = await api.make()
    await api.merge(path_of("hubble"), {"status": {"azimuth": 9}})
    assert (await api.get(path_of("hubble"))).body == made
    document = {**made, "spec": {"site": "ground", "mirror": {"diameterCm": 1}}}
    document["status"] = {**made["status"], "azimuth": 9}
    put = await api.call("PUT", path_of("hubble", sub="status"), document, params={"fieldManager": "telescopes"})
    assert (put.status, put.body["spec"], put.body["status"]["azimuth"]) == (200, made["spec"], 9)


async def test_an_illegal_phase_or_a_wrong_status_is_422(api: Served) -> None:
    await api.make()
    path, manager = path_of("hubble", sub="status"), {"fieldManager": "telescopes"}
    illegal = await api.merge(path, {"status": {"phase": "Exploded"}}, params=manager)
    assert "status.phase" in illegal.causes
    wrong = await api.merge(path, {"status": {"azimuth": "north", "colour": 1}}, params=manager)
    assert wrong.status == 422
    assert "status.azimuth" in wrong.causes


async def test_two_owners_write_one_status_at_once_and_both_are_there(api: Served) -> None:
    await api.make()
    path = path_of("hubble", sub="status")

    async def owner(name: str, field: str) -> None:
        for i in range(1, 20):
            answer = await api.merge(path, {"status": {field: i}}, params={"fieldManager": name})
            assert answer.status == 200, answer.raw

    await asyncio.gather(owner("telescopes", "azimuth"), owner("weather", "cloudCover"))
    status = (await api.get(path)).body["status"]
    assert (status["azimuth"], status["cloudCover"]) == (19, 19)


_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
_any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=6,
)
_names = st.sampled_from(
    [
        "apiVersion",
        "kind",
        "metadata",
        "spec",
        "status",
        "name",
        "namespace",
        "labels",
        "annotations",
        "finalizers",
        "ownerReferences",
        "generateName",
        "uid",
        "resourceVersion",
        "creationTimestamp",
        "site",
        "mirror",
        "diameterCm",
        "diameter_cm",
        "eyepieces",
        "focalMm",
        "tags",
        "note",
        "conditions",
        "phase",
    ]
)
_like = st.recursive(
    _any, lambda inner: st.dictionaries(_names, inner, max_size=4) | st.lists(inner, max_size=2), max_leaves=10
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    metadata=st.dictionaries(_names, _like, max_size=4),
    spec=st.dictionaries(_names, _like, max_size=4),
    verb=st.sampled_from(["POST", "PUT", "PATCH", "STATUS", "MANY"]),
)
async def test_no_document_is_an_internal_error(metadata: dict[str, Any], spec: dict[str, Any], verb: str) -> None:
    """Whatever well-formed JSON comes, the answer is a success or tells what is wrong with it."""
    async with served(MemoryStorage()) as api:
        await api.make()
        body = {"apiVersion": GROUP, "kind": "Telescope", "metadata": {"name": "x", **metadata}, "spec": spec}
        one = path_of("hubble")
        match verb:
            case "POST":
                answer = await api.post(path_of(), body)
            case "PUT":
                answer = await api.call("PUT", one, {**body, "metadata": {**metadata, "name": "hubble"}})
            case "PATCH":
                answer = await api.merge(one, {"metadata": metadata, "spec": spec})
            case "STATUS":
                answer = await api.merge(path_of("hubble", sub="status"), {"status": spec}, params={"force": "true"})
            case _:
                answer = await api.post(f"/apis/{GROUP}", body)
        assert answer.status < 500, answer.raw
        if answer.status >= 400:
            assert answer.body["kind"] == "Status"
        assert Telescope.model_validate((await api.get(one)).body)
