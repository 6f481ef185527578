"""Create, replace, patch and delete of one object, and its status: the rules are `lrm.writes`', the words are HTTP's.

Everything is checked before anything is written: rights, form, identity, preconditions. A patch is computed against
the object as it is at that moment and computed anew when another writer was faster; a resourceVersion in the request
makes it hold for exactly that state. With dryRun the same decisions are made and nothing is written.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from typing import Any

from aiohttp import web

from lrm import writes
from lrm.admission import admit
from lrm.api.answers import OBJECT_FORMS, answer_resource
from lrm.api.audit import Touched
from lrm.api.auth import Verb
from lrm.api.call import API, Api, Call, call_of
from lrm.api.codec import Accepted, as_object, negotiate, parse_documents, read_body, read_object, read_patch, respond
from lrm.api.patches import apply_patch
from lrm.api.requests import Target, WriteOptions, delete_options, target_of, write_options
from lrm.api.status import bad_request, success_document
from lrm.api.wirenames import to_wire
from lrm.client import Client
from lrm.errors import Cause, Forbidden, Invalid, ResourceConflict, ResourceExists
from lrm.kind import GENERATED_LENGTH, Kind
from lrm.model import unknown_fields
from lrm.resource import AnyResource

Mutate = Callable[[AnyResource], None]


@dataclass(frozen=True)
class Edit:
    """What a change of one object goes by."""

    request: web.Request
    accepted: Accepted
    target: Target
    options: WriteOptions

    @property
    def api(self) -> Api:
        return self.request.app[API]

    @property
    def call(self) -> Call:
        return call_of(self.request)

    def client(self) -> Client:
        """A client of this request's own."""
        return self.api.client.bind(owner=self.options.field_manager, fence=None)

    async def current(self) -> AnyResource:
        """The object as the store has it now. Raises `ResourceNotFound`."""
        found: AnyResource = await self.client().get(self.target.kind.model, self.target.namespace, self.target.name)
        return found

    async def document(self) -> dict[str, Any]:
        """The object of the body, under wire names and where the path says."""
        body = await read_object(self.request, self.api.settings, self.api.clock)
        document = located(self.target, to_wire(self.target.kind, body))
        if not self.target.name:
            name = str(document["metadata"].get("name", ""))[:80]
            self.call.about = replace_fields(self.target.about, name=name)
        return document

    async def patching(self) -> Callable[[AnyResource], dict[str, Any]]:
        """The body as a function from an object to the document that it is to become."""
        kind = self.target.kind
        content_type, body = await read_patch(self.request, self.api.settings, self.api.clock)
        wanted = to_wire(kind, body) if isinstance(body, dict) else body
        return lambda resource: located(self.target, apply_patch(content_type, wanted, kind.document(resource)))

    def note(
        self, result: str, shown: AnyResource, before: AnyResource | None, after: AnyResource | None, note: str = ""
    ) -> None:
        """For the record."""
        self.call.touched.append(
            Touched(
                self.target.kind.plural,
                shown.namespace,
                shown.name,
                result,
                before.metadata.resource_version if before else "",
                after.metadata.resource_version if after else "",
                note or ("dry run" if self.options.dry_run else ""),
            )
        )


def edit_of(request: web.Request, verb: Verb, what: str) -> Edit:
    """Rights, options and the form of the answer, before the body is read."""
    return edit_of_target(request, target_of(request), verb, what)


def edit_of_target(request: web.Request, target: Target, verb: Verb, what: str) -> Edit:
    """The same for a target that another path names: plug-ins' own endpoints."""
    call_of(request).principal.require(verb, target.namespace, f"{what} {target.kind.plural}")
    return Edit(request, negotiate(request, OBJECT_FORMS), target, write_options(request))


async def create(request: web.Request) -> web.Response:
    """POST of one object."""
    edit = edit_of(request, "write", "create")
    kind = edit.target.kind
    document = await edit.document()
    if kind.create_refusal:
        raise Forbidden(f"{kind.plural} cannot be created: {kind.create_refusal}")
    if document["metadata"].get("resourceVersion"):
        cause = Cause("metadata.resourceVersion", "FieldValueForbidden", "must not be set on an object to be created")
        raise Invalid(f'{kind.name} "{document["metadata"].get("name", "")}"', [cause])
    wanted = parse(kind, document, edit.options, edit.call)
    check_admission(edit.api, edit.call, wanted, None)
    created = await store_new(edit.api, kind, wanted, edit.options)
    edit.note("created", created, None, created)
    return await answer_resource(request, edit.accepted, kind, created, status=201)


async def replace(request: web.Request) -> web.Response:
    """PUT of one object; without a resourceVersion it replaces whatever is there."""
    edit = edit_of(request, "write", "update")
    document = await edit.document()
    return await _updated(edit, lambda _: document)


async def patch(request: web.Request) -> web.Response:
    """PATCH of one object: merge patch or JSON patch."""
    edit = edit_of(request, "write", "patch")
    return await _updated(edit, await edit.patching())


