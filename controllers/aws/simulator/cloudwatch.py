"""What the simulated CloudWatch says of the simulated instances: GetMetricData for CPU and, with an agent, memory.

Played here because the instances are; moto has every other metric and call, and would take seconds for a fleet's.
A running instance has `AWS/EC2 CPUUtilization`; `CWAgent mem_used_percent` exists only where a test or a person has
given it a value, as on AWS where the agent is installed. Only AWS's JSON protocol is played, which boto3 speaks.
Called by `controllers.aws.simulator.server`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from controllers.aws.simulator.instances import Instance, Instances
from controllers.aws.simulator.wire import CloudError

_JSON = "application/x-amz-json-1.0"
_QUERIES_MOST = 500
_CPU, _MEMORY = ("AWS/EC2", "CPUUtilization"), ("CWAgent", "mem_used_percent")


def about_instances(action: str, content_type: str, body: bytes) -> Mapping[str, Any] | None:
    """The request, if it asks for metrics of simulated instances only; None for all that is moto's to answer."""
    if action != "GetMetricData" or content_type != _JSON:
        return None
    try:
        said = json.loads(body)
    except ValueError:
        return None
    if not isinstance(said, dict):
        return None
    queries = said.get("MetricDataQueries")
    played = isinstance(queries, list) and queries and all(_instance_of(query) for query in queries)
    return said if played else None


class MetricApi:
    """Answers the one call that is played here."""

    def __init__(self, instances: Instances) -> None:
        self._instances = instances

    def get_metric_data(self, region: str, said: Mapping[str, Any]) -> dict[str, Any]:
        """The latest whole period of each metric inside the window; no value for what does not run."""
        queries: Sequence[Mapping[str, Any]] = said["MetricDataQueries"]
        ids = [query.get("Id") for query in queries]
        if len(queries) > _QUERIES_MOST:
            raise CloudError(
                "ValidationError",
                f"The collection MetricDataQueries must not have a size greater than {_QUERIES_MOST}.",
            )
        if len(set(ids)) != len(ids):
            raise CloudError("ValidationError", "The values for parameter id in MetricDataQueries must be unique.")
        start, end = said.get("StartTime"), said.get("EndTime")
        if not isinstance(start, int | float) or not isinstance(end, int | float) or start >= end:
            raise CloudError("ValidationError", "The parameter EndTime must be greater than StartTime.")
        return {"MetricDataResults": [self._result(region, query, start, end) for query in queries], "Messages": []}

    def _result(self, region: str, query: Mapping[str, Any], start: float, end: float) -> dict[str, Any]:
        stat = query["MetricStat"]
        metric, period = stat["Metric"], stat.get("Period", 60)
        if type(period) is not int or period < 60 or period % 60:
            raise CloudError("ValidationError", "The parameter MetricStat.Period must be a multiple of 60.")
        at = end // period * period - period
        value = self._value(region, _instance_of(query), (metric.get("Namespace"), metric.get("MetricName")))
        there = value is not None and at >= start
        return {
            "Id": query.get("Id"),
            "Label": metric.get("MetricName"),
            "Timestamps": [at] if there else [],
            "Values": [value] if there else [],
            "StatusCode": "Complete",
        }

    def _value(self, region: str, instance_id: str, metric: tuple[Any, Any]) -> float | None:
        instance: Instance | None = self._instances.find(instance_id)
        if instance is None or instance.region != region or instance.state_at(self._instances.now) != "running":
            return None
        return {_CPU: instance.cpu, _MEMORY: instance.memory}.get(metric)


def _instance_of(query: Any) -> str:
    """The id of the instance that a query is about; empty when it is about something else."""
    stat = query.get("MetricStat") if isinstance(query, dict) else None
    dimensions = stat.get("Metric", {}).get("Dimensions") if isinstance(stat, dict) else None
    if not isinstance(dimensions, list) or len(dimensions) != 1 or dimensions[0].get("Name") != "InstanceId":
        return ""
    return str(dimensions[0].get("Value", ""))
