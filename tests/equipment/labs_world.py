"""The labs controllers at work: a store, the cache, both runners, and simulated CMLs; workers are put there ready-made.

The workers' own controller is not part of it: `worker()` writes what that would have written. Everything else is the
real thing, on real time with short intervals. `sync()` asks for a sync by annotation and waits for its end.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

import orjson
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from controllers.cml.client import Timeouts
from controllers.cml.sessions import CmlSessions
from controllers.cml.simulator import Machine, Options, Simulator
from controllers.cml.simulator.labs import Lab
from controllers.instances.ended import ended
from controllers.instances.kind import LAB_INSTANCE_REQUEST
from controllers.labs.controller import LabsController
from controllers.labs.imports import LabImportsController
from controllers.labs.imports_kind import LAB_IMPORT, LabImport
from controllers.labs.kind import LAB_RECORD, LABS, LabRecord, records_of_worker
from controllers.labs.measures import LabMeasures
from controllers.labs.push import LabsPush
from controllers.labs.records import LabRecordsController
from controllers.labs.settings import LabsSettings
from controllers.workers.kind import INSTANCE_FINALIZER, LAB_WORKER, WORKERS, LabWorker
from controllers.workers.settings import WorkerSettings
from controllers.workers.spec import LabWorkerSpec
from controllers.workers.status import Identity
from equipment.counting import counting
from equipment.waiting import until
from lrm.cache import Cache
from lrm.client import Client
from lrm.election import StaticElection, StaticTerm
from lrm.errors import ResourceNotFound
from lrm.events import Events, events_prefix
from lrm.reconcile import Runner
from lrm.registry import Registry
from lrm.resource import RECONCILE_ANNOTATION, ObjectMeta
from lrm.secrets import Secrets
from lrm.telemetry import Telemetry
from storage.base import Storage
from storage.clock import SystemClock
from storage.memory import MemoryStorage

FAST = Options(
    boot_bad_gateway=0,
    boot_not_ready=0,
    node_queued=0.02,
    node_boot=0.02,
    node_stop=0.02,
    node_wipe=0.02,
    nodes_unlicensed=10_000,
)
INSTALLATION = "33333333-4444-4555-8666-777777777777"
PASSWORD_ENV = "LABS_WORLD_PASSWORD"


class SettableClock(SystemClock):
    """The machine's clocks, of which wall time can be set, and time can be let pass."""

    ahead = timedelta(0)
    passed = 0.0

    def now(self) -> datetime:
        return super().now() + self.ahead + timedelta(seconds=self.passed)

    def monotonic(self) -> float:
        return super().monotonic() + self.passed