async def replace_status(request: web.Request) -> web.Response:
    """PUT of the status alone; spec and metadata of the body are ignored."""
    edit = edit_of(request, "status", "write the status of")
    document = await edit.document()
    return await _status_updated(edit, lambda _: document)


async def patch_status(request: web.Request) -> web.Response:
    """PATCH of the status alone."""
    edit = edit_of(request, "status", "write the status of")
    return await _status_updated(edit, await edit.patching())


async def delete(request: web.Request) -> web.Response:
    """DELETE of one object: gone at once, or marked while finalizers or a policy for its dependants hold it."""
    edit = edit_of(request, "write", "delete")
    current, left = await delete_target(edit)
    if left is not None:
        return await answer_resource(request, edit.accepted, edit.target.kind, left)
    told = Accepted("yaml" if edit.accepted.form == "yaml" else "json")
    return await respond(told, success_document(edit.target.about, current.uid))


async def delete_target(edit: Edit) -> tuple[AnyResource, AnyResource | None]:
    """Delete as query and body say: the object as it was, and what is left of it for now."""
    kind, target = edit.target.kind, edit.target
    options = delete_options(edit.request, await _delete_body(edit.request, edit.api))
    current = await edit.current()
    for field, wanted, found in (
        ("uid", options.uid, current.uid),
        ("resourceVersion", options.resource_version, current.metadata.resource_version),
    ):
        if wanted and wanted != found:
            raise ResourceConflict(kind.plural, target.name, f"the precondition {field} {wanted} is not {found}")
    if options.dry_run:
        decision = writes.for_delete(kind, current, now=edit.api.clock.now(), propagation=options.propagation)
        left = _outcome(decision, current)
    else:
        retry = not options.resource_version
        left = await edit.client().delete(current, propagation=options.propagation, retry=retry)
    note = "dry run" if options.dry_run else options.propagation
    edit.note("deleting" if left else "deleted", current, current, left, note)
    return current, left


def located(target: Target, document: dict[str, Any]) -> dict[str, Any]:
    """The document with the path's name and namespace; raises 400 where it says something else."""
    kind = target.kind
    for field, wanted in (("apiVersion", kind.api_version), ("kind", kind.name)):
        if document.get(field, wanted) != wanted:
            said = str(document[field])[:80]
            raise bad_request(f"{field} in the body ({said}) does not match this path, which wants {wanted}")
    metadata = document.get("metadata")
    if not isinstance(metadata, dict):
        if metadata is not None:
            cause = Cause("metadata", "FieldValueInvalid", "must be an object")
            raise Invalid(kind.name, [cause])
        metadata = {}
    metadata = dict(metadata)
    for field, wanted in (("namespace", target.namespace), ("name", target.name)):
        said = metadata.get(field) or wanted
        if wanted and said != wanted:
            raise bad_request(f"metadata.{field} in the body ({str(said)[:80]}) does not match the path ({wanted})")
        if wanted:
            metadata[field] = wanted
    return {**document, "metadata": metadata}


def parse(
    kind: Kind[Any], document: Mapping[str, Any], options: WriteOptions, call: Call, *, over: AnyResource | None = None
) -> AnyResource:
    """The object of a document; `over` is what is stored, whose unknown fields (a newer version's) may stay."""
    keep = frozenset(unknown_fields(over)) if over is not None else frozenset()
    wanted, warnings = kind.parse(document, unknown=options.validation, keep=keep)
    for warning in warnings:
        call.warn(warning)
    parsed: AnyResource = wanted
    return parsed


def check_admission(api: Api, call: Call, new: AnyResource, old: AnyResource | None) -> None:
    """Ask the plug-ins; their warnings go to the client. Raises `Invalid` and `Forbidden`."""
    causes, warnings = admit(api.admission, new, old)
    for warning in warnings:
        call.warn(warning)
    if causes:
        raise Invalid(f'{new.kind} "{new.name}"', causes)


def same_state(kind: Kind[Any], resource: AnyResource, document: Mapping[str, Any]) -> None:
    """Raise 409 when a document was made for another incarnation or another state of the object."""
    metadata = document["metadata"]
    for field, found in (("uid", resource.uid), ("resourceVersion", resource.metadata.resource_version)):
        said = metadata.get(field)
        if said and said != found:
            why = "the object has been modified" if field == "resourceVersion" else f"its uid is {found}"
            raise ResourceConflict(kind.plural, resource.name, why)


def adopt(resource: AnyResource, wanted: AnyResource) -> None:
    """Take over what the main resource may change; `writes.for_update` decides what that means."""
    resource.spec = wanted.spec
    meta, source = resource.metadata, wanted.metadata
    meta.labels, meta.annotations = source.labels, source.annotations
    meta.finalizers, meta.owner_references = source.finalizers, source.owner_references


