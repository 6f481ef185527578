"""Requests to etcd's JSON gateway: endpoints with failover, TLS, tokens, and a deadline on every one.

Promises that a request which may have been carried out is never sent again unless the caller says that it is
repeatable; that what was certainly not carried out goes to the next member; that tokens and passwords appear in no
log and no exception. It does not interpret replies and knows nothing of keys. etcd3-py builds and sends the requests;
its constructor's blocking look at the server, its models and its watcher are left aside. Called by `storage.etcd*`.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import random
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Final, TypeVar, cast
from urllib.parse import urlsplit

import aiohttp
import orjson
from etcd3.aio_client import AioClient
from etcd3.baseclient import BaseClient

from storage.clock import Clock
from storage.errors import PermissionDenied, StorageError, Unavailable
from storage.etcd_errors import Closed, LostReply, NotDone, TokenRefused, classify_body
from storage.etcd_wire import Json

MAX_RESPONSE_BYTES: Final = 64 * 1024 * 1024
"""Largest reply read into memory; lists ask for fewer entries when they meet it."""

_T = TypeVar("_T")
_LARGE_BODY = 512 * 1024
"""Larger bodies are sent in pieces, between which others run."""
_POOL = 64
_CONNECT_SECONDS = 2.0
_IMPATIENT_SECONDS = 0.25
_BACKOFF_FIRST, _BACKOFF_MAX = 0.05, 1.0


class ResponseTooLarge(StorageError):  # noqa: N818 - named as its siblings
    """A reply is larger than `MAX_RESPONSE_BYTES`."""


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """Files for https endpoints: the CA (None: the system's) and, for mutual TLS, certificate and key."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    verify_hostname: bool = True

    def context(self) -> ssl.SSLContext:
        """Read the files. Raises `Unavailable` when one cannot be used."""
        try:
            context = ssl.create_default_context(cafile=str(self.ca) if self.ca else None)
            context.check_hostname = self.verify_hostname
            if self.cert:
                context.load_cert_chain(str(self.cert), str(self.key) if self.key else None)
        except (OSError, ssl.SSLError) as error:
            raise Unavailable(f"a TLS file for the store cannot be used: {error}") from error
        return context


class _Client(AioClient):  # type: ignore[misc]  # etcd3-py has no types
    """etcd3-py's client without the blocking request for the server's version, on a session of ours."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        parts = urlsplit(url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        BaseClient.__init__(self, host=host, port=parts.port or 2379, protocol=parts.scheme)
        self.ssl_context = None
        self.session = session

    def _retrieve_version(self) -> None:
        self.server_version = self.cluster_version = "3.4.0"

    def _verify_version(self) -> None:
        """`Storage.health` names the versions that are not to be used."""

    def _get_prefix(self) -> None:
        """Every etcd that we accept, 3.4 and later, serves the gateway here."""
        self.api_prefix = "/v3"


def check_endpoint(url: str) -> str:
    """The endpoint in its plain form. Raises `ValueError` in one sentence."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.path.strip("/") or parts.username:
        raise ValueError(f"an etcd endpoint is http://HOST:PORT or https://HOST:PORT, not {parts.hostname or url!r}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{parts.port or 2379}"


class Gateway:
    """The members of one etcd cluster. Construction does no input or output; the first call connects."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        clock: Clock,
        tls: TlsConfig | None,
        user: str,
        password: Callable[[], str] | str,
        request_timeout: float,
    ) -> None:
        if not endpoints:
            raise ValueError("an etcd backend needs at least one endpoint")
        if request_timeout <= 0:
            raise ValueError("request_timeout is a positive number of seconds")
        self.endpoints = tuple(dict.fromkeys(check_endpoint(url) for url in endpoints))
        self.request_timeout = request_timeout
        self._connect_timeout = min(_CONNECT_SECONDS, request_timeout / 4)
        self._clock = clock
        self._tls = tls
        self._user = user
        self._password = password
        self._current = 0
        self._unary: dict[str, _Client] = {}
        self._streams: dict[str, _Client] = {}
        self._sessions: list[aiohttp.ClientSession] = []
        self._token = ""
        self._token_line = asyncio.Lock()
        self._closed = False

    @property
    def preferred(self) -> str:
        """The member that answered last."""
        return self.endpoints[self._current]

    def after(self, endpoint: str) -> str:
        """The member to try after one that failed."""
        return self.endpoints[(self.endpoints.index(endpoint) + 1) % len(self.endpoints)]

    async def call(self, path: str, body: Json, *, repeatable: bool, timeout: float | None = None) -> Json:
        """Send a request and return etcd's reply.

        Raises `LostReply` when a request that is not repeatable may have been carried out, `Unavailable` when none
        was until the timeout, and etcd's refusals as errors of `storage.errors`.
        """
        deadline = self._clock.monotonic() + (timeout or self.request_timeout)
        backoff = _BACKOFF_FIRST
        for tries in itertools.count(1):
            endpoint = self.preferred
            left = deadline - self._clock.monotonic()
            # A member that hangs must leave time for the next one.
            patience = max(left * 0.4, min(left, 0.2)) if repeatable and len(self.endpoints) > 1 else left
            try:
                return await self.call_member(endpoint, path, body, patience)
            except NotDone as error:
                reason = str(error)
            except LostReply as error:
                reason = str(error)
                if not repeatable:
                    self._leave(endpoint)
                    raise
            self._leave(endpoint)
            if tries % len(self.endpoints) == 0:
                pause = min(backoff * random.uniform(0.5, 1.0), deadline - self._clock.monotonic())  # noqa: S311 - spreads retries
                await self._clock.sleep(max(pause, 0.0))
                backoff = min(backoff * 2, _BACKOFF_MAX)
            if self._clock.monotonic() >= deadline:  # A try without time would only hide why the last one failed.
                raise Unavailable(f"no member of the store answered in time; the last one: {reason}")
        raise AssertionError("unreachable")

    async def call_member(self, endpoint: str, path: str, body: Json, timeout: float) -> Json:
        """As `call`, to one member and once; a refused token is renewed once. Raises `NotDone` and `LostReply`."""
        sent = SimpleNamespace(connected=False)
        started = self._clock.monotonic()
        try:
            async with self._clock.timeout(max(timeout, 0.001)):
                return await self._with_token(endpoint, lambda token: self._exchange(endpoint, path, body, token, sent))
        except TimeoutError:
            if sent.connected:
                raise LostReply(f"{endpoint} did not answer within {timeout:.3g} s") from None
            raise NotDone(f"{endpoint} took no connection in time") from None
        except asyncio.CancelledError:
            if self._clock.monotonic() - started > _IMPATIENT_SECONDS:
                self._leave(endpoint)  # Our caller's patience is shorter than ours; the next call asks another.
            raise

    async def open_stream(self, endpoint: str, path: str, body: Json) -> aiohttp.ClientResponse:
        """Open a streaming call at one member; the caller closes the response. Raises `NotDone` and `LostReply`."""
        sent = SimpleNamespace(connected=False)

        async def attempt(token: str) -> aiohttp.ClientResponse:
            try:
                response = await self._send(self._client(endpoint, stream=True), path, body, token, sent)
            except (aiohttp.ClientError, OSError) as error:
                raise _lost(endpoint, error, sent) from None
            if response.status < 400:
                return response
            async with response:
                raise classify_body(response.status, _decoded(await self._body(response, endpoint)))

        try:
            async with self._clock.timeout(self.request_timeout):
                return await self._with_token(endpoint, attempt)
        except TimeoutError:
            raise LostReply(f"{endpoint} opened no stream within {self.request_timeout:.3g} s") from None

    async def renew_token(self, refused: str) -> None:
        """Fetch a new token unless somebody has since `refused` was in use."""
        await self._renew(self.preferred, refused)

    @property
    def token(self) -> str:
        """The token in use; for `renew_token`, and never to be shown."""
        return self._token

    @property
    def has_user(self) -> bool:
        """Whether there are credentials to get a token with."""
        return bool(self._user)

    async def aclose(self) -> None:
        """Close every connection; later calls raise `Unavailable`."""
        self._closed = True
        sessions, self._sessions = self._sessions, []
        self._unary.clear()
        self._streams.clear()
        for session in sessions:
            await session.close()

    async def _with_token(self, endpoint: str, attempt: Callable[[str], Awaitable[_T]]) -> _T:
        """Run an attempt with our token; when it is refused, nothing was carried out: renew it and try once more."""
        if self._user and not self._token:
            await self._renew(endpoint, "")
        token = self._token
        try:
            return await attempt(token)
        except TokenRefused:
            if not self._user:
                raise PermissionDenied("the store asks for a user and none is configured") from None
        await self._renew(endpoint, token)
        try:
            return await attempt(self._token)
        except TokenRefused:
            raise PermissionDenied(f"the store refuses user {self._user!r} with a fresh token") from None

    async def _renew(self, endpoint: str, refused: str) -> None:
        async with self._token_line:
            if self._token != refused:
                return
            try:
                password = self._password if isinstance(self._password, str) else self._password()
            except OSError as error:
                raise PermissionDenied(f"the store's password cannot be read: {error.strerror}") from None
            credentials = {"name": self._user, "password": password}
            try:
                reply = await self._exchange(endpoint, "/auth/authenticate", credentials, "", SimpleNamespace())
            except LostReply as error:
                raise NotDone(f"no token: {error}") from None  # What the token was for has not been sent.
            except TokenRefused as error:
                raise PermissionDenied(f"the store refuses user {self._user!r}: {error}") from None
            except StorageError as error:
                if "authentication is not enabled" not in str(error):
                    raise
                reply = {}  # Then no token is needed; should it be enabled later, the refusal brings us back here.
            self._token = str(reply.get("token") or "")

    async def _exchange(self, endpoint: str, path: str, body: Json, token: str, sent: SimpleNamespace) -> Json:
        client = self._client(endpoint, stream=False)
        try:
            async with await self._send(client, path, body, token, sent) as response:
                raw = await self._body(response, endpoint)
        except (aiohttp.ClientError, OSError) as error:
            raise _lost(endpoint, error, sent) from None
        reply = _decoded(raw)
        if response.status >= 400:
            raise classify_body(response.status, reply)
        if not isinstance(reply, dict):
            raise LostReply(f"{endpoint} answered with something that is not a JSON object")
        if isinstance(reply.get("error"), dict):
            raise classify_body(response.status, reply["error"])
        if path.startswith("/kv/") and not _has_revision(reply):
            raise LostReply(f"{endpoint} answered without a revision")
        return cast("Json", reply)

    async def _send(
        self, client: _Client, path: str, body: Json, token: str, sent: SimpleNamespace
    ) -> aiohttp.ClientResponse:
        sent.connected = False
        headers = {"Content-Type": "application/json"}
        if token:
            headers["Authorization"] = token
        data = orjson.dumps(body)
        request = client.call_rpc(
            path,
            data if len(data) < _LARGE_BODY else io.BytesIO(data),
            encode=False,
            raw=True,
            headers=headers,
            allow_redirects=False,
            trace_request_ctx=sent,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout),
        )
        return cast("aiohttp.ClientResponse", await request)

    async def _body(self, response: aiohttp.ClientResponse, endpoint: str) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in response.content.iter_any():
            parts.append(part)
            size += len(part)
            if size > MAX_RESPONSE_BYTES:
                raise ResponseTooLarge(f"a reply of {endpoint} is larger than {MAX_RESPONSE_BYTES} bytes")
        return b"".join(parts)

    def _client(self, endpoint: str, *, stream: bool) -> _Client:
        if self._closed:
            raise Closed("the store's client was closed")
        if not self._sessions:
            self._connect()
        return (self._streams if stream else self._unary)[endpoint]

    def _connect(self) -> None:
        """Two pools: streams that stay open for hours must not use up the places of requests."""
        secure = any(url.startswith("https:") for url in self.endpoints)
        context = (self._tls or TlsConfig()).context() if secure else True
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_create_end.append(_connected)
        tracing.on_connection_reuseconn.append(_connected)
        for clients, limit in ((self._unary, _POOL), (self._streams, 0)):
            connector = aiohttp.TCPConnector(limit=limit, ssl=context)
            session = aiohttp.ClientSession(connector=connector, trace_configs=[tracing])
            self._sessions.append(session)
            clients.update((url, _Client(url, session)) for url in self.endpoints)

    def _leave(self, endpoint: str) -> None:
        """Prefer the next member from now on, unless somebody has moved on already."""
        if self.preferred == endpoint:
            self._current = (self._current + 1) % len(self.endpoints)


async def _connected(_session: object, context: SimpleNamespace, _params: object) -> None:
    """From here on the request may be on its way."""
    context.trace_request_ctx.connected = True


def _lost(endpoint: str, error: Exception, sent: SimpleNamespace) -> Exception:
    """A failure to connect has sent nothing; anything later may have."""
    what = f"{endpoint}: {type(error).__name__}: {error}"
    unsent = isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
    return NotDone(what) if unsent or not getattr(sent, "connected", True) else LostReply(what)


def _has_revision(reply: Json) -> bool:
    """Every answer about keys carries the store's revision; one without it is not etcd's."""
    header = reply.get("header")
    return isinstance(header, dict) and str(header.get("revision", "")).isdecimal()


def _decoded(raw: bytes) -> object:
    """The body's JSON; None when it has none, as a proxy's error page or a reply that was cut."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
