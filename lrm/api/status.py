"""Every error as a Kubernetes `Status`: one table from exception class to HTTP code, reason and advice.

503 with Retry-After is only for what was certainly not written, since clients repeat any verb on it. An unknown
outcome is 504 without Retry-After. What the table does not name is a 500 whose text names the request, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from lrm.errors import (
    CacheBehind,
    Cause,
    Forbidden,
    HistoryGone,
    Invalid,
    LrmError,
    NotLeading,
    NotOpen,
    ResourceConflict,
    ResourceExists,
    ResourceNotFound,
    Undecodable,
)
from storage import errors as store


class RequestError(LrmError):
    """A request that is answered with an error of its own; nothing was written unless the message says so."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        *,
        causes: Sequence[Cause] = (),
        retry_after: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.causes = tuple(causes)
        self.retry_after = retry_after
        self.headers = headers or {}


def bad_request(message: str, causes: Sequence[Cause] = ()) -> RequestError:
    """400: the request itself makes no sense."""
    return RequestError(400, "BadRequest", message, causes=causes)


def not_found(message: str = "the server could not find the requested resource") -> RequestError:
    """404 for a path, not for an object."""
    return RequestError(404, "NotFound", message)


def unsupported_media(message: str) -> RequestError:
    """415: a body in a language that is not spoken here."""
    return RequestError(415, "UnsupportedMediaType", message)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the client is told about an error."""

    code: int
    reason: str
    message: str
    causes: tuple[Cause, ...] = ()
    retry_after: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class About:
    """The object of a request, for `details`."""

    group: str = ""
    plural: str = ""
    name: str = ""
    namespace: str = ""


@dataclass(frozen=True, slots=True)
class _Rule:
    code: int
    reason: str
    retry_after: int | None = None
    message: str = ""
    """Said instead of the error's own words; `{error}` stands for those."""


_UNKNOWN = "the write may have been made: read the object to see ({error})"

_RULES: tuple[tuple[type[Exception], _Rule], ...] = (
    (Invalid, _Rule(422, "Invalid")),
    (Forbidden, _Rule(403, "Forbidden")),
    (ResourceNotFound, _Rule(404, "NotFound")),
    (ResourceExists, _Rule(409, "AlreadyExists")),
    (ResourceConflict, _Rule(409, "Conflict")),
    (Undecodable, _Rule(500, "InternalError")),
    (NotLeading, _Rule(503, "ServiceUnavailable", 2)),
    (NotOpen, _Rule(503, "ServiceUnavailable", 2)),
    (CacheBehind, _Rule(504, "Timeout", 2)),
    (HistoryGone, _Rule(410, "Expired")),
    (store.NotFound, _Rule(404, "NotFound")),
    (store.AlreadyExists, _Rule(409, "AlreadyExists")),
    (store.Conflict, _Rule(409, "Conflict")),
    (store.GuardFailed, _Rule(409, "Conflict")),
    (store.Compacted, _Rule(410, "Expired", message="the requested version is no longer kept: {error}")),
    (store.FutureRevision, _Rule(410, "Expired")),
    (store.TooLarge, _Rule(413, "RequestEntityTooLarge")),
    (store.InvalidKey, _Rule(400, "BadRequest")),
    (store.NoSpace, _Rule(503, "ServiceUnavailable", 30)),
    (store.Unavailable, _Rule(503, "ServiceUnavailable", 2)),
    (store.OutcomeUnknown, _Rule(504, "Timeout", message=_UNKNOWN)),
    (store.PermissionDenied, _Rule(500, "InternalError", message="the store refuses this daemon's credentials")),
)
"""The first class that fits decides: a subclass stands before its base."""

_WEB_REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    408: "Timeout",
    413: "RequestEntityTooLarge",
    415: "UnsupportedMediaType",
}


def answer_of(error: Exception, request_id: str, *, writing: bool) -> Answer:
    """What to tell about an error; `writing` says whether the request could have changed something."""
    if isinstance(error, RequestError):
        return Answer(error.code, error.reason, str(error), error.causes, error.retry_after, error.headers)
    if isinstance(error, store.StoreReset):
        if writing:
            return Answer(504, "Timeout", _UNKNOWN.format(error=error))
        return Answer(410, "Expired", f"the store was replaced by another state of it: {error}")
    for kind, rule in _RULES:
        if isinstance(error, kind):
            message = rule.message.format(error=error) if rule.message else str(error)
            causes = error.causes if isinstance(error, Invalid) else ()
            return Answer(rule.code, rule.reason, message, causes, rule.retry_after)
    if isinstance(error, web.HTTPException):
        return _of_web(error)
    return Answer(500, "InternalError", f"an internal error occurred; it is logged under request {request_id}")


def expected(error: Exception) -> bool:
    """Whether the table names this error; another one is a defect and is logged as such."""
    return isinstance(error, (RequestError, store.StoreReset, web.HTTPException, *(kind for kind, _ in _RULES)))


def status_document(answer: Answer, about: About = About()) -> dict[str, Any]:
    """The `Status` object."""
    details: dict[str, Any] = {}
    if about.name:
        details["name"] = about.name
    if about.plural:
        details |= {"group": about.group, "kind": about.plural}
    if answer.causes:
        details["causes"] = [{"reason": c.reason, "message": c.message, "field": c.field} for c in answer.causes]
    if answer.retry_after is not None:
        details["retryAfterSeconds"] = answer.retry_after
    document: dict[str, Any] = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": _qualified(answer, about),
        "reason": answer.reason,
        "code": answer.code,
    }
    if details:
        document["details"] = details
    return document


def success_document(about: About, uid: str = "") -> dict[str, Any]:
    """The `Status` of a deletion that is complete."""
    details = {"name": about.name, "group": about.group, "kind": about.plural} | ({"uid": uid} if uid else {})
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}


def response_headers(answer: Answer) -> dict[str, str]:
    """The headers that belong to an error."""
    headers = dict(answer.headers)
    if answer.retry_after is not None:
        headers["Retry-After"] = str(answer.retry_after)
    return headers


def _qualified(answer: Answer, about: About) -> str:
    """Kubernetes names kinds as `plural.group`; lrm's own errors know only the plural."""
    if not about.group or answer.code not in (404, 409):
        return answer.message
    return answer.message.replace(f'{about.plural} "', f'{about.plural}.{about.group} "', 1)


def _of_web(error: web.HTTPException) -> Answer:
    messages = {
        404: "the server could not find the requested resource",
        405: "the server does not allow this method on the requested resource",
    }
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    reason = _WEB_REASONS.get(error.status, "InternalError")
    return Answer(error.status, reason, messages.get(error.status, error.reason), headers=headers)
