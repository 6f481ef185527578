"""When a push of CML makes a sync due: soon, but never more often than a CML can bear.

Promises: pushes within a moment are one hint; between the beginnings of two syncs of a worker that pushes asked for lie
`interval` seconds at least, and four times what the first of them took; a push that comes while a sync is under way
asks for another; a channel that opens is a hint too, but one that opens again and again is so a few times and then once
in ten minutes; and where a sync found nothing new after a push, CML's own picture may have been behind, so one more
follows. A hint that is lost costs freshness until the next poll, and nothing else. Pure but for the clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from lrm.controller import Hints, Key
from storage.clock import Clock

_GATHER = 0.1
"""Seconds in which pushes that belong together come in, and CML's tiles follow its pushes."""
_AGAIN = 3.0
"""Seconds after which a list that showed nothing new is read once more."""
_SHARE = 5.0
"""A CML is busy with syncs that pushes asked for no more than a fifth of the time."""


_OPENED_EVERY = 600.0
"""Seconds between two syncs that channels which open ask for, in the long run: a proxy may cut them each minute."""
_OPENED_AT_ONCE = 4
"""So many of them come without that delay."""


@dataclass(slots=True)
class _Ear:
    """What is known of one worker."""

    due_at: float | None = None
    """When a sync is due that was asked for and not begun."""
    not_before: float = 0.0
    began: float = 0.0
    opened_until: float = 0.0
    """Up to when the syncs that opened channels have asked for are used up, at one in `_OPENED_EVERY`."""
    answers: bool = False
    """The sync that is under way was asked for by a push."""
    last_look: bool = False
    """The sync that is due looks again for what another did not see; it is not looked for a third time."""


class PushHints(Hints):
    """The hints of all workers, by uid; `heard` wakes the worker's key once."""

    def __init__(self, clock: Clock, *, interval: float) -> None:
        super().__init__()
        self._clock = clock
        self._interval = interval
        self._ears: dict[str, _Ear] = {}

    def heard(self, uid: str, key: Key) -> bool:
        """CML has pushed; whether that is a hint of its own and not one more of the same."""
        ear = self._ears.setdefault(uid, _Ear())
        ear.last_look = False
        now = self._clock.monotonic()
        if ear.due_at is not None and ear.due_at <= max(now + _GATHER, ear.not_before):
            return False
        ear.due_at = max(now + _GATHER, ear.not_before)
        self.tell(key)
        return True

    def opened(self, uid: str, key: Key) -> None:
        """CML pushes from now on. What happened since the last sync began may have been missed."""
        ear = self._ears.get(uid)
        if ear is None or ear.due_at is not None:
            return  # the first sync is still to come, or one that sees everything
        now = self._clock.monotonic()
        used = max(now, ear.opened_until)
        ear.opened_until = used + _OPENED_EVERY
        ear.due_at = max(now + _GATHER, ear.not_before, used - (_OPENED_AT_ONCE - 1) * _OPENED_EVERY)
        ear.last_look = True  # nothing was pushed that a list would have to show
        self.tell(key)

    def due_in(self, uid: str) -> float | None:
        """Seconds until the sync that was asked for; None when none was."""
        ear = self._ears.get(uid)
        if ear is None or ear.due_at is None:
            return None
        return max(0.0, ear.due_at - self._clock.monotonic())

    def held_for(self, uid: str) -> float:
        """Seconds until a sync may follow the last one, for whatever has happened since: CML needs time of its own."""
        ear = self._ears.get(uid)
        return 0.0 if ear is None else max(0.0, ear.not_before - self._clock.monotonic())

    def begin(self, uid: str) -> None:
        """A sync begins, whoever asked for it: it sees all that was pushed until now."""
        ear = self._ears.setdefault(uid, _Ear())
        now = self._clock.monotonic()
        ear.answers, ear.began, ear.not_before, ear.due_at = ear.due_at is not None, now, now + self._interval, None

    def end(self, uid: str, *, news: bool) -> None:
        """The sync is done; `news`: it found something."""
        ear = self._ears.setdefault(uid, _Ear())
        now = self._clock.monotonic()
        ear.not_before = max(ear.not_before, ear.began + _SHARE * (now - ear.began))
        if ear.due_at is not None:
            ear.due_at = max(ear.due_at, ear.not_before)
        elif ear.answers and not news and not ear.last_look:
            ear.due_at, ear.last_look = max(now + _AGAIN, ear.not_before), True
        else:
            ear.last_look = False

    def failed(self, uid: str) -> None:
        """The sync came to nothing: what was asked for is still due."""
        ear = self._ears.setdefault(uid, _Ear())
        if ear.answers and ear.due_at is None:
            ear.due_at = ear.not_before

    def forget(self, uid: str) -> None:
        """The worker is gone."""
        self._ears.pop(uid, None)
