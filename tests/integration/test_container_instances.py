"""Lab instances in containers, whole: the daemon, etcd and a real engine; nothing is played."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from controllers.containers.documents import UID_LABEL
from equipment.containers_daemon import INSTANCES, ContainersDaemon, instance
from equipment.engine import Engine
from equipment.waiting import until
from lrm.devservers import EtcdServer

HTTPD = ["sh", "-c", "echo hello > /tmp/index.html; exec httpd -f -p 8000 -h /tmp"]


@pytest.fixture
async def lrm(server_dir: Path, etcd: EtcdServer, etcd_root: str, engine: Engine) -> AsyncIterator[ContainersDaemon]:
    async with ContainersDaemon.at(server_dir, etcd.endpoint, etcd_root, engine) as daemon:
        await daemon.start_ready(40)
        yield daemon


async def test_a_lab_runs_is_worked_with_and_leaves_nothing(lrm: ContainersDaemon, engine: Engine) -> None:
    """From a manifest to a page that it serves, its log, its deletion, and an engine without a trace of it."""
    await lrm.create(instance("web", engine, command=HTTPD, ports=[8000]))
    running = await lrm.phase("web", "Running")
    status = running["status"]
    assert (status["workerRef"]["kind"], status["workerRef"]["name"]) == ("Engine", "docker")
    async with aiohttp.ClientSession() as session:

        async def page() -> str | None:
            try:
                async with session.get(f"{status['accessUrl']}/index.html") as reply:
                    return await reply.text()
            except aiohttp.ClientError:
                return None

        assert await until(page, "it serves") == "hello\n"
    await lrm.request("DELETE", f"{INSTANCES}/web")
    await lrm.gone("web")
    assert engine.leftovers(f"{UID_LABEL}={running['metadata']['uid']}") == []


async def test_whatever_goes_wrong_is_told_with_its_reason_and_leaves_nothing(
    lrm: ContainersDaemon, engine: Engine
) -> None:
    """Labs that end by themselves, an image that does not exist, a container that somebody removes."""
    unknown = {"image": "lrm-test/does-not-exist", "pullPolicy": "Never"}
    labs = {
        "ends": instance("ends", engine, command=["sh", "-c", "exit 0"]),
        "fails": instance("fails", engine, command=["sh", "-c", "echo boom; exit 7"]),
        "nothing": instance("nothing", engine, **unknown),
        "lost": instance("lost", engine),
    }
    for lab in labs.values():
        await lrm.create(lab)
    running = await lrm.phase("lost", "Running")
    await asyncio.to_thread(engine.client.containers.get(running["status"]["containerId"]).remove, force=True)
    ended = {name: await lrm.cleaned(name, "Completed" if name == "ends" else "Failed") for name in labs}
    assert ended["ends"]["status"]["exitCode"] == 0
    assert ended["fails"]["status"]["exitCode"] == 7
    reasons = {name: lab["status"].get("failure", {}).get("reason") for name, lab in ended.items()}
    assert reasons == {"ends": None, "fails": "ContainerFailed", "nothing": "ImageNotFound", "lost": "ContainerLost"}
    assert "does-not-exist" in ended["nothing"]["status"]["errorMessage"]
    assert ended["fails"]["status"]["lastLog"] == "boom\n"
    assert "boom" in ended["fails"]["status"]["errorMessage"]
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{lrm.url}{INSTANCES}/fails/log") as reply:
            assert (reply.status, await reply.text(), "Warning" in reply.headers) == (200, "boom\n", True)
        async with session.get(f"{lrm.url}/metrics") as reply:
            assert "\nlrm_engine_up 1" in await reply.text()
        async with session.get(f"{lrm.url}/api/status/health") as reply:
            assert [(p["name"], p["ok"]) for p in (await reply.json())["outside"]] == [("container engine", True)]
    for lab in ended.values():
        assert engine.leftovers(f"{UID_LABEL}={lab['metadata']['uid']}") == []
