"""Everything that a call to AWS can end in, and what botocore's exceptions mean.

    AwsError                      retryable  definite_refusal
    ├── AwsAuthError              yes        yes   credentials missing, wrong or without the right
    │   └── AwsWrongAccount       yes        yes   … they are those of another account than what is asked about
    ├── AwsUnknownAccount         yes        yes   the settings do not say what this account is; nobody was asked
    ├── AwsUnknownRegion          yes        yes   the region may not be named; nobody was asked
    ├── AwsAccountForbidden       yes        yes   the account may not be named in the namespace; nobody was asked
    ├── AwsNotFound               no         yes   what was asked for does not exist, said by AWS itself
    │   └── Ec2NotFound           no         yes   … an instance: InvalidInstanceID.NotFound
    ├── AwsQuota                  yes        yes   the account's limit is reached
    ├── AwsCapacity               yes        yes   AWS has no such host free now
    ├── AwsThrottled              yes        yes   too many requests
    ├── AwsWrongState             yes        yes   the instance cannot do that in its present state
    ├── AwsBadInput               no         yes   the request itself is wrong: AWS's code and message say what
    ├── AwsIdempotentMismatch     no         yes   the client token was used for another launch, or for one that ended
    ├── AwsUnavailable            yes        yes   not carried out: nobody reached; or a read without an answer
    ├── AwsOutcomeUnknown         yes        no    sent, and the answer was lost: it may have been carried out
    └── AwsServerError            yes        no    AWS failed (5xx), or answered something that is no answer

`retryable`: the same call may succeed later although nobody changes the resource. `definite_refusal`: nothing was
carried out. After an error that is no definite refusal, look before acting.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Any, ClassVar
from urllib.parse import urlsplit

from botocore import exceptions as boto

from controllers.aws.place import Place

_MAX_MESSAGE = 500


class Effect(Enum):
    """What a call does, which decides what a lost answer means and who may repeat it."""

    READ = auto()
    REPEATABLE = auto()
    CREATING = auto()


class AwsError(Exception):
    """Base; `code` and `message` are AWS's own where AWS answered, `request_id` is what its support asks for."""

    retryable: ClassVar[bool] = False
    definite_refusal: ClassVar[bool] = False

    def __init__(
        self, code: str, message: str, *, operation: str = "", place: Place | None = None, request_id: str = ""
    ) -> None:
        self.code = code
        self.message = message
        self.operation = operation
        self.place = place
        self.request_id = request_id
        where = f"{operation or 'AWS call'}{f' in {place}' if place else ''}"
        super().__init__(f"{where}: {code}: {message}" if message else f"{where}: {code}")


class AwsAuthError(AwsError):
    """Credentials are missing, refused, expired or lack the right. AWS's own text is left out: it quotes requests."""

    retryable = True
    definite_refusal = True


class AwsWrongAccount(AwsAuthError):  # noqa: N818 - named as AwsUnknownAccount
    """The credentials are another account's: what they do not show proves nothing."""


class AwsUnknownAccount(AwsError):  # noqa: N818 - named as AwsNotFound
    """The settings know no account of this name. Nobody was asked, so nothing is known of what is there."""

    retryable = True
    definite_refusal = True


class AwsUnknownRegion(AwsError):  # noqa: N818 - named as AwsUnknownAccount
    """The region is not among those that may be named. Nobody was asked, so nothing is known of what is there."""

    retryable = True
    definite_refusal = True


class AwsAccountForbidden(AwsError):  # noqa: N818 - named as AwsUnknownAccount
    """The settings do not let the namespace name this account. Nobody was asked."""

    retryable = True
    definite_refusal = True


class AwsNotFound(AwsError):  # noqa: N818 - named as storage.NotFound
    """AWS says that what the call names does not exist."""

    definite_refusal = True


class Ec2NotFound(AwsNotFound):
    """AWS says that the instance does not exist. Right after a launch this may be untrue for some seconds."""


class AwsQuota(AwsError):  # noqa: N818 - a noun, as the others
    """A limit of the account is reached; it frees itself when something else ends, or is raised by a person."""

    retryable = True
    definite_refusal = True


class AwsCapacity(AwsError):  # noqa: N818 - a noun, as the others
    """AWS has none of these hosts free in this zone now."""

    retryable = True
    definite_refusal = True


class AwsThrottled(AwsError):  # noqa: N818 - a noun, as the others
    """Too many requests: wait longer between them."""

    retryable = True
    definite_refusal = True


class AwsWrongState(AwsError):  # noqa: N818 - a noun, as the others
    """The instance cannot do that in its present state: look at it again."""

    retryable = True
    definite_refusal = True


class AwsBadInput(AwsError):  # noqa: N818 - a noun, as the others
    """The request is refused for what it says; only another request can pass."""

    definite_refusal = True


class AwsIdempotentMismatch(AwsError):  # noqa: N818 - a noun, as the others
    """The client token belongs to a launch with other parameters, or to one whose instance has ended: look by tag."""

    definite_refusal = True


class AwsUnavailable(AwsError):  # noqa: N818 - named as storage.Unavailable
    """Certainly not carried out: the endpoint was not reached. A read that got no answer is one as well."""

    retryable = True
    definite_refusal = True


class AwsOutcomeUnknown(AwsError):  # noqa: N818 - named as storage.OutcomeUnknown
    """A write was sent and its answer lost or late: it may have been, or may yet be, carried out."""

    retryable = True


class AwsServerError(AwsError):
    """AWS answered 5xx, or with something that is not an answer to this call."""

    retryable = True


