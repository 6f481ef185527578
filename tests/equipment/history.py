"""What a trio of daemons was asked, what it answered and what etcd says has happened: the promises, held against it.

`check` is pure: a history in, a list of sentences out, one for each promise that was broken; empty when all were kept.
The changes that etcd tells are the truth (`Change`, every revision below the root, with what was there before);
everything else is somebody's claim about it. Times are of the machine's monotonic clock, revisions are etcd's.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import orjson

MOST_TOLD = 25
"""A broken promise is often broken many times; so many sentences are enough to find out why."""


@dataclass(frozen=True, slots=True)
class Change:
    """One event as etcd tells it; a deletion has no value."""

    revision: int
    key: str
    value: bytes | None
    create_revision: int = 0
    previous: bytes | None = None
    previous_revision: int = 0


@dataclass(frozen=True, slots=True)
class Write:
    """One request that writes, and its answer: done (at `revision`), refused (not written), or unknown.

    `marker` is what only this write puts into the object; a delete has none. `expected` is the resourceVersion that
    the client demanded, 0 for none.
    """

    verb: Literal["create", "replace", "patch", "label", "delete"]
    name: str
    marker: str
    began: float
    ended: float
    outcome: Literal["done", "refused", "unknown"]
    revision: int = 0
    expected: int = 0
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.verb} {self.name} {self.marker} ({self.detail or self.outcome})"


@dataclass(frozen=True, slots=True)
class Read:
    """One GET that was answered; `revision` 0 is a 404."""

    name: str
    began: float
    ended: float
    revision: int
    marker: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Listing:
    """One consistent list that was answered: name → resourceVersion, at a revision."""

    began: float
    ended: float
    revision: int
    items: Mapping[str, int]
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Told:
    """One event of a watch through the API."""

    type: str
    name: str
    revision: int
    marker: str


@dataclass
class Stretch:
    """One connection of a watcher: after a list (`listed`), or resumed after the last event of the one before."""

    after: int
    told: list[Told] = field(default_factory=list)
    listed: bool = False
    through: int = 0
    """The highest revision of a bookmark, which says that everything up to it was told."""

    @property
    def position(self) -> int:
        """From where it is to be resumed."""
        return max(self.after, self.through, self.told[-1].revision if self.told else 0)


@dataclass(frozen=True, slots=True)
class Mark:
    """A bookmark as it was found in Redis; `era` counts the times that Redis lost its memory."""

    watcher: str
    revision: int
    term: int
    at: float
    era: int = 0


@dataclass(frozen=True, slots=True)
class Attempt:
    """A reconcile that ended well, as the controller itself has written down before anybody else knew."""

    at: float
    term: int
    name: str
    revision: int
    identity: str = ""


@dataclass(frozen=True, slots=True)
class Delivered:
    """A delivery that the event consumer's handler has taken, in its own words; `process` is one run of a daemon.

    A RESYNC bears the revision of the state that follows it, and no name.
    """

    at: float
    identity: str
    process: str
    type: str
    name: str
    revision: int


@dataclass(frozen=True, slots=True)
class Ruled:
    """Keys that leaders of one of these locks write; of `shared` ones users write all but status and finalizers."""

    prefix: str
    locks: tuple[str, ...]
    shared: bool = False
    fields: tuple[str, ...] = ()
    """If given, the rule is only about changes of status fields whose names begin so."""

    def binds(self, change: Change) -> bool:
        """Whether only a leader of these locks may have made the change."""
        if not change.key.startswith(self.prefix):
            return False
        if self.fields:
            return any(name.startswith(self.fields) for name in _changed(change))
        return not self.shared or _leaders_write(change)


@dataclass
class History:
    """Everything about one scene, from the state at `base` on. Gadgets lie below `prefix`, leader keys in `leaders`."""

    prefix: str
    leaders: str
    base: int = 0
    state: dict[str, Change] = field(default_factory=dict)
    """What was there at `base`: each key's last put."""
    changes: list[Change] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    listings: list[Listing] = field(default_factory=list)
    watchers: dict[str, list[Stretch]] = field(default_factory=dict)
    marks: list[Mark] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    surprises: list[str] = field(default_factory=list)
    """Answers that nobody may get whatever happens, as a 500."""
    ruled: Sequence[Ruled] = ()
    deliveries: list[Delivered] = field(default_factory=list)
    """In the order in which they were taken; those of other objects are left out."""
    watcher_of_gadgets: str = "gadgets"
    consumer: str = "recorder"
    """The event consumer, its lock and its bookmark."""
    lock_of_gadgets: str = "gadgets"


