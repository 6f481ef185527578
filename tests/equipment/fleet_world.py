"""Many workers that serve, as the workers' controller would have left them, and the fleet's metrics over them.

Their instances are a simulated AWS's and their CMLs a simulator's, in this process or (`servers`) in others.
`refresh` is one whole cycle; `leading` runs the metrics as a daemon's leader does.
"""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from controllers.aws.cloudwatch import CloudWatch
from controllers.aws.ec2 import Ec2
from controllers.aws.simulator import DEMO_AMI, AwsShim
from controllers.aws.simulator.instances import ACCOUNT, Launch
from controllers.cml.sessions import CmlSessions
from controllers.cml.simulator.machine import identity
from controllers.metrics.controller import FleetMetrics
from controllers.metrics.settings import MetricsSettings
from controllers.metrics.sources import Sources
from controllers.plugin import ControllersSettings
from controllers.workers.decisions import INSTALLATION_TAG
from controllers.workers.kind import INSTANCE_FINALIZER, LAB_WORKER, LabWorker
from controllers.workers.spec import LabWorkerSpec
from controllers.workers.status import Identity, LabWorkerStatus
from equipment.aws import REGION, boto, shim_process
from equipment.certificates import Pair
from equipment.counting import counting
from equipment.waiting import until
from lrm.cache import Cache
from lrm.client import Client
from lrm.election import StaticElection, StaticTerm
from lrm.processes import ChildProcess
from lrm.registry import Registry
from lrm.resource import RECONCILE_ANNOTATION, ObjectMeta
from lrm.secrets import Secrets
from lrm.telemetry import Telemetry
from storage.clock import Clock, SystemClock
from storage.memory import MemoryStorage

INSTALLATION = "22222222-3333-4444-8555-666666666666"
PASSWORD_ENV, PASSWORD = "FLEET_CML_PASSWORD", "admin-secret"


@dataclass
class FleetWorld:
    """See the module."""

    storage: MemoryStorage
    cache: Cache
    clock: Clock
    registry: Registry
    metrics: FleetMetrics
    telemetry: Telemetry
    term: StaticTerm
    aws_url: str
    shim: AwsShim | None
    """The simulated AWS, where it is in this process: what is counted and set there."""
    cml_url: str
    ca_file: str = ""
    """Whose word the CMLs' certificates have, where they speak https."""

    @property
    def client(self) -> Client:
        """Writes as the workers' controller's, and as a user's."""
        return Client(self.storage, self.registry, self.clock, owner="workers")

    async def add(
        self,
        count: int,
        *,
        region: str = REGION,
        prefix: str = "w",
        cml: bool = False,
        marked: bool = True,
        observe_only: bool = False,
        account: str = "",
        number: str = ACCOUNT,
    ) -> list[LabWorker]:
        """Workers with an instance each; without `cml` nobody has said yet which CML is theirs, so none is asked.

        `number` is that of the account whose name they carry.
        """
        if not count:
            return []
        tags = {INSTALLATION_TAG: INSTALLATION} if marked else {"Name": "somebody's"}
        ids = await self.launch(count, region=region, tags=tags, number=number)
        for place, instance_id in enumerate(ids):
            worker = self._worker(f"{prefix}{place}", instance_id, region, cml=cml)
            worker.spec.observe_only, worker.spec.account = observe_only, account
            await self.storage.create(self.registry.key_of(worker), LAB_WORKER.encode(worker))
        await self.cache.barrier(30)
        return [await self.get(f"{prefix}{place}") for place in range(count)]

    async def launch(
        self, count: int, *, region: str = REGION, tags: dict[str, str], number: str = ACCOUNT
    ) -> list[str]:
        """Ids of new running instances."""
        if self.shim is not None:
            launch = Launch(image_id=DEMO_AMI, instance_type="m5zn.metal")
            made = self.shim.worlds.of(number).instances.run(
                region, launch, tags, count=count, token="", fingerprint=""
            )
            return [instance.id for instance in made]
        async with boto(self.aws_url, region=region) as call:
            answer = await call(
                "run_instances",
                ImageId=DEMO_AMI,
                InstanceType="m5zn.metal",
                MinCount=count,
                MaxCount=count,
                TagSpecifications=[
                    {"ResourceType": "instance", "Tags": [{"Key": k, "Value": v} for k, v in tags.items()]}
                ],
            )
        return [instance["InstanceId"] for instance in answer["Instances"]]

    def _worker(self, name: str, instance_id: str, region: str, *, cml: bool) -> LabWorker:
        access: dict[str, Any] = {}
        if cml:
            access = {"passwordFrom": {"env": PASSWORD_ENV}, "apiBaseUrl": f"{self.cml_url}/{instance_id}"}
        if self.ca_file:
            access["tls"] = {"caFile": self.ca_file}
        spec = LabWorkerSpec.model_validate(
            {"labTrack": "ccna", "region": region, "aws": {"amiId": DEMO_AMI}, "cml": access}
        )
        status = LabWorkerStatus(phase="Ready")
        status.ec2.instance_id, status.ec2.state, status.labs_count = instance_id, "running", 3
        if cml:
            status.cml.identity = Identity(product_uuid=identity(instance_id, "product"))
        meta = ObjectMeta(
            name=name,
            uid=str(uuid.uuid4()),
            generation=1,
            creation_timestamp=self.clock.now(),
            finalizers=[INSTANCE_FINALIZER],
        )
        return LabWorker(metadata=meta, spec=spec, status=status)

    async def get(self, name: str = "w0") -> LabWorker:
        return await self.client.get(LabWorker, "default", name)

    async def status(self, name: str = "w0") -> LabWorkerStatus:
        return (await self.get(name)).status

    async def ask(self, names: Iterable[str], value: str) -> None:
        """Ask for a refresh as a user does, and do not wait for it."""
        for name in names:
            await self.client.update(
                await self.get(name), lambda w: w.metadata.annotations.update({RECONCILE_ANNOTATION: value})
            )

    async def refresh(self, workers: Sequence[LabWorker] = ()) -> None:
        """One cycle over all workers, or over these."""
        await self.cache.barrier(30)
        await self.metrics._refresher.refresh(workers or self.cache.all(LabWorker), self.term)
        await self.cache.barrier(30)

    @asynccontextmanager
    async def leading(self) -> AsyncIterator[None]:
        """The metrics of a leader, after their first cycle."""
        before = self.metrics.describe()["cycles"]
        task = asyncio.create_task(self.metrics.run(self.term))
        try:
            await until(lambda: task.done() or self.metrics.describe()["cycles"] > before, "a cycle", timeout=60)
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    def calls(self) -> dict[str, int]:
        """Calls that the simulated AWS received since the last question, by action."""
        assert self.shim is not None
        counted = dict(self.shim.calls)
        self.shim.calls.clear()
        return counted

    def measure(self, worker: LabWorker, *, cpu: float | None, memory: float | None) -> None:
        """Set what CloudWatch tells of a worker's instance."""
        assert self.shim is not None
        assert self.shim.instances.measure(worker.status.ec2.instance_id or "", cpu=cpu, memory=memory)

    def counting(self) -> AbstractAsyncContextManager[Counter[str]]:
        """The writes that the store sees meanwhile, by object."""
        return counting(self.cache, lambda change: f"{change.type} {change.item.name}")

    def gauges(self, name: str) -> dict[str, dict[str, str]]:
        """A gauge as /metrics serves it: value by the worker's name and its labels besides, as text."""
        text = self.telemetry.exposition()[0].decode()
        found: dict[str, dict[str, str]] = {}
        for line in text.splitlines():
            if line.startswith(f"{name}{{"):
                labels = dict(part.split("=", 1) for part in line[len(name) + 1 : line.rindex("}")].split(","))
                plain = {key: value.strip('"') for key, value in labels.items()}
                found[plain["name"]] = {**plain, "value": line.rpartition(" ")[2]}
        return found


