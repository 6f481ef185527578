"""Promise 1: a write succeeds only on the expected revision and under its guards, atomically."""

from __future__ import annotations

import asyncio

import pytest

from equipment.backends import Backend
from storage.base import MAX_VALUE_BYTES, Entry, Guard, Storage
from storage.errors import (
    AlreadyExists,
    Conflict,
    GuardFailed,
    InvalidKey,
    LeaseNotFound,
    NotFound,
    StorageError,
    TooLarge,
)


async def test_a_created_key_is_read_back_as_it_was_returned(backend: Backend, store: Storage) -> None:
    entry = await store.create(backend.key("a"), b"one")
    assert entry == Entry(backend.key("a"), b"one", entry.revision, entry.revision, 0)
    assert await store.get(backend.key("a")) == entry
    assert await store.exists(backend.key("a"))


async def test_an_absent_key_is_not_found_and_does_not_exist(backend: Backend, store: Storage) -> None:
    with pytest.raises(NotFound) as caught:
        await store.get(backend.key("a"))
    assert caught.value.key == backend.key("a")
    assert not await store.exists(backend.key("a"))


async def test_create_refuses_an_existing_key_and_shows_it(backend: Backend, store: Storage) -> None:
    entry = await store.create(backend.key("a"), b"one")
    with pytest.raises(AlreadyExists) as caught:
        await store.create(backend.key("a"), b"two")
    assert caught.value.current == entry
    assert await store.get(backend.key("a")) == entry


async def test_update_replaces_the_value_and_keeps_the_incarnation(backend: Backend, store: Storage) -> None:
    entry = await store.create(backend.key("a"), b"one")
    updated = await store.update(backend.key("a"), b"two", expected_revision=entry.revision)
    assert updated == Entry(backend.key("a"), b"two", updated.revision, entry.create_revision, 0)
    assert updated.revision > entry.revision
    assert await store.get(backend.key("a")) == updated


@pytest.mark.parametrize("expected", [-1, 0, 1])
async def test_no_revision_before_the_first_stands_for_an_absent_key(
    backend: Backend, store: Storage, expected: int
) -> None:
    with pytest.raises(Conflict) as caught:
        await store.update(backend.key("a"), b"x", expected_revision=expected)
    assert caught.value.current is None
    with pytest.raises(Conflict):
        await store.delete(backend.key("a"), expected_revision=expected)
    assert not await store.exists(backend.key("a"))


async def test_update_and_delete_on_another_revision_conflict_and_show_the_current_entry(
    backend: Backend, store: Storage
) -> None:
    first = await store.create(backend.key("a"), b"one")
    current = await store.update(backend.key("a"), b"two", expected_revision=first.revision)
    for wrong in (first.revision, current.revision + 1, 0):
        with pytest.raises(Conflict) as caught:
            await store.update(backend.key("a"), b"three", expected_revision=wrong)
        assert caught.value.current == current
        with pytest.raises(Conflict) as caught:
            await store.delete(backend.key("a"), expected_revision=wrong)
        assert caught.value.current == current
    assert await store.get(backend.key("a")) == current


async def test_a_deleted_key_is_gone_and_its_writers_are_told_so(backend: Backend, store: Storage) -> None:
    entry = await store.create(backend.key("a"), b"one")
    revision = await store.delete(backend.key("a"), expected_revision=entry.revision)
    assert revision == await store.current_revision()
    with pytest.raises(NotFound):
        await store.get(backend.key("a"))
    for write in (
        store.update(backend.key("a"), b"two", expected_revision=entry.revision),
        store.delete(backend.key("a"), expected_revision=entry.revision),
    ):
        with pytest.raises(Conflict) as caught:
            await write
        assert caught.value.current is None


async def test_a_key_created_anew_is_another_incarnation(backend: Backend, store: Storage) -> None:
    first = await store.create(backend.key("a"), b"same")
    await store.delete(backend.key("a"), expected_revision=first.revision)
    second = await store.create(backend.key("a"), b"same")
    assert second.create_revision > first.create_revision
    with pytest.raises(Conflict):
        await store.update(backend.key("a"), b"x", expected_revision=first.revision)


