"""The LabWorkerPool: how many workers of a lab track there are to be, and what they look like.

Pure data and the rules that a pool must keep. `spec.replicas` is what `kubectl scale` sets: with the policy None it is
the size of the pool, with every other policy a size below which it never falls; without it that is `minWorkers`.
Everything in the status belongs to the pools' controller.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import datetime
from typing import Literal

import orjson
from pydantic import Field

from controllers.pools.hours import Window, local_time, zone_causes
from controllers.workers.kind import DRAIN_ANNOTATION, LAB_WORKER, LabWorker
from controllers.workers.phases import Phase
from controllers.workers.spec import LabWorkerSpec
from lrm.errors import Cause
from lrm.kind import Column, Kind, Scale, metadata_causes
from lrm.model import Model, Timestamp
from lrm.resource import ObjectMeta, Resource, Status

POOLS = "pools"
"""The controller, its lock, and the owner of the status."""
POOL_FINALIZER = "lab.neuroglia.io/pool"
POOL_LABEL = "lab.neuroglia.io/pool"
"""On every worker of a pool: the pool's name. Which pool it belongs to, its owner reference says."""
TEMPLATE_ANNOTATION = "lab.neuroglia.io/pool-template"
"""On every worker of a pool: the hash of the template that it was made from."""

HISTORY_LENGTH = 50
"""Scaling decisions that a status keeps."""
NAMES_TOLD = 20
"""Names that a decision tells of each sort; a thousand of them fifty times over would be more than an object may be."""
WORKERS_MOST = 1000
"""Workers that a pool may be asked to have."""
LONGEST_LEAD = 60 * 60
"""Seconds before a window at which its workers are begun at the earliest; from then on those that are there stay."""

PENDING, SCALING, READY, DEGRADED, DELETING = "Pending", "Scaling", "Ready", "Degraded", "Deleting"


class TemplateMetadata(Model):
    """What each worker gets beside its name."""

    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class WorkerTemplate(Model):
    """A worker of the pool; its labTrack is the pool's."""

    metadata: TemplateMetadata = Field(default_factory=TemplateMetadata)
    spec: LabWorkerSpec


class Thresholds(Model):
    """When load changes the size: averages over all serving workers; shares are 0 to 1."""

    cpu_up: float = Field(0.75, gt=0, le=1)
    cpu_down: float = Field(0.30, ge=0, le=1)
    memory_up: float = Field(0.80, gt=0, le=1)
    memory_down: float = Field(0.40, ge=0, le=1)
    labs_up: float = Field(15, gt=0, le=10000)
    labs_down: float = Field(3, ge=0, le=10000)


class Cooldowns(Model):
    """How long load is not heeded after a change that it caused, for what it measures follows late."""

    up_minutes: int = Field(10, ge=0, le=7 * 24 * 60)
    """Since the last growth."""
    down_minutes: int = Field(20, ge=0, le=7 * 24 * 60)
    """Since the last change in either direction."""


class AllowedHours(Model):
    """When load may change the size; without a window, always."""

    scale_up: Window | None = None
    scale_down: Window | None = None


class ScheduledSize(Window):
    """A window in which the pool has at least so many workers, ready at its beginning."""

    workers: int = Field(ge=0, le=WORKERS_MOST)


class ReplaceFailed(Model):
    """Failed workers are replaced and removed, so many an hour at most: what fails for all fails again."""

    enabled: bool = True
    max_per_hour: int = Field(3, ge=1, le=HISTORY_LENGTH)


Policy = Literal["None", "CapacityBased", "LabCountBased", "Scheduled", "Hybrid"]


class LabWorkerPoolSpec(Model):
    """What is wanted."""

    lab_track: str = Field(min_length=1, max_length=63)
    template: WorkerTemplate
    min_workers: int = Field(1, ge=0, le=WORKERS_MOST)
    max_workers: int = Field(10, ge=0, le=WORKERS_MOST)
    replicas: int | None = Field(None, ge=0, le=WORKERS_MOST)
    policy: Policy = "None"
    thresholds: Thresholds = Field(default_factory=Thresholds)
    cooldowns: Cooldowns = Field(default_factory=Cooldowns)
    time_zone: str = Field("UTC", min_length=1, max_length=64)
    """Of the hours below, as the IANA names it."""
    allowed_hours: AllowedHours = Field(default_factory=AllowedHours)
    schedule: list[ScheduledSize] = Field(default_factory=list, max_length=50)
    """For the policies Scheduled and Hybrid."""
    replace_failed: ReplaceFailed = Field(default_factory=ReplaceFailed)

    @property
    def heeds_load(self) -> bool:
        """Whether load may change the size."""
        return self.policy not in ("None", "Scheduled")

    @property
    def wished(self) -> int:
        """What a person asks for: `replicas`, else `minWorkers`; within the bounds as they are now."""
        asked = self.min_workers if self.replicas is None else self.replicas
        return min(max(asked, self.min_workers), self.max_workers)

    def may_grow(self, now: datetime) -> bool:
        """Whether load may make the pool larger at that time of the week. Raises `UnknownTimeZone`."""
        return self._allows(self.allowed_hours.scale_up, now)

    def may_shrink(self, now: datetime) -> bool:
        """The same of smaller."""
        return self._allows(self.allowed_hours.scale_down, now)

    def _allows(self, window: Window | None, now: datetime) -> bool:
        return window is None or window.holds(local_time(now, self.time_zone))


