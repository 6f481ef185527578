"""The LabInstanceRequest: one student's lab for some time, in a container or on a CML worker.

Pure data and the rules that it must keep, whoever writes it; what settings limit (the longest duration, the allowed
sources, quotas) is `admission`'s. Everything in the status belongs to the instances' controller. Where its template is
named (`spec.labTemplate`) is the one place that a later kind of template will be named too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from controllers.failure import Failure
from controllers.instances.phases import FINAL, TRANSITIONS, Conditions, Phase, Reasons
from controllers.instances.quantity import SomeBytes, SomeCores
from lrm.errors import Cause
from lrm.kind import Column, Kind
from lrm.model import Model, Timestamp
from lrm.resource import Resource, Status

INSTANCES = "instances"
"""The controller, its lock, and the owner of the status and of every worker's `allocations`."""
INSTANCE_FINALIZER = "lab.neuroglia.io/lab-instance"

MINUTES_MOST = 7 * 24 * 60
"""Minutes that any installation may allow; its own limit is a setting."""
START_YEARS = (2000, 2200)
"""In which a lab may be scheduled to start."""
_FIRST_MOMENT, _LAST_MOMENT = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
TOPOLOGY_MOST = 512 * 1024
"""Characters of an inline topology: with all else it must fit into a stored value, 1 MiB."""
_ENVIRONMENT_MOST = 32 * 1024
_HOST_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_EMAIL = re.compile(rf"[A-Za-z0-9.!#$%&'*+/=?^_`{{|}}~-]{{1,64}}@({_HOST_LABEL}\.)+[A-Za-z]{{2,63}}")
_ADDRESS_MOST = 254
EXAMPLE_ADDRESS = "student@university.edu"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_IMAGE = re.compile(r"(?=[a-z0-9])(?!.*(\.\.|//))[A-Za-z0-9._:/-]{0,254}[A-Za-z0-9._-](@sha256:[0-9a-f]{64})?")
"""An engine is asked about it in a path: no step of it leads up, or to nothing."""
_FILE = re.compile(r"/[^\x00]+")
_URL = re.compile(r"https?://[^\s/?#@]+(/\S*)?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Unicode's category Cc, its separators of lines, and what turns the direction of text: whoever reads an environment,
in a terminal or line by line, takes some of them for more."""


def is_address(text: str) -> bool:
    """Whether a text can be a student's e-mail address."""
    return len(text) <= _ADDRESS_MOST and _EMAIL.fullmatch(text) is not None


def _number(value: Any) -> Any:
    """What may become a number; true would be 1."""
    if isinstance(value, bool):
        raise ValueError("it is a number")  # noqa: TRY004 - pydantic makes of a ValueError what it tells
    return value


class HealthCheck(Model):
    """A command in the container whose exit code 0 says that the lab can be worked with; the engine runs it."""

    command: list[str] = Field(min_length=1, max_length=64)
    """The program and its arguments; no shell."""
    interval_seconds: float = Field(10, ge=0.1, le=3600)
    """Between two checks; the installation may set a least."""
    timeout_seconds: float = Field(5, ge=0.1, le=3600)
    """A check that takes longer has failed."""
    retries: int = Field(3, ge=1, le=100)
    """Checks that fail one after the other until the lab is unhealthy."""
    start_period_seconds: float = Field(0, ge=0, le=3600)
    """After the start, in which failures do not count."""


class LabTemplate(Model):
    """What the lab is made from: an image, or a CML topology from one of three places. A text alone is an image."""

    image: str | None = Field(None, max_length=330)
    """Of a container, as in python:3.11-alpine."""
    command: list[str] = Field(default_factory=list, max_length=256)
    """Instead of what the image runs."""
    ports: list[int] = Field(default_factory=list, max_length=32)
    """TCP ports of the container to publish. The first is the access URL's, whose scheme is what is usual there: http
    (80, 3000, 5000, 8000, 8008, 8080, 8888), https (443, 8443), ssh (22), else tcp."""
    pull_policy: Literal["IfNotPresent", "Always", "Never"] | None = None
    """Absent: what the settings say."""
    health_check: HealthCheck | None = None
    """Absent: the image's own, if it has one."""
    writable: bool = False
    """Whether the container may write to its own root; /tmp it may always."""
    topology: str | None = Field(None, min_length=1, max_length=TOPOLOGY_MOST)
    """A CML topology, YAML or JSON."""
    topology_file: str | None = Field(None, max_length=1024)
    """Path of one where lrm runs, among those that LRM_TOPOLOGY_FILES allows."""
    topology_url: str | None = Field(None, max_length=2048)
    """Address of one, among those that LRM_TOPOLOGY_URLS allows."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"image": value} if isinstance(value, str) else value

    @field_validator("image")
    @classmethod
    def _image(cls, value: str | None) -> str | None:
        if value is not None and not _IMAGE.fullmatch(value):
            raise ValueError("an image looks like python:3.11-alpine or registry.example.com/team/lab@sha256:…")
        return value

    @field_validator("topology_file")
    @classmethod
    def _file(cls, value: str | None) -> str | None:
        if value is not None and not _FILE.fullmatch(value):
            raise ValueError("a file is named by its whole path, as in /srv/labs/ccna.yaml")
        return value

    @field_validator("topology_url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is not None and not _URL.fullmatch(value):
            raise ValueError("an address looks like https://host/labs/ccna.yaml: http or https, no login, no spaces")
        return value

    @field_validator("ports")
    @classmethod
    def _ports(cls, value: list[int]) -> list[int]:
        if any(not 1 <= port <= 65535 for port in value) or len(set(value)) != len(value):
            raise ValueError("ports are different numbers from 1 to 65535")
        return value

    @model_validator(mode="after")
    def _one(self) -> LabTemplate:
        sources = [self.image, self.topology, self.topology_file, self.topology_url]
        if sum(source is not None for source in sources) != 1:
            raise ValueError("name exactly one of image, topology, topologyFile and topologyUrl")
        of_containers = (self.command, self.ports, self.pull_policy, self.health_check, self.writable)
        if self.image is None and any(of_containers):
            raise ValueError("command, ports, pullPolicy, healthCheck and writable belong to an image")
        return self


class InstanceResources(Model):
    """What the lab may use, and what is reserved for it; absent is what the settings say, or the topology asks for.

    On CML it can only be more than the topology asks for.
    """

    cpu: SomeCores | None = None
    """Cores."""
    memory: SomeBytes | None = None
    """Bytes."""
    pids: int | None = Field(None, ge=1, le=1_000_000)
    """Processes and threads in a container."""


class LabInstanceRequestSpec(Model):
    """What is wanted."""

    lab_template: LabTemplate
    """What it is made from."""
    runtime: Literal["Container", "CML"] | None = None
    """Absent: what the template is for."""
    lab_track: str = Field("", max_length=63)
    """Of the workers that may take it; empty is any. A container has none."""
    pool: str | None = Field(None, min_length=1, max_length=63)
    """Only workers of this pool."""
    student_email: str = Field(max_length=_ADDRESS_MOST)
    """For whom it is; quotas count by it."""
    duration_minutes: Annotated[int, BeforeValidator(_number)] = Field(ge=1, le=MINUTES_MOST)
    """From Running on. Raised while Running, it is an extension."""
    scheduled_start_time: Timestamp | None = None
    """Absent or past: as soon as there is a place."""
    environment: dict[str, str] = Field(default_factory=dict, max_length=256)
    """Variables of the container; of a CML lab, lines of its notes."""
    resources: InstanceResources = Field(default_factory=InstanceResources)
    """What it may use, and what is reserved for it."""
    restart_policy: Literal["Never", "OnFailure"] = "Never"
    """OnFailure: what fails while Running begins again, elsewhere if its worker was lost; its time goes on. A lab that
    was stopped in CML is started again there, as it is."""
    desired_phase: Literal["Running", "Stopped"] = "Running"
    """Stopped ends it before its time."""

    @property
    def runs_in(self) -> Literal["Container", "CML"]:
        """The runtime."""
        return self.runtime or ("Container" if self.lab_template.image is not None else "CML")

    @field_validator("student_email")
    @classmethod
    def _address(cls, value: str) -> str:
        if not is_address(value):
            raise ValueError(f"an e-mail address looks like {EXAMPLE_ADDRESS}")
        return value

    @field_validator("environment")
    @classmethod
    def _variables(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"{name[:60]!r} is no name of a variable: letters, digits and _, no digit first")
            if _CONTROL.search(text):
                raise ValueError(f"the value of {name} holds control characters")
        if sum(len(name) + len(text.encode()) for name, text in value.items()) > _ENVIRONMENT_MOST:
            raise ValueError(f"at most {_ENVIRONMENT_MOST} bytes in all")
        return value


class WorkerRef(Model):
    """Where it has its place."""

    kind: Literal["LabWorker", "Engine"]
    namespace: str = ""
    name: str
    uid: str = ""
    """Of the LabWorker or the engine; another one of that name is another place. Empty: any engine."""
    instance_id: str = ""
    """The EC2 instance then: on another one, whatever was there is gone."""


class Need(Model):
    """What its place must have for it."""

    cpu: float = 0
    """Cores."""
    memory: int = 0
    """Bytes."""
    nodes: int = 0
    """CML nodes that count for a licence."""
    slots: int = 1


class PublishedPort(Model):
    """Where a container's port is to be reached."""

    port: int
    address: str


class LabInstanceRequestStatus(Status):
    """What is observed."""

    worker_ref: WorkerRef | None = None
    """Set with Provisioning; cleared when nothing of it is left there."""
    need: Need | None = None
    """Set before it is scheduled, and kept until it begins again."""
    template_digest: str | None = None
    """sha256 of the topology that is imported: it may not change between two tries."""
    container_id: str | None = None
    cml_lab_id: str | None = None
    access_url: str | None = None
    ports: list[PublishedPort] = Field(default_factory=list)
    attempt: int = 0
    """Places that it was given."""
    retry_count: int = 0
    """Times that it began again after something failed, since its spec last changed."""
    retry_at: Timestamp | None = None
    """While it backs off: when it is tried again."""
    held_up_since: Timestamp | None = None
    """While something that cannot be had, or does not answer, keeps it from going on: since when."""
    prepared_at: Timestamp | None = None
    provisioning_started_at: Timestamp | None = None
    """Of the present attempt; its deadline counts from here."""
    started_at: Timestamp | None = None
    """When it was first Running: its duration counts from here, also over a restart."""
    ends_at: Timestamp | None = None
    """When its time is over, as it was last attended to: what a change of the spec puts later is an extension."""
    ending_started_at: Timestamp | None = None
    """When its end began; the deadline for cleaning up counts from here."""
    completed_at: Timestamp | None = None
    exit_code: int | None = None
    oom_killed: bool | None = None
    error_message: str | None = None
    """What went wrong last, in a sentence; the reason for programs is in the conditions and in `failure`."""
    failure: Failure | None = None
    last_log: str | None = None
    """The last lines that the container wrote before it ended last: 20 and 2 KiB at most, printable. Its `log` answers
    with them once the container is gone."""


class LabInstanceRequest(Resource[LabInstanceRequestSpec, LabInstanceRequestStatus]):
    """See the module."""

    api_version: str = "lab.neuroglia.io/v1"
    kind: str = "LabInstanceRequest"
    spec: LabInstanceRequestSpec
    status: LabInstanceRequestStatus = Field(default_factory=LabInstanceRequestStatus)

    @property
    def phase(self) -> Phase | str:
        """The phase; a word that this version does not know stays a word."""
        try:
            return Phase(self.status.phase)
        except ValueError:
            return self.status.phase

    @property
    def outside_name(self) -> str:
        """The name of everything outside that is made for it: container, network, title of the lab."""
        return f"lrm-{self.uid}"

    @property
    def ends_at(self) -> datetime | None:
        """When its time is over; None before it ran. What begins early does not end early."""
        started, planned = self.status.started_at, self.spec.scheduled_start_time
        if started is None:
            return None
        return _shifted(max(started, planned or started), timedelta(minutes=self.spec.duration_minutes))

    def due_at(self, early: float) -> datetime | None:
        """From when on it may begin, `early` seconds ahead of its schedule; None when it has none."""
        planned = self.spec.scheduled_start_time
        return None if planned is None else _shifted(planned, -timedelta(seconds=early))


def _shifted(at: datetime, by: timedelta) -> datetime:
    """The sum, or the first or last moment that there is: what is stored may hold any time."""
    try:
        return at + by
    except OverflowError:
        return _LAST_MOMENT if by > timedelta(0) else _FIRST_MOMENT


def placed(request: LabInstanceRequest) -> bool:
    """Whether something of it may exist outside, so that it needs what is reserved for it: whatever its phase."""
    return request.status.worker_ref is not None


def over(request: LabInstanceRequest) -> bool:
    """Whether it is Completed or Failed."""
    return request.status.phase in FINAL


_FROZEN = (
    "labTemplate",
    "runtime",
    "labTrack",
    "pool",
    "studentEmail",
    "scheduledStartTime",
    "environment",
    "resources",
)


def validate(new: LabInstanceRequest, old: LabInstanceRequest | None) -> Iterator[Cause]:
    """What types cannot say: runtime and template belong together, and what is fixed once it has a place."""
    spec = new.spec
    if spec.runtime is not None and (spec.runtime == "Container") != (spec.lab_template.image is not None):
        what = "Container takes an image, CML a topology"
        yield Cause("spec.runtime", "FieldValueInvalid", what)
    if spec.runs_in == "Container" and (spec.pool or spec.lab_track):
        field = "spec.pool" if spec.pool else "spec.labTrack"
        yield Cause(field, "FieldValueInvalid", "a container runs on the engine, which has no track and no pool")
    planned, (first, last) = spec.scheduled_start_time, START_YEARS
    known = old is not None and planned == old.spec.scheduled_start_time
    if planned is not None and not known and not first <= planned.year <= last:
        yield Cause("spec.scheduledStartTime", "FieldValueInvalid", f"it must lie in the years {first} to {last}")
    if old is not None:
        yield from _fixed(spec, old)


def _fixed(spec: LabInstanceRequestSpec, old: LabInstanceRequest) -> Iterator[Cause]:
    """What may not change any more."""
    if old.status.phase == Phase.COMPLETED:
        if spec.wire() != old.spec.wire():
            yield Cause("spec", "FieldValueForbidden", "it is Completed: create another one")
        return
    if old.status.phase == Phase.FAILED or (old.status.started_at is None and old.status.phase == Phase.PENDING):
        return
    what = f"it is fixed: the lab is {old.status.phase}"
    before, after = old.spec.wire(), spec.wire()
    for name in _FROZEN:
        if before.get(name) != after.get(name):
            yield Cause(f"spec.{name}", "FieldValueForbidden", what)
    if old.status.phase in (Phase.STOPPING, Phase.TIMEOUT) and spec.duration_minutes != old.spec.duration_minutes:
        yield Cause("spec.durationMinutes", "FieldValueForbidden", "it is ending already: create another one")
    elif old.status.started_at is not None and spec.duration_minutes < old.spec.duration_minutes:
        yield Cause("spec.durationMinutes", "FieldValueForbidden", "it can be extended while it runs, not shortened")
    if old.spec.desired_phase == "Stopped" and spec.desired_phase != "Stopped":
        yield Cause("spec.desiredPhase", "FieldValueForbidden", "it is being stopped: create another one")


_ENDING = frozenset({Phase.STOPPING, Phase.TIMEOUT, Phase.COMPLETED})
_ON_ITS_WAY = frozenset({Reasons.PROVISIONING, Reasons.PREPARING, Reasons.RUNNING})


def _waiting_reason(request: LabInstanceRequest) -> str | None:
    """Why it has failed, has no place, or is not ready for another cause than that this takes a while."""
    status = request.status
    if status.failure is not None:
        return status.failure.reason
    assigned, ready = status.condition(Conditions.WORKER_ASSIGNED), status.condition(Conditions.READY)
    if status.phase not in _ENDING and assigned is not None and assigned.status == "False":
        return assigned.reason
    told = ready is not None and ready.status != "True" and ready.reason not in _ON_ITS_WAY
    return ready.reason if ready is not None and told else None


COLUMNS = (
    Column("Phase", lambda r: r.status.phase, description="Where it stands in its life."),
    Column("Student", lambda r: r.spec.student_email, description="For whom it is."),
    Column("Runtime", lambda r: r.spec.runs_in, description="Container or CML."),
    Column("Worker", lambda r: r.status.worker_ref.name if r.status.worker_ref else None, description="Where it is."),
    Column("Minutes", lambda r: r.spec.duration_minutes, type="integer", description="How long it may run."),
    Column("Ends", lambda r: r.ends_at if placed(r) else None, description="When its time is over."),
    Column("URL", lambda r: r.status.access_url, description="Where it is worked with."),
    Column("Reason", _waiting_reason, description="Why it waits, is not ready, failed or ended."),
    Column("Started", lambda r: r.status.started_at, description="When it began to run.", priority=1),
    Column("Retries", lambda r: r.status.retry_count, type="integer", priority=1),
)


LAB_INSTANCE_REQUEST: Kind[LabInstanceRequest] = Kind(
    model=LabInstanceRequest,
    plural="labinstancerequests",
    singular="labinstancerequest",
    short_names=("lir",),
    categories=("all", "lrm"),
    columns=COLUMNS,
    transitions=TRANSITIONS,
    initial_phase=Phase.PENDING.value,
    default_owner=INSTANCES,
    indexes={
        "phase": lambda r: (r.status.phase,),
        "student": lambda r: (r.spec.student_email.lower(),),
        "worker": lambda r: (
            (f"{r.status.worker_ref.namespace}/{r.status.worker_ref.name}",) if r.status.worker_ref else ()
        ),
        "uid": lambda r: (r.uid,),
        "lab": lambda r: (r.status.cml_lab_id,) if r.status.cml_lab_id else (),
    },
    fields={
        "status.phase": lambda r: r.status.phase,
        "spec.studentEmail": lambda r: r.spec.student_email,
        "spec.labTrack": lambda r: r.spec.lab_track,
        "status.workerRef.name": lambda r: r.status.worker_ref.name if r.status.worker_ref else "",
    },
    validate=validate,
)