@dataclass(frozen=True, slots=True)
class Facts:
    """What of a stored object the promises speak of."""

    marker: str
    labels: Mapping[str, str]
    uid: str
    deleting: bool
    finalizers: tuple[str, ...]
    term: int
    serial: str
    status: Mapping[str, Any]


_ABSENT = Facts("", {}, "", deleting=False, finalizers=(), term=0, serial="", status={})
LABEL = "test.neuroglia.io/op"


@lru_cache(maxsize=100_000)
def facts(value: bytes | None) -> Facts:
    """A stored object as the promises see it."""
    if value is None:
        return _ABSENT
    document = orjson.loads(value)
    metadata, status = document["metadata"], document.get("status") or {}
    return Facts(
        marker=document["spec"].get("op", ""),
        labels=metadata.get("labels") or {},
        uid=metadata.get("uid", ""),
        deleting=metadata.get("deletionTimestamp") is not None,
        finalizers=tuple(metadata.get("finalizers") or ()),
        term=status.get("term", 0),
        serial=status.get("serial", ""),
        status=status,
    )


def check(history: History) -> list[str]:
    """Every promise that this history breaks, a sentence each."""
    found = _Checker(history)
    broken = [
        *history.surprises,
        *found.order(),
        *found.writes(),
        *found.strangers(),
        *found.reads(),
        *found.listings(),
        *found.watches(),
        *found.terms(),
        *found.bookmarks(),
        *found.deliveries(),
    ]
    return broken[:MOST_TOLD]


