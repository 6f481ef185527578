"""The response of one watch: a line of JSON for each event, and an end in good order or at once.

A client that takes nothing for `write_seconds` is cut off. What the lines say is the caller's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import orjson
import structlog
from aiohttp import web

from lrm.api.call import Api, call_of
from lrm.api.status import answer_of, status_document

log = structlog.get_logger(__name__)

INITIAL_EVENTS_END = "k8s.io/initial-events-end"
"""The annotation of the bookmark that ends a watch's initial events."""


class Stuck(Exception):  # noqa: N818 - never leaves a watch
    """The client takes nothing any more, or is gone."""


class LineStream:
    """See the module."""

    def __init__(self, request: web.Request, api: Api, about: str) -> None:
        """`about` names what is watched, for the log."""
        self._request = request
        self._api = api
        self._about = about
        headers = {
            "Content-Type": "application/json",
            "Cache-Control": "no-cache, private",
            "X-Content-Type-Options": "nosniff",
            "X-Request-Id": call_of(request).request_id,
        }
        self._response = web.StreamResponse(headers=headers)

    async def start(self) -> None:
        """Send the headers."""
        await self._response.prepare(self._request)

    async def send(self, lines: Sequence[bytes]) -> None:
        """Write, and wait while the client's buffer is full. Raises `Stuck`."""
        if not lines:
            return
        try:
            async with self._api.clock.timeout(self._api.settings.write_seconds):
                await self._response.write(b"".join(lines))
        except (TimeoutError, ConnectionError) as error:
            raise Stuck from error

    async def send_error(self, error: Exception) -> None:
        """The error as the stream's last event, if the client still takes it."""
        request_id = call_of(self._request).request_id
        answer = answer_of(error, request_id, writing=False)
        log.info("watch.ended", request=request_id, kind=self._about, reason=answer.reason, detail=str(error))
        with suppress(Stuck):
            await self.send([line("ERROR", orjson.dumps(status_document(answer)))])

    def check_connected(self) -> None:
        """Raise `Stuck` when the client has gone."""
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise Stuck

    def cut_off(self) -> web.StreamResponse:
        """Close the connection without waiting for a client that does not read."""
        if self._request.transport is not None:
            self._request.transport.abort()
        return self._response

    async def end(self) -> web.StreamResponse:
        """Close the stream in good order."""
        try:
            async with self._api.clock.timeout(self._api.settings.write_seconds):
                await self._response.write_eof()
        except (TimeoutError, ConnectionError):
            return self.cut_off()
        return self._response


def line(event: str, document: bytes) -> bytes:
    """One event of a watch."""
    return b'{"type":"%b","object":%b}\n' % (event.encode(), document)
