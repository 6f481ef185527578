"""The whole plug-in at work in this process: real runners over a store, the simulated EC2, simulated CMLs.

Everything is the product's own code on real time with short intervals; `WorkersWorld` creates and changes workers as
a user would, looks into the simulators, and waits for conditions.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, cast

import orjson
import pytest

from controllers.aws.ec2 import Ec2, LaunchParameters
from controllers.aws.errors import AwsUnavailable
from controllers.aws.simulator import DEMO_AMI, DEMO_KEY, AwsShim, ShimOptions
from controllers.aws.simulator.instances import Instance
from controllers.cml.simulator import Machine, Options, Simulator
from controllers.plugin import ControllersSettings, plugin
from controllers.workers.kind import LabWorker
from controllers.workers.spec import LabWorkerSpec
from controllers.workers.status import LabWorkerStatus
from equipment.aws import HERE
from equipment.counting import counting
from equipment.waiting import until
from lrm.bookmarks import Bookmarks
from lrm.cache import Cache
from lrm.client import Client
from lrm.clock import HOLD_SECONDS, WallJumps
from lrm.controller import Controller
from lrm.election import StaticElection, StaticTerm
from lrm.errors import ResourceNotFound
from lrm.events import Events
from lrm.led import Led
from lrm.outside import OutsideHealth
from lrm.plugin import PluginContext
from lrm.reconcile import Runner
from lrm.registry import Registry
from lrm.resource import ObjectMeta
from lrm.secrets import Secrets
from lrm.telemetry import Telemetry
from storage.base import Storage
from storage.clock import SystemClock
from storage.memory import MemoryStorage
from storage.redis_bookmarks import RedisBookmarks

REGION = "us-east-1"
PASSWORD_ENV, TOKEN_ENV, BAD_TOKEN_ENV = "WORLD_CML_PASSWORD", "WORLD_CML_TOKEN", "WORLD_CML_BAD_TOKEN"
TOKEN = "dG9rZW4tb2YtdGhlLXdvcmxk"
INSTALLATION = "11111111-2222-4333-8444-555555555555"

FAST_CML = Options(
    boot_bad_gateway=0.05,
    boot_not_ready=0.05,
    registration=0.05,
    node_queued=0.02,
    node_boot=0.02,
    node_stop=0.02,
    node_wipe=0.02,
    nodes_unlicensed=1000,
    ec2_state_ttl=0.02,
)
FAST: dict[str, Any] = {
    "worker_poll_interval": 0.05,
    "worker_rest_interval": 0.2,
    "worker_examine_interval": 0.5,
    "worker_ec2_deadline": 60,
    "worker_boot_deadline": 60,
    "worker_license_deadline": 60,
    "worker_trace_timeout": 60,
    "worker_gone_after": 1,
    "labs_refresh_interval": 3600,
    "labs_step_interval": 0.05,
    "labs_drain_interval": 0.1,
}


class SetClock(SystemClock):
    """The system's clock, as somebody sets its wall time."""

    offset = timedelta()

    def now(self) -> datetime:
        return super().now() + self.offset


