"""What a daemon does only while it leads a lock: reconcile, consume events, collect garbage, compact."""

from __future__ import annotations

from typing import Any, Protocol

from lrm.election import Term


class Led(Protocol):
    """Work under a lock; everything with one lock_name runs under one term."""

    name: str
    lock_name: str

    async def run(self, term: Term) -> None:
        """Work until the term is lost (then return) or the task is cancelled; a later term may follow."""
        ...

    async def drain(self, seconds: float) -> None:
        """Begin nothing more; return when what is in hand has ended, or after so many seconds."""
        ...

    def describe(self) -> dict[str, Any]:
        """Its entry under `controllers` in /api/status/status: `name`, `lock` and counters of its own."""
        ...
