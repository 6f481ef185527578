"""Workers at rest over a simulated EC2, looked at by the real provisioner while a virtual clock stands still.

`see` is what a reconcile does first; nothing else of the workers' controller runs, unless in `running`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

import structlog

from controllers.aws.ec2 import Ec2
from controllers.aws.simulator import DEMO_AMI, AwsShim, ShimOptions
from controllers.aws.simulator.instances import Launch
from controllers.cml.sessions import CmlSessions
from controllers.labs.kind import LAB_RECORD
from controllers.plugin import ControllersSettings
from controllers.workers.claims import Claims
from controllers.workers.cml_side import CmlSide
from controllers.workers.controller import WorkersController
from controllers.workers.decisions import tags_of
from controllers.workers.kind import INSTANCE_FINALIZER, LAB_WORKER, LabWorker
from controllers.workers.provisioning import Provisioner, Sighting
from controllers.workers.spec import LabWorkerSpec
from controllers.workers.status import LabWorkerStatus
from controllers.workers.work import Work
from equipment.aws import REGION
from equipment.counting import counting
from lrm.cache import Cache
from lrm.client import Client
from lrm.clock import WallJumps
from lrm.controller import Context, Key
from lrm.election import StaticElection, StaticTerm
from lrm.events import Recorder
from lrm.reconcile import Runner
from lrm.registry import Registry
from lrm.resource import ObjectMeta
from lrm.secrets import Secrets
from lrm.testing import VirtualClock
from storage.clock import SystemClock
from storage.memory import MemoryStorage

INTERVAL = 60.0
"""`worker_rest_interval`, seconds."""
INSTALLATION = "33333333-4444-4555-8666-777777777777"


@dataclass
class LooksScene:
    """See the module."""

    clock: VirtualClock
    storage: MemoryStorage
    registry: Registry
    cache: Cache
    shim: AwsShim
    settings: ControllersSettings
    provisioner: Provisioner
    term: StaticTerm
    hinted: list[str] = field(default_factory=list)
    """Names of the workers that were asked to look themselves."""

    async def rest(
        self,
        name: str,
        state: str = "running",
        *,
        adopts: bool = False,
        marked: bool = True,
        region: str = REGION,
        **spec: object,
    ) -> LabWorker:
        """A worker at rest whose instance bears its tags if `marked`, and is in this state, `running` or `stopped`."""
        aws = {"instanceId": "i-0123456789abcdef0"} if adopts else {"amiId": DEMO_AMI}
        worker = LabWorker(
            metadata=ObjectMeta(
                name=name,
                uid=str(uuid.uuid4()),
                generation=1,
                creation_timestamp=self.clock.now(),
                finalizers=[INSTANCE_FINALIZER],
            ),
            spec=LabWorkerSpec.model_validate({"region": region, "aws": aws, **spec}),
            status=LabWorkerStatus(phase="Ready", observed_generation=1),
        )
        if state == "stopped":
            worker.spec.desired_phase, worker.status.phase = "Stopped", "Stopped"
        ec2 = worker.status.ec2
        ec2.instance_id, ec2.state = self.launch(worker, tags=None if marked else {"Name": "somebody's"}), state
        found = self.shim.instances.find(ec2.instance_id)
        assert found is not None
        if state == "stopped":
            self.shim.instances.stop(region, [ec2.instance_id])
        else:
            ec2.public_ip, ec2.private_ip = found.public_ip, found.private_ip
        if adopts:
            worker.spec.aws.instance_id = ec2.instance_id
        ec2.first_seen_at = self.clock.now() - timedelta(days=1)
        await self.storage.create(self.registry.key_of(worker), LAB_WORKER.encode(worker))
        await self.cache.barrier(30)
        return await self.get(name)

    def launch(self, worker: LabWorker, tags: dict[str, str] | None = None) -> str:
        """The id of a new running instance that bears a worker's tags, or others."""
        launch = Launch(image_id=DEMO_AMI, instance_type="m5zn.metal")
        tags = tags or tags_of(worker, INSTALLATION)
        (made,) = self.shim.instances.run(worker.spec.region, launch, tags, count=1, token="", fingerprint="")
        return made.id

    async def get(self, name: str) -> LabWorker:
        return await self.client().get(LabWorker, "default", name)

    def client(self) -> Client:
        return Client(self.storage, self.registry, self.clock, owner="workers")

    async def wish(self, name: str, phase: Literal["Draining", "Stopped", "Terminated"]) -> None:
        """Wish as a user does."""
        await self.client().update(await self.get(name), lambda w: setattr(w.spec, "desired_phase", phase))

    async def enter(self, name: str, phase: str) -> None:
        """Put a worker into a phase."""
        now = self.clock.now()
        await self.client().update_status(await self.get(name), lambda w: w.status.enter(phase, "Test", now))

    def work(self, worker: LabWorker, *, asked: bool = False) -> Work:
        """The beginning of a reconcile."""
        context = Context(
            client=self.client().bind(owner="workers", fence=self.term),
            cache=self.cache,
            clock=self.clock,
            term=self.term,
            observe_only=False,
            renew_deadline=10,
            jumps=WallJumps(self.clock),
            bound_log=structlog.get_logger(),
            events=Recorder(None, "workers"),
        )
        return Work(worker, context, asked=asked)

    async def see(self, name: str, *, asked: bool = False) -> Sighting | None:
        """What a reconcile sees of EC2, and takes down."""
        return await self.provisioner.see(self.work(await self.get(name), asked=asked))

    async def interval(self, share: float = 1.0) -> None:
        """Let that much of an interval pass."""
        await self.clock.advance(INTERVAL * share)

    def calls(self) -> dict[str, int]:
        """Calls that EC2 received since the last question, by action."""
        counted = dict(self.shim.calls)
        self.shim.calls.clear()
        return counted

    async def lead_again(self) -> None:
        """Lead in another term, as after somebody else did."""
        election = StaticElection(self.storage, self.clock, root="/lrm", lock_name="workers", identity="again")
        self.term = await election.acquire()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Runner[LabWorker]]:
        """The workers' controller at work; no worker may have a CML that it would ask."""
        async with CmlSessions(self.settings, Secrets([]), self.clock) as sessions:
            cml = CmlSide(sessions, Secrets([]), self.settings)
            controller = WorkersController(self.provisioner, cml, Claims(self.storage, "/lrm"), self.settings)
            runner = Runner(controller, self.client(), self.cache, self.clock)
            task = asyncio.create_task(runner.run(self.term))
            try:
                yield runner
            finally:
                task.cancel()
                await asyncio.wait([task])

    def counting(self) -> AbstractAsyncContextManager[Counter[str]]:
        """The writes to resources in a block."""
        return counting(self.cache)


@asynccontextmanager
async def looks_scene(moto_url: str = "http://127.0.0.1:1") -> AsyncIterator[LooksScene]:
    """The scene, without a worker. EC2 is of one mind at once, and its passing states take no time; STS is moto's."""
    clock, storage, registry = VirtualClock(), MemoryStorage(), Registry((LAB_WORKER, LAB_RECORD))
    cache = Cache(storage, registry, SystemClock())
    settings = ControllersSettings(worker_rest_interval=INTERVAL)
    async with (
        AwsShim.run(ShimOptions(moto_url=moto_url, delay=0)) as shim,
        Ec2(clock, endpoint_url=shim.url) as ec2,
    ):
        provisioner = Provisioner(ec2, settings, INSTALLATION)
        election = StaticElection(storage, clock, root="/lrm", lock_name="workers", identity="test")
        following = asyncio.create_task(cache.run())
        try:
            await cache.wait_synced()
            term = await election.acquire()
            scene = LooksScene(clock, storage, registry, cache, shim, settings, provisioner, term)

            def hear(key: Key) -> None:
                scene.hinted.append(key[1])

            provisioner.looks.hints.listen(hear)
            yield scene
        finally:
            following.cancel()
            await asyncio.wait([following])
            await storage.aclose()
