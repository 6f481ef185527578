"""The logs of lab instances over HTTP, from an engine whose answers the test writes."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from controllers.containers.engine import LOGS_AT_ONCE
from controllers.containers.runtime import ContainerRuntime
from controllers.instances.kind import INSTANCES, LAB_INSTANCE_REQUEST, LabInstanceRequest
from controllers.instances.routes import add_instance_routes
from controllers.instances.settings import InstanceSettings
from equipment.api import Served, served, tokens_file
from equipment.scripted_engine import INSTALLATION, ScriptedEngine, scripted_engine
from equipment.waiting import until
from lrm.controller import Hints
from lrm.offers import Offers
from lrm.resource import ObjectMeta
from storage.clock import SystemClock
from storage.memory import MemoryStorage

BOTH = pytest.mark.parametrize(
    "path", ["/api/lab-instances/lab/log", "/apis/lab.neuroglia.io/v1/namespaces/default/labinstancerequests/lab/log"]
)


def viewer(name: str, namespace: str) -> dict[str, Any]:
    digest = hashlib.sha256(f"{name}-token".encode()).hexdigest()
    return {"name": name, "sha256": digest, "role": "viewer", "namespaces": [namespace]}


@dataclass
class Scene:
    api: Served
    script: ScriptedEngine
    lab: LabInstanceRequest

    async def read(self, path: str, **headers: str) -> tuple[int, str]:
        async with self.api.session.get(self.api.url + path, headers=headers) as reply:
            return reply.status, await reply.text()

    async def make(self, name: str, template: dict[str, Any]) -> LabInstanceRequest:
        spec = {"labTemplate": template, "studentEmail": "ann@x.edu", "durationMinutes": 5}
        meta = ObjectMeta(name=name, namespace="default")
        document = {"metadata": meta.wire(), "spec": spec}
        client = self.api.client.bind(owner=INSTANCES, fence=None)
        return await client.create(LabInstanceRequest.model_validate(document))


@asynccontextmanager
async def scene_at(folder: Path, **settings: Any) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        script, host = await stack.enter_async_context(scripted_engine(folder))
        runtime = ContainerRuntime(InstanceSettings(docker_host=host), INSTALLATION, Hints(), SystemClock())
        offers = Offers()
        stack.enter_context(offers.offering(await stack.enter_async_context(runtime)))
        api = await stack.enter_async_context(
            served(
                MemoryStorage(),
                routes=(add_instance_routes,),
                kinds=(LAB_INSTANCE_REQUEST,),
                offers=offers,
                **settings,
            )
        )
        scene = Scene(api, script, LabInstanceRequest.model_construct())
        scene.lab = await scene.make("lab", {"image": "lab:1"})
        yield scene


@pytest.fixture
async def scene(server_dir: Path) -> AsyncIterator[Scene]:
    async with scene_at(server_dir) as scene:
        yield scene


@BOTH
async def test_a_log_is_text_as_long_as_asked_for(scene: Scene, path: str) -> None:
    scene.script.log = b"one\ntwo\nthree\n"
    async with scene.api.session.get(scene.api.url + path) as reply:
        assert (reply.status, reply.content_type) == (200, "text/plain")
        assert await reply.read() == b"one\ntwo\nthree\n"
    assert await scene.read(f"{path}?tailLines=2") == (200, "two\nthree\n")
    assert (await scene.read(f"{path}?tailLines=-1"))[0] == 400
    assert f"/containers/{scene.lab.outside_name}/logs" in scene.script.asked


async def test_what_has_no_log_and_what_cannot_be_read_now_say_so(scene: Scene) -> None:
    await scene.make("cml", {"topology": "nodes: []\nlinks: []\n"})
    path = "/api/lab-instances/{}/log"
    assert (await scene.read(path.format("nobody")))[0] == 404
    status, told = await scene.read(path.format("cml"))
    assert (status, "runs on CML" in told) == (404, True)
    logs = f"/containers/{scene.lab.outside_name}/logs"
    scene.script.answers[logs] = (404, b'{"message":"No such container"}', "application/json")
    status, told = await scene.read(path.format("lab"))
    assert (status, "has no container" in told) == (404, True)
    scene.script.answers[logs] = (503, b'{"message":"starting"}', "application/json")
    async with scene.api.session.get(scene.api.url + path.format("lab")) as reply:
        assert (reply.status, "Retry-After" in reply.headers) == (503, True)


async def test_a_log_is_read_by_whoever_may_read_its_lab(server_dir: Path, tmp_path: Path) -> None:
    tokens = tokens_file(tmp_path, viewer("one", "default"), viewer("other", "other"))
    async with scene_at(server_dir, tokens_file=tokens, audit_file=tmp_path / "audit.log") as scene:
        path = "/api/lab-instances/lab/log"
        assert (await scene.read(path))[0] == 401
        assert (await scene.read(path, Authorization="Bearer other-token"))[0] == 403
        assert (await scene.read(path, Authorization="Bearer one-token"))[0] == 200


async def test_readers_of_a_silent_log_who_leave_give_their_places_back(scene: Scene) -> None:
    url = f"{scene.api.url}/api/lab-instances/lab/log"
    scene.script.log = b""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        readers = [await session.get(f"{url}?follow=true") for _ in range(LOGS_AT_ONCE)]
        assert {reader.status for reader in readers} == {200}
        assert (await scene.read("/api/lab-instances/lab/log"))[0] == 503
        for reader in readers:
            reader.close()
    await until(lambda: not scene.script.followers, "the engine is not asked any more")
    assert (await scene.read("/api/lab-instances/lab/log"))[0] == 200
