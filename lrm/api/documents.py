"""Several documents in one POST: all of them are parsed, authorised and checked before the first one is stored.

Any error there is one 4xx whose causes carry `[i].` and their field, and nothing was stored. Then each object is
created, or its spec replaced and its labels and annotations merged, in order; what the store refuses meanwhile is told
per object, with 207. The writes are separate: a failure in the middle leaves those before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from lrm import writes
from lrm.api.audit import Touched
from lrm.api.call import API, Api, Call, call_of
from lrm.api.codec import negotiate, read_documents, respond
from lrm.api.edits import adopt, check_admission, parse, store_change, store_new
from lrm.api.requests import WriteOptions, kind_of, write_options
from lrm.api.status import About, RequestError, answer_of, expected, not_found, status_document
from lrm.api.wirenames import to_wire
from lrm.errors import Cause, Forbidden, Invalid, LrmError, ResourceConflict, ResourceExists, ResourceNotFound
from lrm.kind import Kind
from lrm.resource import AnyResource
from storage.errors import StorageError

_RACES = 4
"""How often an object may appear or vanish between our look and our write."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    index: int
    kind: Kind[Any]
    resource: AnyResource

    @property
    def place(self) -> tuple[str, str, str]:
        return self.kind.plural, self.resource.namespace, self.resource.name


@dataclass(frozen=True, slots=True)
class _Post:
    """What all documents of a request share."""

    api: Api
    call: Call
    api_version: str
    options: WriteOptions


async def apply_documents(request: web.Request) -> web.Response:
    """POST of a stream of YAML documents, of one JSON object, or of a List."""
    api, call = request.app[API], call_of(request)
    api_version = f"{request.match_info['group']}/{request.match_info['version']}"
    if not any(kind.api_version == api_version for kind in api.registry):
        raise not_found()
    if not call.principal.may_somewhere("write"):
        call.principal.require("write", "", "create or update objects")
    accepted = negotiate(request)
    post = _Post(api, call, api_version, write_options(request))
    documents = list(_flattened(await read_documents(request, api.settings, api.clock)))
    if len(documents) > api.settings.max_documents:
        raise RequestError(413, "RequestEntityTooLarge", f"more than {api.settings.max_documents} documents")
    items = [await _store(post, wanted) for wanted in await _checked(post, documents)]
    failed = any(item["result"] == "failed" for item in items)
    result = {"kind": "ApplyResultList", "apiVersion": api_version, "metadata": {}, "items": items}
    return await respond(accepted, result, status=207 if failed else 200)


async def _checked(post: _Post, documents: list[tuple[str, Any]]) -> list[_Wanted]:
    """Everything that can be known before the first write. Raises one error for all documents."""
    wanted: list[_Wanted] = []
    seen: dict[tuple[str, str, str], str] = {}
    causes: dict[int, list[Cause]] = {403: [], 409: [], 422: []}
    for index, (path, document) in enumerate(documents):
        try:
            one = _parsed(post, index, document)
            if one.resource.name and seen.setdefault(one.place, path) != path:
                duplicate = Cause("metadata.name", "FieldValueDuplicate", f"the same object as {seen[one.place]}")
                raise Invalid("document", [duplicate])  # noqa: TRY301 - one place turns errors into causes
            await _rehearse(post, one)
            wanted.append(one)
        except Invalid as error:
            causes[422] += [Cause(f"{path}.{c.field}".rstrip("."), c.reason, c.message) for c in error.causes]
        except ResourceConflict as error:
            causes[409].append(Cause(f"{path}.metadata.resourceVersion", "FieldValueInvalid", str(error)))
        except Forbidden as error:
            causes[403].append(Cause(path, "FieldValueForbidden", str(error)))
        except RequestError as error:
            causes[error.code].append(Cause(path, "FieldValueForbidden", str(error)))
    for code, reason in ((403, "Forbidden"), (422, "Invalid"), (409, "Conflict")):
        if causes[code]:
            found = [cause for each in causes.values() for cause in each]
            told = ", ".join(f"{c.field}: {c.message}" for c in causes[code])
            raise RequestError(code, reason, f"nothing was stored: {told}", causes=found)
    return wanted


def _parsed(post: _Post, index: int, document: Any) -> _Wanted:
    if not isinstance(document, dict):
        raise Invalid("document", [Cause("", "FieldValueInvalid", "must be an object")])
    kind = kind_of(post.api.registry, document.get("apiVersion"), document.get("kind"))
    if kind is None or kind.api_version != post.api_version:
        raise Invalid("document", list(_unknown_kind(post.api, post.api_version, document)))
    metadata = document.get("metadata")
    namespace = (metadata.get("namespace") if isinstance(metadata, dict) else None) or "default"
    post.call.principal.require("write", str(namespace), f"create or update {kind.plural}")
    resource = parse(kind, to_wire(kind, document), post.options, post.call)
    # What was authorised is what was said; what is stored is what was understood. They must be the same.
    post.call.principal.require("write", resource.namespace, f"create or update {kind.plural}")
    return _Wanted(index, kind, resource)


