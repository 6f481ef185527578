"""The adapter with the original names behaves as its signatures say, on every backend."""

from __future__ import annotations

import asyncio

import pytest

from equipment.backends import Backend
from storage.adapter import Change, EtcdStorageBackend
from storage.base import Storage
from storage.errors import StorageError


@pytest.fixture
def adapter(backend: Backend) -> EtcdStorageBackend:
    return EtcdStorageBackend(backend.store, backend.prefix)


async def test_values_are_dictionaries_and_absence_is_an_answer(adapter: EtcdStorageBackend) -> None:
    assert await adapter.get("a") is None
    assert not await adapter.exists("a")
    assert not await adapter.delete("a")
    await adapter.set("a", {"spec": {"n": 1}})
    assert await adapter.get("a") == {"spec": {"n": 1}}
    assert await adapter.exists("a")
    assert await adapter.keys("*") == ["a"]
    assert await adapter.delete("a")
    assert await adapter.keys("*") == []


async def test_labels_select_values(adapter: EtcdStorageBackend) -> None:
    red = {"metadata": {"labels": {"colour": "red"}}}
    await adapter.set("a", red)
    await adapter.set("b", {"metadata": {"labels": {"colour": "blue"}}})
    await adapter.set("c", {"metadata": {"labels": None}})
    await adapter.set("d", {"metadata": "odd"})
    assert await adapter.list_with_labels({"colour": "red"}) == [red]
    assert len(await adapter.list_with_labels({})) == 4


async def test_swapping_compares_objects_and_none_means_absent(adapter: EtcdStorageBackend) -> None:
    assert await adapter.compare_and_swap("a", None, {"x": 1, "y": 2})
    assert not await adapter.compare_and_swap("a", None, {"x": 0})
    assert await adapter.compare_and_swap("a", {"y": 2, "x": 1}, {"x": 2})
    assert not await adapter.compare_and_swap("a", {"x": 1, "y": 2}, {"x": 3})
    assert not await adapter.compare_and_swap("b", {"x": 1}, {"x": 3})
    assert await adapter.get("a") == {"x": 2}


async def test_of_concurrent_swaps_none_is_lost(adapter: EtcdStorageBackend) -> None:
    await adapter.set("n", {"n": 0})

    async def increment() -> None:
        done = 0
        while done < 5:
            value = await adapter.get("n")
            assert value is not None
            done += await adapter.compare_and_swap("n", value, {"n": value["n"] + 1})

    await asyncio.gather(*(increment() for _ in range(4)))
    assert await adapter.get("n") == {"n": 20}


async def test_a_watch_calls_back_in_order(adapter: EtcdStorageBackend, store: Storage) -> None:
    seen: asyncio.Queue[Change] = asyncio.Queue()
    watching = asyncio.create_task(adapter.watch(seen.put, "w/"))
    changes = []
    async with asyncio.timeout(30):
        while seen.empty():  # The watch opens at some moment: write until it is heard.
            await adapter.set("w/a", {"n": 0})
            await asyncio.sleep(0.02)
        await adapter.set("v/a", {"n": 1})
        await adapter.set("w/a", {"n": 2})
        await adapter.delete("w/a")
        while not changes or changes[-1].type != "delete":
            changes.append(await seen.get())
    assert changes[-2] == Change("put", "w/a", {"n": 2}, changes[-1].revision - 1)
    assert changes[-1] == Change("delete", "w/a", None, await store.current_revision())
    watching.cancel()
    await asyncio.wait({watching})


async def test_a_value_that_is_no_object_is_an_error(adapter: EtcdStorageBackend, backend: Backend) -> None:
    for raw in (b"[]", b"{", b"\xff"):
        await backend.store.set(backend.key("a"), raw)
        with pytest.raises(StorageError):
            await adapter.get("a")
        with pytest.raises(StorageError):
            await adapter.list_with_labels({"a": "b"})