_CODES: dict[str, type[AwsError]] = {
    "InvalidInstanceID.NotFound": Ec2NotFound,
    "IncorrectInstanceState": AwsWrongState,
    "IncorrectState": AwsWrongState,
    "InvalidState": AwsWrongState,
    "IdempotentParameterMismatch": AwsIdempotentMismatch,
    "IdempotentInstanceTerminated": AwsIdempotentMismatch,
}
"""AWS's codes for what an error is; any other 4xx is bad input."""


def _means(kind: type[AwsError], codes: str) -> None:
    _CODES.update(dict.fromkeys(codes.split(), kind))


_means(
    AwsAuthError,
    """UnauthorizedOperation AuthFailure InvalidClientTokenId SignatureDoesNotMatch AccessDenied AccessDeniedException
    ExpiredToken ExpiredTokenException RequestExpired OptInRequired Blocked PendingVerification
    MissingAuthenticationToken MissingAuthenticationTokenException IncompleteSignature UnrecognizedClientException
    InvalidAccessKeyId InvalidSecurity NotAuthorized TokenRefreshRequired""",
)
_means(
    AwsQuota,
    """InstanceLimitExceeded VcpuLimitExceeded MaxSpotInstanceCountExceeded VolumeLimitExceeded MaxIOPSLimitExceeded
    AddressLimitExceeded NetworkInterfaceLimitExceeded PrivateIpAddressLimitExceeded ResourceLimitExceeded""",
)
_means(
    AwsCapacity,
    """InsufficientInstanceCapacity InsufficientHostCapacity InsufficientCapacity InsufficientAddressCapacity
    InsufficientVolumeCapacity InsufficientReservedInstanceCapacity InsufficientFreeAddressesInSubnet""",
)
_means(
    AwsThrottled,
    """RequestLimitExceeded Throttling ThrottlingException ThrottledException TooManyRequestsException SlowDown
    RequestThrottled RequestThrottledException EC2ThrottledException PriorRequestNotComplete BandwidthLimitExceeded
    ConcurrentTagAccess""",
)
_means(
    AwsServerError,
    """InternalError InternalFailure InternalServerError ServerInternal Unavailable ServiceUnavailable RequestTimeout
    RequestTimeoutException""",
)

_NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.ProfileNotFound,
    boto.TokenRetrievalError,
    boto.SSOError,
)
_IMPOSSIBLE = (
    boto.ParamValidationError,
    boto.InvalidRegionError,
    boto.NoRegionError,
    boto.UnknownEndpointError,
)
_NOT_REACHED = (boto.EndpointConnectionError, boto.ConnectTimeoutError, boto.ProxyConnectionError)


def from_code(
    code: str, message: str, *, status: int, operation: str = "", place: Place | None = None, request_id: str = ""
) -> AwsError:
    """The error for what AWS answered. A 5xx is never a refusal, whatever its code says, but for throttling."""
    kind = _CODES.get(code)
    if status >= 500 and kind not in (AwsThrottled, AwsCapacity, AwsServerError):
        kind = AwsServerError
    elif kind is None:
        kind = AwsThrottled if status == 429 else AwsBadInput if 400 <= status < 500 else AwsServerError
    if kind is AwsAuthError:
        message = "the credentials are refused, expired, or lack the right to do this"
    elif len(message) > _MAX_MESSAGE:
        message = message[:_MAX_MESSAGE] + "…"
    return kind(code or f"HTTP {status}", message, operation=operation, place=place, request_id=request_id)


def from_botocore(
    error: Exception, effect: Effect, *, operation: str, place: Place | None, sent: bool = True
) -> AwsError:
    """The error for an exception of botocore; `sent` False says that it came before anything had left."""
    if isinstance(error, boto.ClientError):
        answer: dict[str, Any] = dict(error.response)
        said, meta = answer.get("Error") or {}, answer.get("ResponseMetadata") or {}
        return from_code(
            str(said.get("Code") or ""),
            str(said.get("Message") or ""),
            status=int(meta.get("HTTPStatusCode") or 0),
            operation=operation,
            place=place,
            request_id=str(meta.get("RequestId") or ""),
        )
    message = _first_line(error)
    if isinstance(error, _NO_CREDENTIALS):
        kind: type[AwsError] = AwsAuthError
        message = "no usable credentials were found"
    elif isinstance(error, _IMPOSSIBLE):
        kind = AwsBadInput
    elif isinstance(error, _NOT_REACHED) or "CERTIFICATE_VERIFY_FAILED" in message or not sent:
        kind = AwsUnavailable
    elif isinstance(error, boto.HTTPClientError):  # read timeout, connection closed, broken TLS: the request had left
        kind = _unanswered(effect)
    else:  # an answer that cannot be parsed or broke off, and what botocore does not wrap
        kind = AwsOutcomeUnknown if effect is Effect.CREATING else AwsServerError
    return kind(type(error).__name__, message, operation=operation, place=place)


def no_answer(effect: Effect, code: str, message: str, *, operation: str, place: Place | None) -> AwsError:
    """The error for a request that was sent and not answered."""
    return _unanswered(effect)(code, message, operation=operation, place=place)


def _unanswered(effect: Effect) -> type[AwsError]:
    return AwsUnavailable if effect is Effect.READ else AwsOutcomeUnknown


def _first_line(error: Exception) -> str:
    """What the exception says, short, and without user and password of a URL."""
    text = str(error).partition("\n")[0][:_MAX_MESSAGE]
    return re.sub(r"\bhttps?://[^\s\"']+", lambda m: _bare(m.group()), text)


def _bare(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
