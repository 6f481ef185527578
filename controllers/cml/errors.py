"""Everything a CML can refuse or fail to do.

    CmlError
    ├── CmlInvalid             an argument or setting this client will not send; nothing left the process
    ├── CmlClosed              the client was closed
    ├── CmlUnavailable         nothing to be learned now                                  retryable
    │   ├── CmlNotReady        something answers, but not CML yet: 502, 503, 504, 429     retryable
    │   └── CmlUnreachable     no connection: refused, no route, no such host, cut off    retryable
    │       ├── CmlTimeout     no whole answer in time                                    retryable
    │       └── CmlCircuitOpen not even tried: it was unreachable a moment ago            retryable
    ├── CmlTlsError            the handshake or the chain was refused; no request was sent
    │   └── CmlFingerprintMismatch   the leaf certificate is not the pinned one
    ├── CmlAuthError           the credentials, or a session just made with them, are refused
    │   └── CmlLoginThrottled  not even tried: they were refused less than a minute ago
    ├── CmlIdentityMismatch    this is another CML; nothing more is sent to it
    ├── CmlRefused             CML understood and said no: 400, 409, …
    │   └── CmlForbidden       403 outside of a login
    ├── CmlNotFound            404 in CML's own words: proof of absence
    ├── CmlBadAnswer           500, HTML, half a JSON, a surprise: proves nothing
    └── CmlOutcomeUnknown      a creating call that may have been carried out: look before trying again

Whether a call may simply be repeated is decided by the class: `retryable`.
"""

from __future__ import annotations

from typing import ClassVar


class CmlError(Exception):
    """Base of every error of this package; texts never hold a password, a token or a licence."""

    retryable: ClassVar[bool] = False


class CmlInvalid(CmlError, ValueError):  # noqa: N818 - errors here are named for what happened
    """An argument or a setting that this client refuses to send."""


class CmlClosed(CmlError):  # noqa: N818 - errors here are named for what happened
    """The client was closed by its owner."""

    def __init__(self) -> None:
        super().__init__("this CML client is closed")


class CmlUnavailable(CmlError):  # noqa: N818 - errors here are named for what happened
    """CML cannot be asked now. A read or a repeatable call may be made again, later."""

    retryable = True


class CmlNotReady(CmlUnavailable):
    """The front server answers for a controller that does not: booting, restarting or overloaded."""

    def __init__(self, status: int) -> None:
        super().__init__(f"CML is not ready: its front server answers {status}")
        self.status = status


class CmlUnreachable(CmlUnavailable):
    """No connection could be made, or it ended before an answer began; or who answers does not speak HTTP."""


class CmlTimeout(CmlUnreachable):
    """No whole answer came in time."""


class CmlCircuitOpen(CmlUnreachable):
    """Nothing was tried; no observation of its own: when a call was, and failed, tells `CmlClient.failed_at`."""

    why: ClassVar[str] = "CML was unreachable several times in a row"

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"{self.why}; not asked again for {retry_after:.1f} s")
        self.retry_after = retry_after


class CmlTlsError(CmlError):
    """The TLS handshake or the certificate chain was refused; no request was sent."""


class CmlFingerprintMismatch(CmlTlsError):  # noqa: N818 - errors here are named for what happened
    """The leaf certificate is not the pinned one; the connection was closed before any request."""

    def __init__(self, expected: str, observed: str) -> None:
        super().__init__(f"the server's certificate has sha256 {observed or '(none)'}, pinned is {expected}")
        self.expected = expected
        self.observed = observed


class CmlAuthError(CmlError):
    """CML refuses these credentials, or a session that it has just granted."""


class CmlLoginThrottled(CmlAuthError):  # noqa: N818 - errors here are named for what happened
    """These credentials were refused a moment ago; they are tried at most once a minute."""

    why: ClassVar[str] = "CML refused these credentials"

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"{self.why}; not tried again for {retry_after:.0f} s")
        self.retry_after = retry_after


class CmlIdentityMismatch(CmlError):  # noqa: N818 - errors here are named for what happened
    """The CML at this address is not the expected one."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"the CML at this address has identity {found}, expected {expected}")
        self.expected = expected
        self.found = found


class CmlRefused(CmlError):  # noqa: N818 - errors here are named for what happened
    """CML answered no. `status` is the HTTP status, `description` CML's reason as one line."""

    def __init__(self, status: int, description: str) -> None:
        super().__init__(f"CML refused with {status}: {description or 'no reason given'}")
        self.status = status
        self.description = description


class CmlForbidden(CmlRefused):
    """403 on anything but a login: the session lacks the permission."""


class CmlNotFound(CmlError):  # noqa: N818 - errors here are named for what happened
    """CML itself (a JSON error, not a front server's page) says that there is no such thing."""

    def __init__(self, description: str) -> None:
        super().__init__(f"CML has no such thing: {description or 'no reason given'}")
        self.description = description


class CmlBadAnswer(CmlError):  # noqa: N818 - errors here are named for what happened
    """An answer from which nothing can be concluded."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"CML gave an unusable answer ({status}): {reason}")
        self.status = status
        self.reason = reason


class CmlOutcomeUnknown(CmlError):  # noqa: N818 - errors here are named for what happened
    """A creating call was sent and no usable answer came: CML may have carried it out."""

    def __init__(self, what: str, cause: str) -> None:
        super().__init__(f"{what} may have been carried out: {cause}")
        self.what = what
        self.cause = cause
