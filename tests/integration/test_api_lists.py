"""Lists: consistent, from the cache, at a revision, page by page; and what they cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import orjson
import pytest

from equipment.api import TELESCOPE, Answer, Served, Telescope, path_of, served, telescope
from lrm.devservers import EtcdServer
from lrm.kind import Kind
from storage.base import Storage
from storage.etcd import EtcdStorage
from storage.memory import MemoryStorage


@pytest.fixture
async def api() -> AsyncIterator[Served]:
    async with served(MemoryStorage()) as it:
        yield it


@pytest.fixture(params=["memory", "etcd"])
async def each_api(request: pytest.FixtureRequest, etcd_root: str) -> AsyncIterator[Served]:
    if request.param == "memory":
        async with served(MemoryStorage(), root=etcd_root) as it:
            yield it
    else:
        etcd: EtcdServer = await request.getfixturevalue("shared_etcds").get("3.5.1")
        async with etcd_storage(etcd.endpoint, etcd_root) as storage, served(storage, root=etcd_root) as it:
            yield it


@asynccontextmanager
async def etcd_storage(endpoint: str, root: str) -> AsyncIterator[Storage]:
    storage = EtcdStorage([endpoint], root=root, instance="api-test")
    try:
        yield storage
    finally:
        await storage.aclose()


def names(answer: Answer) -> list[str]:
    assert answer.status == 200, answer.raw
    return [item["metadata"]["name"] for item in answer.body["items"]]


async def test_a_list_holds_everything_that_was_written_before_it_was_asked_for(each_api: Served) -> None:
    """Written past this daemon's cache, as another daemon writes."""
    for i in range(30):
        await each_api.client.create(Telescope.model_validate(telescope(f"t{i:02}")))
        assert len(names(await each_api.get(path_of()))) == i + 1


async def test_a_list_is_served_at_zero_and_at_least_at_a_revision(each_api: Served) -> None:
    made = await each_api.make()
    version = made["metadata"]["resourceVersion"]
    newer = await each_api.get(path_of(), params={"resourceVersion": version})
    assert names(newer) == ["hubble"]
    assert int(newer.body["metadata"]["resourceVersion"]) >= int(version)
    match = {"resourceVersion": version, "resourceVersionMatch": "NotOlderThan"}
    assert names(await each_api.get(path_of(), params=match)) == ["hubble"]
    assert (await each_api.get(path_of(), params={"resourceVersion": "0"})).status == 200


async def test_a_list_at_exactly_a_revision_is_that_one(each_api: Served) -> None:
    before = (await each_api.make("a"))["metadata"]["resourceVersion"]
    await each_api.make("b")
    exact = await each_api.get(path_of(), params={"resourceVersion": before, "resourceVersionMatch": "Exact"})
    assert names(exact) == ["a"]
    assert exact.body["metadata"]["resourceVersion"] == before


async def test_a_revision_that_has_not_happened_is_410_so_that_clients_list_anew(each_api: Served) -> None:
    """What a client of a store that was restored to an earlier state holds in its hands."""
    await each_api.make()
    for params in ({"resourceVersion": "900000000"}, {"resourceVersion": "900000000", "resourceVersionMatch": "Exact"}):
        refused = await each_api.get(path_of(), params=params)
        assert (refused.status, refused.body["reason"]) == (410, "Expired")


async def test_selectors_choose(each_api: Served) -> None:
    await each_api.make("a", labels={"track": "ccna"})
    await each_api.make("b", labels={"track": "ccnp"})
    await each_api.make("c", "elsewhere", labels={"track": "ccnp"})
    assert names(await each_api.get(path_of(), params={"labelSelector": "track in (ccnp)"})) == ["b"]
    assert names(await each_api.get(path_of(namespace=""), params={"labelSelector": "track=ccnp"})) == ["b", "c"]
    assert names(await each_api.get(path_of(), params={"fieldSelector": "metadata.name!=a"})) == ["b"]
    assert names(
        await each_api.get(path_of(namespace=""), params={"fieldSelector": "metadata.namespace=elsewhere"})
    ) == ["c"]
    assert names(await each_api.get(path_of(), params={"fieldSelector": "status.phase=PENDING,spec.site=ORBIT"})) == [
        "a",
        "b",
    ]