@dataclass
class WorkersWorld:
    """See the module."""

    storage: Storage
    registry: Registry
    cache: Cache
    shim: AwsShim
    cml: Simulator
    runners: list[Runner[Any]]
    term: StaticTerm
    clock: SetClock
    telemetry: Telemetry
    others: list[Led]
    """What is run beside the controllers."""
    settings: ControllersSettings

    @property
    def client(self) -> Client:
        """What a user's writes go through."""
        return Client(self.storage, self.registry, self.clock)

    async def create(self, name: str = "w1", **spec: Any) -> LabWorker:
        """Post a worker; `aws` and `cml` are merged into what works."""
        aws = {"amiId": DEMO_AMI, "keyName": DEMO_KEY, **spec.pop("aws", {})}
        cml = {"passwordFrom": {"env": PASSWORD_ENV}, **spec.pop("cml", {})}
        document = {"labTrack": "ccna", "region": REGION, "aws": aws, "cml": cml, **spec}
        worker = LabWorker(metadata=ObjectMeta(name=name), spec=LabWorkerSpec.model_validate(document))
        return await self.client.create(worker)

    async def adopt(self, name: str, instance_id: str, **spec: Any) -> LabWorker:
        """Post a worker for an existing instance."""
        return await self.create(name, aws={"amiId": None, "keyName": None, "instanceId": instance_id}, **spec)

    async def get(self, name: str = "w1") -> LabWorker:
        return await self.client.get(LabWorker, "default", name)

    async def status(self, name: str = "w1") -> LabWorkerStatus:
        return (await self.get(name)).status

    async def change(self, mutate: Callable[[LabWorker], None], name: str = "w1") -> LabWorker:
        """Change spec or annotations as a user would."""
        return cast("LabWorker", await self.client.update(await self.get(name), mutate))

    async def wish(self, phase: str, name: str = "w1") -> None:
        await self.change(lambda w: setattr(w.spec, "desired_phase", phase), name)

    async def annotate(self, key: str, value: str, name: str = "w1") -> None:
        await self.change(lambda w: w.metadata.annotations.update({key: value}), name)

    async def delete(self, name: str = "w1") -> None:
        await self.client.delete(await self.get(name))

    async def until(
        self, condition: Callable[[LabWorker], Any], what: str, name: str = "w1", timeout: float = 45
    ) -> LabWorker:
        """The worker, once the condition holds of it."""
        seen: list[LabWorker] = []

        async def holds() -> bool:
            seen[:] = [await self.get(name)]
            return bool(condition(seen[0]))

        try:
            await until(holds, what, timeout)
        except AssertionError as error:
            status = seen[0].status.wire() if seen else None
            raise AssertionError(f"{name}: {error}; its status: {status}") from None
        return seen[0]

    async def phase(self, *phases: str, name: str = "w1", timeout: float = 45) -> LabWorker:
        """The worker, once it is in one of the phases."""
        return await self.until(lambda w: w.status.phase in phases, f"phase {' or '.join(phases)}", name, timeout)

    async def serving(self, name: str = "w1", **spec: Any) -> LabWorker:
        """A new worker that serves."""
        await self.create(name, **spec)
        return await self.phase("Ready", "ReadyUnlicensed", name=name)

    async def gone(self, name: str = "w1", timeout: float = 45) -> None:
        async def absent() -> bool:
            try:
                await self.get(name)
            except ResourceNotFound:
                return True
            return False

        try:
            await until(absent, f"the end of {name}", timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}; its status: {(await self.status(name)).wire()}") from None

    async def registering(self, status: str, name: str = "w1") -> Machine:
        """The worker's CML, once it tells this of a registration that was sent to it."""
        worker = await self.until(lambda w: w.status.cml.registration is not None, "the registration", name)
        machine = self.machine(worker)
        await until(lambda: machine.licensing.status == status, f"the registration {status}")
        return machine

    async def looked_again(self, times: int = 2) -> None:
        """Until the workers' controller has begun and ended some more reconciles."""
        stats = self.runners[0].stats
        wanted = stats.reconciles + times + 1
        await until(lambda: stats.reconciles >= wanted, "more reconciles")

    async def listed(self, name: str = "w1") -> None:
        """Until its labs were listed, which those do who share its status, and what that changes has been seen.

        After that nobody writes to a worker at rest.
        """
        await self.until(lambda w: w.status.labs_synced_at is not None, "the labs listed", name)
        await self.quiet()

    async def at_rest(self) -> None:
        """Until the cache holds everything written, and no reconcile that it led to is left."""
        for _ in range(2):
            await self.cache.barrier(30)
            await until(lambda: not any(len(r.queue) or r.queue.processing for r in self.runners), "nothing in hand")
        await self.cache.barrier(30)

    async def quiet(self) -> None:
        """The same, and the workers' controller has looked once more."""
        await self.at_rest()
        await self.looked_again(1)
        await self.at_rest()

    def shorten(self, **settings: float) -> None:
        """Let deadlines be so short from now on: what came before had the time that a busy machine takes."""
        vars(self.settings).update(settings)

    def show_instances(self) -> None:
        """Let EC2 describe at once what `describe_lag` hides."""
        self.shim.instances.describe_lag = 0.0
        self.shim.instances._save([replace(i, visible=0.0) for i in self.instances()])

    def let_run(self) -> None:
        """Let every passing state of EC2's be over, and those to come be short, however long `delay` was."""
        self.shim.instances.delay = 0.05
        self.shim.instances._save([replace(i, due=0.0) for i in self.instances()])

    # The world outside

    def instances(self, *states: str) -> list[Instance]:
        """The simulated EC2's instances, all or in some states."""
        return [i for i in self.shim.instances.everywhere() if not states or self.state(i) in states]

    def state(self, instance: Instance) -> str:
        return instance.state_at(self.shim.instances.now)

    def live(self) -> list[str]:
        """Ids of the instances that cost money."""
        return [i.id for i in self.instances("pending", "running", "stopping", "stopped")]

    def machine(self, worker: LabWorker) -> Machine:
        return self.cml.machine(worker.status.ec2.instance_id or "")

    def aws_fault(self, action: str, fault: str, times: int = 1, **how: Any) -> Any:
        """Switch on a fault of EC2; `times` 0 is for ever."""
        return self.shim.faults.add({"action": action, "fault": fault, "times": times, **how})

    def cml_fault(self, kind: Any, **how: Any) -> Any:
        return self.cml.faults.add(kind, **how)

    def counting(self) -> AbstractAsyncContextManager[Counter[str]]:
        """The writes to resources that the store sees meanwhile, by plural and type."""
        return counting(self.cache)


