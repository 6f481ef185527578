"""Garbage collection: who goes when an owner does, in which order, and what proof that takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from equipment.gc_scene import SHADOWS, GcScene, Shadow, gc_scene, reference
from equipment.widget import NOTES, Note
from lrm.resource import PAUSE_ANNOTATION, PROTECT_ANNOTATION
from lrm.writes import FOREGROUND_FINALIZER, ORPHAN_FINALIZER, Propagation
from storage.base import Entry, Guard
from storage.errors import NoSpace, Unavailable
from storage.memory import MemoryStorage

HOLD = "test/hold"


@pytest.fixture
async def scene() -> AsyncIterator[GcScene]:
    async with gc_scene() as it:
        yield it


async def test_what_belonged_to_an_object_goes_after_it_and_what_has_another_owner_stays(scene: GcScene) -> None:
    owner, other = await scene.make("owner"), await scene.make("other")
    child = await scene.make("child", owner, model=Note)
    await scene.make("grandchild", child)
    shared = await scene.make("shared", owner, other)
    await scene.make("stranger")
    await scene.client.delete(owner)
    await scene.settle()
    assert await scene.names() == {"other", "shared", "stranger"}
    assert (await scene.now(shared)).metadata.owner_references == [reference(other)], "the dead one is not named"
    assert scene.collector.describe()["collected"] == 2


async def test_an_owner_that_is_being_deleted_in_the_background_keeps_its_own_until_it_is_gone(scene: GcScene) -> None:
    owner = await scene.make("owner", finalizers=[HOLD])
    child = await scene.make("child", owner)
    await scene.client.delete(owner)
    await scene.settle()
    assert not (await scene.now(child)).deleting
    await scene.release(owner)
    await scene.settle()
    assert await scene.names() == set()


@pytest.mark.parametrize("policy", ["Background", "Foreground"])
async def test_a_paused_object_is_left_as_it_is_until_the_pause_ends(scene: GcScene, policy: Propagation) -> None:
    owner = await scene.make("owner")
    child = await scene.make("child", owner)
    await scene.client.update(child, lambda c: c.metadata.annotations.update({PAUSE_ANNOTATION: "true"}))
    await scene.client.delete(owner, propagation=policy)
    await scene.settle()
    held = await scene.now(child)
    assert not held.deleting
    await scene.client.update(held, lambda c: c.metadata.annotations.update({PAUSE_ANNOTATION: "false"}))
    await scene.settle()
    assert await scene.names() == set()


async def test_a_collector_that_starts_later_finds_what_was_left(scene: GcScene) -> None:
    await scene.kill()
    owner = await scene.make("owner")
    await scene.make("child", owner)
    await scene.client.delete(owner)
    await scene.make("owner")
    await scene.start()
    await scene.settle()
    assert await scene.names() == {"owner"}, "another incarnation of the name is another owner"


async def test_what_cannot_be_judged_keeps_an_object(scene: GcScene) -> None:
    """Owners of a kind that is not known here, and values that cannot be decoded, are not proof of absence."""
    strange, opaque = await scene.make("strange"), await scene.make("opaque", model=Note)
    one, two = await scene.make("one", strange), await scene.make("two", opaque)

    async def rewrite(name: str, old: bytes, new: bytes, plural: str = "widgets") -> None:
        entry = await scene.storage.get(f"/lrm/r/{plural}/default/{name}")
        await scene.storage.set(entry.key, entry.value.replace(old, new))

    await rewrite("one", b'"kind":"Widget","name":"strange"', b'"kind":"Gadget","name":"strange"')
    await rewrite("opaque", b'"labTrack":"ccna"', b'"labTrack":7', "notes")
    await scene.client.delete(strange)
    await scene.settle(400)
    assert (await scene.now(one), await scene.now(two)) != (None, None)
    assert await scene.names() == {"one", "two", "opaque"}
    await scene.storage.delete(
        "/lrm/r/notes/default/opaque",
        expected_revision=(await scene.storage.get("/lrm/r/notes/default/opaque")).revision,
    )
    await scene.settle()
    assert await scene.names() == {"one"}, "now there is proof"


async def test_in_the_foreground_a_tree_goes_from_its_leaves_up(scene: GcScene) -> None:
    root = await scene.make("root")
    branch = await scene.make("branch", root)
    leaf = await scene.make("leaf", branch, finalizers=[HOLD])
    loose = await scene.make("loose", root, finalizers=[HOLD], block=False)
    marked = await scene.client.delete(root, propagation="Foreground")
    assert marked
    await scene.settle()
    assert await scene.names() == {"root", "branch", "leaf", "loose"}
    assert (await scene.now(branch)).metadata.finalizers == [FOREGROUND_FINALIZER]
    assert all([(await scene.now(thing)).deleting for thing in (branch, leaf, loose)])
    await scene.release(leaf)
    await scene.settle()
    assert await scene.names() == {"loose"}, "it belonged to the root without blocking it"


async def test_in_the_foreground_what_has_a_living_owner_is_let_go(scene: GcScene) -> None:
    going, staying = await scene.make("going"), await scene.make("staying")
    shared = await scene.make("shared", going, staying)
    await scene.client.delete(going, propagation="Foreground")
    await scene.settle()
    assert await scene.names() == {"staying", "shared"}
    assert [r.name for r in (await scene.now(shared)).metadata.owner_references] == ["staying"]


@pytest.mark.parametrize("policy", ["Background", "Orphan"])
async def test_another_policy_ends_a_deletion_in_the_foreground_that_waits(scene: GcScene, policy: Propagation) -> None:
    owner = await scene.make("owner")
    await scene.make("child", owner, finalizers=[HOLD])
    await scene.client.delete(owner, propagation="Foreground")
    await scene.settle()
    assert await scene.names() == {"owner", "child"}
    await scene.client.delete(owner, propagation=policy)
    await scene.settle()
    assert await scene.names() == {"child"}


async def test_orphans_lose_the_reference_and_stay(scene: GcScene) -> None:
    owner, other = await scene.make("owner", finalizers=[HOLD]), await scene.make("other")
    children = [await scene.make("one", owner), await scene.make("two", owner, other, model=Note)]
    await scene.make("grandchild", children[0])
    await scene.client.delete(owner, propagation="Orphan")
    await scene.settle()
    assert [r.name for r in (await scene.now(children[1])).metadata.owner_references] == ["other"]
    assert (await scene.now(owner)).metadata.finalizers == [HOLD]
    await scene.release(owner)
    await scene.settle(400)
    assert await scene.names() == {"other", "one", "two", "grandchild"}
    assert scene.collector.describe()["orphaned"] == 2


@pytest.mark.parametrize("plural", ["widgets", "gadgets"], ids=["an undecodable value", "an unknown kind"])
async def test_an_orphan_that_cannot_be_read_holds_its_owner(scene: GcScene, plural: str) -> None:
    """Its reference could not be taken away, and a newer version would collect it."""
    owner = await scene.make("owner")
    key = f"/lrm/r/{plural}/default/strange"
    await scene.storage.create(key, f'{{"metadata":{{"ownerReferences":[{{"uid":"{owner.uid}"}}]}}}}'.encode())
    await scene.client.delete(owner, propagation="Orphan")
    await scene.settle()
    assert (await scene.now(owner)).metadata.finalizers == [ORPHAN_FINALIZER]
    assert scene.collector.describe()["errors"] > 0
    await scene.storage.delete(key, expected_revision=(await scene.storage.get(key)).revision)
    await scene.settle(60)
    assert await scene.names() == set()


async def test_a_value_that_cannot_be_read_holds_an_owner_in_the_foreground(scene: GcScene) -> None:
    owner = await scene.make("owner")
    key = "/lrm/r/widgets/default/strange"
    await scene.storage.create(key, f'{{"ownerReferences":["{owner.uid}"]}}'.encode())
    await scene.client.delete(owner, propagation="Foreground")
    await scene.settle()
    assert await scene.names() == {"owner", "strange"}
    await scene.storage.delete(key, expected_revision=(await scene.storage.get(key)).revision)
    await scene.settle()
    assert await scene.names() == set()


async def circle(scene: GcScene, names: str) -> list[Note]:
    """Notes that own each other round about, which the client would refuse to make."""
    notes = [await scene.make(name, model=Note) for name in names]
    for note, owner in zip(notes, [notes[-1], *notes], strict=False):
        wanted = note.thaw()
        wanted.metadata.owner_references = [reference(owner)]
        key = scene.registry.key_of(note)
        await scene.storage.update(key, NOTES.encode(wanted), expected_revision=note.revision)
    return notes


@pytest.mark.parametrize("names", ["a", "ab", "abcd"])
@pytest.mark.parametrize("policy", ["Background", "Foreground", "Orphan"])
async def test_a_circle_is_kept_until_one_of_it_is_deleted_and_then_ends(
    scene: GcScene, names: str, policy: Propagation
) -> None:
    notes = await circle(scene, names)
    await scene.make("leaf", notes[-1])
    await scene.settle(400)
    assert await scene.names() == {*names, "leaf"}
    await scene.client.delete(await scene.now(notes[0]), propagation=policy)
    await scene.settle()
    gone = {"a"} if policy == "Orphan" else {*names}
    assert await scene.names() == {*names} - gone | ({"leaf"} if policy == "Orphan" else set())


async def test_what_mirrors_its_owner_is_forgotten_with_it(scene: GcScene) -> None:
    owner = await scene.make("owner")
    shadows = [await scene.make(name, owner, model=Shadow, finalizers=[HOLD]) for name in ("one", "two")]
    await scene.client.delete(shadows[1])
    await scene.settle()
    assert await scene.names() == {"owner", "one", "two"}
    await scene.client.delete(owner)
    await scene.settle()
    assert await scene.names() == set(), "whatever their finalizers, being deleted or not"
    assert scene.collector.describe()["forgotten"] == 2


async def test_in_the_foreground_what_mirrors_its_owner_goes_last_and_is_never_marked(scene: GcScene) -> None:
    owner = await scene.make("owner", finalizers=[HOLD])
    shadow = await scene.make("shadow", owner, model=Shadow, finalizers=[HOLD])
    await scene.make("child", owner)
    await scene.client.delete(owner, propagation="Foreground")
    await scene.settle(400)
    assert await scene.names() == {"owner", "shadow"}
    assert await scene.now(shadow) == shadow
    await scene.release(owner)
    await scene.settle()
    assert await scene.names() == set()


async def test_a_mirror_that_a_user_deletes_in_the_foreground_has_its_own_finalizers_only(scene: GcScene) -> None:
    owner = await scene.make("owner")
    shadow = await scene.make("shadow", owner, model=Shadow, finalizers=[HOLD])
    await scene.client.delete(shadow, propagation="Foreground")
    await scene.settle()
    assert (await scene.now(shadow)).metadata.finalizers == [HOLD]
    assert SHADOWS.forgotten_with_owner


async def test_a_protected_object_stays_until_it_is_no_longer(scene: GcScene) -> None:
    owner = await scene.make("owner")
    child = await scene.make("child", owner, annotations={PROTECT_ANNOTATION: "true"})
    await scene.client.delete(owner)
    await scene.settle(400)
    assert not (await scene.now(child)).deleting
    await scene.client.update(child, lambda c: c.metadata.annotations.clear())
    await scene.settle()
    assert await scene.names() == set()


class AdoptedFirst(MemoryStorage):
    """A store in which somebody else changes the child just before it is deleted."""

    instead: tuple[bytes, bytes] | None = None
    overtaken = False

    async def delete(self, key: str, *, expected_revision: int, guards: tuple[Guard, ...] = ()) -> int:
        if key.endswith("/child") and self.instead and not self.overtaken:
            self.overtaken = True
            await self.set(key, (await self.get(key)).value.replace(*self.instead))
        return await super().delete(key, expected_revision=expected_revision, guards=guards)


async def test_an_object_that_is_adopted_while_it_is_judged_is_judged_again() -> None:
    storage = AdoptedFirst()
    async with gc_scene(storage) as scene:
        owner, other = await scene.make("owner"), await scene.make("other")
        child = await scene.make("child", owner)
        named = b'"name":"%b","uid":"%b"'
        storage.instead = (
            named % (b"owner", owner.uid.encode()),
            named % (b"other", other.uid.encode()),
        )
        await scene.client.delete(owner)
        await scene.settle()
        assert storage.overtaken
        assert (await scene.now(child)).metadata.owner_references == [reference(other)]


async def test_a_collector_that_no_longer_leads_deletes_nothing_and_returns(scene: GcScene) -> None:
    owner = await scene.make("owner")
    await scene.make("child", owner)
    await scene.client.delete(owner)
    assert scene.term is not None
    # A successor has taken the lock; the old one does not know, and finds the child.
    key = scene.term.key
    await scene.storage.delete(key, expected_revision=(await scene.storage.get(key)).revision)
    await scene.settle()
    assert await scene.names() == {"child"}
    await scene.returned()
    await scene.start()
    await scene.settle()
    assert await scene.names() == set()


class Outage(MemoryStorage):
    """A store that can be away, or out of space."""

    away = False
    full = False

    async def get(self, key: str) -> Entry:
        if self.away:
            raise Unavailable("away")
        return await super().get(key)

    async def update(self, key: str, value: bytes, *, expected_revision: int, guards: tuple[Guard, ...] = ()) -> Entry:
        if self.full:
            raise NoSpace("full")
        return await super().update(key, value, expected_revision=expected_revision, guards=guards)


async def test_an_outage_of_the_store_is_waited_for() -> None:
    storage = Outage()
    async with gc_scene(storage) as scene:
        owner = await scene.make("owner")
        await scene.make("child", owner)
        storage.away = True
        await scene.client.delete(owner)
        await scene.settle(600)
        storage.away = False
        await scene.settle(80)
        assert await scene.names() == set()
        assert scene.collector.describe()["errors"] > 0


async def test_what_needs_no_space_goes_on_without_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deletions free space: no barrier can be written then, and the store itself is read."""
    storage = Outage()
    async with gc_scene(storage) as scene:
        owner = await scene.make("owner")
        blocked = await scene.make("blocked")
        await scene.make("child", owner)
        await scene.make("held", blocked, finalizers=[HOLD])
        for one in (owner, blocked):
            await scene.client.delete(one, propagation="Foreground")
        storage.full = True

        async def no_barrier(_timeout: float = 3.0) -> int:
            raise NoSpace("full")

        monkeypatch.setattr(scene.cache, "barrier", no_barrier)
        await scene.settle()
        assert await scene.names() == {"blocked", "held"}


class Slow(MemoryStorage):
    """A store that deletes when it is allowed to."""

    allowed: asyncio.Event

    async def delete(self, key: str, *, expected_revision: int, guards: tuple[Guard, ...] = ()) -> int:
        if key.endswith("/child"):
            await self.allowed.wait()
        return await super().delete(key, expected_revision=expected_revision, guards=guards)


async def test_a_drain_lets_what_is_in_hand_end_and_begins_nothing_more() -> None:
    storage = Slow()
    storage.allowed = asyncio.Event()
    async with gc_scene(storage) as scene:
        owner, other = await scene.make("owner"), await scene.make("other")
        await scene.make("child", owner)
        await scene.make("later", other)
        await scene.client.delete(owner)
        await scene.settle()
        drain = asyncio.create_task(scene.collector.drain(60))
        await scene.settle()
        await scene.client.delete(other)
        await scene.settle()
        assert not drain.done()
        storage.allowed.set()
        await scene.settle()
        assert drain.done()
        assert await scene.names() == {"later"}
