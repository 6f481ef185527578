"""Events over HTTP, as Kubernetes' core/v1: listed, read and watched straight from the store, by what they are about.

Nothing is cached: events are many and rarely asked for. A list about one object reads that object's alone. Each watch
has a stream of its own at the store, so there may be few at once. Events cannot be written here.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

import orjson
from aiohttp import web

from lrm.api.call import API, Api, call_of
from lrm.api.codec import Accepted, negotiate, respond
from lrm.api.lists import not_yet
from lrm.api.pages import Place, fingerprint, place_of, read_pages
from lrm.api.requests import ListQuery, check_namespace, list_query
from lrm.api.selectors import FieldTerm, field_terms, parse_labels, unknown_field
from lrm.api.status import About, RequestError, bad_request, expected
from lrm.api.stream import INITIAL_EVENTS_END, LineStream, Stuck, line
from lrm.api.table import age
from lrm.errors import LrmError, ResourceNotFound, Undecodable
from lrm.events import events_prefix
from storage.base import Batch, Entry, Event, Watch
from storage.clock import Clock
from storage.errors import NotFound, StorageError

_MOST_WATCHES = 32
"""Watches of events at once; more are told 429."""
_SLICE = 500
"""Events that are written in one go; between two slices the event loop is given back."""
_LOOK_SECONDS = 15.0
"""Between two looks whether the client of a quiet watch is still there."""

_FIELDS = (
    "metadata.name",
    "metadata.namespace",
    "involvedObject.apiVersion",
    "involvedObject.kind",
    "involvedObject.namespace",
    "involvedObject.name",
    "involvedObject.uid",
    "involvedObject.resourceVersion",
    "involvedObject.fieldPath",
    "reason",
    "reportingComponent",
    "source",
    "type",
)
"""What a field selector may name: Kubernetes' own list."""

_COLUMNS = (
    ("Last Seen", "string", "Time since it last happened.", 0),
    ("Type", "string", "Normal, or Warning.", 0),
    ("Reason", "string", "What happened, in one word.", 0),
    ("Object", "string", "What it is about.", 0),
    ("Source", "string", "Who told it.", 1),
    ("Message", "string", "What happened, for people.", 0),
    ("First Seen", "string", "Time since it first happened.", 1),
    ("Count", "integer", "How often it happened.", 1),
    ("Name", "string", "Name of the event.", 1),
)

Document = dict[str, Any]
_Test = Callable[[Document], bool]
T = TypeVar("T")


@dataclass
class _Open:
    """The watches that are open."""

    count: int = 0
    limits: set[asyncio.Timeout] = field(default_factory=set)
    """The time limit of each that is being streamed."""


_OPEN: web.AppKey[_Open] = web.AppKey("event watches")


def add_event_routes(app: web.Application) -> None:
    """Everything about events under /api/v1."""
    app[_OPEN] = _Open()
    app.on_shutdown.append(_end_watches)
    app.add_routes(
        [
            web.get("/api/v1/events", _list_or_watch),
            web.get("/api/v1/namespaces/{namespace}/events", _list_or_watch),
            web.get("/api/v1/namespaces/{namespace}/events/{name}", _read),
        ]
    )


async def _list_or_watch(request: web.Request) -> web.StreamResponse:
    namespace, query = _namespace_of(request), list_query(request, None)
    wanted = _Wanted.of(namespace, query)
    verb = "watch" if query.watch else "list"
    call_of(request).principal.require("read", namespace, f"{verb} events")
    if not query.watch:
        return await _list(request, query, wanted)
    if request.method == "HEAD":
        raise RequestError(405, "MethodNotAllowed", "a watch has no end that a HEAD could be answered for")
    watches = request.app[_OPEN]
    if watches.count >= _MOST_WATCHES:
        raise RequestError(429, "TooManyRequests", "too many watches of events at once; try again", retry_after=5)
    watches.count += 1
    try:
        return await _watch(request, query, wanted)
    finally:
        watches.count -= 1


async def _end_watches(app: web.Application) -> None:
    for limit in app[_OPEN].limits:
        limit.reschedule(asyncio.get_running_loop().time())


async def _read(request: web.Request) -> web.Response:
    """GET of one event."""
    api, namespace, name = request.app[API], _namespace_of(request), request.match_info["name"]
    call_of(request).principal.require("read", namespace, "read events")
    accepted = negotiate(request, ("json", "yaml", "table"))
    try:
        entry = await api.storage.get(f"{events_prefix(api.registry.root, namespace)}{name}")
    except NotFound as error:
        raise ResourceNotFound("events", name) from error
    document = _document(entry)
    if document is None:
        raise Undecodable(entry.key, "it is no event")
    if accepted.form == "table":
        metadata = {"resourceVersion": str(entry.revision)}
        return await respond(accepted, _table([document], metadata, api.clock.now(), whole=_whole(request)))
    return await respond(accepted, document)


