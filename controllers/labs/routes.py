"""The endpoints about the labs of one worker, below /api/v1/workers/region/{region}/workers/{worker}:

    GET labs               as they were at the last sync, whether CML answers or not
    POST labs/refresh      sync them now
    POST labs/import       make a lab of the topology in the body; ?title= wins over its own
    POST labs/bulk         {action: start|stop|wipe|delete, labs: [id, …]}, 500 at most, or labs: all to start or stop
    POST labs/{lab}/start|stop|wipe, DELETE labs/{lab}, GET labs/{lab}/download (from CML itself)
    POST /api/v1/workers/labs/refresh, POST /api/v1/workers/region/{region}/labs/refresh: of many workers

The worker is a name or an EC2 instance id, in `?namespace=` (default; of many: all that the caller may write in). What
changes something is an order that the leader carries out (`orders`), waited for `?wait=` seconds (20), of many workers
not at all; then 202 names the resource that tells.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import structlog
from aiohttp import web

from controllers.cml.errors import (
    CmlCircuitOpen,
    CmlError,
    CmlForbidden,
    CmlNotFound,
    CmlTimeout,
    CmlUnavailable,
)
from controllers.cml.models import is_lab_id
from controllers.cml.sessions import CmlSessions
from controllers.instances.topology import Topology, TopologyError, check
from controllers.labs.bulk import bulk_order
from controllers.labs.flat import flat
from controllers.labs.homes import Away, Gone, home_of
from controllers.labs.imports_kind import CONTROL, TITLE_MOST, TOPOLOGY_BYTES, LabImport
from controllers.labs.kind import (
    FAILED,
    LAB_RECORD,
    SUCCEEDED,
    LabRecord,
    printable,
    record_name,
    record_of_lab,
    records_of_worker,
)
from controllers.labs.kind import Verb as LabVerb
from controllers.labs.orders import Orders, awaited
from controllers.orders import Order, answer, code_of, note, seen, told, wait_of
from controllers.workers.addressed import WORKER, WORKERS, only_taken, worker_of
from controllers.workers.kind import LAB_WORKER, LabWorker
from lrm.api.call import API, Api, call_of
from lrm.api.codec import negotiate, read_body, read_object, respond
from lrm.api.requests import check_namespace
from lrm.api.status import About, RequestError, answer_of
from lrm.cache import Item
from lrm.errors import Cause, LrmError, ResourceNotFound, Undecodable
from lrm.model import rfc3339
from storage.errors import OutcomeUnknown, StorageError, Unavailable

log = structlog.get_logger(__name__)

T = TypeVar("T")

_AT_ONCE = 8
_VERBS: Mapping[str, LabVerb] = {"start": "Start", "stop": "Stop", "wipe": "Wipe"}
_PROSE = ("description", "notes")
_LINES = dict.fromkeys(map(ord, "\t\n\r"))


def add_labs_routes(app: web.Application, api: Api) -> None:
    """See the module."""
    del api
    labs = f"{WORKER}/labs"
    app.add_routes(
        [
            web.get(labs, list_labs),
            web.post(f"{WORKERS}/labs/refresh", refresh_all),
            web.post(f"{WORKERS}/region/{{region}}/labs/refresh", refresh_all),
            web.post(f"{labs}/refresh", refresh),
            web.post(f"{labs}/import", import_lab),
            web.post(f"{labs}/bulk", bulk),
            web.post(f"{labs}/{{lab}}/{{action:start|stop|wipe}}", operate),
            web.delete(f"{labs}/{{lab}}", delete),
            web.get(f"{labs}/{{lab}}/download", download),
        ]
    )


async def list_labs(request: web.Request) -> web.Response:
    """GET of all labs, from the cache; `Age` is the seconds since CML was asked."""
    worker = await worker_of(request, "read", "list the labs of")
    accepted, api, call = negotiate(request), request.app[API], call_of(request)
    synced = worker.status.labs_synced_at
    records = records_of_worker(api.cache, worker.namespace, worker.name)
    labs = [flat(record, synced) for record in records]
    headers = {}
    if synced is not None:
        headers["Age"] = str(max(0, round((api.clock.now() - synced).total_seconds())))
    else:
        call.warn("the labs of this worker were never synced")
    if any(_is_of(item, worker) for item in api.cache.opaque()):
        call.warn("labs whose records this version cannot decode are left out")
    if worker.status.labs_sync_error:
        call.warn(f"the last sync failed: {worker.status.labs_sync_error}")
    return await respond(accepted, labs, headers=headers)


async def refresh(request: web.Request) -> web.Response:
    """POST: sync the worker's labs now; the counts of the sync that came of it."""
    worker = await worker_of(request, "write", "refresh the labs of")
    accepted, seconds, api = negotiate(request), wait_of(request), request.app[API]
    orders = Orders(api)
    order = await orders.refresh(worker, call_of(request).request_id)
    note(request, order, "refresh")
    outcome = await seen(api, LAB_WORKER.plural, order.look, seconds)
    now = api.cache.get(LabWorker, worker.namespace, worker.name)
    document: dict[str, Any] = {"worker": worker.name, **told(order, outcome)}
    if outcome is not None and outcome.result == SUCCEEDED and now is not None:
        counts = now.status.labs_last_sync
        synced = now.status.labs_synced_at
        document |= counts.wire() if counts is not None else {}
        document["last_synced"] = rfc3339(synced) if synced is not None else None
    return await answer(request, accepted, order, outcome, document)


