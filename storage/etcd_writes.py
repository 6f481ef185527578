"""Writes to etcd, one transaction each, and the settling of those whose reply was lost.

An update or delete is sent again until it is answered: its compare with a revision cannot succeed twice. Refused, it is
judged by the key's history (`storage.settle`). A create is never sent again, because an absent key can be absent again;
it is looked for in the history until the deadline. A write without a compare is never repeated. What cannot be settled
is `OutcomeUnknown`. Cancelling a write leaves its outcome unknown. Called by `storage.etcd`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from storage.base import Entry, Event, Guard
from storage.clock import Clock
from storage.errors import (
    AlreadyExists,
    Conflict,
    GuardFailed,
    LeaseNotFound,
    OutcomeUnknown,
    StorageError,
    StoreReset,
    Unavailable,
)
from storage.etcd_errors import Closed, LostReply, Malformed
from storage.etcd_wire import (
    Json,
    create_txn,
    delete_txn,
    entries,
    header_revision,
    one_key,
    put,
    refusal,
    responses,
    update_txn,
)
from storage.settle import GuardGone, Made, Own, Refused, Unsettled, judge

log = structlog.get_logger(__name__)

_BACKOFF_FIRST, _BACKOFF_MAX = 0.05, 0.5


class Cluster(Protocol):
    """What the writer needs of its backend; replies are checked for a reset of the store before they come back."""

    async def send(self, path: str, body: Json, timeout: float) -> Json:
        """Send once. Raises `LostReply` when the request may have been carried out."""
        ...

    async def read(self, path: str, body: Json) -> Json:
        """A linearizable read."""
        ...

    async def history(
        self, key: str, after: int, timeout: float, enough: Callable[[Event], bool]
    ) -> Sequence[Event] | None:
        """The key's events after a revision until one is enough or the time is up; None when they are compacted."""
        ...

    async def known_revision(self) -> int:
        """A revision of the store that is in the past; read once if none has been seen."""
        ...


@dataclass(frozen=True, slots=True)
class _Write:
    """An update or delete, to be sent again as it is."""

    key: str
    own: Own
    expected: int
    guards: tuple[Guard, ...]
    txn: Json

    def __str__(self) -> str:
        return f"the {self.own.kind} of key {self.key!r} could not be settled"


