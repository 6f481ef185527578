"""The LabWorker: one CML on one EC2 instance, and the rules between what is wanted (`spec`) and observed (`status`).

Pure data and pure functions. Who may change which part of the status is said here (`LAB_WORKER.status_owners`):
`allocations` belongs to the instances' controller, `labs…` to the labs' sync, `metrics` and `utilization` to the
fleet's metrics, all else to the workers' controller.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from pydantic import Field, TypeAdapter

from controllers.workers.phases import TRANSITIONS, Phase
from controllers.workers.spec import LabWorkerSpec
from controllers.workers.status import LabWorkerStatus
from lrm.errors import Cause
from lrm.kind import Column, Kind
from lrm.model import Timestamp
from lrm.resource import Resource

TRUST_ANNOTATION = "lab.neuroglia.io/trust-new-identity"
"""A new value lets the worker's address belong to another CML, or show another certificate, once."""
DRAIN_ANNOTATION = "lab.neuroglia.io/drain-before-delete"
"""Unless "false": a deletion waits until no lab runs, as long as a drain may take."""

SNOOZE_ANNOTATION = "lab.neuroglia.io/snooze-until"
"""A time (RFC 3339) until which idleness does not stop the worker, and does not keep it stopped."""
WAKE_ANNOTATION = "lab.neuroglia.io/wake"
"""A new value starts a worker that idleness has stopped."""

INSTANCE_FINALIZER = "lab.neuroglia.io/instance"
RECORDS_FINALIZER = "lab.neuroglia.io/records"

WORKERS, INSTANCES, LABS, METRICS = "workers", "instances", "labs", "metrics"
"""Owners of parts of the status, which are the names of their controllers."""

_TIME: TypeAdapter[datetime] = TypeAdapter(Timestamp)


class LabWorker(Resource[LabWorkerSpec, LabWorkerStatus]):
    """One CML on one EC2 instance."""

    api_version: str = "lab.neuroglia.io/v1"
    kind: str = "LabWorker"
    spec: LabWorkerSpec
    status: LabWorkerStatus = Field(default_factory=LabWorkerStatus)

    @property
    def phase(self) -> Phase | str:
        """The phase; a word that this version does not know stays a word."""
        try:
            return Phase(self.status.phase)
        except ValueError:
            return self.status.phase


def snooze_annotation(worker: LabWorker) -> datetime | None:
    """Until when the annotation wants the worker to stay up; None without one. Raises ValueError if it is no time."""
    text = worker.metadata.annotations.get(SNOOZE_ANNOTATION)
    return _TIME.validate_python(text) if text else None


def validate(new: LabWorker, old: LabWorker | None) -> Iterator[Cause]:
    """What types cannot say: what a launch needs, and what is fixed once there is an instance."""
    aws = new.spec.aws
    try:
        snooze_annotation(new)
    except ValueError:
        # One that is stored already must not stand in the way of other changes.
        if (
            old is None
            or old.metadata.annotations.get(SNOOZE_ANNOTATION) != new.metadata.annotations[SNOOZE_ANNOTATION]
        ):
            what = f"{SNOOZE_ANNOTATION} must be a time with its zone, as in 2026-01-31T09:00:00Z"
            yield Cause("metadata.annotations", "FieldValueInvalid", what)
    if aws.ami_id is None and aws.instance_id is None:
        yield Cause("spec.aws.amiId", "FieldValueRequired", "amiId is required, or instanceId to adopt an instance")
    yield from _observed(new.spec, created=old is None)
    if old is None:
        return
    ec2 = old.status.ec2
    # A launch that may have been sent counts as an instance: it is repeated word for word until it is known.
    if ec2.instance_id is None and ec2.sent_at is None:
        return
    what = f"it is fixed while the instance {ec2.instance_id or 'being launched'} exists"
    if new.spec.region != old.spec.region:
        yield Cause("spec.region", "FieldValueInvalid", what)
    if new.spec.account != old.spec.account:
        yield Cause("spec.account", "FieldValueInvalid", what)
    before, after = old.spec.aws.wire(), aws.wire()
    for name in sorted(before.keys() | after.keys()):
        if name != "tags" and before.get(name) != after.get(name):
            yield Cause(f"spec.aws.{name}", "FieldValueInvalid", what)


def _observed(spec: LabWorkerSpec, *, created: bool) -> Iterator[Cause]:
    """What makes no sense of a worker that is only observed."""
    if spec.observe_only and spec.desired_phase != "Ready":
        message = "only Ready: what is only observed is not drained, stopped or ended"
        yield Cause("spec.desiredPhase", "FieldValueInvalid", message)
    if spec.observe_only and created and not spec.adopts:
        message = "with observeOnly nothing is launched: name the instance to observe"
        yield Cause("spec.aws.instanceId", "FieldValueRequired", message)


def serving(worker: LabWorker) -> bool:
    """Whether labs run and may be placed on it."""
    return worker.status.phase in {Phase.READY, Phase.READY_UNLICENSED, Phase.ACTIVE} and not worker.deleting


def _condition(kind: str) -> Any:
    def value(worker: LabWorker) -> str | None:
        condition = worker.status.condition(kind)
        return condition.status if condition else None

    return value


COLUMNS = (
    Column("Phase", lambda w: w.status.phase, description="Where the worker stands in its life."),
    Column("Ready", _condition("Ready"), description="Whether labs can run on it now."),
    Column("Track", lambda w: w.spec.lab_track or None, description="The lab track it serves."),
    Column("Region", lambda w: w.spec.region, description="Its AWS region."),
    Column("Account", lambda w: w.spec.account or None, description="Its AWS account, by its name.", priority=1),
    Column("Instance", lambda w: w.status.ec2.instance_id, description="Its EC2 instance."),
    Column("CML", lambda w: w.status.cml.version, description="The version of CML on it."),
    Column("Labs", lambda w: w.status.labs_count, type="integer", description="Labs on it at the last sync."),
    Column("State", lambda w: w.status.ec2.state, description="What EC2 says of the instance.", priority=1),
    Column("Type", lambda w: w.spec.aws.instance_type, description="The instance type.", priority=1),
    Column("Address", lambda w: w.status.cml.api_url, description="Where its CML answers.", priority=1),
    Column("Licensed", _condition("Licensed"), description="Whether its CML is licensed.", priority=1),
)

LAB_WORKER: Kind[LabWorker] = Kind(
    model=LabWorker,
    plural="labworkers",
    singular="labworker",
    short_names=("lw",),
    categories=("all", "lrm"),
    max_name=63,
    columns=COLUMNS,
    transitions=TRANSITIONS,
    initial_phase=Phase.PENDING.value,
    default_owner=WORKERS,
    status_owners={"allocations": INSTANCES, "labs*": LABS, "metrics": METRICS, "utilization": METRICS},
    condition_owners={"LabsSynced": LABS},
    indexes={
        "track": lambda w: (w.spec.lab_track,),
        "phase": lambda w: (w.status.phase,),
        "region": lambda w: (w.spec.region,),
        "allocation": lambda w: w.status.allocations,
    },
    fields={
        "status.phase": lambda w: w.status.phase,
        "spec.labTrack": lambda w: w.spec.lab_track,
        "spec.region": lambda w: w.spec.region,
        "spec.account": lambda w: w.spec.account,
        "spec.desiredPhase": lambda w: w.spec.desired_phase,
    },
    validate=validate,
)
