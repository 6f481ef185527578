"""What an answer of etcd's gateway, or the lack of one, means for the caller.

    certainly not carried out, another member may do it   → `NotDone`
    certainly not carried out, the token is to be renewed → `TokenRefused`
    refused for good                                      → an error of `storage.errors`
    anything else: it may have been carried out           → `LostReply`

`NotDone`, `TokenRefused` and `LostReply` never leave the `storage.etcd*` modules. When in doubt a reply is lost: the
settling of lost replies is safe for requests that were refused, the reverse is not.
"""

from __future__ import annotations

from storage.errors import (
    Compacted,
    FutureRevision,
    LeaseNotFound,
    NoSpace,
    PermissionDenied,
    StorageError,
    TooLarge,
    Unavailable,
)


class LostReply(Exception):  # noqa: N818 - it is no error yet: it is to be settled
    """The request may have been carried out; nobody knows yet."""


class Malformed(StorageError):  # noqa: N818 - named as its siblings
    """An answer that has the form of JSON but not of etcd's. To a write it is a lost reply."""


class Closed(Unavailable):
    """The client was closed: nothing is sent any more, so nothing is settled any more."""


class NotDone(Exception):  # noqa: N818 - another member may still do it
    """The request was certainly not carried out."""


class TokenRefused(Exception):  # noqa: N818 - it is answered by a new token
    """The request was not carried out because of its token."""


_STALE_TOKEN = ("invalid auth token", "user name is empty", "auth store is old", "revision in header is old")
_NOT_DONE = ("no leader", "too many requests", "not supported for learner")

_CANCELLED, _UNKNOWN, _DEADLINE, _ABORTED, _INTERNAL, _UNAVAILABLE, _DATA_LOSS = 1, 2, 4, 10, 13, 14, 15
_DOUBTFUL = {0, _CANCELLED, _UNKNOWN, _DEADLINE, _ABORTED, _INTERNAL, _UNAVAILABLE, _DATA_LOSS}
_DENIED, _UNAUTHENTICATED = 7, 16


def classify(code: int, message: str) -> Exception:  # noqa: PLR0911 - a table in the order in which it is looked up
    """The exception for a gRPC code and etcd's message."""
    text = message.lower()
    if code == _UNAUTHENTICATED or any(part in text for part in _STALE_TOKEN):
        return TokenRefused(message)
    if any(part in text for part in _NOT_DONE):
        return NotDone(message)
    if "database space exceeded" in text:
        return NoSpace("the store is out of space: it refuses puts and lease grants until it is compacted")
    if "has been compacted" in text:
        return Compacted(0)
    if "future revision" in text:
        return FutureRevision(0, 0)
    if "lease not found" in text:
        return LeaseNotFound(0)
    if "too large" in text or "larger than max" in text:
        return TooLarge(message)
    if code == _DENIED or "permission denied" in text or "authentication failed" in text:
        return PermissionDenied(f"the store refuses: {message}")
    if code in _DOUBTFUL:
        return LostReply(message)
    return StorageError(f"the store refuses the request: {message} (code {code})")


def classify_body(status: int, body: object) -> Exception:
    """The exception for an HTTP status above 399 and its decoded body, or for an error inside a stream."""
    if isinstance(body, dict):
        message = body.get("message") or body.get("error")
        code = body.get("grpc_code") or body.get("code") or 0
        if isinstance(message, str) and isinstance(code, int):
            return classify(code, message)
    return LostReply(f"the endpoint answered HTTP {status} without etcd's error")
