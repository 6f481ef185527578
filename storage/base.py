"""The storage contract: value types, operations and the ten promises every backend keeps.

 1. A write succeeds only on the expected revision and under its guards, atomically; no write changes another's outcome.
 2. A list is one revision, however many pages.
 3. A watch after R delivers every change after R, once, in order, all events of a revision together; or raises.
 4. An error is raised, never returned as empty, False or None.
 5. A lost reply is settled, else `OutcomeUnknown`; never assumed.
 6. Cancelling any call leaves no task, socket or half-applied state; a cancelled write is an unknown outcome.
 7. `barrier()` returns once the live watch has delivered every event up to a revision written after the call.
 8. A watch that does not receive what a linearizable read can see is replaced within 20 s.
 9. Revisions seen through one backend never fall; if the store's do, `StoreReset` is raised once to each
    watcher and waiter.
10. Every waiter has a deadline, and ends on relist, `StoreReset` or stop.

`tests/conformance` shows each of them on every backend.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from storage.errors import StoreReset

MAX_VALUE_BYTES = 1024 * 1024
"""Largest value that a backend accepts, in bytes; a larger one raises `TooLarge`."""

BARRIER_SEGMENT = ".barrier/"
"""What a live watch writes below its prefix to learn how far it has come; hidden from list, keys and count."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One key as the store holds it; `revision` is the store-wide revision of its last write."""

    key: str
    value: bytes
    revision: int
    create_revision: int
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """One change. A delete's `entry` has no value and the deleting revision; `previous` is what was there, if kept."""

    kind: Literal["put", "delete"]
    entry: Entry
    previous: Entry | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """All events of one revision below the watched prefix; none for a revision that only says how far we are."""

    revision: int
    events: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list; `continue_token` is empty on the last page. All pages share one `revision`."""

    entries: tuple[Entry, ...]
    revision: int
    continue_token: str = ""


@dataclass(frozen=True, slots=True)
class Guard:
    """A write passes only while `key` exists in the incarnation created at `create_revision`."""

    key: str
    create_revision: int


@dataclass(frozen=True, slots=True)
class Lease:
    """A granted lease; `ttl` is what the store granted, in seconds, which may differ from what was asked."""

    id: int
    ttl: int


@dataclass(frozen=True, slots=True)
class Member:
    """One server of the store as its own status call describes it; `error` is why it could not be asked."""

    endpoint: str
    version: str = ""
    leader: bool = False
    db_size: int = 0
    """Bytes of its database file, free pages included: what it holds against its quota. 0 where it did not say."""
    db_size_in_use: int = 0
    quota: int = 0
    """Bytes at which it refuses writes."""
    alarms: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the store answers linearizable reads now, and what each member says."""

    ok: bool
    revision: int
    members: tuple[Member, ...] = ()
    notes: tuple[str, ...] = field(default=())
    """Sentences for people: known-bad versions, alarms, unreachable members."""
    cluster_id: str = ""
    epoch: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """Where the store is: revisions can be compared only within one cluster and epoch.

    A store that was restored without a new epoch (`lrm restore-done`) shows it only while its revision is lower.
    """

    cluster_id: str
    epoch: str
    """The value of `{root}/epoch`; empty while there is none."""
    revision: int

    def same_history(self, other: Line) -> bool:
        """Whether a revision means the same on both."""
        return (self.cluster_id, self.epoch) == (other.cluster_id, other.epoch)


class Watch(Protocol):
    """An open watch: iterate it for batches; it ends only by an error or by leaving its context."""

    def __aiter__(self) -> AsyncIterator[Batch]: ...

    @property
    def lost_seconds(self) -> float:
        """For how long nothing can have come, because no member gives a stream; 0 while one is open."""
        ...

    async def barrier(self, timeout: float = 3.0) -> int:
        """Return a revision written after this call, once every event up to it was handed to the iterator.

        Only a live watch has it. Raises `Unavailable` (also `NoSpace`), or `StoreReset`.
        """
        ...


