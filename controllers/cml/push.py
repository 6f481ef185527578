"""CML's push channel `/ws/ui`: word that something changed, for whoever wants to ask sooner than the clock says.

Promises: the token goes to no server that the TLS rules or the proof of identity would keep a request from, and to
none that a redirect names; frames are of bounded size; a channel ends by raising why, and ends with its client.
The channel is undocumented, replays nothing and differs by version: nothing that is said on it is believed, and what
is not known counts as worth a look. Does not reconnect: how soon is its caller's to say. Called by the client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import aiohttp
import httpx
import orjson

from controllers.cml.answers import Answer, failure
from controllers.cml.errors import CmlBadAnswer, CmlClosed, CmlError, CmlTimeout, CmlUnreachable
from controllers.cml.session import Session, Sessions
from controllers.cml.transport import Transport, tls_problem
from storage.clock import Clock

_PATH = "/ws/ui"
_HEARTBEAT = 30.0
"""Seconds between two pings; without a pong after half of that the channel has ended."""
_FAREWELL = 0.3
"""Seconds that CML has to agree to the channel's end."""
_LONGEST_FRAME = 1024 * 1024
_NOISE = frozenset({"lab_stats", "system_stats", "system_event", "ping"})
_SMALL = frozenset({"interface", "link"})
"""Their states come and go with their nodes'."""
_POLICY = 1008
"""The close code of a server that does not like the token."""


def tells_of_labs(message: Mapping[str, Any]) -> bool:
    """Whether a push is a reason to list the labs anew; words are compared without regard to case."""
    event_type, element = (str(message.get(name) or "").lower() for name in ("event_type", "element_type"))
    if event_type in _NOISE:
        return False
    return not (event_type == "state_change" and element in _SMALL)


class PushChannel:
    """The channel of one client, opened by `listen`."""

    def __init__(
        self, base: httpx.URL, transport: Transport, sessions: Sessions, clock: Clock, *, open_timeout: float
    ) -> None:
        self._url = str(base.copy_with(scheme="ws" if base.scheme == "http" else "wss")).rstrip("/") + _PATH
        self._transport = transport
        self._sessions = sessions
        self._clock = clock
        self._open_timeout = open_timeout
        self._open_now: set[aiohttp.ClientSession] = set()
        self._closed = False

    async def listen(self, opened: Callable[[], None], heard: Callable[[], None]) -> NoReturn:
        """Call `opened` when CML has been told who listens, then `heard` for each push that tells of labs.

        Raises `CmlError` when the channel ends or cannot be opened.
        """
        problem: CmlError
        try:
            await self._listen(opened, heard)
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not self._closed:
                raise
            problem = CmlClosed() if self._closed else _translated(error)
        # Raised out here: the library's errors carry the request, and with it the token.
        raise problem

    async def aclose(self) -> None:
        """End the channel with `CmlClosed`."""
        self._closed = True
        for http in tuple(self._open_now):
            await http.close()

    async def _listen(self, opened: Callable[[], None], heard: Callable[[], None]) -> NoReturn:
        trace = aiohttp.TraceConfig()
        trace.on_request_redirect.append(_refuse_redirect)
        connector = aiohttp.TCPConnector(limit=1, ssl=await self._transport.tls())
        async with aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "lrm"},
            trace_configs=[trace],
        ) as http:
            if self._closed:
                raise CmlClosed
            self._open_now.add(http)
            try:
                session, socket = await self._open(http)
                async with socket:
                    await socket.send_json({"token": session.token, "client_uuid": ""})
                    opened()
                    await self._read(socket, heard)
            finally:
                self._open_now.discard(http)
        await self._end(session, socket.close_code)

    async def _open(self, http: aiohttp.ClientSession) -> tuple[Session, aiohttp.ClientWebSocketResponse]:
        try:
            async with self._clock.timeout(self._open_timeout):
                session = await self._sessions.get()
                self._transport.check_reachable()
                return session, await self._connect(http, session)
        except TimeoutError:
            pass
        raise CmlTimeout(f"no push channel to CML within {self._open_timeout:g} s")

    async def _connect(self, http: aiohttp.ClientSession, session: Session) -> aiohttp.ClientWebSocketResponse:
        problem: CmlError
        try:
            with self._transport.guard.watching():
                return await http.ws_connect(
                    self._url,
                    headers={"Authorization": f"Bearer {session.token}"},
                    heartbeat=_HEARTBEAT,
                    timeout=aiohttp.ClientWSTimeout(ws_close=_FAREWELL),
                    max_msg_size=_LONGEST_FRAME,
                )
        except aiohttp.WSServerHandshakeError as error:
            if error.status == 401:
                self._sessions.drop(session.serial)
            problem = failure(Answer(error.status, b"")) or CmlBadAnswer(error.status, "no WebSocket")
        except (aiohttp.ClientError, OSError) as error:
            problem = CmlClosed() if self._closed else _translated(error)
        raise problem

    async def _read(self, socket: aiohttp.ClientWebSocketResponse, heard: Callable[[], None]) -> None:
        """Until the channel ends."""
        async for frame in socket:
            if frame.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                return
            try:
                message = orjson.loads(frame.data)
            except orjson.JSONDecodeError:
                continue
            if isinstance(message, dict) and tells_of_labs(message):
                heard()

    async def _end(self, session: Session, code: int | None) -> NoReturn:
        if self._closed:
            raise CmlClosed
        if code == _POLICY:
            # Its token may have come to its end: CML is asked, and if so the next channel is opened under another.
            await self._sessions.prove_again(session)
        raise CmlUnreachable(f"CML has ended the push channel (code {code or 'none'})")


async def _refuse_redirect(_session: object, _context: object, about: aiohttp.TraceRequestRedirectParams) -> None:
    about.response.close()
    raise CmlBadAnswer(about.response.status, "a redirect, which could name any server")


def _translated(error: Exception) -> CmlError:
    # The library's own classes for TLS are errors of TLS that lack what those have; they say what caused them.
    return tls_problem(error.__cause__ or error) or CmlUnreachable(f"no push channel to CML ({type(error).__name__})")
