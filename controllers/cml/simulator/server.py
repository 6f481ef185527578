"""The HTTP server around the machines: paths to instances, boot pages, faults, the request log.

    async with Simulator.run(Options(...), clock=clock) as simulator:
        simulator.url                     the machine at the root: {url}/api/v0, {url}/ws/ui
        simulator.url_of("i-0abc")        any other, made at its first request
        simulator.machine("i-0abc")       look inside it, or change it as a CML user would
        simulator.faults.add("drop", path="/labs")

Promises: a request is carried out in one piece between two awaits; a defect of the simulator itself is a 500 for the
client and is raised again when `run` ends, so that it never passes for a misbehaving CML.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
import structlog
from aiohttp import WSCloseCode, web

from controllers.cml.simulator import (
    api_elements,
    api_labs,
    api_licensing,
    api_people,
    api_session,
    api_system,
)
from controllers.cml.simulator.control import Control, Handler
from controllers.cml.simulator.faults import Fault, Faults
from controllers.cml.simulator.fleet import ROOT, Fleet, TooManyMachinesError
from controllers.cml.simulator.machine import Machine
from controllers.cml.simulator.options import Options
from controllers.cml.simulator.routing import Call, RefusalError, Reply, RouteTable, check_ids
from controllers.cml.simulator.unsimulated import UNSIMULATED
from controllers.cml.simulator.websocket import Channel
from storage.clock import Clock, SystemClock

ROUTES = (
    *api_session.ROUTES,
    *api_system.ROUTES,
    *api_licensing.ROUTES,
    *api_labs.ROUTES,
    *api_elements.ROUTES,
    *api_people.ROUTES,
)
MAX_BODY = 20 * 1024**2
"""What the proxy before the API lets through."""
_GRACE = 0.25
"""How long a stop waits for requests that are being answered; a delaying fault may hold one for an hour."""

_CLOSE_SECONDS = 2.0
"""How long a channel that is closed waits for the client to agree."""
_NO_ANSWER = 444
"""Never sent: the connection is gone."""

_log = structlog.get_logger(__name__)


class Simulator:
    """One server with any number of simulated CMLs."""

    def __init__(self, options: Options, clock: Clock) -> None:
        self.options = options
        self.clock = clock
        self.faults = Faults()
        self.fleet = Fleet(options, clock, self.faults)
        self.url = ""
        self.defects: list[Exception] = []
        self._table = RouteTable(ROUTES, UNSIMULATED)
        self._channels: set[Channel] = set()

    @classmethod
    @asynccontextmanager
    async def run(cls, options: Options | None = None, *, clock: Clock | None = None) -> AsyncIterator[Simulator]:
        """Serve inside the block; every task, socket and machine is gone after it."""
        simulator = cls(options or Options(), clock or SystemClock())
        app = web.Application(client_max_size=MAX_BODY, middlewares=[simulator._watched])
        app.add_routes(Control(simulator.fleet).routes())
        app.router.add_route("*", "/{tail:.*}", simulator._handle)
        app.on_shutdown.append(simulator._end_channels)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=_GRACE)
        await simulator.fleet.open()
        try:
            await runner.setup()
            await simulator._listen(runner)
            yield simulator
        finally:
            await runner.cleanup()
            await simulator.fleet.close()
        if simulator.defects:
            raise ExceptionGroup("the simulator itself failed", simulator.defects)

    def url_of(self, name: str) -> str:
        """Base address of an instance, without `/api/v0`."""
        return self.url if name == ROOT else f"{self.url}/{name}"

    def machine(self, name: str = ROOT) -> Machine:
        return self.fleet.machine(name)

    async def _listen(self, runner: web.AppRunner) -> None:
        o = self.options
        context = None
        if o.tls_cert:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(o.tls_cert, o.tls_key)
        site = web.TCPSite(runner, o.host, o.port, ssl_context=context)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"{'https' if context else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"

    async def _end_channels(self, _: web.Application) -> None:
        for channel in self._channels:
            channel.end(WSCloseCode.GOING_AWAY)

    @web.middleware
    async def _watched(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The outermost door: what is wrong with the simulator is kept apart from what it plays."""
        try:
            return await handler(request)
        except web.HTTPException:
            raise
        except ConnectionError:
            # The client went away in the middle; there is nobody to tell.
            return _hang_up(request)
        except Exception as e:  # noqa: BLE001 - kept, and raised again when the server stops
            _log.exception("the simulator failed", method=request.method, path=request.path)
            self.defects.append(e)
            return _response(RefusalError(500, _unexpected(request.path)).reply())

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        name, path = _split(request.rel_url.raw_path)
        route = "/ws/ui" if path == "/ws/ui" else path.removeprefix("/api/v0")
        if not self.fleet.valid(name) or (route == path and path != "/ws/ui"):
            return _page(404, "Not Found")
        try:
            machine = await self.fleet.awake(name)
        except TooManyMachinesError:
            return _page(507, "Insufficient Storage")
        if machine is None or machine.stage == "refused":
            return _hang_up(request)
        return await self._serve(request, machine, route)

    async def _serve(self, request: web.Request, machine: Machine, route: str) -> web.StreamResponse:
        entry: dict[str, Any] = {
            "at": self.clock.now().isoformat(),
            "method": request.method,
            "path": route,
            "route": self._template(machine, request.method, route),
            "status": 0,
            "client": request.headers.get("X-Client-UUID", ""),
        }
        machine.log.append(entry)
        machine.counts[f"{request.method} {entry['route']}"] += 1
        try:
            # Before anything waits: a client that gives up later has still asked for it.
            raw = b"" if route == "/ws/ui" else await request.read()
        except web.HTTPRequestEntityTooLarge:
            return _page(413, "Request Entity Too Large")
        except web.RequestPayloadError:
            return _hang_up(request)
        struck = self.faults.striking(machine.name, request.method, route)
        answer = await self._before(request, machine, struck)
        if answer is not None:
            entry["status"] = 0 if answer.status == _NO_ANSWER else answer.status
            return answer
        if route == "/ws/ui":
            return await self._converse(request, machine)
        reply = self._carry_out(machine, request, route, raw)
        entry["status"] = reply.status
        return await self._after(request, reply, struck)

    def _template(self, machine: Machine, method: str, path: str) -> str:
        if path == "/ws/ui":
            return path
        try:
            return self._table.find(method, path, machine.options.release)[0].template
        except RefusalError:
            return "(unmatched)"

    async def _before(self, request: web.Request, machine: Machine, struck: list[Fault]) -> web.StreamResponse | None:
        """What happens instead of carrying the request out, if anything does."""
        for fault in struck:
            if fault.kind == "delay":
                await self.clock.sleep(fault.seconds)
        if machine.stage in ("off", "refused") or any(f.kind == "drop" for f in struck):
            return _hang_up(request)
        if machine.stage == "bad-gateway":
            return _page(502, "Bad Gateway")
        for fault in struck:
            if fault.kind == "html":
                return _page(fault.status if fault.status != 500 else 502, fault.description or "Bad Gateway")
            if fault.kind == "status":
                text = fault.description or _unexpected(request.path)
                return _response(RefusalError(fault.status, text).reply())
        return None

    def _carry_out(self, machine: Machine, request: web.Request, path: str, raw: bytes) -> Reply:
        """One request, from the token to the answer, without a wait in between."""
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        call = Call(machine, request.method, path, request.query, raw, _content_type(request))
        call.token = token if kind.lower() == "bearer" else ""
        try:
            machine.look()
            route, call.params = self._table.find(call.method, path, machine.options.release)
            call.found_user = machine.directory.user_of(call.token, self.clock.now())
            call.check_access(route.access)
            check_ids(call.params)
            return route.handler(call)
        except RefusalError as e:
            return e.reply()

    async def _after(self, request: web.Request, reply: Reply, struck: list[Fault]) -> web.StreamResponse:
        """The answer, or what is left of it."""
        for fault in struck:
            if fault.kind == "drop-answer":
                return _hang_up(request)
            if fault.kind in ("empty", "half") and (reply.status, reply.content_type) == (200, "application/json"):
                reply = Reply(200, _thinned(reply.body, empty=fault.kind == "empty"))
            if fault.kind == "truncate":
                reply = Reply(reply.status, reply.body[: len(reply.body) // 2], reply.content_type)
            if fault.kind == "cut":
                return await _cut(request, reply)
        return _response(reply)

    async def _converse(self, request: web.Request, machine: Machine) -> web.StreamResponse:
        socket = web.WebSocketResponse(heartbeat=30, timeout=_CLOSE_SECONDS)
        if not socket.can_prepare(request).ok:
            return _page(400, "Bad Request")
        await socket.prepare(request)

        async def alive() -> bool:
            return machine.powered and await self.fleet.awake(machine.name) is machine

        channel = Channel(machine, socket, alive)
        self._channels.add(channel)
        try:
            await channel.run()
        finally:
            self._channels.discard(channel)
        return socket


async def serve(options: Options, ready: Callable[[str], None] | None = None) -> None:
    """Serve until cancelled; `ready` is told the address once it answers."""
    async with Simulator.run(options) as simulator:
        if ready is not None:
            ready(simulator.url)
        await asyncio.get_running_loop().create_future()


def _split(raw_path: str) -> tuple[str, str]:
    """The instance that a path is of, and the path within it."""
    head, _, rest = raw_path.lstrip("/").partition("/")
    return (ROOT, f"/{head}/{rest}".rstrip("/")) if head in ("api", "ws") else (head, f"/{rest}".rstrip("/"))


def _unexpected(path: str) -> str:
    return (
        f"The API at /api/v0{path.partition('/api/v0')[2] or path} encountered an unexpected error.  "
        "Please report this problem to support."
    )


def _response(reply: Reply) -> web.Response:
    kind, _, charset = reply.content_type.partition("; charset=")
    if reply.status == 204 or not reply.body:
        return web.Response(status=reply.status)
    return web.Response(status=reply.status, body=reply.body, content_type=kind, charset=charset or None)


def _page(status: int, title: str) -> web.Response:
    """A page of the proxy in front of the API."""
    text = (
        f"<html>\r\n<head><title>{status} {title}</title></head>\r\n<body>\r\n"
        f"<center><h1>{status} {title}</h1></center>\r\n<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n"
    )
    return web.Response(status=status, text=text, content_type="text/html")


def _hang_up(request: web.Request) -> web.Response:
    """End the connection without a word; the response is written nowhere."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=_NO_ANSWER)


async def _cut(request: web.Request, reply: Reply) -> web.StreamResponse:
    """Announce the whole body, send half of it, and end."""
    response = web.StreamResponse(status=reply.status, headers={"Content-Type": reply.content_type})
    response.content_length = max(len(reply.body), 2)
    await response.prepare(request)
    await response.write(reply.body[: len(reply.body) // 2])
    if request.transport is not None:
        request.transport.close()
    return response


def _thinned(body: bytes, *, empty: bool) -> bytes:
    """A list or map with nothing left of it, or the first half."""
    value = orjson.loads(body)
    inner = value["lab_tiles"] if isinstance(value, dict) and "lab_tiles" in value else value
    if not isinstance(inner, list | dict):
        return body
    keep = 0 if empty else len(inner) // 2
    left: Any = inner[:keep] if isinstance(inner, list) else dict(list(inner.items())[:keep])
    return orjson.dumps({"lab_tiles": left} if inner is not value else left)


def _content_type(request: web.Request) -> str:
    """What the client said, nothing where it said nothing."""
    return request.content_type if "Content-Type" in request.headers else ""
