"""Promise 2: a list is one revision, however many pages; and what keys, count and labels show."""

from __future__ import annotations

import asyncio

import pytest

from equipment.backends import Backend
from storage.base import Entry, Page, Storage
from storage.errors import Compacted, FutureRevision, InvalidKey, StorageError


async def fill(backend: Backend, names: list[str]) -> list[Entry]:
    return [await backend.store.create(backend.key(name), name.encode()) for name in names]


async def pages(store: Storage, prefix: str, limit: int) -> list[Page]:
    """Every page of a list, each with its revision."""
    found = [await store.list(prefix, limit=limit)]
    while found[-1].continue_token:
        found.append(await store.list(prefix, limit=limit, continue_token=found[-1].continue_token))
    return found


async def test_a_list_shows_what_lies_below_its_prefix_in_key_order(backend: Backend, store: Storage) -> None:
    entries = await fill(backend, ["b/1", "a/2", "a/1", "ab/1", "c"])
    page = await store.list(backend.key("a/"))
    assert page == Page((entries[2], entries[1]), await store.current_revision())
    everything = await store.list(backend.prefix)
    assert [e.key for e in everything.entries] == sorted(e.key for e in entries)
    assert (await store.list(backend.key("nothing/"))).entries == ()


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8])
async def test_pages_join_to_the_whole_list_at_one_revision_while_others_write(
    backend: Backend, store: Storage, limit: int
) -> None:
    entries = await fill(backend, [f"k{i}" for i in range(7)])
    first = await store.list(backend.prefix, limit=limit)
    await store.delete(entries[6].key, expected_revision=entries[6].revision)
    await store.create(backend.key("k33"), b"new")
    await store.update(entries[5].key, b"changed", expected_revision=entries[5].revision)
    found, token = list(first.entries), first.continue_token
    while token:
        page = await store.list(backend.prefix, limit=limit, continue_token=token)
        assert page.revision == first.revision
        assert 0 < len(page.entries) <= limit
        found += page.entries
        token = page.continue_token
    assert found == entries
    assert [e.key for e in (await store.list(backend.prefix)).entries] != [e.key for e in entries]


async def test_a_list_longer_than_one_request_is_still_one_revision(backend: Backend, store: Storage) -> None:
    names = [f"n{i:04}" for i in range(1100)]
    for start in range(0, len(names), 50):
        await asyncio.gather(*(store.create(backend.key(n), b"v") for n in names[start : start + 50]))

    async def overwrite() -> None:
        for i in range(200):
            await store.set(backend.key(f"n{1099 - i:04}"), str(i).encode())

    writing = asyncio.create_task(overwrite())
    page = await store.list(backend.prefix)
    assert [e.key for e in page.entries] == [backend.key(n) for n in names]
    assert max(e.revision for e in page.entries) <= page.revision
    await writing
    again = await store.list(backend.prefix, revision=page.revision)
    assert again == page
    assert await store.count(backend.prefix) == len(names)
    assert await store.keys(f"{backend.prefix}n*") == [backend.key(n) for n in names]


async def test_large_values_are_listed_too(backend: Backend, store: Storage) -> None:
    for i in range(12):
        await store.set(backend.key(f"big{i:02}"), bytes([i]) * 1024 * 1024)
    page = await store.list(backend.prefix)
    assert [(e.key, e.value[:1], len(e.value)) for e in page.entries] == [
        (backend.key(f"big{i:02}"), bytes([i]), 1024 * 1024) for i in range(12)
    ]


async def test_a_list_at_a_revision_shows_the_past(backend: Backend, store: Storage) -> None:
    a, b = await fill(backend, ["a", "b"])
    await store.delete(a.key, expected_revision=a.revision)
    await store.update(b.key, b"later", expected_revision=b.revision)
    assert (await store.list(backend.prefix, revision=b.revision)) == Page((a, b), b.revision)
    assert (await store.list(backend.prefix, revision=a.revision)) == Page((a,), a.revision)


async def test_a_list_at_a_compacted_revision_is_an_error(backend: Backend, store: Storage) -> None:
    entries = await fill(backend, ["a", "b", "c"])
    page = await store.list(backend.prefix, limit=1)
    await store.set(backend.key("z"), b"")
    now = await store.current_revision()
    await store.compact(now)
    assert len((await store.list(backend.prefix, revision=now)).entries) == 4
    with pytest.raises(Compacted):
        await store.list(backend.prefix, revision=entries[0].revision)
    with pytest.raises(Compacted):
        await store.list(backend.prefix, limit=1, continue_token=page.continue_token)


async def test_a_list_at_a_revision_to_come_is_an_error_that_shows_the_head(backend: Backend, store: Storage) -> None:
    head = await store.current_revision()
    with pytest.raises(FutureRevision) as caught:
        await store.list(backend.prefix, revision=head + 1000)
    assert (caught.value.asked, caught.value.head) == (head + 1000, head)


