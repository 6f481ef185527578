"""What the instances' controller asks of whoever gives out places."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from controllers.instances.kind import LabInstanceRequest, WorkerRef
from lrm.cache import Change
from lrm.controller import Context, Key


class NoRoom(Exception):  # noqa: N818 - it says what happened
    """A place that was chosen has no room any more, in a sentence."""


@dataclass(frozen=True, slots=True)
class Waits:
    """It has no place now; `reason` is one of `phases.Reasons`."""

    reason: str
    message: str
    until: datetime | None = None
    """When that ends by itself; else a change does."""


class Placer(Protocol):
    """Gives out places, so that nothing is promised twice and nothing that fits is left waiting."""

    async def choose(self, request: LabInstanceRequest, ctx: Context) -> WorkerRef | Waits:
        """Its place among all that wait, by `status.need`: the one reserved for it already, else the best."""
        ...

    async def reserve(self, place: WorkerRef, request: LabInstanceRequest, ctx: Context) -> None:
        """Take room there under the request's uid; repeating it changes nothing. Raises `NoRoom`."""
        ...

    async def release(self, request: LabInstanceRequest, ctx: Context) -> None:
        """Give back whatever is reserved for it, wherever; without a write where nothing is."""
        ...

    def wakes(self, change: Change) -> Iterable[Key]:
        """The requests that wait and have a place after a change."""
        ...