class _Checker:
    def __init__(self, history: History) -> None:
        self._history = history
        self._gadgets = [c for c in history.changes if c.key.startswith(history.prefix)]
        self._at = {(c.key, c.revision): c for c in self._gadgets}
        self._lines: dict[str, list[Change]] = defaultdict(list)
        """For each key its changes in order, what was there at the beginning included."""
        for first in history.state.values():
            self._lines[first.key].append(first)
        for change in history.changes:
            self._lines[change.key].append(change)
        done = sorted((w.ended, w.revision) for w in history.writes if w.outcome == "done")
        self._ends = [ended for ended, _ in done]
        self._heads: list[int] = []
        for _, revision in done:
            self._heads.append(max(revision, self._heads[-1] if self._heads else 0))

    def order(self) -> Iterator[str]:
        """The truth itself: revisions rise, and each change says what was there before."""
        highest = self._history.base
        for change in self._history.changes:
            if change.revision < highest or change.revision <= self._history.base:
                yield f"the reference is out of order at {change.revision}"
            highest = max(highest, change.revision)
        for line in self._lines.values():
            for earlier, later in pairwise(line):
                was = 0 if earlier.value is None else earlier.revision
                if later.previous_revision != was:
                    yield f"the reference has a gap: {later.key} at {later.revision} followed {later.previous_revision}"

    def writes(self) -> Iterator[str]:
        """What was acknowledged is there, what was refused is nowhere, what is unknown is there once at most."""
        introduced: dict[str, list[Change]] = defaultdict(list)
        for change in self._gadgets:
            before, now = facts(change.previous), facts(change.value)
            if now.marker and now.marker != before.marker:
                introduced[now.marker].append(change)
            label = now.labels.get(LABEL, "")
            if label and label != before.labels.get(LABEL):
                introduced[label].append(change)
        for write in self._history.writes:
            key = self._key(write.name)
            if write.outcome == "done":
                yield from self._done(write, key)
            if write.verb == "delete":
                continue
            times = introduced.get(write.marker, [])
            if write.outcome == "refused" and times:
                yield f"{write} was refused and is there at {times[0].revision}"
            if len(times) > 1:
                yield f"{write} was made {len(times)} times, at {[c.revision for c in times]}"
            yield from (f"{write} changed {c.key}" for c in times if c.key != key)

    def _done(self, write: Write, key: str) -> Iterator[str]:
        floor = self._floor(write.began)
        change = self._at.get((key, write.revision))
        if write.verb == "delete":
            yield from self._deleted(write, key, change)
            return
        if change is None:
            yield f"{write} was acknowledged at {write.revision} and is not there"
            return
        now, before = facts(change.value), facts(change.previous)
        carried = now.labels.get(LABEL) if write.verb == "label" else now.marker
        carried_before = before.labels.get(LABEL) if write.verb == "label" else before.marker
        if carried != write.marker or carried_before == write.marker:
            yield f"{write} was acknowledged at {write.revision}, where {carried!r} is"
        if write.verb == "create" and change.previous is not None:
            yield f"{write} replaced an object at {write.revision}"
        if write.expected and change.previous_revision != write.expected:
            yield f"{write} passed on {change.previous_revision} and demanded {write.expected}"
        if write.revision <= floor:
            yield f"{write} is at {write.revision}, below {floor}, which was acknowledged before it began"

    def _deleted(self, write: Write, key: str, change: Change | None) -> Iterator[str]:
        """A delete is done when the object is marked or gone; the revision is the object's in the answer, else 0."""
        if write.revision and change is not None and change.value is not None and not facts(change.value).deleting:
            yield f"{write} was acknowledged at {write.revision}, where the object is not being deleted"
        if write.revision and change is None and write.revision > self._history.base:
            yield f"{write} was acknowledged at {write.revision}, where nothing happened"
        if not write.revision and not any(c.value is None for c in self._lines.get(key, ())):
            yield f"{write} was acknowledged and the object never went"

    def strangers(self) -> Iterator[str]:
        """Each change of a gadget was asked for by somebody who was not refused, or is a controller's."""
        asked = {w.marker for w in self._history.writes if w.outcome != "refused" and w.verb != "delete"}
        deletes: dict[str, list[Write]] = defaultdict(list)
        for write in self._history.writes:
            if write.verb == "delete" and write.outcome != "refused":
                deletes[write.name].append(write)
        for change in self._gadgets:
            before, now = facts(change.previous), facts(change.value)
            name = change.key.removeprefix(self._history.prefix)
            if now.marker and now.marker != before.marker and now.marker not in asked:
                yield f"nobody who was not refused wrote {now.marker} into {name} at {change.revision}"
            marked = (now.deleting and not before.deleting) or (change.value is None and not before.deleting)
            if marked and not deletes[name]:
                yield f"nobody who was not refused asked for the end of {name} at {change.revision}"

    def reads(self) -> Iterator[str]:
        """A GET tells the state at some moment between its beginning and its end."""
        for read in self._history.reads:
            key, floor = self._key(read.name), self._floor(read.began)
            if read.revision:
                change = self._at.get((key, read.revision)) or self._history.state.get(key)
                if change is None or change.revision != read.revision or change.value is None:
                    yield f"a GET of {read.name} ({read.detail}) told revision {read.revision}, which never was"
                    continue
                if facts(change.value).marker != read.marker:
                    yield f"a GET of {read.name} ({read.detail}) told {read.marker!r} at {read.revision}"
                after = self._after(key, read.revision)
                if after is not None and after.revision <= floor:
                    yield (
                        f"a GET of {read.name} ({read.detail}) told revision {read.revision}; "
                        f"{after.revision} had happened and {floor} was acknowledged before it began"
                    )
            elif not self._was_absent(key, floor):
                yield f"a GET of {read.name} ({read.detail}) told of no object, which was there from {floor} on"

    def listings(self) -> Iterator[str]:
        """A list is one revision, not older than what was acknowledged before it was asked for."""
        for listing in self._history.listings:
            floor = self._floor(listing.began)
            if listing.revision < floor:
                yield f"a list ({listing.detail}) was of {listing.revision}, and {floor} had been acknowledged"
            wanted = self._state(listing.revision)
            if dict(listing.items) != wanted:
                wrong = set(listing.items.items()) ^ set(wanted.items())
                yield f"a list ({listing.detail}) at {listing.revision} was wrong about {sorted(wrong)[:5]}"

    def watches(self) -> Iterator[str]:
        """No gap, no repeat but of one revision at a resume, and everything as it happened."""
        last = self._gadgets[-1].revision if self._gadgets else 0
        for name, stretches in self._history.watchers.items():
            chains: list[tuple[int, list[Told]]] = []
            position = 0
            for stretch in stretches:
                if stretch.listed or not chains:
                    chains.append((stretch.after, []))
                elif stretch.after != position:
                    yield f"watch {name} was resumed after {stretch.after} instead of {position}"
                told = chains[-1][1]
                if stretch.told and stretch.told[0].revision == stretch.after:
                    # The revision at which it resumed is told again, whole.
                    while told and told[-1].revision == stretch.after:
                        told.pop()
                told.extend(stretch.told)
                position = stretch.position
            for start, told in chains:
                yield from self._chain(name, start, told)
            if position < last:
                yield f"watch {name} was told nothing after {position}, and {last} happened"
            for stretch in stretches:
                heard = max((t.revision for t in stretch.told), default=stretch.after)
                missed = [c.revision for c in self._gadgets if heard < c.revision <= stretch.through]
                if missed:
                    yield f"watch {name} was told by a bookmark at {stretch.through} that it had everything: {missed}"

    def _chain(self, name: str, start: int, told: Sequence[Told]) -> Iterator[str]:
        if not told:
            return
        ends = told[-1].revision
        happened = [self._as_told(c) for c in self._gadgets if start < c.revision <= ends]
        begun = [t for t in told if t.revision > start]
        for number in range(max(len(happened), len(begun))):
            heard = begun[number] if number < len(begun) else None
            truth = happened[number] if number < len(happened) else None
            if heard != truth:
                yield f"watch {name} from {start}: event {number} was told as {heard}, and it is {truth}"
                return

    def _as_told(self, change: Change) -> Told:
        name = change.key.removeprefix(self._history.prefix)
        if change.value is None:
            return Told("DELETED", name, change.revision, facts(change.previous).marker)
        kind = "ADDED" if change.previous is None else "MODIFIED"
        return Told(kind, name, change.revision, facts(change.value).marker)

    def terms(self) -> Iterator[str]:
        """No write of a controller under a term that is not the lock's at that very revision."""
        gadgets = self._holders(self._history.lock_of_gadgets)
        for change in self._gadgets:
            before, now = facts(change.previous), facts(change.value)
            holder = _holder(gadgets, change.revision)
            if now.serial != before.serial and now.serial and now.term != holder:
                yield f"{change.key} was written at {change.revision} under term {now.term}; the term was {holder}"
            let_go = change.value is None and before.deleting
            if (let_go or (change.value is not None and now.finalizers != before.finalizers)) and not holder:
                yield f"{change.key} was written at {change.revision} by a controller that nobody led"
        for rule in self._history.ruled:
            holders = [self._holders(lock) for lock in rule.locks]
            for change in self._history.changes:
                if rule.binds(change) and not any(_holder(held, change.revision) for held in holders):
                    locks = " or ".join(rule.locks)
                    yield f"{change.key} was written at {change.revision} while nobody led {locks}"

    def bookmarks(self) -> Iterator[str]:
        """A bookmark never passes an event that was not attempted, moves back, or is taken by an older term."""
        attempts: dict[str, list[Attempt]] = defaultdict(list)
        for attempt in self._history.attempts:
            attempts[attempt.name].append(attempt)
        foreign = [c for c in self._gadgets if c.value is not None and _foreign(c)]
        latest: dict[tuple[str, int], Mark] = {}
        for mark in self._history.marks:
            before = latest.get((mark.watcher, mark.era))
            if before is not None and (mark.term < before.term or mark.revision < before.revision):
                yield f"the bookmark went from {before} back to {mark}"
            latest[mark.watcher, mark.era] = mark
            if mark.watcher != self._history.watcher_of_gadgets:
                continue
            for change in foreign:
                if change.revision > mark.revision:
                    break
                name = change.key.removeprefix(self._history.prefix)
                made = any(a.revision >= change.revision and a.at <= mark.at for a in attempts[name])
                if not made and not self._ended_by(change, name, mark.at):
                    yield f"the bookmark {mark} passes {name} at {change.revision}, which was not attempted"
                    break

    def deliveries(self) -> Iterator[str]:
        """A consumer is told of every event, in order in each term, or that there was a gap; its bookmark is no lie."""
        truth = {(c.revision, c.key): self._as_told(c) for c in self._gadgets}
        taken: dict[tuple[int, str], float] = {}
        gaps = [(d.revision, d.at) for d in self._history.deliveries if d.type == "RESYNC"]
        latest: dict[str, int] = {}
        since: dict[str, set[tuple[int, str]]] = defaultdict(set)
        steps_back: dict[str, int] = defaultdict(int)
        for d in self._history.deliveries:
            if d.type in ("RESYNC", "SYNC"):
                latest[d.process] = d.revision if d.type == "RESYNC" else latest.get(d.process, 0)
                continue
            known = truth.get((d.revision, self._key(d.name)))
            if d.revision > self._history.base and (known is None or known.type != d.type):
                yield f"the consumer was told {d}, and it is {known}"
            if d.revision < latest.get(d.process, 0) or (d.revision, d.name) in since[d.process]:
                steps_back[d.identity] += 1
                since[d.process].clear()
            latest[d.process] = d.revision
            since[d.process].add((d.revision, d.name))
            taken.setdefault((d.revision, self._key(d.name)), d.at)
        terms: dict[str, int] = defaultdict(int)
        for change in self._lines.get(f"{self._history.leaders}{self._history.consumer}", ()):
            if change.value is not None:
                terms[orjson.loads(change.value).get("identity", "")] += 1
        for identity, count in steps_back.items():
            begun = sum(n for who, n in terms.items() if who.startswith(identity))
            if count > begun:
                yield f"the consumer of {identity} went back {count} times in {begun} terms"
        marks = [mark for mark in self._history.marks if mark.watcher == self._history.consumer]
        for change in self._gadgets:
            at = taken.get((change.revision, change.key))
            told = [t for revision, t in gaps if revision >= change.revision] + ([at] if at is not None else [])
            if not told:
                yield f"the consumer was never told of {change.key} at {change.revision}"
            lies = [mark for mark in marks if mark.revision >= change.revision and mark.at < min(told, default=0.0)]
            if lies:
                yield f"the bookmark {lies[0]} passes {change.key} at {change.revision}, which was not delivered"

        yield from self._states_told_anew()

    def _states_told_anew(self) -> Iterator[str]:
        """After a RESYNC the consumer is told of every object that there was, before anything else."""
        by_process: dict[str, list[Delivered]] = defaultdict(list)
        for d in self._history.deliveries:
            by_process[d.process].append(d)
        for deliveries in by_process.values():
            state: tuple[int, dict[str, int]] | None = None
            for d in deliveries:
                if d.type == "RESYNC":
                    state = d.revision, {}
                elif d.type == "SYNC" and state:
                    state[1][d.name] = d.revision
                elif state:
                    if state[0] >= self._history.base and state[1] != (wanted := self._state(state[0])):
                        wrong = sorted(set(state[1].items()) ^ set(wanted.items()))
                        yield f"the consumer was told anew of the state at {state[0]} and wrongly of {wrong[:5]}"
                    state = None

    def _ended_by(self, change: Change, name: str, at: float) -> bool:
        """Whether the object may have been gone at that time: then there is nothing left to attempt."""
        asked = any(w.verb == "delete" and w.name == name and w.began <= at for w in self._history.writes)
        return asked and any(c.value is None and c.revision > change.revision for c in self._lines[change.key])

    def _key(self, name: str) -> str:
        return f"{self._history.prefix}{name}"

    def _floor(self, began: float) -> int:
        """The highest revision that was acknowledged to anybody before this moment."""
        number = bisect_left(self._ends, began)
        return self._heads[number - 1] if number else self._history.base

    def _after(self, key: str, revision: int) -> Change | None:
        return next((c for c in self._lines[key] if c.revision > revision), None)

    def _was_absent(self, key: str, floor: int) -> bool:
        """Whether there was no such object at some revision from `floor` on."""
        line = self._lines.get(key, [])
        before = [c for c in line if c.revision <= floor]
        return not before or before[-1].value is None or any(c.value is None for c in line if c.revision > floor)

    def _state(self, revision: int) -> dict[str, int]:
        """Name → revision of every gadget at a revision."""
        found: dict[str, int] = {}
        for key, line in self._lines.items():
            if key.startswith(self._history.prefix):
                number = bisect_right(line, revision, key=lambda c: c.revision)
                if number and line[number - 1].value is not None:
                    found[key.removeprefix(self._history.prefix)] = line[number - 1].revision
        return found

    def _holders(self, lock: str) -> list[tuple[int, int]]:
        """From which revision on which term held a lock; 0 is nobody."""
        line = self._lines.get(f"{self._history.leaders}{lock}", [])
        return [(c.revision, 0 if c.value is None else c.create_revision) for c in line]


def _holder(holders: Iterable[tuple[int, int]], revision: int) -> int:
    """Whose guard a write at this revision could have passed: the state just before it."""
    term = 0
    for since, holder in holders:
        if since >= revision:
            break
        term = holder
    return term


def _changed(change: Change) -> set[str]:
    """The status fields that a change of an existing object has changed."""
    if change.value is None or change.previous is None:
        return set()
    before, now = facts(change.previous).status, facts(change.value).status
    return {name for name in {*before, *now} if before.get(name) != now.get(name)}


def _leaders_write(change: Change) -> bool:
    """Whether only a leader may have made this change: of a status, of finalizers, or the last of an ended object."""
    if change.value is None:
        return bool(facts(change.previous).deleting)
    before, now = facts(change.previous), facts(change.value)
    if change.previous is None:
        return False
    return now.status != before.status or now.finalizers != before.finalizers


def _foreign(change: Change) -> bool:
    """Whether somebody else than the gadgets' controller made this change, so that the controller must look at it."""
    before, now = facts(change.previous), facts(change.value)
    if change.previous is None:
        return True
    return (now.marker, now.labels, now.deleting) != (before.marker, before.labels, before.deleting)
