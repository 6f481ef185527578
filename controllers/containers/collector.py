"""Removes what nobody claims any more from the engine: containers, networks and volumes of this installation.

Claimed is what bears the uid of a request that has a place: `status.workerRef` is written before anything is made, and
cleared only when nothing is left. What is unclaimed all the same was made late, by a leader who had lost the lock
meanwhile, or outlived a store that was set back. It is removed when two looks at least `_APART` seconds apart agree,
each judged by a read of the store that began after the engine's answer; a request that cannot be decoded may claim
anything, so nothing is removed then.
"""

from __future__ import annotations

import asyncio
from typing import Any

import structlog
from opentelemetry.metrics import Meter

from controllers.containers.documents import Thing
from controllers.containers.engine import Engine
from controllers.containers.errors import EngineError, EngineFailed
from controllers.containers.runtime import remove
from controllers.instances.kind import INSTANCES, LabInstanceRequest, placed
from lrm.cache import Cache
from lrm.election import Term
from lrm.errors import CacheBehind, NotLeading
from storage.clock import Clock
from storage.errors import StorageError

log = structlog.get_logger(__name__)

_INTERVAL = 600.0
"""Seconds between two looks while nothing is suspected."""
_APART = 60.0


class Collector:
    """See the module. It is led (`lrm.led.Led`)."""

    name = "container-collector"
    lock_name = INSTANCES

    def __init__(self, engine: Engine, cache: Cache, clock: Clock, *, observe_only: bool) -> None:
        self.error = ""
        """Why the last turn came to nothing; empty when it did not."""
        self._engine = engine
        self._cache = cache
        self._clock = clock
        self._observe_only = observe_only
        self._suspects: dict[tuple[str, str], float] = {}
        """Kind and id → when it was first seen unclaimed, monotonic."""
        self._removed = 0
        self._in_hand = asyncio.Lock()
        self._stopping = False

    async def run(self, term: Term) -> None:
        """Look until the term is lost (returns) or the task is cancelled; a defect is logged, and tried again."""
        await self._cache.catch_up(self.name)
        self._suspects.clear()  # of an earlier term: other leaders have come between
        async with asyncio.TaskGroup() as tasks:
            turns = tasks.create_task(self._lead(term), name="container collector")
            await term.wait_lost()
            turns.cancel()

    async def drain(self, seconds: float) -> None:
        """Begin no turn more and let the one in hand end."""
        self._stopping = True
        try:
            async with self._clock.timeout(seconds), self._in_hand:
                return
        except TimeoutError:
            log.warning("containers.collector_drain_timed_out")

    def describe(self) -> dict[str, Any]:
        """Its entry in the daemon's status."""
        return {
            "name": self.name,
            "lock": self.lock_name,
            "suspects": len(self._suspects),
            "removed": self._removed,
            "error": self.error,
        }

    def observe(self, meter: Meter) -> None:
        """What this daemon removed."""
        meter.create_counter(
            "lrm_containers_collected", description="Containers, networks and volumes that nobody claimed, removed."
        ).add(self._removed)

    async def _lead(self, term: Term) -> None:
        while not self._stopping:
            async with self._in_hand:
                await self._turn(term)
            await self._clock.sleep(_APART if self._suspects or self.error else _INTERVAL)

    async def _turn(self, term: Term) -> None:
        try:
            await self.look(term)
        except NotLeading as error:
            log.info("containers.collector_not_leading", detail=str(error))
            term.lost()
        except (EngineError, StorageError, CacheBehind) as error:
            self.error = str(error)
        except Exception as error:
            # A defect costs this turn, not the daemon and then the next leader's.
            log.exception("containers.collector_defect")
            self.error = repr(error)
        else:
            self.error = ""

    async def look(self, term: Term) -> None:
        """One look at everything. Raises `EngineError`, `StorageError`, `CacheBehind`, `NotLeading`.

        What cannot be removed is told at the end, and keeps nothing else from being removed.
        """
        term.check()
        engine = self._engine
        things = [*await engine.containers(), *await engine.networks(), *await engine.volumes()]
        unclaimed = await self._unclaimed(things)
        now = self._clock.monotonic()
        self._suspects = {key: self._suspects.get(key, now) for key in unclaimed}
        failed: dict[str, EngineError] = {}
        for key, thing in unclaimed.items():
            if now - self._suspects[key] < _APART:
                continue
            whose = thing.labels
            log.warning("containers.unclaimed", kind=thing.kind, id=thing.id, uid=whose.uid, request=whose.name)
            if not self._observe_only:
                try:
                    await remove(engine, thing, term.check)
                    self._removed += 1
                except EngineError as error:
                    failed[f"{thing.kind} {thing.id}"] = error
        if failed:
            told = "; ".join(f"{what}: {error}" for what, error in tuple(failed.items())[:3])
            raise EngineFailed(f"{len(failed)} cannot be removed, among them {told}")

    async def _unclaimed(self, things: list[Thing]) -> dict[tuple[str, str], Thing]:
        await self._cache.barrier()
        items = self._cache.items(self._cache.registry.of(LabInstanceRequest))
        if any(item.resource is None for item in items):
            log.warning("containers.request_undecodable", detail="nothing is collected: it may claim any container")
            return {}
        claimed = {request.uid for request in self._cache.all(LabInstanceRequest) if placed(request)}
        return {(t.kind, t.id): t for t in things if t.labels.uid not in claimed}