class Writer:
    """See the module. A write takes `timeout` for its first answer and as much again for settling."""

    def __init__(self, cluster: Cluster, clock: Clock, timeout: float) -> None:
        self._cluster = cluster
        self._clock = clock
        self._timeout = timeout

    async def create(self, key: str, value: bytes, lease: int, guards: tuple[Guard, ...]) -> Entry:
        """Write an absent key."""
        before = await self._cluster.known_revision()
        try:
            reply = await self._cluster.send("/kv/txn", create_txn(key, value, lease, guards), self._timeout / 2)
            if reply.get("succeeded"):
                revision = header_revision(reply)
                return Entry(key, value, revision, revision, lease)
            current, gone = refusal(reply, guards)
        except (LostReply, Malformed) as lost:
            return (await self._find_created(key, Own("create", value, lease), before, lost)).entry
        except LeaseNotFound:
            raise LeaseNotFound(lease) from None
        raise AlreadyExists(current) if current else _guard_error(key, gone)

    async def update(self, key: str, value: bytes, expected: int, guards: tuple[Guard, ...]) -> Entry:
        """Replace a key at a revision."""
        write = _Write(key, Own("update", value), expected, guards, update_txn(key, value, expected, guards))
        try:
            reply = await self._cluster.send("/kv/txn", write.txn, self._timeout / 2)
            return _updated(write, reply)
        except (LostReply, Malformed) as lost:
            outcome = await self._settle(write, lost)
        return outcome.entry if isinstance(outcome, Event) else _updated(write, outcome)

    async def delete(self, key: str, expected: int, guards: tuple[Guard, ...]) -> int:
        """Delete a key at a revision; the deleting revision."""
        write = _Write(key, Own("delete"), expected, guards, delete_txn(key, expected, guards))
        try:
            reply = await self._cluster.send("/kv/txn", write.txn, self._timeout / 2)
            _raise_if_refused(write, reply)
            return header_revision(reply)
        except (LostReply, Malformed) as lost:
            outcome = await self._settle(write, lost)
        return outcome.entry.revision if isinstance(outcome, Event) else header_revision(outcome)

    async def set(self, key: str, value: bytes) -> int:
        """Write unconditionally; the revision."""
        try:
            return header_revision(await self._cluster.send("/kv/put", put(key, value), self._timeout))
        except LostReply as lost:
            raise OutcomeUnknown(f"key {key!r} may have been set: {lost}") from None

    async def _settle(self, write: _Write, lost: Exception) -> Event | Json:
        """Send the transaction again until it is answered: its reply if it succeeds, the event if it had been made."""
        log.info("write_reply_lost", key=write.key, kind=write.own.kind, reason=str(lost))
        deadline = self._clock.monotonic() + self._timeout
        backoff = _BACKOFF_FIRST
        why = str(lost)
        while (left := deadline - self._clock.monotonic()) > 0:
            try:
                outcome = await self._ask(write, left)
            except (Conflict, GuardFailed, StoreReset):
                raise
            except Closed as closed:
                raise OutcomeUnknown(f"{write}: {closed}") from None
            except (LostReply, Malformed, Unavailable) as again:
                why = str(again)
            except StorageError as error:
                raise OutcomeUnknown(f"{write}: {error}") from error
            else:
                if not isinstance(outcome, Unsettled):
                    return outcome
                why = outcome.why
                if outcome.final:
                    break
            pause = min(backoff * random.uniform(0.5, 1.0), deadline - self._clock.monotonic())  # noqa: S311 - spreads retries
            await self._clock.sleep(max(pause, 0.0))
            backoff = min(backoff * 2, _BACKOFF_MAX)
        raise OutcomeUnknown(f"{write}: {why}")

    async def _ask(self, write: _Write, left: float) -> Event | Json | Unsettled:
        """Once more: the reply of the transaction, or what the store shows."""
        deadline = self._clock.monotonic() + left
        try:
            reply = await self._cluster.send("/kv/txn", write.txn, left)
        except Unavailable:
            # Nothing was carried out this time (out of space, no member): reading can still tell about the first.
            found = entries(await self._cluster.read("/kv/range", one_key(write.key)))
            current = found[0] if found else None
            gone: list[Guard] = []
        else:
            if reply.get("succeeded"):
                return reply
            current, gone = refusal(reply, write.guards)
        history: Sequence[Event] | None = ()
        if current is None or current.revision != write.expected:
            left = max(deadline - self._clock.monotonic(), 0.1)
            history = await self._cluster.history(write.key, write.expected, left, lambda _: True)
        verdict = judge(write.expected, write.own, history, current, gone)
        if isinstance(verdict, Refused):
            raise Conflict(write.key, verdict.current)
        if isinstance(verdict, GuardGone):
            raise GuardFailed(verdict.guard)
        return verdict.event if isinstance(verdict, Made) else verdict

    async def _find_created(self, key: str, own: Own, before: int, lost: Exception) -> Event:
        """Look for a create in the key's history: it may still be under way, so look until the deadline."""
        log.info("write_reply_lost", key=key, kind=own.kind, reason=str(lost))
        why = str(lost)
        deadline = self._clock.monotonic() + self._timeout
        while (left := deadline - self._clock.monotonic()) > 0:
            try:
                history = await self._cluster.history(key, before, left, own.made)
                found = entries(await self._cluster.read("/kv/range", one_key(key)))
            except Closed as closed:
                raise OutcomeUnknown(f"the create of key {key!r} could not be settled: {closed}") from None
            except (Malformed, Unavailable) as error:
                why = str(error)
                await self._clock.sleep(min(_BACKOFF_MAX, left))
                continue
            except StoreReset:
                raise
            except StorageError as error:
                raise OutcomeUnknown(f"the create of key {key!r} could not be settled: {error}") from error
            verdict = judge(before, own, history, found[0] if found else None, ())
            if isinstance(verdict, Made):
                return verdict.event
            if isinstance(verdict, Unsettled):
                why = verdict.why
            if history is None:
                break
        raise OutcomeUnknown(f"the create of key {key!r} could not be settled: {why}")


def _updated(write: _Write, reply: Json) -> Entry:
    """The entry that an update has made. Raises its refusal."""
    _raise_if_refused(write, reply)
    inner = responses(reply)
    kept = entries(inner[1]) if len(inner) == 2 else []
    if not kept:
        raise Malformed("etcd made an update without saying what it kept")
    return Entry(write.key, write.own.value, kept[0].revision, kept[0].create_revision, kept[0].lease)


def _raise_if_refused(write: _Write, reply: Json) -> None:
    if reply.get("succeeded"):
        return
    current, gone = refusal(reply, write.guards)
    if current is None or current.revision != write.expected:
        raise Conflict(write.key, current)
    raise _guard_error(write.key, gone)


def _guard_error(key: str, gone: Sequence[Guard]) -> StorageError:
    if gone:
        return GuardFailed(gone[0])
    return Malformed(f"etcd refused the write of key {key!r} although every compare holds")
