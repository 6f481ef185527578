"""Many labs in containers requested at once: is it the engine that limits, or lrm?

The same containers (limits, network, labels: from the same plan) are made on the same engine by a bare loop over
aiodocker with as many calls at a time as lrm makes, before and after (a machine's pace changes), and between by a
daemon that is asked for lab instances through its API. The engine's starts are what takes the time; what lrm adds to
them is the figure. Then nothing is asked of anybody, and what is asked of the engine meanwhile is counted.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
from aiodocker import Docker

from bench.report import Figure, Size
from bench.stage import cpu_seconds
from controllers.containers.documents import CREATED_BY_LABEL, Image
from controllers.containers.engine import AT_ONCE
from controllers.containers.plan import container_of, network_of
from controllers.instances.kind import LabInstanceRequest
from controllers.instances.settings import InstanceSettings
from equipment import fetch_docker
from equipment.containers_daemon import INSTANCES, ContainersDaemon, instance
from equipment.engine import Engine, private_engine, with_images
from equipment.engine_proxy import EngineProxy, engine_proxy
from equipment.etcd import scratch_dir
from equipment.waiting import until
from lrm.devservers import EtcdServer

RATIO = 1.25
_OURS = f"{CREATED_BY_LABEL}=lrm"
_PATIENCE = 1800
_POSTS_AT_ONCE = 32
_SETTINGS = {
    "LRM_DOCKER_CPU": "10000",
    "LRM_DOCKER_MEMORY": "100Ti",
    "LRM_DOCKER_SLOTS": "10000",
    "LRM_INSTANCES_MOST_PER_STUDENT": "0",
    "LRM_LOG_LEVEL": "warning",
}


async def containers(size: Size) -> list[Figure]:
    """Both, one after the other, and the silence after the second."""
    count = size.containers
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(scratch_dir("lrm-bench-"))
        host = os.environ.get("DOCKER_HOST") or await stack.enter_async_context(
            private_engine(fetch_docker.bring_engine())
        )
        engine = stack.enter_context(with_images(host))
        others = set(engine.leftovers(_OURS))
        before = await _bare(engine, count)
        etcd = await stack.enter_async_context(EtcdServer(folder / "etcd"))
        async with ContainersDaemon.at(folder, etcd.endpoint, "/lrm", engine, **_SETTINGS) as daemon:
            await daemon.start_ready(60)
            took = await _requested(daemon, engine, count)
            used = cpu_seconds(daemon.process.pid)
        proxy = await stack.enter_async_context(engine_proxy(folder, host))
        counted = {**_SETTINGS, "LRM_DOCKER_HOST": proxy.host}
        async with ContainersDaemon.at(folder, etcd.endpoint, "/lrm", engine, **counted) as daemon:
            await daemon.start_ready(60)
            await until(lambda: proxy.asked["GET /containers/json"] >= 1, "the daemon has looked at the engine")
            await _quiet(proxy)
            proxy.asked.clear()
            await asyncio.sleep(size.window)
            about_labs = sum(n for asked, n in proxy.asked.items() if "*" in asked)
            whole = Counter(proxy.asked)
            cleaned = await _deleted(daemon, count)
        left = set(engine.leftovers(_OURS)) - others
        after = await _bare(engine, count)
    bare = (before + after) / 2
    told = (
        f"{count} labs: {took:.1f} s, the bare loop {before:.1f} s before and {after:.1f} s after, "
        f"{AT_ONCE} calls at a time; the daemon used {used:.1f} s of a core"
    )
    idle = f"{size.window:g} s with {count} running; of the engine itself {sum(whole.values())} calls"
    return [
        Figure("containers: requested at once, all Running, to a bare loop", took / bare, "times", RATIO, told=told),
        Figure("containers: calls about running ones", about_labs, "calls", 0, told=idle),
        Figure("containers: left after their deletion", len(left), "things", 0, told=f"deleted in {cleaned:.1f} s"),
    ]


async def _bare(engine: Engine, count: int) -> float:
    """Seconds for as many of the same containers, from the first call to the last answer."""
    settings, installation = InstanceSettings(), str(uuid.uuid4())
    requests = [_request(engine, n) for n in range(count)]
    made: list[tuple[Any, Any]] = []

    async with Docker(engine.host) as docker:

        async def make(request: LabInstanceRequest) -> None:
            image = Image.of(await docker.images.inspect(request.spec.lab_template.image or ""))
            network = await docker.networks.create(network_of(request, installation, settings))
            document = container_of(request, network.id, image, installation, settings)
            container = await docker.containers.create(document, name=request.outside_name)
            await container.start()
            await container.show()
            made.append((container, network))

        async def unmake(pair: tuple[Any, Any]) -> None:
            await pair[0].delete(force=True, v=True)
            await pair[1].delete()

        began = time.monotonic()
        await _all(make, requests)
        took = time.monotonic() - began
        await _all(unmake, tuple(made))
    return took


async def _requested(daemon: ContainersDaemon, engine: Engine, count: int) -> float:
    """Seconds from the first request to the last one Running."""
    async with aiohttp.ClientSession(daemon.url) as session:

        async def post(n: int) -> None:
            async with session.post(INSTANCES, json=instance(f"lab{n:04d}", engine)) as reply:
                if reply.status != 201:
                    raise RuntimeError(await reply.text())

        began = time.monotonic()
        await _all(post, range(count), at_once=_POSTS_AT_ONCE)
        await _until_none(session, "status.phase!=Running")
        return time.monotonic() - began


async def _deleted(daemon: ContainersDaemon, count: int) -> float:
    """Seconds from the first deletion to the last one gone."""
    async with aiohttp.ClientSession(daemon.url) as session:

        async def delete(n: int) -> None:
            async with session.delete(f"{INSTANCES}/lab{n:04d}") as reply:
                await reply.read()

        began = time.monotonic()
        await _all(delete, range(count), at_once=_POSTS_AT_ONCE)
        await _until_none(session, "")
        return time.monotonic() - began


async def _quiet(proxy: EngineProxy) -> None:
    """Until a new daemon has looked at what it found, and asks for no more."""
    before = -1
    while before != (now := sum(proxy.asked.values())):
        before = now
        await asyncio.sleep(3)


async def _until_none(session: aiohttp.ClientSession, selector: str) -> None:
    """Until no instance is selected; one is asked for at most, which costs the daemon next to nothing."""

    async def none() -> bool:
        await asyncio.sleep(0.2)
        async with session.get(INSTANCES, params={"fieldSelector": selector, "limit": "1"}) as reply:
            items = (await reply.json())["items"]
        if items and items[0]["status"].get("phase") == "Failed":
            raise RuntimeError(items[0]["status"])
        return not items

    await until(none, "all are as they are to be", timeout=_PATIENCE)


async def _all(do: Callable[[Any], Awaitable[None]], things: Iterable[Any], at_once: int = AT_ONCE) -> None:
    turns = asyncio.Semaphore(at_once)

    async def one(thing: Any) -> None:
        async with turns:
            await do(thing)

    async with asyncio.TaskGroup() as tasks:
        for thing in things:
            tasks.create_task(one(thing))


def _request(engine: Engine, number: int) -> LabInstanceRequest:
    request = LabInstanceRequest.model_validate(instance(f"lab{number:04d}", engine))
    request.metadata.uid = str(uuid.uuid4())
    return request