class ScalingDecision(Model):
    """One change of a pool's size, and why."""

    at: Timestamp
    generation: int = 0
    """Of the pool's spec that it was made for."""
    direction: Literal["Up", "Down", "Replace", "Wake"]
    reason: str
    message: str = ""
    source: int = Field(alias="from")
    """Workers before it: those that have not failed and are not leaving."""
    to: int
    created: list[str] = Field(default_factory=list)
    """The first twenty, as of those below."""
    removed: list[str] = Field(default_factory=list)
    woken: list[str] = Field(default_factory=list)
    replaced: int = 0
    """How many of the created stand for failed ones."""


class LabWorkerPoolStatus(Status):
    """What is observed, and what is being done."""

    replicas: int = 0
    """Workers that are not leaving, failed ones too."""
    ready_replicas: int = 0
    """Those that serve."""
    starting_replicas: int = 0
    failed_replicas: int = 0
    leaving_replicas: int = 0
    """Workers that are being deleted."""
    paused_replicas: int = 0
    """Workers that idleness has stopped."""
    outdated_replicas: int = 0
    """Workers made from a template that has changed since; they stay as they are."""
    selector: str = ""
    planned_names: list[str] = Field(default_factory=list)
    """Names of workers that the last decision creates, written before the first of them is."""
    removing: list[str] = Field(default_factory=list)
    """Names of workers that the last decision removes, until their deletion was asked for."""
    waking: list[str] = Field(default_factory=list)
    """Names of workers that the last decision wakes from idleness, until they were told."""
    last_scale_up_at: Timestamp | None = None
    last_scale_down_at: Timestamp | None = None
    last_decision: ScalingDecision | None = None
    scaling_history: list[ScalingDecision] = Field(default_factory=list)
    seconds_to_ready: int | None = None
    """The slowest first start among the workers, launch to ready; so much earlier begins what a known time needs."""

    def decided(self, decision: ScalingDecision) -> None:
        """Remember a decision."""
        self.last_decision = decision
        self.scaling_history = [*self.scaling_history, decision][-HISTORY_LENGTH:]


class LabWorkerPool(Resource[LabWorkerPoolSpec, LabWorkerPoolStatus]):
    """Workers of one lab track, as many as its policy says."""

    api_version: str = "lab.neuroglia.io/v1"
    kind: str = "LabWorkerPool"
    spec: LabWorkerPoolSpec
    status: LabWorkerPoolStatus = Field(default_factory=LabWorkerPoolStatus)


def selector_of(pool: LabWorkerPool) -> str:
    """The label selector that finds the pool's workers."""
    return f"{POOL_LABEL}={pool.name}"


