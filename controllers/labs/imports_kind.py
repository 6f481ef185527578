"""LabImport: a topology that is to become one lab on a worker's CML, or is kept until somebody asks for that.

Promises: an import makes one lab in its life, however often it is tried. What it says is fixed from the first try on.
One that is `held` does nothing until it carries the annotation `lab.neuroglia.io/import`. It belongs to nobody, so that
what is kept outlives the worker that it came from; it goes when its time is over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, Field

from lrm.errors import Cause
from lrm.kind import Column, Kind
from lrm.model import Model, Timestamp
from lrm.resource import ObjectMeta, Resource, Status

LAB_IMPORTS = "lab-imports"
"""The controller."""

IMPORT_ANNOTATION = "lab.neuroglia.io/import"
"""On a LabImport that is held: import it now. Anything but "false" counts."""
WORKER_LABEL = "lab.neuroglia.io/worker"
LAB_LABEL = "lab.neuroglia.io/lab"
"""On a kept topology: the worker and the lab that it came from."""

TOPOLOGY_BYTES = 512 * 1024
TITLE_MOST = 64
"""Characters; CML's own limit."""

PENDING, HELD, IMPORTING, IMPORTED, FAILED = "Pending", "Held", "Importing", "Imported", "Failed"
READY = "Ready"
"""True once the lab is there; False with what it waits for, or why it was given up; Unknown while no worker of that
name is known."""

WARNINGS_KEPT = 20
TTL_MOST = 366 * 24 * 3600

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""Unicode's category Cc: a terminal obeys some of them."""
_RESERVED = re.compile(r"lrm-(import-)?[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def _fits(topology: str) -> str:
    size = len(topology.encode("utf-8", "surrogatepass"))
    if size > TOPOLOGY_BYTES:
        raise ValueError(f"a topology has at most {TOPOLOGY_BYTES} bytes, not {size}")
    if not topology.strip():
        raise ValueError("a topology is not empty")
    return topology


class LabImportSpec(Model):
    """What is imported, where, and for how long the order is kept."""

    worker_ref: str = Field(min_length=1, max_length=63)
    title: str = Field(min_length=1, max_length=TITLE_MOST)
    topology: Annotated[str, AfterValidator(_fits)]
    """CML's own YAML or JSON; at most 512 KiB."""
    held: bool = False
    ttl_seconds: int | None = Field(None, ge=1, le=TTL_MOST)
    """Seconds until it is removed, from its end; while it is held, from its creation, or from the end of the lab whose
    topology it keeps. None: as the settings say."""


class LabImportStatus(Status):
    """What has become of it."""

    lab_id: str | None = None
    """CML's id of the lab."""
    warnings: list[str] = Field(default_factory=list)
    """CML's; the first 20."""
    instance_id: str | None = None
    """The EC2 instance to whose CML it was sent."""
    sent_at: Timestamp | None = None
    """When it was last about to be sent; from then on CML may have the lab."""
    attempts: int = 0
    completed_at: Timestamp | None = None
    """When it came to its end; of a topology that was kept and is held, when its lab was found gone."""


class LabImport(Resource[LabImportSpec, LabImportStatus]):
    """See the module."""

    api_version: str = "lab.neuroglia.io/v1"
    kind: str = "LabImport"
    metadata: ObjectMeta = Field(default_factory=ObjectMeta)
    spec: LabImportSpec
    status: LabImportStatus = Field(default_factory=LabImportStatus)


def mark_of(order: LabImport) -> str:
    """The title under which the lab is made, by which it is found again: no other lab has it."""
    return f"lrm-import-{order.uid}"


def kept_name(uid: str) -> str:
    """The name of the LabImport that keeps the topology of this record's lab."""
    return f"kept-{uid}"


def waits_to_be_asked(order: LabImport) -> bool:
    """Whether it is held and nobody has asked for it yet; what was sent is taken to its end."""
    asked = order.metadata.annotations.get(IMPORT_ANNOTATION, "false") != "false"
    return order.spec.held and not asked and order.status.sent_at is None


def ended(order: LabImport) -> bool:
    """Whether it has come to its end; one that failed begins anew when its spec changes."""
    status = order.status
    if status.phase == FAILED:
        return status.observed_generation == order.metadata.generation
    return status.phase == IMPORTED


def is_reserved(title: str) -> bool:
    """Whether labs of such titles are lrm's own, which it finds by them, and removes."""
    return _RESERVED.fullmatch(title) is not None


def _validate(new: LabImport, old: LabImport | None) -> Iterable[Cause]:
    if is_reserved(new.spec.title) and (old is None or old.spec.title != new.spec.title):
        yield Cause("spec.title", "FieldValueInvalid", "is of the form by which lrm finds what it makes for others")
    if CONTROL.search(new.spec.title) and (old is None or old.spec.title != new.spec.title):
        yield Cause("spec.title", "FieldValueInvalid", "must not hold control characters")
    if old is None or old.status.sent_at is None:
        return
    before, after = old.spec.wire(), new.spec.wire()
    for name in ("workerRef", "title", "topology"):
        if before[name] != after[name]:
            yield Cause(f"spec.{name}", "FieldValueForbidden", "is fixed once the import was sent: make another one")


LAB_IMPORT: Kind[LabImport] = Kind(
    model=LabImport,
    plural="labimports",
    singular="labimport",
    short_names=("li",),
    categories=("lrm",),
    columns=(
        Column("Worker", lambda i: i.spec.worker_ref),
        Column("Title", lambda i: i.spec.title),
        Column("Phase", lambda i: i.status.phase),
        Column("Lab", lambda i: i.status.lab_id, description="CML's id of the lab that it became"),
    ),
    initial_phase=PENDING,
    transitions={
        PENDING: frozenset({HELD, IMPORTING, FAILED}),
        HELD: frozenset({IMPORTING, FAILED}),
        IMPORTING: frozenset({IMPORTED, FAILED}),
        FAILED: frozenset({PENDING}),
    },
    default_owner=LAB_IMPORTS,
    indexes={"worker": lambda i: (f"{i.namespace}/{i.spec.worker_ref}",)},
    fields={"spec.workerRef": lambda i: i.spec.worker_ref, "status.phase": lambda i: i.status.phase},
    validate=_validate,
)
