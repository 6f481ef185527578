"""Orders: intents that an endpoint writes into a resource, and what is answered of them.

Promises: an outcome is told only from a cache that holds the order (`since`); nobody waits longer than they said; what
failed is answered as a Status of 409, what is under way or waits for something as 202 with the resource that tells, in
`Location` too. Called by the endpoints of workers and of labs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from controllers.labs.kind import SUCCEEDED, WAITING
from lrm.api.audit import Touched
from lrm.api.call import API, Api, Request, Response, call_of
from lrm.api.codec import respond
from lrm.api.status import RequestError, bad_request
from lrm.resource import AnyResource

LONGEST_WAIT = 20.0
"""Seconds; proxies give up after thirty."""
ACCEPTED = "Accepted"
"""The result of an order while there is no outcome."""
_GATHER = 0.02
"""Seconds between two looks: many labs change at once."""
_CODES = {SUCCEEDED: 200, WAITING: 202, ACCEPTED: 202}
_SECONDS = re.compile(r"[0-9]{1,2}(\.[0-9]{1,3})?")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an order ended, or what it waits for."""

    result: str
    """Succeeded, Failed, Superseded or Waiting."""
    message: str


@dataclass(frozen=True, slots=True)
class Order:
    """An intent that was written: `resource` tells what becomes of it."""

    resource: AnyResource
    before: AnyResource | None
    look: Callable[[], Outcome | None]
    """What the cache shows of it; None while nothing is to be told."""
    so_far: Callable[[], str] = str
    """What its resource tells while there is no outcome: why it takes so long; empty where it tells nothing."""


def since(api: Api, revision: int, look: Callable[[], Outcome | None]) -> Callable[[], Outcome | None]:
    """The same look, once the cache holds what was written at a revision."""
    return lambda: look() if api.cache.revision >= revision else None


async def seen(api: Api, plural: str, look: Callable[[], T | None], seconds: float) -> T | None:
    """What `look` finds in the cache as soon as it finds something, None after so long."""
    try:
        async with api.clock.timeout(seconds):
            while True:
                news = api.fanout.news(plural)
                found = look()
                if found is not None or api.fanout.stopped:
                    return found
                await news.wait()
                await api.clock.sleep(_GATHER)
    except TimeoutError:
        return look()


def wait_of(request: Request) -> float:
    """Seconds to wait for an outcome. Raises 400."""
    text = request.query.get("wait", "")
    if not text:
        return LONGEST_WAIT
    if not _SECONDS.fullmatch(text) or float(text) > LONGEST_WAIT:
        raise bad_request(f"wait must be seconds from 0 to {LONGEST_WAIT:g}, not {text[:40]!r}")
    return float(text)


def told(order: Order, outcome: Outcome | None) -> dict[str, str]:
    """Result and message."""
    if outcome is None:
        so_far = order.so_far()
        return {"result": ACCEPTED, "message": f"it is under way: {so_far}" if so_far else "it is under way"}
    return {"result": outcome.result, "message": outcome.message}


def code_of(outcome: Outcome | None) -> int:
    """The HTTP status of an outcome."""
    return _CODES.get(outcome.result, 409) if outcome is not None else 202


async def answer(
    request: Request,
    accepted: Any,
    order: Order,
    outcome: Outcome | None,
    document: dict[str, Any],
    *,
    done: int = 200,
) -> Response:
    """The outcome; what failed is a Status, what is under way names the resource that tells."""
    code = code_of(outcome)
    if code == 409 and outcome is not None:
        raise RequestError(409, "Conflict", outcome.message)
    if code == 200:
        return await respond(accepted, document, status=done)
    place = path_of(request.app[API], order.resource)
    return await respond(accepted, {**document, "resource": place}, status=code, headers={"Location": place})


def note(request: Request, order: Order, what: str) -> None:
    """For the record."""
    resource, before = order.resource, order.before
    plural = request.app[API].registry.of_object(resource).plural
    versions = (before.metadata.resource_version if before is not None else "", resource.metadata.resource_version)
    if before is None:
        result = "created"
    elif what == "delete":
        result = "deleting"
    else:
        result = "configured" if versions[0] != versions[1] else "unchanged"
    call_of(request).touched.append(Touched(plural, resource.namespace, resource.name, result, *versions, what))


def path_of(api: Api, resource: Any) -> str:
    """Where the resource is served."""
    kind = api.registry.of_object(resource)
    return f"/apis/{kind.api_version}/namespaces/{resource.namespace}/{kind.plural}/{resource.name}"
