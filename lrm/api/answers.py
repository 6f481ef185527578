"""Objects and lists as answers, in the form that the client asked for."""

from __future__ import annotations

from typing import Any

import orjson
from aiohttp import web

from lrm.api.call import API
from lrm.api.codec import Accepted, Form, respond
from lrm.api.lists import Listing
from lrm.api.present import Presenter
from lrm.api.requests import Target
from lrm.api.table import partial_metadata, table_of
from lrm.cache import Item
from lrm.kind import Kind
from lrm.resource import AnyResource

OBJECT_FORMS: tuple[Form, ...] = ("json", "yaml", "table", "partial")


async def answer_item(request: web.Request, accepted: Accepted, item: Item) -> web.Response:
    """One object as it is stored."""
    if accepted.form in ("json", "yaml") or item.resource is None:
        return await respond(accepted, Presenter(request.app[API].cache).raw(item))
    return await answer_resource(request, accepted, item.kind, item.resource)


async def answer_resource(
    request: web.Request, accepted: Accepted, kind: Kind[Any], resource: AnyResource, *, status: int = 200
) -> web.Response:
    """One object as it was just written."""
    api = request.app[API]
    presenter = Presenter(api.cache)
    shown = presenter.shown(kind, resource)
    document: dict[str, Any]
    if accepted.form == "table":
        metadata = {"resourceVersion": shown.metadata.resource_version}
        documents = [kind.document(shown)] if _whole(request) else None
        document = table_of(kind, [shown], documents, metadata, api.clock.now())
    elif accepted.form == "partial":
        document = partial_metadata(shown)
    else:
        document = kind.document(shown)
    return await respond(accepted, document, status=status)


async def answer_list(request: web.Request, accepted: Accepted, target: Target, listing: Listing) -> web.Response:
    """A list or a page of one."""
    api = request.app[API]
    presenter, kind = Presenter(api.cache), target.kind
    metadata: dict[str, Any] = {"resourceVersion": str(listing.revision)}
    if listing.token:
        metadata["continue"] = listing.token
    if listing.remaining is not None:
        metadata["remainingItemCount"] = listing.remaining
    if accepted.form in ("json", "yaml"):
        raw = b'{"kind":%b,"apiVersion":%b,"metadata":%b,"items":[%b]}' % (
            orjson.dumps(f"{kind.name}List"),
            orjson.dumps(kind.api_version),
            orjson.dumps(metadata),
            b",".join(presenter.raw(item) for item in listing.items),
        )
        return await respond(accepted, raw)
    shown = [presenter.shown(kind, item.resource) for item in listing.items if item.resource is not None]
    if accepted.form == "table":
        documents = [kind.document(r) for r in shown] if _whole(request) else None
        return await respond(accepted, table_of(kind, shown, documents, metadata, api.clock.now()))
    partial = {
        "kind": "PartialObjectMetadataList",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": metadata,
        "items": [partial_metadata(r) for r in shown],
    }
    return await respond(accepted, partial)


def _whole(request: web.Request) -> bool:
    """Whether a Table's rows are to carry whole objects."""
    return request.query.get("includeObject") == "Object"
