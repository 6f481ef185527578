"""Faults that a test or a person switches on: which call of which action goes wrong, how, and how often.

A fault strikes the next matching calls, oldest fault first, `times` of them (0: until it is removed); every kind may
wait `seconds` first. `delay` waits and then carries out the call, even when its caller has gone; `slow-reply` carries
it out and then waits; `lost-reply` carries it out and drops the connection; `dropped` drops it alone; the others
refuse. Called by `controllers.aws.simulator.server`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from controllers.aws.simulator.wire import CloudError

REFUSALS = {
    "throttle": CloudError("RequestLimitExceeded", "Request limit exceeded.", 503),
    "quota": CloudError("InstanceLimitExceeded", "You have requested more instances than your limit allows.", 400),
    "vcpu": CloudError("VcpuLimitExceeded", "You have requested more vCPU capacity than your limit allows.", 400),
    "capacity": CloudError(
        "InsufficientInstanceCapacity", "There is no Spot or On-Demand capacity available that matches.", 500
    ),
    "auth": CloudError("AuthFailure", "AWS was not able to validate the provided access credentials", 401),
    "denied": CloudError("UnauthorizedOperation", "You are not authorized to perform this operation.", 403),
    "server-error": CloudError("InternalError", "An internal error has occurred", 500),
}
KINDS = (*REFUSALS, "error", "delay", "slow-reply", "lost-reply", "dropped")


@dataclass(slots=True)
class Fault:
    """One fault; `action` is an API action or `*`, `left` None means until removed."""

    id: int
    action: str
    kind: str
    left: int | None
    seconds: float
    region: str
    account: str
    refusal: CloudError | None
    hits: int = 0

    def describe(self) -> dict[str, Any]:
        """What `GET /_shim/faults` shows."""
        shown: dict[str, Any] = {
            "id": self.id,
            "action": self.action,
            "fault": self.kind,
            "left": self.left,
            "hits": self.hits,
        }
        shown |= {"seconds": self.seconds, "region": self.region, "account": self.account}
        return shown if self.refusal is None else shown | {"refusal": str(self.refusal)}


class Faults:
    """Those that are switched on."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._on: dict[int, Fault] = {}

    def add(self, wish: Mapping[str, Any]) -> Fault:
        """Switch on {action, fault, times=1, seconds=0, region, account}; `error` takes {code, message, status} too."""
        unknown = set(wish) - {"action", "fault", "times", "seconds", "region", "account", "code", "message", "status"}
        if unknown:
            raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
        kind, times, seconds = wish.get("fault"), wish.get("times", 1), wish.get("seconds", 0)
        action, region, account = wish.get("action", "*"), wish.get("region", ""), wish.get("account", "")
        if kind not in KINDS:
            raise ValueError(f"fault must be one of {', '.join(KINDS)}")
        if type(times) is not int or times < 0:
            raise ValueError("times must be a whole number, 0 for until removed")
        if type(seconds) not in (int, float) or not 0 <= seconds <= 3600:
            raise ValueError("seconds must be a number from 0 to 3600")
        if not isinstance(action, str) or not action or not isinstance(region, str) or not isinstance(account, str):
            raise ValueError("action, region and account must be names")
        refusal = REFUSALS.get(kind)
        if kind == "error":
            code, message, status = wish.get("code"), wish.get("message", ""), wish.get("status", 400)
            if not isinstance(code, str) or not isinstance(message, str) or status not in range(400, 600):
                raise ValueError("fault error needs a code, a message and a status from 400 to 599")
            refusal = CloudError(code, message, status)
        fault = Fault(next(self._ids), action, kind, times or None, float(seconds), region, account, refusal)
        self._on[fault.id] = fault
        return fault

    def take(self, action: str, region: str, account: str = "") -> Fault | None:
        """The fault that strikes this call."""
        for fault in self._on.values():
            here = fault.region in ("", region) and fault.account in ("", account)
            if fault.action in ("*", action) and here and fault.left != 0:
                fault.hits += 1
                if fault.left is not None:
                    fault.left -= 1
                return fault
        return None

    def list(self) -> list[dict[str, Any]]:
        """All, those that are used up included, with their hits."""
        return [fault.describe() for fault in self._on.values()]

    def remove(self, fault_id: int) -> bool:
        return self._on.pop(fault_id, None) is not None

    def clear(self) -> None:
        self._on.clear()
