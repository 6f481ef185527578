"""The fleet's metrics: all workers every few minutes, in batches; one at once when somebody asks for it.

Whoever leads the lock `metrics` refreshes all workers that have an instance, and on demand those that got a new value
of the annotation `reconcile-now`, began or ceased to serve, or have another machine or theirs in another state: the
first of a place at once, all of it that ask within `metrics_on_demand_interval` together, and none waits for another
place. A refresh changes nothing outside. It ends with the term, whose exact values are forgotten: the next leader
refreshes first of all.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import structlog
from opentelemetry.metrics import Meter

from controllers.aws.place import Place
from controllers.metrics import gauges
from controllers.metrics.refresh import Refresher, has_instance
from controllers.metrics.settings import MetricsSettings
from controllers.metrics.sources import Sources
from controllers.workers.kind import METRICS, LabWorker
from controllers.workers.phases import CML_RUNNING
from lrm.cache import Cache, CacheUpdate
from lrm.client import Client
from lrm.controller import Key
from lrm.election import Term
from lrm.errors import NotLeading
from lrm.model import rfc3339
from lrm.resource import RECONCILE_ANNOTATION
from storage.clock import Clock

log = structlog.get_logger(__name__)

_SPREAD = 0.1
_GATHER = 0.1
"""Seconds to wait for others who ask at the same moment."""


class FleetMetrics:
    """A `Led`; see the module."""

    name = METRICS
    lock_name = METRICS

    def __init__(self, sources: Sources, client: Client, cache: Cache, clock: Clock, settings: MetricsSettings) -> None:
        self._refresher = Refresher(sources, client, cache, clock, settings)
        self._cache = cache
        self._clock = clock
        self._settings = settings
        self._leading = False
        self._working: list[asyncio.Task[None]] = []
        # Not bounded by a number: at most one key per worker and place that it was in.
        self._asked: dict[Place, set[Key]] = {}
        self._busy: set[Place] = set()
        """Places whose batches are under way."""
        self._somebody_asked = asyncio.Event()
        self._cycles = 0
        self._on_demand_refreshes = 0
        self._ended: datetime | None = None
        self._seconds = 0.0

    async def run(self, term: Term) -> None:
        """Refresh until the term ends (returns) or the task is cancelled."""
        await self._cache.catch_up(self.name)
        unsubscribe = self._cache.subscribe(self._on_update)
        self._leading = True
        try:
            async with asyncio.TaskGroup() as tasks:
                self._working = [
                    tasks.create_task(self._by_the_clock(term), name="metrics by the clock"),
                    tasks.create_task(self._on_demand(term), name="metrics on demand"),
                ]
                await term.wait_lost()
                for task in self._working:
                    task.cancel()
        finally:
            unsubscribe()
            self._leading, self._working = False, []
            self._refresher.known.clear()
            self._asked.clear()
            self._busy.clear()

    async def drain(self, seconds: float) -> None:
        """Leave off: nothing of a refresh is worth waiting for, the next leader begins with one."""
        if not self._working:
            return
        for task in self._working:
            task.cancel()
        try:
            async with self._clock.timeout(seconds):
                await asyncio.wait(self._working)
        except TimeoutError:
            log.warning("metrics.drain_timed_out")

    def describe(self) -> dict[str, Any]:
        stats = self._refresher.stats
        return {
            "name": self.name,
            "lock": self.lock_name,
            "cycles": self._cycles,
            "onDemand": self._on_demand_refreshes,
            "refreshed": stats.refreshed,
            "written": stats.written,
            "unwritten": stats.unwritten,
            "defects": stats.defects,
            "lastCycleAt": rfc3339(self._ended) if self._ended else None,
            "lastCycleSeconds": round(self._seconds, 3),
        }

    def observe(self, meter: Meter) -> None:
        """The gauges; none while another daemon leads."""
        if self._leading:
            gauges.observe(meter, self._cache.all(LabWorker), self._refresher.known.get, self._clock.now())

    async def _by_the_clock(self, term: Term) -> None:
        while True:
            began = self._clock.monotonic()
            workers = [w for w in self._cache.all(LabWorker) if has_instance(w) or w.status.metrics is not None]
            if await self._refresh(workers, term):
                self._cycles += 1
                self._ended, self._seconds = self._clock.now(), self._clock.monotonic() - began
            interval = self._settings.metrics_refresh_interval
            interval *= 1 + _SPREAD * random.uniform(-1, 1)  # noqa: S311 - spreads work, keeps no secret
            await self._clock.sleep(max(interval - (self._clock.monotonic() - began), 0))

    async def _on_demand(self, term: Term) -> None:
        async with asyncio.TaskGroup() as batches:
            while True:
                await self._somebody_asked.wait()
                self._somebody_asked.clear()
                for place in sorted(self._asked.keys() - self._busy):
                    self._busy.add(place)
                    batches.create_task(self._batches(place, term), name=f"metrics on demand of {place}")

    async def _batches(self, place: Place, term: Term) -> None:
        """Refresh whom somebody asks for in a place, one batch after the other, until nobody does."""
        while True:
            await self._clock.sleep(_GATHER)
            asked = self._asked.pop(place, None)
            if asked is None:
                self._busy.discard(place)
                return
            began = self._clock.monotonic()
            found = (self._cache.get(LabWorker, *key) for key in sorted(asked))
            if await self._refresh([w for w in found if w is not None], term):
                self._on_demand_refreshes += 1
            apart = self._settings.metrics_on_demand_interval - (self._clock.monotonic() - began)
            await self._clock.sleep(max(apart, 0))

    async def _refresh(self, workers: Sequence[LabWorker], term: Term) -> bool:
        """Whether the refresh came to its end. A defect is logged, and ends this refresh only."""
        try:
            await self._refresher.refresh(workers, term)
        except* NotLeading:
            log.info("metrics.not_leading", term=term.number)
            term.lost()
        except* Exception:
            log.exception("metrics.refresh_failed")
        else:
            return True
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            # A group with errors of its own swallows a cancellation that comes at the same moment.
            raise asyncio.CancelledError
        return False

    def _on_update(self, update: CacheUpdate) -> None:
        for change in update.changes:
            if change.kind.model is not LabWorker:
                continue
            old, new = (item.resource if item is not None else None for item in (change.old, change.new))
            if isinstance(new, LabWorker):
                if _asks(old if isinstance(old, LabWorker) else None, new):
                    self._asked.setdefault(new.spec.place, set()).add((new.namespace, new.name))
                    self._somebody_asked.set()
            elif old is not None:
                self._refresher.known.pop(old.uid, None)


def _asks(old: LabWorker | None, new: LabWorker) -> bool:
    """Whether a change of a worker is a reason to measure it now."""
    wish, wished = (w.metadata.annotations.get(RECONCILE_ANNOTATION) if w else None for w in (new, old))
    if wish is not None and wish != wished:
        return True
    return _machine(new) != (_machine(old) if old is not None else (None, None, False))


def _machine(worker: LabWorker) -> tuple[str | None, str | None, bool]:
    """Which machine a worker has, its state, and whether its CML serves."""
    return worker.status.ec2.instance_id, worker.status.ec2.state, worker.status.phase in CML_RUNNING
