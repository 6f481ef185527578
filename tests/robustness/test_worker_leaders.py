"""One worker's life under leases: the daemon that leads is killed in the middle of it, and another one goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from equipment.daemons import DaemonProcess
from equipment.waiting import until
from equipment.worker_scene import WORKERS, Scene, worker_scene
from lrm.devservers import EtcdServer

LEASE = {
    "LRM_LEADER": "lease",
    "LRM_LEASE_DURATION": "5",
    "LRM_RENEW_DEADLINE": "3",
    "LRM_RETRY_PERIOD": "0.5",
}


async def leader(scene: Scene) -> DaemonProcess:
    """The daemon that holds the lock of the workers' controller, by its own word."""
    found: list[DaemonProcess] = []

    async def one() -> bool:
        found.clear()
        for daemon in scene.daemons:
            if daemon.child is not None and daemon.child.exit_code is None:
                _, answer = await daemon.request("GET", "/api/status/leader")
                held = [lock["lock_name"] for lock in answer["locks"] if lock["is_leader"]]
                found.extend([daemon] if "workers" in held else [])
        return len(found) == 1

    await until(one, "one leader")
    return found[0]


async def kill_the_leader(scene: Scene) -> DaemonProcess:
    """End it as a power cut would, and let the other one be asked."""
    killed = await leader(scene)
    killed.process.kill()
    scene.daemon = next(d for d in scene.daemons if d is not killed)
    return killed


@pytest.mark.slow
async def test_a_leader_that_dies_while_it_provisions_and_one_that_dies_while_it_terminates_are_followed(
    server_dir: Path, etcd: EtcdServer, etcd_root: str, moto_url: str
) -> None:
    async with worker_scene(server_dir, etcd, etcd_root, moto_url, daemons=2, delay=1.5, **LEASE) as scene:
        async with asyncio.TaskGroup() as both:
            for daemon in scene.daemons:
                both.create_task(daemon.start_ready())
        await leader(scene)
        await scene.post()
        await until(lambda: scene.shim.calls["RunInstances"], "the launch")
        killed = await kill_the_leader(scene)
        worker = await scene.phase("Ready")
        assert scene.live() == [worker["status"]["ec2"]["instanceId"]]
        assert (scene.launched(), worker["status"]["ec2"]["attempt"]) == (1, 1)
        assert "Failed" not in [step["to"] for step in worker["status"]["phaseHistory"]]

        await killed.start_ready()
        status, _ = await scene.daemon.request("DELETE", f"{WORKERS}/w1")
        assert status == 200
        await until(lambda: scene.shim.calls["TerminateInstances"], "its end asked for")
        second = await kill_the_leader(scene)
        assert second is not killed
        await scene.gone()
        assert scene.live() == []
        assert scene.launched() == 1
        assert not scene.machine(worker).licensing.licensed
