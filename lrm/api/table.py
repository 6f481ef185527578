"""What `kubectl get` prints: a `Table` with the kind's columns, the name first and the age last.

Called by lists, single reads and watches when the client accepts Tables.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from lrm.kind import Column, Kind
from lrm.resource import AnyResource

_NAME = {
    "name": "Name",
    "type": "string",
    "format": "name",
    "description": "Name of the object, unique in its namespace.",
    "priority": 0,
}
_AGE = Column("Age", lambda _: None, description="Time since the object was created.")


def table_of(
    kind: Kind[Any],
    resources: Iterable[AnyResource],
    documents: Iterable[dict[str, Any]] | None,
    metadata: dict[str, Any],
    now: datetime,
    *,
    columns: bool = True,
) -> dict[str, Any]:
    """A Table; each row carries its object's metadata, or the whole document where `documents` are given."""
    objects: Iterable[dict[str, Any]] = (partial_metadata(r) for r in resources) if documents is None else documents
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": metadata,
        "columnDefinitions": definitions(kind) if columns else [],
        "rows": [
            {"cells": cells(kind, resource, now), "object": shown}
            for resource, shown in zip(resources, objects, strict=True)
        ],
    }


def definitions(kind: Kind[Any]) -> list[dict[str, Any]]:
    """The columns as Kubernetes describes them."""
    own = [
        {"name": c.name, "type": c.type, "format": "", "description": c.description, "priority": c.priority}
        for c in [*kind.columns, *_age_of(kind)]
    ]
    return [_NAME, *own]


def cells(kind: Kind[Any], resource: AnyResource, now: datetime) -> list[Any]:
    """One row."""
    row: list[Any] = [resource.name, *(_cell(column.value(resource), now) for column in kind.columns)]
    if _age_of(kind):
        created = resource.metadata.creation_timestamp
        row.append(age(now - created) if created else "<unknown>")
    return row


def partial_metadata(resource: AnyResource) -> dict[str, Any]:
    """The object without spec and status."""
    metadata = {k: v for k, v in resource.metadata.wire().items() if v not in ({}, [], "")}
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata}


def age(since: timedelta) -> str:
    """As kubectl writes durations: two units while they say something, then one."""
    seconds = int(since.total_seconds())
    minutes, hours, days, years = seconds // 60, seconds // 3600, seconds // 86400, seconds // (365 * 86400)
    steps = (
        (seconds < 0, "0s", 0, ""),
        (seconds < 120, f"{seconds}s", 0, ""),
        (minutes < 10, f"{minutes}m", seconds % 60, "s"),
        (minutes < 180, f"{minutes}m", 0, ""),
        (hours < 8, f"{hours}h", minutes % 60, "m"),
        (hours < 48, f"{hours}h", 0, ""),
        (days < 8, f"{days}d", hours % 24, "h"),
        (days < 730, f"{days}d", 0, ""),
        (years < 8, f"{years}y", days % 365, "d"),
    )
    for fits, large, rest, unit in steps:
        if fits:
            return f"{large}{rest}{unit}" if rest else large
    return f"{years}y"


def _cell(value: Any, now: datetime) -> Any:
    """A time as its distance from now; everything else as it is."""
    if not isinstance(value, datetime):
        return value
    return f"in {age(value - now)}" if value > now else age(now - value)


def _age_of(kind: Kind[Any]) -> tuple[Column, ...]:
    return () if any(c.name.lower() == "age" for c in kind.columns) else (_AGE,)
