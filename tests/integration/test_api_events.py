"""Events over HTTP: told by a recorder, listed, selected, paged and watched, on the memory store and a real etcd."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from equipment.api import Served, Telescope, served, telescope, tokens_file
from lrm.api import events as module
from lrm.events import Events, Recorder, events_prefix
from storage.etcd import EtcdStorage
from storage.memory import MemoryStorage

EVERYWHERE = "/api/v1/events"
TABLE = {"Accept": "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"}


def at(namespace: str = "default", name: str = "") -> str:
    return f"/api/v1/namespaces/{namespace}/events" + (f"/{name}" if name else "")


class Scene:
    """An API and somebody who tells events of telescopes."""

    def __init__(self, api: Served, events: Events) -> None:
        self.api = api
        self._events = events
        self._recorder: Recorder = events.recorder("dome")

    async def tell(
        self, message: str = "clouds", reason: str = "Closed", name: str = "hubble", namespace: str = "default"
    ) -> None:
        """One event that is surely stored."""
        about = Telescope.model_validate(telescope(name, namespace=namespace, uid=f"uid-{name}"))
        self._recorder.record(about, "Warning" if reason == "Broken" else "Normal", reason, message)
        await self._events.flush(10)

    async def list(self, path: str = EVERYWHERE, **params: str) -> dict[str, Any]:
        answer = await self.api.get(path, params=params)
        assert answer.status == 200, answer.raw
        found: dict[str, Any] = answer.body
        return found

    async def messages(self, path: str = EVERYWHERE, **params: str) -> list[str]:
        return [event["message"] for event in (await self.list(path, **params))["items"]]


@asynccontextmanager
async def telling(storage: Any, root: str, **settings: Any) -> AsyncIterator[Scene]:
    async with served(storage, root=root, **settings) as api:
        events = Events(storage, api.api.clock, root=root, instance="host-a")
        writing = asyncio.create_task(events.run())
        try:
            yield Scene(api, events)
        finally:
            writing.cancel()
            await asyncio.wait([writing])


@pytest.fixture(params=["memory", "etcd"])
async def scene(request: pytest.FixtureRequest, etcd_root: str) -> AsyncIterator[Scene]:
    if request.param == "memory":
        async with telling(MemoryStorage(), etcd_root) as it:
            yield it
        return
    etcd = await request.getfixturevalue("shared_etcds").get("3.5.1")
    storage = EtcdStorage([etcd.endpoint], root=etcd_root, instance="api-test")
    async with telling(storage, etcd_root) as it:
        yield it
    await storage.aclose()


async def test_events_are_listed_by_namespace_and_read_one_by_one(scene: Scene) -> None:
    await scene.tell("a")
    await scene.tell("b", namespace="other")
    everywhere = await scene.list()
    assert (everywhere["kind"], everywhere["apiVersion"]) == ("EventList", "v1")
    assert [e["message"] for e in everywhere["items"]] == ["a", "b"]
    assert await scene.messages(at("other")) == ["b"]
    assert await scene.messages(at("nowhere")) == []
    event = everywhere["items"][0]
    assert event["metadata"]["resourceVersion"]
    assert (await scene.api.get(at(name=event["metadata"]["name"]))).body == event
    missing = await scene.api.get(at(name="nothing"))
    assert (missing.status, missing.body["message"]) == (404, 'events "nothing" not found')


async def test_a_value_that_is_no_event_is_left_out_of_lists_and_named_when_asked_for(scene: Scene) -> None:
    await scene.tell("a")
    key = f"{events_prefix(scene.api.registry.root, 'default')}odd"
    await scene.api.storage.create(key, b"[]")
    assert await scene.messages() == ["a"]
    answer = await scene.api.get(at(name="odd"))
    assert (answer.status, key in answer.body["message"]) == (500, True)


async def test_field_selectors_find_what_is_told_of_one_object(scene: Scene) -> None:
    await scene.tell("a1", "Opened")
    await scene.tell("a2", "Broken")
    await scene.tell("b", "Opened", name="hubble.two")
    await scene.tell("c", "Opened", name="webb", namespace="other")
    for selector, found in (
        ("involvedObject.name=hubble,involvedObject.namespace=default,involvedObject.uid=uid-hubble", ["a1", "a2"]),
        ("involvedObject.name=hubble.two", ["b"]),
        ("involvedObject.name=nothing", []),
        ("involvedObject.name=hubble,involvedObject.name=webb", []),
        ("involvedObject.name!=hubble", ["b", "c"]),
        ("involvedObject.kind=Telescope,involvedObject.apiVersion=astro.example.io/v1,type!=Warning", ["a1", "b", "c"]),
        ("type=Warning", ["a2"]),
        ("reason=Opened,metadata.namespace=other", ["c"]),
        ("source=dome,reportingComponent=dome,involvedObject.kind=Sighting", []),
    ):
        assert await scene.messages(fieldSelector=selector) == found, selector
    assert await scene.messages(at(), fieldSelector="involvedObject.name=hubble") == ["a1", "a2"]
    assert await scene.messages(labelSelector="a=b") == []
    refused = await scene.api.get(EVERYWHERE, params={"fieldSelector": "message=a"})
    assert (refused.status, "field label not supported" in refused.body["message"]) == (400, True)


async def test_long_lists_come_in_pages_of_one_revision(scene: Scene) -> None:
    for number in range(5):
        await scene.tell(f"{number}", name=f"t{number}")
    first = await scene.list(limit="2", fieldSelector="reason=Closed")
    await scene.tell("late", name="t9")
    token = first["metadata"]["continue"]
    second = await scene.list(limit="2", fieldSelector="reason=Closed", **{"continue": token})
    last = await scene.list(limit="2", fieldSelector="reason=Closed", **{"continue": second["metadata"]["continue"]})
    assert [e["message"] for page in (first, second, last) for e in page["items"]] == ["0", "1", "2", "3", "4"]
    assert "continue" not in last["metadata"]
    assert second["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    foreign = await scene.api.get(EVERYWHERE, params={"limit": "2", "continue": token})
    assert foreign.status == 400
    exact = {"resourceVersion": first["metadata"]["resourceVersion"], "resourceVersionMatch": "Exact"}
    assert "late" not in await scene.messages(**exact)
    assert (await scene.api.get(EVERYWHERE, params={"resourceVersion": "999999999"})).status == 410


async def test_kubectls_table_tells_when_what_and_how_often(scene: Scene) -> None:
    await scene.tell()
    await scene.tell()
    table = (await scene.api.get(at(), headers=TABLE)).body
    assert [c["name"] for c in table["columnDefinitions"] if not c["priority"]] == [
        "Last Seen",
        "Type",
        "Reason",
        "Object",
        "Message",
    ]
    [row] = table["rows"]
    cells = dict(zip((c["name"] for c in table["columnDefinitions"]), row["cells"], strict=True))
    assert cells["Last Seen"].endswith("s")
    assert (cells["Object"], cells["Count"], cells["Source"]) == ("telescope/hubble", 2, "dome, host-a")
    assert row["object"]["kind"] == "PartialObjectMetadata"
    whole = (await scene.api.get(at(), headers=TABLE, params={"includeObject": "Object"})).body
    assert whole["rows"][0]["object"]["count"] == 2
    one = (await scene.api.get(at(name=cells["Name"]), headers=TABLE)).body
    assert one["rows"][0]["cells"] == whole["rows"][0]["cells"]


async def test_a_watch_tells_new_events_counts_and_ends(scene: Scene) -> None:
    await scene.tell("before")
    version = (await scene.list())["metadata"]["resourceVersion"]
    selector = "involvedObject.name=hubble"
    async with scene.api.watch(at(), resourceVersion=version, fieldSelector=selector) as watch:
        await scene.tell("of another", name="webb")
        await scene.tell("after")
        await scene.tell("after")
        added, counted = await watch.next(), await watch.next()
        assert (added["type"], added["object"]["message"]) == ("ADDED", "after")
        assert (counted["type"], counted["object"]["count"]) == ("MODIFIED", 2)
        stored = (await scene.api.storage.list(events_prefix(scene.api.registry.root))).entries
        [entry] = [e for e in stored if b"after" in e.value]
        deleted = await scene.api.storage.delete(entry.key, expected_revision=entry.revision)
        ended = await watch.next()
        assert (ended["type"], ended["object"]["message"]) == ("DELETED", "after")
        assert int(ended["object"]["metadata"]["resourceVersion"]) == deleted


async def test_a_watch_without_a_version_begins_with_what_is_there(scene: Scene) -> None:
    await scene.tell("a")
    async with scene.api.watch(at()) as watch:
        assert (await watch.next())["object"]["message"] == "a"
        await scene.tell("b", "Opened")
        assert (await watch.next())["object"]["message"] == "b"
    async with scene.api.watch(
        EVERYWHERE, sendInitialEvents="true", allowWatchBookmarks="true", resourceVersionMatch="NotOlderThan"
    ) as watch:
        told = [await watch.next() for _ in range(3)]
        assert [e["type"] for e in told] == ["ADDED", "ADDED", "BOOKMARK"]
        assert told[2]["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}


async def test_long_lists_and_watches_give_the_event_loop_back_between_slices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage, root, count = MemoryStorage(), "/lrm", 1700
    event = {"kind": "Event", "apiVersion": "v1", "involvedObject": {"kind": "Telescope", "name": "hubble"}}
    for number in range(count):
        meta = {"name": f"hubble.{number:06}", "namespace": "default"}
        key = f"{events_prefix(root, 'default')}{meta['name']}"
        await storage.create(key, orjson.dumps({**event, "metadata": meta, "message": str(number)}))
    seen: Counter[tuple[str, int]] = Counter()
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    def counted(of: Any, name: str) -> None:
        done = getattr(of, name)

        def count_it(*args: Any, **kwargs: Any) -> Any:
            seen[name, turns] += 1
            return done(*args, **kwargs)

        monkeypatch.setattr(of, name, count_it)

    for of, name in ((module, "_document"), (module, "_cells"), (module._EventStream, "told")):
        counted(of, name)
    async with telling(storage, root) as scene:
        turning = asyncio.create_task(turn())
        try:
            everything = (await scene.list())["items"]
            assert [e["message"] for e in everything] == [str(number) for number in range(count)]
            table = await scene.api.get(EVERYWHERE, headers=TABLE)
            assert [row["cells"][5] for row in table.body["rows"]] == [str(number) for number in range(count)]
            assert table.body["columnDefinitions"]
            async with scene.api.watch(EVERYWHERE) as watch:
                for number in range(count):
                    line = await watch.next()
                    assert (line["type"], line["object"]["message"]) == ("ADDED", str(number))
        finally:
            turning.cancel()
            await asyncio.wait([turning])
    assert {name for name, _ in seen} == {"_document", "_cells", "told"}
    assert max(seen.values()) <= 500, seen


async def test_a_watch_from_a_forgotten_revision_is_told_to_list_again(scene: Scene) -> None:
    await scene.tell("a")
    old = (await scene.list())["metadata"]["resourceVersion"]
    await scene.tell("b")
    await scene.api.storage.compact(await scene.api.storage.current_revision())
    answer = await scene.api.get(at(), params={"watch": "1", "resourceVersion": old})
    assert (answer.status, answer.body["reason"]) == (410, "Expired")


async def test_there_are_few_watches_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_WATCHES", 1)
    async with telling(MemoryStorage(), "/lrm") as scene:
        async with scene.api.watch(at()):
            assert (await scene.api.get(at(), params={"watch": "1"})).status == 429
        reconnected = aiohttp.ClientTimeout(total=5)
        assert (await scene.api.get(at(), params={"timeoutSeconds": "1"}, timeout=reconnected)).status == 200


async def test_events_are_read_by_who_may_read_the_namespace(tmp_path: Path) -> None:
    entry = {"name": "v", "sha256": hashlib.sha256(b"v").hexdigest(), "role": "viewer", "namespaces": ["mine"]}
    tokens = tokens_file(tmp_path, entry)
    async with telling(MemoryStorage(), "/lrm", tokens_file=tokens) as scene:
        headers = {"Authorization": "Bearer v"}
        assert (await scene.api.get(at("mine"), headers=headers)).status == 200
        for path in (EVERYWHERE, at("other"), at("other", "x")):
            assert (await scene.api.get(path, headers=headers)).status == 403, path
        for method in ("POST", "DELETE"):
            assert (await scene.api.call(method, at("mine"), headers=headers)).status == 405
