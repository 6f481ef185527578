"""Faults that are switched on and off while the simulator runs.

A fault has a kind, an instance (`*`: all), a method and a path pattern (fnmatch on the path below `/api/v0`), and
lasts until cleared or for so many `times`. Kinds that act on one request: `status`, `html`, `delay`, `truncate` (half
a JSON in a whole answer), `cut` (the connection ends in the middle of the answer), `drop` (before anything is done),
`drop-answer` (after it was done), `empty` and `half` (of the list or map in the answer). Kinds that change the
machine while they last: `identity` (another product_uuid), `not-admin`, `registration-stuck`, `ssms-unreachable`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

Kind = Literal[
    "status",
    "html",
    "delay",
    "truncate",
    "cut",
    "drop",
    "drop-answer",
    "empty",
    "half",
    "identity",
    "not-admin",
    "registration-stuck",
    "ssms-unreachable",
]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(slots=True, eq=False)
class Fault:
    """One fault; `hits` counts the requests that it struck."""

    id: int
    kind: Kind
    instance: str = "*"
    method: str = "*"
    path: str = "*"
    times: int | None = None
    status: int = 500
    description: str = ""
    seconds: float = 0.0
    product_uuid: str = ""
    hits: int = 0

    def strikes(self, instance: str, method: str, path: str) -> bool:
        return (
            self.of(instance)
            and self.method in ("*", method)
            and fnmatchcase(path, self.path)
            and (self.times is None or self.hits < self.times)
        )

    def of(self, instance: str) -> bool:
        return self.instance in ("*", instance)

    def document(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(slots=True)
class Faults:
    """The faults of one simulator."""

    faults: dict[int, Fault] = field(default_factory=dict)
    _ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def add(self, kind: Kind, **how: Any) -> Fault:
        """Switch a fault on."""
        if kind not in KINDS:
            raise ValueError(f"no fault is called {kind!r}; there are {', '.join(KINDS)}")
        fault = Fault(next(self._ids), kind, **how)
        self.faults[fault.id] = fault
        return fault

    def clear(self, fault: Fault | int | None = None, *, instance: str = "") -> int:
        """Switch one fault off, or those that name an instance, or all; returns how many."""
        if fault is not None:
            return 0 if self.faults.pop(fault if isinstance(fault, int) else fault.id, None) is None else 1
        gone = [f.id for f in self.faults.values() if not instance or f.instance == instance]
        for fault_id in gone:
            del self.faults[fault_id]
        return len(gone)

    def striking(self, instance: str, method: str, path: str) -> list[Fault]:
        """The faults that strike this request, each counted as a hit."""
        if not self.faults:
            return []
        struck = [f for f in self.faults.values() if f.strikes(instance, method, path)]
        for fault in struck:
            fault.hits += 1
        return struck

    def active(self, kind: Kind, instance: str) -> bool:
        return self.find(kind, instance) is not None

    def find(self, kind: Kind, instance: str) -> Fault | None:
        """The fault of this kind that changes the machine now."""
        return next((f for f in self.faults.values() if f.kind == kind and f.of(instance)), None)
