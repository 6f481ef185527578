"""`/api/lab-instances/`: lab instances with a flat body and a flat answer, as course tools post them.

A thin face over LabInstanceRequests: the same rights, rules, admission, audit and errors, the same dry runs and
preconditions. Fields are in snake_case, phases in capitals; a parameter that would be ignored is refused. What it
cannot say (resources, tracks, pools), the resource can.
"""

from __future__ import annotations

from aiohttp import web

from controllers.instances.flat import PHASES, document_of, flat_of, flat_path, flat_text
from controllers.instances.kind import EXAMPLE_ADDRESS, LAB_INSTANCE_REQUEST, LabInstanceRequest, is_address
from lrm.api.call import API, Api, call_of
from lrm.api.codec import negotiate, read_object, respond
from lrm.api.edits import Edit, check_admission, delete_target, edit_of_target, parse, store_new
from lrm.api.lists import read_list, read_one
from lrm.api.requests import Target, check_namespace, list_query, only_parameters, write_options
from lrm.api.status import RequestError, bad_request
from lrm.errors import Cause, Invalid
from lrm.fanout import Selector
from lrm.resource import AnyResource

PATH = "/api/lab-instances"
RESOURCES = f"/apis/{LAB_INSTANCE_REQUEST.api_version}/namespaces/{{namespace}}/{LAB_INSTANCE_REQUEST.plural}"

_FILTERS = ("phase", "student_email")


def add_instance_routes(app: web.Application, _api: Api) -> None:
    """Everything under `/api/lab-instances`."""
    for root in (PATH, f"{PATH}/"):
        app.router.add_post(root, _create)
        app.router.add_get(root, _list)
    app.router.add_get(f"{PATH}/{{name}}", _read)
    app.router.add_delete(f"{PATH}/{{name}}", _delete)


async def _create(request: web.Request) -> web.Response:
    """POST: a new lab instance. 201 with it; 422 with every wrong field under its flat name."""
    api, call = request.app[API], call_of(request)
    only_parameters(request, "namespace", "dryRun", "fieldManager")
    accepted, options = negotiate(request), write_options(request)
    body = await read_object(request, api.settings, api.clock)
    asked = request.query.get("namespace")
    namespace = body.get("namespace", asked if asked is not None else "default")
    if not isinstance(namespace, str):
        raise Invalid("lab instance", [Cause("namespace", "FieldValueInvalid", "must be a text")])
    if asked not in (None, namespace):
        raise bad_request(f"namespace in the body ({namespace[:80]}) does not match the query ({asked[:80]})")
    check_namespace(namespace)
    kind = LAB_INSTANCE_REQUEST
    call.principal.require("write", namespace, f"create {kind.plural}")
    target = Target(kind, namespace, str(body.get("name", ""))[:80])
    call.about = target.about
    try:
        wanted = parse(kind, document_of(body, namespace), options, call)
        check_admission(api, call, wanted, None)
        created = await store_new(api, kind, wanted, options)
    except Invalid as error:
        flat = [Cause(flat_path(c.field, body), c.reason, flat_text(c.message, body)) for c in error.causes]
        raise Invalid(f'lab instance "{target.name}"', flat) from error
    finally:
        call.warnings = [flat_text(warning, body) for warning in call.warnings]
    Edit(request, accepted, target, options).note("created", created, None, created)
    return await respond(accepted, flat_of(_own(created)), status=201)


async def _list(request: web.Request) -> web.Response:
    """GET: all of a namespace, or of all; `?phase=RUNNING&student_email=…` narrow it."""
    api, namespace = request.app[API], request.query.get("namespace", "")
    if namespace:
        check_namespace(namespace)
    target = Target(LAB_INSTANCE_REQUEST, namespace, "")
    call = call_of(request)
    call.about = target.about
    call.principal.require("read", namespace, f"list {target.kind.plural}")
    accepted, query, wanted = negotiate(request), list_query(request, target.kind), _filter(request)
    listing = await read_list(api, target, query)
    found = [_own(item.resource) for item in listing.items if item.resource is not None and wanted(item.resource)]
    for key in listing.left_out:
        call.warn(f"left out: {key} cannot be decoded")
    return await respond(accepted, [flat_of(r) for r in found])


async def _read(request: web.Request) -> web.Response:
    """GET of one."""
    target = target_of(request)
    only_parameters(request, "namespace")
    call_of(request).principal.require("read", target.namespace, f"read {target.kind.plural}")
    accepted = negotiate(request)
    item = await read_one(request.app[API], target, "")
    if item.resource is None:
        raise RequestError(500, "InternalError", item.error)
    return await respond(accepted, flat_of(_own(item.resource)))


async def _delete(request: web.Request) -> web.Response:
    """DELETE: 202 while it is being cleaned up, 200 when it is gone at once; the answer is its last state.

    A body is DeleteOptions, as for the resource.
    """
    target = target_of(request)
    only_parameters(request, "namespace", "dryRun", "propagationPolicy")
    edit = edit_of_target(request, target, "write", "delete")
    current, left = await delete_target(edit)
    return await respond(edit.accepted, flat_of(_own(left or current)), status=202 if left else 200)


def _filter(request: web.Request) -> Selector:
    """Raises 400 for what can match nothing, so that nobody takes a slip for an empty list."""
    only_parameters(request, "namespace", *_FILTERS, "labelSelector", "fieldSelector", "resourceVersion")
    phase = request.query.get("phase", "").lower()
    student = request.query.get("student_email", "").lower()
    if phase and phase.upper() not in PHASES:
        raise bad_request(f"{request.query['phase'][:40]!r} is no phase; there are {', '.join(PHASES)}")
    if student and not is_address(student):
        raise bad_request(f"{student[:80]!r} is no e-mail address: one looks like {EXAMPLE_ADDRESS}")

    def wanted(resource: AnyResource) -> bool:
        found = _own(resource)
        return (not phase or found.status.phase.lower() == phase) and (
            not student or found.spec.student_email.lower() == student
        )

    return wanted


def target_of(request: web.Request) -> Target:
    """The lab instance of the path, which is what the call is about. Raises 400."""
    namespace = request.match_info.get("namespace") or request.query.get("namespace", "default")
    check_namespace(namespace)
    target = Target(LAB_INSTANCE_REQUEST, namespace, request.match_info["name"])
    call_of(request).about = target.about
    return target


def _own(resource: AnyResource) -> LabInstanceRequest:
    if not isinstance(resource, LabInstanceRequest):
        raise TypeError(f"{resource.kind} is no lab instance")
    return resource
