"""Watches over HTTP: one JSON object a line, each an event, a bookmark, or the error that ends the stream.

A watch without a resourceVersion (or from 0) begins with the present objects as ADDED. One from N tells every change
after N, or ends with 410 Expired: the client then lists again. A client that takes nothing for a while is cut off; it
costs nobody else anything, because it reads from the fan-out's ring at its own pace.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import orjson
from aiohttp import web

from lrm.api.call import API, Api
from lrm.api.codec import Accepted, negotiate
from lrm.api.lists import catch_up
from lrm.api.present import Presenter
from lrm.api.requests import ListQuery, Target
from lrm.api.status import expected
from lrm.api.stream import INITIAL_EVENTS_END, LineStream, Stuck, line
from lrm.api.table import partial_metadata, table_of
from lrm.cache import Item
from lrm.errors import LrmError
from lrm.fanout import Delivery, Subscription
from storage.errors import NoSpace, StorageError

_CHUNK = 256 * 1024


async def serve_watch(request: web.Request, target: Target, query: ListQuery) -> web.StreamResponse:
    """Stream until the client goes, its time is over, the history is gone, or the daemon stops."""
    api = request.app[API]
    accepted = negotiate(request, ("json", "table", "partial"))
    initial = query.revision in (None, 0) if query.initial_events is None else query.initial_events
    try:
        await catch_up(api, query.revision)
    except NoSpace:
        if query.revision:  # what the cache has is all that anybody can know of the present
            raise
    items: Sequence[Item] = ()
    after = query.revision or api.cache.revision
    if initial:
        # Nothing is awaited between this look at the cache and the place in the ring: no gap, no repeat.
        after = api.cache.revision
        found = sorted(api.cache.items(target.kind, target.namespace), key=lambda item: item.entry.key)
        items = [i for i in found if i.resource and (query.selector is None or query.selector(i.resource))]
    repeat = bool(query.revision) and not initial
    async with api.fanout.subscribe(target.kind, target.namespace, query.selector, after, repeat=repeat) as changes:
        stream = _KindStream(request, api, target, accepted)
        await stream.start()
        try:
            async with api.clock.timeout(query.timeout or api.settings.watch_seconds * (1 + random.random())):  # noqa: S311 - spreads reconnects
                await stream.send_present(items)
                if query.initial_events:
                    await stream.send([stream.bookmark(after, initial_end=True)])
                await _follow(stream, changes, bookmarks=query.bookmarks or bool(query.initial_events))
        except TimeoutError:
            pass  # the watch's time is over: the stream just ends, and the client asks again from where it was
        except Stuck:
            return stream.cut_off()
        except (LrmError, StorageError) as error:
            if not expected(error):
                raise
            await stream.send_error(error)
        return await stream.end()


async def _follow(stream: _KindStream, changes: Subscription, *, bookmarks: bool) -> None:
    async for delivery in changes:
        if delivery.events:
            await stream.send_delivery(delivery)
        elif bookmarks:
            await stream.send([stream.bookmark(delivery.revision)])
        stream.check_connected()


class _KindStream(LineStream):
    """The lines about the objects of a kind."""

    def __init__(self, request: web.Request, api: Api, target: Target, accepted: Accepted) -> None:
        super().__init__(request, api, target.kind.plural)
        self._kind = target.kind
        self._form = accepted.form
        self._presenter = Presenter(api.cache)
        self._columns_sent = False

    async def send_present(self, items: Sequence[Item]) -> None:
        """The objects that are there, as ADDED."""
        lines: list[bytes] = []
        size = 0
        for item in items:
            lines.append(self._line("ADDED", item, item.entry.revision))
            size += len(lines[-1])
            if size > _CHUNK:
                await self.send(lines)
                lines, size = [], 0
        await self.send(lines)

    async def send_delivery(self, delivery: Delivery) -> None:
        await self.send([self._line(e.type, e.item, e.revision) for e in delivery.events])

    def bookmark(self, revision: int, *, initial_end: bool = False) -> bytes:
        """Everything up to this revision was told."""
        metadata: dict[str, Any] = {"resourceVersion": str(revision), "creationTimestamp": None}
        if initial_end:
            metadata["annotations"] = {INITIAL_EVENTS_END: "true"}
        document: dict[str, Any]
        if self._form == "table":
            document = table_of(self._kind, [], None, metadata, self._api.clock.now(), columns=False)
        elif self._form == "partial":
            document = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata}
        else:
            document = {"kind": self._kind.name, "apiVersion": self._kind.api_version, "metadata": metadata}
        return line("BOOKMARK", orjson.dumps(document))

    def _line(self, event: str, item: Item, revision: int) -> bytes:
        if item.resource is None or self._form == "json":
            return line(event, self._presenter.raw(item, revision))
        shown = self._presenter.shown(self._kind, item.resource, revision)
        if self._form == "partial":
            return line(event, orjson.dumps(partial_metadata(shown)))
        metadata = {"resourceVersion": str(revision)}
        columns, self._columns_sent = not self._columns_sent, True
        table = table_of(self._kind, [shown], None, metadata, self._api.clock.now(), columns=columns)
        return line(event, orjson.dumps(table))
