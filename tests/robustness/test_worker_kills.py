"""`kill -9` between every two steps of a launch, a licence, an adoption and an end: nothing is doubled, nothing leaks.

A real daemon over a real etcd dies at a named point, as in a power cut, and another one goes on. The simulated EC2
and CMLs live in this process and survive. `make test` takes a sample of the points, `make soak` all of them.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from controllers.aws.ec2 import Ec2
from controllers.aws.simulator import DEMO_AMI, DEMO_KEY, AwsShim, ShimOptions
from controllers.cml.simulator import Simulator
from controllers.plugin import plugin
from controllers.workers import arrival, cml_side, departure, provisioning
from controllers.workers.decisions import launch_parameters
from controllers.workers.kind import LabWorker
from equipment.daemons import DaemonProcess
from equipment.waiting import until
from equipment.workers_world import FAST_CML, PASSWORD_ENV, REGION, TOKEN, TOKEN_ENV
from lrm.client import Client
from lrm.crashpoints import EXIT_CODE
from lrm.devservers import EtcdServer
from lrm.registry import Registry
from storage.clock import SystemClock
from storage.etcd import EtcdStorage

WORKERS = "/apis/lab.neuroglia.io/v1/namespaces/default/labworkers"
ALL = (
    *provisioning.CRASH_POINTS,
    *cml_side.CRASH_POINTS,
    *arrival.CRASH_POINTS,
    *departure.CRASH_POINTS,
)
SAMPLE = {"workers.launch.recorded", "workers.launch.sent", "workers.terminate.sent"}

SPEED = {
    "LRM_WORKER_POLL_INTERVAL": "0.1",
    "LRM_WORKER_REST_INTERVAL": "0.3",
    "LRM_WORKER_TRACE_TIMEOUT": "60",
    "LRM_WORKER_GONE_AFTER": "1",
    "LRM_LABS_REFRESH_INTERVAL": "1",
    "LRM_LABS_STEP_INTERVAL": "0.1",
}


@dataclass
class Scene:
    """A daemon that can be killed, and the world that it works on."""

    daemon: DaemonProcess
    shim: AwsShim
    cml: Simulator
    etcd: EtcdServer
    root: str

    async def post(self, name: str = "w1", **spec: Any) -> dict[str, Any]:
        aws = spec.pop("aws", {"amiId": DEMO_AMI, "keyName": DEMO_KEY})
        cml = {"passwordFrom": {"env": PASSWORD_ENV}, "licenseTokenFrom": {"env": TOKEN_ENV}}
        document = {
            "apiVersion": "lab.neuroglia.io/v1",
            "kind": "LabWorker",
            "metadata": {"name": name},
            "spec": {"labTrack": "ccna", "region": REGION, "aws": aws, "cml": cml, **spec},
        }
        status, answer = await self.daemon.request("POST", WORKERS, document)
        assert status == 201, answer
        return dict(answer)

    async def get(self, name: str = "w1") -> dict[str, Any] | None:
        """The worker as the API tells it, None when there is none (and only then)."""
        status, answer = await self.daemon.request("GET", f"{WORKERS}/{name}")
        assert status in {200, 404}, answer
        return answer if status == 200 else None

    async def phase(self, phase: str, name: str = "w1", seconds: float = 25) -> dict[str, Any]:
        seen: list[dict[str, Any] | None] = [None]

        async def there() -> bool:
            seen[0] = await self.get(name)
            return seen[0] is not None and seen[0]["status"]["phase"] == phase

        await until(there, f"{name} {phase}", seconds)
        assert seen[0] is not None
        return seen[0]

    async def gone(self, name: str = "w1", seconds: float = 25) -> None:
        async def absent() -> bool:
            return await self.get(name) is None

        await until(absent, f"the end of {name}", seconds)

    async def crashed(self) -> None:
        assert await self.daemon.exit_code(40) == EXIT_CODE, self.daemon.log()[-2000:]

    def live(self) -> list[str]:
        now = self.shim.instances.now
        keep = ("pending", "running", "stopping", "stopped")
        return [i.id for i in self.shim.instances.everywhere() if i.state_at(now) in keep]

    def launched(self) -> int:
        return len(list(self.shim.instances.everywhere()))


@pytest.fixture
async def scene(server_dir: Path, etcd: EtcdServer, etcd_root: str, moto_url: str) -> AsyncIterator[Scene]:
    async with AwsShim.run(ShimOptions(moto_url=moto_url, delay=0.3)) as shim:
        options = replace(FAST_CML, registration=0.3, ec2_state_url=f"{shim.url}/_shim/instances")
        async with Simulator.run(options) as cml:
            daemon = DaemonProcess(
                server_dir,
                endpoint=etcd.endpoint,
                root=etcd_root,
                plugins="controllers.plugin",
                AWS_ENDPOINT_URL=shim.url,
                AWS_REGION=REGION,
                AWS_ACCESS_KEY_ID="testing",
                AWS_SECRET_ACCESS_KEY="testing",
                LRM_CML_URL_TEMPLATE=f"{cml.url}/{{instance_id}}",
                LRM_SECRETS_ALLOW=f"{PASSWORD_ENV},{TOKEN_ENV}",
                **{PASSWORD_ENV: options.password, TOKEN_ENV: TOKEN},
                **SPEED,
            )
            try:
                yield Scene(daemon, shim, cml, etcd, etcd_root)
            finally:
                await daemon.end()


def soak_but(sample: set[str], names: tuple[str, ...]) -> list[Any]:
    return [n if n in sample else pytest.param(n, marks=pytest.mark.soak) for n in names]


def _begins(*prefixes: str) -> tuple[str, ...]:
    return tuple(p for p in ALL if p.startswith(prefixes))


@pytest.mark.parametrize("point", soak_but(SAMPLE, _begins("workers.launch.", "workers.license.")))
async def test_killed_on_the_way_up_it_has_one_instance_and_is_ready_all_the_same(scene: Scene, point: str) -> None:
    await scene.daemon.start_ready(LRM_CRASH_AT=point)
    await scene.post()
    await scene.crashed()
    await scene.daemon.start_ready()
    worker = await scene.phase("Ready")
    assert scene.live() == [worker["status"]["ec2"]["instanceId"]]
    assert scene.launched() == 1
    assert worker["status"]["ec2"]["attempt"] == 1
    assert "failure" not in worker["status"]


@pytest.mark.parametrize("point", soak_but({"workers.launch.sent"}, _begins("workers.launch.")))
async def test_killed_on_the_way_up_and_deleted_while_down_it_leaves_nothing(scene: Scene, point: str) -> None:
    await scene.daemon.start_ready(LRM_CRASH_AT=point)
    await scene.post()
    await scene.crashed()
    await _mark_deleted(scene)
    await scene.daemon.start_ready(LRM_WORKER_TRACE_TIMEOUT="2")
    await scene.gone()
    assert scene.live() == []
    assert scene.launched() <= 1


@pytest.mark.parametrize("point", soak_but(SAMPLE, _begins("workers.unlicense.", "workers.terminate.")))
async def test_killed_on_the_way_down_it_ends_everything_all_the_same(scene: Scene, point: str) -> None:
    await scene.daemon.start_ready(LRM_CRASH_AT=point)
    await scene.post()
    worker = await scene.phase("Ready")
    status, _ = await scene.daemon.request("DELETE", f"{WORKERS}/w1")
    assert status == 200
    await scene.crashed()
    await scene.daemon.start_ready()
    await scene.gone()
    assert scene.live() == []
    assert scene.launched() == 1
    machine = scene.cml.machine(worker["status"]["ec2"]["instanceId"])
    assert not machine.licensing.licensed


@pytest.mark.parametrize("point", soak_but(set(), _begins("workers.adopt.", "workers.retain.", "workers.claim.")))
async def test_killed_while_it_adopts_or_lets_go_the_claim_and_the_instance_are_right(scene: Scene, point: str) -> None:
    async with Ec2(SystemClock(), endpoint_url=scene.shim.url) as ec2:
        parameters = replace(_parameters(), client_token="somebody-else", tags={})
        instance_id = (await ec2.run_instance(REGION, parameters)).id
    await until(lambda: scene.live() == [instance_id], "the instance to adopt")
    await scene.daemon.start_ready(LRM_CRASH_AT=point)
    await scene.post(aws={"instanceId": instance_id})
    if point.startswith("workers.adopt."):
        await scene.crashed()
        await scene.daemon.start_ready()
    await scene.phase("Ready")
    assert await _claims(scene) == [instance_id]
    await scene.daemon.request("DELETE", f"{WORKERS}/w1")
    if not point.startswith("workers.adopt."):
        await scene.crashed()
        await scene.daemon.start_ready()
    await scene.gone()
    assert scene.live() == [instance_id]
    assert await _claims(scene) == []
    assert dict(next(iter(scene.shim.instances.everywhere())).tags) == {}


@pytest.mark.soak
async def test_killed_while_it_removes_a_surplus_one_survives(scene: Scene) -> None:
    await scene.daemon.start_ready(LRM_CRASH_AT="workers.surplus.ended")
    posted = await scene.post(desiredPhase="Stopped")
    worker = LabWorker.model_validate(posted)
    installation = await _installation(scene)
    async with Ec2(SystemClock(), endpoint_url=scene.shim.url) as ec2:
        for token in ("a", "b", "c"):
            parameters = replace(launch_parameters(worker, 1, installation), client_token=token)
            await ec2.run_instance(REGION, parameters)
    patch = {"spec": {"desiredPhase": "Ready"}}
    headers = {"Content-Type": "application/merge-patch+json"}
    await scene.daemon.request("PATCH", f"{WORKERS}/w1", patch, headers=headers)
    await scene.crashed()
    await scene.daemon.start_ready()
    ready = await scene.phase("Ready")
    await until(lambda: len(scene.live()) == 1, "one survivor")
    assert scene.live() == [ready["status"]["ec2"]["instanceId"]]


@pytest.mark.parametrize("seed", [1, *(pytest.param(s, marks=pytest.mark.soak) for s in range(2, 9))])
async def test_killed_at_random_moments_it_arrives_with_one_instance_and_leaves_with_none(
    scene: Scene, seed: int
) -> None:
    chance = random.Random(seed)
    await scene.daemon.start_ready()
    await scene.post()
    await _killed_at_random(scene, chance, lambda: len(scene.live()) <= 1)
    worker = await scene.phase("Ready", seconds=40)
    assert scene.live() == [worker["status"]["ec2"]["instanceId"]]
    await scene.daemon.request("DELETE", f"{WORKERS}/w1")
    await _killed_at_random(scene, chance, lambda: len(scene.live()) <= 1)
    await scene.gone(seconds=40)
    assert scene.live() == []


async def _killed_at_random(scene: Scene, chance: random.Random, holds: Callable[[], bool]) -> None:
    for _ in range(2):
        await asyncio.sleep(chance.uniform(0.0, 1.2))  # not waiting for anything: the moment is the point
        scene.daemon.process.kill()
        assert holds()
        await scene.daemon.start_ready()


async def _mark_deleted(scene: Scene) -> None:
    """What a DELETE leaves in the store, written while no daemon runs."""
    storage = EtcdStorage([scene.etcd.endpoint], root=scene.root)
    try:
        client = Client(storage, Registry(plugin.kinds, root=scene.root), SystemClock())
        await client.delete(await client.get(LabWorker, "default", "w1"))
    finally:
        await storage.aclose()


async def _claims(scene: Scene) -> list[str]:
    storage = EtcdStorage([scene.etcd.endpoint], root=scene.root)
    try:
        page = await storage.list(f"{scene.root}/claim/ec2/")
    finally:
        await storage.aclose()
    return [e.key.rpartition("/")[2] for e in page.entries]


async def _installation(scene: Scene) -> str:
    storage = EtcdStorage([scene.etcd.endpoint], root=scene.root)
    try:
        return (await storage.get(f"{scene.root}/installation")).value.decode()
    finally:
        await storage.aclose()


def _parameters() -> Any:
    worker = LabWorker.model_validate(
        {
            "metadata": {"name": "x", "uid": "x"},
            "spec": {"region": REGION, "aws": {"amiId": DEMO_AMI, "keyName": DEMO_KEY}},
        }
    )
    return launch_parameters(worker, 1, "x")
