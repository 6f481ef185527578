"""From what the sources told, to what is known of a worker, to whether that is worth a write: pure.

A source tells its values, or a `Trouble` (with what it told all the same), or nothing new (None). One that is in
trouble keeps its last values for three refresh intervals; then they are unknown, never 0. Processor and memory are
CloudWatch's where it has them, else CML's own: EC2 sees the whole machine, CML is asked all the same. Only a change
that matters is written; times alone never are. Called by the refresh.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from controllers.metrics.settings import MetricsSettings
from controllers.workers.decisions import problem
from controllers.workers.status import (
    CloudWatchMeasured,
    CmlMeasured,
    Ec2Measured,
    LabWorkerStatus,
    Measured,
    Utilization,
    WorkerMetrics,
)

_KEPT_INTERVALS = 3

M = TypeVar("M", bound=Measured)


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a source did not tell all, at `at`; `told` is what it did tell, by field."""

    reason: str
    message: str
    at: datetime
    told: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Told:
    """What the sources told of one worker; None: not asked, or not an observation."""

    ec2: Ec2Measured | Trouble | None = None
    cloud_watch: CloudWatchMeasured | Trouble | None = None
    cml: CmlMeasured | Trouble | None = None
    asked: str | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of one worker; both None where there is no machine."""

    utilization: Utilization | None = None
    metrics: WorkerMetrics | None = None


NOTHING = Known()


def stored(status: LabWorkerStatus) -> Known:
    """What a status says."""
    return Known(status.utilization, status.metrics)


def learned(known: Known, told: Told, settings: MetricsSettings) -> Known:
    """What is known after this refresh."""
    old, keep = known.metrics or WorkerMetrics(), settings.metrics_refresh_interval * _KEPT_INTERVALS
    metrics = WorkerMetrics(
        ec2=_after(old.ec2, told.ec2, keep),
        cloud_watch=_after(old.cloud_watch, told.cloud_watch, keep),
        cml=_after(old.cml, told.cml, keep),
        asked=told.asked,
    )
    cpu = _first(metrics.cloud_watch.cpu_percent, metrics.cml.cpu_percent)
    memory = _first(metrics.cloud_watch.memory_percent, metrics.cml.memory_percent)
    some = cpu is not None or memory is not None
    return Known(Utilization(cpu_percent=cpu, memory_percent=memory) if some else None, metrics)


def worth_writing(old: Known, new: Known, settings: MetricsSettings) -> bool:
    """Whether something that matters differs."""
    before, after = old.utilization or Utilization(), new.utilization or Utilization()
    return (
        _moved(before.cpu_percent, after.cpu_percent, settings.metrics_cpu_change)
        or _moved(before.memory_percent, after.memory_percent, settings.metrics_memory_change)
        or _essence(old.metrics) != _essence(new.metrics)
    )


def _after(old: M, told: M | Trouble | None, keep: float) -> M:
    if told is None:
        return old
    if not isinstance(told, Trouble):
        return told
    error = problem(_same_reason(old, told), told.reason, told.message, told.at)
    lost = (told.at - error.at).total_seconds() >= keep
    values = {} if lost else {name: getattr(old, name) for name in type(old).model_fields}
    return type(old)(**{**values, **told.told, "at": old.at, "error": error})


def _same_reason(old: Measured, told: Trouble) -> Any:
    """The problem that is known already; words that change with each try (seconds, ids) make no new one."""
    if old.error is None or old.error.reason != told.reason:
        return None
    return old.error.model_copy(update={"message": told.message})


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _moved(before: float | None, after: float | None, change: float) -> bool:
    if before is None or after is None:
        return before is not after
    return abs(after - before) >= change and after != before


def _essence(metrics: WorkerMetrics | None) -> Any:
    """What every change of is written."""
    if metrics is None:
        return None
    ec2, cml = metrics.ec2, metrics.cml
    return (
        (ec2.state, ec2.checks, ec2.started_at),
        (cml.version, cml.ready, cml.healthy, cml.licensed),
        [source.error and source.error.reason for source in (ec2, metrics.cloud_watch, cml)],
        metrics.asked,
    )
