"""A daemon killed between any two steps of a container's making and removal: one survives, or none; nothing is left.

The daemon is `lrm serve`, told to end like a power cut at a named point; another follows it on the same store and the
same engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controllers.containers.documents import UID_LABEL
from controllers.containers.runtime import CLEAN_CRASH_POINTS, PROVISION_CRASH_POINTS
from equipment.containers_daemon import INSTANCES, ContainersDaemon, instance
from equipment.engine import Engine
from lrm.crashpoints import EXIT_CODE
from lrm.devservers import EtcdServer

LESS_TELLING = {"containers.network-created", "containers.started", "containers.stopped", "containers.network-removed"}
"""Left to the soak: their neighbours differ from them by one call."""


@pytest.fixture
async def lrm(server_dir: Path, etcd: EtcdServer, etcd_root: str, engine: Engine) -> AsyncIterator[ContainersDaemon]:
    async with ContainersDaemon.at(server_dir, etcd.endpoint, etcd_root, engine) as daemon:
        yield daemon


async def killed(daemon: ContainersDaemon) -> None:
    assert await daemon.exit_code(60) == EXIT_CODE, daemon.log()


def containers_of(engine: Engine, uid: str) -> list[str]:
    found = engine.client.containers.list(all=True, filters={"label": f"{UID_LABEL}={uid}"})
    return [container.id for container in found]


def points(names: tuple[str, ...]) -> list[object]:
    return [pytest.param(n, marks=pytest.mark.soak if n in LESS_TELLING else ()) for n in names]


@pytest.mark.parametrize("point", points(PROVISION_CRASH_POINTS))
async def test_a_making_killed_at(point: str, lrm: ContainersDaemon, engine: Engine) -> None:
    """After the kill one container runs, and after its end nothing is left."""
    await lrm.start_ready(60, LRM_CRASH_AT=point)
    uid = (await lrm.create(instance("lab", engine)))["metadata"]["uid"]
    await killed(lrm)
    await lrm.start_ready(60)
    running = await lrm.phase("lab", "Running")
    assert containers_of(engine, uid) == [running["status"]["containerId"]]
    await lrm.request("DELETE", f"{INSTANCES}/lab")
    await lrm.gone("lab")
    assert engine.leftovers(f"{UID_LABEL}={uid}") == []


@pytest.mark.parametrize("point", points(CLEAN_CRASH_POINTS))
async def test_a_removal_killed_at(point: str, lrm: ContainersDaemon, engine: Engine) -> None:
    """After the kill the rest goes, and the request says that nothing is left."""
    await lrm.start_ready(60, LRM_CRASH_AT=point)
    uid = (await lrm.create(instance("lab", engine)))["metadata"]["uid"]
    await lrm.phase("lab", "Running")
    status, answer = await lrm.request(
        "PATCH",
        f"{INSTANCES}/lab",
        {"spec": {"desiredPhase": "Stopped"}},
        headers={"Content-Type": "application/merge-patch+json"},
    )
    assert status == 200, answer
    await killed(lrm)
    await lrm.start_ready(60)
    await lrm.cleaned("lab", "Completed")
    assert engine.leftovers(f"{UID_LABEL}={uid}") == []


@pytest.mark.soak
@pytest.mark.timeout(600)
async def test_a_daemon_killed_at_random_moments_doubles_and_leaves_nothing(
    lrm: ContainersDaemon, engine: Engine
) -> None:
    """Labs are made, stopped and deleted while the daemon is killed ten times; then each runs once, or not at all."""
    rng, uids, deleted = random.Random(5), dict[str, str](), set[str]()
    await lrm.start_ready(60)
    for round_ in range(10):
        for n in range(2):
            name = f"lab{round_}{n}"
            uids[name] = (await lrm.create(instance(name, engine)))["metadata"]["uid"]
        for name in rng.sample(sorted(uids), 1):
            deleted.add(name)
            await lrm.request("DELETE", f"{INSTANCES}/{name}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.uniform(0.2, 4.0)):
                await lrm.process.wait()
        lrm.process.kill()
        await lrm.start_ready(60)
    for name, uid in uids.items():
        if name in deleted:
            await lrm.gone(name, 120)
            assert engine.leftovers(f"{UID_LABEL}={uid}") == [], name
        else:
            running = await lrm.phase(name, "Running", 120)
            assert containers_of(engine, uid) == [running["status"]["containerId"]], name
            await lrm.request("DELETE", f"{INSTANCES}/{name}")
    for name in uids:
        await lrm.gone(name, 120)
    assert [uid for uid in uids.values() if engine.leftovers(f"{UID_LABEL}={uid}")] == []
