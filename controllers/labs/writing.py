"""Writing many records, a few at a time: one that cannot be written does not stop the others.

Promises that errors of a single record (it cannot be stored as it is, or it would not hold still) are collected by lab,
and that everything else (the store is away, leadership is lost, the worker is gone) ends the whole at once and is
raised as itself. Called by the sync.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import structlog

from lrm.errors import Forbidden, Invalid, ResourceConflict, Undecodable
from storage.errors import InvalidKey, OutcomeUnknown, TooLarge

log = structlog.get_logger(__name__)

T = TypeVar("T")

AT_ONCE = 8
"""Writes under way for one worker: enough to hide the store's latency, few enough to leave room for others."""
AT_ONCE_IN_ALL = 32
"""Writes under way for all workers: more make the store no quicker, and everybody else's writes late."""

_OF_ONE_RECORD = (Forbidden, Invalid, ResourceConflict, Undecodable, InvalidKey, OutcomeUnknown, TooLarge)


@dataclass
class Failures:
    """Labs whose records could not be brought up to date, and why."""

    by_lab: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.by_lab)

    def sentence(self) -> str:
        """One line for the worker's status: how many, and the first of them."""
        lab, why = min(self.by_lab.items())
        count = len(self.by_lab)
        return f"{count} {'lab' if count == 1 else 'labs'} could not be mirrored; {lab}: {why}"[:500]


async def write_each(
    items: Iterable[T],
    lab_of: Callable[[T], str],
    write: Callable[[T], Awaitable[None]],
    failures: Failures,
    gate: asyncio.Semaphore,
    *,
    failed: str = "labs.record_failed",
) -> None:
    """Run `write` for every item, as the gate lets it; `failed` is what is logged of one that cannot be written."""
    left = iter(items)

    async def some() -> None:
        for item in left:
            try:
                async with gate:
                    await write(item)
            except _OF_ONE_RECORD as error:
                failures.by_lab[lab_of(item)] = str(error)
                log.warning(failed, lab=lab_of(item), error=str(error))

    first: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(AT_ONCE):
                tasks.create_task(some())
    except BaseExceptionGroup as group:
        first = _first_leaf(group)
    if first is not None:
        raise first


def _first_leaf(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first
