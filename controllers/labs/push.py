"""Listening to the CMLs: one push channel for each worker that can be asked, kept open while this daemon leads.

Promises: a channel is opened under the worker's own session, with all that keeps a request from another CML; it ends
with the term, and with the worker's being paused, stopped or gone; one that breaks is opened again with growing delay,
never all at once, but without delay once its worker is Ready again or has another identity. What is heard becomes a
hint for the sync (`hints`), which believes the list alone: a CML without the channel costs a try every few minutes, and
nothing else. A `Led` beside the labs controller, under its lock.
"""

from __future__ import annotations

import asyncio
import random
from datetime import datetime
from typing import Any

import structlog
from opentelemetry.metrics import Meter

from controllers.cml.errors import CmlError
from controllers.cml.sessions import CmlSessions
from controllers.labs.hints import PushHints
from controllers.labs.homes import can_be_asked
from controllers.labs.kind import LABS, READY, records_of_worker
from controllers.labs.measures import LabMeasures
from controllers.workers.kind import LabWorker
from lrm.cache import Cache, CacheUpdate
from lrm.controller import Key
from lrm.election import Term
from lrm.errors import NotLeading
from lrm.resource import AnyResource
from storage.clock import Clock

log = structlog.get_logger(__name__)

_RETRY_FIRST, _RETRY_MOST = 1.0, 300.0
_LASTING = 60.0
"""Seconds after which a channel that breaks is one that worked."""
_SPREAD = 0.005
"""Seconds for each worker over which a new leader opens its channels."""