async def refresh_all(request: web.Request) -> web.Response:
    """POST: sync the labs of all workers, or of a region's; not waited for, with a result for each.

    202, or 207 when one was not taken. So many are asked for at once as the controller has hands: the others queue.
    Repeated at once it writes nothing; on record is what was written.
    """
    region = request.match_info.get("region")
    items = await _workers(request, region)
    accepted, call, orders = negotiate(request), call_of(request), Orders(request.app[API])
    results: dict[tuple[str, str], dict[str, Any]] = {}

    async def give(item: Item) -> None:
        if not isinstance(item.resource, LabWorker):
            raise Undecodable(item.entry.key, item.error)
        order = await orders.refresh(item.resource, call.request_id, among_many=True)
        if order.resource.revision != item.resource.revision:
            note(request, order, "refresh")
        tell(item, told(order, order.look() or awaited(item.resource)))

    def fail(item: Item, error: Exception) -> None:
        tell(item, {"result": FAILED, "message": answer_of(error, call.request_id, writing=True).message})

    def tell(item: Item, result: Mapping[str, str]) -> None:
        results[item.namespace, item.name] = {"worker": item.name, "namespace": item.namespace, **result}

    await _each(items, give, fail)
    if not items:
        call.warn(f"there is no worker {f'in the region {region[:80]!r}' if region else 'to refresh'}")
    failed = any(result["result"] == FAILED for result in results.values())
    document = {"action": "refresh", "results": [results[place] for place in sorted(results)]}
    return await respond(accepted, document, status=207 if failed else 202)


async def operate(request: web.Request) -> web.Response:
    """POST: start, stop or wipe a lab."""
    action = request.match_info["action"]
    worker = await worker_of(request, "write", f"{action} labs of")
    accepted, seconds, orders = negotiate(request), wait_of(request), Orders(request.app[API])
    record = _record(request, worker, request.match_info["lab"])
    order = await orders.operate(record, _VERBS[action], call_of(request).request_id)
    note(request, order, action)
    outcome = await seen(request.app[API], LAB_RECORD.plural, order.look, seconds)
    document = {"lab_id": record.spec.lab_id, "action": action, **told(order, outcome)}
    return await answer(request, accepted, order, outcome, document)


async def delete(request: web.Request) -> web.Response:
    """DELETE: stop, wipe and delete a lab; its record goes with it."""
    worker = await worker_of(request, "write", "delete labs of")
    accepted, seconds, orders = negotiate(request), wait_of(request), Orders(request.app[API])
    record = _record(request, worker, request.match_info["lab"])
    order = await orders.delete(record)
    note(request, order, "delete")
    outcome = await seen(request.app[API], LAB_RECORD.plural, order.look, seconds)
    document = {"lab_id": record.spec.lab_id, "action": "delete", **told(order, outcome)}
    return await answer(request, accepted, order, outcome, document)


