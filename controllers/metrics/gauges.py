"""The fleet as OpenTelemetry gauges `cml.worker.*`: exact values, of workers that exist, told by whoever leads.

Served at /metrics as `cml_worker_…`, with worker_id (the uid), region, account, namespace and name. Nothing is
kept for them: a worker that is gone has none at the next scrape, and what is unknown is absent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime

from opentelemetry.metrics import Meter

from controllers.metrics.measured import NOTHING, Known
from controllers.workers.kind import LabWorker
from controllers.workers.status import Utilization, WorkerMetrics

_Value = Callable[[LabWorker, Utilization, WorkerMetrics, datetime], float | None]

_GAUGES: tuple[tuple[str, str, _Value], ...] = (
    ("cpu_utilization", "Use of the processor, percent.", lambda _w, u, _m, _n: u.cpu_percent),
    ("memory_utilization", "Use of the memory, percent.", lambda _w, u, _m, _n: u.memory_percent),
    ("disk_utilization", "Use of the disk as CML tells it, percent.", lambda _w, _u, m, _n: m.cml.disk_percent),
    ("labs_count", "Labs at the last sync.", lambda w, _u, _m, _n: w.status.labs_count),
    ("running_nodes", "Nodes that run in labs.", lambda _w, _u, m, _n: m.cml.running_nodes),
    ("uptime_seconds", "Since EC2 started the instance.", lambda _w, _u, m, now: _since(m.ec2.started_at, now)),
    ("ready", "1 when CML can start nodes, 0 when not.", lambda _w, _u, m, _n: m.cml.ready),
    ("healthy", "1 when CML calls itself healthy, 0 when not.", lambda _w, _u, m, _n: m.cml.healthy),
    ("licensed", "1 when CML is licensed, 0 when not.", lambda _w, _u, m, _n: m.cml.licensed),
    ("ec2_age_seconds", "Since EC2 last told of it.", lambda _w, _u, m, now: _since(m.ec2.at, now)),
    ("cloudwatch_age_seconds", "Since CloudWatch did.", lambda _w, _u, m, now: _since(m.cloud_watch.at, now)),
    ("cml_age_seconds", "Since its CML did.", lambda _w, _u, m, now: _since(m.cml.at, now)),
)


def observe(meter: Meter, workers: Iterable[LabWorker], known: Callable[[str], Known | None], now: datetime) -> None:
    """Tell all workers; `known` is what was measured of a uid."""
    status = meter.create_gauge("cml.worker.status", description="1 for the phase that the worker is in.")
    info = meter.create_gauge("cml.worker.info", description="1, with what the worker is.")
    gauges = [(meter.create_gauge(f"cml.worker.{name}", description=text), value) for name, text, value in _GAUGES]
    for worker in workers:
        labels = {
            "worker_id": worker.uid,
            "region": worker.spec.region,
            "account": worker.spec.account,
            "namespace": worker.namespace,
            "name": worker.name,
        }
        found = known(worker.uid) or NOTHING
        utilization, metrics = found.utilization or Utilization(), found.metrics or WorkerMetrics()
        status.set(1, {**labels, "status": worker.status.phase})
        info.set(1, labels | _what(worker, metrics))
        for gauge, value in gauges:
            number = value(worker, utilization, metrics, now)
            if number is not None:
                gauge.set(number, labels)


def _what(worker: LabWorker, metrics: WorkerMetrics) -> dict[str, str]:
    return {
        "instance_id": worker.status.ec2.instance_id or "",
        "instance_type": worker.spec.aws.instance_type,
        "lab_track": worker.spec.lab_track,
        "cml_version": metrics.cml.version or worker.status.cml.version or "",
        "ec2_state": metrics.ec2.state or worker.status.ec2.state or "",
    }


def _since(moment: datetime | None, now: datetime) -> float | None:
    return None if moment is None else max((now - moment).total_seconds(), 0.0)
