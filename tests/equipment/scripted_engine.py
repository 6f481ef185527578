"""An engine whose answers a test writes and holds back: for orders of things that a real one shows once in a year."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

INSTALLATION = "this-installation"


class ScriptedEngine:
    """Containers by id, as inspect tells of them; lists and events follow from what the test does."""

    def __init__(self) -> None:
        self.id = "engine-1"
        self.containers: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        """Paths of questions, without the API's version, in the order of their coming."""
        self.held: dict[str, asyncio.Event] = {}
        """By path: the answer is made at once, and sent when this is set."""
        self.answers: dict[str, tuple[int, bytes, str]] = {}
        """By path: status, body and content type instead of the truth."""
        self.log = b"hello\n"
        """What every container has written; who follows it waits for more."""
        self.followers = 0
        self._streams: set[web.StreamResponse] = set()
        self._closing = asyncio.Event()

    def put(self, container: str, status: str = "running", **state: Any) -> None:
        """A container of the request `uid`, named `lab`; it says nothing of itself."""
        labels = {"lrm/installation": INSTALLATION, "lrm/uid": "uid", "lrm/namespace": "default", "lrm/name": "lab"}
        self.containers[container] = {
            "Id": container,
            "Created": "2026-01-01T00:00:00Z",
            "Config": {"Labels": {**labels, "lrm/attempt": "1"}},
            "State": {"Status": status, "ExitCode": 0, **state},
            "NetworkSettings": {"Ports": {}},
        }

    async def tell(self, action: str, container: str) -> None:
        """An event to whoever listens."""
        await self.say(json.dumps({"Action": action, "Actor": {"ID": container, "Attributes": {}}}).encode())

    async def say(self, line: bytes) -> None:
        """Anything at all, where events are expected."""
        for stream in tuple(self._streams):
            await stream.write(line + b"\n")

    def hold(self, path: str) -> asyncio.Event:
        """Hold back answers to a question until the result is set."""
        self.held[path] = asyncio.Event()
        return self.held[path]

    @property
    def listeners(self) -> int:
        return len(self._streams)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path.removeprefix("/v1.41")
        self.asked.append(path)
        if path == "/events":
            return await self._stream(request)
        if request.method == "DELETE" and path not in self.answers:
            self.containers.pop(path.removeprefix("/containers/"), None)
            return web.Response(status=204)
        if path.endswith("/logs") and path not in self.answers:
            return await self._log(request)
        status, body, kind = self.answers.get(path) or self._truth(path)
        if path in self.held:
            await self.held[path].wait()
        return web.Response(status=status, body=body, content_type=kind)

    def _truth(self, path: str) -> tuple[int, bytes, str]:
        container = path.removeprefix("/containers/").removesuffix("/json")
        document: Any
        if path == "/version":
            document = {"ApiVersion": "1.41"}
        elif path == "/info":
            now = "2026-01-01T00:00:00.123456789Z"
            document = {"ID": self.id, "NCPU": 4, "MemTotal": 8 * 1024**3, "SystemTime": now}
        elif path == "/containers/json":
            document = [
                {
                    "Id": c["Id"],
                    "Labels": c["Config"]["Labels"],
                    "Created": 1,
                    "State": c["State"]["Status"],
                    "Status": "Up",
                }
                for c in self.containers.values()
            ]
        elif path == "/networks":
            document = []
        elif path == "/volumes":
            document = {"Volumes": None}
        elif container in self.containers:
            document = self.containers[container]
        else:
            return 404, json.dumps({"message": f"No such container: {container}"}).encode(), "application/json"
        return 200, json.dumps(document).encode(), "application/json"

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"Content-Type": "application/json"})
        await stream.prepare(request)
        self._streams.add(stream)
        try:
            await self._closing.wait()
        finally:
            self._streams.discard(stream)
        return stream

    async def _log(self, request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse()
        await stream.prepare(request)
        lines = self.log.splitlines(keepends=True)[-int(request.query["tail"]) :]
        for line in lines:
            await stream.write(struct.pack(">BxxxL", 1, len(line)) + line)
        if request.query["follow"] == "1":
            self.followers += 1
            try:
                await self._closing.wait()
            finally:
                self.followers -= 1
        return stream

    def end_streams(self) -> None:
        """End the streams of events that are open."""
        self._closing.set()
        self._closing = asyncio.Event()


@asynccontextmanager
async def scripted_engine(folder: Path) -> AsyncIterator[tuple[ScriptedEngine, str]]:
    """It, and its host."""
    engine, path = ScriptedEngine(), folder / "scripted.sock"
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", engine.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        await web.UnixSite(runner, str(path)).start()
        yield engine, f"unix://{path}"
    finally:
        engine.end_streams()
        await runner.cleanup()
