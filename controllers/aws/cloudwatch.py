"""CloudWatch for controllers: the latest value of many metrics of EC2 instances in one call.

Promises what `calls` does, and: a metric without a value in the window is absent from the result, never 0; one that
CloudWatch could not look up is an error, never absent. Called by the fleet's metrics; one object per daemon, closed at
its end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from controllers.aws.accounts import Accounts, accounts_of
from controllers.aws.calls import READ_TIMEOUT, AwsCalls
from controllers.aws.errors import AwsAuthError, AwsServerError
from controllers.aws.place import Place
from controllers.aws.settings import AwsAccount
from storage.clock import Clock

METRICS_MOST = 500
"""CloudWatch's limit of metrics in one call."""

_PERIOD = 300
"""Seconds of one value: EC2 tells every 5 minutes unless it is paid for more."""
_WINDOW = timedelta(minutes=15)
"""How far back a value may lie: a period, and what CloudWatch needs to have it."""
_OPERATION = "GetMetricData"


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric of one instance whose only dimension is the instance's id."""

    namespace: str
    name: str
    instance_id: str


def cpu(instance_id: str) -> Metric:
    """How busy EC2 sees the processor, percent."""
    return Metric("AWS/EC2", "CPUUtilization", instance_id)


def memory(instance_id: str) -> Metric:
    """How much memory an agent on the instance sees in use, percent.

    It exists only where the agent runs and aggregates by instance: `"aggregation_dimensions": [["InstanceId"]]`.
    """
    return Metric("CWAgent", "mem_used_percent", instance_id)


class CloudWatch:
    """The client; used on one event loop, by any number of tasks."""

    def __init__(
        self,
        clock: Clock,
        accounts: Accounts | Mapping[str, AwsAccount] | None = None,
        *,
        endpoint_url: str | None = None,
    ) -> None:
        """`accounts`: those that all services share, or by name, beside the one of the daemon's own credentials."""
        self._clock = clock
        self._accounts = accounts_of(accounts, clock, endpoint_url)
        self._calls = AwsCalls("cloudwatch", clock, self._accounts)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take no more calls and close idle connections."""
        self._calls.close()
        self._accounts.close()

    async def latest(
        self, place: Place, metrics: Sequence[Metric], *, timeout: float = READ_TIMEOUT
    ) -> dict[Metric, float]:
        """The average of the last period of each metric that has one; at most `METRICS_MOST`. Raises `AwsError`."""
        if len(metrics) > METRICS_MOST:
            raise ValueError(f"CloudWatch takes {METRICS_MOST} metrics a call")
        if not metrics:
            return {}
        asked = {f"m{number}": metric for number, metric in enumerate(metrics)}
        end = self._clock.now().replace(second=0, microsecond=0)
        request = {
            "MetricDataQueries": [_query(name, metric) for name, metric in asked.items()],
            "StartTime": end - _WINDOW,
            "EndTime": end,
            "ScanBy": "TimestampDescending",
        }
        answered: set[str] = set()
        found: dict[Metric, float] = {}
        deadline = self._clock.monotonic() + timeout
        async for page in self._calls.pages(place, _OPERATION, request, "MetricDataResults", deadline):
            for result in page["MetricDataResults"]:
                metric = asked.get(str(result.get("Id")))
                if metric is None:
                    continue
                self._check(result, place)
                answered.add(str(result["Id"]))
                value = next((float(v) for v in result.get("Values") or () if math.isfinite(v)), None)
                if value is not None:
                    found.setdefault(metric, value)  # newest first, across the pages too
        if len(answered) < len(asked):
            missing = f"the answer lacks {len(asked) - len(answered)} of {len(asked)} metrics"
            raise AwsServerError("NoAnswer", missing, operation=_OPERATION, place=place)
        return found

    def _check(self, result: Mapping[str, Any], place: Place) -> None:
        code = str(result.get("StatusCode") or "Complete")
        if code == "Forbidden":
            raise AwsAuthError(code, "the credentials may not read this metric", operation=_OPERATION, place=place)
        if code not in ("Complete", "PartialData"):
            raise AwsServerError(code, "a metric could not be looked up", operation=_OPERATION, place=place)


def _query(name: str, metric: Metric) -> dict[str, Any]:
    return {
        "Id": name,
        "MetricStat": {
            "Metric": {
                "Namespace": metric.namespace,
                "MetricName": metric.name,
                "Dimensions": [{"Name": "InstanceId", "Value": metric.instance_id}],
            },
            "Period": _PERIOD,
            "Stat": "Average",
        },
    }