async def bulk(request: web.Request) -> web.Response:
    """POST: one action on many labs, with a result for each: 200 all done, 202 some under way, 207 some failed."""
    worker = await worker_of(request, "write", "change labs of")
    accepted, seconds, api = negotiate(request), wait_of(request), request.app[API]
    order = bulk_order(await read_object(request, api.settings, api.clock))
    records = records_of_worker(api.cache, worker.namespace, worker.name)
    action, ids = order.action, [r.spec.lab_id for r in records] if order.labs == "all" else order.labs
    orders, order_id = Orders(api), call_of(request).request_id
    given: dict[str, Order | Exception] = {}

    async def give(lab_id: str) -> None:
        record = _record(request, worker, lab_id)
        if action == "delete":
            order = await orders.delete(record)
        else:
            order = await orders.operate(record, _VERBS[action], order_id)
        given[lab_id] = order
        note(request, order, action)

    await _each(ids, give, given.__setitem__)
    waiting = [order for order in given.values() if isinstance(order, Order)]
    await seen(api, LAB_RECORD.plural, lambda: all(o.look() is not None for o in waiting) or None, seconds)
    results = [_bulk_result(lab_id, given[lab_id], order_id) for lab_id in ids]
    codes = {result.pop("code") for result in results}
    status = 207 if codes - {200, 202} else max(codes, default=200)
    return await respond(accepted, {"action": action, "results": results}, status=status)


async def import_lab(request: web.Request) -> web.Response:
    """POST: make a lab of a topology, YAML or JSON, at most 512 KiB; `?name=` names the LabImport.

    Who gives a name may ask again after a lost answer: 409 says that the order was taken.
    """
    worker = await worker_of(request, "write", "import labs to", "title", "name")
    accepted, seconds, api = negotiate(request), wait_of(request), request.app[API]
    limit = min(TOPOLOGY_BYTES, api.settings.max_body_bytes)
    body = await read_body(request, api.settings.model_copy(update={"max_body_bytes": limit}), api.clock)
    try:
        text = body.decode()
        inside = await asyncio.to_thread(check, text)
    except (TopologyError, UnicodeDecodeError) as error:
        raise _unprocessable("topology", f"it is no topology: {error}") from error
    title = request.query.get("title") or inside.title
    for field, said in (("title", title), *((f"topology.lab.{name}", _prose(inside, name)) for name in _PROSE)):
        if CONTROL.search(said):
            raise _unprocessable(field, "must not hold control characters")
    if not 1 <= len(title) <= TITLE_MOST:
        raise _unprocessable("title", f"a lab needs a title of 1 to {TITLE_MOST} characters: ?title= or lab.title")
    orders = Orders(api)
    order = await orders.import_lab(worker, title, text, name=request.query.get("name", ""))
    note(request, order, "import")
    outcome = await seen(api, "labimports", order.look, seconds)
    made = api.cache.get(LabImport, order.resource.namespace, order.resource.name)
    document = {
        "lab_id": made.status.lab_id if made is not None else None,
        "title": title,
        "warnings": made.status.warnings if made is not None else [],
        "import": order.resource.name,
        **told(order, outcome),
    }
    return await answer(request, accepted, order, outcome, document, done=201)


async def download(request: web.Request) -> web.Response:
    """GET of a lab's topology, read from CML here and now."""
    worker = await worker_of(request, "read", "download labs of")
    record = _record(request, worker, request.match_info["lab"])
    home = home_of(record, request.app[API].cache)
    if isinstance(home, Gone):
        raise RequestError(404, "NotFound", f"the lab's CML is gone: {home.message}")
    if isinstance(home, Away):
        raise RequestError(503, "ServiceUnavailable", f"CML cannot be asked: {home.message}", retry_after=30)
    try:
        text = await request.app[API].offers.get(CmlSessions).client_for(home.worker).download(record.spec.lab_id)
    except CmlError as error:
        raise _from_cml(error) from error
    headers = {"Content-Disposition": f'attachment; filename="{record.spec.lab_id}.yaml"'}
    return web.Response(body=text.encode(), headers=headers, content_type="application/yaml", charset="utf-8")


