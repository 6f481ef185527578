"""LabRecord: one lab of one worker's CML, as the last sync saw it, and what its user wants done with it.

Promises: a record is named `{worker}-{labId}` and belongs to that worker for ever; all that describes the lab is
written by the sync alone, all about carrying out a wish by the lab-records controller alone. The phase says whether
the lab was in the last complete list; that a record is being deleted, its deletionTimestamp says. `lastSyncedAt` is
the worker's time, filled in when a record is served, so that a lab at rest costs no write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lrm.cache import Cache
from lrm.errors import Cause
from lrm.kind import Column, Kind
from lrm.model import Model, Timestamp
from lrm.resource import AnyResource, ObjectMeta, Resource, Status

LABS = "labs"
"""The controller that syncs, and the lock of both."""
LAB_RECORDS = "lab-records"
"""The controller that deletes labs and acts on desiredState."""

LAB_FINALIZER = "lab.neuroglia.io/lab"
"""On every record from its creation: the lab in CML goes before the record does."""
FORGET_ANNOTATION = "lab.neuroglia.io/forget"
"""On a record that is being deleted: drop the record and leave the lab alone. Anything but "false" counts."""
REFRESH_ANNOTATION = "lab.neuroglia.io/refresh-labs"
"""On a worker: a new value asks for a sync of its labs, and for nothing else."""

PRESENT = "Present"
MISSING = "Missing"

READY = "Ready"
"""The lab was in the last complete list."""
DESIRED_STATE = "DesiredState"
"""Of the last wish, be it desiredState or an operation: Unknown while it is being carried out, then True, or False
with the reason why it was given up."""
LAB_DELETED = "LabDeleted"
"""On records that are being deleted: how far it has come, or what it waits for."""
TOPOLOGY_KEPT = "TopologyKept"
"""On records that are being deleted, where topologies are kept: in which LabImport, or why not; Unknown while CML has
not given it and is still asked."""


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


def _capital(value: Any) -> Any:
    return value.capitalize() if isinstance(value, str) else value


LabState = Annotated[Literal["STARTED", "STOPPED", "DEFINED_ON_CORE"], BeforeValidator(_upper)]
"""The states of CML that a lab can be brought to, in CML's own words."""

Verb = Annotated[Literal["Start", "Stop", "Wipe"], BeforeValidator(_capital)]
"""What an operation does; a lab that runs is stopped before it is wiped."""

RUNNING, WAITING = "Running", "Waiting"
SUCCEEDED, FAILED, SUPERSEDED = "Succeeded", "Failed", "Superseded"
ENDED = frozenset({SUCCEEDED, FAILED, SUPERSEDED})
"""Results of an operation after which nothing more is done for it."""
PAST_OPERATIONS = 32
"""How many are kept; with a short message, since a record is in every daemon's memory."""


class Operation(Model):
    """Something to be done to the lab once, whatever was done before: a new id is a new operation."""

    id: str = Field(min_length=1, max_length=64)
    verb: Verb


class LabRecordSpec(Model):
    """Which lab this is, and what is to be done with it."""

    worker_ref: str = Field(min_length=1, max_length=63)
    lab_id: str = Field(min_length=1, max_length=64)
    desired_state: LabState | None = None
    """Acted on once when it is set; what students do with the lab afterwards is their business. To have the same state
    again: take it away, wait until status.observedGeneration has followed, and set it; or give an operation."""
    operation: Operation | None = None
    """Carried out once for its id, as long as that is among the last 32; a newer one takes the place of one that is
    under way."""


class FieldChange(Model):
    """One field before and after."""

    old: str | int | None = None
    new: str | int | None = None


class LabOperation(Model):
    """Something that happened to a lab between two syncs."""

    timestamp: Timestamp
    previous_state: str = ""
    new_state: str = ""
    changed_fields: dict[str, FieldChange] = Field(default_factory=dict)


class Acting(Model):
    """How far a wish has come."""

    generation: int
    since: Timestamp
    """When CML accepted the first step, or first had no useful answer, if that was earlier."""
    step: str
    """The last that CML accepted; empty before the first."""
    operation: str = ""
    """The operation's id; empty where the wish is desiredState."""


class OperationOutcome(Model):
    """What has become of an operation."""

    id: str
    verb: str
    result: str
    """Running, Waiting (for the worker, or after a failure for the next try), Succeeded, Failed, or Superseded by a
    newer one or by none."""
    message: str = ""
    at: Timestamp
    """Since when the result is this one."""


class LabRecordStatus(Status):
    """The lab as CML described it, in CML's own words where CML has words."""

    title: str = ""
    description: str = ""
    notes: str = ""
    state: str = ""
    owner: str = ""
    """CML's id of the owner."""
    owner_username: str = ""
    owner_fullname: str = ""
    node_count: int | None = None
    link_count: int | None = None
    groups: list[str] = Field(default_factory=list)
    cml_created_at: Timestamp | None = None
    modified_at: Timestamp | None = None
    instance_id: str = ""
    """The EC2 instance whose CML has the lab; once the worker runs on another one, this lab is gone."""
    first_seen_at: Timestamp | None = None
    last_synced_at: Timestamp | None = None
    """Stored from a tombstone until the lab's data are read again: when it was last seen. Otherwise computed."""
    missing_since: Timestamp | None = None
    missing_lists: int = 0
    """Complete lists in a row that lack the lab, of those that count (`sync.difference`)."""
    missing_counted_at: Timestamp | None = None
    """When the last of them was asked for; while none counts, when the lab was first missed."""
    operation_history: list[LabOperation] = Field(default_factory=list)
    acting: Acting | None = None
    """While a wish is being carried out."""
    acted_state: str | None = None
    """The desiredState that was last taken up, reached or given up."""
    operation: OperationOutcome | None = None
    past_operations: list[OperationOutcome] = Field(default_factory=list)
    """Those that it took the place of, the newest last; one of their ids again is told what became of it."""


