"""`kill -9` between every two steps of a worker's life: nothing is doubled, and what may be left taken is told of.

A real daemon over a real etcd dies at a named point, as in a power cut, and another one goes on. The points stand
after each change outside and after each write that enters a phase: on the way up, drained, stopped, started and ended.
The simulated EC2 and CMLs live in this process and survive. `make test` takes a sample, `make soak` all points.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from controllers.aws.ec2 import Ec2
from controllers.aws.simulator import DEMO_AMI, DEMO_KEY
from controllers.plugin import plugin
from controllers.workers import arrival, cml_side, departure, provisioning, work
from controllers.workers.decisions import launch_parameters
from controllers.workers.kind import LabWorker
from equipment.aws import HERE
from equipment.waiting import until
from equipment.worker_scene import WORKERS, Scene, worker_scene
from equipment.workers_world import REGION
from lrm.client import Client
from lrm.devservers import EtcdServer
from lrm.registry import Registry
from storage.clock import SystemClock
from storage.etcd import EtcdStorage

ALL = (
    *provisioning.CRASH_POINTS,
    *cml_side.CRASH_POINTS,
    *arrival.CRASH_POINTS,
    *departure.CRASH_POINTS,
    *work.CRASH_POINTS,
)
SAMPLE = {"workers.launch.recorded", "workers.launch.sent", "workers.terminate.sent", "workers.unlicense.sent"}


@pytest.fixture
async def scene(server_dir: Path, etcd: EtcdServer, etcd_root: str, moto_url: str) -> AsyncIterator[Scene]:
    async with worker_scene(server_dir, etcd, etcd_root, moto_url) as made:
        yield made


def soak_but(sample: set[str], names: tuple[str, ...]) -> list[Any]:
    return [n if n in sample else pytest.param(n, marks=pytest.mark.soak) for n in names]


def _begins(*prefixes: str) -> tuple[str, ...]:
    return tuple(p for p in ALL if p.startswith(prefixes))


UP = (
    *_begins("workers.launch.", "workers.license."),
    *(f"workers.entered.{phase}" for phase in ("ProvisioningEC2", "EC2Ready", "Starting", "Licensing", "Ready")),
)
DOWN = (
    *_begins("workers.unlicense.", "workers.terminate."),
    *(f"workers.entered.{phase}" for phase in ("Unlicensing", "TerminatingEC2", "Terminated")),
)
STOP = (
    "workers.stop.sent",
    "workers.start.sent",
    *(f"workers.entered.{phase}" for phase in ("Draining", "Unlicensing", "Stopping", "Stopped", "Starting:2")),
)
CLAIM = _begins("workers.adopt.", "workers.retain.", "workers.claim.")
ELSEWHERE = (
    "workers.surplus.ended",
    *(f"workers.entered.{phase}" for phase in ("ReadyUnlicensed", "Active", "Failed")),
)


def test_no_point_is_left_out() -> None:
    assert {point.partition(":")[0] for point in (*UP, *DOWN, *STOP, *CLAIM, *ELSEWHERE)} == set(ALL)


@pytest.mark.parametrize("point", soak_but(SAMPLE, UP))
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


@pytest.mark.parametrize("point", soak_but(SAMPLE - {"workers.unlicense.sent"}, DOWN))
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
    assert not scene.machine(worker).licensing.licensed


@pytest.mark.parametrize("point", soak_but(SAMPLE, _begins("workers.unlicense.")))
async def test_killed_while_it_gives_its_seat_back_it_says_what_is_not_known_of_it(scene: Scene, point: str) -> None:
    await scene.daemon.start_ready(LRM_CRASH_AT=point)
    await scene.post()
    worker = await scene.phase("Ready")
    await scene.patch(desiredPhase="Terminated")
    await scene.crashed()
    await scene.daemon.start_ready()
    ended = await scene.phase("Terminated")
    assert not scene.machine(worker).licensing.licensed
    told = {c["type"]: (c["status"], c["reason"]) for c in ended["status"]["conditions"]}
    # Killed after CML had answered, nobody knows what it had said.
    unknown = ("Unknown", "DeregistrationUnknown") if point == "workers.unlicense.sent" else None
    assert told.get("LicenseSeatLeaked") == unknown


async def test_killed_while_it_drains_it_goes_on_waiting_for_the_lab(scene: Scene) -> None:
    await scene.daemon.start_ready(LRM_CRASH_AT="workers.entered.Draining", LRM_LABS_REFRESH_INTERVAL="3600")
    await scene.post()
    worker = await scene.phase("Ready")
    machine = scene.machine(worker)
    lab = machine.add_lab("exam", nodes=1, running=True)
    await scene.patch(desiredPhase="Stopped")
    await scene.crashed()
    await scene.daemon.start_ready(LRM_LABS_REFRESH_INTERVAL="3600")

    async def listed() -> bool:
        seen = await scene.get()
        return seen is not None and seen["status"].get("labsCount") == 1

    await until(listed, "the lab seen")
    lists = machine.counts["GET /labs"]
    await until(lambda: machine.counts["GET /labs"] > lists, "another list")
    assert (await scene.phase("Draining"))["status"]["ec2"]["state"] == "running"
    assert lab.state == "STARTED"
    machine.force(lab, "STOPPED")
    await scene.phase("Stopped")
    assert not machine.licensing.licensed


@pytest.mark.parametrize("point", soak_but({"workers.stop.sent"}, STOP))
async def test_killed_while_it_stops_or_starts_it_is_the_same_worker_afterwards(scene: Scene, point: str) -> None:
    await scene.daemon.start_ready(LRM_CRASH_AT=point)
    await scene.post()
    before = await scene.phase("Ready")
    starts = "start.sent" in point or "Starting" in point
    await scene.patch(desiredPhase="Stopped")
    if not starts:
        await scene.crashed()
        await scene.daemon.start_ready()
    stopped = await scene.phase("Stopped")
    assert "publicIp" not in stopped["status"]["ec2"]
    await scene.patch(desiredPhase="Ready")
    if starts:
        await scene.crashed()
        await scene.daemon.start_ready()
    after = await scene.phase("Ready")
    assert scene.live() == [before["status"]["ec2"]["instanceId"]]
    assert scene.launched() == 1
    assert after["status"]["cml"]["identity"] == before["status"]["cml"]["identity"]
    assert scene.machine(after).licensing.licensed


@pytest.mark.soak
async def test_killed_as_it_begins_to_serve_unlicensed_or_labs_it_serves(scene: Scene) -> None:
    await scene.daemon.start_ready(LRM_CRASH_AT="workers.entered.ReadyUnlicensed")
    await scene.post(cml={"licenseTokenFrom": None})
    await scene.crashed()
    await scene.daemon.start_ready(LRM_CRASH_AT="workers.entered.Active")
    worker = await scene.phase("ReadyUnlicensed")
    scene.machine(worker).add_lab("exam", nodes=1, running=True)
    await scene.crashed()
    await scene.daemon.start_ready()
    await scene.phase("Active")
    assert scene.launched() == 1


@pytest.mark.soak
async def test_killed_as_it_fails_it_stays_failed_until_a_person_mends_it(scene: Scene) -> None:
    await scene.daemon.start_ready(LRM_CRASH_AT="workers.entered.Failed")
    await scene.post(aws={"amiId": "ami-00000000000000bad", "keyName": DEMO_KEY})
    await scene.crashed()
    await scene.daemon.start_ready()
    failed = await scene.phase("Failed")
    assert failed["status"]["failure"]["reason"] == "LaunchRefused"
    await scene.patch(aws={"amiId": DEMO_AMI})
    await scene.phase("Ready")
    assert scene.launched() == 1


@pytest.mark.parametrize("point", soak_but(set(), CLAIM))
async def test_killed_while_it_adopts_or_lets_go_the_claim_and_the_instance_are_right(scene: Scene, point: str) -> None:
    async with Ec2(SystemClock(), endpoint_url=scene.shim.url) as ec2:
        parameters = replace(_parameters(), client_token="somebody-else", tags={})
        instance_id = (await ec2.run_instance(HERE, parameters)).id
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
            await ec2.run_instance(HERE, parameters)
    await scene.patch(desiredPhase="Ready")
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
    worker = await scene.phase("Ready")
    assert scene.live() == [worker["status"]["ec2"]["instanceId"]]
    await scene.daemon.request("DELETE", f"{WORKERS}/w1")
    await _killed_at_random(scene, chance, lambda: len(scene.live()) <= 1)
    await scene.gone()
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