async def test_set_writes_whatever_is_there_and_returns_its_revision(backend: Backend, store: Storage) -> None:
    revision = await store.set(backend.key("a"), b"one")
    assert (await store.get(backend.key("a"))).revision == revision
    again = await store.set(backend.key("a"), b"two")
    entry = await store.get(backend.key("a"))
    assert (entry.value, entry.revision, entry.create_revision) == (b"two", again, revision)


async def test_compare_and_swap_compares_the_value_whatever_its_revision(backend: Backend, store: Storage) -> None:
    await store.set(backend.key("a"), b"one")
    await store.set(backend.key("a"), b"two")
    await store.set(backend.key("a"), b"one")
    swapped = await store.compare_and_swap(backend.key("a"), b"one", b"three")
    assert await store.get(backend.key("a")) == swapped
    with pytest.raises(Conflict) as caught:
        await store.compare_and_swap(backend.key("a"), b"one", b"four")
    assert caught.value.current == swapped
    with pytest.raises(Conflict) as caught:
        await store.compare_and_swap(backend.key("b"), b"", b"x")
    assert caught.value.current is None


async def test_of_many_creators_of_one_key_exactly_one_wins(backend: Backend, store: Storage) -> None:
    clients = [store, *(backend.client(f"c{i}") for i in range(3))]
    values = [f"writer {i}".encode() for i in range(16)]
    tries = (clients[i % 4].create(backend.key("a"), value) for i, value in enumerate(values))
    results = await asyncio.gather(*tries, return_exceptions=True)
    (won,) = [i for i, r in enumerate(results) if isinstance(r, Entry)]
    assert all(isinstance(r, AlreadyExists) for i, r in enumerate(results) if i != won)
    assert (await store.get(backend.key("a"))).value == values[won]


@pytest.mark.parametrize("how", ["update", "compare_and_swap"])
async def test_no_increment_of_concurrent_writers_is_lost(backend: Backend, store: Storage, how: str) -> None:
    await store.create(backend.key("n"), b"0")

    async def increment(client: Storage) -> None:
        done = 0
        while done < 10:
            entry = await client.get(backend.key("n"))
            value = str(int(entry.value) + 1).encode()
            try:
                if how == "update":
                    await client.update(backend.key("n"), value, expected_revision=entry.revision)
                else:
                    await client.compare_and_swap(backend.key("n"), entry.value, value)
            except Conflict:
                continue
            done += 1

    await asyncio.gather(*(increment(backend.client(f"c{i}")) for i in range(4)))
    assert (await store.get(backend.key("n"))).value == b"40"


async def test_a_write_passes_while_all_its_guards_hold(backend: Backend, store: Storage) -> None:
    guards = []
    for name in ("leader", "owner"):
        held = await store.create(backend.key(name), b"me")
        guards.append(Guard(held.key, held.create_revision))
        # A newer value of the same incarnation is still the same incarnation.
        await store.update(held.key, b"still me", expected_revision=held.revision)
    entry = await store.create(backend.key("a"), b"1", guards=tuple(guards))
    entry = await store.update(backend.key("a"), b"2", expected_revision=entry.revision, guards=tuple(guards))
    await store.delete(backend.key("a"), expected_revision=entry.revision, guards=tuple(guards))


@pytest.mark.parametrize("fate", ["gone", "created anew", "never there", "impossible"])
async def test_a_write_whose_guard_is_gone_changes_nothing_and_names_the_guard(
    backend: Backend, store: Storage, fate: str
) -> None:
    good = await store.create(backend.key("good"), b"")
    held = await store.create(backend.key("leader"), b"me")
    guard = Guard(held.key, held.create_revision)
    if fate in {"gone", "created anew"}:
        await store.delete(held.key, expected_revision=held.revision)
    if fate == "created anew":
        await store.create(held.key, b"another")
    if fate == "never there":
        guard = Guard(backend.key("nobody"), held.create_revision)
    if fate == "impossible":
        guard = Guard(backend.key("nobody"), 0)
    guards = (Guard(good.key, good.create_revision), guard)
    entry = await store.create(backend.key("a"), b"1")
    before = await store.current_revision()
    for write in (
        store.create(backend.key("b"), b"2", guards=guards),
        store.update(backend.key("a"), b"2", expected_revision=entry.revision, guards=guards),
        store.delete(backend.key("a"), expected_revision=entry.revision, guards=guards),
    ):
        with pytest.raises(GuardFailed) as caught:
            await write
        assert caught.value.guard == guard
    assert await store.current_revision() == before
    assert await store.get(backend.key("a")) == entry


