"""What became of a write whose reply was lost, judged from what the store shows afterwards.

Pure: `judge` is a table (its test is one too); the asking is done by `storage.etcd_writes`. The current entry alone
proves nothing about an update, because another writer may have written the same bytes later: the key's first event
after the expected revision decides. Identical bytes written from one expected revision count as one write. A create is
recognised anywhere in the key's history since it was sent: its bytes carry a fresh uid, or its lease is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from storage.base import Entry, Event, Guard


@dataclass(frozen=True, slots=True)
class Own:
    """The write in question. A create with a lease is recognised by that lease, never by its value."""

    kind: Literal["create", "update", "delete"]
    value: bytes = b""
    lease: int = 0

    def made(self, event: Event) -> bool:
        """Whether this event is what the write would have done."""
        if self.kind == "delete" or event.kind == "delete":
            return self.kind == event.kind
        if self.kind == "update":
            return event.entry.value == self.value
        return event.entry.create_revision == event.entry.revision and self._is_mine(event.entry)

    def _is_mine(self, entry: Entry) -> bool:
        return entry.lease == self.lease if self.lease else entry.value == self.value


@dataclass(frozen=True, slots=True)
class Made:
    """The write was made, by this event."""

    event: Event


@dataclass(frozen=True, slots=True)
class Refused:
    """The write was not made and cannot be any more: the key has moved on, or is now `current`."""

    current: Entry | None


@dataclass(frozen=True, slots=True)
class GuardGone:
    """The write was not made and cannot be any more: its guard has gone."""

    guard: Guard


@dataclass(frozen=True, slots=True)
class Unsettled:
    """Nothing proves either."""

    why: str
    final: bool = False
    """Asking again brings nothing more."""


Verdict = Made | Refused | GuardGone | Unsettled


def judge(
    expected: int, own: Own, history: Sequence[Event] | None, current: Entry | None, guards: Sequence[Guard]
) -> Verdict:
    """The verdict over `own`.

    `expected` is the revision that the write compared with; for a create, the highest one seen before it was sent.
    `history` is the key's events after that, in order, as far as they were seen; None when the store has compacted
    them. `current` is the key now, `guards` those of the write's guards that are known to be gone.
    """
    events = [e for e in history or () if e.entry.revision > expected]
    if own.kind == "create":
        return _judge_create(expected, own, events, current)
    if events:
        return Made(events[0]) if own.made(events[0]) else Refused(current)
    if current is not None and current.revision == expected:
        return GuardGone(guards[0]) if guards else Unsettled("the key has not moved: the write may still be under way")
    if history is None:
        return Unsettled("the key has moved and the store keeps no history of it", final=True)
    return Unsettled("the key has moved and its history was not seen in time")


def _judge_create(expected: int, own: Own, events: Sequence[Event], current: Entry | None) -> Verdict:
    for event in events:
        if own.made(event):
            return Made(event)
    if current is not None and current.revision > expected and own.made(Event("put", current)):
        return Made(Event("put", current))
    return Unsettled("the create was not seen; it may still be under way, or was made and undone out of sight")
