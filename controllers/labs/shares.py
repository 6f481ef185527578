"""How many keys of one worker a controller has in hand: a CML that is slow to answer holds up its own labs alone.

Promises: at most `most` keys of a worker are inside at once; another is told to leave its place in the queue to others,
and is woken, first come first served, as those inside leave. One event loop, no locks. Called by what asks CML for one
lab at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from lrm.controller import Hints, Key

FULL_AGAIN = 30.0
"""Seconds after which a key that was not let in looks again by itself: who should have woken it may be gone."""


class Shares(Hints):
    """See the module."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self._inside: Counter[str] = Counter()
        self._waiting: dict[str, dict[Key, None]] = {}

    @contextmanager
    def one_of(self, worker: str, key: Key) -> Iterator[bool]:
        """Whether the key is let in; if not, it is woken when its turn comes. `worker` is a uid."""
        waiting = self._waiting.setdefault(worker, {})
        if self._inside[worker] >= self._most:
            waiting[key] = None
            yield False
            return
        waiting.pop(key, None)
        self._inside[worker] += 1
        try:
            yield True
        finally:
            self._inside[worker] -= 1
            self._one_left(worker)

    def _one_left(self, worker: str) -> None:
        waiting = self._waiting[worker]
        if waiting:
            first = next(iter(waiting))
            del waiting[first]
            self.tell(first)
        if not waiting and not self._inside[worker]:
            del self._waiting[worker], self._inside[worker]
