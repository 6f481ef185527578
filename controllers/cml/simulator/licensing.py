"""Smart licensing as an asynchronous state machine: accepted now, done later, and only if the far side plays along.

Promises: as with labs, nothing waits; `advance(now)` moves what is due. A registration goes NOT_REGISTERED ->
IN_PROGRESS -> COMPLETED, and its authorization INIT -> IN_COMPLIANCE half as long after that. `stuck` holds it in
IN_PROGRESS, `ssms_reachable = False` leaves it in RETRY until the service can be reached again. A token that starts
with `INVALID` is refused by the service: FAILED. The status words besides COMPLETED and IN_COMPLIANCE are guesses,
as no document gives them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

NOT_REGISTERED, IN_PROGRESS, RETRY, COMPLETED, FAILED = "NOT_REGISTERED", "IN_PROGRESS", "RETRY", "COMPLETED", "FAILED"
INIT, IN_COMPLIANCE = "INIT", "IN_COMPLIANCE"
PRODUCTS = ("CML_Enterprise", "CML_Education", "CML_Personal", "CML_Personal40")
DEFAULT_SSMS = "https://smartreceiver.cisco.com/licservice/license"
_FEATURE = "regid.2019-10.com.cisco.CML_ENT_BASE,1.0_00000000-0000-4000-8000-000000000001"
_VALID_FOR = timedelta(days=365)
_RENEW_AFTER = timedelta(days=182)


class NotPossibleNowError(Exception):
    """Licensing is in a state in which this cannot be asked of it."""


class NotRegisteredError(Exception):
    """There is no registration to act on."""


@dataclass(slots=True)
class Licensing:
    """The licensing of one machine. Times given to it: `now` monotonic, `when` the wall's."""

    delay: float
    product_uuid: str
    hostname: str
    product: str = PRODUCTS[0]
    ssms: str | None = DEFAULT_SSMS
    proxy_server: str | None = None
    proxy_port: int | None = None
    status: str = NOT_REGISTERED
    authorization: str = INIT
    token: str = ""
    due: float = 0.0
    authorized_due: float = 0.0
    attempted: datetime | None = None
    registered: datetime | None = None
    renewed: datetime | None = None
    authorized: datetime | None = None
    stuck: bool = False
    ssms_reachable: bool = True

    @property
    def licensed(self) -> bool:
        return self.status == COMPLETED and self.authorization == IN_COMPLIANCE

    @property
    def enterprise(self) -> bool:
        return self.product in ("CML_Enterprise", "CML_Education")

    def register(self, token: str, now: float, when: datetime, *, again: bool) -> None:
        if self.status in (IN_PROGRESS, RETRY) and not again:
            raise NotPossibleNowError("A registration is in progress.")
        if self.status == COMPLETED and not again:
            raise NotPossibleNowError("The product is registered already; set reregister to do it again.")
        self.status, self.authorization = IN_PROGRESS, INIT
        self.token, self.attempted, self.registered, self.authorized = token, when, None, None
        self.due = now + self.delay

    def deregister(self) -> bool:
        """Give the seat back; False when it could not be told to the service, and stays allocated there."""
        if self.status == IN_PROGRESS:
            raise NotPossibleNowError("A registration is in progress.")
        if self.status not in (COMPLETED, RETRY):
            raise NotRegisteredError
        told = self.ssms_reachable
        self.status, self.authorization, self.token = NOT_REGISTERED, INIT, ""
        self.attempted = self.registered = self.renewed = self.authorized = None
        return told

    def renew(self, when: datetime) -> None:
        """Renew registration or authorization."""
        if self.status in (IN_PROGRESS, RETRY):
            raise NotPossibleNowError("A registration is in progress.")
        if self.status != COMPLETED:
            raise NotRegisteredError
        if self.ssms_reachable:
            self.renewed = when

    def advance(self, now: float, when: datetime) -> list[str]:
        """Carry out what is due; returns the status words reached, in order."""
        reached: list[str] = []
        if self.status in (IN_PROGRESS, RETRY) and now >= self.due and not self.stuck:
            if not self.ssms_reachable:
                if self.status != RETRY:
                    self.status = RETRY
                    reached.append(RETRY)
                return reached
            if self.token.upper().startswith("INVALID"):
                self.status = FAILED
                return [FAILED]
            # When the service comes back after the moment, the retry succeeds at the look that finds it back.
            done = self.due if self.status == IN_PROGRESS else now
            self.status, self.registered = COMPLETED, when - timedelta(seconds=now - done)
            self.authorized_due = done + self.delay / 2
            reached.append(COMPLETED)
        if self.status == COMPLETED and self.authorization == INIT and now >= self.authorized_due and not self.stuck:
            self.authorization = IN_COMPLIANCE
            self.authorized = when - timedelta(seconds=now - self.authorized_due)
            reached.append(IN_COMPLIANCE)
        return reached

    def document(self) -> dict[str, Any]:
        """The answer of `GET /licensing`."""
        failure = {
            FAILED: "Failed to register: the token is not valid.",
            RETRY: "Communication send error: the service could not be reached.",
        }.get(self.status)
        return {
            "udi": {"hostname": self.hostname, "product_uuid": self.product_uuid},
            "registration": {
                "status": self.status,
                "smart_account": "Simulated Training" if self.status == COMPLETED else None,
                "virtual_account": "Labs" if self.status == COMPLETED else None,
                "register_time": _times(self.registered, self.attempted, None, self.status, failure),
                "renew_time": _times(self.renewed, self.renewed, _plus(self.registered, _RENEW_AFTER), None, None),
                "expires": _stamp(_plus(self.registered, _VALID_FOR)),
            },
            "authorization": {
                "status": self.authorization,
                "renew_time": _times(self.authorized, self.authorized, None, None, None),
                "expires": _stamp(_plus(self.authorized, timedelta(days=90))),
            },
            "reservation_mode": False,
            "features": [
                {
                    "id": _FEATURE,
                    "name": "CML - Enterprise License" if self.enterprise else "CML - Personal License",
                    "description": "The base licence with its node count.",
                    "version": "1.0",
                    "in_use": 1 if self.licensed else 0,
                    "status": self.authorization,
                    "min": 0,
                    "max": 1,
                    "minEndDate": None,
                    "maxEndDate": None,
                }
            ],
            "product_license": {"active": self.product, "is_enterprise": self.enterprise},
            "transport": {
                "ssms": self.ssms,
                "default_ssms": DEFAULT_SSMS,
                "proxy": {"server": self.proxy_server, "port": self.proxy_port},
            },
        }


def _plus(when: datetime | None, span: timedelta) -> datetime | None:
    return None if when is None else when + span


def _stamp(when: datetime | None) -> str | None:
    """A space and no zone, as the real server writes it against its own document."""
    return None if when is None else when.strftime("%Y-%m-%d %H:%M:%S")


def _times(
    succeeded: datetime | None,
    attempted: datetime | None,
    scheduled: datetime | None,
    status: str | None,
    failure: str | None,
) -> dict[str, Any]:
    return {
        "succeeded": _stamp(succeeded),
        "attempted": _stamp(attempted),
        "scheduled": _stamp(scheduled),
        "status": status,
        "failure": failure,
        "success": "SUCCESS" if succeeded else None,
    }