async def test_pages_together_are_one_revision_whatever_is_written_meanwhile(each_api: Served) -> None:
    """Namespaces that begin alike are in the order of whole keys, in the cache as in the store."""
    everything = []
    for namespace in ("a", "a-b", "b"):
        for i in range(7):
            await each_api.make(f"t{i}", namespace, labels={"odd": str(i % 2)})
            everything.append((namespace, f"t{i}"))
    for selector in ("", "odd=1"):
        found: list[tuple[str, str]] = []
        versions, token, pages = set(), "", 0
        while pages == 0 or token:
            params = {"limit": "4", "labelSelector": selector} | ({"continue": token} if token else {})
            page = (await each_api.get(path_of(namespace=""), params=params)).body
            found += [(i["metadata"]["namespace"], i["metadata"]["name"]) for i in page["items"]]
            versions.add(page["metadata"]["resourceVersion"])
            token, pages = page["metadata"].get("continue", ""), pages + 1
            await each_api.make(f"new{pages}", "a", labels={"odd": "1"})
            await each_api.call("DELETE", path_of("t6", namespace="b"))
        assert len(versions) == 1
        expected = [e for e in everything if not selector or int(e[1][1]) % 2]
        assert sorted(f for f in found if not f[1].startswith("new")) == sorted(e for e in expected if e in found)
        assert len(found) == len(set(found))
        if not selector:
            assert pages == 6
            assert sorted(found) == sorted(everything)
            for i in range(1, pages + 1):
                await each_api.call("DELETE", path_of(f"new{i}", namespace="a"))


async def test_the_first_page_says_how_many_remain_where_nothing_is_selected(api: Served) -> None:
    for i in range(5):
        await api.make(f"t{i}")
    page = (await api.get(path_of(), params={"limit": "2"})).body["metadata"]
    assert page["remainingItemCount"] == 3
    selected = (await api.get(path_of(), params={"limit": "2", "fieldSelector": "metadata.name!=t0"})).body["metadata"]
    assert "remainingItemCount" not in selected
    whole = (await api.get(path_of(), params={"limit": "5"})).body["metadata"]
    assert "continue" not in whole


async def test_long_lists_are_paged_across_the_stores_own_pages(api: Served) -> None:
    await fill(api, 1203)
    found: list[str] = []
    token = ""
    while True:
        page = await api.get(path_of(), params={"limit": "250"} | ({"continue": token} if token else {}))
        found += names(page)
        token = page.body["metadata"].get("continue", "")
        if not token:
            break
    assert found == [f"t{i:05}" for i in range(1203)]


async def test_a_token_is_good_for_its_own_list_alone(api: Served) -> None:
    for i in range(3):
        await api.make(f"t{i}")
    token = (await api.get(path_of(), params={"limit": "1"})).body["metadata"]["continue"]
    for path, params in (
        (path_of(), {"labelSelector": "a=b"}),
        (path_of(), {"fieldSelector": "metadata.name=t1"}),
        (path_of(namespace=""), {}),
        (path_of(namespace="other"), {}),
        (path_of(plural="sightings"), {}),
        (path_of(), {"resourceVersion": "1"}),
    ):
        refused = await api.get(path, params={"limit": "1", "continue": token, **params})
        assert (refused.status, refused.body["reason"]) == (400, "BadRequest")


async def test_pages_of_a_compacted_revision_are_410(each_api: Served) -> None:
    for i in range(4):
        await each_api.make(f"t{i}")
    token = (await each_api.get(path_of(), params={"limit": "1"})).body["metadata"]["continue"]
    head = await each_api.make("later")
    await each_api.storage.compact(int(head["metadata"]["resourceVersion"]))
    expired = await each_api.get(path_of(), params={"limit": "1", "continue": token})
    assert (expired.status, expired.body["reason"]) == (410, "Expired")