@pytest.mark.parametrize("token", ["x", "%%%", "bnVsbA", "W10", "WzEsMl0", "WyJhIiwgImIiXQ", "é"])
async def test_a_continue_token_that_was_not_given_out_is_refused(backend: Backend, store: Storage, token: str) -> None:
    with pytest.raises(InvalidKey):
        await store.list(backend.prefix, continue_token=token)


async def test_a_continue_token_of_another_list_is_refused(backend: Backend, store: Storage) -> None:
    await fill(backend, ["a/1", "a/2", "b/1"])
    page = await store.list(backend.key("a/"), limit=1)
    with pytest.raises(InvalidKey):
        await store.list(backend.key("b/"), continue_token=page.continue_token)


async def test_a_negative_limit_is_refused(backend: Backend, store: Storage) -> None:
    with pytest.raises(ValueError, match="limit"):
        await store.list(backend.prefix, limit=-1)


@pytest.mark.parametrize(
    ("pattern", "matching", "why"),
    [
        ("*", ["a", "b1", "b2"], "a star does not cross a slash"),
        ("*/*", ["a/x", "b/x"], "one star for each part"),
        ("b?", ["b1", "b2"], "a question mark is one character"),
        ("a?x", [], "and that is no slash"),
        ("b[12]", ["b1", "b2"], "a class"),
        ("b[!1]", ["b2"], "a negated class"),
        ("a[!1]x", [], "which does not match a slash either"),
        ("a", ["a"], "a pattern without wildcards is a key"),
        ("b", [], "and not a prefix"),
        ("**", ["a", "b1", "b2"], "two stars are one"),
        ("*x", [], "the end must match"),
        ("[", [], "an unclosed class stands for itself"),
    ],
)
async def test_keys_are_found_by_pattern(
    backend: Backend, store: Storage, pattern: str, matching: list[str], why: str
) -> None:
    await fill(backend, ["a", "a/x", "b/x", "b1", "b2", "deep/er/x"])
    assert await store.keys(backend.prefix + pattern) == [backend.key(n) for n in matching], why


async def test_count_counts_what_lies_below_a_prefix(backend: Backend, store: Storage) -> None:
    assert await store.count(backend.prefix) == 0
    await fill(backend, ["a/1", "a/2", "b/1"])
    assert await store.count(backend.prefix) == 3
    assert await store.count(backend.key("a/")) == 2


async def test_barrier_keys_are_hidden_and_fill_no_page(backend: Backend, store: Storage) -> None:
    await fill(backend, ["0", "a", "b"])
    async with store.watch(backend.prefix, await store.current_revision(), live=True) as watch:
        await asyncio.gather(watch.barrier(), anext(watch))
    expected = [backend.key(n) for n in ("0", "a", "b")]
    assert [e.key for e in (await store.list(backend.prefix)).entries] == expected
    assert [len(p.entries) for p in await pages(store, backend.prefix, 2)] == [2, 1]
    assert await store.keys(f"{backend.prefix}*") == expected
    assert await store.keys(f"{backend.prefix}*/*") == []
    assert await store.count(backend.prefix) == 3
    segment = f"{backend.prefix}.barrier/"
    assert len((await store.list(segment)).entries) == 1, "who asks for the segment by name sees it, to clean it up"


async def test_labels_select_what_carries_them_all(backend: Backend, store: Storage) -> None:
    await fill(backend, ["red-big", "red-small", "blue-big"])

    def labels_of(value: bytes) -> dict[str, str]:
        colour, size = value.decode().split("-")
        return {"colour": colour, "size": size}

    async def selected(**selector: str) -> list[str]:
        page = await store.list_with_labels(backend.prefix, selector, labels_of)
        return [e.value.decode() for e in page.entries]

    assert await selected(colour="red") == ["red-big", "red-small"]
    assert await selected(colour="red", size="big") == ["red-big"]
    assert await selected(colour="red", weight="1") == []
    assert await selected() == ["blue-big", "red-big", "red-small"]


async def test_labels_that_cannot_be_read_are_the_callers_error_not_an_empty_list(
    backend: Backend, store: Storage
) -> None:
    await fill(backend, ["a"])

    def labels_of(_value: bytes) -> dict[str, str]:
        raise LookupError("no labels here")

    with pytest.raises(LookupError):
        await store.list_with_labels(backend.prefix, {"a": "b"}, labels_of)


async def test_the_current_revision_grows_with_every_write_and_with_nothing_else(
    backend: Backend, store: Storage
) -> None:
    before = await store.current_revision()
    entry = await store.create(backend.key("a"), b"")
    assert entry.revision == before + 1
    await store.list(backend.prefix)
    with pytest.raises(StorageError):
        await store.create(backend.key("a"), b"")
    assert await store.current_revision() == entry.revision


async def test_compaction_is_repeatable_and_never_of_the_future(backend: Backend, store: Storage) -> None:
    await fill(backend, ["a", "b"])
    head = await store.current_revision()
    await store.compact(head - 1)
    await store.compact(head - 1)
    await store.compact(0)
    with pytest.raises(FutureRevision) as caught:
        await store.compact(head + 5)
    assert caught.value.head == head
