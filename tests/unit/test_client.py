"""The typed client: rules of writes, retries that re-apply the change, fences, and what it remembers."""

from __future__ import annotations

import asyncio

import pytest

from equipment.widget import WIDGETS, Phase, Widget, registry, widget
from lrm.client import Client
from lrm.election import StaticElection
from lrm.errors import Fenced, Forbidden, Invalid, NotLeading, ResourceConflict, ResourceExists, ResourceNotFound
from lrm.testing import VirtualClock
from storage.base import Guard
from storage.clock import SystemClock
from storage.errors import GuardFailed
from storage.memory import MemoryStorage


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage()


@pytest.fixture
def client(storage: MemoryStorage) -> Client:
    return Client(storage, registry(), SystemClock(), owner="widgets")


async def test_create_gives_uid_generation_times_and_the_initial_phase(client: Client) -> None:
    made = await client.create(widget())
    assert made.uid
    assert made.metadata.generation == 1
    assert made.metadata.creation_timestamp is not None
    assert made.status.phase is Phase.PENDING
    assert made.revision == client.written.highest
    assert await client.get(Widget, "default", "w1") == made


async def test_create_of_an_existing_name_and_get_of_an_absent_one_are_errors(client: Client) -> None:
    await client.create(widget())
    with pytest.raises(ResourceExists):
        await client.create(widget())
    with pytest.raises(ResourceNotFound):
        await client.get(Widget, "default", "other")


async def test_generate_name_makes_a_name(client: Client) -> None:
    w = widget("")
    w.metadata.generate_name = "worker-"
    made = await client.create(w)
    assert made.name.startswith("worker-")
    assert len(made.name) == len("worker-") + 8


async def test_generation_grows_with_spec_only(client: Client) -> None:
    made = await client.create(widget())
    labelled = await client.update(made, lambda w: w.metadata.labels.update(a="b"))
    assert labelled
    assert labelled.metadata.generation == 1
    counted = await client.update(labelled, lambda w: setattr(w.spec, "count", 7))
    assert counted
    assert counted.metadata.generation == 2
    seen = await client.update_status(counted, lambda w: setattr(w.status, "seen", 3))
    assert seen.metadata.generation == 2


async def test_a_write_that_changes_nothing_keeps_the_resource_version(client: Client, storage: MemoryStorage) -> None:
    made = await client.create(widget())
    before = await storage.current_revision()
    same = await client.update(made, lambda w: setattr(w.spec, "count", 1))
    assert same == made
    assert (await client.update_status(made, lambda _w: None)).revision == made.revision
    assert await storage.current_revision() == before


async def test_update_leaves_status_and_update_status_leaves_spec(client: Client) -> None:
    made = await client.create(widget())

    def both(w: Widget) -> None:
        w.spec.count, w.status.seen = 9, 9

    one = await client.update(made, both)
    assert one
    assert (one.spec.count, one.status.seen) == (9, 0)
    two = await client.update_status(made, both)
    assert (two.spec.count, two.status.seen) == (9, 9)
    assert two.metadata.generation == 2


async def test_two_writers_with_retry_lose_nothing(storage: MemoryStorage) -> None:
    writers = [Client(storage, registry(), SystemClock(), owner="widgets") for _ in range(2)]
    made = await writers[0].create(widget())

    async def add(client: Client, name: str) -> None:
        for i in range(20):
            await client.update(made, lambda w, i=i: w.metadata.annotations.update({f"{name}{i}": "x"}))  # type: ignore[misc]

    await asyncio.gather(add(writers[0], "a"), add(writers[1], "b"))
    stored = await writers[0].get(Widget, "default", "w1")
    assert len(stored.metadata.annotations) == 40


async def test_without_retry_a_stale_object_is_a_conflict(client: Client) -> None:
    made = await client.create(widget())
    await client.update(made, lambda w: w.metadata.labels.update(a="b"))
    with pytest.raises(ResourceConflict):
        await client.update(made, lambda w: w.metadata.labels.update(c="d"), retry=False)


async def test_another_incarnation_of_the_name_is_not_found(client: Client) -> None:
    made = await client.create(widget())
    assert await client.delete(made) is None
    await client.create(widget())
    with pytest.raises(ResourceNotFound):
        await client.update(made, lambda w: w.metadata.labels.update(a="b"))
    with pytest.raises(ResourceNotFound):
        await client.delete(made)


async def test_a_field_of_another_owner_is_refused_and_nothing_is_written(
    client: Client, storage: MemoryStorage
) -> None:
    made = await client.create(widget())
    before = await storage.current_revision()
    with pytest.raises(Forbidden, match=r"status\.allocations \(owned by allocator\)"):
        await client.update_status(made, lambda w: w.status.allocations.update(u=1))
    assert await storage.current_revision() == before
    forced = await client.update_status(made, lambda w: w.status.allocations.update(u=1), force=True)
    assert forced.status.allocations == {"u": 1}


