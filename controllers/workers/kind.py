"""The LabWorker: what a person may ask for, what is observed, and the rules between the two.

Pure data and pure functions. Secrets are never part of it, only references to them. Who may change which part of the
status is said here (`LAB_WORKER.status_owners`): `allocations` belongs to the instances' controller, `labs…` to the
labs' sync, `metrics` and `utilization` to the fleet's metrics, all else to the workers' controller.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any, Literal

from pydantic import Field, TypeAdapter, field_validator, model_validator

from controllers.workers.phases import TRANSITIONS, Phase
from lrm.errors import Cause
from lrm.kind import Column, Kind
from lrm.model import Model, Timestamp
from lrm.resource import Resource, Status
from lrm.secrets import SecretRef

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
_INSTANCE_ID = re.compile(r"i-[0-9a-f]{8,17}")
_REGION = re.compile(r"[a-z]{2}(-[a-z]+)+-\d{1,2}")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_TAGS_MOST = 40
"""EC2 takes 50 on a resource; the others are for lrm's own and the account's."""


def region_of(value: str) -> str:
    """A region's name. Raises ValueError for what cannot be one."""
    if not _REGION.fullmatch(value):
        raise ValueError("a region looks like us-east-1")
    return value


def instance_id_of(value: str) -> str:
    """An instance's id. Raises ValueError for what cannot be one."""
    if not _INSTANCE_ID.fullmatch(value):
        raise ValueError("an instance id looks like i-0123456789abcdef0")
    return value


class AwsSpec(Model):
    """The EC2 instance: either the one to launch, or with `instanceId` the one to adopt."""

    ami_id: str | None = Field(None, pattern=r"^ami-[0-9a-zA-Z]{4,40}$")
    instance_type: str = Field("m5zn.metal", pattern=r"^[a-z0-9][a-z0-9.-]{1,30}$")
    key_name: str | None = Field(None, min_length=1, max_length=255)
    subnet_id: str | None = Field(None, min_length=1, max_length=64)
    security_group_ids: list[str] = Field(default_factory=list, max_length=16)
    assign_public_ip: bool = True
    volume_size_gb: int = Field(500, ge=1, le=65536)
    volume_type: Literal["gp2", "gp3", "io1", "io2", "st1", "sc1", "standard"] = "io1"
    iops: int = Field(10000, ge=100, le=256000)
    iam_instance_profile: str | None = Field(None, min_length=1, max_length=2048)
    tags: dict[str, str] = Field(default_factory=dict, max_length=_TAGS_MOST)
    instance_id: str | None = None

    @field_validator("instance_id")
    @classmethod
    def _id(cls, value: str | None) -> str | None:
        return None if value is None else instance_id_of(value)

    @field_validator("tags")
    @classmethod
    def _tags(cls, tags: dict[str, str]) -> dict[str, str]:
        for key, value in tags.items():
            if key.startswith(("lrm/", "aws:")):
                raise ValueError(f"{key[:60]!r} is reserved: tags of lrm/ and aws: are not the user's")
            if not 1 <= len(key) <= 128 or len(value) > 256:
                raise ValueError(f"{key[:60]!r}: EC2 takes keys of 1 to 128 and values of up to 256 characters")
        return tags


class TlsSpec(Model):
    """How the worker's certificate is checked."""

    verify: bool = True
    ca_file: str | None = Field(None, pattern=r"^/.+")
    fingerprint: str | None = None

    @field_validator("fingerprint")
    @classmethod
    def _normal(cls, value: str | None) -> str | None:
        if value is not None and not _FINGERPRINT.fullmatch(re.sub(r"[:\s]", "", value.lower())):
            raise ValueError("a fingerprint is the certificate's sha256: 64 hex digits, colons allowed")
        return value

    @model_validator(mode="after")
    def _sense(self) -> TlsSpec:
        if self.ca_file and not self.verify:
            raise ValueError("caFile says nothing when verify is false")
        return self


class CmlSpec(Model):
    """The CML on it: where it answers, who logs in, what it is licensed for."""

    username: str = Field("admin", min_length=1, max_length=32)
    password_from: SecretRef | None = None
    license_token_from: SecretRef | None = None
    product_license: str | None = Field(None, pattern=r"^\w{1,20}$")
    api_base_url: str | None = Field(None, pattern=r"^https?://[^\s/?#@]+(/[^\s?#@]*)?$", max_length=512)
    use_private_ip: bool = False
    tls: TlsSpec = Field(default_factory=TlsSpec)
    max_nodes_unlicensed: int = Field(5, ge=0)
    max_nodes_licensed: int = Field(200, ge=0)


