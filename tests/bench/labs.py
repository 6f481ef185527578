"""What the mirror of a fleet's labs costs: requests to the CMLs, writes, time; and how soon a push is a record.

The CMLs are a simulator in a process of its own, the store is a real etcd; the controller runs here, with the 32 keys
at once that a daemon gives it. A cycle is what a leader without a bookmark does: every worker at once. The N+1 way is
the same controller against the same CMLs with their one-call listing switched off, so that each lab is a request.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from bench.report import Figure, Size
from controllers.cml.sessions import CmlSessions
from controllers.cml.simulator.machine import identity
from controllers.labs.controller import LabsController
from controllers.labs.kind import LAB_RECORD, LABS, LabRecord
from controllers.labs.push import LabsPush
from controllers.labs.settings import LabsSettings
from controllers.workers.kind import INSTANCE_FINALIZER, LAB_WORKER, RECORDS_FINALIZER, LabWorker
from controllers.workers.settings import WorkerSettings
from controllers.workers.spec import LabWorkerSpec
from controllers.workers.status import Identity, LabWorkerStatus
from equipment.counting import counting
from equipment.etcd import Gateway, b64, scratch_dir
from equipment.loop_lag import LoopLag
from equipment.waiting import until
from lrm.cache import Cache, CacheUpdate
from lrm.client import Client
from lrm.devservers import EtcdServer
from lrm.election import StaticElection, StaticTerm
from lrm.events import Events
from lrm.pauses import shortened
from lrm.processes import ChildProcess
from lrm.reconcile import Runner
from lrm.registry import Registry
from lrm.resource import ObjectMeta
from lrm.secrets import Secrets
from storage.clock import SystemClock
from storage.etcd import EtcdStorage

LABS_EACH = 20
FIRST_SECONDS, CYCLE_SECONDS = 60.0, 15.0
REQUESTS, WRITES = 2.0, 1.0
FEWER_REQUESTS, FASTER = 5.0, 3.0
PUSH_SECONDS = 1.0
LAG_MS = 100.0
MANY_LABS = 2_000
WORKERS_OF_OBJECTS = 10
"""One worker for so many objects of the other measurements: 500 in full."""
CHANGES = 200
PASSWORD = "admin-secret"
_CLOCK = SystemClock()
_TXN = 100


@dataclass(frozen=True, slots=True)
class Cycle:
    """What one sync of every worker came to."""

    seconds: float
    computed: float
    """Seconds of the processor, of this process."""
    requests: int
    writes: Counter[str]
    lag: LoopLag


@dataclass
class Scene:
    """The fleet and what mirrors it."""

    count: int
    labs_each: int
    cache: Cache
    client: Client
    events: Events
    sessions: CmlSessions
    term: StaticTerm
    http: aiohttp.ClientSession
    cml_url: str
    password_file: Path

    async def fill(self, gateway: Gateway) -> None:
        """Workers as the workers' controller leaves them, and labs on their CMLs."""
        registry = self.cache.registry
        puts = [
            {"request_put": {"key": b64(registry.key_of(w)), "value": b64(LAB_WORKER.encode(w))}}
            for w in map(self._worker, range(self.count))
        ]
        for first in range(0, len(puts), _TXN):
            await gateway.call("kv/txn", {"success": puts[first : first + _TXN]})
        labs = {"title": "Lab", "count": self.labs_each, "nodes": 3}
        async with asyncio.TaskGroup() as tasks:
            for n in range(self.count):
                tasks.create_task(self.control("POST", f"/_sim/instances/{instance_of(n)}/labs", labs))
        await self.cache.barrier()

    def _worker(self, n: int) -> LabWorker:
        access = {
            "passwordFrom": {"file": str(self.password_file)},
            "apiBaseUrl": f"{self.cml_url}/{instance_of(n)}",
        }
        spec = LabWorkerSpec.model_validate({"region": "us-east-1", "aws": {"amiId": "ami-12345678"}, "cml": access})
        status = LabWorkerStatus(phase="Ready")
        status.ec2.instance_id, status.ec2.state = instance_of(n), "running"
        status.cml.identity = Identity(product_uuid=identity(instance_of(n), "product"))
        meta = ObjectMeta(
            name=f"w{n}",
            uid=str(uuid.uuid4()),
            generation=1,
            creation_timestamp=_CLOCK.now(),
            finalizers=[INSTANCE_FINALIZER, RECORDS_FINALIZER],
        )
        return LabWorker(metadata=meta, spec=spec, status=status)

    def controller(self) -> LabsController:
        """One that has synced nothing yet, as a new leader's."""
        settings = LabsSettings(labs_refresh_interval=3600)
        return LabsController(cache=self.cache, sessions=self.sessions, settings=settings, clock=_CLOCK)

    @asynccontextmanager
    async def leading(self, controller: LabsController, *more: Any) -> AsyncIterator[None]:
        """The controller at work, and what runs beside it."""
        runner = Runner(controller, self.client, self.cache, _CLOCK, events=self.events)
        running = [asyncio.create_task(led.run(self.term)) for led in (runner, *more)]
        try:
            yield
        finally:
            for task in running:
                task.cancel()
            await asyncio.wait(running)

    async def cycle(self) -> Cycle:
        """One sync of every worker, until the last is written."""
        requests, lag = await self.requests(), LoopLag()
        began, used = _CLOCK.monotonic(), time.process_time()
        since = _CLOCK.now()

        def synced() -> bool:
            times = [w.status.labs_synced_at for w in self.cache.all(LabWorker)]
            return all(at is not None and at >= since for at in times)

        async with counting(self.cache) as writes, lag.watched(), self.leading(self.controller()):
            await until(synced, "a sync of every worker", timeout=600)
            seconds, computed = _CLOCK.monotonic() - began, time.process_time() - used
        return Cycle(seconds, computed, await self.requests() - requests, writes, lag)

    async def pushed(self) -> list[float]:
        """Seconds from a change in a CML to its record, of so many changes."""
        controller = self.controller()
        push = LabsPush(cache=self.cache, sessions=self.sessions, hints=controller.hints, clock=_CLOCK)
        waiting: dict[str, tuple[float, asyncio.Future[float]]] = {}

        def hear(update: CacheUpdate) -> None:
            for change in update.changes:
                record = change.item.resource
                if isinstance(record, LabRecord) and record.status.title in waiting:
                    asked, heard = waiting.pop(record.status.title)
                    heard.set_result(_CLOCK.monotonic() - asked)

        async def change(n: int, record: LabRecord) -> float:
            await asyncio.sleep(n * 0.05)
            title, heard = f"changed {n}", asyncio.get_running_loop().create_future()
            waiting[title] = (_CLOCK.monotonic(), heard)
            lab = f"/_sim/instances/{record.status.instance_id}/labs/{record.spec.lab_id}"
            await self.control("PATCH", lab, {"title": title})
            return float(await heard)

        end = self.cache.subscribe(hear)
        try:
            async with self.leading(controller, push):
                await until(lambda: push.describe()["open"] == self.count, "every channel", timeout=120)
                uids = [w.uid for w in self.cache.all(LabWorker)]
                await until(lambda: all(controller.hints.due_in(u) is None for u in uids), "a rest", timeout=120)
                records = self.cache.all(LabRecord)
                chosen = random.Random(1).sample(records, min(CHANGES, 2 * self.count))
                async with asyncio.timeout(120):
                    return sorted(await asyncio.gather(*(change(n, r) for n, r in enumerate(chosen))))
        finally:
            end()

    async def requests(self) -> int:
        """Requests that the CMLs' API has answered so far."""
        counters = await self.control("GET", "/_sim/counters")
        return sum(machine["total"] for machine in counters.values())

    async def control(self, method: str, path: str, body: Any = None) -> Any:
        """A call of the simulator's control surface."""
        async with self.http.request(method, self.cml_url + path, data=orjson.dumps(body) if body else None) as reply:
            reply.raise_for_status()
            return orjson.loads(await reply.read() or b"null")


