"""A proxy between a client and one etcd that loses, delays, cuts and replaces what it is told to, when it is told to.

It understands HTTP/1.1 as far as needed to tell requests apart: a fault is for requests of a path, a body, a count.
`BEFORE` faults strike a request that etcd has not seen, `AFTER` faults one that it has carried out and answered.
A held request is forwarded when released, even if its client has given up: that is how late writes come to be.
Nothing here waits by the clock: a test switches faults on and waits for `Rule.hit`.
"""

from __future__ import annotations

import asyncio
import enum
import socket
import struct
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

_LIMIT = 16 * 1024 * 1024


class When(enum.Enum):
    BEFORE = "before the request is forwarded"
    AFTER = "after the request was carried out"


class How(enum.Enum):
    PASS = "go on"
    CLOSE = "close the connection in order"
    RESET = "reset the connection"
    SILENCE = "answer nothing, keep the connection open"
    TRUNCATE = "pass `keep` bytes of the reply, then close"
    REPLACE = "answer with `status` and `reply` instead"


@dataclass(frozen=True, slots=True)
class Request:
    path: str
    head: bytes
    body: bytes


@dataclass(eq=False)
class Rule:
    """One fault: the first `skip` requests that match pass, the next `times` are struck (0: all that follow).

    A `held` one waits for `release` before it goes on to what `how` says.
    """

    when: When
    how: How
    path: str = ""
    held: bool = False
    skip: int = 0
    times: int = 1
    keep: int = 0
    status: int = 503
    reply: bytes = b""
    matches: Callable[[Request], bool] = lambda _: True
    seen: int = 0
    hits: int = 0
    release: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a request that was struck has come to its end: answered, or its connection closed."""
    _struck: asyncio.Condition = field(default_factory=asyncio.Condition)

    def takes(self, request: Request) -> bool:
        """Count a request that matches and say whether it is to be struck."""
        if not request.path.startswith(self.path) or not self.matches(request):
            return False
        self.seen += 1
        return self.seen > self.skip and (self.times == 0 or self.seen <= self.skip + self.times)

    async def strike(self) -> None:
        """Tell who waits in `hit` that the fault has taken effect: for `AFTER`, that etcd has answered."""
        async with self._struck:
            self.hits += 1
            self._struck.notify_all()

    async def hit(self, count: int = 1, timeout: float = 40.0) -> None:
        """Wait until the fault has struck `count` times."""
        async with asyncio.timeout(timeout), self._struck:
            await self._struck.wait_for(lambda: self.hits >= count)


class _Reader(asyncio.StreamReader):
    """Knows that its peer has gone without having to read."""

    def __init__(self) -> None:
        super().__init__(limit=_LIMIT)
        self.gone = asyncio.Event()

    def feed_eof(self) -> None:
        super().feed_eof()
        self.gone.set()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        self.gone.set()


class _Ended(Exception):  # noqa: N818 - not an error: the connection has come to its end
    pass


class FaultProxy:
    """`async with FaultProxy(etcd.endpoint) as proxy: … proxy.endpoint …`; plain HTTP only."""

    def __init__(self, upstream: str, *, port: int = 0) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._port = port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: dict[asyncio.StreamWriter, str] = {}
        self._rules: list[Rule] = []
        self._open = asyncio.Event()
        self._open.set()
        self._frozen_path = ""
        self.counts: Counter[str] = Counter()
        self.requests: deque[Request] = deque(maxlen=10_000)

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.refuse()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def connections(self) -> int:
        """How many clients are connected now."""
        return len(self._connections)

    def inject(
        self,
        when: When,
        how: How,
        path: str = "",
        *,
        held: bool = False,
        skip: int = 0,
        times: int = 1,
        keep: int = 0,
        status: int = 503,
        reply: bytes = b"",
        matches: Callable[[Request], bool] = lambda _: True,
    ) -> Rule:
        """Switch a fault on; the first rule that takes a request strikes it."""
        rule = Rule(when, how, path, held, skip, times, keep, status, reply, matches)
        self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """Switch every fault off and release what is held."""
        for rule in self._rules:
            rule.release.set()
        self._rules.clear()
        self._open.set()

    def freeze(self, path: str = "") -> None:
        """Carry no byte in either direction from now on, as a network that went silent does; of one path or of all."""
        self._frozen_path = path
        self._open.clear()

    def thaw(self) -> None:
        """Carry bytes again, also those that were kept back."""
        self._open.set()

    def serving(self, path: str = "") -> int:
        """How many requests of a path are under way now; a watch is as long as it lasts."""
        return sum(current != "" and current.startswith(path) for current in self._connections.values())

    def abort(self, path: str = "") -> int:
        """Reset every client connection on which a request of this path is under way (or every one at all)."""
        victims = [w for w, current in self._connections.items() if current.startswith(path)]
        for writer in victims:
            _reset(writer)
        return len(victims)

    async def listen(self) -> None:
        """Accept connections, on the same port again after `refuse`."""

        def protocol() -> asyncio.StreamReaderProtocol:
            return asyncio.StreamReaderProtocol(_Reader(), self._accept)

        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(protocol, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """Stop listening and reset every connection: the server looks dead."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.abort()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert isinstance(reader, _Reader)
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer), name="fault-proxy")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: _Reader, writer: asyncio.StreamWriter) -> None:
        """One client connection with its own connection to etcd."""
        self._connections[writer] = ""
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        rule: Rule | None = None
        try:
            while (request := await _read_request(reader)) is not None:
                self._connections[writer] = request.path
                self.counts[request.path] += 1
                self.requests.append(request)
                rule = next((r for r in self._rules if r.takes(request)), None)
                if rule is not None and rule.when is When.BEFORE:
                    await self._before(rule, reader, writer)
                await self._until_open(request.path)
                if upstream is None:
                    upstream = await asyncio.open_connection(*self._upstream, limit=_LIMIT)
                upstream[1].write(request.head + request.body)
                await upstream[1].drain()
                if rule is not None and rule.when is When.AFTER:
                    await self._after(rule, reader, writer, upstream[0])
                else:
                    await self._pass(reader, writer, upstream, follow=rule is None)
                self._connections[writer] = ""
                if rule is not None:
                    rule.over.set()
        except (_Ended, OSError, asyncio.IncompleteReadError):
            pass  # either side has gone, or a fault has ended the connection: the other side sees the same
        finally:
            if rule is not None:
                rule.over.set()
            self._connections.pop(writer, None)
            ends = [writer, upstream[1]] if upstream else [writer]
            for end in ends:
                end.close()
            for end in ends:
                with suppress(OSError):
                    await end.wait_closed()

    async def _before(self, rule: Rule, reader: _Reader, writer: asyncio.StreamWriter) -> None:
        await rule.strike()
        if rule.held:
            await rule.release.wait()
        if rule.how is not How.PASS:
            await self._end(rule, reader, writer, b"")

    async def _after(
        self, rule: Rule, reader: _Reader, writer: asyncio.StreamWriter, upstream: asyncio.StreamReader
    ) -> None:
        """Read the whole reply (for a truncated stream: as much as is to be kept), then do as the rule says."""
        whole = b""
        async for piece in _reply(upstream):
            whole += piece
            if rule.how is How.TRUNCATE and len(whole) > rule.keep:
                break
        await rule.strike()
        if rule.held:
            await rule.release.wait()
        if rule.how is How.PASS:
            await self._write(writer, whole)
        else:
            await self._end(rule, reader, writer, whole)

    async def _end(self, rule: Rule, reader: _Reader, writer: asyncio.StreamWriter, reply: bytes) -> None:
        if rule.how is How.SILENCE:
            await reader.gone.wait()
        elif rule.how is How.RESET:
            _reset(writer)
        elif rule.how is How.TRUNCATE:
            await self._write(writer, reply[: rule.keep])
        elif rule.how is How.REPLACE:
            head = f"HTTP/1.1 {rule.status} Replaced\r\nContent-Type: application/json\r\n"
            head += f"Connection: close\r\nContent-Length: {len(rule.reply)}\r\n\r\n"
            await self._write(writer, head.encode() + rule.reply)
        raise _Ended

    async def _pass(
        self,
        reader: _Reader,
        writer: asyncio.StreamWriter,
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        *,
        follow: bool,
    ) -> None:
        """Carry a reply as it comes; `follow`: a client that leaves ends the request at etcd too."""

        async def leave() -> None:
            await reader.gone.wait()
            if follow:
                upstream[1].transport.abort()

        follower = asyncio.get_running_loop().create_task(leave(), name="fault-proxy")
        try:
            async for piece in _reply(upstream[0]):
                await self._until_open(self._connections.get(writer, ""))
                await self._write(writer, piece)
        finally:
            follower.cancel()

    async def _until_open(self, path: str) -> None:
        if path.startswith(self._frozen_path):
            await self._open.wait()

    async def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(data)
        await writer.drain()


