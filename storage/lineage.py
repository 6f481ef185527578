"""Which line of history a backend is on: the highest revision seen, and the store's epoch.

A store restored from a backup answers with lower revisions, or with a new epoch once `lrm restore-done` has written
one. Both end the line: every listener (open watch) is told once, calls still under way hear `StoreReset` too, and the
backend goes on with the new line. A reply is judged by what had been seen when its request was sent, so answers that
overtake each other are no reset. Knows no etcd and does no input or output. Called by `storage.etcd*`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from storage.errors import StoreReset


@dataclass(frozen=True, slots=True)
class Mark:
    """What was known when a request was sent."""

    floor: int
    generation: int


class Lineage:
    """The line of one backend object."""

    def __init__(self) -> None:
        self._seen = 0
        self._generation = 0
        self._epoch: bytes | None = None
        self._epoch_known = False
        self._listeners: set[Callable[[StoreReset], None]] = set()

    @property
    def seen(self) -> int:
        """The highest revision seen on this line."""
        return self._seen

    @property
    def generation(self) -> int:
        """How often the line has ended."""
        return self._generation

    def listen(self, told: Callable[[StoreReset], None]) -> None:
        """Be told of the next resets, until `forget`."""
        self._listeners.add(told)

    def forget(self, told: Callable[[StoreReset], None]) -> None:
        self._listeners.discard(told)

    def mark(self) -> Mark:
        """To be taken before a request is sent."""
        return Mark(self._seen, self._generation)

    def fell(self, mark: Mark, revision: int) -> bool:
        """Whether a linearizable reply lies below what was seen before its request. Raises if the line ended since."""
        if mark.generation != self._generation:
            raise StoreReset("the store was reset while this request was under way")
        return revision < mark.floor

    def saw(self, mark: Mark, revision: int) -> None:
        """Note a revision of this line. Raises if the line ended since, or if the revision proves that it has."""
        if self.fell(mark, revision):
            raise self._reset(f"the store is at revision {revision} after {mark.floor} had been seen", revision)
        self._seen = max(self._seen, revision)

    def saw_epoch(self, mark: Mark, epoch: bytes | None, revision: int) -> None:
        """Note revision and epoch (None: the store has none) of one linearizable reply."""
        self.saw(mark, revision)
        if self._epoch_known and epoch != self._epoch:
            error = self._reset("the store's epoch has changed", revision)
            self._epoch, self._epoch_known = epoch, True
            raise error
        self._epoch, self._epoch_known = epoch, True

    def delivered(self, mark: Mark, revision: int) -> None:
        """Note a revision that a watch brought; one from a former line is ignored."""
        if mark.generation == self._generation:
            self._seen = max(self._seen, revision)

    def _reset(self, why: str, revision: int) -> StoreReset:
        self._generation += 1
        self._seen = revision
        self._epoch_known = False
        error = StoreReset(why)
        for told in list(self._listeners):
            told(error)
        return error
