"""Reading: one object from the store, lists from the cache, long lists page by page from the store at one revision.

A list without a resourceVersion holds everything written before it was asked for: the cache is asked to catch up
first. `0` takes what the cache has, which works while the store is away. Pages of one list are one revision; when that
is no longer kept, 410. Objects that cannot be decoded are left out with a Warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lrm.api.call import Api
from lrm.api.pages import Place, fingerprint, place_of, read_pages
from lrm.api.requests import ListQuery, Target
from lrm.api.status import bad_request
from lrm.cache import Item
from lrm.errors import CacheBehind, HistoryGone, ResourceNotFound, Undecodable
from storage.base import Entry
from storage.errors import NoSpace, NotFound, Unavailable


@dataclass(frozen=True, slots=True)
class Listing:
    """A list or a page of one; `remaining` None where it is not known without reading on."""

    items: Sequence[Item]
    revision: int
    token: str = ""
    remaining: int | None = None
    left_out: Sequence[str] = ()
    """Keys of objects that cannot be decoded."""


async def read_one(api: Api, target: Target, revision: str) -> Item:
    """One object: from the store, or at resourceVersion 0 from the cache. Raises `ResourceNotFound`, `Undecodable`."""
    if revision == "0" and api.cache.synced:
        item = api.cache.item(target.kind, target.namespace, target.name)
        if item is None:
            raise ResourceNotFound(target.kind.plural, target.name)
        if item.resource is None:
            raise Undecodable(item.entry.key, item.error)
        return item
    key = api.registry.key(target.kind, target.namespace, target.name)
    try:
        entry = await api.storage.get(key)
    except NotFound as error:
        raise ResourceNotFound(target.kind.plural, target.name) from error
    return Item(target.kind, target.namespace, target.name, entry, target.kind.decode(entry))


async def read_list(api: Api, target: Target, query: ListQuery) -> Listing:
    """What the query asks for. Raises `CacheBehind`, `HistoryGone`, the store's `Compacted`, 400."""
    if query.token:
        if query.revision:
            raise bad_request("a continue token already says the resourceVersion")
        return await _from_store(api, target, query, place_of(query.token, _fingerprint(query, target)))
    if query.exact and query.revision:
        return await _from_store(api, target, query, Place(query.revision))
    try:
        await catch_up(api, query.revision)
    except NoSpace:
        # No barrier can be written to an out-of-space store, but it can still be read at one revision.
        listing = await _from_store(api, target, query, Place())
        if query.revision and listing.revision < query.revision:
            raise not_yet(query.revision, listing.revision) from None
        return listing
    return _from_cache(api, target, query)


async def catch_up(api: Api, revision: int | None) -> None:
    """Return when the cache is as new as asked: None is now, 0 is whatever it has.

    Raises `CacheBehind`, `HistoryGone` for a revision that has certainly not happened (the store was restored), and
    `NoSpace` where the store cannot be asked in this way.
    """
    if not api.cache.synced:
        raise CacheBehind(f"the cache is not filled yet: {api.cache.error}")
    if revision == 0 or (revision is not None and revision <= api.cache.revision and api.cache.current):
        return
    try:
        await api.cache.barrier(api.settings.barrier_seconds)
    except NoSpace:
        raise
    except Unavailable as error:
        raise CacheBehind(f"the store did not confirm in time that the cache is up to date: {error}") from error
    if revision is not None and revision > api.cache.revision:
        raise not_yet(revision, api.cache.revision)


def not_yet(asked: int, head: int) -> HistoryGone:
    """A revision was asked for that the store, which was restored, has not come to."""
    return HistoryGone(f"revision {asked} has not happened: the store is at {head}; list again")


def _from_cache(api: Api, target: Target, query: ListQuery) -> Listing:
    """All of it at the cache's revision; nothing is awaited here, so it is one revision."""
    revision = api.cache.revision
    # The store's order, which later pages follow: it is that of whole keys, not of (namespace, name).
    items = sorted(api.cache.items(target.kind, target.namespace), key=lambda item: item.entry.key)
    left_out = [item.entry.key for item in items if item.resource is None]
    found = [item for item in items if _wanted(query, item)]
    if query.revision == 0 or not query.limit or len(found) <= query.limit:
        return Listing(found, revision, left_out=left_out)
    page = found[: query.limit]
    place = Place(revision, page[-1].entry.key)
    remaining = len(found) - len(page) if query.selector is None else None
    return Listing(page, revision, place.token(_fingerprint(query, target)), remaining, left_out)


async def _from_store(api: Api, target: Target, query: ListQuery, place: Place) -> Listing:
    prefix = api.registry.kind_prefix(target.kind, target.namespace)
    left_out: list[str] = []

    def choose(entry: Entry) -> Item | None:
        item = _item(api, entry)
        if item is not None and item.resource is None:
            left_out.append(entry.key)
        return item if item is not None and _wanted(query, item) else None

    pages = await read_pages(api.storage, prefix, place, query.limit, choose, clock=api.clock)
    token = pages.next.token(_fingerprint(query, target)) if pages.next else ""
    return Listing(pages.found, pages.revision, token, left_out=left_out)


def _wanted(query: ListQuery, item: Item) -> bool:
    if item.resource is None:
        return False
    return query.selector is None or query.selector(item.resource)


def _item(api: Api, entry: Entry) -> Item | None:
    kind, namespace, name = api.registry.parse_key(entry.key)
    if kind is None:
        return None
    try:
        return Item(kind, namespace, name, entry, kind.decode(entry))
    except Undecodable as error:
        return Item(kind, namespace, name, entry, None, str(error))


def _fingerprint(query: ListQuery, target: Target) -> str:
    return fingerprint(target.kind.api_version, target.kind.plural, target.namespace, query.labels, query.fields)