def _keep_holds(stored: AnyResource, wanted: AnyResource) -> None:
    """What holds an object and whom it belongs to stay, when a document was not made from the object.

    A person's manifest knows nothing of finalizers: putting it must not let go what a controller has to clean up.
    Who read the object (its uid is in the document) and left them out, means it.
    """
    wanted.metadata.finalizers = list(dict.fromkeys([*stored.metadata.finalizers, *wanted.metadata.finalizers]))
    wanted.metadata.owner_references = wanted.metadata.owner_references or stored.metadata.owner_references


async def store_new(api: Api, kind: Kind[Any], wanted: AnyResource, options: WriteOptions) -> AnyResource:
    """Create an object; in a dry run only find out whether that would work."""
    client = api.client.bind(owner=options.field_manager, fence=None)
    if not options.dry_run:
        created: AnyResource = await client.create(wanted)
        return created
    new: AnyResource = writes.for_create(kind, wanted, uid=str(uuid.uuid4()), now=api.clock.now())
    if not new.name:
        new.metadata.name, new.metadata.generate_name = (
            f"{new.metadata.generate_name}{uuid.uuid4().hex[:GENERATED_LENGTH]}",
            None,
        )
    await client.check_owners(new)
    if await api.storage.exists(api.registry.key_of(new)):
        raise ResourceExists(kind.plural, new.name)
    return new


async def store_change(
    client: Client, kind: Kind[Any], current: AnyResource, mutate: Mutate, options: WriteOptions
) -> AnyResource | None:
    """Change an object; None when that removed it. In a dry run only what would come of it."""
    if not options.dry_run:
        return await client.update(current, mutate)
    wanted = current.thaw()
    mutate(wanted)
    decision = writes.for_update(kind, current, wanted)
    if isinstance(decision, writes.Put):
        await client.check_owners(decision.resource, current)
    return _outcome(decision, current)


async def _updated(edit: Edit, document_for: Callable[[AnyResource], dict[str, Any]]) -> web.Response:
    """Change an object to what a document says; the document is asked for anew whenever the object has changed."""
    kind = edit.target.kind
    current = await edit.current()
    last = current

    def mutate(resource: AnyResource) -> None:
        nonlocal last
        document = document_for(resource)
        same_state(kind, resource, document)
        wanted = parse(kind, document, edit.options, edit.call, over=resource)
        check_admission(edit.api, edit.call, wanted, resource)
        if not document["metadata"].get("uid"):
            _keep_holds(resource, wanted)
        adopt(resource, wanted)
        last = resource

    stored = await store_change(edit.client(), kind, current, mutate, edit.options)
    if stored is None:
        edit.note("deleted", last, current, None)
        return await answer_resource(edit.request, edit.accepted, kind, last)
    same = stored.metadata.resource_version == current.metadata.resource_version and not edit.options.dry_run
    edit.note("unchanged" if same else "configured", stored, current, stored)
    return await answer_resource(edit.request, edit.accepted, kind, stored)


async def _status_updated(edit: Edit, document_for: Callable[[AnyResource], dict[str, Any]]) -> web.Response:
    """Write the status; `fieldManager` must own each field that changes, unless an admin forces it."""
    kind, options = edit.target.kind, edit.options
    if options.force:
        edit.call.principal.require("force", edit.target.namespace, f"force the status of {kind.plural}")
    current = await edit.current()
    forced: list[str] = []

    def mutate(resource: AnyResource) -> None:
        document = document_for(resource)
        same_state(kind, resource, document)
        keep = frozenset(unknown_fields(resource.status, "status"))
        before, resource.status = resource.status, kind.parse_status(document, resource, keep=keep).status
        foreign = kind.foreign_changes(before, resource.status, options.field_manager)
        forced[:] = [f"status.{name} (owned by {owner or 'nobody'})" for name, owner in foreign]

    if options.dry_run:
        wanted = current.thaw()
        mutate(wanted)
        decision = writes.for_status(kind, current, wanted, owner=options.field_manager, force=options.force)
        stored = _outcome(decision, current) or current
    else:
        stored = await edit.client().update_status(current, mutate, force=options.force)
    if forced:
        edit.call.warn(f"forced for {options.field_manager or 'no field manager'}: {', '.join(forced)}")
    edit.note("status", stored, current, stored, f"forced {', '.join(forced)}" if forced else "")
    return await answer_resource(edit.request, edit.accepted, kind, stored)


async def _delete_body(request: web.Request, api: Api) -> dict[str, Any]:
    """DeleteOptions are optional, and clients send them with or without a content type."""
    body = await read_body(request, api.settings, api.clock)
    if not body.strip():
        return {}
    yaml = request.content_type.lower().endswith("yaml")
    documents = parse_documents(body, "application/yaml" if yaml else "application/json", 1)
    return as_object(documents[0]) if documents else {}


def _outcome(decision: writes.Decision[Any], current: AnyResource) -> AnyResource | None:
    match decision:
        case writes.Put(resource=new):
            resource: AnyResource = new
            return resource
        case writes.Unchanged():
            return current
        case writes.Remove():
            return None
