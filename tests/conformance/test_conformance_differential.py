"""Every backend against the reference: the same random calls have the same outcomes and the same history."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from equipment.backends import Backend
from storage.base import Entry, Event, Guard, Page, Storage
from storage.errors import AlreadyExists, Conflict, GuardFailed, NotFound, StorageError
from storage.memory import MemoryStorage

NAMES = ("a", "a/b", "a/c", "b", "b/c", "ab")
VALUES = (b"", b"1", b"2", b"3")
OPERATIONS = ("create", "update", "delete", "set", "swap", "get", "exists", "keys", "list", "past", "count")


@dataclass
class Run:
    """One store being driven; revisions are noted in the order in which they came, to compare them with another's."""

    store: Storage
    root: str
    revisions: list[int] = field(default_factory=list)

    def number(self, revision: int) -> int:
        """The place of a revision in the order of this run; none is ever seen out of order."""
        if revision and revision not in self.revisions:
            assert not self.revisions or revision > self.revisions[-1], "revisions grow"
            self.revisions.append(revision)
        return self.revisions.index(revision) if revision else -1

    def revision(self, number: int) -> int:
        return self.revisions[number] if 0 <= number < len(self.revisions) else 0

    def plain(self, result: Any) -> Any:  # noqa: PLR0911 - a table
        """A result without what may differ between stores."""
        match result:
            case Entry():
                name = result.key.removeprefix(self.root)
                return (name, result.value, self.number(result.revision), self.number(result.create_revision))
            case Page():
                return [self.plain(entry) for entry in result.entries]
            case Event():
                return (result.kind, self.plain(result.entry), self.plain(result.previous))
            case AlreadyExists() | Conflict():
                return (type(result).__name__, self.plain(result.current))
            case GuardFailed():
                return ("GuardFailed", result.guard.key.removeprefix(self.root))
            case StorageError():
                return type(result).__name__
            case bool():
                return result
            case list():
                return [key.removeprefix(self.root) for key in result]
        return result

    async def outcome(self, call: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return self.plain(await call())
        except StorageError as error:
            return self.plain(error)


@dataclass(frozen=True)
class Step:
    """One call, in terms that mean the same to every store."""

    operation: str
    name: str
    value: bytes
    other: bytes
    expected: int
    guards: tuple[tuple[str, int], ...]

    def call(self, run: Run) -> Callable[[], Awaitable[Any]]:
        store, key = run.store, f"{run.root}{self.name}"
        guards = tuple(Guard(f"{run.root}{name}", run.revision(number)) for name, number in self.guards)
        expected = run.revision(self.expected)
        folder = f"{run.root}{self.name[0]}"

        async def write(revision: Awaitable[int]) -> int:
            return run.number(await revision)

        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "create": lambda: store.create(key, self.value, guards=guards),
            "update": lambda: store.update(key, self.value, expected_revision=expected, guards=guards),
            "delete": lambda: write(store.delete(key, expected_revision=expected, guards=guards)),
            "set": lambda: write(store.set(key, self.value)),
            "swap": lambda: store.compare_and_swap(key, self.other, self.value),
            "get": lambda: store.get(key),
            "exists": lambda: store.exists(key),
            "keys": lambda: store.keys(f"{folder}*"),
            "list": lambda: store.list(folder),
            "past": lambda: store.list(run.root, revision=expected),
            "count": lambda: store.count(folder),
        }
        return calls[self.operation]


async def _step(draw: random.Random, run: Run) -> Step:
    """A call that often, but not always, expects what is so."""
    name = draw.choice(NAMES)
    expected = draw.randrange(-1, len(run.revisions) + 1)
    guards = []
    if draw.random() < 0.7:
        expected = await _number_of(run, name, expected, created=False)
    while draw.random() < 0.3:
        guard = draw.choice(NAMES)
        guards.append((guard, await _number_of(run, guard, draw.randrange(-1, 5), created=draw.random() < 0.8)))
    value, other = draw.choice(VALUES), draw.choice(VALUES)
    return Step(draw.choice(OPERATIONS), name, value, other, expected, tuple(guards))


async def _number_of(run: Run, name: str, otherwise: int, *, created: bool) -> int:
    try:
        entry = await run.store.get(f"{run.root}{name}")
    except NotFound:
        return otherwise
    return run.number(entry.create_revision if created else entry.revision)


@pytest.mark.parametrize("seed", [1, 2, 3, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(4, 40))])
async def test_random_calls_end_as_they_do_in_memory(backend: Backend, seed: int) -> None:
    draw = random.Random(seed)
    reference = Run(MemoryStorage(), "/reference/r/")
    tested = Run(backend.store, backend.prefix)
    start = await tested.store.current_revision()
    kinds = set()
    for number in range(250):
        step = await _step(draw, reference)
        expected = await reference.outcome(step.call(reference))
        assert await tested.outcome(step.call(tested)) == expected, f"call {number}: {step}"
        kinds.add((step.operation, type(expected).__name__, expected[0] if isinstance(expected, tuple) else ""))
    assert len(kinds) > 25, "the calls had outcomes of many kinds"

    histories = []
    for run, after in ((reference, 1), (tested, start)):
        seen: list[Any] = []
        async with run.store.watch(run.root, after) as watch:
            while len(seen) < len(run.revisions):
                batch = await anext(watch)
                seen += [run.plain(event) for event in batch.events]
        histories.append(seen)
    assert histories[0] == histories[1]
