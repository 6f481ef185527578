"""The API as one aiohttp application: what every request goes through, and the site that serves it.

Each request is counted, authenticated, handled, its errors turned into a `Status`, and recorded before it is answered.
`serve` gives the site with its URL and ends the watches when it closes. The daemon and tests call it.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import orjson
import structlog
from aiohttp import web

from lrm.api.audit import Audit, Touched
from lrm.api.auth import ANONYMOUS, Authenticator, Tokens, is_loopback
from lrm.api.call import API, CALL, Api, Call, call_of, warning_header
from lrm.api.events import add_event_routes
from lrm.api.probes import OPEN_PATHS, add_probe_routes
from lrm.api.requests import wants_watch
from lrm.api.resources import add_resource_routes
from lrm.api.status import RequestError, answer_of, expected, response_headers, status_document
from lrm.api.tls import server_context
from lrm.errors import LrmError

log = structlog.get_logger(__name__)

__all__ = ["Api", "ApiError", "Site", "build_app", "call_of", "serve"]

_WRITING = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_SHUTDOWN_SECONDS = 10.0

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ApiError(LrmError):
    """The API cannot be served as the settings say: a port in use, a bad certificate, no tokens where they must be."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where the API is served."""

    url: str
    port: int


@dataclass
class _Load:
    """How many requests and watches are being served."""

    requests: int = 0
    watches: int = 0


_AUTH: web.AppKey[Authenticator] = web.AppKey("authenticator")
_AUDIT: web.AppKey[Audit] = web.AppKey("audit")
_LOAD: web.AppKey[_Load] = web.AppKey("load")


def build_app(api: Api) -> web.Application:
    """The application without a site. Raises `TokensFileError`."""
    tokens = Tokens(api.settings.tokens_file, api.clock) if api.settings.tokens_file else None
    app = web.Application(middlewares=[_each_request])
    app[API] = api
    app[_AUTH] = Authenticator(tokens)
    app[_AUDIT] = Audit(api.settings.audit_file, api.clock)
    app[_LOAD] = _Load()
    add_probe_routes(app)
    add_resource_routes(app)
    add_event_routes(app)
    for add_routes in api.routes:
        add_routes(app, api)
    app.on_shutdown.append(_end_watches)
    return app


@asynccontextmanager
async def serve(api: Api) -> AsyncIterator[Site]:
    """Serve until the context is left; then watches end and requests in hand are waited for. Raises `ApiError`."""
    settings = api.settings
    if settings.tokens_file is None and not is_loopback(settings.host):
        raise ApiError(f"serving on {settings.host} needs a tokens file: without one only loopback is served")
    try:
        app = build_app(api)
        tls = server_context(settings.tls_cert, settings.tls_key, api.clock)
    except (LrmError, OSError) as error:
        raise ApiError(f"the API cannot be served: {error}") from error
    if tls is None and not is_loopback(settings.host):
        log.warning("api.tokens_in_clear", host=settings.host, advice="set a TLS certificate and key")
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=_SHUTDOWN_SECONDS)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, settings.host, settings.port, ssl_context=tls).start()
        except (OSError, OverflowError) as error:
            why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
            raise ApiError(f"cannot serve on {settings.host} port {settings.port}: {why}") from error
        port = int(runner.addresses[0][1])
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        yield Site(f"{'https' if tls else 'http'}://{host}:{port}", port)
    finally:
        await runner.cleanup()


async def _end_watches(app: web.Application) -> None:
    app[API].fanout.stop()


@web.middleware
async def _each_request(request: web.Request, handler: _Handler) -> web.StreamResponse:
    call = Call(request_id=uuid.uuid4().hex, principal=ANONYMOUS)
    request[CALL] = call
    try:
        response = await _answered(request, call, handler)
    except asyncio.CancelledError:
        _record(request, call, 0, "cancelled: the outcome is unknown")
        raise
    if not _record(request, call, response.status):
        call.warn("this request could not be recorded")
    if not response.prepared:
        response.headers["X-Request-Id"] = call.request_id
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers.setdefault("Cache-Control", "no-cache, private")
        for warning in call.warnings:
            response.headers.add("Warning", warning_header(warning))
    return response


async def _answered(request: web.Request, call: Call, handler: _Handler) -> web.StreamResponse:
    """The handler's response, or its error as a Status."""
    load, settings = request.app[_LOAD], request.app[API].settings
    watching = wants_watch(request)
    held, most = (load.watches, settings.max_watches) if watching else (load.requests, settings.max_in_flight)
    if held >= most and request.path not in OPEN_PATHS:
        busy = RequestError(429, "TooManyRequests", "too many requests at once; try again", retry_after=1)
        return _error_response(request, call, busy)
    try:
        if watching:
            load.watches += 1
        else:
            load.requests += 1
        try:
            if request.path not in OPEN_PATHS:
                call.principal = request.app[_AUTH].principal(request)
                if request.method in _WRITING:
                    request.app[_AUDIT].check()
            return await handler(request)
        finally:
            if watching:
                load.watches -= 1
            else:
                load.requests -= 1
    except Exception as error:  # noqa: BLE001 - whatever it is, the client gets a Status and the log the rest
        return _error_response(request, call, error)


def _error_response(request: web.Request, call: Call, error: Exception) -> web.Response:
    answer = answer_of(error, call.request_id, writing=request.method in _WRITING)
    if not expected(error):
        log.error("api.failed", request=call.request_id, method=request.method, path=request.path, exc_info=error)
    elif answer.code >= 500:
        log.warning("api.refused", request=call.request_id, path=request.path, code=answer.code, error=str(error))
    document: dict[str, Any] = status_document(answer, call.about)
    headers = response_headers(answer)
    return web.Response(
        body=orjson.dumps(document), status=answer.code, headers=headers, content_type="application/json"
    )


def _record(request: web.Request, call: Call, code: int, note: str = "") -> bool:
    """Writes, and refusals for lack of rights."""
    if request.method not in _WRITING and code not in (401, 403):
        return True
    about = call.about
    touched = call.touched or ([Touched(about.plural, about.namespace, about.name)] if about.plural else [])
    if note:
        touched = [*touched, Touched("", "", "", note=note)]
    return request.app[_AUDIT].record(
        request_id=call.request_id,
        who=call.principal.name,
        role=str(call.principal.role),
        source=request.remote or "",
        method=request.method,
        path=request.path_qs,
        code=code,
        touched=touched,
    )
