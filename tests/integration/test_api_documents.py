"""Several documents in one POST: all or nothing up to the first write, then a result for each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import yaml

from equipment.api import GROUP, Answer, Served, Telescope, path_of, served, telescope
from storage.base import Entry, Guard
from storage.errors import OutcomeUnknown
from storage.memory import MemoryStorage

PATH = f"/apis/{GROUP}"


@pytest.fixture
async def api() -> AsyncIterator[Served]:
    async with served(MemoryStorage()) as it:
        yield it


async def apply(api: Served, *documents: Any, **options: Any) -> Answer:
    return await api.post(PATH, yaml.safe_dump_all(documents), content_type="application/yaml", **options)


def results(answer: Answer) -> list[tuple[str, str]]:
    assert answer.body["kind"] == "ApplyResultList"
    return [(item["name"], item["result"]) for item in answer.body["items"]]


async def test_each_is_created_then_unchanged_then_configured(api: Served) -> None:
    documents = [telescope(f"t{i}") for i in range(3)]
    first = await apply(api, *documents)
    assert (first.status, results(first)) == (200, [(f"t{i}", "created") for i in range(3)])
    second = await apply(api, *documents)
    assert results(second) == [(f"t{i}", "unchanged") for i in range(3)]
    assert [i["resourceVersion"] for i in second.body["items"]] == [i["resourceVersion"] for i in first.body["items"]]
    documents[1]["spec"]["tracking"] = True
    third = await apply(api, *documents)
    assert [result for _, result in results(third)] == ["unchanged", "configured", "unchanged"]
    assert third.body["items"][1]["index"] == 1


async def test_the_spec_is_replaced_and_labels_and_annotations_are_merged(api: Served) -> None:
    await api.make("t", labels={"keep": "1", "change": "1"}, annotations={"keep": "1"}, finalizers=["example.io/hold"])
    await api.merge(path_of("t"), {"spec": {"note": "old"}})
    await apply(api, telescope("t", labels={"change": "2", "new": "2"}))
    stored = (await api.get(path_of("t"))).body
    assert stored["metadata"]["labels"] == {"keep": "1", "change": "2", "new": "2"}
    assert stored["metadata"]["annotations"] == {"keep": "1"}
    assert stored["metadata"]["finalizers"] == ["example.io/hold"]
    assert "note" not in stored["spec"]


async def test_one_json_object_and_a_list_are_taken_too(api: Served) -> None:
    assert results(await api.post(PATH, telescope("one"))) == [("one", "created")]
    listed = {"apiVersion": "v1", "kind": "List", "items": [telescope("two"), telescope("three")]}
    assert results(await api.post(PATH, listed)) == [("two", "created"), ("three", "created")]
    bad = {**listed, "items": [telescope("four"), telescope("Five")]}
    refused = await api.post(PATH, bad)
    assert set(refused.causes) == {"[0].items[1].metadata.name"}


async def test_every_error_of_every_document_is_told_with_its_place_and_nothing_is_stored(api: Served) -> None:
    wrong = telescope("t3")
    wrong["spec"] = {"site": "x", "mirror": {"diameterCm": 0}, "colour": "red"}
    refused = await apply(
        api,
        telescope("t0"),
        {"kind": "Telescope", "metadata": {"name": "t1"}},
        {**telescope("t2"), "kind": "Comet"},
        wrong,
        telescope("t0"),
        "just text",
        {**telescope("t6"), "apiVersion": "other.io/v1"},
        telescope("T7"),
    )
    assert (refused.status, refused.body["reason"]) == (422, "Invalid")
    assert set(refused.causes) == {
        "[1].apiVersion",
        "[2].kind",
        "[3].spec.mirror.diameterCm",
        "[3].spec.colour",
        "[4].metadata.name",
        "[5]",
        "[6].apiVersion",
        "[7].metadata.name",
    }
    assert "the same object as [0]" in refused.causes["[4].metadata.name"]
    assert (await api.storage.list("/")).entries == ()


async def test_the_same_name_in_two_namespaces_is_two_objects(api: Served) -> None:
    answer = await apply(api, telescope("t", namespace="a"), telescope("t", namespace="b"), telescope("t"))
    assert [i["namespace"] for i in answer.body["items"]] == ["a", "b", "default"]


async def test_rules_about_what_is_stored_are_asked_before_the_first_write(api: Served) -> None:
    await api.make("moving", site="here")
    refused = await apply(api, telescope("new"), telescope("moving", site="there"))
    assert refused.causes == {"[1].spec.site": "is immutable"}
    assert (await api.get(path_of("new"))).status == 404


async def test_a_kind_that_users_may_not_create_refuses_the_whole_request(api: Served) -> None:
    sighting = {"apiVersion": GROUP, "kind": "Sighting", "metadata": {"name": "s"}, "spec": {"telescope": "t"}}
    refused = await apply(api, telescope("t"), sighting)
    assert (refused.status, refused.body["reason"]) == (403, "Forbidden")
    assert set(refused.causes) == {"[1]"}
    assert (await api.storage.list("/")).entries == ()


async def test_a_document_may_hold_for_one_state_alone(api: Served) -> None:
    made = await api.make("t")
    version = made["metadata"]["resourceVersion"]
    await api.merge(path_of("t"), {"spec": {"tracking": True}})
    late = await apply(api, telescope("new"), telescope("t", resourceVersion=version))
    assert (late.status, late.body["reason"]) == (409, "Conflict")
    assert set(late.causes) == {"[1].metadata.resourceVersion"}
    assert (await api.get(path_of("new"))).status == 404


async def test_a_dry_run_stores_nothing(api: Served) -> None:
    answer = await apply(api, telescope("t"), params={"dryRun": "All"})
    assert results(answer) == [("t", "created")]
    assert (await api.storage.list("/")).entries == ()


async def test_limits_are_told(api: Served) -> None:
    many = await apply(api, *(telescope(f"t{i}") for i in range(501)))
    assert many.status == 400
    assert "more than 500 documents" in many.body["message"]
    listed = {"kind": "List", "items": [telescope(f"t{i}") for i in range(501)]}
    assert (await api.post(PATH, listed)).status == 413
    assert (await apply(api)).status == 400
    assert (await api.post("/apis/other.io/v1", telescope())).status == 404
    assert (await api.storage.list("/")).entries == ()


async def test_generated_names_are_always_new(api: Served) -> None:
    document = telescope()
    document["metadata"] = {"generateName": "t-"}
    answer = await apply(api, document, document)
    names = {name for name, result in results(answer) if result == "created"}
    assert len(names) == 2
    assert all(name.startswith("t-") for name in names)


async def test_two_that_apply_the_same_at_once_both_succeed(api: Served) -> None:
    documents = [telescope(f"t{i}") for i in range(20)]
    answers = await asyncio.gather(*(apply(api, *documents) for _ in range(3)))
    assert [a.status for a in answers] == [200, 200, 200]
    created = [name for a in answers for name, result in results(a) if result == "created"]
    assert sorted(created) == sorted(f"t{i}" for i in range(20))


class LosesOneReply(MemoryStorage):
    """A store of which one create's reply is lost: made, and not known to be."""

    async def create(self, key: str, value: bytes, *, lease: int = 0, guards: tuple[Guard, ...] = ()) -> Entry:
        entry = await super().create(key, value, lease=lease, guards=guards)
        if key.endswith("/lost"):
            raise OutcomeUnknown("the reply was lost")
        return entry


async def test_what_the_store_refuses_is_told_for_each_with_207() -> None:
    async with served(LosesOneReply()) as api:
        answer = await apply(api, telescope("before"), telescope("lost"), telescope("after"))
        assert answer.status == 207
        assert results(answer) == [("before", "created"), ("lost", "failed"), ("after", "created")]
        error = answer.body["items"][1]["error"]
        assert (error["kind"], error["code"], error["reason"]) == ("Status", 504, "Timeout")
        assert "may have been made" in error["message"]
        assert "retryAfterSeconds" not in error["details"]
        single = await api.post(path_of(namespace="other"), telescope("lost"))
        assert (single.status, single.body["reason"]) == (504, "Timeout")
        assert "Retry-After" not in single.headers
        assert Telescope.model_validate((await api.get(path_of("lost"))).body)