def condition(worker: LabWorker, kind: str) -> tuple[str, str]:
    """Status and reason of a condition."""
    found = worker.status.condition(kind)
    return (found.status, found.reason) if found else ("", "")


def history(worker: LabWorker) -> list[str]:
    """The phases that a worker has been in, in order."""
    steps = worker.status.phase_history
    return [steps[0].source, *(s.to for s in steps)] if steps else [worker.status.phase]


async def someone_elses(world: WorkersWorld, token: str = "mine", **tags: str) -> str:
    """The id of an instance that lrm did not launch and that runs."""
    parameters = LaunchParameters(
        ami_id=DEMO_AMI, instance_type="m5zn.metal", client_token=token, key_name=DEMO_KEY, tags=tags
    )
    async with Ec2(world.clock, endpoint_url=world.shim.url) as ec2:

        async def launched() -> str | None:
            try:
                return (await ec2.run_instance(HERE, parameters)).id
            except AwsUnavailable:  # certainly not sent: the first client of a process may take a while to make
                return None

        made: str = await until(launched, "the launch", 60)
    await until(lambda: any(i.id == made for i in world.instances("running")), "the instance running")
    return made


def tags_of(world: WorkersWorld, instance_id: str) -> dict[str, str]:
    """The tags of an instance, in EC2."""
    return next(dict(i.tags) for i in world.instances() if i.id == instance_id)


async def claims(world: WorkersWorld) -> dict[str, str]:
    """Who holds what: instance id to uid."""
    page = await world.storage.list(f"{world.registry.root}/claim/ec2/")
    return {e.key.rpartition("/")[2]: orjson.loads(e.value)["uid"] for e in page.entries}


@asynccontextmanager
async def unreadable(world: WorkersWorld, name: str) -> AsyncIterator[None]:
    """A worker as a later version would have written it, which this one cannot decode."""
    key = world.registry.key_of(await world.get(name))
    value = (await world.storage.get(key)).value
    await world.storage.set(key, orjson.dumps({**orjson.loads(value), "spec": "of a later version"}))
    await world.cache.barrier(30)
    yield
    await world.storage.set(key, value)


