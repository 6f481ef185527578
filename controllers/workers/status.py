"""What is observed of a LabWorker: its instance, its CML, what it holds, and since when.

Pure data. Who may change which part is `LAB_WORKER.status_owners` of `controllers.workers.kind`.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from controllers.failure import Failure
from lrm.model import Model, Timestamp
from lrm.resource import Status


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
    owner_id: str | None = None
    """The number of the AWS account that has it."""
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


class LabsSync(Model):
    """What one sync of the worker's labs came to."""

    synced: int = 0
    """Labs that CML listed."""
    created: int = 0
    updated: int = 0
    removed: int = 0
    """Records that were written."""
    missing: int = 0
    """Records whose labs were not listed, and which wait for the lists that prove them gone."""


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
    """The values of the annotations that the last sync honoured: reconcile-now, and refresh-labs where there is one."""
    labs_tried: str | None = None
    """Those that the last sync which failed would have honoured."""
    labs_last_sync: LabsSync | None = None
    timestamps: Timestamps = Field(default_factory=Timestamps)
    idle: IdleStatus | None = None
    failure: Failure | None = None
