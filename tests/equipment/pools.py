"""Pools and workers as data, for tests of decisions: built from words, aged and loaded at will."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from controllers.pools.demand import Load, WorkerLoad
from controllers.pools.kind import LAB_WORKER_POOL, LabWorkerPool, LabWorkerPoolStatus
from controllers.pools.launches import LASTING
from controllers.workers.kind import WAKE_ANNOTATION, LabWorker
from controllers.workers.status import Problem

NOW = datetime(2026, 5, 6, 12, tzinfo=UTC)
"""A Wednesday."""
LONG_AGO = NOW - timedelta(days=1)
TEMPLATE = {"spec": {"region": "us-east-1", "aws": {"amiId": "ami-12345678"}}}


def a_pool(**spec: Any) -> LabWorkerPool:
    """A pool as a user posts it; `status` is set afterwards."""
    status = spec.pop("status", {})
    name = spec.pop("name", "p")
    wanted = {"labTrack": "ccna", "template": TEMPLATE, **spec}
    pool, _ = LAB_WORKER_POOL.parse({"metadata": {"name": name, "uid": "pool-1"}, "spec": wanted})
    pool.status = LabWorkerPoolStatus.model_validate({"phase": "Pending", **status})
    return pool


def a_worker(name: str, phase: str = "Ready", *, deleting: bool = False, **status: Any) -> LabWorker:
    """A worker of the pool; it became ready long ago, if ever."""
    state = {"Failed": "terminated", "Stopped": "stopped", "Pending": None}.get(phase, "running")
    wished = status.pop("wished", "Stopped" if phase in ("Stopped", "Stopping") else "Ready")
    ec2 = {"state": state, "instanceId": "i-0123456789abcdef0" if state else None}
    ready_at = LONG_AGO if phase in ("Ready", "Active", "ReadyUnlicensed") else None
    metadata = {
        "name": name,
        "uid": f"uid-{name}",
        "annotations": status.pop("annotations", {}),
        "creationTimestamp": LONG_AGO,
        "deletionTimestamp": NOW if deleting else None,
        "ownerReferences": [
            {"apiVersion": "lab.neuroglia.io/v1", "kind": "LabWorkerPool", "name": "p", "uid": "pool-1"}
        ],
    }
    told = {"phase": phase, "ec2": ec2, "timestamps": {"readyAt": ready_at}, **status}
    spec = {**TEMPLATE["spec"], "desiredPhase": wished}
    return LabWorker.model_validate({"metadata": metadata, "spec": spec, "status": told})


def asleep(name: str, **metadata: Any) -> LabWorker:
    """A worker that idleness has stopped."""
    worker = a_worker(name, "Stopped", wished="Ready", idle={"pausedAt": LONG_AGO, "wake": "before"}, **metadata)
    worker.spec.idle_detection.enabled = True
    return worker


def workers(*phases: str) -> list[LabWorker]:
    """w0, w1, …, one per phase; one in `Leaving` is being deleted, one in `Asleep` was stopped by idleness.

    One in a phase that is a reason of `LASTING` was never launched, for that reason.
    """
    made: list[LabWorker] = []
    for i, phase in enumerate(phases):
        if phase == "Asleep":
            made.append(asleep(f"w{i}", annotations={WAKE_ANNOTATION: "before"}))
        elif phase in LASTING:
            made.append(a_worker(f"w{i}", "Pending"))
            made[-1].status.ec2.last_error = Problem(reason=phase, message="so it is", at=LONG_AGO)
        else:
            leaving = phase == "Leaving"
            made.append(a_worker(f"w{i}", "TerminatingEC2" if leaving else phase, deleting=leaving))
    return made


def evenly(
    team: Iterable[LabWorker],
    *,
    cpu: float | None = None,
    memory: float | None = None,
    labs: int | None = None,
    hosts: bool = False,
    waiting: int = 0,
    expected: int = 0,
    slots: int = 20,
) -> Load:
    """The same load on every worker."""
    each = WorkerLoad(hosts=hosts, labs=labs, slots=slots, cpu=cpu, memory=memory)
    return Load({w.name: each for w in team}, waiting, expected)
