"""One HTTP stream of etcd's watch: bytes in, whole watch responses out.

etcd's gateway sends JSON objects separated by newlines; a chunk may hold many, or a part of one. Reading may be cut by
a timeout at any moment without losing a byte. Every way in which a stream can end or lie is `StreamLost`; what etcd
says about the watch itself is left to the caller. Called by `storage.etcd_watch`.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import aiohttp
import orjson

from storage.clock import Clock
from storage.etcd_errors import LostReply, NotDone, classify_body
from storage.etcd_gateway import Gateway
from storage.etcd_wire import Json

_MAX_LINE = 64 * 1024 * 1024
"""etcd's fragments stay below 4 MB; a line that never ends is a peer that is no etcd."""


class StreamLost(Exception):  # noqa: N818 - it is answered by another stream
    """This stream brings nothing more; the watch itself may go on elsewhere."""


class WatchStream:
    """A response being read; `heard` is when its last byte came."""

    def __init__(self, endpoint: str, response: aiohttp.ClientResponse, clock: Clock) -> None:
        self.endpoint = endpoint
        self._response = response
        self._clock = clock
        self._unfinished: list[bytes] = []
        self._unfinished_size = 0
        self._lines: deque[bytes] = deque()
        self.heard = clock.monotonic()

    @classmethod
    async def open(cls, gateway: Gateway, endpoint: str, create: Json, clock: Clock) -> WatchStream:
        """Ask one member for a watch. Raises `StreamLost` when it gives none, and etcd's refusals."""
        try:
            response = await gateway.open_stream(endpoint, "/watch", {"create_request": create})
        except (LostReply, NotDone) as error:
            raise StreamLost(str(error)) from None
        return cls(endpoint, response, clock)

    async def next(self) -> Json:
        """The next watch response: what etcd calls `result`."""
        while not self._lines:
            self._split(await self._chunk())
            self.heard = self._clock.monotonic()
        return self._result(self._lines.popleft())

    def touch(self) -> None:
        """Start to wait anew: time in which nobody read is not silence."""
        self.heard = self._clock.monotonic()

    def close(self) -> None:
        """Drop the connection; fine when it is closed."""
        self._response.close()

    async def _chunk(self) -> bytes:
        try:
            chunk = await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise StreamLost(f"{self.endpoint}: {type(error).__name__}: {error}") from None
        if not chunk:
            raise StreamLost(f"{self.endpoint} ended the stream")
        return chunk

    def _split(self, chunk: bytes) -> None:
        *finished, rest = chunk.split(b"\n")
        for line in finished:
            whole = b"".join([*self._unfinished, line])
            self._unfinished.clear()
            self._unfinished_size = 0
            if whole.strip():
                self._lines.append(whole)
        if rest:
            self._unfinished.append(rest)
            self._unfinished_size += len(rest)
            if self._unfinished_size > _MAX_LINE:
                raise StreamLost(f"{self.endpoint} sent a line without end")

    def _result(self, line: bytes) -> Json:
        try:
            message: Any = orjson.loads(line)
        except orjson.JSONDecodeError:
            raise StreamLost(f"{self.endpoint} sent something that is not JSON") from None
        if isinstance(message, dict):
            if isinstance(message.get("result"), dict):
                result: Json = message["result"]
                return result
            if isinstance(message.get("error"), dict):
                raise _ended_by(self.endpoint, classify_body(200, message["error"]))
        raise StreamLost(f"{self.endpoint} sent something that is not a watch response")


def _ended_by(endpoint: str, error: Exception) -> Exception:
    """An error object inside a stream: in doubt the stream is lost, and opening another one tells more."""
    return StreamLost(f"{endpoint}: {error}") if isinstance(error, LostReply | NotDone) else error
