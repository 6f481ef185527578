"""Whom an object may belong to: the guards of its birth, and circles that a write can see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from equipment.widget import Widget, registry, widget
from lrm.client import Client
from lrm.errors import Invalid
from lrm.owners import MOST_ANCESTORS
from storage.base import Entry, Guard
from storage.clock import SystemClock
from storage.memory import MemoryStorage


class Counting(MemoryStorage):
    """Counts reads, and may delete a key just before another is written."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.ending: str = ""

    async def get(self, key: str) -> Entry:
        self.reads[key.rpartition("/")[2]] += 1
        return await super().get(key)

    async def create(self, key: str, value: bytes, *, lease: int = 0, guards: tuple[Guard, ...] = ()) -> Entry:
        await self._end()
        return await super().create(key, value, lease=lease, guards=guards)

    async def update(self, key: str, value: bytes, *, expected_revision: int, guards: tuple[Guard, ...] = ()) -> Entry:
        await self._end()
        return await super().update(key, value, expected_revision=expected_revision, guards=guards)

    async def _end(self) -> None:
        if self.ending:
            key, self.ending = self.ending, ""
            await self.delete(key, expected_revision=(await super().get(key)).revision)


@pytest.fixture
def storage() -> Counting:
    return Counting()


@pytest.fixture
def client(storage: Counting) -> Client:
    return Client(storage, registry(), SystemClock())


def owned(name: str, *owners: Widget) -> Widget:
    made = widget(name)
    made.metadata.owner_references = [owner.as_owner() for owner in owners]
    return made


async def give(client: Client, child: Widget, *owners: Widget) -> Widget | None:
    def mutate(w: Widget) -> None:
        w.metadata.owner_references = [owner.as_owner() for owner in owners]

    return await client.update(child, mutate)


async def test_no_child_is_born_after_its_owners_end(client: Client, storage: Counting) -> None:
    owners = [await client.create(widget(name)) for name in ("one", "two")]
    child = await client.create(owned("child", *owners))
    storage.ending = registry().key_of(owners[1])
    with pytest.raises(Invalid, match=r"metadata.ownerReferences\[1\]: this owner has just ended"):
        await client.create(owned("late", *owners))
    third = await client.create(widget("third"))
    storage.ending = registry().key_of(third)
    with pytest.raises(Invalid, match="just ended"):
        await give(client, child, owners[0], third)
    assert await storage.keys("/lrm/r/widgets/default/*") == [f"/lrm/r/widgets/default/{n}" for n in ("child", "one")]


async def test_an_owner_that_the_caller_guards_is_not_read_again(client: Client, storage: Counting) -> None:
    owner = await client.create(widget("owner"))
    entry = await storage.get(registry().key_of(owner))
    storage.reads.clear()
    await client.create(owned("child", owner), guards=(Guard(entry.key, entry.create_revision),))
    assert not storage.reads


async def test_owners_that_an_object_has_already_are_not_read_when_it_changes(
    client: Client, storage: Counting
) -> None:
    owner = await client.create(widget("owner"))
    child = await client.create(owned("child", owner))
    await client.delete(owner)
    storage.reads.clear()
    assert await client.update(child, lambda w: w.metadata.labels.update(a="b"))
    assert not storage.reads


async def test_a_reference_that_is_changed_is_checked_anew(client: Client) -> None:
    """A wrong name beside the right uid would get the object collected; a block would come too late."""
    owner = widget("owner")
    owner.metadata.finalizers = ["test/hold"]
    owner = await client.create(owner)
    child = await client.create(owned("child", owner))

    def change(**values: object) -> Callable[[Widget], None]:
        return lambda w: w.metadata.owner_references.__setitem__(
            0, w.metadata.owner_references[0].model_copy(update=values)
        )

    for wrong in ({"name": "other"}, {"uid": "other"}, {"kind": "Note"}):
        with pytest.raises(Invalid):
            await client.update(child, change(**wrong))
    await client.delete(owner)
    free = await client.update(child, change(block_owner_deletion=False))
    assert free, "letting go of it is always possible"
    with pytest.raises(Invalid, match="is being deleted"):
        await client.update(free, change(block_owner_deletion=True))


async def test_a_circle_is_refused_wherever_it_closes(client: Client) -> None:
    line = [await client.create(widget("w0"))]
    for i in range(1, 5):
        line.append(await client.create(owned(f"w{i}", line[-1])))
    for closing in (line[0], line[2], line[4]):
        with pytest.raises(Invalid, match="its own dependants"):
            await give(client, line[0], closing)
    aside = await client.create(widget("aside"))
    assert await give(client, line[4], line[3], aside, line[0]), "two ways up are no circle"


async def test_more_ancestors_than_are_read_are_refused(client: Client) -> None:
    above = await client.create(widget("w0"))
    for i in range(1, MOST_ANCESTORS + 1):
        above = await client.create(owned(f"w{i}", above))
    with pytest.raises(Invalid, match="more than 100 owners above it"):
        await give(client, await client.create(widget("child")), above)


async def test_an_owner_lives_in_the_same_namespace(client: Client) -> None:
    elsewhere = widget("owner")
    elsewhere.metadata.namespace = "elsewhere"
    with pytest.raises(Invalid, match="no Widget 'owner' with this uid in the namespace default"):
        await client.create(owned("child", await client.create(elsewhere)))
