"""Which parties outside answer, as plug-ins tell: `/api/status/health` names them beside etcd and Redis.

A party that is down makes the daemon degraded, never unready: what does not need it goes on. Nothing is asked here.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lrm.model import rfc3339
from storage.clock import Clock


@dataclass(frozen=True, slots=True)
class _Party:
    since: datetime
    """When it began to be as it is."""
    error: str
    """Empty while it answers."""


class OutsideHealth:
    """What was told last of each party; of those that nobody has told of nothing is said."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._parties: dict[str, _Party] = {}

    def up(self, name: str) -> None:
        """It answers."""
        self._tell(name, "")

    def down(self, name: str, reason: str) -> None:
        """It does not; the reason is for people, and may change while it lasts."""
        self._tell(name, reason or "it does not answer")

    @property
    def notes(self) -> list[str]:
        """Who does not answer, and why."""
        return [f"{name}: {party.error}" for name, party in sorted(self._parties.items()) if party.error]

    def describe(self) -> list[dict[str, Any]]:
        """All of them, for the health document."""
        return [
            {"name": name, "ok": not party.error, "since": rfc3339(party.since), "error": party.error}
            for name, party in sorted(self._parties.items())
        ]

    def _tell(self, name: str, error: str) -> None:
        before = self._parties.get(name)
        same = before is not None and bool(before.error) == bool(error)
        since = before.since if before is not None and same else self._clock.now()
        self._parties[name] = _Party(since, error)