def template_hash(pool: LabWorkerPool) -> str:
    """Changes when new workers are to differ from those made before; a field that a later version adds does not."""
    template = pool.spec.template.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    raw = orjson.dumps([pool.spec.lab_track, template], option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(raw).hexdigest()[:16]


def new_worker(pool: LabWorkerPool, name: str, *, drains: str) -> LabWorker:
    """A worker from the template, the pool's own; `drains` is an annotation's name, set unless the template sets it."""
    template = pool.spec.template.thaw()
    template.spec.lab_track = pool.spec.lab_track
    metadata = ObjectMeta(
        name=name,
        namespace=pool.namespace,
        labels={**template.metadata.labels, POOL_LABEL: pool.name},
        annotations={drains: "true", **template.metadata.annotations, TEMPLATE_ANNOTATION: template_hash(pool)},
        owner_references=[pool.as_owner()],
    )
    return LabWorker(metadata=metadata, spec=template.spec)


def validate(new: LabWorkerPool, old: LabWorkerPool | None) -> Iterator[Cause]:
    """What types cannot say."""
    spec, thresholds = new.spec, new.spec.thresholds
    if spec.max_workers < spec.min_workers:
        yield Cause("spec.maxWorkers", "FieldValueInvalid", "must not be less than minWorkers")
    elif spec.replicas is not None and not spec.min_workers <= spec.replicas <= spec.max_workers:
        message = f"must be from minWorkers ({spec.min_workers}) to maxWorkers ({spec.max_workers})"
        yield Cause("spec.replicas", "FieldValueInvalid", message)
    for name in ("cpu", "memory", "labs"):
        if getattr(thresholds, f"{name}_down") >= getattr(thresholds, f"{name}_up"):
            yield Cause(f"spec.thresholds.{name}Down", "FieldValueInvalid", f"must be less than {name}Up")
    if old is None or old.spec.time_zone != spec.time_zone:  # a machine that lacks the zone can still let the pool go
        yield from zone_causes(spec.time_zone, "spec.timeZone")
    for i, window in enumerate(spec.schedule):
        if window.workers > spec.max_workers:
            message = f"must not be more than maxWorkers ({spec.max_workers})"
            yield Cause(f"spec.schedule[{i}].workers", "FieldValueInvalid", message)
    # One that is stored already must not stand in the way of other changes.
    if old is None or (old.spec.lab_track, old.spec.template) != (spec.lab_track, spec.template):
        yield from _template_causes(new)


def _template_causes(pool: LabWorkerPool) -> Iterator[Cause]:
    """A template must make workers that the pool may end again, each an instance of its own."""
    spec, path = pool.spec.template.spec, "spec.template.spec"
    if spec.lab_track not in ("", pool.spec.lab_track):
        yield Cause(f"{path}.labTrack", "FieldValueInvalid", f"must be the pool's ({pool.spec.lab_track}) or left out")
    if spec.adopts:
        yield Cause(f"{path}.aws.instanceId", "FieldValueForbidden", "a pool launches its instances")
    if spec.desired_phase != "Ready":
        yield Cause(f"{path}.desiredPhase", "FieldValueInvalid", "must be Ready")
    if spec.observe_only:
        yield Cause(f"{path}.observeOnly", "FieldValueForbidden", "a pool launches and ends its instances")
    if spec.deletion_policy == "Retain":
        yield Cause(f"{path}.deletionPolicy", "FieldValueForbidden", "a pool's instances end with their workers")
    trial = new_worker(pool, "x", drains=DRAIN_ANNOTATION)
    for cause in metadata_causes(trial.metadata, LAB_WORKER.max_name):
        yield Cause(f"spec.template.{cause.field}", cause.reason, cause.message)
    for cause in () if spec.adopts else LAB_WORKER.validate(trial, None):
        yield Cause(f"spec.template.{cause.field}", cause.reason, cause.message)


def _wish(pool: LabWorkerPool, replicas: int) -> None:
    pool.spec.replicas = replicas


def _ready(pool: LabWorkerPool) -> str | None:
    condition = pool.status.condition("Ready")
    return condition.status if condition else None


def _last_decision(pool: LabWorkerPool) -> str | None:
    last = pool.status.last_decision
    return f"{last.direction} {last.source}→{last.to}: {last.reason}" if last else None


LAB_WORKER_POOL: Kind[LabWorkerPool] = Kind(
    model=LabWorkerPool,
    plural="labworkerpools",
    singular="labworkerpool",
    short_names=("lwp",),
    categories=("all", "lrm"),
    max_name=63,
    columns=(
        Column("Phase", lambda p: p.status.phase, description="Where the pool stands."),
        Column("Ready", _ready, description="Whether as many workers serve as a person asks for."),
        Column("Track", lambda p: p.spec.lab_track, description="The lab track it serves."),
        Column("Policy", lambda p: p.spec.policy, description="What its size follows."),
        Column("Min", lambda p: p.spec.min_workers, type="integer"),
        Column("Max", lambda p: p.spec.max_workers, type="integer"),
        Column("Workers", lambda p: p.status.replicas, type="integer", description="Workers that are not leaving."),
        Column("Serving", lambda p: p.status.ready_replicas, type="integer", description="Workers that serve."),
        Column("Starting", lambda p: p.status.starting_replicas, type="integer", priority=1),
        Column("Failed", lambda p: p.status.failed_replicas, type="integer", priority=1),
        Column("Outdated", lambda p: p.status.outdated_replicas, type="integer", priority=1),
        Column("LastDecision", _last_decision, description="The last change of its size.", priority=1),
    ),
    initial_phase=PENDING,
    transitions={
        PENDING: frozenset({SCALING, READY, DEGRADED, DELETING}),
        SCALING: frozenset({READY, DEGRADED, DELETING}),
        READY: frozenset({SCALING, DEGRADED, DELETING}),
        DEGRADED: frozenset({SCALING, READY, DELETING}),
        DELETING: frozenset(),
    },
    default_owner=POOLS,
    indexes={"track": lambda p: (p.spec.lab_track,)},
    fields={
        "status.phase": lambda p: p.status.phase,
        "spec.labTrack": lambda p: p.spec.lab_track,
        "spec.policy": lambda p: p.spec.policy,
    },
    validate=validate,
    scale=Scale(
        wished=lambda p: p.spec.wished,
        wish=_wish,
        actual=lambda p: p.status.replicas,
        selector=selector_of,
    ),
)


def seconds_to_ready(worker: LabWorker) -> int | None:
    """How long the worker's first start took, from its launch, while its history still tells; `LONGEST_LEAD` at most.

    What it waited before for people, a quota or a brake says nothing of the next one, nor does a start that failed.
    """
    history = worker.status.phase_history
    if not history or history[0].source != LAB_WORKER.initial_phase:
        return None
    launched: datetime | None = None
    for step in history:
        if step.to == Phase.PROVISIONING_EC2:
            launched = step.at
        elif step.to == Phase.FAILED:
            launched = None
        elif step.to in _FIRST_SERVING:
            return None if launched is None else min(round((step.at - launched).total_seconds()), LONGEST_LEAD)
    return None


_FIRST_SERVING = (Phase.READY, Phase.READY_UNLICENSED)
