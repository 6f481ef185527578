"""A peer that speaks etcd's gateway and says exactly what a test tells it to: what no real etcd can be made to say.

Ranges and transactions are answered with the revision of the moment; a watch gets the chunks of the next script, byte
for byte as they were given, and then silence or an end. It stores nothing.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web


@dataclass
class Script:
    """What one watch is sent after its `created`; then its connection is closed, or stays silent."""

    chunks: Sequence[bytes] = ()
    close: bool = True
    first: bytes = b""
    """Instead of `created`."""


@dataclass
class ScriptedEtcd:
    revision: int = 20
    scripts: list[Script] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    """The start revision of each watch that was asked for."""
    silent_again: asyncio.Event = field(default_factory=asyncio.Event)
    epoch: bytes = b""
    lies: list[dict[str, Any]] = field(default_factory=list)
    """What the next reads and puts are answered instead of the truth."""

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_post("/v3/kv/range", self._range)
        app.router.add_post("/v3/kv/put", self._range)
        app.router.add_post("/v3/kv/txn", self._txn)
        app.router.add_post("/v3/watch", self._watch)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.silent_again.set()
        await self._runner.cleanup()

    @property
    def endpoint(self) -> str:
        host, port = self._runner.addresses[0][:2]
        return f"http://{host}:{port}"

    def _header(self) -> dict[str, str]:
        return {"cluster_id": "1", "member_id": "2", "revision": str(self.revision)}

    def _epoch_reply(self) -> dict[str, Any]:
        kv = {"key": "eA==", "value": base64.b64encode(self.epoch).decode(), "mod_revision": "2"}
        return {"header": self._header(), "kvs": [kv] if self.epoch else [], "count": "1"}

    async def _range(self, _request: web.Request) -> web.Response:
        return web.json_response(self.lies.pop(0) if self.lies else self._epoch_reply())

    async def _txn(self, request: web.Request) -> web.Response:
        operations = (await request.json()).get("success", [])
        if any("request_put" in operation for operation in operations):
            self.revision += 1
        kinds = [next(iter(operation)) for operation in operations]
        replies = [
            {"response_put": {}} if kind == "request_put" else {"response_range": self._epoch_reply()} for kind in kinds
        ]
        return web.json_response({"header": self._header(), "succeeded": True, "responses": replies})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        create = (await request.json())["create_request"]
        self.starts.append(int(create["start_revision"]))
        script = self.scripts.pop(0) if self.scripts else Script(close=False)
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(script.first or line(revision=self.revision, created=True))
        for chunk in script.chunks:
            await response.write(chunk)
        if not script.close:
            await self.silent_again.wait()
        return response


def line(revision: int = 0, **result: Any) -> bytes:
    """One watch response."""
    return json.dumps({"result": {"header": {"revision": str(revision)}, **result}}).encode() + b"\n"


def news(*events: tuple[int, str], fragment: bool = False) -> bytes:
    """A watch response with puts at revisions; the value is the key."""
    kvs = [
        {"kv": {"key": b64(key), "value": b64(key), "mod_revision": str(rev), "create_revision": str(rev)}}
        for rev, key in events
    ]
    return line(max(rev for rev, _ in events), events=kvs, **({"fragment": True} if fragment else {}))


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
