"""One refresh of some workers: ask the sources place by place, remember what they told, write what matters.

Promises that places (regions of accounts), sources and CMLs hold up one another no more than they must: what one tells
is taken although another fails; that a worker is written at most once, under the leader's fence, on top of what is
stored by then; and that the event loop is given back between workers. Called by the fleet's metrics.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

import structlog

from controllers.aws.place import Place
from controllers.labs.homes import can_be_asked
from controllers.metrics.measured import NOTHING, Known, Told, Trouble, learned, stored, worth_writing
from controllers.metrics.settings import MetricsSettings
from controllers.metrics.sources import INSTANCE_NOT_FOUND, RUNNING, TERMINATED, WRONG_ACCOUNT, Sources
from controllers.workers.kind import METRICS, LabWorker
from controllers.workers.phases import Phase
from controllers.workers.status import CloudWatchMeasured, CmlMeasured, Ec2Measured
from lrm.cache import Cache
from lrm.client import Client
from lrm.election import Term
from lrm.errors import NotLeading, ResourceConflict, ResourceNotFound
from lrm.resource import RECONCILE_ANNOTATION
from storage.clock import Clock
from storage.errors import StorageError

log = structlog.get_logger(__name__)

_WRITERS = 8

_Cloud = tuple[dict[str, Ec2Measured | Trouble], dict[str, CloudWatchMeasured | Trouble]]
"""What EC2 and CloudWatch told of a place's instances, by id."""


@dataclass(slots=True)
class Stats:
    """Counters since the process began."""

    refreshed: int = 0
    written: int = 0
    unwritten: int = 0
    """Writes that failed; the next refresh makes up for them."""
    defects: int = 0
    """Mistakes of ours, each logged; they cost one worker, or the cloud's part of one place, one refresh."""


class Refresher:
    """See the module."""

    def __init__(self, sources: Sources, client: Client, cache: Cache, clock: Clock, settings: MetricsSettings) -> None:
        self.stats = Stats()
        self.known: dict[str, Known] = {}
        """The exact state of knowledge by uid; status has that of its last write."""
        self._sources = sources
        self._client = client
        self._cache = cache
        self._clock = clock
        self._settings = settings
        self._writers = asyncio.Semaphore(_WRITERS)

    async def refresh(self, workers: Iterable[LabWorker], term: Term) -> None:
        """Refresh these workers. Raises a group of `NotLeading` when the term ends meanwhile."""
        places: dict[Place, list[LabWorker]] = {}
        async with asyncio.TaskGroup() as tasks:
            for worker in workers:
                if has_instance(worker):
                    places.setdefault(worker.spec.place, []).append(worker)
                else:
                    tasks.create_task(self._take(worker, None, term))
            for place, some in places.items():
                tasks.create_task(self._place(place, some, term), name=f"metrics of {place}")

    async def _place(self, place: Place, workers: list[LabWorker], term: Term) -> None:
        term.check()
        async with asyncio.TaskGroup() as tasks:
            cloud = tasks.create_task(self._cloud(place, workers))
            for worker in workers:
                tasks.create_task(self._worker(worker, cloud, term))

    async def _cloud(self, place: Place, workers: list[LabWorker]) -> _Cloud | None:
        by_id = {worker.status.ec2.instance_id or "": worker for worker in workers if not self._has_ended(worker)}
        unmarked = {i for i, worker in by_id.items() if worker.spec.observe_only}
        try:
            owners = {i: worker.status.ec2.owner_id for i, worker in by_id.items()}
            instances = await self._sources.ec2(place, owners, unmarked)
            # What is another account's cannot be asked about there, whoever asks.
            wrong = {i: t for i, t in instances.items() if isinstance(t, Trouble) and t.reason == WRONG_ACCOUNT}
            # CloudWatch bills by the metric: it is not asked of machines that do not run.
            running = [i for i, worker in by_id.items() if i not in wrong and _runs(instances[i], worker)]
            return instances, {**await self._sources.cloud_watch(place, running), **wrong}
        except Exception:  # a mistake here must not end what the CMLs tell
            self.stats.defects += 1
            log.exception("metrics.defect", place=str(place))
            return None

    def _has_ended(self, worker: LabWorker) -> bool:
        """Whether the instance has ended and that was told: nothing is left to ask EC2 about it."""
        known = self.known.get(worker.uid, stored(worker.status)).metrics
        if worker.status.ec2.state != TERMINATED or known is None:
            return False
        ec2 = known.ec2
        vanished = ec2.state is None and ec2.error is not None and ec2.error.reason == INSTANCE_NOT_FOUND
        return ec2.state == TERMINATED or vanished

    async def _worker(self, worker: LabWorker, cloud: asyncio.Task[_Cloud | None], term: Term) -> None:
        try:
            cml = await self._sources.cml(worker) if can_be_asked(worker) else CmlMeasured()
            asked = worker.metadata.annotations.get(RECONCILE_ANNOTATION)
            told, instance_id = await cloud, worker.status.ec2.instance_id or ""
            ec2 = told[0].get(instance_id) if told is not None else None
            cloud_watch = told[1].get(instance_id, CloudWatchMeasured()) if told is not None else None
            await self._take(worker, Told(ec2, cloud_watch, cml, asked), term)
        except NotLeading:
            raise
        except Exception:  # nor a mistake with one worker all the others
            self.stats.defects += 1
            log.exception("metrics.defect", namespace=worker.namespace, name=worker.name)

    async def _take(self, worker: LabWorker, told: Told | None, term: Term) -> None:
        """Remember what was told of a worker (None: it has no machine), and write it if that is worth it."""
        async with self._writers:
            await self._clock.sleep(0)
            present = self._cache.get(LabWorker, worker.namespace, worker.name)
            if present is None or present.uid != worker.uid:
                self.known.pop(worker.uid, None)
                return
            status, instance_id = stored(present.status), worker.status.ec2.instance_id
            known = NOTHING if told is None else learned(self.known.get(worker.uid, status), told, self._settings)
            self.known[worker.uid] = known
            self.stats.refreshed += 1
            if worth_writing(status, known, self._settings):
                await self._write(present, known, instance_id, term)

    async def _write(self, worker: LabWorker, known: Known, instance_id: str | None, term: Term) -> None:
        def change(current: LabWorker) -> None:
            # Of another machine than was measured nothing is known yet.
            same = current.status.ec2.instance_id == instance_id
            if same and worth_writing(stored(current.status), known, self._settings):
                current.status.utilization, current.status.metrics = known.utilization, known.metrics

        try:
            await self._client.bind(owner=METRICS, fence=term).update_status(worker, change)
            self.stats.written += 1
        except ResourceNotFound:
            self.known.pop(worker.uid, None)
        except NotLeading:
            raise
        except (StorageError, ResourceConflict) as error:
            self.stats.unwritten += 1
            log.warning("metrics.not_written", namespace=worker.namespace, name=worker.name, error=str(error))


def has_instance(worker: LabWorker) -> bool:
    """Whether there is a machine to measure."""
    return worker.status.ec2.instance_id is not None and worker.status.phase != Phase.TERMINATED


def _runs(told: Ec2Measured | Trouble, worker: LabWorker) -> bool:
    """Whether the instance runs, as EC2 says; where it does not say, as it last was."""
    if isinstance(told, Trouble):
        return bool(told.told.get("state", worker.status.ec2.state) == RUNNING)
    return told.state == RUNNING
