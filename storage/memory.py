"""The contract in memory: the reference by which the etcd backend is judged, and the store of tests that need no etcd.

It keeps the ten promises for one process: history, compaction, leases that end on the injected clock, watches with
barriers, and restores from a snapshot (`snapshot`, `restore`: what a rolled-back etcd looks like). Every call yields to
the loop once before it acts, so callers interleave as they do over a network. Nothing survives the object.
Called by tests and by `lrm.testing`; a daemon uses `storage.etcd`.
"""

from __future__ import annotations

import bisect
import builtins
import copy
import itertools
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from storage.base import (
    Batch,
    Entry,
    Event,
    Guard,
    Health,
    Lease,
    Line,
    Member,
    Page,
    Watch,
    is_barrier_key,
    labels_match,
)
from storage.clock import Clock, SystemClock
from storage.errors import (
    AlreadyExists,
    Compacted,
    Conflict,
    FutureRevision,
    GuardFailed,
    LeaseNotFound,
    NotFound,
    StoreReset,
    Unavailable,
)
from storage.keys import (
    KeyPattern,
    barrier_key,
    check_guards,
    check_limit,
    check_put,
    decode_token,
    encode_key,
    encode_prefix,
    encode_token,
)
from storage.memory_watch import MemoryWatch


@dataclass(slots=True)
class _Lease:
    ttl: int
    ends: float
    keys: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _State:
    """Everything that a snapshot holds; versions are in order, a deletion is an entry without create revision."""

    revision: int = 1
    compacted: int = 0
    order: list[bytes] = field(default_factory=list)
    versions: dict[str, list[Entry]] = field(default_factory=dict)
    log: list[Batch] = field(default_factory=list)
    leases: dict[int, _Lease] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy of the store's state at `revision`, for `restore`."""

    revision: int
    state: _State


