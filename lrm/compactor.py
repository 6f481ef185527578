"""Forgets the store's history that is older than a retention, and the barrier keys of daemons that are gone.

Which revision is how old is known by samples: at least so old, never by wall time. Within a process a sample ages on
the monotonic clock; what is written down is its age, and a reader lets it age from the moment of reading. So setting
any clock, a pause, a change of leader and a restart can only make history look younger than it is: then it is kept
for longer. Compacting is therefore harmless whoever does it, and needs no fence; it cannot have one.

On every daemon `watch` looks at the store, and compacts if the store is out of space while nobody leads; the leader
does all of it, and writes the samples down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson
import structlog

from lrm.cache import Cache, CacheUpdate
from lrm.election import Term
from lrm.errors import NotLeading
from lrm.model import rfc3339
from storage.base import BARRIER_SEGMENT, Entry, Guard, Health, Storage
from storage.clock import Clock
from storage.errors import Conflict, GuardFailed, NotFound, StorageError, Unavailable

log = structlog.get_logger(__name__)

BARRIER_SECONDS = 3600.0
"""Barrier keys that were not written for so long are deleted; a live watch writes a new one when it needs it."""
_TICK = 60.0
"""Seconds between looks at the store: what a change of leader or a restart may lose of a sample's age."""
_STEPS = 60
"""Samples within the retention: what is kept may be older than the retention by a 60th of it, or by a look."""
_MOST_SAMPLES = 500


@dataclass(frozen=True, slots=True)
class Sample:
    """A revision that had been written by `seen` (monotonic seconds of this process)."""

    revision: int
    seen: float


class Samples:
    """How old revisions of one line of history are, at least. At most some 500, whatever is added."""

    def __init__(self, *, reach: float, spacing: float) -> None:
        self.line: tuple[str, str] | None = None
        """Cluster id and epoch of the line; None while nothing is known."""
        self._reach = reach
        self._spacing = max(spacing, reach / _MOST_SAMPLES)
        self._samples: list[Sample] = []

    def __len__(self) -> int:
        return len(self._samples)

    def saw(self, line: tuple[str, str], revision: int, now: float) -> None:
        """The store is on `line` and at `revision`. Another line, or a lower revision, is the end of all that was."""
        if line != self.line or (self._samples and revision < self._samples[-1].revision):
            self.clear()
            self.line = line
        self._add([Sample(revision, now)], now)

    def add(self, ages: Iterable[tuple[float, int]], now: float) -> None:
        """Take over samples of this line: seconds of age, revision."""
        self._add([Sample(revision, now - age) for age, revision in ages], now)

    def older_than(self, seconds: float, now: float) -> int:
        """The highest revision that is surely so old; 0 when none is."""
        return max((s.revision for s in self._samples if now - s.seen >= seconds), default=0)

    def ages(self, now: float) -> list[tuple[float, int]]:
        """What `add` takes over: the ages are right now, and too low whenever they are read."""
        return [(now - s.seen, s.revision) for s in self._samples]

    def clear(self) -> None:
        """Nothing is known any more."""
        self.line = None
        self._samples = []

    def _add(self, samples: list[Sample], now: float) -> None:
        """In order of revision and of age; one that tells nothing beside its neighbours is left out."""
        useful: list[Sample] = []
        for sample in sorted([*self._samples, *samples], key=lambda s: (s.revision, -s.seen), reverse=True):
            if not useful or sample.seen < useful[-1].seen:
                useful.append(sample)
        useful.reverse()
        past_reach = [s for s in useful if now - s.seen >= self._reach]
        self._samples = past_reach[-1:]
        for sample in useful[len(past_reach) :]:
            if not self._samples or sample.seen - self._samples[-1].seen >= self._spacing:
                self._samples.append(sample)