class LabsPush:
    """See the module."""

    name = "labs-push"
    lock_name = LABS

    def __init__(
        self,
        *,
        cache: Cache,
        sessions: CmlSessions,
        hints: PushHints,
        clock: Clock,
        measures: LabMeasures | None = None,
        enabled: bool = True,
    ) -> None:
        self._cache = cache
        self._sessions = sessions
        self._hints = hints
        self._clock = clock
        self._measures = measures or LabMeasures()
        self._enabled = enabled
        self._term: Term | None = None
        self._draining = False
        self._group: asyncio.TaskGroup | None = None
        self._listeners: dict[str, asyncio.Task[None]] = {}
        """By uid of the worker."""
        self._delayed: dict[str, asyncio.Event] = {}
        """Of the workers whose next channel is waited for; set, it is opened at once."""
        self._open: set[object] = set()
        """A token for each open channel: of one worker there are two for a moment, when one ends and one begins."""
        self._heard = 0

    async def run(self, term: Term) -> None:
        """Listen until the term ends (returns) or the task is cancelled."""
        await self._cache.catch_up(self.name)
        self._term, self._draining = term, False
        try:
            async with asyncio.TaskGroup() as self._group:
                unsubscribe = self._cache.subscribe(self._on_update)
                try:
                    workers = [w for w in self._cache.all(LabWorker) if self._listens_to(w)]
                    for worker in workers:
                        self._begin(worker, among=len(workers))
                    await term.wait_lost()
                finally:
                    unsubscribe()  # a group that waits for its channels' ends takes no new one
                    self._end_all()
        finally:
            self._group = self._term = None
            self._listeners.clear()
            self._open.clear()

    async def drain(self, seconds: float) -> None:
        """Hear nothing more; a channel is given up at once, its CML sees the connection end."""
        ending = list(self._listeners.values())
        self._draining = True
        self._end_all()
        if not ending:
            return
        try:
            async with self._clock.timeout(seconds):
                await asyncio.wait(ending)
        except TimeoutError:
            log.warning("labs.push_drain_timed_out", left=len(self._listeners))

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "lock": self.lock_name,
            "listeners": len(self._listeners),
            "open": len(self._open),
            "hints": self._heard,
        }

    def observe(self, meter: Meter) -> None:
        """Open channels, and the records of each worker; none while another daemon leads."""
        if self._term is None:
            return
        meter.create_gauge("lrm_labs_push_channels", description="CMLs whose pushes are heard.").set(len(self._open))
        records = meter.create_gauge("lrm_labs_records", description="LabRecords of a worker.")
        for worker in self._cache.all(LabWorker):
            found = len(records_of_worker(self._cache, worker.namespace, worker.name))
            records.set(found, {"namespace": worker.namespace, "name": worker.name})

    def _listens_to(self, worker: LabWorker) -> bool:
        return self._enabled and not self._draining and can_be_asked(worker) and not worker.paused

    def _on_update(self, update: CacheUpdate) -> None:
        for change in update.changes:
            if change.kind.model is LabWorker:
                self._attend(*(item.resource if item is not None else None for item in (change.old, change.new)))

    def _attend(self, old: AnyResource | None, new: AnyResource | None) -> None:
        """Begin or end to listen, as a worker now is; one that cannot be read cannot be synced either."""
        if isinstance(old, LabWorker) and (new is None or new.uid != old.uid):
            self._give_up(old.uid)
        if isinstance(new, LabWorker):
            if not self._listens_to(new):
                self._give_up(new.uid)
            elif new.uid not in self._listeners:
                self._begin(new)
            elif isinstance(old, LabWorker) and new.uid in self._delayed and _is_well_again(old, new):
                self._delayed[new.uid].set()

    def _begin(self, worker: LabWorker, *, among: int = 1) -> None:
        if self._group is None:
            return
        delay = _SPREAD * among * random.random()  # noqa: S311 - spreads work, keeps no secret
        key = (worker.namespace, worker.name)
        task = self._group.create_task(self._listen(worker.uid, key, delay), name=f"pushes of {worker.name}")
        self._listeners[worker.uid] = task

    def _give_up(self, uid: str) -> None:
        task = self._listeners.pop(uid, None)
        if task is not None:
            task.cancel()

    def _end_all(self) -> None:
        for uid in list(self._listeners):
            self._give_up(uid)

    async def _listen(self, uid: str, key: Key, delay: float) -> None:
        """Keep one worker's channel open, until cancelled."""
        retry, in_trouble = _RETRY_FIRST, False
        while True:
            if await self._is_woken(uid, delay):
                retry, in_trouble = _RETRY_FIRST, False
            worker = self._cache.get(LabWorker, *key)
            if worker is None or worker.uid != uid or self._term is None:
                return  # a new one under this name has its own listener
            try:
                self._term.check()
            except NotLeading:
                return  # whoever leads now listens
            began = self._clock.monotonic()
            problem = await self._until_it_ends(worker)
            if self._clock.monotonic() - began >= _LASTING:
                retry, in_trouble = _RETRY_FIRST, False
            (log.debug if in_trouble else log.info)("labs.push_ended", worker=key[1], error=problem)
            in_trouble = True
            # On the upper half, so that channels that broke together do not come back together.
            delay = retry * (0.5 + random.random() / 2)  # noqa: S311 - spreads work, keeps no secret
            retry = min(retry * 2, _RETRY_MOST)

    async def _is_woken(self, uid: str, delay: float) -> bool:
        """Wait so long; True as soon as the worker is well again."""
        woken = self._delayed[uid] = asyncio.Event()
        try:
            async with self._clock.timeout(delay):
                return await woken.wait()
        except TimeoutError:
            return False
        finally:
            if self._delayed.get(uid) is woken:
                del self._delayed[uid]

    async def _until_it_ends(self, worker: LabWorker) -> str:
        """Why the channel ended; a mistake of ours is logged, and costs this worker its pushes for a while."""
        uid, key, channel = worker.uid, (worker.namespace, worker.name), object()

        def opened() -> None:
            self._open.add(channel)
            self._hints.opened(uid, key)
            log.debug("labs.push_opened", worker=worker.name)

        def heard() -> None:
            if self._hints.heard(uid, key):
                self._heard += 1
                self._measures.hinted()

        try:
            await self._sessions.client_for(worker).listen(opened, heard)
        except CmlError as error:
            return str(error)
        except Exception as error:
            log.exception("labs.push_defect", worker=worker.name)
            return repr(error)
        finally:
            self._open.discard(channel)


def _is_well_again(old: LabWorker, new: LabWorker) -> bool:
    """Whether a channel that could not be opened may well be now: it became Ready, or its CML is another one."""
    became_ready = _ready_since(new) not in (None, _ready_since(old))
    return became_ready or new.status.cml.identity != old.status.cml.identity


def _ready_since(worker: LabWorker) -> datetime | None:
    ready = worker.status.condition(READY)
    return ready.last_transition_time if ready is not None and ready.status == "True" else None