async def _workers(request: web.Request, region: str | None) -> list[Item]:
    """The workers of a region, or of all, in the namespace that is asked for or wherever the caller may write.

    Of one that cannot be decoded nobody knows the region: it is among them. Raises 400, 403, `CacheBehind`.
    """
    api, call, asked = request.app[API], call_of(request), request.query.get("namespace", "")
    call.about = About(LAB_WORKER.group, LAB_WORKER.plural, "", asked)
    only_taken(request, "namespace")
    if asked:
        check_namespace(asked)
    if asked or not call.principal.may_somewhere("write"):
        call.principal.require("write", asked, "refresh the labs of labworkers")
    await api.cache.barrier(api.settings.barrier_seconds)
    found = [i for i in api.cache.items(LAB_WORKER, asked) if call.principal.may("write", i.namespace)]
    return [
        i for i in found if region is None or not isinstance(i.resource, LabWorker) or i.resource.spec.region == region
    ]


def _record(request: web.Request, worker: LabWorker, lab_id: str) -> LabRecord:
    """The record of a lab. Raises `ResourceNotFound`."""
    record = None
    if is_lab_id(lab_id):
        name = record_name(worker.name, lab_id)
        if "lab" in request.match_info:
            call_of(request).about = About(LAB_RECORD.group, LAB_RECORD.plural, name, worker.namespace)
        record = record_of_lab(request.app[API].cache, worker.namespace, worker.name, lab_id)
    if record is None:
        log.warning(
            "labs.record_not_found", worker=worker.name, lab=printable(lab_id[:80]), advice="refresh the worker's labs"
        )
        raise ResourceNotFound(LAB_RECORD.plural, f"{worker.name}-{lab_id[:80]}")
    return record


def _is_of(item: Item, worker: LabWorker) -> bool:
    """Whether an item is a record of a lab of this worker, by its name alone."""
    lab_id = item.name.removeprefix(f"{worker.name}-")
    return item.kind is LAB_RECORD and item.namespace == worker.namespace and is_lab_id(lab_id)


def _prose(topology: Topology, name: str) -> str:
    """What a topology says of its lab for people, without the control characters that lines of text are made of."""
    said = topology.document["lab"].get(name)
    return said.translate(_LINES) if isinstance(said, str) else ""


def _bulk_result(lab_id: str, given: Order | Exception, request_id: str) -> dict[str, Any]:
    if isinstance(given, Order):
        outcome = given.look()
        return {"lab_id": lab_id, **told(given, outcome), "code": code_of(outcome)}
    answer = answer_of(given, request_id, writing=True)
    return {"lab_id": lab_id, "result": FAILED, "message": answer.message, "code": answer.code}


async def _each(items: Sequence[T], do: Callable[[T], Awaitable[None]], fail: Callable[[T, Exception], None]) -> None:
    """Do it to each, some at a time. Once the store is away the rest fail unasked: each would wait for a deadline."""
    left = iter(items)
    away: StorageError | None = None

    async def some() -> None:
        nonlocal away
        for item in left:
            if away is not None:
                fail(item, Unavailable(f"not asked, since the store was away: {away}"))
                continue
            try:
                await do(item)
            except (LrmError, StorageError) as error:
                fail(item, error)
                if isinstance(error, Unavailable | OutcomeUnknown):
                    away = error

    async with asyncio.TaskGroup() as tasks:
        for _ in range(min(_AT_ONCE, len(items))):
            tasks.create_task(some())


def _unprocessable(field: str, message: str) -> RequestError:
    return RequestError(422, "Invalid", f"{field}: {message}", causes=[Cause(field, "FieldValueInvalid", message)])


def _from_cml(error: CmlError) -> RequestError:
    """CML's failure as an answer to a read."""
    if isinstance(error, CmlNotFound):
        return RequestError(404, "NotFound", str(error))
    if isinstance(error, CmlForbidden):
        return RequestError(403, "Forbidden", str(error))
    if isinstance(error, CmlTimeout):
        return RequestError(504, "Timeout", str(error))
    if isinstance(error, CmlUnavailable):
        wait = error.retry_after if isinstance(error, CmlCircuitOpen) else 5
        return RequestError(503, "ServiceUnavailable", str(error), retry_after=max(1, round(wait)))
    return RequestError(502, "BadGateway", str(error))