class LabRecord(Resource[LabRecordSpec, LabRecordStatus]):
    """See the module."""

    api_version: str = "lab.neuroglia.io/v1"
    kind: str = "LabRecord"
    metadata: ObjectMeta = Field(default_factory=ObjectMeta)
    spec: LabRecordSpec
    status: LabRecordStatus = Field(default_factory=LabRecordStatus)


def record_name(worker: str, lab_id: str) -> str:
    """The one name that a lab's record can have."""
    return f"{worker}-{lab_id}"


def printable(title: str) -> str:
    """A lab's title for a log: students choose them, and a terminal obeys what it is sent."""
    return title if title.isprintable() else ascii(title)


def runs(record: LabRecord) -> bool:
    """Whether the lab runs, for all that the last sync knows."""
    return record.status.state == "STARTED" and record.status.missing_since is None


def shown_state(record: LabRecord) -> str:
    """The lab's state in CML's word, or `Missing`: what a lab was before it went is not what it is."""
    return MISSING if record.status.phase == MISSING else record.status.state


def forgets(record: LabRecord) -> bool:
    """Whether deleting this record leaves the lab alone."""
    return record.metadata.annotations.get(FORGET_ANNOTATION, "false") != "false"


def records_of_worker(cache: Cache, namespace: str, worker: str) -> list[LabRecord]:
    """All records of a worker, by name of the worker."""
    return cache.by_index(LabRecord, "worker", f"{namespace}/{worker}")


def record_of_lab(cache: Cache, namespace: str, worker: str, lab_id: str) -> LabRecord | None:
    """The record of one lab of one worker."""
    return next(iter(cache.by_index(LabRecord, "lab", f"{namespace}/{worker}/{lab_id}")), None)


def _validate(new: LabRecord, old: LabRecord | None) -> Iterable[Cause]:
    if new.name != record_name(new.spec.worker_ref, new.spec.lab_id):
        yield Cause("metadata.name", "FieldValueInvalid", "must be {spec.workerRef}-{spec.labId}")
    if old is not None:
        if new.spec.worker_ref != old.spec.worker_ref:
            yield Cause("spec.workerRef", "FieldValueForbidden", "is immutable: a lab does not change workers")
        if new.spec.lab_id != old.spec.lab_id:
            yield Cause("spec.labId", "FieldValueForbidden", "is immutable: another lab has a record of its own")
        before, after = old.spec.operation, new.spec.operation
        if before is not None and after is not None and before.id == after.id and before.verb != after.verb:
            yield Cause("spec.operation.id", "FieldValueInvalid", "another operation needs an id of its own")


def last_synced(status: LabRecordStatus, worker_synced: datetime | None) -> datetime | None:
    """When the lab was seen last: at the worker's last sync unless it is missing, and not before it was first seen."""
    if status.missing_since is not None or status.last_synced_at is not None:
        return status.last_synced_at
    return max((t for t in (worker_synced, status.first_seen_at) if t is not None), default=None)


def _present(record: LabRecord, lookup: Callable[[str, str, str], AnyResource | None]) -> LabRecord:
    """A copy with `lastSyncedAt`."""
    worker = lookup("LabWorker", record.namespace, record.spec.worker_ref)
    synced = last_synced(record.status, getattr(worker.status, "labs_synced_at", None) if worker is not None else None)
    if synced == record.status.last_synced_at:
        return record
    served = record.model_copy()
    served.status = record.status.model_copy(update={"last_synced_at": synced})
    return served


LAB_RECORD = Kind(
    model=LabRecord,
    plural="labrecords",
    singular="labrecord",
    short_names=("lr",),
    categories=("all", "lrm"),
    columns=(
        Column("Worker", lambda r: r.spec.worker_ref),
        Column("Title", lambda r: r.status.title),
        Column("State", shown_state),
        Column("Nodes", lambda r: r.status.node_count, type="integer"),
        Column("Owner", lambda r: r.status.owner_username or r.status.owner),
        Column("Lab", lambda r: r.spec.lab_id, priority=1, description="CML's id of the lab"),
        Column("Links", lambda r: r.status.link_count, type="integer", priority=1),
        Column("Phase", lambda r: r.status.phase, priority=1),
    ),
    initial_phase=PRESENT,
    transitions={PRESENT: frozenset({MISSING}), MISSING: frozenset({PRESENT})},
    default_owner=LABS,
    status_owners=dict.fromkeys(
        ("observedGeneration", "acting", "actedState", "operation", "pastOperations"), LAB_RECORDS
    ),
    condition_owners={
        READY: LABS,
        DESIRED_STATE: LAB_RECORDS,
        LAB_DELETED: LAB_RECORDS,
        TOPOLOGY_KEPT: LAB_RECORDS,
    },
    indexes={
        "worker": lambda r: (f"{r.namespace}/{r.spec.worker_ref}",),
        "lab": lambda r: (f"{r.namespace}/{r.spec.worker_ref}/{r.spec.lab_id}",),
        "running": lambda r: (f"{r.namespace}/{r.spec.worker_ref}",) if runs(r) else (),
    },
    fields={
        "spec.workerRef": lambda r: r.spec.worker_ref,
        "spec.labId": lambda r: r.spec.lab_id,
        "status.state": lambda r: r.status.state,
        "status.phase": lambda r: r.status.phase,
    },
    validate=_validate,
    forgotten_with_owner=True,
    create_refusal="a LabRecord is made by the sync alone: create the lab in CML, and its record follows",
    present=_present,
)
