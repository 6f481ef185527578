"""When the labs of a big fleet are listed, on virtual time: no herd at the start, after a request for all, or later."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

from controllers.cml.inventory import Listing
from controllers.cml.models import Lab
from controllers.cml.session import Session
from controllers.cml.sessions import CmlSessions
from controllers.labs.controller import LabsController
from controllers.labs.hints import PushHints
from controllers.labs.kind import LAB_RECORD, LABS
from controllers.labs.push import LabsPush
from controllers.labs.settings import LabsSettings
from controllers.workers.kind import INSTANCE_FINALIZER, LAB_WORKER, RECORDS_FINALIZER, WORKERS, LabWorker
from controllers.workers.spec import LabWorkerSpec
from controllers.workers.status import Identity
from lrm.bookmarks import Bookmarks
from lrm.cache import Cache
from lrm.client import Client
from lrm.election import StaticElection
from lrm.reconcile import Runner
from lrm.registry import Registry
from lrm.resource import RECONCILE_ANNOTATION, ObjectMeta
from lrm.telemetry import Telemetry
from lrm.testing import VirtualClock
from storage.memory import MemoryStorage
from storage.redis_bookmarks import ProcessBookmarks

FLEET, HANDS, TAKES = 500, 32, 2.0
"""Workers, syncs that one leader has in hand at most, and seconds that each CML takes for its list."""
IDENTITY = "564d4a4c-0000-4000-8000-00000000000b"
RUNS, RESTS = "90f84e38-a71c-4d57-8d90-00fa8a197385", "90f84e38-a71c-4d57-8d90-00fa8a197386"


@dataclass
class Fleet:
    """CMLs that each take `TAKES` seconds for a list, and the times at which lists were begun."""

    clock: VirtualClock
    lists: dict[str, list[float]] = field(default_factory=dict)
    under_way: int = 0
    most: int = 0
    """Lists that were under way at once."""

    def client_for(self, worker: LabWorker) -> Cml:
        return Cml(self, worker.name, RUNS if worker.metadata.labels.get("busy") else RESTS)

    def begun(self, after: float) -> list[float]:
        """The times since then, of all workers."""
        return sorted(at for times in self.lists.values() for at in times if at >= after)


class Cml:
    """What a sync asks of one CML: its one lab never changes."""

    session = Session(serial=1, token="", username="admin", admin=True, identity=IDENTITY)

    def __init__(self, fleet: Fleet, name: str, lab_id: str) -> None:
        self._fleet, self._name = fleet, name
        self._lab = Lab.model_validate({"id": lab_id, "state": "STARTED" if lab_id == RUNS else "STOPPED"})
        self.last_complete = frozenset({lab_id})

    async def proven_session(self, *, again: bool = False) -> Session:  # noqa: ARG002 - part of the contract
        return self.session

    async def list_labs(self) -> Listing:
        fleet = self._fleet
        fleet.lists.setdefault(self._name, []).append(fleet.clock.monotonic())
        fleet.under_way += 1
        fleet.most = max(fleet.most, fleet.under_way)
        await fleet.clock.sleep(TAKES)
        fleet.under_way -= 1
        return Listing(frozenset({self._lab.id}), {self._lab.id: self._lab}, frozenset(), 0, {})


@dataclass
class Scene:
    """A store with workers that serve, and leaders that come one after another."""

    clock: VirtualClock
    storage: MemoryStorage
    cache: Cache
    client: Client
    fleet: Fleet
    bookmarks: Bookmarks
    running: asyncio.Task[None] | None = None

    async def add(self, name: str, labels: dict[str, str]) -> LabWorker:
        """A worker that is not there yet."""
        meta = ObjectMeta(name=name, labels=labels, finalizers=[INSTANCE_FINALIZER, RECORDS_FINALIZER])
        spec = LabWorkerSpec.model_validate({"region": "us-east-1", "aws": {"amiId": "ami-12345678"}})
        return await self.client.create(LabWorker(metadata=meta, spec=spec))

    async def serve(self, count: int, *, busy: bool) -> None:
        for n in range(count):
            made = await self.add(f"{'busy' if busy else 'quiet'}-{n}", {"busy": "yes"} if busy else {})

            def ready(w: LabWorker) -> None:
                w.status.ec2.instance_id, w.status.ec2.state = f"i-{w.name}", "running"
                w.status.cml.identity = Identity(product_uuid=IDENTITY)
                for step in ("Starting", "ReadyUnlicensed", "Ready"):
                    w.status.enter(step, "Test", self.clock.now())

            await self.client.update_status(made, ready)
        await self.clock.settle()

    async def lead(self) -> None:
        """A new process leads in the place of the one before."""
        if self.running is not None:
            self.running.cancel()
            await asyncio.wait([self.running])
            self.fleet.under_way = 0
        controller = LabsController(
            cache=self.cache, sessions=cast("CmlSessions", self.fleet), settings=LabsSettings(), clock=self.clock
        )
        runner = Runner(controller, self.client, self.cache, self.clock, bookmark=self.bookmarks.of(LABS))
        election = StaticElection(self.storage, self.clock, root="/lrm", lock_name=LABS, identity="test")
        self.running = asyncio.create_task(runner.run(await election.acquire()))
        self.fleet.most = 0
        await self.clock.settle()


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    clock = VirtualClock()
    storage = MemoryStorage(clock=clock)
    registry = Registry((LAB_WORKER, LAB_RECORD), root="/lrm")
    cache = Cache(storage, registry, clock)
    client = Client(storage, registry, clock, owner=WORKERS)
    bookmarks = Bookmarks(ProcessBookmarks(), storage, clock, every=600.0)
    made = Scene(clock, storage, cache, client, Fleet(clock), bookmarks)
    tasks = [asyncio.create_task(cache.run()), asyncio.create_task(bookmarks.run())]
    await cache.wait_synced()
    try:
        yield made
    finally:
        tasks += [made.running] if made.running is not None else []
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def busiest(times: list[float], seconds: float) -> int:
    """The most that lie within so many seconds, by the clock's marks."""
    return max(Counter(int(at // seconds) for at in times).values(), default=0)


async def test_five_hundred_workers_are_no_herd_at_the_start_nor_ever_after() -> None:
    async with scene() as it:
        await it.serve(FLEET, busy=True)
        await it.lead()
        await it.clock.advance(FLEET / HANDS * TAKES + 2)
        assert {len(times) for times in it.fleet.lists.values()} == {1}
        assert (len(it.fleet.lists), it.fleet.most) == (FLEET, HANDS), "as many at once as it has hands, no more"
        start = it.clock.monotonic()
        it.fleet.most = 0
        await it.clock.advance(2400)
        gaps = [times[1] - times[0] for times in it.fleet.lists.values()]
        assert len(gaps) == FLEET
        assert min(gaps) >= 1620
        assert max(gaps) <= 1980 + 2 * TAKES
        assert busiest(it.fleet.begun(start), 60) < FLEET / 4, "spread over six minutes"
        assert it.fleet.most < HANDS / 2


async def test_a_new_leader_takes_a_minute_for_a_fleet_of_which_nothing_is_due() -> None:
    async with scene() as it:
        await it.serve(FLEET, busy=True)
        await it.lead()
        await it.clock.advance(120)
        await it.lead()
        began = it.clock.monotonic()
        await it.clock.advance(70)
        times = it.fleet.begun(began)
        assert len(times) == FLEET, "a process believes only what it has seen itself"
        assert busiest(times, 5) < 2 * FLEET * 5 / 60


async def test_a_request_for_all_keeps_no_more_cmls_busy_than_there_are_hands_and_each_is_asked_once() -> None:
    async with scene() as it:
        await it.serve(FLEET, busy=True)
        await it.lead()
        await it.clock.advance(120)
        it.fleet.most, began = 0, it.clock.monotonic()
        for worker in it.cache.all(LabWorker):
            await it.client.update(worker, lambda w: w.metadata.annotations.update({RECONCILE_ANNOTATION: "all"}))
        await it.clock.advance(FLEET / HANDS * TAKES + 4)
        assert len(it.fleet.begun(began)) == FLEET
        assert it.fleet.most == HANDS


async def test_a_worker_on_which_nobody_works_is_listed_every_two_hours_and_a_busy_one_every_half() -> None:
    async with scene() as it:
        await it.serve(2, busy=False)
        await it.serve(2, busy=True)
        await it.lead()
        await it.clock.advance(3 * 3600)  # until then, its labs may have been worked with
        began = it.clock.monotonic()
        await it.clock.advance(20 * 3600)
        for name, times in it.fleet.lists.items():
            counted = sum(at >= began for at in times)
            least, most = (36, 45) if name.startswith("busy") else (9, 12)
            assert least <= counted <= most, (name, counted)


async def test_the_records_of_each_worker_are_told_however_many_there_are() -> None:
    """OpenTelemetry folds what exceeds 2,000 sets of labels into one, unless it is told otherwise."""
    async with scene() as it:
        for n in range(2100):
            await it.add(f"w{n}", {})
        telemetry, sessions = Telemetry(), cast("CmlSessions", it.fleet)
        push = LabsPush(
            cache=it.cache, sessions=sessions, hints=PushHints(it.clock, interval=1), clock=it.clock, enabled=False
        )
        telemetry.observe(push.observe)
        term = await StaticElection(it.storage, it.clock, root="/lrm", lock_name=LABS, identity="test").acquire()
        listening = asyncio.create_task(push.run(term))
        await it.clock.settle()
        shown = telemetry.exposition()[0].decode().splitlines()
        assert len({line for line in shown if line.startswith("lrm_labs_records{")}) == 2100
        term.lost()
        await listening
        assert "lrm_labs_records" not in telemetry.exposition()[0].decode(), "it is the leader's to tell"
