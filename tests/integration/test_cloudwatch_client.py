"""Our CloudWatch client against the simulator, and against servers whose answers are none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from controllers.aws.cloudwatch import METRICS_MOST, CloudWatch, Metric, cpu, memory
from controllers.aws.errors import AwsAuthError, AwsError, AwsServerError
from controllers.aws.place import Place
from controllers.aws.simulator import AwsShim
from controllers.aws.simulator.instances import Launch
from equipment.aws import ABSENT, HERE, REGION, boto, lying_server
from equipment.waiting import until
from storage.clock import SystemClock

ONE, TWO = cpu("i-00000000000000001"), memory("i-00000000000000001")


def answer(results: Sequence[Mapping[str, Any]], *, request_id: str = "r", token: str = "") -> bytes:
    body = {"MetricDataResults": results} | ({"NextToken": token} if token else {})
    return said(json.dumps(body), request_id=request_id)


def said(body: str, *, request_id: str = "r") -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/x-amz-json-1.0\r\nx-amzn-RequestId: {request_id}\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


def result(name: str, *values: Any, code: str = "Complete") -> dict[str, Any]:
    return {"Id": name, "Values": values, "Timestamps": [0 for _ in values], "StatusCode": code}


async def test_the_latest_values_come_by_metric_and_what_has_none_is_absent(aws_shim: AwsShim) -> None:
    launch = Launch(image_id="ami-0c0ffee0c0ffee001", instance_type="m5zn.metal")
    with_agent, without = aws_shim.instances.run(REGION, launch, {}, count=2, token="", fingerprint="")
    aws_shim.instances.measure(with_agent.id, cpu=37.5, memory=81)
    metrics = [m(i) for i in (with_agent.id, without.id, ABSENT) for m in (cpu, memory)]
    expected = {cpu(with_agent.id): 37.5, memory(with_agent.id): 81.0, cpu(without.id): 5.0}
    async with CloudWatch(SystemClock(), endpoint_url=aws_shim.url) as cloud_watch:

        async def running() -> bool:
            return await cloud_watch.latest(HERE, metrics) == expected

        await until(running, "the instances to run and be measured")
        assert await cloud_watch.latest(Place("eu-west-1"), metrics) == {}
        assert await cloud_watch.latest(HERE, []) == {}
        with pytest.raises(ValueError, match="500 metrics"):
            await cloud_watch.latest(HERE, [ONE] * (METRICS_MOST + 1))


async def test_what_is_not_about_instances_is_motos_to_answer(aws_shim: AwsShim) -> None:
    async with boto(aws_shim.url, "cloudwatch") as call:
        data = [{"MetricName": "m", "Value": 7.0, "Dimensions": [{"Name": "Disk", "Value": "a"}]}]
        await call("put_metric_data", Namespace="Own", MetricData=data)
        metrics = await call("list_metrics", Namespace="Own")
    assert [m["MetricName"] for m in metrics["Metrics"]] == ["m"]


@pytest.mark.parametrize(
    ("replies", "values", "why"),
    [
        ([answer([result("m0", 3, 9), result("m1")])], {ONE: 3.0}, "the newest is the first"),
        ([answer([result("m0", float("nan"), 4), result("m1", 0)])], {ONE: 4.0, TWO: 0.0}, "what is no number is none"),
        (
            [answer([result("m0", 3, code="PartialData")], token="t"), answer([result("m0", 9), result("m1", 5)])],
            {ONE: 3.0, TWO: 5.0},
            "a second page has older values",
        ),
        ([answer([result("m0", 1), result("m1", 2), result("m9", 3)])], {ONE: 1.0, TWO: 2.0}, "an id of nobody's"),
    ],
)
async def test_answers_that_can_be_used(
    replies: list[bytes], values: dict[Metric, float], why: str, aws_credentials: None
) -> None:
    async with lying_server(*replies) as (url, _), CloudWatch(SystemClock(), endpoint_url=url) as cloud_watch:
        assert await cloud_watch.latest(HERE, [ONE, TWO]) == values, why


@pytest.mark.parametrize(
    ("reply", "error", "why"),
    [
        (answer([result("m0", 1)]), AwsServerError, "a metric is missing: that is not 'no value'"),
        (answer([result("m0", 1), result("m1", code="InternalError")]), AwsServerError, "it could not be looked up"),
        (answer([result("m0", 1), result("m1", code="Forbidden")]), AwsAuthError, "it may not be read"),
        (said("{}"), AwsServerError, "an answer without results"),
        (answer([], request_id=""), AwsServerError, "an answer that AWS did not number"),
        (answer([result("m0", 1)], token="same"), AwsServerError, "pages without an end"),
        (said("<html>"), AwsServerError, "a portal's page"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", AwsServerError, "an answer that breaks off"),
    ],
)
async def test_answers_that_are_none(reply: bytes, error: type[AwsError], why: str, aws_credentials: None) -> None:
    async with lying_server(reply) as (url, _), CloudWatch(SystemClock(), endpoint_url=url) as cloud_watch:
        with pytest.raises(error):
            await cloud_watch.latest(HERE, [ONE, TWO])