async def _list(request: web.Request, query: ListQuery, wanted: _Wanted) -> web.Response:
    api = request.app[API]
    accepted = negotiate(request, ("json", "yaml", "table"))
    of_list = fingerprint("v1", "events", wanted.namespace, query.labels, query.fields)
    if query.token and query.revision:
        raise bad_request("a continue token already says the resourceVersion")
    exact = query.revision if query.exact and query.revision else 0
    place = place_of(query.token, of_list) if query.token else Place(exact)
    pages = await read_pages(api.storage, wanted.prefix(api), place, query.limit, wanted.choose, clock=api.clock)
    if query.revision and pages.revision < query.revision:
        raise not_yet(query.revision, pages.revision)
    metadata = {"resourceVersion": str(pages.revision)}
    if pages.next is not None:
        metadata["continue"] = pages.next.token(of_list)
    if accepted.form == "table":
        now, whole = api.clock.now(), _whole(request)
        head = _table([], metadata, now)
        return await respond(accepted, await _long(api.clock, head, "rows", pages.found, lambda d: _row(d, now, whole)))
    head = {"kind": "EventList", "apiVersion": "v1", "metadata": metadata, "items": []}
    return await respond(accepted, await _long(api.clock, head, "items", pages.found, lambda d: d))


async def _long(
    clock: Clock, head: Document, last: str, documents: Sequence[Document], make: Callable[[Document], Document]
) -> bytes:
    """JSON of `head`, its last list filled with what `make` makes of the documents, slice by slice."""
    slices: list[bytes] = []
    for start in range(0, len(documents), _SLICE):
        slices.append(orjson.dumps([make(d) for d in documents[start : start + _SLICE]])[1:-1])
        await clock.sleep(0)
    begin = orjson.dumps({**head, last: []}).removesuffix(b"]}")
    return b"%b%b]}" % (begin, b",".join(slices))


async def _watch(request: web.Request, query: ListQuery, wanted: _Wanted) -> web.StreamResponse:
    """Stream until the client goes, its time is over, or the store cannot go on."""
    api = request.app[API]
    accepted = negotiate(request, ("json", "table"))
    initial = query.revision in (None, 0) if query.initial_events is None else query.initial_events
    present: Sequence[Document] = ()
    after = query.revision or 0
    if initial or not after:
        pages = await read_pages(api.storage, wanted.prefix(api), Place(), 0, wanted.choose, clock=api.clock)
        if pages.revision < after:
            raise not_yet(after, pages.revision)
        present, after = pages.found if initial else (), pages.revision
    stream = _EventStream(request, api, accepted, wanted)
    limit = api.clock.timeout(query.timeout or api.settings.watch_seconds * (1 + random.random()))  # noqa: S311 - spreads reconnects
    async with api.storage.watch(wanted.prefix(api), after) as changes:
        await stream.start()
        try:
            async with limit as scope:
                request.app[_OPEN].limits.add(scope)
                try:
                    await stream.send_slices(present, lambda document: stream.told("ADDED", document, after))
                    if query.initial_events:
                        await stream.send([stream.initial_end(after)])
                    await _follow(stream, changes)
                finally:
                    request.app[_OPEN].limits.discard(scope)
        except TimeoutError:
            pass  # the watch's time is over: the stream just ends, and the client asks again from where it was
        except Stuck:
            return stream.cut_off()
        except (LrmError, StorageError) as error:
            if not expected(error):
                raise
            await stream.send_error(error)
        return await stream.end()


async def _follow(stream: _EventStream, changes: Watch) -> None:
    """Tell what happens; ends only by an error."""
    while True:
        try:
            async with stream.api.clock.timeout(_LOOK_SECONDS):
                batch = await anext(aiter(changes))
        except TimeoutError:
            stream.check_connected()
        else:
            await stream.send_batch(batch)


