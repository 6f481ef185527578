"""Writers that contend for a few keys, what each was told, and the proof against etcd's own history.

Every value is written once only, so a put in the history belongs to one attempt. Deletions from one revision are alike
and count as one: two writers may be told of the same. `Ledger.check` holds promise 1 (a write passes on the expected
revision and under its guard alone) and promise 5 (what was told is true).
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from equipment.etcd import Change, Gateway
from equipment.waiting import until
from storage.base import Guard
from storage.errors import (
    AlreadyExists,
    Conflict,
    GuardFailed,
    NotFound,
    OutcomeUnknown,
    StorageError,
    Unavailable,
)
from storage.etcd import EtcdStorage


@dataclass(frozen=True, slots=True)
class Attempt:
    """A write and what was told about it: its revision, or an error."""

    key: str
    value: bytes | None
    expected: int
    guard: Guard
    told: int | StorageError


@dataclass
class Ledger:
    prefix: str
    attempts: list[Attempt] = field(default_factory=list)
    guard: Guard = field(default_factory=lambda: Guard("", 0))
    stop: bool = False

    @property
    def keys(self) -> list[str]:
        return [f"{self.prefix}{name}" for name in "abcd"]

    @property
    def told(self) -> Counter[str]:
        """How many successes and how many errors of each class."""
        return Counter("success" if isinstance(a.told, int) else type(a.told).__name__ for a in self.attempts)

    async def lead(self, direct: Gateway) -> None:
        """Make the guard anew: writes under the former one must fail from here on."""
        key = f"{self.prefix}guard"
        await direct.delete(key)
        self.guard = Guard(key, await direct.put(key, b""))

    @asynccontextmanager
    async def writers(self, storages: Sequence[EtcdStorage], count: int) -> AsyncIterator[None]:
        """So many writers, spread over the storages, until the end of the block; their own errors are the test's."""
        async with asyncio.TaskGroup() as group:
            for i in range(count):
                group.create_task(self.contend(storages[i % len(storages)], f"w{i}"))
            try:
                yield
            finally:
                self.stop = True

    async def succeed(self, more: int, timeout: float = 30.0) -> None:
        """Wait for so many more successes."""
        goal = self.told["success"] + more
        await until(lambda: self.told["success"] >= goal, f"{goal} successes: {self.told}", timeout)

    async def contend(self, storage: EtcdStorage, name: str) -> None:
        """Read a key and write it, by create, update or delete, until `stop`."""
        draw = random.Random(name)
        count = 0
        while not self.stop:
            count += 1
            key, value, guard = draw.choice(self.keys), f"{name}.{count}".encode(), self.guard
            try:
                current = await storage.get(key)
            except NotFound:
                await self._note(key, value, 0, guard, _revision(storage.create(key, value, guards=(guard,))))
            except Unavailable:
                continue
            else:
                at = current.revision
                if draw.random() < 0.15:
                    await self._note(key, None, at, guard, storage.delete(key, expected_revision=at, guards=(guard,)))
                else:
                    update = storage.update(key, value, expected_revision=at, guards=(guard,))
                    await self._note(key, value, at, guard, _revision(update))

    async def _note(self, key: str, value: bytes | None, expected: int, guard: Guard, write: Awaitable[int]) -> None:
        try:
            told: int | StorageError = await write
        except (AlreadyExists, Conflict, GuardFailed, OutcomeUnknown, Unavailable) as error:
            told = error
        self.attempts.append(Attempt(key, value, expected, guard, told))

    def check(self, history: Sequence[Change]) -> None:
        """Hold everything that was told against everything that has happened, from the first guard on."""
        previous = _previous_revisions(history)
        guards = _guard_at(history, f"{self.prefix}guard")
        at = {(change.key, change.revision): change for change in history}
        by_value: dict[bytes, list[Change]] = {}
        for change in history:
            if change.value:
                by_value.setdefault(change.value, []).append(change)
        for attempt in self.attempts:
            if isinstance(attempt.told, int):
                change = at.get((attempt.key, attempt.told))
                assert change is not None, f"{attempt} was told and did not happen"
                assert change.value == attempt.value, f"{attempt} was told, {change} happened"
                assert previous[change] == attempt.expected, f"{attempt} passed on revision {previous[change]}"
                if attempt.value is not None:
                    assert guards[attempt.told] == attempt.guard.create_revision, f"{attempt} passed without its guard"
            if attempt.value is not None:
                happened = by_value.get(attempt.value, [])
                most = 1 if isinstance(attempt.told, int | OutcomeUnknown) else 0
                assert len(happened) <= most, f"{attempt} happened: {happened}"
        for change in history:
            if change.value is None and change.key in self.keys:
                self._check_delete(change, previous[change], guards[change.revision])

    def _check_delete(self, change: Change, expected: int, guard: int) -> None:
        """One of those who may have made it was told so, or that it is unknown, and held the guard."""
        assert any(
            isinstance(attempt.told, OutcomeUnknown) or attempt.told == change.revision
            for attempt in self.attempts
            if attempt.value is None
            and (attempt.key, attempt.expected) == (change.key, expected)
            and attempt.guard.create_revision == guard
        ), f"{change} was made by nobody who might"


async def _revision(write: Awaitable[object]) -> int:
    entry = await write
    revision: int = entry.revision  # type: ignore[attr-defined]
    return revision


def _previous_revisions(history: Sequence[Change]) -> dict[Change, int]:
    """For each change the revision that its key was at before; 0 when it was absent."""
    latest: dict[str, int] = {}
    found: dict[Change, int] = {}
    for change in history:
        found[change] = latest.get(change.key, 0)
        latest[change.key] = 0 if change.value is None else change.revision
    return found


def _guard_at(history: Sequence[Change], key: str) -> dict[int, int]:
    """For each revision the create revision of the guard; 0 when it was absent."""
    held = 0
    found: dict[int, int] = {}
    for change in history:
        if change.key == key:
            held = 0 if change.value is None else held or change.revision
        found[change.revision] = held
    return found