class MemoryStorage:
    """A `Storage` that lives and dies with its object."""

    def __init__(self, *, clock: Clock = SystemClock(), root: str = "/lrm", instance: str = "memory") -> None:  # noqa: B008 - a SystemClock has no state
        self._clock = clock
        self._root = root
        self._instance = instance
        self._state = _State()
        self._watches: set[MemoryWatch] = set()
        self._lease_ids = itertools.count(1)
        self._generation = 0
        self._reset_to_tell = False
        self._epoch: bytes | None = None
        self._epoch_known = False
        self._closed = False
        self._cluster_id = uuid.uuid4().hex

    async def get(self, key: str) -> Entry:
        encode_key(key)
        await self._turn()
        entry = self._current(key)
        if entry is None:
            raise NotFound(key)
        return entry

    async def exists(self, key: str) -> bool:
        encode_key(key)
        await self._turn()
        return self._current(key) is not None

    async def keys(self, pattern: str) -> list[str]:
        parsed = KeyPattern.parse(pattern)
        encode_prefix(parsed.literal)
        await self._turn()
        found = self._range(parsed.literal, self._state.revision, barriers=parsed.shows_barriers)
        return [e.key for e in found if parsed.matches(e.key)]

    async def list(self, prefix: str, *, limit: int = 0, continue_token: str = "", revision: int = 0) -> Page:
        check_limit(limit)
        encode_prefix(prefix)
        after = ""
        if continue_token:
            revision, after = decode_token(continue_token, prefix)
        await self._turn()
        at = self._readable(revision)
        found = self._range(prefix, at, after=after, barriers=is_barrier_key(prefix))
        if limit and len(found) > limit:
            return Page(tuple(found[:limit]), at, encode_token(at, found[limit - 1].key))
        return Page(tuple(found), at)

    async def count(self, prefix: str) -> int:
        encode_prefix(prefix)
        await self._turn()
        return len(self._range(prefix, self._state.revision, barriers=is_barrier_key(prefix)))

    async def list_with_labels(
        self, prefix: str, selector: Mapping[str, str], labels_of: Callable[[bytes], Mapping[str, str]]
    ) -> Page:
        page = await self.list(prefix)
        return Page(tuple(e for e in page.entries if labels_match(selector, labels_of(e.value))), page.revision)

    async def create(self, key: str, value: bytes, *, lease: int = 0, guards: tuple[Guard, ...] = ()) -> Entry:
        check_put(key, value)
        check_guards(guards)
        await self._turn()
        current = self._current(key)
        if current is not None:
            raise AlreadyExists(current)
        self._check(guards)
        if lease and lease not in self._state.leases:
            raise LeaseNotFound(lease)
        self._commit([(key, value, lease)])
        return self._written(key)

    async def update(self, key: str, value: bytes, *, expected_revision: int, guards: tuple[Guard, ...] = ()) -> Entry:
        check_put(key, value)
        check_guards(guards)
        await self._turn()
        current = self._current(key)
        if current is None or current.revision != expected_revision:
            raise Conflict(key, current)
        self._check(guards)
        self._commit([(key, value, current.lease)])
        return self._written(key)

    async def delete(self, key: str, *, expected_revision: int, guards: tuple[Guard, ...] = ()) -> int:
        encode_key(key)
        check_guards(guards)
        await self._turn()
        current = self._current(key)
        if current is None or current.revision != expected_revision:
            raise Conflict(key, current)
        self._check(guards)
        return self._commit([(key, None, 0)])

    async def set(self, key: str, value: bytes) -> int:
        check_put(key, value)
        await self._turn()
        return self._commit([(key, value, 0)])

    async def compare_and_swap(self, key: str, expected: bytes, new: bytes) -> Entry:
        check_put(key, new)
        await self._turn()
        current = self._current(key)
        if current is None or current.value != expected:
            raise Conflict(key, current)
        self._commit([(key, new, current.lease)])
        return self._written(key)

    @asynccontextmanager
    async def watch(self, prefix: str, after_revision: int, *, live: bool = False) -> AsyncIterator[Watch]:
        encode_prefix(prefix)
        written = barrier_key(prefix, self._instance) if live else ""
        await self._turn()
        self._check_epoch()
        after = max(after_revision, 1)
        if after > self._state.revision:
            raise FutureRevision(after_revision, self._state.revision)
        if after < self._state.compacted:
            raise Compacted(self._state.compacted)

        async def write_barrier() -> int:
            await self._turn()
            self._check_epoch()
            return self._commit([(written, uuid.uuid4().hex.encode(), 0)])

        watch = MemoryWatch(prefix, after, self._clock, write_barrier if live else None, self._until_next_expiry)
        start = bisect.bisect_right(self._state.log, after, key=lambda b: b.revision)
        for batch in self._state.log[start:]:
            watch.offer(batch)
        self._watches.add(watch)
        try:
            yield watch
        finally:
            self._watches.discard(watch)
            watch.end(Unavailable("the watch was closed"))

    async def grant_lease(self, ttl: int) -> Lease:
        await self._turn()
        lease = next(self._lease_ids)
        ttl = max(ttl, 1)
        self._state.leases[lease] = _Lease(ttl, self._clock.monotonic() + ttl)
        for watch in self._watches:
            watch.wake()  # It now has an earlier moment to wait for.
        return Lease(lease, ttl)

    async def keep_alive(self, lease: int) -> int:
        await self._turn()
        held = self._state.leases.get(lease)
        if held is None:
            raise LeaseNotFound(lease)
        held.ends = self._clock.monotonic() + held.ttl
        return held.ttl

    async def revoke(self, lease: int) -> None:
        await self._turn()
        self._end_lease(lease)

    @property
    def generation(self) -> int:
        return self._generation

    async def current_revision(self) -> int:
        await self._turn()
        return self._state.revision

    async def line(self) -> Line:
        await self._turn()
        return Line(self._cluster_id, self._epoch_text(), self._state.revision)

    async def compact(self, revision: int) -> None:
        await self._turn()
        state = self._state
        if revision > state.revision:
            raise FutureRevision(revision, state.revision)
        if revision <= state.compacted:
            return
        state.compacted = revision
        del state.log[: bisect.bisect_right(state.log, revision, key=lambda b: b.revision)]
        for key, versions in list(state.versions.items()):
            first = max(bisect.bisect_right(versions, revision, key=lambda e: e.revision) - 1, 0)
            kept = versions[first:]
            if kept[0].revision <= revision and not kept[0].create_revision:
                kept = kept[1:]
            if kept:
                state.versions[key] = kept
            else:
                del state.versions[key]
                state.order.remove(encode_key(key))

    async def health(self) -> Health:
        self._expire()
        member = Member("memory", version="memory", leader=True)
        return Health(
            ok=not self._closed,
            revision=self._state.revision,
            members=(member,),
            cluster_id=self._cluster_id,
            epoch=self._epoch_text(),
        )

    async def aclose(self) -> None:
        self._closed = True
        for watch in self._watches:
            watch.end(Unavailable("the store was closed"))

    def snapshot(self) -> Snapshot:
        """A copy of the whole state, as `etcdctl snapshot save` makes one."""
        self._expire()
        return Snapshot(self._state.revision, copy.deepcopy(self._state))

    def restore(self, snapshot: Snapshot) -> None:
        """Put an earlier state back, as after a restore from a backup: open watches and the next caller are told."""
        self._state = copy.deepcopy(snapshot.state)
        error = StoreReset(f"the store was restored to revision {snapshot.revision}")
        self._generation += 1
        self._reset_to_tell = not self._watches
        for watch in self._watches:
            watch.end(error)

    async def _turn(self) -> None:
        """Let others run, then see what time and a restore have done."""
        await self._clock.sleep(0)
        if self._closed:
            raise Unavailable("the store was closed")
        self._expire()
        if self._reset_to_tell:
            self._reset_to_tell = False
            raise StoreReset(f"the store was restored to revision {self._state.revision}")

    def _check_epoch(self) -> None:
        """As the etcd backend, which sees the epoch when a watch opens and at each barrier."""
        entry = self._current(f"{self._root}/epoch")
        before, known = self._epoch, self._epoch_known
        self._epoch, self._epoch_known = entry.value if entry else None, True
        if known and before != self._epoch:
            error = StoreReset("the store's epoch has changed")
            self._generation += 1
            for watch in self._watches:
                watch.end(error)
            raise error

    def _epoch_text(self) -> str:
        entry = self._current(f"{self._root}/epoch")
        return entry.value.decode("utf-8", "backslashreplace") if entry else ""

    def _current(self, key: str) -> Entry | None:
        versions = self._state.versions.get(key)
        return versions[-1] if versions and versions[-1].create_revision else None

    def _written(self, key: str) -> Entry:
        return self._state.versions[key][-1]

    def _readable(self, revision: int) -> int:
        if revision <= 0:
            return self._state.revision
        if revision > self._state.revision:
            raise FutureRevision(revision, self._state.revision)
        if revision < self._state.compacted:
            raise Compacted(self._state.compacted)
        return revision

    def _range(self, prefix: str, at: int, *, after: str = "", barriers: bool = False) -> builtins.list[Entry]:
        raw = encode_prefix(prefix)
        order = self._state.order
        start = bisect.bisect_right(order, encode_key(after)) if after else bisect.bisect_left(order, raw)
        found: list[Entry] = []
        for key in itertools.takewhile(lambda k: k.startswith(raw), itertools.islice(order, start, None)):
            versions = self._state.versions[key.decode("utf-8", "surrogateescape")]
            index = bisect.bisect_right(versions, at, key=lambda e: e.revision) - 1
            if index >= 0 and versions[index].create_revision and (barriers or not is_barrier_key(versions[index].key)):
                found.append(versions[index])
        return found

    def _check(self, guards: tuple[Guard, ...]) -> None:
        for guard in guards:
            held = self._current(guard.key)
            if held is None or held.create_revision != guard.create_revision:
                raise GuardFailed(guard)

    def _commit(self, changes: builtins.list[tuple[str, bytes | None, int]]) -> int:
        """Make changes of different keys at one new revision; None deletes."""
        state = self._state
        state.revision += 1
        events = []
        for key, value, lease in changes:
            previous = self._current(key)
            if previous and previous.lease in state.leases:
                state.leases[previous.lease].keys.discard(key)
            if value is None:
                entry = Entry(key, b"", state.revision, 0)
            else:
                created = previous.create_revision if previous else state.revision
                entry = Entry(key, value, state.revision, created, lease)
                if lease:
                    state.leases[lease].keys.add(key)
            if key not in state.versions:
                state.versions[key] = []
                bisect.insort(state.order, encode_key(key))
            state.versions[key].append(entry)
            events.append(Event("delete" if value is None else "put", entry, previous))
        batch = Batch(state.revision, tuple(events))
        state.log.append(batch)
        for watch in self._watches:
            watch.offer(batch)
        return state.revision

    def _expire(self) -> None:
        """End each lease whose time is over, in order of its end."""
        now = self._clock.monotonic()
        over = sorted((held.ends, lease) for lease, held in self._state.leases.items() if held.ends <= now)
        for _, lease in over:
            self._end_lease(lease)

    def _until_next_expiry(self) -> float | None:
        """End what is due; seconds until the next lease ends, None without leases."""
        self._expire()
        ends = [held.ends for held in self._state.leases.values()]
        return max(min(ends) - self._clock.monotonic(), 0.0) if ends else None

    def _end_lease(self, lease: int) -> None:
        """The keys of a lease go together, at one revision."""
        held = self._state.leases.get(lease)
        if held is None:
            return
        if held.keys:
            self._commit([(key, None, 0) for key in sorted(held.keys)])
        del self._state.leases[lease]
