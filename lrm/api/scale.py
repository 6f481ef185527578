"""The subresource `scale` of every kind with a number of replicas: autoscaling/v1 Scale, as `kubectl scale` uses it.

It reads and writes that one number of the spec; everything else that a body carries is ignored, but for its identity:
uid and resourceVersion are preconditions. A PUT without `spec.replicas` means 0, as in Kubernetes, whose clients leave
a zero out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web

from lrm.api.call import API, call_of
from lrm.api.codec import as_object, negotiate, parse_json, read_body, read_object, read_patch, respond
from lrm.api.discovery import SCALE
from lrm.api.edits import Edit, edit_of, same_state, store_change
from lrm.api.patches import apply_patch
from lrm.api.requests import Target, target_of
from lrm.api.status import bad_request, not_found
from lrm.errors import Cause, Invalid, ResourceNotFound
from lrm.kind import Scale
from lrm.resource import AnyResource

_API_VERSION = f"{SCALE['group']}/{SCALE['version']}"
_MOST = 2**31 - 1


async def read(request: web.Request) -> web.Response:
    """GET of the scale, from the store."""
    api, target = request.app[API], target_of(request)
    scale = _scale_of(target)
    call_of(request).principal.require("read", target.namespace, f"read {target.kind.plural}")
    accepted = negotiate(request)
    resource: AnyResource = await api.client.bind(owner="", fence=None).get(
        target.kind.model, target.namespace, target.name
    )
    return await respond(accepted, _document(scale, resource))


async def replace(request: web.Request) -> web.Response:
    """PUT of the scale; without a resourceVersion whatever the object's state is."""
    edit = edit_of(request, "write", "scale")
    _scale_of(edit.target)
    body = await _body(edit)
    return await _scaled(edit, lambda _: body)


async def patch(request: web.Request) -> web.Response:
    """PATCH of the scale: merge patch or JSON patch."""
    edit = edit_of(request, "write", "scale")
    scale = _scale_of(edit.target)
    content_type, body = await read_patch(request, edit.api.settings, edit.api.clock)
    return await _scaled(edit, lambda resource: apply_patch(content_type, body, _document(scale, resource)))


async def _scaled(edit: Edit, document_for: Callable[[AnyResource], dict[str, Any]]) -> web.Response:
    """Change the number to what a document says; it is asked for anew whenever the object has changed."""
    kind, scale = edit.target.kind, _scale_of(edit.target)
    current = await edit.current()

    def mutate(resource: AnyResource) -> None:
        document = _located(edit.target, document_for(resource))
        same_state(kind, resource, document)
        scale.wish(resource, _replicas(kind.name, resource, document))

    stored = await store_change(edit.client(), kind, current, mutate, edit.options)
    if stored is None:
        raise ResourceNotFound(kind.plural, current.name)
    same = stored.metadata.resource_version == current.metadata.resource_version and not edit.options.dry_run
    edit.note("unchanged" if same else "scaled", stored, current, stored)
    return await respond(edit.accepted, _document(scale, stored))


async def _body(edit: Edit) -> dict[str, Any]:
    """The Scale of a PUT. `kubectl scale --current-replicas` sends it without a Content-Type: then it is JSON."""
    request, settings, clock = edit.request, edit.api.settings, edit.api.clock
    if "Content-Type" in request.headers:
        return await read_object(request, settings, clock)
    return as_object(parse_json(await read_body(request, settings, clock)))


def _scale_of(target: Target) -> Scale:
    if target.kind.scale is None:
        raise not_found()
    return target.kind.scale


def _document(scale: Scale, resource: AnyResource) -> dict[str, Any]:
    metadata = resource.metadata.wire()
    shown = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    return {
        "apiVersion": _API_VERSION,
        "kind": SCALE["kind"],
        "metadata": {name: metadata[name] for name in shown if name in metadata},
        "spec": {"replicas": scale.wished(resource)},
        "status": {"replicas": scale.actual(resource), "selector": scale.selector(resource)},
    }


def _located(target: Target, document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with an object for its metadata; raises 400 where it is not a Scale of the path's object."""
    for field, wanted in (("apiVersion", _API_VERSION), ("kind", SCALE["kind"])):
        said = document.get(field, wanted)
        if said != wanted:
            raise bad_request(f"{field} in the body ({str(said)[:80]}) does not match this path, which wants {wanted}")
    metadata = document.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise bad_request("metadata must be an object")
    for field, wanted in (("namespace", target.namespace), ("name", target.name)):
        said = metadata.get(field) or wanted
        if said != wanted:
            raise bad_request(f"metadata.{field} in the body ({str(said)[:80]}) does not match the path ({wanted})")
    return {**document, "metadata": metadata}


def _replicas(kind: str, resource: AnyResource, document: Mapping[str, Any]) -> int:
    spec = document.get("spec")
    wanted = spec.get("replicas", 0) if isinstance(spec, dict) else None
    if isinstance(wanted, int) and not isinstance(wanted, bool) and 0 <= wanted <= _MOST:
        return wanted
    field = "spec.replicas" if isinstance(spec, dict) else "spec"
    message = f"must be a whole number from 0 to {_MOST}" if isinstance(spec, dict) else "must be an object"
    raise Invalid(f'{kind} "{resource.name}"', [Cause(field, "FieldValueInvalid", message)])