@asynccontextmanager
async def servers(folder: Path, tls: Pair | None = None) -> AsyncIterator[tuple[str, str]]:
    """URLs of a simulated AWS and of a CML simulator as processes of their own; nothing here needs their moto.

    With `tls` the CMLs speak https.
    """
    times = [word for name in ("boot-bad-gateway", "boot-not-ready") for word in (f"--{name}", "0")]
    command = [sys.executable, "-m", "controllers.cml.simulator", *times]
    if tls is not None:
        command += ["--tls-cert", str(tls.cert), "--tls-key", str(tls.key)]
    async with shim_process(folder, "http://127.0.0.1:1", "--delay", "0") as (_, aws_url):
        child = ChildProcess.start(command, name="cml", log_path=folder / "cml.log")
        try:

            def announced() -> str:
                return next((line.split()[1] for line in child.log_tail() if line.startswith("ready ")), "")

            yield aws_url, await until(announced, "the CML simulator")
        finally:
            child.kill()


async def calls_of(aws_url: str) -> dict[str, int]:
    """Calls that a simulated AWS received since the last question, by action."""
    url = f"{aws_url}/_shim/calls"
    async with aiohttp.ClientSession() as session:
        async with session.get(url) as reply:
            counted: dict[str, int] = await reply.json()
        async with session.delete(url):
            return counted


@asynccontextmanager
async def fleet_world(
    aws: AwsShim | str, cml_url: str = "", *, ca_file: str = "", clock: Clock | None = None, **settings: Any
) -> AsyncIterator[FleetWorld]:
    """The world over these servers; `settings` are of the plug-in."""
    os.environ[PASSWORD_ENV] = PASSWORD
    aws_url, shim = (aws, None) if isinstance(aws, str) else (aws.url, aws)
    clock, storage, registry = clock or SystemClock(), MemoryStorage(), Registry((LAB_WORKER,))
    cache, telemetry = Cache(storage, registry, clock), Telemetry()
    known: MetricsSettings = ControllersSettings(**{"metrics_refresh_interval": 3600, **settings})
    assert isinstance(known, ControllersSettings)
    async with (
        Ec2(clock, known.aws_accounts, endpoint_url=aws_url) as ec2,
        CloudWatch(clock, known.aws_accounts, endpoint_url=aws_url) as cloud_watch,
        CmlSessions(known, Secrets([PASSWORD_ENV]), clock) as sessions,
    ):
        sources = Sources(
            ec2, cloud_watch, sessions, clock, installation=INSTALLATION, at_once=known.metrics_cml_at_once
        )
        metrics = FleetMetrics(sources, Client(storage, registry, clock), cache, clock, known)
        telemetry.observe(metrics.observe)
        following = asyncio.create_task(cache.run())
        try:
            await cache.wait_synced()
            term = await StaticElection(storage, clock, root="/lrm", lock_name="metrics", identity="test").acquire()
            yield FleetWorld(storage, cache, clock, registry, metrics, telemetry, term, aws_url, shim, cml_url, ca_file)
        finally:
            following.cancel()
            await asyncio.wait([following])
            await storage.aclose()
            del os.environ[PASSWORD_ENV]
