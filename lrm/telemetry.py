"""Measurements as OpenTelemetry instruments, served in Prometheus' text formats at /metrics.

What *happens* is counted on `Telemetry.meter`, whose sums last as long as the process. What *is* (a queue's depth, who
leads) is told by observers: at each scrape they write what they see for a reader that is made for this scrape. So
nothing is computed while nobody scrapes, and what belongs to an object that is gone is gone with it; a reader that
lasts would remember every label it ever saw. Registries belong to the object: two daemons in one process do not meet.
Observers are asked on the event loop, what they wrote is put into text in a thread: a fleet's takes half a second.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Literal, cast

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import Meter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.view import View
from opentelemetry.sdk.resources import Resource
from opentelemetry.util.types import Attributes
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric

from lrm.cache import Cache
from lrm.led import Led
from lrm.status import DaemonStatus
from storage.base import Health

Observer = Callable[[Meter], None]
"""Creates gauges and counters on the meter that it is given and sets each to what is so now; on the event loop.

An instrument takes as many sets of labels as there are objects to tell of; those of `Telemetry.meter` end at 2,000.
"""


class Telemetry:
    """See the module. Names are `lrm_…`; a unit (`s`, `By`) and `_total` are part of the name that is served."""

    def __init__(self, *, instance: str = "") -> None:
        resource = Resource({"service.name": "lrm", "service.version": version("lrm"), "service.instance.id": instance})
        self._happened = CollectorRegistry()
        lasting = PrometheusMetricReader(disable_target_info=True, scope_info_enabled=False, registry=self._happened)
        self.meter: Meter = MeterProvider([lasting], resource=resource, shutdown_on_exit=False).get_meter("lrm")
        """For counters and histograms of what happens; label values come from a small fixed set."""
        # What is told of the present is bounded by what exists, and kept for one scrape: no label is one too many.
        everything = View(instrument_name="*", aggregation_cardinality_limit=sys.maxsize)
        self._present = MeterProvider(resource=resource, shutdown_on_exit=False, views=[everything])
        self._observers: list[Observer] = []
        self._rendering = threading.Lock()

    def observe(self, observer: Observer) -> None:
        """Ask `observer` at each scrape; what it raises fails the scrape."""
        self._observers.append(observer)

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """All measurements as they are now, and their content type; OpenMetrics where `accept` asks for it."""
        return self.look(accept)()

    def look(self, accept: str = "") -> Callable[[], tuple[bytes, str]]:
        """Take down all measurements now; what is returned makes the exposition of them, in whatever thread."""
        notebook = _Notebook()
        for observer in self._observers:
            observer(cast("Meter", notebook))
        return lambda: self._render(notebook, accept)

    def _render(self, notebook: _Notebook, accept: str) -> tuple[bytes, str]:
        encode, content_type = choose_encoder(accept)
        registry = CollectorRegistry()
        reader = PrometheusMetricReader(scope_info_enabled=False, registry=registry)
        with self._rendering:  # every reader of the provider hears what is set meanwhile
            self._present.add_metric_reader(reader)
            try:
                notebook.read_to(self._present.get_meter("lrm"))
                return encode(_Together(self._happened, registry)), content_type
            finally:
                self._present.remove_metric_reader(reader)


@dataclass(slots=True)
class _Notes:
    """What was set on one instrument."""

    kind: Literal["gauge", "counter"]
    name: str
    unit: str
    description: str
    values: list[tuple[float, Attributes]] = field(default_factory=list)

    def set(self, value: float, attributes: Attributes = None) -> None:
        self.values.append((value, attributes))

    def add(self, value: float, attributes: Attributes = None) -> None:
        self.values.append((value, attributes))


class _Notebook:
    """Stands in for a meter while observers write: takes down what they set, at a hundredth of the price."""

    def __init__(self) -> None:
        self._notes: list[_Notes] = []

    def create_gauge(self, name: str, unit: str = "", description: str = "") -> _Notes:
        return self._take("gauge", name, unit, description)

    def create_counter(self, name: str, unit: str = "", description: str = "") -> _Notes:
        return self._take("counter", name, unit, description)

    def _take(self, kind: Literal["gauge", "counter"], name: str, unit: str, description: str) -> _Notes:
        notes = _Notes(kind, name, unit, description)
        self._notes.append(notes)
        return notes

    def read_to(self, meter: Meter) -> None:
        """Set on a real meter what was taken down."""
        for notes in self._notes:
            if notes.kind == "gauge":
                write = meter.create_gauge(notes.name, notes.unit, notes.description).set
            else:
                write = meter.create_counter(notes.name, notes.unit, notes.description).add
            for value, attributes in notes.values:
                write(value, attributes)


class _Together(CollectorRegistry):
    """Several registries as one."""

    def __init__(self, *registries: CollectorRegistry) -> None:
        super().__init__()
        self._registries = registries

    def collect(self) -> Iterable[Metric]:
        for registry in self._registries:
            yield from registry.collect()


def observe_daemon(
    telemetry: Telemetry,
    status: DaemonStatus,
    *,
    cache: Cache,
    store: Callable[[], Health | None],
    lags: Callable[[], Mapping[str, int]],
) -> None:
    """Serve a daemon's own measurements.

    `store` is the last that was heard of the store (None: nothing yet), `lags` the revisions that each watcher's
    bookmark is behind.
    """
    telemetry.observe(lambda meter: _leadership(meter, status))
    telemetry.observe(lambda meter: _work(meter, status.led))
    telemetry.observe(lambda meter: _cache(meter, cache))
    telemetry.observe(lambda meter: _store(meter, store()))
    telemetry.observe(lambda meter: _bookmarks(meter, lags()))


def _leadership(meter: Meter, status: DaemonStatus) -> None:
    absent = meter.create_gauge(
        "lrm_leader_absent", "s", "Time for which a lock has had no leader, as this daemon sees it; 0 while it has one."
    )
    leader = meter.create_gauge("lrm_leader", description="1 where this daemon leads the lock.")
    elections = meter.create_counter("lrm_elections", description="Terms that this daemon has begun.")
    for lock in status.leaders.locks:
        absent.set(status.leaders.absent_seconds(lock), {"lock": lock})
    for lock, election in status.elections.items():
        leader.set(int(election.is_leader), {"lock": lock})
        elections.add(election.terms, {"lock": lock})


_DEPTHS = (
    ("queued", "lrm_queue_depth", "", "Keys that wait to be reconciled now."),
    ("delayed", "lrm_queue_delayed", "", "Keys that are due later."),
    ("processing", "lrm_queue_processing", "", "Keys in hand."),
    ("oldestQueuedSeconds", "lrm_queue_oldest", "s", "For how long the first key in the queue has waited."),
    ("longestRunningSeconds", "lrm_reconcile_longest_running", "s", "Age of the oldest reconcile in hand."),
)
_COUNTS = (
    ("reconciles", "lrm_reconciles", "", "Reconciles begun."),
    ("failures", "lrm_reconcile_failures", "", "Reconciles that failed and are tried again."),
    ("terminal", "lrm_reconcile_terminal_errors", "", "Reconciles that failed for good."),
    ("finalized", "lrm_finalized", "", "Finalizers done."),
    ("secondsTotal", "lrm_reconcile", "s", "Time spent in reconciles."),
    ("compactions", "lrm_compactions", "", "Compactions of the store by this daemon."),
)


def _work(meter: Meter, led: Iterable[Led]) -> None:
    """What is led tells only what it has: a compactor has no queue."""
    depths = {key: meter.create_gauge(name, unit, text) for key, name, unit, text in _DEPTHS}
    counts = {key: meter.create_counter(name, unit, text) for key, name, unit, text in _COUNTS}
    for described in (one.describe() for one in led):
        labels = {"controller": described["name"]}
        for key in depths.keys() & described.keys():
            depths[key].set(described[key], labels)
        for key in counts.keys() & described.keys():
            counts[key].add(described[key], labels)


def _cache(meter: Meter, cache: Cache) -> None:
    meter.create_gauge("lrm_cache_revision", description="Store revision that the cache holds.").set(cache.revision)
    meter.create_gauge("lrm_cache_following", description="1 while the cache follows the store.").set(
        int(not cache.error)
    )
    meter.create_gauge("lrm_objects_undecodable", description="Stored objects that cannot be decoded.").set(
        cache.undecodable
    )
    objects = meter.create_gauge("lrm_objects", description="Objects in the cache.")
    for plural, count in cache.counts().items():
        objects.set(count, {"kind": plural})


def _store(meter: Meter, health: Health | None) -> None:
    meter.create_gauge("lrm_store_up", description="1 when the store last answered a linearizable read.").set(
        int(health is not None and health.ok)
    )
    if health is None:
        return
    size = meter.create_gauge("lrm_store_size", "By", "Size of a member's database file; etcd holds it to the quota.")
    in_use = meter.create_gauge("lrm_store_size_in_use", "By", "The part of it that holds data.")
    quota = meter.create_gauge("lrm_store_quota", "By", "Size at which etcd refuses writes.")
    alarm = meter.create_gauge("lrm_store_alarm", description="1 for each alarm that a member has raised.")
    for member in health.members:
        labels = {"member": member.endpoint}
        for name in member.alarms:
            alarm.set(1, {**labels, "alarm": name})
        if member.db_size:
            size.set(member.db_size, labels)
            in_use.set(member.db_size_in_use, labels)
            quota.set(member.quota, labels)


def _bookmarks(meter: Meter, lags: Mapping[str, int]) -> None:
    lag = meter.create_gauge("lrm_bookmark_lag", description="Revisions between a watcher's bookmark and the store.")
    for watcher, revisions in lags.items():
        lag.set(revisions, {"watcher": watcher})
