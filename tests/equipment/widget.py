"""A kind for tests of the runtime: small, with a phase table, two status owners and an index."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from pydantic import Field

from lrm.errors import Cause
from lrm.kind import Column, Kind
from lrm.model import Model, Timestamp
from lrm.registry import Registry
from lrm.resource import ObjectMeta, Resource, Status


class Phase(StrEnum):
    PENDING = "Pending"
    READY = "Ready"
    FAILED = "Failed"


class Part(Model):
    size_gb: int = Field(ge=1)


class WidgetSpec(Model):
    lab_track: str
    count: int = Field(1, ge=0, le=100)
    parts: list[Part] = Field(default_factory=list)
    starts_at: Timestamp | None = None
    colour: str | None = None


class WidgetStatus(Status):
    phase: Phase = Phase.PENDING
    seen: int = 0
    allocations: dict[str, int] = Field(default_factory=dict)


class Widget(Resource[WidgetSpec, WidgetStatus]):
    api_version: str = "test.neuroglia.io/v1"
    kind: str = "Widget"


def _validate(new: Widget, old: Widget | None) -> Iterable[Cause]:
    if old and new.spec.lab_track != old.spec.lab_track:
        yield Cause("spec.labTrack", "FieldValueInvalid", "field is immutable")


WIDGETS: Kind[Widget] = Kind(
    model=Widget,
    plural="widgets",
    singular="widget",
    short_names=("wd",),
    columns=(Column("Phase", lambda w: w.status.phase), Column("Track", lambda w: w.spec.lab_track)),
    transitions={
        "Pending": frozenset({"Ready", "Failed"}),
        "Ready": frozenset({"Failed"}),
        "Failed": frozenset({"Pending"}),
    },
    default_owner="widgets",
    status_owners={"allocations": "allocator"},
    condition_owners={"Allocated": "allocator"},
    indexes={"track": lambda w: (w.spec.lab_track,)},
    fields={"status.phase": lambda w: w.status.phase},
    validate=_validate,
)


class Note(Resource[WidgetSpec, WidgetStatus]):
    api_version: str = "test.neuroglia.io/v1"
    kind: str = "Note"


NOTES: Kind[Note] = Kind(model=Note, plural="notes", singular="note", transitions=WIDGETS.transitions)


def registry(root: str = "/lrm") -> Registry:
    return Registry((WIDGETS, NOTES), root=root)


def widget(name: str = "w1", **spec: object) -> Widget:
    return Widget(
        metadata=ObjectMeta(name=name),
        spec=WidgetSpec.model_validate({"labTrack": "ccna", **spec}),
        status=WidgetStatus(),
    )