async def _read_request(reader: asyncio.StreamReader) -> Request | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    body = b"".join([piece async for piece in _body(reader, head, at_end=False)])
    return Request(head.split(b" ", 2)[1].decode(), head, body)


async def _reply(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The head and then the body of one response, piece by piece, framing included."""
    head = await reader.readuntil(b"\r\n\r\n")
    yield head
    async for piece in _body(reader, head, at_end=True):
        yield piece


async def _body(reader: asyncio.StreamReader, head: bytes, *, at_end: bool) -> AsyncIterator[bytes]:
    """The bytes after a head, as they arrive; `at_end`: a body without a length goes on to the connection's end."""
    lines = head.decode("latin-1").lower().split("\r\n")[1:]
    headers = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "chunked" in headers.get("transfer-encoding", ""):
        while True:
            size = await reader.readuntil(b"\n")
            length = int(size.split(b";")[0], 16)
            if length == 0:
                trailers = size
                while (line := await reader.readuntil(b"\n")) != b"\r\n":
                    trailers += line
                yield trailers + line
                return
            yield size + await reader.readexactly(length + 2)
    elif "content-length" in headers:
        if length := int(headers["content-length"]):
            yield await reader.readexactly(length)
    elif at_end and not head.startswith((b"HTTP/1.1 204", b"HTTP/1.1 304")):
        while piece := await reader.read(65_536):
            yield piece
        raise _Ended


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with RST instead of FIN."""
    if (sock := writer.get_extra_info("socket")) is not None:
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
