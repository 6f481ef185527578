"""The worker that a request's path names, below /api/v1/workers/region/{region}/workers/{worker}.

It is a name or the id of an EC2 instance, in `?namespace=` (default). Called by the endpoints of workers and of labs.
"""

from __future__ import annotations

from controllers.workers.kind import LAB_WORKER, LabWorker
from lrm.api.auth import Verb
from lrm.api.call import API, Request, call_of
from lrm.api.lists import catch_up
from lrm.api.requests import check_namespace, only_parameters
from lrm.api.status import About, bad_request
from lrm.errors import ResourceNotFound, Undecodable

WORKERS = "/api/v1/workers"
OF_REGION = f"{WORKERS}/region/{{region}}/workers"
WORKER = f"{OF_REGION}/{{worker}}"


async def worker_of(request: Request, verb: Verb, what: str, *parameters: str) -> LabWorker:
    """The worker of the path, once its caller may do that and the cache holds all that was written before.

    A read with resourceVersion=0 takes it as it is. `parameters` are what else the endpoint takes in its query, beside
    `namespace` and, of a write, `wait`. Raises 400, 403, `ResourceNotFound`, `Undecodable`, `CacheBehind`.
    """
    api, call, info = request.app[API], call_of(request), request.match_info
    namespace, name = request.query.get("namespace") or "default", info["worker"]
    check_namespace(namespace)
    call.about = About(LAB_WORKER.group, LAB_WORKER.plural, name[:80], namespace)
    only_taken(request, "namespace", "resourceVersion" if verb == "read" else "wait", *parameters)
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


def only_taken(request: Request, *parameters: str) -> None:
    """Raise 400 for a parameter that would be ignored; for who asks to change nothing, with what else to do."""
    if "dryRun" in request.query:
        raise bad_request("dryRun is not for these endpoints: change the resources themselves to rehearse")
    only_parameters(request, *parameters)
