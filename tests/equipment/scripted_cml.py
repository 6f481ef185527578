"""A CML-shaped HTTP server that says what a test wrote down, for answers that no well-behaved server gives.

It knows just enough to be logged in to: tokens that it handed out, an identity, an empty world. Everything else is a
script: `on("GET", "/labs", …)` takes replies that are given in turn, the last one for ever. It records every request.
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

USERNAME = "admin"
PASSWORD = "s3cret-pa55word"
IDENTITY = "564d4a4c-0000-4000-8000-00000000000a"
HTML_502 = "<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>"

Reply = web.StreamResponse
Script = Callable[[web.Request], Awaitable[Reply] | Reply] | Reply


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as it came in."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass
class ScriptedCml:
    identity: str = IDENTITY
    admin: Any = True
    token_claims: str = ""
    """The middle part of the tokens; empty: not a JWT at all."""
    seen: list[Seen] = field(default_factory=list)
    valid_tokens: set[str] = field(default_factory=set)
    connections: set[asyncio.BaseTransport] = field(default_factory=set)
    url: str = ""
    _scripts: dict[tuple[str, str], list[Script]] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    @classmethod
    @asynccontextmanager
    async def run(
        cls, *, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1", port: int = 0
    ) -> AsyncIterator[ScriptedCml]:
        cml = cls()
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{tail:.*}", cml._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port, ssl_context=tls).start()
            cml.url = f"{'https' if tls else 'http'}://{host}:{runner.addresses[0][1]}"
            yield cml
        finally:
            await runner.cleanup()

    def on(self, method: str, path: str, *replies: Script) -> None:
        """Answer these requests with these replies in turn, the last one from then on."""
        self._scripts[method, path] = list(replies)

    def count(self, method: str, path: str) -> int:
        return sum(1 for s in self.seen if (s.method, s.path) == (method, path))

    @property
    def logins(self) -> int:
        return self.count("POST", "/auth_extended")

    @property
    def open_connections(self) -> int:
        return sum(1 for c in self.connections if not c.is_closing())

    def expire_tokens(self) -> None:
        self.valid_tokens.clear()

    def paths(self) -> list[str]:
        return [f"{s.method} {s.path}" for s in self.seen]

    async def _handle(self, request: web.Request) -> Reply:
        if request.transport is not None:
            self.connections.add(request.transport)
        path = request.path.removeprefix("/api/v0")
        self.seen.append(Seen(request.method, path, dict(request.query), dict(request.headers), await request.read()))
        script = self._scripts.get((request.method, path))
        if script:
            step = script.pop(0) if len(script) > 1 else script[0]
            if isinstance(step, web.Response):
                return web.Response(status=step.status, body=step.body, headers=step.headers)
            reply = step(request) if callable(step) else step
            return reply if isinstance(reply, web.StreamResponse) else await reply
        if path == "/auth_extended":
            return self._login(await request.json())
        if path == "/system_information":
            return web.json_response({"version": "2.9.1+build.7", "ready": True})
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.valid_tokens:
            return refusal(401, "Authentication required")
        return self._known(request.method, path)

    def _login(self, body: Any) -> Reply:
        if body != {"username": USERNAME, "password": PASSWORD}:
            return refusal(403, "Authentication failed!")
        token = f"t{next(self._numbers)}.{self.token_claims or 'x'}.signature"
        self.valid_tokens.add(token)
        return web.json_response(
            {"username": USERNAME, "id": "00000000-0000-4000-8000-000000000000", "token": token}
            | ({} if self.admin is None else {"admin": self.admin})
        )

    def _known(self, method: str, path: str) -> Reply:
        if (method, path) == ("GET", "/licensing"):
            return web.json_response({"udi": {"hostname": "cml", "product_uuid": self.identity}})
        if (method, path) == ("GET", "/populate_lab_tiles"):
            return web.json_response({"lab_tiles": {}})
        if (method, path) == ("GET", "/labs"):
            return web.json_response([])
        if method in {"PUT", "DELETE"}:
            return web.Response(status=204)
        return refusal(404, f"not scripted: {method} {path}")


def refusal(status: int, description: Any) -> web.Response:
    """CML's own error."""
    return web.json_response({"code": status, "description": description}, status=status)


def page(status: int = 502) -> web.Response:
    """The front server's error."""
    return web.Response(status=status, text=HTML_502, content_type="text/html")


async def silence(_: web.Request) -> Reply:
    """Never answer."""
    await asyncio.Event().wait()
    raise AssertionError


async def hang_up(request: web.Request) -> Reply:
    """Close the connection instead of answering."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


async def cut_off(request: web.Request) -> Reply:
    """Announce a long body, send a little of it, and go."""
    response = web.StreamResponse(headers={"Content-Length": "1000", "Content-Type": "application/json"})
    await response.prepare(request)
    await response.write(b'["90f84e38-a71c-4d57-8d90-00fa8a197385"')
    if request.transport is not None:
        request.transport.close()
    return response
