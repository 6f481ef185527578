"""The worker that a request's path names, below /api/v1/workers/region/{region}/workers/{worker}.

It is a name or the id of an EC2 instance, in `?namespace=` (default). Called by the endpoints of workers and of labs.
"""

from __future__ import annotations

from aiohttp import web

from controllers.workers.kind import LAB_WORKER, LabWorker
from lrm.api.auth import Verb
from lrm.api.call import API, call_of
from lrm.api.lists import catch_up
from lrm.api.requests import check_namespace
from lrm.api.status import About, RequestError, bad_request
from lrm.errors import ResourceNotFound, Undecodable

WORKERS = "/api/v1/workers"
OF_REGION = f"{WORKERS}/region/{{region}}/workers"
WORKER = f"{OF_REGION}/{{worker}}"


async def worker_of(request: web.Request, verb: Verb, what: str) -> LabWorker:
    """The worker of the path, once its caller may do that and the cache holds all that was written before.

    A read with resourceVersion=0 takes it as it is. Raises 400, 403, `ResourceNotFound`, `Undecodable`, `CacheBehind`.
    """
    if "dryRun" in request.query:
        raise no_rehearsal()
    api, call, info = request.app[API], call_of(request), request.match_info
    namespace, name = request.query.get("namespace") or "default", info["worker"]
    check_namespace(namespace)
    call.about = About(LAB_WORKER.group, LAB_WORKER.plural, name[:80], namespace)
    call.principal.require(verb, namespace, f"{what} labworkers")
    if verb == "read":
        await catch_up(api, 0 if request.query.get("resourceVersion") == "0" else None)
    else:
        await api.cache.barrier(api.settings.barrier_seconds)
    item = api.cache.item(LAB_WORKER, namespace, name)
    if item is not None and item.resource is None:
        raise Undecodable(item.entry.key, item.error)
    worker = api.cache.get(LabWorker, namespace, name)
    if worker is None:
        found = (w for w in api.cache.all(LabWorker, namespace) if w.status.ec2.instance_id == name)
        worker = next(found, None)
    if worker is None or worker.spec.region != info["region"]:
        raise ResourceNotFound(LAB_WORKER.plural, name[:80])
    return worker


def no_rehearsal() -> RequestError:
    """400, for who asks such an endpoint to change nothing."""
    return bad_request("dryRun is not for these endpoints: change the resources themselves to rehearse")