async def test_reads_at_zero_go_on_while_the_cache_is_not_fed(api: Served) -> None:
    """The store is away: what needs it is 503 or 504 with advice, what does not is served."""
    await api.make()
    await api.get(path_of())
    await api.storage.aclose()
    assert names(await api.get(path_of(), params={"resourceVersion": "0"})) == ["hubble"]
    assert (await api.get(path_of("hubble"), params={"resourceVersion": "0"})).status == 200
    assert (await api.get(path_of("gone"), params={"resourceVersion": "0"})).status == 404
    for answer, code in ((await api.get(path_of()), 504), (await api.get(path_of("hubble")), 503)):
        assert answer.status == code
        assert int(answer.headers["Retry-After"]) > 0
    for answer in (await api.post(path_of(), telescope("x")), await api.call("DELETE", path_of("hubble"))):
        assert (answer.status, answer.body["reason"]) == (503, "ServiceUnavailable")
        assert "Retry-After" in answer.headers


async def test_before_the_first_list_nothing_is_guessed(etcd_root: str) -> None:
    storage = MemoryStorage()
    await storage.aclose()
    async with served(storage, wait_synced=False) as api:
        for params in ({}, {"resourceVersion": "0"}, {"watch": "true"}):
            early = await api.get(path_of(), params=params)
            assert (early.status, early.body["reason"]) == (504, "Timeout")
            assert "Retry-After" in early.headers


@pytest.mark.parametrize("accept", ["application/json;as=Table;v=v1;g=meta.k8s.io", "application/yaml"])
async def test_lists_and_objects_come_in_other_forms(api: Served, accept: str) -> None:
    await api.make()
    for path in (path_of(), path_of("hubble")):
        answer = await api.get(path, headers={"Accept": accept})
        assert answer.status == 200
        if "Table" in accept:
            assert [row["cells"][:3] for row in answer.body["rows"]] == [["hubble", "orbit", "Pending"]]
        else:
            assert b"kind: Telescope" in answer.raw


async def test_a_table_can_carry_whole_objects(api: Served) -> None:
    await api.make()
    accept = {"Accept": "application/json;as=Table;v=v1;g=meta.k8s.io"}
    whole = await api.get(path_of(), headers=accept, params={"includeObject": "Object"})
    assert whole.body["rows"][0]["object"]["spec"]["site"] == "orbit"


async def test_metadata_alone_can_be_asked_for(api: Served) -> None:
    await api.make()
    accept = {"Accept": "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"}
    [item] = (await api.get(path_of(), headers=accept)).body["items"]
    assert item["metadata"]["name"] == "hubble"
    assert "spec" not in item


async def test_what_is_spliced_is_what_would_be_written_out(api: Served) -> None:
    """Lists send stored bytes with the resourceVersion put in; the result is the object as the model writes it."""
    await api.make(labels={"a": "b"}, annotations={"n": 'x\n"quoted" \\ é'})
    raw = (await api.get(path_of())).raw
    entry = await api.storage.get("/lrm/r/telescopes/default/hubble")
    assert orjson.loads(raw)["items"] == [TELESCOPE.document(TELESCOPE.decode(entry))]


async def test_five_thousand_objects_are_listed_faster_than_they_can_be_written_out(api: Served) -> None:
    """A ratio, not a time: serialising each object anew would compute for longer than the whole request does."""
    await fill(api, 5000)
    resources = [item.resource for item in api.cache.items(TELESCOPE)]
    written_out = _fastest(lambda: [orjson.dumps(TELESCOPE.document(r)) for r in resources])

    async def listed() -> float:
        began = time.process_time()
        answer = await api.get(path_of())
        took = time.process_time() - began
        assert len(answer.body["items"]) == 5000
        return took

    took = min([await listed() for _ in range(3)])
    print(f"list of 5,000: {took * 1000:.0f} ms of CPU over HTTP; {written_out * 1000:.0f} ms only to serialise them")
    assert took < written_out


def _fastest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(2):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


async def fill(api: Served, count: int, kind: Kind[Telescope] = TELESCOPE) -> None:
    """Many objects, straight into the store."""
    template = kind.encode(Telescope.model_validate(telescope("NAME")))
    for i in range(count):
        name = f"t{i:05}"
        await api.storage.create(api.registry.key(kind, "default", name), template.replace(b"NAME", name.encode()))
    async with asyncio.timeout(30):
        await api.cache.barrier(30)
