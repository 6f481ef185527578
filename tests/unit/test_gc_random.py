"""Random owners, deletions and policies, and a collector that dies, is deposed and hears lies: what must exist does.

A story is told by its seed. Afterwards the store's own history is judged write by write, as somebody who was not there
would: nothing ended without proof, no policy was broken, nothing was left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from equipment.gc_scene import Any3, GcScene, Shadow, gc_scene, reference
from equipment.widget import NOTES, Note, Widget
from lrm.errors import LrmError
from lrm.testing import VirtualClock
from lrm.writes import FOREGROUND_FINALIZER, ORPHAN_FINALIZER, Propagation, waits_for_dependants
from storage.base import Entry, Event, Guard
from storage.errors import OutcomeUnknown, Unavailable
from storage.memory import MemoryStorage

HOLD = "test/hold"
POLICIES: tuple[Propagation, ...] = ("", "Background", "Foreground", "Orphan")


class Unreliable(MemoryStorage):
    """A store that loses requests and replies of the collector, which alone writes under a guard of its term."""

    def __init__(self, clock: VirtualClock, chance: random.Random) -> None:
        super().__init__(clock=clock)
        self._chance = chance
        self.faults = True
        self.acted: set[int] = set()
        """The revisions that the collector wrote."""

    async def update(self, key: str, value: bytes, *, expected_revision: int, guards: tuple[Guard, ...] = ()) -> Entry:
        theirs = self._asked(guards)
        entry = await super().update(key, value, expected_revision=expected_revision, guards=guards)
        await self._answered(entry.revision, theirs=theirs)
        return entry

    async def delete(self, key: str, *, expected_revision: int, guards: tuple[Guard, ...] = ()) -> int:
        theirs = self._asked(guards)
        revision = await super().delete(key, expected_revision=expected_revision, guards=guards)
        await self._answered(revision, theirs=theirs)
        return revision

    def _asked(self, guards: tuple[Guard, ...]) -> bool:
        theirs = any("/leader/" in guard.key for guard in guards)
        if theirs and self.faults and self._chance.random() < 0.05:
            raise Unavailable("the request was lost")
        return theirs

    async def _answered(self, revision: int, *, theirs: bool) -> None:
        if theirs:
            self.acted.add(revision)
            await asyncio.sleep(0)  # here the collector may die with the write made and no reply
            if self.faults and self._chance.random() < 0.05:
                raise OutcomeUnknown("the reply was lost")


@dataclass
class Story:
    """What a user does, one thing after another, while the collector lives and dies."""

    scene: GcScene
    chance: random.Random
    made: list[Any3] = field(default_factory=list)
    count: int = 0

    async def tell(self, length: int) -> None:
        await self._circle()
        deeds = (
            self._make,
            self._make,
            self._make,
            self._delete,
            self._delete,
            self._let_go,
            self._adopt,
            self._restart,
        )
        for _ in range(length):
            await self._do(self.chance.choice(deeds)())
            for _ in range(self.chance.choice((0, 0, 1, 2, 3, 5, 8, 40))):
                await asyncio.sleep(0)
            if self.chance.random() < 0.1:
                await self.scene.clock.advance(self.chance.choice((0.3, 3)))

    async def end(self) -> None:
        """No more faults, and every hold is let go."""
        self.scene.storage.faults = False  # type: ignore[attr-defined]
        await self.scene.kill()
        await self.scene.start()
        for _ in range(6):
            await self.scene.settle(70)
            for thing in self.made:
                await self._do(self.scene.release(thing))
        await self.scene.settle(70)

    async def _do(self, deed: Coroutine[Any, Any, None]) -> None:
        """Do it, while time stands still unless it is what the deed waits for (a conflict is tried again later)."""
        task = asyncio.create_task(deed)
        rounds = 0
        while not task.done() and (rounds := rounds + 1) < 100:
            await asyncio.sleep(0)
        while not task.done():
            await self.scene.clock.advance(0.01)
        with contextlib.suppress(LrmError):  # an owner may be going, an object gone: then nothing was done
            task.result()

    def _some(self, count: int) -> list[Any]:
        """Objects that existed a moment ago, as many of so many as there are."""
        cached = (self.scene.cache.get(type(thing), thing.namespace, thing.name) for thing in self.made)
        there = [new for old, new in zip(self.made, cached, strict=True) if new is not None and new.uid == old.uid]
        return self.chance.sample(there, min(len(there), count))

    async def _make(self) -> None:
        owners = self._some(self.chance.choice((0, 1, 1, 2, 3)))
        self.count += 1
        made = await self.scene.make(
            f"n{self.count}" if self.chance.random() < 0.8 else f"again{self.chance.randrange(3)}",
            *owners,
            model=self.chance.choice((Widget, Widget, Note, Shadow)),
            finalizers=[HOLD] if self.chance.random() < 0.3 else [],
            block=self.chance.random() < 0.7,
        )
        self.made.append(made)

    async def _delete(self) -> None:
        for thing in self._some(1):
            await self.scene.client.delete(thing, propagation=self.chance.choice(POLICIES))

    async def _let_go(self) -> None:
        for thing in self._some(1):
            await self.scene.release(thing)

    async def _adopt(self) -> None:
        match self._some(2):
            case [child, owner]:

                def adopt(r: Any) -> None:
                    r.metadata.owner_references = [*r.metadata.owner_references, reference(owner)]

                await self.scene.client.update(child, adopt)

    async def _restart(self) -> None:
        """The collector dies, or another has taken its lock and it does not know yet."""
        if self.chance.random() < 0.5:
            await self.scene.kill()
        await self.scene.start()

    async def _circle(self) -> None:
        notes = [await self.scene.make(f"c{i}", model=Note) for i in range(self.chance.randint(0, 3))]
        for note, owner in zip(notes, [*notes[-1:], *notes], strict=False):
            wanted = note.thaw()
            wanted.metadata.owner_references = [reference(owner)]
            value = NOTES.encode(wanted)
            await self.scene.storage.update(self.scene.registry.key_of(note), value, expected_revision=note.revision)
        self.made += notes


class Judge:
    """Reads the history of a store from its beginning."""

    def __init__(self, scene: GcScene) -> None:
        self._registry = scene.registry
        self._storage = scene.storage
        self.now: dict[str, Any] = {}
        self.owners: dict[str, set[str]] = {}
        """Uid → uids of all owners that it ever had."""
        self.waited: set[str] = set()
        """Uids of owners that were ever deleted in the foreground."""
        self.released: set[str] = set()
        """Uids of owners that were ever deleted with the policy Orphan."""

    def judge(self) -> None:
        acted: set[int] = self._storage.acted  # type: ignore[attr-defined]
        for batch in self._storage._state.log:
            for event in batch.events:
                kind, _, _ = self._registry.parse_key(event.entry.key)
                if kind is None:
                    continue
                old, new = self.now.get(event.entry.key), self._decoded(kind, event)
                if batch.revision in acted:
                    self._may(kind, old, new)
                self._happens(event.entry.key, new)
        left = {thing.uid: thing for thing in self.now.values()}
        for thing in left.values():
            assert not thing.deleting, f"{thing.name} is still being deleted"
            owners = {r.uid for r in thing.metadata.owner_references}
            assert owners <= left.keys(), f"{thing.name} refers to owners that are gone"

    def _decoded(self, kind: Any, event: Event) -> Any:
        return kind.decode(event.entry) if event.kind == "put" else None

    def _happens(self, key: str, new: Any) -> None:
        if new is None:
            del self.now[key]
            return
        self.now[key] = new
        self.owners.setdefault(new.uid, set()).update(r.uid for r in new.metadata.owner_references)
        if waits_for_dependants(new):
            self.waited.add(new.uid)
        if new.deleting and ORPHAN_FINALIZER in new.metadata.finalizers:
            self.released.add(new.uid)

    def _may(self, kind: Any, old: Any, new: Any) -> None:
        """Whether the collector may do this to an object."""
        dropped = set(old.metadata.finalizers) - set(new.metadata.finalizers if new else ())
        policies = ({FOREGROUND_FINALIZER}, {ORPHAN_FINALIZER})
        if kind.forgotten_with_owner and new is None and self._unowned(old):
            return  # forgotten, whatever held it
        if not old.deleting and (new is None or new.deleting):
            assert self._unowned(old), f"{old.name} was deleted while an owner lives"
            return
        if new is not None and new.metadata.owner_references != old.metadata.owner_references:
            for gone in (r for r in old.metadata.owner_references if r not in new.metadata.owner_references):
                lost = self._owner(old, gone.uid) is None or gone.uid in self.waited | self.released
                assert lost, f"{old.name} was taken from {gone.name}, which keeps it"
            return
        assert dropped in policies, f"{old.name} was changed for no reason"
        others = [t for t in self.now.values() if t.uid != old.uid]
        children = [t for t in others if any(r.uid == old.uid for r in t.metadata.owner_references)]
        if dropped == {ORPHAN_FINALIZER}:
            assert not children, f"{old.name} was released before its dependants"
        for child in children:
            blocks = any(r.uid == old.uid and r.block_owner_deletion for r in child.metadata.owner_references)
            circle = waits_for_dependants(child) and self._above(old.uid, child.uid)
            assert not blocks or circle, f"{old.name} went before {child.name}"

    def _unowned(self, thing: Any) -> bool:
        references = thing.metadata.owner_references
        return bool(references) and all(self._owner(thing, r.uid) is None or r.uid in self.waited for r in references)

    def _owner(self, thing: Any, uid: str) -> Any:
        return next((t for t in self.now.values() if t.uid == uid and t.namespace == thing.namespace), None)

    def _above(self, uid: str, candidate: str) -> bool:
        """Whether one was ever an ancestor of another: a circle has no order, and breaks while it ends."""
        known, above = {uid}, [uid]
        for one in above:
            new = self.owners.get(one, set()) - known
            known |= new
            above += new
        return candidate in known - {uid}


async def tell(seed: int, length: int = 60) -> int:
    """A whole story; how much the collector did in it."""
    chance = random.Random(seed)
    clock = VirtualClock()
    async with gc_scene(Unreliable(clock, chance), clock=clock) as scene:
        story = Story(scene, chance)
        await story.tell(length)
        await story.end()
        Judge(scene).judge()
        return len(scene.storage.acted)  # type: ignore[attr-defined]


async def test_after_every_story_exactly_what_should_exist_does() -> None:
    acted = 0
    for seed in range(60):
        try:
            acted += await tell(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    assert acted > 500, "the collector had work to do"


@pytest.mark.soak
@pytest.mark.parametrize("block", range(10))
async def test_after_very_many_stories_too(block: int) -> None:
    for seed in range(1000 + block * 100, 1100 + block * 100):
        try:
            await tell(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