@dataclass
class LabsWorld:
    """See the module."""

    storage: Storage
    registry: Registry
    cache: Cache
    simulator: Simulator
    labs: Runner[LabWorker]
    records_runner: Runner[LabRecord]
    imports: Runner[LabImport]
    sessions: CmlSessions
    term: StaticTerm
    clock: SettableClock
    events: Events
    telemetry: Telemetry
    spans: InMemorySpanExporter
    push: LabsPush

    @property
    def client(self) -> Client:
        """What a user's or another controller's writes go through."""
        return Client(self.storage, self.registry, self.clock, owner=WORKERS)

    def machine(self, worker: str = "w1") -> Machine:
        return self.simulator.machine(instance_of(worker))

    def edit(self, lab: Lab, worker: str = "w1", **values: Any) -> None:
        """Change a lab as a user of CML would."""
        for name, value in values.items():
            setattr(lab, name, value)
        lab.touch("lab", "modified", lab.id, self.clock.monotonic(), self.clock.now())
        self.machine(worker).look()

    def fault(self, kind: Any, worker: str = "w1", **how: Any) -> Any:
        return self.simulator.faults.add(kind, instance=instance_of(worker), **how)

    async def worker(self, name: str = "w1", *, username: str = "admin", phase: str = "Ready") -> LabWorker:
        """A worker whose CML is a machine of the simulator, as the workers' controller would have left it."""
        spec = LabWorkerSpec.model_validate(
            {
                "region": "us-east-1",
                "aws": {"amiId": "ami-12345678"},
                "cml": {
                    "username": username,
                    "passwordFrom": {"env": PASSWORD_ENV},
                    "apiBaseUrl": self.simulator.url_of(instance_of(name)),
                },
            }
        )
        made = await self.client.create(
            LabWorker(metadata=ObjectMeta(name=name, finalizers=[INSTANCE_FINALIZER]), spec=spec)
        )
        machine = self.machine(name)

        def ready(w: LabWorker) -> None:
            w.status.ec2.instance_id, w.status.ec2.state = instance_of(name), "running"
            w.status.cml.identity = Identity(product_uuid=machine.product_uuid)
            for step in ("Starting", "ReadyUnlicensed", phase):
                w.status.enter(step, "Test", self.clock.now())

        return await self.client.update_status(made, ready)

    async def change_worker(self, mutate: Callable[[LabWorker], None], name: str = "w1") -> LabWorker:
        """A change of status as the workers' controller makes it."""
        return await self.client.update_status(await self.client.get(LabWorker, "default", name), mutate)

    async def get_worker(self, name: str = "w1") -> LabWorker:
        return await self.client.get(LabWorker, "default", name)

    async def ask(self, name: str = "w1") -> str:
        """Ask for a sync and do not wait for it."""
        value = str(uuid.uuid4())
        await self.client.update(
            await self.get_worker(name), lambda w: w.metadata.annotations.update({RECONCILE_ANNOTATION: value})
        )
        return value

    async def sync(self, name: str = "w1", timeout: float = 60.0) -> LabWorker:
        """One sync that succeeds, and the worker as it was left."""
        value = await self.ask(name)

        async def honoured() -> LabWorker | None:
            worker = await self.get_worker(name)
            return worker if value in (worker.status.labs_asked or "").split() else None

        synced = cast("LabWorker", await until(honoured, f"a sync of {name}", timeout))
        await self.cache.barrier(30)
        return synced

    async def later_sync(self, name: str = "w1") -> LabWorker:
        """One sync that succeeds, a minute later: its list is another one, also where most labs are missing."""
        self.clock.passed += 60
        return await self.sync(name)

    async def failing_sync(self, part: str = "", name: str = "w1") -> LabWorker:
        """One sync that fails with `part` in its error, and the worker as it was left."""
        await self.ask(name)

        async def told() -> LabWorker | None:
            worker = await self.get_worker(name)
            error = worker.status.labs_sync_error
            return worker if error is not None and part in error else None

        failed = cast("LabWorker", await until(told, f"a failed sync of {name} that tells of {part!r}"))
        await self.cache.barrier(30)
        return failed

    async def records(self, name: str = "w1") -> dict[str, LabRecord]:
        """The store's records of a worker, by lab."""
        found = await self.client.list(LabRecord, "default")
        return {r.spec.lab_id: r for r in found if r.spec.worker_ref == name}

    async def record(self, lab_id: str, name: str = "w1") -> LabRecord:
        return (await self.records(name))[lab_id]

    async def gone(self, record: LabRecord, timeout: float = 60.0) -> None:
        """Return when the record is."""

        async def absent() -> bool:
            try:
                await self.client.get(LabRecord, record.namespace, record.name)
            except ResourceNotFound:
                return True
            return False

        await until(absent, f"the end of record {record.name}", timeout)

    async def settled(self) -> None:
        """Until the cache holds everything written and both queues have nothing ready and nothing in hand."""
        runners = (self.labs, self.records_runner, self.imports)
        for _ in range(2):
            await self.cache.barrier(30)
            await until(lambda: not any(len(r.queue) or r.queue.processing for r in runners))

    def known(self, name: str = "w1") -> list[LabRecord]:
        return records_of_worker(self.cache, "default", name)

    async def told(self, about: str, kind: str = "LabRecord") -> list[tuple[str, str, str]]:
        """(type, reason, message) of the events about an object, in the order in which they were told first."""
        await self.events.flush(10)
        page = await self.storage.list(events_prefix(self.registry.root, "default", about))
        values = [orjson.loads(entry.value) for entry in page.entries]
        return [
            (v["type"], v["reason"], v["message"])
            for v in values
            if (v["involvedObject"]["kind"], v["involvedObject"]["name"]) == (kind, about)
        ]

    def counting(self) -> AbstractAsyncContextManager[Counter[str]]:
        """The writes that the store sees meanwhile."""
        return counting(self.cache)