def _unknown_kind(api: Api, api_version: str, document: dict[str, Any]) -> Iterator[Cause]:
    for field in ("apiVersion", "kind"):
        if not isinstance(document.get(field), str) or not document[field]:
            yield Cause(field, "FieldValueRequired", "required value")
            return
    if document["apiVersion"] != api_version:
        yield Cause("apiVersion", "FieldValueInvalid", f"must be {api_version} on this path")
        return
    known = ", ".join(sorted(k.name for k in api.registry if k.api_version == api_version))
    yield Cause("kind", "FieldValueNotFound", f'no kind "{document["kind"][:80]}" in {api_version}; there are {known}')


async def _rehearse(post: _Post, wanted: _Wanted) -> None:
    """Decide without writing, so that what the rules refuse is refused before anything is stored."""
    api, kind, resource = post.api, wanted.kind, wanted.resource
    current = await _current(api, wanted) if resource.name else None
    check_admission(api, post.call, resource, current)
    if current is None:
        if kind.create_refusal:
            raise Forbidden(f"{kind.plural} cannot be created: {kind.create_refusal}")
        new = writes.for_create(kind, resource, uid="rehearsal", now=api.clock.now())
        await api.client.check_owners(new)
        return
    changed = current.thaw()
    _merge_checked(wanted, changed)
    writes.for_update(kind, current, changed)


async def _current(api: Api, wanted: _Wanted) -> AnyResource | None:
    client = api.client.bind(owner="", fence=None)
    try:
        found: AnyResource = await client.get(wanted.kind.model, wanted.resource.namespace, wanted.resource.name)
    except ResourceNotFound:
        return None
    return found


async def _store(post: _Post, wanted: _Wanted) -> dict[str, Any]:
    """One object's result; only errors that the table knows become one, a defect ends the request."""
    call, options = post.call, post.options
    kind, resource = wanted.kind, wanted.resource
    found: dict[str, Any] = {
        "index": wanted.index,
        "apiVersion": kind.api_version,
        "kind": kind.name,
        "namespace": resource.namespace,
        "name": resource.name,
    }
    try:
        result, stored = await _write(post.api, wanted, options)
    except (LrmError, StorageError) as error:
        if not expected(error):
            raise
        answer = answer_of(error, call.request_id, writing=True)
        call.touched.append(Touched(kind.plural, resource.namespace, resource.name, "failed", note=answer.message))
        about = About(kind.group, kind.plural, resource.name, resource.namespace)
        return {**found, "result": "failed", "error": status_document(answer, about)}
    version = stored.metadata.resource_version
    note = "dry run" if options.dry_run else ""
    call.touched.append(Touched(kind.plural, stored.namespace, stored.name, result, after=version, note=note))
    return {**found, "name": stored.name, "result": result, "uid": stored.uid, "resourceVersion": version}


async def _write(api: Api, wanted: _Wanted, options: WriteOptions) -> tuple[str, AnyResource]:
    kind, resource = wanted.kind, wanted.resource
    client = api.client.bind(owner=options.field_manager, fence=None)
    for _ in range(_RACES):
        current = await _current(api, wanted) if resource.name else None
        if current is None:
            try:
                return "created", await store_new(api, kind, resource, options)
            except ResourceExists:
                if not resource.name:
                    raise
                continue
        try:
            stored = await store_change(client, kind, current, lambda r: _merge_checked(wanted, r), options)
        except ResourceNotFound:
            continue
        if stored is None:
            return "configured", current
        changed = options.dry_run or stored.metadata.resource_version != current.metadata.resource_version
        return "configured" if changed else "unchanged", stored
    raise ResourceConflict(kind.plural, resource.name, "it appeared and vanished meanwhile")


def _merge_checked(wanted: _Wanted, resource: AnyResource) -> None:
    said = wanted.resource.metadata.resource_version
    if said and said != resource.metadata.resource_version:
        raise ResourceConflict(wanted.kind.plural, resource.name)
    _merge(resource, wanted.resource)


def _merge(resource: AnyResource, wanted: AnyResource) -> None:
    """The spec is replaced; labels and annotations are merged; finalizers and owners stay."""
    source = wanted.thaw()
    source.metadata.labels = {**resource.metadata.labels, **source.metadata.labels}
    source.metadata.annotations = {**resource.metadata.annotations, **source.metadata.annotations}
    source.metadata.finalizers = resource.metadata.finalizers
    source.metadata.owner_references = resource.metadata.owner_references
    adopt(resource, source)


def _flattened(documents: list[Any]) -> Iterator[tuple[str, Any]]:
    """Each object with its path; a List's objects stand for themselves."""
    for i, document in enumerate(documents):
        if isinstance(document, dict) and document.get("kind") == "List" and isinstance(document.get("items"), list):
            for j, item in enumerate(document["items"]):
                yield f"[{i}].items[{j}]", item
        else:
            yield f"[{i}]", document