async def test_an_illegal_phase_change_is_refused_also_when_hidden_in_steps(client: Client) -> None:
    made = await client.create(widget())
    now = SystemClock().now()

    def ready_then_pending(w: Widget) -> None:
        w.status.enter(Phase.READY, "r", now)
        w.status.enter(Phase.PENDING, "r", now)

    with pytest.raises(Invalid, match="Ready cannot be followed by Pending"):
        await client.update_status(made, ready_then_pending)

    def silent(w: Widget) -> None:
        w.status.phase = Phase.READY

    ready = await client.update_status(made, silent)
    assert ready.status.phase is Phase.READY
    with pytest.raises(Invalid, match="Ready cannot be followed by Pending"):
        await client.update_status(ready, lambda w: setattr(w.status, "phase", Phase.PENDING))

    def failed_then_pending(w: Widget) -> None:
        w.status.enter(Phase.FAILED, "r", now)
        w.status.enter(Phase.PENDING, "again", now)

    healed = await client.update_status(made, failed_then_pending)
    assert [s.to for s in healed.status.phase_history] == ["Failed", "Pending"]


async def test_an_object_goes_with_its_last_finalizer_in_that_same_write(
    client: Client, storage: MemoryStorage
) -> None:
    made = await client.create(widget())
    held = await client.add_finalizer(await client.add_finalizer(made, "a.io/one"), "a.io/two")
    marked = await client.delete(held)
    assert marked
    assert marked.deleting
    assert await client.delete(marked) == marked
    with pytest.raises(Forbidden, match="no finalizer"):
        await client.add_finalizer(marked, "a.io/three")
    with pytest.raises(Forbidden, match="frozen"):
        await client.update(marked, lambda w: setattr(w.spec, "count", 5))
    before = await storage.current_revision()
    left = await client.remove_finalizer(marked, "a.io/one")
    assert left
    assert await client.remove_finalizer(left, "a.io/two") is None
    assert await storage.current_revision() == before + 2
    with pytest.raises(ResourceNotFound):
        await client.get(Widget, "default", "w1")


async def test_protected_objects_are_not_deleted(client: Client) -> None:
    made = await client.create(widget())
    guarded = await client.update(made, lambda w: w.metadata.annotations.update({"lab.neuroglia.io/protect": "true"}))
    assert guarded
    with pytest.raises(Forbidden, match="protected"):
        await client.delete(guarded)


async def test_forget_deletes_whatever_the_finalizers_and_twice_is_fine(client: Client) -> None:
    held = await client.add_finalizer(await client.create(widget()), "a.io/one")
    await client.forget(held)
    await client.forget(held)
    with pytest.raises(ResourceNotFound):
        await client.get(Widget, "default", "w1")


async def test_immutable_fields_are_refused(client: Client) -> None:
    made = await client.create(widget())
    with pytest.raises(Invalid, match=r"spec\.labTrack: field is immutable"):
        await client.update(made, lambda w: setattr(w.spec, "lab_track", "other"))


async def test_a_deposed_leader_changes_nothing_and_hears_fenced(storage: MemoryStorage) -> None:
    clock = VirtualClock()
    elections = [StaticElection(storage, clock, root="/lrm", lock_name="widgets", identity=i) for i in ("one", "two")]
    first = await elections[0].acquire()
    base = Client(storage, registry(), SystemClock())
    client = base.bind(owner="widgets", fence=first)
    made = await client.create(widget())
    second = await elections[1].acquire()
    assert second.number > first.number
    before = await storage.current_revision()
    with pytest.raises(Fenced):
        await client.update(made, lambda w: setattr(w.spec, "count", 5))
    with pytest.raises(NotLeading):
        await client.delete(made)
    assert await storage.current_revision() == before
    await elections[0].release(first)
    assert (await storage.get(second.key)).create_revision == second.number
    await elections[1].release(second)
    assert not await storage.exists(second.key)


async def test_a_child_is_not_created_when_its_owner_has_gone(client: Client, storage: MemoryStorage) -> None:
    owner = await client.create(widget("owner"))
    entry = await storage.get(registry().key_of(owner))
    guard = Guard(entry.key, entry.create_revision)
    await client.create(widget("child1"), guards=(guard,))
    await client.delete(owner)
    await client.create(widget("owner"))
    with pytest.raises(GuardFailed):
        await client.create(widget("child2"), guards=(guard,))


async def test_list_gives_all_of_a_kind_in_a_namespace_or_everywhere(client: Client) -> None:
    for i in range(3):
        w = widget(f"w{i}")
        w.metadata.namespace = f"ns{i % 2}"
        await client.create(w)
    assert [w.name for w in await client.list(Widget)] == ["w0", "w2", "w1"]
    assert [w.name for w in await client.list(Widget, "ns0")] == ["w0", "w2"]
    assert WIDGETS.group == "test.neuroglia.io"
