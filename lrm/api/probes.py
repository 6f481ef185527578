"""How the daemon is: probes for machines, and what it says about itself for people.

`/livez` and `/readyz` are open to everybody and say one line; `/api/status/…` and `/metrics` need the right to read.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from lrm.api.call import API, call_of
from lrm.api.codec import negotiate, respond

OPEN_PATHS = frozenset({"/livez", "/readyz", "/version"})
"""Answered without a token."""


def add_probe_routes(app: web.Application) -> None:
    """The probes, /api/status and /metrics."""
    app.add_routes(
        [
            web.get("/livez", _livez),
            web.get("/readyz", _readyz),
            web.get("/metrics", _metrics),
            web.get("/api/status/metrics", _metrics),
            web.get("/api/status/health", _health),
            web.get("/api/status/ready", _ready),
            web.get("/api/status/status", _status),
            web.get("/api/status/leader", _leader),
            web.get("/api/status/bookmarks", _bookmarks),
            web.get("/api/status/finalizers", _finalizers),
        ]
    )


async def _livez(request: web.Request) -> web.Response:
    return _probe(*request.app[API].status.live())


async def _readyz(request: web.Request) -> web.Response:
    return _probe(*request.app[API].status.ready())


async def _health(request: web.Request) -> web.Response:
    """503 only when unhealthy: degraded still serves."""
    _readable(request)
    document = dict(await request.app[API].status.health())
    return await respond(negotiate(request), document, status=503 if document.get("status") == "unhealthy" else 200)


async def _ready(request: web.Request) -> web.Response:
    _readable(request)
    ready, why = request.app[API].status.ready()
    return await respond(negotiate(request), {"ready": ready, "reason": why}, status=200 if ready else 503)


async def _status(request: web.Request) -> web.Response:
    _readable(request)
    return await respond(negotiate(request), dict(await request.app[API].status.status()))


async def _leader(request: web.Request) -> web.Response:
    _readable(request)
    return await respond(negotiate(request), dict(request.app[API].status.leader()))


async def _bookmarks(request: web.Request) -> web.Response:
    _readable(request)
    return await respond(negotiate(request), dict(await request.app[API].status.bookmarks()))


async def _finalizers(request: web.Request) -> web.Response:
    _readable(request)
    return await respond(negotiate(request), dict(request.app[API].status.finalizers()))


async def _metrics(request: web.Request) -> web.Response:
    """For Prometheus: its text format, or OpenMetrics where that is accepted."""
    _readable(request)
    accepted = ",".join(request.headers.getall("Accept", ()))
    body, content_type = await asyncio.to_thread(request.app[API].telemetry.look(accepted))
    return web.Response(body=body, headers={"Content-Type": content_type})


def _readable(request: web.Request) -> None:
    """The daemon belongs to no namespace: whoever may read anywhere may read about it."""
    principal = call_of(request).principal
    anywhere = next(iter(principal.namespaces), "") if principal.namespaces else ""
    principal.require("read", anywhere, "read the daemon's status")


def _probe(good: bool, why: str) -> web.Response:
    return web.Response(text="ok\n" if good else f"{why}\n", status=200 if good else 503)
