"""The endpoints about workers, below /api/v1/workers/region/{region}/workers:

    GET .                            the region's; `?phase=Ready` narrows it
    GET {worker}                     one, in the same flat form
    POST {worker}/start|stop|drain   have it serve; drain it of its labs, and have its instance stop, or run on
    POST {worker}/license            have its CML licensed
    POST {worker}/refresh            ask EC2, CloudWatch and CML about it now

The worker is a name or an EC2 instance id, in `?namespace=` (default). These are faces of the LabWorker, with its rules
and rights: an action is an order that the leader carries out (`orders`), waited for `?wait=` seconds (20); then 202
names the resource that tells. Those about its labs are in `controllers.labs.routes`.
"""

from __future__ import annotations

from aiohttp import web

from controllers.orders import Order, answer, note, seen, told, wait_of
from controllers.workers.addressed import OF_REGION, WORKER, worker_of
from controllers.workers.flat import flat_of
from controllers.workers.kind import LAB_WORKER, LabWorker
from controllers.workers.orders import Wished, WorkerOrders
from controllers.workers.phases import Phase
from lrm.api.call import API, Api, call_of
from lrm.api.codec import negotiate, respond
from lrm.api.lists import read_list
from lrm.api.requests import Target, check_namespace, list_query, only_parameters
from lrm.api.status import bad_request

_WISHES: dict[str, Wished] = {"start": "Ready", "stop": "Stopped", "drain": "Draining"}


def add_workers_routes(app: web.Application, api: Api) -> None:
    """See the module."""
    del api
    app.add_routes(
        [
            web.get(OF_REGION, list_workers),
            web.get(WORKER, read_worker),
            web.post(f"{WORKER}/{{action:start|stop|drain|license|refresh}}", act),
        ]
    )


async def list_workers(request: web.Request) -> web.Response:
    """GET of a region's workers, from the cache; those that cannot be decoded, of whatever region, are warned of."""
    api, call, region = request.app[API], call_of(request), request.match_info["region"]
    namespace = request.query.get("namespace", "")
    if namespace:
        check_namespace(namespace)
    target = Target(LAB_WORKER, namespace, "")
    call.about = target.about
    call.principal.require("read", namespace, f"list {LAB_WORKER.plural}")
    accepted, query, phase = negotiate(request), list_query(request, LAB_WORKER), _phase(request)
    listing = await read_list(api, target, query)
    workers = [item.resource for item in listing.items if isinstance(item.resource, LabWorker)]
    of_region = [w for w in workers if w.spec.region == region]
    for key in listing.left_out:
        call.warn(f"left out: {key} cannot be decoded")
    if not of_region:
        call.warn(f"there is no such worker in the region {region[:80]!r}")
    return await respond(accepted, [flat_of(w) for w in of_region if not phase or w.status.phase.lower() == phase])


async def read_worker(request: web.Request) -> web.Response:
    """GET of one worker, from the cache."""
    worker = await worker_of(request, "read", "read")
    return await respond(negotiate(request), flat_of(worker))


async def act(request: web.Request) -> web.Response:
    """POST: an action on a worker; the worker as it then is, with the outcome."""
    action = request.match_info["action"]
    worker = await worker_of(request, "write", action)
    accepted, seconds, api = negotiate(request), wait_of(request), request.app[API]
    order = await _give(WorkerOrders(api), action, worker, call_of(request).request_id)
    note(request, order, action)
    outcome = await seen(api, LAB_WORKER.plural, order.look, seconds)
    now = api.cache.get(LabWorker, worker.namespace, worker.name) or worker
    return await answer(request, accepted, order, outcome, {**flat_of(now), "action": action, **told(order, outcome)})


async def _give(orders: WorkerOrders, action: str, worker: LabWorker, order_id: str) -> Order:
    if action in _WISHES:
        return await orders.wish(worker, _WISHES[action], order_id)
    if action == "license":
        return await orders.license(worker, order_id)
    return await orders.refresh(worker, order_id)


def _phase(request: web.Request) -> str:
    """The phase that is asked for, in small letters. Raises 400 for what can match nothing."""
    only_parameters(request, "namespace", "phase", "labelSelector", "fieldSelector", "resourceVersion")
    phase = request.query.get("phase", "").lower()
    if phase and phase not in {known.lower() for known in Phase}:
        raise bad_request(f"{request.query['phase'][:40]!r} is no phase; there are {', '.join(Phase)}")
    return phase
