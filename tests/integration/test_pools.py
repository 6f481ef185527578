"""Pools on simulated EC2 and CML: three boot, one fails and is replaced, the pool shrinks around a lab, and ends."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from controllers.aws.simulator import DEMO_AMI, DEMO_KEY, AwsShim, ShimOptions
from controllers.cml.simulator import Simulator
from controllers.pools.kind import LabWorkerPool, LabWorkerPoolSpec
from controllers.workers.kind import LabWorker, serving
from equipment.daemons import DaemonProcess
from equipment.gc_scene import collecting
from equipment.waiting import until
from equipment.workers_world import FAST_CML, PASSWORD_ENV, REGION, WorkersWorld, workers_world
from lrm.crashpoints import EXIT_CODE
from lrm.devservers import EtcdServer
from lrm.errors import ResourceNotFound
from lrm.events import events_prefix
from lrm.resource import ObjectMeta

POOLS = "/apis/lab.neuroglia.io/v1/namespaces/default/labworkerpools"
WORKERS = "/apis/lab.neuroglia.io/v1/namespaces/default/labworkers"
TEMPLATE = {
    "spec": {
        "region": REGION,
        "aws": {"amiId": DEMO_AMI, "keyName": DEMO_KEY},
        "cml": {"passwordFrom": {"env": PASSWORD_ENV}},
    }
}


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch, moto_url: str) -> AsyncIterator[WorkersWorld]:
    async with workers_world(monkeypatch, moto_url, pool_interval=0.2, labs_refresh_interval=0.5) as made:
        yield made


async def make(world: WorkersWorld, **spec: Any) -> LabWorkerPool:
    wanted = LabWorkerPoolSpec.model_validate({"labTrack": "ccna", "template": TEMPLATE, **spec})
    return await world.client.create(LabWorkerPool(metadata=ObjectMeta(name="p"), spec=wanted))


async def pool(world: WorkersWorld) -> LabWorkerPool:
    return await world.client.get(LabWorkerPool, "default", "p")


async def scale(world: WorkersWorld, replicas: int) -> None:
    await world.client.update(await pool(world), lambda p: setattr(p.spec, "replicas", replicas))


async def serves(world: WorkersWorld, many: int) -> list[LabWorker]:
    """The pool's workers, once it has so many, all serve, and it says so."""

    async def there() -> list[LabWorker]:
        workers = await world.client.list(LabWorker)
        status = (await pool(world)).status
        told = (status.phase, status.replicas, status.ready_replicas) == ("Ready", many, many)
        return workers if told and len(workers) == many and all(map(serving, workers)) else []

    return await until(there, f"{many} serving workers")


async def gone(world: WorkersWorld) -> bool:
    try:
        await pool(world)
    except ResourceNotFound:
        return True
    return False


async def test_a_pools_whole_life(world: WorkersWorld) -> None:
    await make(world, minWorkers=0, replicas=3)
    workers = await serves(world, 3)
    assert len(world.live()) == 3
    assert {w.spec.lab_track for w in workers} == {"ccna"}
    measured = (await pool(world)).status.seconds_to_ready
    assert measured is not None
    assert 0 <= measured < 60

    failing, busy, _ = workers
    lab = world.machine(busy).add_lab("exam", nodes=1, running=True)
    await world.phase("Active", name=busy.name)
    world.shim.instances.terminate(REGION, [failing.status.ec2.instance_id or ""])
    await world.gone(failing.name, 25)
    workers = await serves(world, 3)
    assert failing.name not in {w.name for w in workers}
    decided = (await pool(world)).status.last_decision
    assert decided is not None
    assert (decided.direction, decided.reason, decided.removed) == ("Replace", "WorkerFailed", [failing.name])
    assert "InstanceTerminated" in decided.message

    async def listed() -> bool:
        return all(w.status.labs_synced_at is not None for w in await world.client.list(LabWorker))

    await until(listed, "the labs of all workers")
    await scale(world, 1)
    [left] = await serves(world, 1)
    assert (left.name, left.status.phase) == (busy.name, "Active"), "the one with a lab stays"
    await until(lambda: len(world.live()) == 1, "one instance")

    await world.client.delete(await pool(world))
    await world.phase("Draining", name=busy.name)
    assert not await gone(world)
    assert [world.state(i) for i in world.instances("running")] == ["running"]
    world.machine(busy).force(lab, "STOPPED")
    await until(lambda: gone(world), "the end of the pool")
    assert await world.client.list(LabWorker) == []
    assert world.live() == []
    assert world.shim.calls["RunInstances"] == 4, "three and one in place of the failed one"
    told = [json.loads(e.value) for e in (await world.storage.list(events_prefix("/lrm", "default", "p"))).entries]
    reasons = [e["reason"] for e in told if e["reason"].startswith("Scaling")]
    assert reasons == ["ScalingUp", "ScalingReplace", "ScalingDown"]


