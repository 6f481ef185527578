"""`…/log` of a lab instance: what its container has written, and the last lines of one that is gone.

Reads the engine directly, as text, with the rights to read the lab. Promises that a reader who leaves, who does not
take what is written, or who stays when the daemon stops holds nothing open; and that one person's readers leave room
for others'.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager

import structlog
from aiohttp import web

from controllers.containers.engine import keep_alive
from controllers.containers.runtime import ContainerRuntime
from controllers.instances.kind import LabInstanceRequest, placed
from controllers.instances.routes import PATH, RESOURCES, target_of
from controllers.instances.runtime import NotNow, Refused
from lrm.api.call import API, Api, call_of
from lrm.api.lists import read_one
from lrm.api.requests import Target, boolean
from lrm.api.status import RequestError, bad_request

log = structlog.get_logger(__name__)

READERS_MOST = 16
"""Logs that one principal may read at once."""
_TAIL = 1000
"""Lines, unless told otherwise."""
_LEFT_AFTER = 2.0
"""Seconds between two looks whether the reader of a log is still there."""
_PARAMETERS = ("follow", "namespace", "tail", "tailLines")


class _Readers:
    """Those who read a log now."""

    def __init__(self) -> None:
        self.closing = asyncio.Event()
        """Set when the daemon stops: who follows a log is not waited for."""
        self._reading: Counter[str] = Counter()

    @contextmanager
    def one(self, name: str) -> Iterator[None]:
        """One more of a principal's. Raises 429 where it has `READERS_MOST`."""
        if self._reading[name] >= READERS_MOST:
            message = f"{READERS_MOST} logs are being read by {name}; end one, or try again"
            raise RequestError(429, "TooManyRequests", message, retry_after=5)
        self._reading[name] += 1
        try:
            yield
        finally:
            self._reading[name] -= 1
            if not self._reading[name]:
                del self._reading[name]


_READERS: web.AppKey[_Readers] = web.AppKey("readers of logs")


def add_log_routes(app: web.Application, _api: Api) -> None:
    """Under the resource, as kubectl would ask, and under the flat endpoints."""
    app[_READERS] = _Readers()
    app.on_shutdown.append(_end_readers)
    app.router.add_get(f"{PATH}/{{name}}/log", _log)
    app.router.add_get(f"{RESOURCES}/{{name}}/log", _log)


async def _end_readers(app: web.Application) -> None:
    app[_READERS].closing.set()


async def _log(request: web.Request) -> web.StreamResponse:
    """GET: what a container has written, as text; `?tailLines=100` of it at most, `?follow=true` goes on with it.

    Of a container that is gone the last lines are kept, and told with a Warning, which kubectl prints.
    """
    call, target = call_of(request), target_of(request)
    call.principal.require("read", target.namespace, f"read the log of {target.kind.plural}")
    follow, lines = boolean(request, "follow"), _lines(request)
    lab = await _lab(request, target)
    if not placed(lab) and lab.status.last_log is not None:
        return _kept(request, lab.status.last_log, lines)
    logs = request.app[API].offers.get(ContainerRuntime).logs
    with request.app[_READERS].one(call.principal.name):
        async with aclosing(logs(lab, tail=lines, follow=follow)) as pieces:
            try:
                await anext(pieces)
            except NotNow as error:
                raise RequestError(503, "ServiceUnavailable", str(error), retry_after=2) from error
            except Refused as error:
                if lab.status.last_log is not None:
                    return _kept(request, lab.status.last_log, lines)
                raise RequestError(404, "NotFound", f'"{lab.name}": {error}') from error
            return await _streamed(request, pieces)


async def _lab(request: web.Request, target: Target) -> LabInstanceRequest:
    item = await read_one(request.app[API], target, "")
    if item.resource is None:
        raise RequestError(500, "InternalError", item.error)
    if not isinstance(item.resource, LabInstanceRequest):
        raise TypeError(f"{item.resource.kind} is no lab instance")
    if item.resource.spec.runs_in != "Container":
        message = f'"{target.name}" runs on CML: its nodes have consoles, and it has no log'
        raise RequestError(404, "NotFound", message)
    return item.resource


def _lines(request: web.Request) -> int:
    """How many lines are asked for. Raises 400, also for parameters that would be ignored."""
    query = request.query
    for name in sorted(set(query) - set(_PARAMETERS)):
        raise bad_request(f"{name[:40]!r} says nothing of a log; there are {', '.join(_PARAMETERS)}")
    if "tail" in query and "tailLines" in query:
        raise bad_request("tail is another name of tailLines: give one of them")
    name = "tail" if "tail" in query else "tailLines"
    text = query.get(name, str(_TAIL))
    if not (text.isascii() and text.isdecimal()) or len(text) > 9:
        raise bad_request(f"{name} must be a whole number from 0, not {text[:40]!r}")
    return int(text)


def _kept(request: web.Request, last_log: str, lines: int) -> web.Response:
    call_of(request).warn("its container is gone: these are the last lines of its log, as they were kept")
    text = "".join(last_log.splitlines(keepends=True)[-lines:]) if lines else ""
    return web.Response(text=text, content_type="text/plain", charset="utf-8")


async def _streamed(request: web.Request, pieces: AsyncIterator[bytes]) -> web.StreamResponse:
    """Until the log ends, its reader leaves, or the daemon stops."""
    reply = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
    await reply.prepare(request)
    async with asyncio.TaskGroup() as tasks:
        ends = [
            tasks.create_task(_read_out(pieces, reply, request)),
            tasks.create_task(_until_left(request)),
            tasks.create_task(_until_closing(request)),
        ]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in ends:
            task.cancel()
    return reply


async def _read_out(pieces: AsyncIterator[bytes], reply: web.StreamResponse, request: web.Request) -> None:
    """Write the pieces and the end; whoever does not take them is cut off. The answer has begun: nothing is raised."""
    api = request.app[API]
    keep_alive(request.transport)
    try:
        async for piece in pieces:
            async with api.clock.timeout(api.settings.write_seconds):
                await reply.write(piece)
        async with api.clock.timeout(api.settings.write_seconds):
            await reply.write_eof()
    except NotNow as error:
        log.warning("instances.log_broke_off", path=request.path, error=str(error))
    except (TimeoutError, ConnectionError):
        if request.transport is not None:
            request.transport.abort()


async def _until_left(request: web.Request) -> None:
    """Return once its client has closed the connection: of a silent log nothing is written that could tell."""
    while request.transport is not None and not request.transport.is_closing():
        await request.app[API].clock.sleep(_LEFT_AFTER)


async def _until_closing(request: web.Request) -> None:
    await request.app[_READERS].closing.wait()