def instance_of(worker: str) -> str:
    """The id of a worker's instance in this world."""
    return f"i-{worker.encode().hex().rjust(17, '0')[-17:]}"


def registry_at(root: str = "/lrm") -> Registry:
    return Registry((LAB_WORKER, LAB_RECORD, LAB_IMPORT, LAB_INSTANCE_REQUEST), root=root)


@asynccontextmanager
async def labs_world(
    monkeypatch: pytest.MonkeyPatch,
    *,
    storage: Storage | None = None,
    root: str = "/lrm",
    options: Options = FAST,
    simulator: Simulator | None = None,
    observe_only: bool = False,
    clock: SettableClock | None = None,
    push: bool = False,
    timeouts: Timeouts | None = None,
    **settings: Any,
) -> AsyncIterator[LabsWorld]:
    """Everything running; `settings` are of `LabsSettings`. A store that is given is left open."""
    monkeypatch.setenv(PASSWORD_ENV, options.password)
    async with _simulator(simulator, options) as cml, _storage(storage) as store:
        clock, registry = clock or SettableClock(), registry_at(root)
        cache = Cache(store, registry, clock)
        client = Client(store, registry, clock)
        values = {"labs_refresh_interval": 3600, "labs_step_interval": 0.02, "labs_step_timeout": 5, **settings}
        labs_settings = LabsSettings(**values)
        events, telemetry, spans = Events(store, clock, root=root), Telemetry(), InMemorySpanExporter()
        tracers = TracerProvider(shutdown_on_exit=False)
        tracers.add_span_processor(SimpleSpanProcessor(spans))
        async with CmlSessions(WorkerSettings(), Secrets([PASSWORD_ENV]), clock, timeouts=timeouts) as sessions:
            measures = LabMeasures(telemetry.meter)
            controller = LabsController(
                cache=cache,
                sessions=sessions,
                settings=labs_settings,
                clock=clock,
                measures=measures,
                tracer=tracers.get_tracer("test"),
                is_ended=lambda record: ended(record, cache, INSTALLATION),
            )
            labs = Runner(controller, client, cache, clock, observe_only=observe_only, events=events)
            listening = LabsPush(
                cache=cache, sessions=sessions, hints=controller.hints, clock=clock, measures=measures, enabled=push
            )
            telemetry.observe(listening.observe)
            records = Runner(
                LabRecordsController(cache=cache, sessions=sessions, settings=labs_settings, measures=measures),
                client,
                cache,
                clock,
                observe_only=observe_only,
                events=events,
            )
            imports = Runner(
                LabImportsController(cache=cache, sessions=sessions, settings=labs_settings),
                client,
                cache,
                clock,
                observe_only=observe_only,
                events=events,
            )
            election = StaticElection(store, clock, root=root, lock_name=LABS, identity="test")
            term = await election.acquire()
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(cache.run()),
                    tasks.create_task(sessions.run()),
                    tasks.create_task(events.run()),
                    tasks.create_task(listening.run(term)),
                    tasks.create_task(labs.run(term)),
                    tasks.create_task(records.run(term)),
                    tasks.create_task(imports.run(term)),
                ]
                await until(lambda: not cache.error, "the cache to follow the store")
                try:
                    yield LabsWorld(
                        store,
                        registry,
                        cache,
                        cml,
                        labs,
                        records,
                        imports,
                        sessions,
                        term,
                        clock,
                        events,
                        telemetry,
                        spans,
                        listening,
                    )
                finally:
                    for task in running:
                        task.cancel()


@asynccontextmanager
async def _simulator(given: Simulator | None, options: Options) -> AsyncIterator[Simulator]:
    if given is not None:
        yield given
        return
    async with Simulator.run(options) as made:
        yield made


@asynccontextmanager
async def _storage(given: Storage | None) -> AsyncIterator[Storage]:
    if given is not None:
        yield given
        return
    made = MemoryStorage()
    try:
        yield made
    finally:
        await made.aclose()