async def test_labs_make_a_pool_grow_and_their_end_lets_it_shrink(world: WorkersWorld) -> None:
    no_cooldown = {"upMinutes": 0, "downMinutes": 0}
    limits = {"labsUp": 2, "labsDown": 1}
    await make(world, policy="LabCountBased", thresholds=limits, cooldowns=no_cooldown, maxWorkers=3)
    [first] = await serves(world, 1)
    machine = world.machine(first)
    labs = [machine.add_lab(f"exam {i}", nodes=1, running=True) for i in range(2)]
    await serves(world, 2)
    for lab in labs:
        machine.force(lab, "STOPPED")
        machine.remove(lab)
    await serves(world, 1)
    history = (await pool(world)).status.scaling_history
    assert [(d.direction, d.reason, d.source, d.to) for d in history] == [
        ("Up", "BelowWished", 0, 1),
        ("Up", "Labs", 1, 2),
        ("Down", "Idle", 2, 1),
    ]


async def test_removed_workers_drain_also_when_the_pool_is_deleted_in_the_foreground(world: WorkersWorld) -> None:
    """The collector asks for the workers' end itself then, and knows nothing of labs."""
    await make(world, minWorkers=2)
    async with collecting(world.storage, world.cache, world.clock):
        workers = await serves(world, 2)
        busy = workers[0]
        lab = world.machine(busy).add_lab("exam", nodes=1, running=True)
        await world.phase("Active", name=busy.name)
        await world.client.delete(await pool(world), propagation="Foreground")
        await world.gone(workers[1].name)
        await world.phase("Draining", name=busy.name)
        await world.looked_again(3)
        assert [world.state(i) for i in world.instances("running")] == ["running"]
        world.machine(busy).force(lab, "STOPPED")
        await until(lambda: gone(world), "the end of the pool")
    assert world.live() == []


async def test_the_brake_on_instances_holds_pools_too(monkeypatch: pytest.MonkeyPatch, moto_url: str) -> None:
    async with workers_world(monkeypatch, moto_url, pool_interval=0.2, max_instances=2) as world:
        await make(world, minWorkers=1, replicas=3)

        async def held() -> bool:
            errors = [w.status.ec2.last_error for w in await world.client.list(LabWorker)]
            return [e.reason for e in errors if e is not None] == ["MaxInstancesReached"]

        await until(held, "the brake")
        await until(lambda: len(world.live()) == 2, "two instances")
        await scale(world, 2)
        await serves(world, 2)
        assert world.shim.calls["RunInstances"] == 2, "the one that had no instance went first"


FILLING = [
    "pools.created:2",
    *(pytest.param(p, marks=pytest.mark.soak) for p in ("pools.decided", "pools.all-created", "pools.carried-out")),
]


@pytest.mark.parametrize("point", FILLING)
async def test_a_daemon_killed_while_it_fills_a_pool_fills_it_once(
    server_dir: Path, etcd: EtcdServer, etcd_root: str, moto_url: str, point: str
) -> None:
    """A real process dies, say, with two of three workers made; the next one makes what is missing and no more."""
    async with (
        AwsShim.run(ShimOptions(moto_url=moto_url, delay=0.1)) as shim,
        Simulator.run(replace(FAST_CML, ec2_state_url=f"{shim.url}/_shim/instances")) as cml,
    ):
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
            LRM_SECRETS_ALLOW=PASSWORD_ENV,
            LRM_WORKER_POLL_INTERVAL="0.1",
            LRM_POOL_INTERVAL="0.5",
            **{PASSWORD_ENV: FAST_CML.password},
        )
        try:
            await daemon.start_ready(LRM_CRASH_AT=point)
            document = {
                "apiVersion": "lab.neuroglia.io/v1",
                "kind": "LabWorkerPool",
                "metadata": {"name": "p"},
                "spec": {"labTrack": "ccna", "minWorkers": 3, "template": TEMPLATE},
            }
            assert (await daemon.request("POST", POOLS, document))[0] == 201
            assert await daemon.exit_code(40) == EXIT_CODE, daemon.log()[-2000:]
            await daemon.start_ready()
            seen: dict[str, Any] = {}

            async def full() -> bool:
                seen.update((await daemon.request("GET", f"{POOLS}/p"))[1])
                return bool(seen["status"].get("phase") == "Ready")

            await until(full, "the pool full", 30)
            [decision] = seen["status"]["scalingHistory"]
            _, listed = await daemon.request("GET", WORKERS)
            assert sorted(w["metadata"]["name"] for w in listed["items"]) == sorted(decision["created"])
            assert len(list(shim.instances.everywhere())) == 3
        finally:
            await daemon.end()