class Compactor:
    """See the module. It is led (`lrm.led.Led`), and `watch` runs for as long as the daemon does."""

    name = "compactor"
    lock_name = "compactor"

    def __init__(
        self,
        storage: Storage,
        cache: Cache,
        clock: Clock,
        *,
        root: str,
        every: float,
        retention: float,
        is_led: Callable[[], bool],
        compacts: bool = True,
    ) -> None:
        """`every` and `retention` are seconds. `is_led` tells whether some daemon leads, or may lead, this lock.

        With `compacts` false the store compacts itself: `watch` only looks.
        """
        self.health: Health | None = None
        """What the store said of itself at the last look, at most a minute ago; None before the first."""
        self.error = ""
        """Why the last turn failed, or the last look where another leads; empty when it did not."""
        self._storage = storage
        self._clock = clock
        self._key = f"{root}/compactor"
        self._barriers = f"{root}/r/{BARRIER_SEGMENT}"
        self._every = every
        self._retention = retention
        self._is_led = is_led
        self._compacts = compacts
        self._tick = min(_TICK, every)
        self._samples = Samples(reach=max(retention, BARRIER_SECONDS), spacing=retention / _STEPS)
        self._due = float("-inf")
        self._compacted = 0
        self._compacted_at: datetime | None = None
        self._compactions = 0
        self._barriers_deleted = 0
        self._in_hand = asyncio.Lock()
        self._leading = False
        self._stopping = False
        cache.subscribe(self._on_update)

    async def run(self, term: Term) -> None:
        """Take turns until the term is lost (returns) or the task is cancelled."""
        self._leading = True
        try:
            async with asyncio.TaskGroup() as tasks:
                turns = tasks.create_task(self._lead(term), name="compactor's turns")
                await term.wait_lost()
                turns.cancel()
        finally:
            self._leading = False

    async def drain(self, seconds: float) -> None:
        """Begin no turn more and let the one in hand end."""
        self._stopping = True
        try:
            async with self._clock.timeout(seconds), self._in_hand:
                return
        except TimeoutError:
            log.warning("compactor.drain_timed_out")

    async def watch(self) -> None:
        """Look at the store again and again, and compact it in need, until cancelled; on every daemon."""
        while True:
            try:
                await self.look()
                if self._compacts and self.out_of_space and not self._is_led():
                    await self.compact_in_need()
            except StorageError as error:
                self._failed(error)
            else:
                if not self._leading:
                    self.error = ""
            await self._clock.sleep(self._tick)

    async def look(self) -> Health:
        """Ask the store how it is and take a sample. Raises `Unavailable` when it does not answer."""
        health = await self._storage.health()
        self.health = health
        if not health.ok:
            raise Unavailable(" ".join(health.notes) or "the store does not answer")
        self._samples.saw((health.cluster_id, health.epoch), health.revision, self._clock.monotonic())
        return health

    @property
    def out_of_space(self) -> bool:
        """Whether a member had raised the alarm at the last look."""
        return self.health is not None and any("NOSPACE" in member.alarms for member in self.health.members)

    async def compact_in_need(self) -> None:
        """Compact without leading, and without a write: a full store refuses both an election and a put.

        At most once in `every`; to no later revision than a leader would. Raises `StorageError`.
        """
        await self._recall()
        if await self._compact():
            log.warning("compactor.compacted_in_need", revision=self._compacted)

    def describe(self) -> dict[str, Any]:
        """Its entry in the daemon's status."""
        return {
            "name": self.name,
            "lock": self.lock_name,
            "compactions": self._compactions,
            "compactedAt": rfc3339(self._compacted_at) if self._compacted_at else None,
            "compactedRevision": self._compacted,
            "samples": len(self._samples),
            "barriersDeleted": self._barriers_deleted,
            "error": self.error,
        }

    async def _lead(self, term: Term) -> None:
        while not self._stopping:
            async with self._in_hand:
                await self._turn(term)
            await self._clock.sleep(self._tick)

    async def _turn(self, term: Term) -> None:
        try:
            kept = await self._recall()
            term.check()
            if await self._compact():
                log.info("compactor.compacted", revision=self._compacted)
                await self._delete_barriers(term)
            await self._write_down(kept, term)
        except (NotLeading, GuardFailed) as error:
            log.info("compactor.not_leading", detail=str(error))
            term.lost()
        except StorageError as error:
            self._failed(error)
        else:
            self.error = ""

    async def _recall(self) -> Entry | None:
        """Look at the store and add what an earlier leader wrote down; the entry, for the write that replaces it.

        The entry is read first: then no sample in it is later than what the look sees, unless the line has ended.
        """
        try:
            entry = await self._storage.get(self._key)
        except NotFound:
            entry = None
        health = await self.look()
        if entry is None:
            return None
        try:
            line, ages = _read(entry.value)
        except (ValueError, KeyError, TypeError) as error:
            log.warning("compactor.samples_unreadable", key=self._key, error=str(error))
            return entry
        if line == self._samples.line and all(revision <= health.revision for _, revision in ages):
            self._samples.add(ages, self._clock.monotonic())
        return entry

    async def _compact(self) -> bool:
        """Compact if it is due and there is something to forget; whether it was done."""
        now = self._clock.monotonic()
        revision = self._samples.older_than(self._retention, now)
        if now < self._due or revision in (0, self._compacted):
            return False
        await self._storage.compact(revision)
        self._compacted, self._compacted_at = revision, self._clock.now()
        self._due = now + self._every
        self._compactions += 1
        return True

    async def _delete_barriers(self, term: Term) -> None:
        """Delete the keys of watches that are gone; one that is written meanwhile stays. Raises `GuardFailed`."""
        old = self._samples.older_than(BARRIER_SECONDS, self._clock.monotonic())
        for entry in (await self._storage.list(self._barriers)).entries:
            if entry.revision <= old:
                try:
                    await self._storage.delete(entry.key, expected_revision=entry.revision, guards=_guards(term))
                except Conflict:
                    continue
                self._barriers_deleted += 1

    async def _write_down(self, kept: Entry | None, term: Term) -> None:
        """Let the samples outlive this process. Raises `GuardFailed`, and `Conflict` when another has written."""
        if self._samples.line is None:
            return
        value = _written(self._samples.line, self._samples.ages(self._clock.monotonic()))
        if kept is None:
            await self._storage.create(self._key, value, guards=_guards(term))
        else:
            await self._storage.update(self._key, value, expected_revision=kept.revision, guards=_guards(term))

    def _failed(self, error: StorageError) -> None:
        if str(error) != self.error:
            log.warning("compactor.failed", error=str(error))
        self.error = str(error)

    def _on_update(self, update: CacheUpdate) -> None:
        if update.reset:
            self._samples.clear()


def _guards(term: Term) -> tuple[Guard, ...]:
    return (term.guard(),)


def _written(line: tuple[str, str], ages: Iterable[tuple[float, int]]) -> bytes:
    cluster_id, epoch = line
    samples = [{"ageSeconds": int(age), "revision": revision} for age, revision in ages]
    return orjson.dumps({"clusterId": cluster_id, "epoch": epoch, "samples": samples})


def _read(value: bytes) -> tuple[tuple[str, str], list[tuple[float, int]]]:
    """Line and samples. Raises ValueError, KeyError or TypeError for what `_written` did not write."""
    document = orjson.loads(value)
    line = (document["clusterId"], document["epoch"])
    return line, [(float(s["ageSeconds"]), int(s["revision"])) for s in document["samples"]]