async def labs(size: Size) -> list[Figure]:
    """A first sync, a cycle at rest, the same the N+1 way, and changes that are pushed."""
    count = max(2, size.objects // WORKERS_OF_OBJECTS)
    async with _scene(count) as scene:
        first = await scene.cycle()
        again = await scene.cycle()
        fault = await scene.control(
            "POST", "/_sim/faults", {"kind": "status", "path": "/populate_lab_tiles", "status": 404}
        )
        plain = await scene.cycle()
        await scene.control("DELETE", f"/_sim/faults/{fault['id']}")
        pushed = await scene.pushed()
    many = min(MANY_LABS, size.objects)
    async with _scene(1, many) as scene:
        with shortened():
            big, big_again = await scene.cycle(), await scene.cycle()
    held = max(big.lag.held, big_again.lag.held)
    told = f"{count} workers with {LABS_EACH} labs each"
    unchanged = again.writes["labrecords MODIFIED"] + again.writes["labrecords ADDED"]
    p95 = pushed[int(len(pushed) * 0.95)]
    return [
        Figure(
            "labs: the first sync",
            first.seconds,
            "s",
            FIRST_SECONDS,
            told=f"{told}, every login and write, {first.computed:.1f} s of a core",
        ),
        Figure(
            "labs: a cycle without changes", again.seconds, "s", CYCLE_SECONDS, told=f"{again.computed:.1f} s of a core"
        ),
        Figure("labs: requests of a worker and cycle", again.requests / count, "requests", REQUESTS),
        Figure("labs: writes of unchanged labs", unchanged, "writes", 0),
        Figure("labs: writes of a worker and cycle", again.writes["labworkers MODIFIED"] / count, "writes", WRITES),
        Figure(
            "labs: requests of the N+1 way",
            plain.requests / again.requests,
            "times as many",
            FEWER_REQUESTS,
            "more",
            told=f"{plain.requests} and {again.requests}",
        ),
        Figure(
            "labs: time of the N+1 way",
            plain.seconds / again.seconds,
            "times as long",
            FASTER,
            "more",
            told=f"{plain.seconds:.1f} s and {again.seconds:.1f} s, eight labs of a worker asked for at once",
        ),
        Figure(
            "labs: a push is a record (p95)",
            p95,
            "s",
            PUSH_SECONDS,
            told=f"{len(pushed)} changes, median {pushed[len(pushed) // 2]:.2f} s, worst {pushed[-1]:.2f} s",
        ),
        Figure(
            "labs: event loop held",
            held * 1e3,
            "ms",
            LAG_MS,
            told=f"{many} labs on one worker, found in {big.seconds:.1f} s and looked at in {big_again.seconds:.1f} s",
        ),
    ]


def instance_of(n: int) -> str:
    return f"i-{n:017x}"


@asynccontextmanager
async def _scene(count: int, labs_each: int = LABS_EACH) -> AsyncIterator[Scene]:
    registry = Registry((LAB_WORKER, LAB_RECORD))
    with scratch_dir("lrm-bench-") as folder:
        # A file: the environment is every measurement's, and they may run side by side.
        password_file = folder / "password"
        password_file.write_text(PASSWORD)
        async with (
            EtcdServer(folder / "etcd") as etcd,
            _simulator(folder) as cml_url,
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=8)) as http,
            CmlSessions(WorkerSettings(), Secrets([str(password_file)]), _CLOCK) as sessions,
        ):
            storage = EtcdStorage([etcd.endpoint], root=registry.root, instance="bench")
            cache, events = Cache(storage, registry, _CLOCK), Events(storage, _CLOCK, root=registry.root)
            running = [asyncio.create_task(work) for work in (cache.run(), events.run(), sessions.run())]
            try:
                await cache.wait_synced()
                election = StaticElection(storage, _CLOCK, root=registry.root, lock_name=LABS, identity="bench")
                client, term = Client(storage, registry, _CLOCK), await election.acquire()
                scene = Scene(count, labs_each, cache, client, events, sessions, term, http, cml_url, password_file)
                await scene.fill(Gateway(etcd.endpoint))
                yield scene
            finally:
                await _ended(running)
                await storage.aclose()


async def _ended(running: Sequence[asyncio.Task[None]]) -> None:
    for task in running:
        task.cancel()
    await asyncio.wait(running)


@asynccontextmanager
async def _simulator(folder: Path) -> AsyncIterator[str]:
    """A CML simulator as a process of its own; its URL."""
    times = [word for name in ("boot-bad-gateway", "boot-not-ready") for word in (f"--{name}", "0")]
    command = [sys.executable, "-m", "controllers.cml.simulator", *times]
    child = ChildProcess.start(command, name="cml", log_path=folder / "cml.log")
    try:

        def announced() -> str:
            return next((line.split()[1] for line in child.log_tail() if line.startswith("ready ")), "")

        yield await until(announced, "the CML simulator", timeout=30)
    finally:
        child.kill()