@asynccontextmanager
async def workers_world(
    monkeypatch: pytest.MonkeyPatch,
    moto_url: str,
    *,
    storage: Storage | None = None,
    root: str = "/lrm",
    shim_options: ShimOptions | None = None,
    cml_options: Options = FAST_CML,
    observe_only: bool = False,
    plain_moto: bool = False,
    address: str = "instance_id",
    led: Collection[str] = (),
    renew_deadline: float = 10.0,
    jump_hold: float = HOLD_SECONDS,
    **settings: Any,
) -> AsyncIterator[WorkersWorld]:
    """Everything running; `settings` are of the plug-in. A store that is given is left open.

    Of what the plug-in does under a lock beside reconciling, `led` names what is run too.
    With `plain_moto` the workers' EC2 is moto itself, which ignores client tokens, and every CML is alive.
    `address` is the part of a worker's status by which its CML is reached.
    """
    for name, value in ((PASSWORD_ENV, cml_options.password), (TOKEN_ENV, TOKEN), (BAD_TOKEN_ENV, "INVALID00")):
        monkeypatch.setenv(name, value)
    # Tests of workers reserve for requests that do not exist, which would be given back after two looks.
    monkeypatch.setattr("controllers.instances.allocations._LOOK_AGAIN", 3600.0)
    store = storage or MemoryStorage()
    clock, registry = SetClock(), Registry(plugin.kinds, root=root)
    cache, client = Cache(store, registry, clock), Client(store, registry, clock)
    events = Events(store, clock, root=root, instance="world")
    options = shim_options or ShimOptions(moto_url=moto_url, delay=0.05)
    async with AwsShim.run(options) as shim:
        monkeypatch.setenv("AWS_ENDPOINT_URL", moto_url if plain_moto else shim.url)
        if not plain_moto:
            cml_options = replace(cml_options, ec2_state_url=f"{shim.url}/_shim/instances")
        async with Simulator.run(cml_options) as cml:
            template = f"{cml.url}/{{{address}}}"
            values = {**FAST, "cml_url_template": template, **settings}
            known = ControllersSettings(**values)
            context = PluginContext(
                settings=known,
                storage=store,
                registry=registry,
                cache=cache,
                clock=clock,
                secrets=Secrets([PASSWORD_ENV, TOKEN_ENV, BAD_TOKEN_ENV]),
                installation=INSTALLATION,
                root=root,
                # Nothing listens there: who asks for a bookmark learns that Redis is away.
                bookmarks=Bookmarks(RedisBookmarks("redis://127.0.0.1:1/0", clock), store, clock, every=3600),
                telemetry=(telemetry := Telemetry()),
                health=OutsideHealth(clock),
                events=events,
            )
            with _unwrapped():
                async with asyncio.TaskGroup() as tasks, plugin.controllers(context) as controllers:
                    runners = [
                        Runner(
                            c,
                            client,
                            cache,
                            clock,
                            observe_only=observe_only,
                            renew_deadline=renew_deadline,
                            events=events,
                        )
                        for c in controllers
                        if isinstance(c, Controller)
                    ]
                    others = [c for c in controllers if not isinstance(c, Controller) and c.name in led]
                    for runner in runners:
                        runner._jumps = WallJumps(clock, hold=jump_hold)
                    election = StaticElection(store, clock, root=root, lock_name="workers", identity="test")
                    term = await election.acquire()
                    running = [
                        tasks.create_task(cache.run()),
                        tasks.create_task(events.run()),
                        *(tasks.create_task(r.run(term)) for r in (*runners, *others)),
                    ]
                    await cache.wait_synced()
                    try:
                        yield WorkersWorld(
                            store, registry, cache, shim, cml, runners, term, clock, telemetry, others, known
                        )
                    finally:
                        for task in running:
                            task.cancel()
                        await asyncio.wait(running)
    if storage is None:
        await store.aclose()


@contextmanager
def _unwrapped() -> Iterator[None]:
    """A test's own failure as it is, not as a group of one."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from None
