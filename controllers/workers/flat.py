"""A worker in the flat form in which course tools read it: one object, its fields in snake_case, without secrets."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field

from controllers.workers.decisions import is_paused
from controllers.workers.kind import LabWorker
from controllers.workers.phases import Conditions
from controllers.workers.status import Problem
from lrm.model import Timestamp, rfc3339


class FlatWorker(BaseModel):
    """A worker; what is not known is null."""

    name: str
    namespace: str
    uid: str
    resource_version: str
    created_at: Timestamp | None
    region: str
    account: str
    lab_track: str
    desired_phase: str
    phase: str = Field(description="As in the resource: Pending, Starting, Ready, ReadyUnlicensed, Active, …")
    ready: bool = Field(description="Labs can run on it now.")
    accepting_labs: bool = Field(description="New labs are placed on it.")
    idle: bool = Field(description="It is stopped, or about to be, because nobody used it.")
    instance_id: str | None
    instance_state: str | None = Field(description="EC2's word.")
    public_ip: str | None
    private_ip: str | None
    api_url: str | None
    cml_version: str | None
    licensed: bool
    labs_count: int | None = Field(description="Labs on it at the last sync.")
    lab_instances_count: int = Field(description="Lab instances that are placed on it.")
    cpu_percent: float | None
    memory_percent: float | None
    measured_at: Timestamp | None = Field(description="When a source of its metrics last answered.")
    labs_synced_at: Timestamp | None
    labs_sync_error: str | None
    license_error: str | None = Field(description="Why it could not be licensed.")
    last_error: str | None = Field(description="Why it failed, or what is wrong with its CML or its instance now.")


def flat_of(worker: LabWorker) -> dict[str, Any]:
    """A `FlatWorker`."""
    meta, spec, status = worker.metadata, worker.spec, worker.status
    ec2, cml, use = status.ec2, status.cml, status.utilization
    registration = cml.registration
    return {
        "name": meta.name,
        "namespace": meta.namespace,
        "uid": meta.uid,
        "resource_version": meta.resource_version,
        "created_at": _time(meta.creation_timestamp),
        "region": spec.region,
        "account": spec.account,
        "lab_track": spec.lab_track,
        "desired_phase": spec.desired_phase,
        "phase": status.phase,
        "ready": _is_true(worker, Conditions.READY),
        "accepting_labs": _is_true(worker, Conditions.ACCEPTING_LABS),
        "idle": is_paused(worker),
        "instance_id": ec2.instance_id,
        "instance_state": ec2.state,
        "public_ip": ec2.public_ip,
        "private_ip": ec2.private_ip,
        "api_url": cml.api_url,
        "cml_version": cml.version,
        "licensed": cml.licensed,
        "labs_count": status.labs_count,
        "lab_instances_count": len(status.allocations),
        "cpu_percent": use.cpu_percent if use is not None else None,
        "memory_percent": use.memory_percent if use is not None else None,
        "measured_at": _time(_measured_at(worker)),
        "labs_synced_at": _time(status.labs_synced_at),
        "labs_sync_error": status.labs_sync_error,
        "license_error": _told(registration.failed) if registration is not None else None,
        "last_error": trouble_of(worker),
    }


def trouble_of(worker: LabWorker) -> str | None:
    """Why it failed, or what is wrong with its CML or its instance now."""
    status = worker.status
    if status.failure is not None:
        return f"{status.failure.reason}: {status.failure.message}"
    return _told(status.cml.last_error or status.ec2.last_error)


def _measured_at(worker: LabWorker) -> datetime | None:
    metrics = worker.status.metrics
    sources = (metrics.ec2, metrics.cloud_watch, metrics.cml) if metrics is not None else ()
    return max((source.at for source in sources if source.at is not None), default=None)


def _is_true(worker: LabWorker, kind: str) -> bool:
    condition = worker.status.condition(kind)
    return condition is not None and condition.status == "True"


def _told(problem: Problem | None) -> str | None:
    return f"{problem.reason}: {problem.message}" if problem is not None else None


def _time(value: datetime | None) -> str | None:
    return rfc3339(value) if value is not None else None
