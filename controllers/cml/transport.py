"""One HTTP exchange with one CML: whole answer or error, nothing in between.

Promises: each answer is complete and of bounded size, each failure is of our own tree and carries no header or body
of the request, `Sending.sent` tells whether a request may have left, and a cancelled exchange leaves no socket.
Does not log in, retry or judge; knows no proxy, redirect, cookie or environment. Called by sessions and calls.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx

from controllers.cml.answers import Answer
from controllers.cml.breaker import Breaker
from controllers.cml.errors import (
    CmlBadAnswer,
    CmlCircuitOpen,
    CmlClosed,
    CmlError,
    CmlFingerprintMismatch,
    CmlInvalid,
    CmlTimeout,
    CmlTlsError,
    CmlUnreachable,
)
from controllers.cml.tls import (
    LeafGuard,
    LeafRefusedError,
    TlsPolicy,
    chain_context,
    is_loopback,
    unchecked_context,
)

_HOST = re.compile(r"[A-Za-z0-9_.-]{1,253}|[0-9A-Fa-f:.]{2,45}")
_LONGEST_PATH = 4096
_CONNECTIONS = 10
_KEEP_ALIVE = 15.0
"""Seconds; well below the 75 of CML's front server, so that it is seldom the one who closes an idle connection."""


def base_of(url: str, *, allow_plain_http: bool) -> httpx.URL:
    """A worker's base address, checked. Raises `CmlInvalid`, for plain http beyond this machine too."""
    try:
        base = httpx.URL(url.strip().rstrip("/").removesuffix("/api/v0"))
        host, wire_host = base.host, base.raw_host.decode("ascii")
    except (httpx.InvalidURL, UnicodeError, TypeError):
        raise CmlInvalid("the address of a CML is not a URL") from None
    if base.scheme not in {"http", "https"} or not _HOST.fullmatch(wire_host) or len(url) > _LONGEST_PATH:
        raise CmlInvalid("the address of a CML is http:// or https:// with a host")
    if base.userinfo or base.query or base.fragment:
        raise CmlInvalid("the address of a CML has no user, no query and no fragment")
    if base.scheme == "http" and not allow_plain_http and not is_loopback(host):
        raise CmlInvalid(f"plain http to {host} would show the password to the network; use https or allow it")
    return base


@dataclass(slots=True)
class Sending:
    """How far one exchange came; read it after a failure or a cancellation."""

    touched: bool = False
    """A connection was tried or used: the peer had its chance to answer."""
    sent: bool = False
    """The first byte of the request may have left."""
    answering: bool = False
    """The answer had begun."""

    def reset(self) -> None:
        """Forget it: nothing of this exchange matters any more."""
        self.touched = self.sent = self.answering = False

    async def trace(self, event: str, _: Mapping[str, Any]) -> None:
        """Hear from httpx what it is about to do."""
        if event == "connection.connect_tcp.started":
            self.touched = True
        elif event.endswith(".send_request_headers.started"):
            self.touched = self.sent = True