class _EventStream(LineStream):
    """The lines about events."""

    def __init__(self, request: web.Request, api: Api, accepted: Accepted, wanted: _Wanted) -> None:
        super().__init__(request, api, "events")
        self.api = api
        self.wanted = wanted
        self._form = accepted.form
        self._whole = _whole(request)
        self._columns_sent = False

    async def send_batch(self, batch: Batch) -> None:
        """Everything of one revision; when a lease ends, that is much at once."""
        await self.send_slices(batch.events, self._of)

    async def send_slices(self, about: Sequence[T], tell: Callable[[T], bytes | None]) -> None:
        """A line about each, slice by slice; what `tell` has none for is left out."""
        for start in range(0, len(about), _SLICE):
            await self.send([told for one in about[start : start + _SLICE] if (told := tell(one))])
            if start + _SLICE < len(about):
                await self.api.clock.sleep(0)

    def told(self, kind: str, document: Document, revision: int) -> bytes:
        """One event of the watch, about one event."""
        if self._form != "table":
            return line(kind, orjson.dumps(document))
        columns, self._columns_sent = not self._columns_sent, True
        metadata = {"resourceVersion": str(revision)}
        table = _table([document], metadata, self.api.clock.now(), whole=self._whole, columns=columns)
        return line(kind, orjson.dumps(table))

    def initial_end(self, revision: int) -> bytes:
        """The bookmark after the events that were there."""
        metadata = {"resourceVersion": str(revision), "annotations": {INITIAL_EVENTS_END: "true"}}
        if self._form == "table":
            return line("BOOKMARK", orjson.dumps(_table([], metadata, self.api.clock.now(), columns=False)))
        return line("BOOKMARK", orjson.dumps({"kind": "Event", "apiVersion": "v1", "metadata": metadata}))

    def _of(self, event: Event) -> bytes | None:
        revision = event.entry.revision
        if event.kind == "put":
            document = self.wanted.choose(event.entry)
            added = event.entry.create_revision == revision
            return self.told("ADDED" if added else "MODIFIED", document, revision) if document else None
        document = self.wanted.choose(event.previous) if event.previous else None
        if document is None:
            return None  # its last state is not known any more: nobody can say whom it would concern
        document["metadata"]["resourceVersion"] = str(revision)
        return self.told("DELETED", document, revision)


@dataclass(frozen=True)
class _Wanted:
    """Which events a request is about."""

    namespace: str
    about: str
    """The name of the one object, if only one can be meant."""
    tests: tuple[_Test, ...]

    @classmethod
    def of(cls, namespace: str, query: ListQuery) -> _Wanted:
        """Raises 400."""
        terms = field_terms(query.fields)
        labels = parse_labels(query.labels)
        about = [t.value for t in terms if t.name == "involvedObject.name" and t.wanted]
        tests = [_test(term) for term in terms]
        if labels:
            tests.append(lambda document: all(test(document["metadata"].get("labels") or {}) for test in labels))
        return cls(namespace, about[0] if about else "", tuple(tests))

    def prefix(self, api: Api) -> str:
        """Below which all of them are."""
        return events_prefix(api.registry.root, self.namespace, self.about)

    def choose(self, entry: Entry) -> Document | None:
        """The event of an entry, if it is wanted."""
        document = _document(entry)
        return document if document is not None and all(test(document) for test in self.tests) else None


def _test(term: FieldTerm) -> _Test:
    if term.name not in _FIELDS:
        raise unknown_field(term.name, "events", _FIELDS)
    path = ["source", "component"] if term.name == "source" else term.name.split(".")

    def test(document: Document) -> bool:
        value: Any = document
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return (str(value or "") == term.value) is term.wanted

    return test


def _document(entry: Entry) -> Document | None:
    """The event of a stored value; None for what is none."""
    try:
        document = orjson.loads(entry.value)
        document["metadata"]["resourceVersion"] = str(entry.revision)
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    found: Document = document
    return found


def _table(
    documents: Iterable[Document], metadata: Document, now: datetime, *, whole: bool = False, columns: bool = True
) -> Document:
    definitions = [
        {
            "name": name,
            "type": of,
            "format": "name" if name == "Name" else "",
            "description": text,
            "priority": priority,
        }
        for name, of, text, priority in _COLUMNS
    ]
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": metadata,
        "columnDefinitions": definitions if columns else [],
        "rows": [_row(d, now, whole) for d in documents],
    }


def _row(document: Document, now: datetime, whole: bool) -> Document:
    return {"cells": _cells(document, now), "object": document if whole else _partial(document)}


def _cells(document: Document, now: datetime) -> list[Any]:
    about, source = document.get("involvedObject") or {}, document.get("source") or {}
    return [
        _since(document.get("lastTimestamp"), now),
        document.get("type"),
        document.get("reason"),
        f"{str(about.get('kind', '')).lower()}/{about.get('name', '')}",
        ", ".join(part for part in (source.get("component"), source.get("host")) if part),
        str(document.get("message", "")).strip(),
        _since(document.get("firstTimestamp"), now),
        document.get("count"),
        document["metadata"].get("name"),
    ]


def _since(time: object, now: datetime) -> str:
    try:
        return age(now - datetime.fromisoformat(str(time)))
    except (ValueError, TypeError):
        return "<unknown>"


def _partial(document: Document) -> Document:
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": document["metadata"]}


def _whole(request: web.Request) -> bool:
    """Whether a Table's rows are to carry whole events."""
    return request.query.get("includeObject") == "Object"


def _namespace_of(request: web.Request) -> str:
    namespace = request.match_info.get("namespace", "")
    if "namespace" in request.match_info:
        check_namespace(namespace)
    call_of(request).about = About("", "events", request.match_info.get("name", ""), namespace)
    return namespace
