"""The logs of lab instances over HTTP, from an engine whose answers the test writes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from controllers.containers.engine import LOGS_AT_ONCE
from controllers.containers.openapi import OPERATIONS
from controllers.containers.routes import READERS_MOST, add_log_routes
from controllers.containers.runtime import ContainerRuntime
from controllers.instances.kind import INSTANCES, LAB_INSTANCE_REQUEST, LabInstanceRequest, WorkerRef
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
                routes=(add_log_routes,),
                operations=OPERATIONS,
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
    assert await scene.read(f"{path}?tail=2") == (200, "two\nthree\n")
    for nonsense in ("tailLines=-1", "tail=x", "tail=", "tailLines=²", "tail=1&tailLines=2", "lines=5", "follow=maybe"):
        assert (await scene.read(f"{path}?{nonsense}"))[0] == 400, nonsense
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


async def test_readers_of_a_silent_log_who_leave_give_their_places_back(server_dir: Path, tmp_path: Path) -> None:
    """Their own, of which one principal has some, and the engine's."""
    names = [f"viewer-{n}" for n in range(LOGS_AT_ONCE // READERS_MOST + 1)]
    tokens = tokens_file(tmp_path, *(viewer(name, "default") for name in names))
    async with scene_at(server_dir, tokens_file=tokens, audit_file=tmp_path / "audit.log") as scene:
        path, scene.script.log = "/api/lab-instances/lab/log", b""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def follow(name: str) -> aiohttp.ClientResponse:
                headers = {"Authorization": f"Bearer {name}-token"}
                return await session.get(f"{scene.api.url}{path}?follow=true", headers=headers)

            readers = [await follow(names[0]) for _ in range(READERS_MOST)]
            assert {reader.status for reader in readers} == {200}
            surplus = await follow(names[0])
            assert (surplus.status, "Retry-After" in surplus.headers) == (429, True)
            readers += [await follow(name) for name in names[1:-1] for _ in range(READERS_MOST)]
            assert {reader.status for reader in readers} == {200}
            assert (await follow(names[-1])).status == 503, "the engine has no place for another"
            for reader in readers:
                reader.close()
        await until(lambda: not scene.script.followers, "the engine is not asked any more")
        for name in (names[0], names[-1]):
            assert (await scene.read(path, Authorization=f"Bearer {name}-token"))[0] == 200


async def test_who_follows_a_log_does_not_hold_up_the_end_of_the_daemon(
    server_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrm.api.app._SHUTDOWN_SECONDS", 3600.0)
    async with aiohttp.ClientSession() as session, asyncio.timeout(60):
        async with scene_at(server_dir) as scene:
            reader = await session.get(f"{scene.api.url}/api/lab-instances/lab/log?follow=true")
            assert await reader.content.readline() == b"hello\n"
        assert await reader.read() == b"", "it was ended, not cut off"


@BOTH
async def test_of_a_container_that_is_gone_the_last_lines_are_told(scene: Scene, path: str) -> None:
    """Without asking an engine where its place was given back, which may be away by then."""
    logs = f"/containers/{scene.lab.outside_name}/logs"
    scene.script.answers[logs] = (404, b'{"message":"No such container"}', "application/json")
    client = scene.api.client.bind(owner=INSTANCES, fence=None)

    def end(r: LabInstanceRequest) -> None:
        r.status.worker_ref = WorkerRef(kind="Engine", name="docker")
        r.status.last_log = "one\ntwo\nthree\n"

    lab = await client.update_status(scene.lab, end)
    for asked in (1, 1):
        async with scene.api.session.get(f"{scene.api.url}{path}?tailLines=2") as reply:
            assert (reply.status, reply.content_type) == (200, "text/plain")
            assert await reply.text() == "two\nthree\n"
            assert "is gone" in reply.headers["Warning"]
        assert scene.script.asked.count(logs) == asked
        lab = await client.update_status(lab, lambda r: setattr(r.status, "worker_ref", None))
