"""The simulated AWS as real boto3 and real processes see it."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from botocore.exceptions import ClientError

from controllers.aws.simulator import DEMO_AMI, DEMO_KEY, AwsShim, ShimOptions
from equipment.aws import ABSENT, REGION, Boto, boto, shim_process
from equipment.waiting import until
from lrm.processes import ChildProcess

LAUNCH: dict[str, Any] = {"ImageId": DEMO_AMI, "InstanceType": "m5zn.metal", "MinCount": 1, "MaxCount": 1}


@pytest.fixture
async def call(aws_shim: AwsShim) -> AsyncIterator[Boto]:
    async with boto(aws_shim.url) as made:
        yield made


@pytest.fixture
async def control() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def refused(code: str, call: Any) -> None:
    with pytest.raises(ClientError) as raised:
        await call
    assert raised.value.response["Error"]["Code"] == code


async def test_images_keys_and_types_must_exist_and_moto_is_asked_too(call: Boto) -> None:
    await refused("InvalidAMIID.NotFound", call("run_instances", **LAUNCH | {"ImageId": "ami-00000000000000000"}))
    await refused("InvalidAMIID.Malformed", call("run_instances", **LAUNCH | {"ImageId": "ami-xyz"}))
    await refused("InvalidKeyPair.NotFound", call("run_instances", **LAUNCH, KeyName="shim-own-key"))
    await refused("InvalidParameterValue", call("run_instances", **LAUNCH | {"InstanceType": "m99.huge"}))
    known = "ami-12c6146b"  # one of those that moto brings along
    assert (await call("describe_images", ImageIds=[known]))["Images"]
    await call("create_key_pair", KeyName="shim-own-key")
    said = {"ImageId": known, "InstanceType": "t3.micro", "KeyName": "shim-own-key"}
    launched = await call("run_instances", **LAUNCH | said)
    assert launched["Instances"][0]["ImageId"] == known
    await call("run_instances", **LAUNCH, KeyName=DEMO_KEY)


async def test_options_name_more_images_and_keys(moto_url: str) -> None:
    options = ShimOptions(moto_url=moto_url, amis=("ami-11111111",), key_names=("mine",))
    async with AwsShim.run(options) as shim, boto(shim.url) as call:
        await call("run_instances", **LAUNCH | {"ImageId": "ami-11111111", "KeyName": "mine"})


async def test_what_is_not_about_instances_is_motos_business(aws_shim: AwsShim, call: Boto) -> None:
    vpc = (await call("create_vpc", CidrBlock="10.9.0.0/16"))["Vpc"]["VpcId"]
    await call("create_tags", Resources=[vpc], Tags=[{"Key": "kind", "Value": "instance"}])
    said = await call("describe_tags", Filters=[{"Name": "resource-id", "Values": [vpc]}])
    assert [tag["ResourceType"] for tag in said["Tags"]] == ["vpc"]
    now = datetime.now(UTC)
    async with boto(aws_shim.url, "cloudwatch") as watch:
        point = {"MetricName": "CPUUtilization", "Value": 42.0, "Timestamp": now - timedelta(minutes=1)}
        point["Dimensions"] = [{"Name": "InstanceId", "Value": ABSENT}]
        # More than 10 kB: boto3 sends it compressed.
        await watch("put_metric_data", Namespace="AWS/EC2", MetricData=[point] * 200)
        got = await watch(
            "get_metric_statistics",
            Namespace="AWS/EC2",
            MetricName="CPUUtilization",
            Dimensions=point["Dimensions"],
            StartTime=now - timedelta(hours=1),
            EndTime=now,
            Period=3600,
            Statistics=["Average"],
        )
    assert [p["Average"] for p in got["Datapoints"]] == [42.0]
    assert aws_shim.calls["PutMetricData"] == 1
    async with boto(aws_shim.url, "sts") as sts:
        assert (await sts("get_caller_identity"))["Account"]


async def test_faults_strike_other_services_too(aws_shim: AwsShim) -> None:
    aws_shim.faults.add({"action": "ListMetrics", "fault": "error", "code": "AccessDenied", "status": 403})
    async with boto(aws_shim.url, "cloudwatch") as watch:
        with pytest.raises(ClientError, match="AccessDenied"):
            await watch("list_metrics")
        await watch("list_metrics")


async def test_instances_are_described_as_boto3_expects(call: Boto) -> None:
    said = await call(
        "run_instances",
        **LAUNCH | {"MaxCount": 2},
        KeyName=DEMO_KEY,
        ClientToken="token",
        NetworkInterfaces=[{"DeviceIndex": 0, "SubnetId": "subnet-1", "Groups": ["sg-1", "sg-2"]}],
        IamInstanceProfile={"Name": "cml"},
        TagSpecifications=[
            {"ResourceType": "instance", "Tags": [{"Key": "a", "Value": "1 <&>"}]},
            {"ResourceType": "volume", "Tags": [{"Key": "b", "Value": "2"}]},
        ],
        BlockDeviceMappings=[{"DeviceName": "/dev/xvda", "Ebs": {"VolumeSize": 10}}],
    )
    ids = [i["InstanceId"] for i in said["Instances"]]
    assert len(set(ids)) == 2
    [reservation] = (await call("describe_instances", InstanceIds=ids))["Reservations"]
    first = reservation["Instances"][0]
    assert first["Tags"] == [{"Key": "a", "Value": "1 <&>"}]
    assert [group["GroupId"] for group in first["SecurityGroups"]] == ["sg-1", "sg-2"]
    assert first["IamInstanceProfile"]["Arn"].endswith(":instance-profile/cml")
    assert (first["SubnetId"], first["KeyName"], first["ClientToken"]) == ("subnet-1", DEMO_KEY, "token")
    assert first["BlockDeviceMappings"][0]["DeviceName"] == "/dev/xvda"
    assert first["LaunchTime"].tzinfo is not None
    tags = await call("describe_tags", Filters=[{"Name": "resource-id", "Values": ids}])
    assert [tag["ResourceId"] for tag in tags["Tags"]] == ids


async def test_boto3s_waiters_and_paginators_come_to_their_end(aws_shim: AwsShim, call: Boto) -> None:
    for _ in range(12):
        await call("run_instances", **LAUNCH)

    def walk() -> tuple[int, str]:
        import boto3

        client = boto3.client("ec2", region_name=REGION, endpoint_url=aws_shim.url)
        try:
            pages = client.get_paginator("describe_instances").paginate(PaginationConfig={"PageSize": 5})
            ids = [i["InstanceId"] for page in pages for r in page["Reservations"] for i in r["Instances"]]
            waiting = {"Delay": 1, "MaxAttempts": 10}
            client.get_waiter("instance_running").wait(InstanceIds=ids[:3], WaiterConfig=waiting)
            client.terminate_instances(InstanceIds=ids[:3])
            client.get_waiter("instance_terminated").wait(InstanceIds=ids[:3], WaiterConfig=waiting)
            return len(set(ids)), "done"
        finally:
            client.close()

    assert await asyncio.to_thread(walk) == (12, "done")


async def test_a_dry_run_changes_nothing(call: Boto) -> None:
    await refused("DryRunOperation", call("run_instances", **LAUNCH, DryRun=True))
    assert (await call("describe_instances"))["Reservations"] == []


async def test_calls_on_instances_that_are_not_played_are_refused_rather_than_passed_to_moto(call: Boto) -> None:
    """Moto would say that the instance does not exist."""
    one = (await call("run_instances", **LAUNCH))["Instances"][0]["InstanceId"]
    await refused("UnsupportedOperation", call("reboot_instances", InstanceIds=[one]))


async def test_the_control_surface_tells_what_exists_and_changes_it(
    aws_shim: AwsShim, call: Boto, control: aiohttp.ClientSession
) -> None:
    one = (await call("run_instances", **LAUNCH))["Instances"][0]["InstanceId"]
    url = f"{aws_shim.url}/_shim"

    async def shown() -> dict[str, Any]:
        async with control.get(f"{url}/instances/{one}") as reply:
            assert reply.status == 200
            said: dict[str, Any] = await reply.json()
            return said

    first = await shown()
    assert first["state"] == "pending"
    await until(lambda: _is(shown(), "running"))
    await call("stop_instances", InstanceIds=[one])
    await until(lambda: _is(shown(), "stopped"))
    await call("start_instances", InstanceIds=[one])
    assert (await shown())["launch"] != first["launch"], "another start is another launch"
    async with control.get(f"{url}/calls") as reply:
        assert await reply.json() == {"RunInstances": 1, "StartInstances": 1, "StopInstances": 1}
    async with control.delete(f"{url}/instances/{one}") as reply:
        assert reply.status == 200
    async with control.get(f"{url}/instances/{one}") as reply:
        assert reply.status == 404
    await refused("InvalidInstanceID.NotFound", call("describe_instances", InstanceIds=[one]))


async def _is(shown: Any, state: str) -> bool:
    return bool((await shown)["state"] == state)


BAD_CONTROL = [
    ("POST", "faults", "not json", 400),
    ("POST", "faults", "[]", 400),
    ("POST", "faults", '{"fault": "nonsense"}', 400),
    ("DELETE", "faults/99", None, 404),
    ("PATCH", "settings", '{"delay": -1}', 400),
    ("PATCH", "settings", '{"colour": 1}', 400),
    ("PATCH", f"instances/{ABSENT}", '{"impaired": true}', 404),
    ("PATCH", f"instances/{ABSENT}", "{}", 400),
    ("DELETE", f"instances/{ABSENT}", None, 404),
    ("GET", "nothing", None, 404),
]


@pytest.mark.parametrize("wish", BAD_CONTROL)
async def test_a_bad_wish_to_the_control_surface_is_refused(
    aws_shim: AwsShim, control: aiohttp.ClientSession, wish: tuple[str, str, str | None, int]
) -> None:
    method, path, body, status = wish
    async with control.request(method, f"{aws_shim.url}/_shim/{path}", data=body) as reply:
        assert reply.status == status
    assert aws_shim.faults.list() == []


async def test_faults_and_settings_are_switched_over_http(
    aws_shim: AwsShim, call: Boto, control: aiohttp.ClientSession
) -> None:
    wish = {"action": "DescribeInstances", "fault": "denied", "times": 0}
    async with control.post(f"{aws_shim.url}/_shim/faults", json=wish) as reply:
        assert reply.status == 201
    await refused("UnauthorizedOperation", call("describe_instances"))
    async with control.get(f"{aws_shim.url}/_shim/faults") as reply:
        assert [fault["hits"] for fault in await reply.json()] == [1]
    async with control.delete(f"{aws_shim.url}/_shim/faults") as reply:
        assert reply.status == 200
    async with control.patch(f"{aws_shim.url}/_shim/settings", json={"delay": 0}) as reply:
        assert await reply.json() == {"delay": 0.0, "describe_lag": 0.0}
    one = (await call("run_instances", **LAUNCH))["Instances"][0]["InstanceId"]
    [reservation] = (await call("describe_instances", InstanceIds=[one]))["Reservations"]
    assert reservation["Instances"][0]["State"]["Name"] == "running"


async def test_an_unsigned_call_is_refused(aws_shim: AwsShim, control: aiohttp.ClientSession) -> None:
    async with control.post(aws_shim.url, data={"Action": "RunInstances", **dict.fromkeys(LAUNCH, "1")}) as reply:
        assert (reply.status, "AuthFailure" in await reply.text()) == (401, True)


async def test_without_moto_instances_go_on_and_the_rest_is_unavailable(aws_credentials: None) -> None:
    options = ShimOptions(moto_url="http://127.0.0.1:1", delay=0)
    async with AwsShim.run(options) as shim, boto(shim.url) as call:
        await call("run_instances", **LAUNCH)
        await refused("Unavailable", call("run_instances", **LAUNCH, KeyName="other"))
        with pytest.raises(ClientError, match="Unavailable"):
            await call("describe_vpcs")


async def test_instances_outlive_a_killed_process_and_a_clean_end_is_exit_code_0(tmp_path: Path, moto_url: str) -> None:
    data = ("--data-dir", str(tmp_path / "data"), "--delay", "0.1")
    async with shim_process(tmp_path / "1", moto_url, *data) as (child, url), boto(url) as call:
        said = await call("run_instances", **LAUNCH, ClientToken="t")
        one = said["Instances"][0]["InstanceId"]
        await call("create_tags", Resources=[one], Tags=[{"Key": "a", "Value": "b"}])
        child.kill()
    async with shim_process(tmp_path / "2", moto_url, *data) as (child, url), boto(url) as call:
        again = await call("run_instances", **LAUNCH, ClientToken="t")
        assert again["Instances"][0]["InstanceId"] == one
        [reservation] = (await call("describe_instances"))["Reservations"]
        assert reservation["Instances"][0]["Tags"] == [{"Key": "a", "Value": "b"}]
        child.signal(signal.SIGTERM)
        assert await child.wait() == 0


async def test_what_keeps_it_from_starting_is_one_sentence_and_exit_code_1(tmp_path: Path, moto_url: str) -> None:
    """Another one on the same folder, or on the same port."""
    data = ("--data-dir", str(tmp_path / "data"))
    async with shim_process(tmp_path / "1", moto_url, *data) as (_, url):
        port = url.rpartition(":")[2]
        for number, arguments in enumerate((data, ("--port", port))):
            command = [sys.executable, "-m", "controllers.aws.simulator", "--moto-url", moto_url, *arguments]
            log = tmp_path / f"refused-{number}.log"
            child = ChildProcess.start(command, name="second", log_path=log)
            assert await child.wait() == 1
            lines = child.log_tail()
            assert len(lines) == 1
            assert lines[0].startswith("the simulated AWS cannot start: ")


async def test_a_moto_of_its_own_ends_with_it(tmp_path: Path, aws_credentials: None) -> None:
    options = ShimOptions(data_dir=tmp_path)
    async with AwsShim.run(options) as shim:
        async with boto(shim.url) as call:
            assert (await call("describe_vpcs"))["Vpcs"]
        port = int(shim.moto_url.rpartition(":")[2])
    with pytest.raises(OSError, match=str(port)):
        await asyncio.open_connection("127.0.0.1", port)
    assert (tmp_path / "moto.log").stat().st_size > 0


async def test_the_accounts_know_nothing_of_one_another(
    moto_url: str, control: aiohttp.ClientSession, tmp_path: Path
) -> None:
    first, second = "111111111111", "222222222222"
    options = ShimOptions(moto_url=moto_url, data_dir=tmp_path, delay=0)
    async with AwsShim.run(options) as shim, AsyncExitStack() as stack:
        calls = {key: await stack.enter_async_context(boto(shim.url, access_key=key)) for key in ("any", first, second)}
        launched = (await calls[first]("run_instances", **LAUNCH))["Instances"][0]["InstanceId"]
        for key in ("any", second):
            assert (await calls[key]("describe_instances"))["Reservations"] == []
            await refused("InvalidInstanceID.NotFound", calls[key]("terminate_instances", InstanceIds=[launched]))
        [reservation] = (await calls[first]("describe_instances"))["Reservations"]
        assert reservation["OwnerId"] == first
        await calls[first]("create_key_pair", KeyName="of-the-first")
        await calls[first]("run_instances", **LAUNCH, KeyName="of-the-first")
        await refused("InvalidKeyPair.NotFound", calls[second]("run_instances", **LAUNCH, KeyName="of-the-first"))
        shim.faults.add({"action": "DescribeInstances", "fault": "auth", "account": second})
        await calls[first]("describe_instances")
        await refused("AuthFailure", calls[second]("describe_instances"))
    async with AwsShim.run(options) as shim:
        async with control.get(f"{shim.url}/_shim/instances") as reply:
            assert {i["account"] for i in await reply.json()} == {first}
        async with control.delete(f"{shim.url}/_shim/instances/{launched}") as reply:
            assert reply.status == 200
        assert shim.worlds.find(launched) is None


async def test_the_key_of_a_role_is_of_the_roles_account_until_it_is_forgotten(
    aws_shim: AwsShim,
) -> None:
    async with boto(aws_shim.url, "sts") as sts:
        role = {"RoleArn": "arn:aws:iam::333333333333:role/lrm", "RoleSessionName": "lrm"}
        given = (await sts("assume_role", **role))["Credentials"]
        aws_shim.faults.add({"action": "AssumeRole", "fault": "error", "code": "AccessDenied", "status": 403})
        await refused("AccessDenied", sts("assume_role", **role))
    async with boto(aws_shim.url, access_key=given["AccessKeyId"]) as call:
        assert (await call("run_instances", **LAUNCH))["OwnerId"] == "333333333333"
        assert not list(aws_shim.instances.everywhere())
        aws_shim.worlds.forget_roles()
        await refused("AuthFailure", call("describe_instances"))
