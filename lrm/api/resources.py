"""The endpoints of all kinds: which path and verb does what; `lists`, `edits`, `watch` and others do it."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from lrm.api import core_operations, discovery, edits, scale
from lrm.api.answers import OBJECT_FORMS, answer_item, answer_list
from lrm.api.call import API, call_of
from lrm.api.codec import negotiate, respond
from lrm.api.documents import apply_documents
from lrm.api.lists import read_list, read_one
from lrm.api.openapi import OpenApi
from lrm.api.requests import check_namespace, list_query, target_of
from lrm.api.status import RequestError, not_found
from lrm.api.watch import serve_watch

_OPENAPI: web.AppKey[OpenApi] = web.AppKey("openapi")


def add_resource_routes(app: web.Application) -> None:
    """Everything under /api, /apis, /openapi and /version."""
    api = app[API]
    operations = (*core_operations.OPERATIONS, *api.operations)
    app[_OPENAPI] = OpenApi(api.registry, discovery.version_info()["lrmVersion"], operations)
    group = "/apis/{group}/{version}"
    everywhere = f"{group}/{{plural}}"
    inside = f"{group}/namespaces/{{namespace}}/{{plural}}"
    one = f"{inside}/{{name}}"
    routes: list[web.RouteDef] = [
        web.get("/version", _version),
        web.get("/api", _core_versions),
        web.get("/api/v1", _core_resources),
        web.get("/api/v1/namespaces", _namespaces),
        web.get("/api/v1/namespaces/{namespace}", _namespace),
        web.get("/apis", _groups),
        web.get("/apis/{group}", _group),
        web.get(group, _resources),
        web.post(group, apply_documents),
        web.get("/openapi/v3", _openapi_index),
        web.get("/openapi/v3/{path:.+}", _openapi_document),
        web.get(everywhere, list_or_watch),
        web.get(inside, list_or_watch),
        web.post(inside, edits.create),
        web.get(one, read),
        web.put(one, edits.replace),
        web.patch(one, edits.patch),
        web.delete(one, edits.delete),
        web.get(f"{one}/status", read),
        web.put(f"{one}/status", edits.replace_status),
        web.patch(f"{one}/status", edits.patch_status),
        web.get(f"{one}/scale", scale.read),
        web.put(f"{one}/scale", scale.replace),
        web.patch(f"{one}/scale", scale.patch),
    ]
    app.add_routes(routes)


async def read(request: web.Request) -> web.StreamResponse:
    """GET of one object, or of its status subresource, which is the same document."""
    api, call, target = request.app[API], call_of(request), target_of(request)
    call.principal.require("read", target.namespace, f"read {target.kind.plural}")
    accepted = negotiate(request, OBJECT_FORMS)
    item = await read_one(api, target, request.query.get("resourceVersion", ""))
    return await answer_item(request, accepted, item)


async def list_or_watch(request: web.Request) -> web.StreamResponse:
    """GET of a collection."""
    api, call, target = request.app[API], call_of(request), target_of(request)
    query = list_query(request, target.kind)
    verb = "watch" if query.watch else "list"
    call.principal.require("read", target.namespace, f"{verb} {target.kind.plural}")
    if query.watch and request.method == "HEAD":
        raise RequestError(405, "MethodNotAllowed", "a watch has no end that a HEAD could be answered for")
    if query.watch:
        return await serve_watch(request, target, query)
    accepted = negotiate(request, OBJECT_FORMS)
    listing = await read_list(api, target, query)
    if listing.left_out:
        call.warn(
            f"{len(listing.left_out)} {target.kind.plural} that this version cannot decode are left out, "
            f"among them {listing.left_out[0]}"
        )
    return await answer_list(request, accepted, target, listing)


async def _version(request: web.Request) -> web.Response:
    return await respond(negotiate(request), discovery.version_info())


async def _core_versions(request: web.Request) -> web.Response:
    accepted = negotiate(request, ("json", "yaml", "discovery"))
    if accepted.form == "discovery":
        return await _discovered(accepted.version, discovery.aggregated_core(accepted.version))
    return await respond(accepted, discovery.core_versions(request.host))


async def _core_resources(request: web.Request) -> web.Response:
    return await respond(negotiate(request), discovery.core_resources())


async def _groups(request: web.Request) -> web.Response:
    accepted, registry = negotiate(request, ("json", "yaml", "discovery")), request.app[API].registry
    if accepted.form == "discovery":
        return await _discovered(accepted.version, discovery.aggregated_groups(registry, accepted.version))
    return await respond(accepted, discovery.group_list(registry))


async def _group(request: web.Request) -> web.Response:
    found = discovery.group(request.app[API].registry, request.match_info["group"])
    if found is None:
        raise not_found()
    return await respond(negotiate(request), found)


async def _resources(request: web.Request) -> web.Response:
    info = request.match_info
    found = discovery.resources(request.app[API].registry, info["group"], info["version"])
    if found is None:
        raise not_found()
    return await respond(negotiate(request), found)


async def _discovered(version: str, document: dict[str, Any]) -> web.Response:
    content_type = f"application/json;g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList"
    response = web.json_response(document)
    response.headers["Content-Type"] = content_type
    return response


async def _openapi_index(request: web.Request) -> web.Response:
    return await respond(negotiate(request), request.app[_OPENAPI].index())


async def _openapi_document(request: web.Request) -> web.Response:
    openapi, path = request.app[_OPENAPI], request.match_info["path"]
    document = openapi.document(path)
    if document is None:
        raise not_found()
    return await respond(negotiate(request), document, headers={"ETag": f'"{openapi.etag(path)}"'})


async def _namespaces(request: web.Request) -> web.Response:
    """The namespaces in use that the caller may read, and `default`."""
    api, principal = request.app[API], call_of(request).principal
    if request.query.get("watch", "0").lower() not in ("0", "false"):
        raise RequestError(405, "MethodNotAllowed", "namespaces cannot be watched: they come and go with their objects")
    names = sorted(n for n in {"default", *api.cache.namespaces()} if principal.may("read", n))
    document = {
        "kind": "NamespaceList",
        "apiVersion": "v1",
        "metadata": {"resourceVersion": str(api.cache.revision)},
        "items": [_namespace_document(name) for name in names],
    }
    return await respond(negotiate(request), document)


async def _namespace(request: web.Request) -> web.Response:
    """Any DNS label is a namespace; none is created or deleted."""
    name = request.match_info["namespace"]
    check_namespace(name)
    call_of(request).principal.require("read", name, "read the namespace")
    return await respond(negotiate(request), {"kind": "Namespace", "apiVersion": "v1", **_namespace_document(name)})


def _namespace_document(name: str) -> dict[str, Any]:
    labels = {"kubernetes.io/metadata.name": name}
    return {"metadata": {"name": name, "labels": labels}, "spec": {}, "status": {"phase": "Active"}}