@runtime_checkable
class Storage(Protocol):
    """A versioned key-value store; every call may raise `Unavailable`, `PermissionDenied` and `StoreReset`."""

    async def get(self, key: str) -> Entry:
        """Read one key, linearizably. Raises `NotFound`."""
        ...

    async def exists(self, key: str) -> bool: ...

    async def keys(self, pattern: str) -> list[str]:
        """Keys matching an fnmatch pattern in which `*` and `?` do not cross `/`, in order, at one revision."""
        ...

    async def list(self, prefix: str, *, limit: int = 0, continue_token: str = "", revision: int = 0) -> Page:
        """Entries below a prefix in key order; `limit` 0 means all. Raises `Compacted`, `FutureRevision`.

        `revision` 0 is now; a continue token fixes it for the following pages.
        """
        ...

    async def count(self, prefix: str) -> int: ...

    async def create(self, key: str, value: bytes, *, lease: int = 0, guards: tuple[Guard, ...] = ()) -> Entry:
        """Write an absent key. Raises `AlreadyExists`, `GuardFailed`, `LeaseNotFound`, `TooLarge`, `OutcomeUnknown`."""
        ...

    async def update(self, key: str, value: bytes, *, expected_revision: int, guards: tuple[Guard, ...] = ()) -> Entry:
        """Replace a key that is at `expected_revision`; its lease stays. Raises `Conflict`, `GuardFailed`, …"""
        ...

    async def delete(self, key: str, *, expected_revision: int, guards: tuple[Guard, ...] = ()) -> int:
        """Delete a key that is at `expected_revision`; return the deleting revision. Raises `Conflict`, …"""
        ...

    async def set(self, key: str, value: bytes) -> int:
        """Write unconditionally and return the revision. Raises `OutcomeUnknown`: it is never repeated."""
        ...

    async def compare_and_swap(self, key: str, expected: bytes, new: bytes) -> Entry:
        """Replace a key whose value is `expected`. Raises `Conflict`."""
        ...

    async def list_with_labels(
        self, prefix: str, selector: Mapping[str, str], labels_of: Callable[[bytes], Mapping[str, str]]
    ) -> Page:
        """Entries below a prefix whose labels contain all of `selector`; the caller says what a value's labels are."""
        ...

    def watch(self, prefix: str, after_revision: int, *, live: bool = False) -> AbstractAsyncContextManager[Watch]:
        """Open a watch on every change below `prefix` after a revision.

        A live watch checks its own liveness and has `barrier()`. Entering and iterating raise `Compacted`,
        `FutureRevision`, `StoreReset`; a lost connection is resumed inside.
        """
        ...

    async def grant_lease(self, ttl: int) -> Lease:
        """Grant a lease of about `ttl` seconds."""
        ...

    async def keep_alive(self, lease: int) -> int:
        """Renew a lease once and return its TTL in seconds. Raises `LeaseNotFound`."""
        ...

    async def revoke(self, lease: int) -> None:
        """End a lease and delete its keys; one that is already gone is fine."""
        ...

    @property
    def generation(self) -> int:
        """How often this backend has seen the store begin another line.

        `StoreReset` ends what is open; who had nothing open at that moment compares this with what it was when its
        revision was read, after having opened a watch from there.
        """
        ...

    async def current_revision(self) -> int:
        """The store's revision by a linearizable read."""
        ...

    async def line(self) -> Line:
        """Which line of history the store is on, and its revision, by one linearizable read.

        A new epoch is an answer here: it is watches and barriers that are told of it by `StoreReset`.
        """
        ...

    async def compact(self, revision: int) -> None:
        """Forget history before `revision`; already compacted is fine. Raises `FutureRevision`."""
        ...

    async def health(self) -> Health:
        """What the store and each member say; never raises for an unreachable store."""
        ...

    async def aclose(self) -> None: ...


def check_generation(storage: Storage, generation: int) -> None:
    """Raise `StoreReset` if the store has begun another line since its generation was read."""
    if storage.generation != generation:
        raise StoreReset("the store began another line while it was not watched")


def prefix_end(prefix: bytes) -> bytes:
    r"""The first key after every key with this prefix (etcd API: `range_end`); `\0` means to the end."""
    for i in reversed(range(len(prefix))):
        if prefix[i] < 0xFF:
            return prefix[:i] + bytes([prefix[i] + 1])
    return b"\0"


def labels_match(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether `labels` contains every pair of `selector`."""
    return all(labels.get(k) == v for k, v in selector.items())


def is_barrier_key(key: str) -> bool:
    """Whether a key belongs to the segment in which live watches write their barriers."""
    return f"/{BARRIER_SEGMENT}" in key


def visible(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """The entries without barrier keys."""
    return tuple(e for e in entries if not is_barrier_key(e.key))