async def test_a_key_that_is_not_as_expected_is_reported_before_a_guard(backend: Backend, store: Storage) -> None:
    entry = await store.create(backend.key("a"), b"1")
    guards = (Guard(backend.key("nobody"), 5),)
    with pytest.raises(AlreadyExists):
        await store.create(backend.key("a"), b"2", guards=guards)
    with pytest.raises(Conflict):
        await store.update(backend.key("a"), b"2", expected_revision=entry.revision + 1, guards=guards)
    with pytest.raises(Conflict):
        await store.delete(backend.key("a"), expected_revision=entry.revision + 1, guards=guards)


async def test_values_are_bytes_of_any_content_up_to_the_limit(backend: Backend, store: Storage) -> None:
    for value in (b"", bytes(range(256)), b"\xff" * MAX_VALUE_BYTES):
        await store.set(backend.key("a"), value)
        assert (await store.get(backend.key("a"))).value == value


async def test_a_larger_value_is_refused_by_every_write_and_stored_by_none(backend: Backend, store: Storage) -> None:
    entry = await store.create(backend.key("a"), b"1")
    value = b"x" * (MAX_VALUE_BYTES + 1)
    for write in (
        store.create(backend.key("b"), value),
        store.update(backend.key("a"), value, expected_revision=entry.revision),
        store.set(backend.key("a"), value),
        store.compare_and_swap(backend.key("a"), b"1", value),
    ):
        with pytest.raises(TooLarge):
            await write
    assert await store.get(backend.key("a")) == entry


@pytest.mark.parametrize("key", ["", "k" * 5000, "zero\0byte", "half a pair \ud800"], ids=["empty", "long", "0", "utf"])
async def test_a_key_that_no_store_accepts_is_refused_by_every_operation(store: Storage, key: str) -> None:
    for call in (
        lambda: store.get(key),
        lambda: store.exists(key),
        lambda: store.create(key, b""),
        lambda: store.update(key, b"", expected_revision=1),
        lambda: store.delete(key, expected_revision=1),
        lambda: store.set(key, b""),
        lambda: store.compare_and_swap(key, b"", b""),
        lambda: store.create("/ok", b"", guards=(Guard(key, 1),)),
    ):
        with pytest.raises(InvalidKey):
            await call()


@pytest.mark.parametrize("key", ["ünïcode/😀", "bytes \udcff that are no utf-8", 'quo"te\\ \n', "*[?]"])
async def test_any_other_text_is_a_key_and_comes_back_as_it_was(backend: Backend, store: Storage, key: str) -> None:
    entry = await store.create(backend.key(key), b"1")
    assert entry.key == backend.key(key)
    assert (await store.get(backend.key(key))).key == backend.key(key)
    assert [e.key for e in (await store.list(backend.prefix)).entries] == [backend.key(key)]


async def test_a_write_in_the_barrier_segment_is_refused(backend: Backend, store: Storage) -> None:
    key = f"{backend.prefix}.barrier/somebody"
    for call in (lambda: store.create(key, b""), lambda: store.set(key, b"")):
        with pytest.raises(InvalidKey):
            await call()


async def test_a_create_with_an_unknown_lease_is_refused(backend: Backend, store: Storage) -> None:
    with pytest.raises(LeaseNotFound) as caught:
        await store.create(backend.key("a"), b"", lease=4711)
    assert caught.value.lease == 4711
    assert not await store.exists(backend.key("a"))


async def test_every_refusal_is_a_storage_error_and_only_unavailability_may_be_retried(
    backend: Backend, store: Storage
) -> None:
    await store.create(backend.key("a"), b"1")
    with pytest.raises(StorageError):
        await store.create(backend.key("a"), b"2")