USER_CATEGORIES = (
    "start_lab",
    "stop_lab",
    "queue_node",
    "start_node",
    "stop_node",
    "wipe_node",
    "packet_capture",
    "import_lab",
    "export_lab",
    "user_activity",
    "user_group",
)
"""CML's categories of telemetry for what a person did; the others tell of the machine, its licence and its load."""


class IdleDetection(Model):
    """When a worker on which nobody does anything is stopped, to be started again on request."""

    enabled: bool = False
    timeout_minutes: int = Field(60, ge=1, le=7 * 24 * 60)
    rule: Literal["NoRunningLabs", "NoUserActivity"] = "NoRunningLabs"
    """NoRunningLabs: a lab that runs keeps its worker up. NoUserActivity: it does not, only what people do counts.
    A lab instance that is placed on a worker always keeps it up."""
    categories: list[str] = Field(default_factory=lambda: list(USER_CATEGORIES), min_length=1, max_length=64)
    """Categories of CML's telemetry that count as somebody's doing."""
    snooze_until: Timestamp | None = None
    """Not before; the annotation `lab.neuroglia.io/snooze-until` says the same, and the later one holds."""


class ServiceSpec(Model):
    """How a worker serves, whatever machine it is on."""

    lab_track: str = Field("", max_length=63)
    cml: CmlSpec = Field(default_factory=CmlSpec)
    auto_license: bool = True
    drain_timeout_minutes: int = Field(240, ge=0, le=7 * 24 * 60)
    max_concurrent_labs: int = Field(20, ge=0, le=10000)
    idle_detection: IdleDetection = Field(default_factory=IdleDetection)
    shared: bool = False
    observe_only: bool = False


class LabWorkerSpec(ServiceSpec):
    """What is wanted."""

    region: str
    aws: AwsSpec = Field(default_factory=AwsSpec)
    desired_phase: Literal["Ready", "Draining", "Stopped", "Terminated"] = "Ready"
    deletion_policy: Literal["Terminate", "Retain"] | None = None

    _known_region = field_validator("region")(region_of)

    @property
    def adopts(self) -> bool:
        """Whether an existing instance is taken over instead of launching one."""
        return self.aws.instance_id is not None

    @property
    def retains(self) -> bool:
        """Whether the instance outlives this object."""
        if self.observe_only:
            return True
        if self.deletion_policy is None:
            return self.adopts
        return self.deletion_policy == "Retain"

    @property
    def wants_license(self) -> bool:
        return self.auto_license and self.cml.license_token_from is not None


class Checks(Model):
    """EC2's status checks."""

    system: str = ""
    instance: str = ""


class Problem(Model):
    """The last thing that went wrong on one side, cleared when it works again."""

    reason: str
    message: str
    at: Timestamp


class Ec2Status(Model):
    """The instance as EC2 tells it, and the launch that made it."""

    instance_id: str | None = None
    state: str | None = None
    public_ip: str | None = None
    private_ip: str | None = None
    checks: Checks | None = None
    adopted: bool = False
    attempt: int = 0
    """Launches asked for, each under a token of its own."""
    launch: dict[str, Any] | None = None
    """What the current attempt sends, word for word."""
    sent_at: Timestamp | None = None
    """When RunInstances was last about to be sent, while it is not known what came of it."""
    launches: int = 0
    """Instances that EC2 ended by itself since provisioning began."""
    first_seen_at: Timestamp | None = None
    """When EC2 first described the instance: only then can its absence mean anything."""
    surplus: list[str] = Field(default_factory=list)
    """Further instances of this worker that were found and ended, the last ten."""
    last_error: Problem | None = None


class Identity(Model):
    """Which CML this is; belongs to the instance and goes with it."""

    product_uuid: str
    fingerprint: str | None = None


class Registration(Model):
    """The licence registration under way, or how the last one ended."""

    sent_at: Timestamp | None = None
    failed: Problem | None = None
    generation: int = 0
    """The generation whose token was sent or which failed, and the value of the retry annotation then."""
    retry: str | None = None


class CmlStatus(Model):
    """The CML as it tells about itself."""

    version: str | None = None
    ready: bool = False
    licensed: bool = False
    api_url: str | None = None
    identity: Identity | None = None
    trusted: str | None = None
    """The value of the trust annotation that was honoured last."""
    system_info: dict[str, Any] | None = None
    health: dict[str, Any] | None = None
    failed_checks: int = 0
    """Checks that failed in a row, counted up to three."""
    last_sync_at: Timestamp | None = None
    last_error: Problem | None = None
    registration: Registration | None = None
    deregistration_sent_at: Timestamp | None = None
    """When the licence was first given back, while it is not known what came of it."""