@dataclass(frozen=True, slots=True)
class Message:
    """A request: `path` is below /api/v0 and already safe, `content` is text with its type, `token` the session's."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = field(default=None, repr=False)
    content_type: str = "application/json"
    token: str = field(default="", repr=False)
    read_timeout: float = 10.0
    max_body: int | None = None
    """Bytes of an answer's body, where it is to be less than the transport's own limit."""


class Transport:
    """The connections to one worker."""

    def __init__(
        self, base: httpx.URL, policy: TlsPolicy, breaker: Breaker, *, connect_timeout: float, max_body: int
    ) -> None:
        self._base = str(base).rstrip("/") + "/api/v0"
        # Over plain http no context is ever used, but httpx would load a bundle of roots of its own.
        self._authorities = policy.ca_file if policy.checks_chain and base.scheme == "https" else None
        self._breaker = breaker
        self._connect_timeout = connect_timeout
        self._max_body = max_body
        self._http: httpx.AsyncClient | None = None
        self._tls: ssl.SSLContext | None = None
        self._opening = asyncio.Lock()
        self._closed = False
        self.guard = LeafGuard(policy)

    def expired(self, sending: Sending) -> None:
        """A deadline ended this exchange: that counts as unreachable if the peer had its chance."""
        if sending.touched:
            self._breaker.failed()

    @property
    def failed_at(self) -> float:
        """When an exchange last found nobody, monotonic; -inf before the first."""
        return self._breaker.failed_at

    def check_reachable(self) -> None:
        """Raise `CmlCircuitOpen` while calls fail fast; what is only convenient does not probe."""
        if self._breaker.is_open:
            raise CmlCircuitOpen(0.0)

    async def exchange(self, message: Message, sending: Sending) -> Answer:
        """Send once and return the whole answer, whatever its status."""
        http = await self._client()
        with self._breaker.attempt():
            problem: CmlError
            try:
                with self.guard.watching():
                    return await self._send(http, message, sending)
            except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not self._closed:
                    raise
                problem = self._translate(error, sending)
            # Raised out here: httpx's errors carry the request, and with it the password or the token.
            raise problem

    async def _send(self, http: httpx.AsyncClient, message: Message, sending: Sending) -> Answer:
        headers = {"Accept": "application/json"}
        if message.token:
            headers["Authorization"] = f"Bearer {message.token}"
        if message.content is not None and message.content_type:
            headers["Content-Type"] = message.content_type
        if not self.guard.armed:
            # A connection made before the leaf was pinned must not be there for the login to use.
            headers["Connection"] = "close"
        request = http.build_request(
            message.method,
            self._base + message.path,
            params=message.query or None,
            content=message.content,
            headers=headers,
            timeout=httpx.Timeout(message.read_timeout, connect=self._connect_timeout),
            extensions={"trace": sending.trace},
        )
        response = await http.send(request, stream=True)
        try:
            sending.answering = True
            chunks: list[bytes] = []
            size, most = 0, min(self._max_body, message.max_body or self._max_body)
            async for chunk in response.aiter_bytes():
                size += len(chunk)
                if size > most:
                    raise CmlBadAnswer(response.status_code, f"a body of more than {most} bytes")
                chunks.append(chunk)
            return Answer(response.status_code, b"".join(chunks))
        finally:
            await response.aclose()

    def _translate(self, error: Exception, sending: Sending) -> CmlError:
        if self._closed:
            return CmlClosed()
        name = type(error).__name__
        if isinstance(error, httpx.LocalProtocolError | httpx.UnsupportedProtocol | httpx.InvalidURL):
            return CmlInvalid(f"this request cannot be sent ({name})")
        if isinstance(error, httpx.TimeoutException):
            phase = {"ConnectTimeout": "connection", "PoolTimeout": "free connection"}.get(name, "answer")
            return CmlTimeout(f"no {phase} from CML in time")
        if isinstance(error, httpx.DecodingError) or sending.answering:
            return CmlBadAnswer(0, "an answer that was cut off or does not decompress")
        if sending.sent:
            return CmlUnreachable(f"the connection to CML ended before an answer ({name})")
        return tls_problem(error) or CmlUnreachable(f"no connection to CML ({_reason(error)})")

    async def _client(self) -> httpx.AsyncClient:
        async with self._opening:
            if self._closed:
                raise CmlClosed
            if self._http is None:
                context = await self._context()
                self._http = httpx.AsyncClient(
                    verify=context,
                    cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
                    trust_env=False,
                    follow_redirects=False,
                    headers={"User-Agent": "lrm", "Accept-Encoding": "gzip"},
                    limits=httpx.Limits(max_connections=_CONNECTIONS, keepalive_expiry=_KEEP_ALIVE),
                )
            return self._http

    async def tls(self) -> ssl.SSLContext:
        """The context of every connection, for use under `guard.watching`. Raises `CmlTlsError`, `CmlClosed`."""
        async with self._opening:
            return await self._context()

    async def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = await self._trusting()
        if self._closed:
            # Closed while the thread read the CA file: nobody would close what is opened now.
            raise CmlClosed
        return self._tls

    async def _trusting(self) -> ssl.SSLContext:
        if self._authorities is None:
            return unchecked_context()
        try:
            return await asyncio.to_thread(chain_context, self._authorities)
        except (OSError, ValueError) as error:
            raise CmlTlsError(f"the CA file cannot be used ({type(error).__name__})") from None

    async def aclose(self) -> None:
        """Close every connection; exchanges under way end with `CmlClosed`."""
        self._closed = True
        http, self._http = self._http, None
        if http is not None:
            await http.aclose()


def tls_problem(error: BaseException) -> CmlError | None:
    """The TLS refusal behind a failed connection, if that is what it was."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, LeafRefusedError):
            return CmlFingerprintMismatch(seen.expected, seen.observed)
        if isinstance(seen, ssl.SSLCertVerificationError):
            return CmlTlsError(f"the server's certificate does not verify: {seen.verify_message}")
        # An end of file inside a handshake is a server going away, not one refusing.
        if isinstance(seen, ssl.SSLError) and not isinstance(seen, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return CmlTlsError(f"the TLS handshake failed ({seen.reason or type(seen).__name__})")
        seen = seen.__cause__ or seen.__context__
    return None


def _reason(error: BaseException) -> str:
    """The innermost system error's own words, such as "Connection refused"."""
    seen: BaseException | None = error
    text = type(error).__name__
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            text = seen.strerror
        seen = seen.__cause__ or seen.__context__
    return text