class Capacity(Model):
    """What the worker has in all; bytes."""

    cpu: int = 0
    memory: int = 0
    disk: int = 0
    nodes: int = 0
    slots: int = 0


class Utilization(Model):
    """How busy the machine is, percent; absent is unknown."""

    cpu_percent: float | None = None
    memory_percent: float | None = None


class Measured(Model):
    """What one source told last; all of it is as of the last write, which only what matters is worth."""

    at: Timestamp | None = None
    """When the source last answered in full."""
    error: Problem | None = None
    """Why it does not, since when."""


class Ec2Measured(Measured):
    """The instance."""

    state: str | None = None
    checks: Checks | None = None
    started_at: Timestamp | None = None


class CloudWatchMeasured(Measured):
    """What CloudWatch has of the instance; memory only where its agent runs."""

    cpu_percent: float | None = None
    memory_percent: float | None = None


class CmlMeasured(Measured):
    """What the CML tells of itself."""

    cpu_percent: float | None = None
    memory_percent: float | None = None
    disk_percent: float | None = None
    running_nodes: int | None = None
    version: str | None = None
    ready: bool | None = None
    healthy: bool | None = None
    licensed: bool | None = None


class WorkerMetrics(Model):
    """What was measured, by source."""

    ec2: Ec2Measured = Field(default_factory=Ec2Measured)
    cloud_watch: CloudWatchMeasured = Field(default_factory=CloudWatchMeasured)
    cml: CmlMeasured = Field(default_factory=CmlMeasured)
    asked: str | None = None
    """The value of the reconcile-now annotation that was honoured last."""


class Allocation(Model):
    """What one lab instance holds of the worker."""

    cpu: float = 0
    memory: int = 0
    slots: int = 1
    nodes: int = 0
    since: Timestamp | None = None


class Timestamps(Model):
    """When the present stretches began, from which deadlines are counted."""

    provisioning_started_at: Timestamp | None = None
    ec2_started_at: Timestamp | None = None
    boot_started_at: Timestamp | None = None
    licensing_started_at: Timestamp | None = None
    ready_at: Timestamp | None = None
    draining_started_at: Timestamp | None = None
    unlicensing_started_at: Timestamp | None = None
    stopping_started_at: Timestamp | None = None
    stopped_at: Timestamp | None = None
    terminating_started_at: Timestamp | None = None
    terminated_at: Timestamp | None = None


class Failure(Model):
    """Why the worker is Failed, and what must differ for it to try again."""

    reason: str
    message: str
    at: Timestamp
    phase: str
    """Where it failed."""
    generation: int
    retry: str | None = None


class IdleStatus(Model):
    """What is known of the use of the worker; only while `spec.idleDetection` is enabled."""

    last_activity_at: Timestamp | None = None
    """When somebody was last seen to do something, by lrm's clock: not earlier than it was done."""
    user_events: int = 0
    """Events of people's doing in CML's telemetry then."""
    latest_event_at: Timestamp | None = None
    """The latest of them, by CML's clock."""
    paused_at: Timestamp | None = None
    """Since when idleness keeps the worker stopped, or lets it drain."""
    wake: str | None = None
    """The value of the annotation `wake` then: another one lifts it."""
    last_error: Problem | None = None
    """Why it is not known whether the worker is used."""


class LabWorkerStatus(Status):
    """What is observed."""

    ec2: Ec2Status = Field(default_factory=Ec2Status)
    cml: CmlStatus = Field(default_factory=CmlStatus)
    capacity: Capacity | None = None
    utilization: Utilization | None = None
    metrics: WorkerMetrics | None = None
    allocations: dict[str, Allocation] = Field(default_factory=dict)
    labs_count: int | None = None
    labs_synced_at: Timestamp | None = None
    labs_sync_error: str | None = None
    labs_asked: str | None = None
    """The value of the reconcile-now annotation that the last sync honoured."""
    timestamps: Timestamps = Field(default_factory=Timestamps)
    idle: IdleStatus | None = None
    failure: Failure | None = None


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
    },
    fields={
        "status.phase": lambda w: w.status.phase,
        "spec.labTrack": lambda w: w.spec.lab_track,
        "spec.region": lambda w: w.spec.region,
        "spec.desiredPhase": lambda w: w.spec.desired_phase,
    },
    validate=validate,
)
