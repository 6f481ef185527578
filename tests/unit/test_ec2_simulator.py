"""The simulated instances, on virtual time and without a server."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from controllers.aws.simulator.answers import InstanceApi
from controllers.aws.simulator.faults import Faults
from controllers.aws.simulator.instances import Instances
from controllers.aws.simulator.wire import CloudError, answer, tree
from lrm.testing import VirtualClock

HERE = "us-east-1"
LAUNCH = {"Action": "RunInstances", "ImageId": "ami-12345678", "InstanceType": "m5zn.metal", "MinCount": "1"}
LAUNCH |= {"MaxCount": "1"}


class Cloud:
    """Instances with a delay of 10 s and the API over them, as a caller sees it."""

    def __init__(self, folder: Path | None = None, **options: Any) -> None:
        self.clock = VirtualClock()
        self.instances = Instances(self.clock, folder, delay=10, **options)
        self.api = InstanceApi(self.instances)

    def run(self, token: str = "", **more: str) -> str:
        said = LAUNCH | ({"ClientToken": token} if token else {}) | more
        answered = self.api.replayed(HERE, said) or self.api.launch(HERE, said)
        return str(answered["instancesSet"][0]["instanceId"])

    def act(self, action: str, **parameters: str) -> dict[str, Any]:
        named = {name.replace("_", "."): value for name, value in parameters.items()}
        return self.api.actions[action](HERE, tree(named))

    def describe(self, **parameters: str) -> list[dict[str, Any]]:
        found = self.act("DescribeInstances", **parameters)["reservationSet"]
        return [instance for reservation in found for instance in reservation["instancesSet"]]

    def state(self, instance_id: str) -> str:
        return str(self.describe(InstanceId_1=instance_id)[0]["instanceState"]["name"])


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    made = Cloud()
    yield made
    made.instances.close()


def refused(code: str) -> Any:
    return pytest.raises(CloudError, match=f"^{code}: ")


async def test_states_pass_with_time_and_addresses_come_and_go_with_them(cloud: Cloud) -> None:
    one = cloud.run()
    [said] = cloud.describe()
    assert (said["instanceState"], said["ipAddress"]) == ({"code": 0, "name": "pending"}, None)
    await cloud.clock.advance(10)
    [said] = cloud.describe()
    assert said["instanceState"] == {"code": 16, "name": "running"}
    first_public, private = said["ipAddress"], said["privateIpAddress"]
    assert first_public
    assert private
    cloud.act("StopInstances", InstanceId_1=one)
    assert cloud.state(one) == "stopping"
    await cloud.clock.advance(10)
    [said] = cloud.describe()
    assert (said["instanceState"]["name"], said["ipAddress"]) == ("stopped", None)
    assert said["stateReason"]["code"] == "Client.UserInitiatedShutdown"
    cloud.act("StartInstances", InstanceId_1=one)
    assert cloud.state(one) == "pending"
    await cloud.clock.advance(10)
    [said] = cloud.describe()
    assert said["ipAddress"] not in (None, first_public)
    assert said["privateIpAddress"] == private
    assert said["stateReason"] is None
    assert said["launchTime"] == "2026-01-01T00:00:20.000Z"
    cloud.act("TerminateInstances", InstanceId_1=one)
    assert cloud.state(one) == "shutting-down"
    await cloud.clock.advance(10)
    [said] = cloud.describe()
    assert (said["instanceState"]["name"], said["ipAddress"], said["privateIpAddress"]) == ("terminated", None, None)


async def test_a_terminated_instance_is_forgotten_after_an_hour(cloud: Cloud) -> None:
    one = cloud.run()
    cloud.act("TerminateInstances", InstanceId_1=one)
    await cloud.clock.advance(10 + 3599)
    assert cloud.state(one) == "terminated"
    await cloud.clock.advance(2)
    assert cloud.describe() == []
    with refused("InvalidInstanceID.NotFound"):
        cloud.describe(InstanceId_1=one)


async def test_a_token_gives_its_instance_in_its_present_state(cloud: Cloud) -> None:
    one = cloud.run("t")
    await cloud.clock.advance(10)
    said = cloud.api.replayed(HERE, LAUNCH | {"ClientToken": "t"})
    assert said is not None
    assert said["instancesSet"][0]["instanceState"]["name"] == "running"
    assert cloud.run("t") == one
    cloud.act("TerminateInstances", InstanceId_1=one)
    await cloud.clock.advance(20)
    assert cloud.run("t") == one
    assert cloud.state(one) == "terminated"
    assert cloud.run("u") != one


@pytest.mark.parametrize("change", [{"InstanceType": "t3.micro"}, {"KeyName": "k"}, {"MaxCount": "2"}])
def test_a_token_with_other_parameters_is_a_mismatch(cloud: Cloud, change: dict[str, str]) -> None:
    cloud.run("t")
    with refused("IdempotentParameterMismatch"):
        cloud.run("t", **change)
    assert len(cloud.describe()) == 1


def test_launches_without_a_token_are_each_their_own_and_a_token_holds_in_one_region(cloud: Cloud) -> None:
    assert cloud.run() != cloud.run()
    cloud.run("t")
    assert cloud.api.replayed("eu-west-1", LAUNCH | {"ClientToken": "t"}) is None


async def test_a_token_is_remembered_for_a_day_after_the_end(cloud: Cloud) -> None:
    one = cloud.run("t")
    cloud.act("TerminateInstances", InstanceId_1=one)
    await cloud.clock.advance(10 + 24 * 3600)
    assert cloud.run("t") == one
    await cloud.clock.advance(1)
    cloud.run("other")  # old ones are forgotten at a launch
    assert cloud.run("t") != one


CHANGES = [
    ("pending", "StopInstances", "IncorrectInstanceState"),
    ("pending", "StartInstances", ""),
    ("running", "StartInstances", ""),
    ("stopping", "StartInstances", "IncorrectInstanceState"),
    ("stopping", "StopInstances", ""),
    ("stopped", "StopInstances", ""),
    ("stopped", "TerminateInstances", ""),
    ("shutting-down", "StartInstances", "IncorrectInstanceState"),
    ("terminated", "StopInstances", "IncorrectInstanceState"),
    ("terminated", "TerminateInstances", ""),
]


@pytest.mark.parametrize(("state", "action", "code"), CHANGES)
async def test_each_call_passes_only_in_the_states_in_which_ec2_lets_it(
    cloud: Cloud, state: str, action: str, code: str
) -> None:
    one = cloud.run()
    for call, seconds in {
        "pending": [],
        "running": [("", 10)],
        "stopping": [("", 10), ("StopInstances", 0)],
        "stopped": [("", 10), ("StopInstances", 10)],
        "shutting-down": [("TerminateInstances", 0)],
        "terminated": [("TerminateInstances", 10)],
    }[state]:
        if call:
            cloud.act(call, InstanceId_1=one)
        await cloud.clock.advance(seconds)
    assert cloud.state(one) == state
    if code:
        with refused(code):
            cloud.act(action, InstanceId_1=one)
        assert cloud.state(one) == state
    else:
        [said] = cloud.act(action, InstanceId_1=one)["instancesSet"]
        assert said["previousState"]["name"] == state


async def test_a_call_for_several_instances_is_carried_out_wholly_or_not_at_all(cloud: Cloud) -> None:
    one = cloud.run()
    await cloud.clock.advance(10)
    with refused("InvalidInstanceID.NotFound"):
        cloud.act("TerminateInstances", InstanceId_1=one, InstanceId_2="i-0123456789abcdef0")
    two = cloud.run()
    with refused("IncorrectInstanceState"):
        cloud.act("StopInstances", InstanceId_1=one, InstanceId_2=two)
    assert cloud.state(one) == "running"


async def test_everything_outlives_a_restart_tokens_and_passing_states_too(tmp_path: Path) -> None:
    before = Cloud(tmp_path)
    one = before.run("t")
    before.act("CreateTags", ResourceId_1=one, Tag_1_Key="a", Tag_1_Value="b")
    await before.clock.advance(4)
    [said] = before.describe()
    before.instances.close()
    after = Cloud(tmp_path)
    assert after.describe() == [said]
    await after.clock.advance(10)
    assert after.state(one) == "running"
    assert after.run("t") == one
    assert after.run("u") != one
    assert after.describe()[0]["instanceId"] == one
    after.instances.close()


def test_two_simulators_cannot_share_a_folder(tmp_path: Path) -> None:
    first = Cloud(tmp_path)
    with pytest.raises(OSError, match="cannot be used"):
        Cloud(tmp_path)
    first.instances.close()


async def test_a_new_instance_can_be_hidden_from_describes_for_a_while() -> None:
    """As EC2 does: a describe right after the launch may not know it."""
    cloud = Cloud(describe_lag=5)
    one = cloud.run("t")
    assert cloud.describe() == []
    with refused("InvalidInstanceID.NotFound"):
        cloud.describe(InstanceId_1=one)
    assert cloud.run("t") == one
    await cloud.clock.advance(5)
    assert cloud.state(one) == "pending"
    cloud.instances.close()


def test_a_vanished_instance_is_as_if_it_had_never_been(cloud: Cloud) -> None:
    one = cloud.run("t")
    assert cloud.instances.vanish(one)
    assert not cloud.instances.vanish(one)
    assert cloud.describe() == []
    with refused("InvalidInstanceID.NotFound"):
        cloud.act("TerminateInstances", InstanceId_1=one)
    assert cloud.run("t") == one, "its token still belongs to it: a new one needs a new attempt"


async def test_checks_follow_the_state_and_can_be_made_to_fail(cloud: Cloud) -> None:
    one = cloud.run()

    def status(**more: str) -> list[str]:
        said = cloud.act("DescribeInstanceStatus", InstanceId_1=one, **more)["instanceStatusSet"]
        return [s["systemStatus"]["status"] for s in said]

    assert status() == []
    assert status(IncludeAllInstances="true") == ["not-applicable"]
    await cloud.clock.advance(10)
    assert status() == ["initializing"]
    await cloud.clock.advance(10)
    assert status() == ["ok"]
    cloud.instances.impair(one, impaired=True)
    assert status() == ["impaired"]


FILTERS = [
    ({"Name": "tag:name", "Value_1": "alpha"}, ["alpha"], "exact"),
    ({"Name": "tag:name", "Value_1": "a*"}, ["alpha", "a*"], "a star is any number of characters"),
    ({"Name": "tag:name", "Value_1": "a\\*"}, ["a*"], "a backslash makes it a star"),
    ({"Name": "tag:name", "Value_1": "bet?"}, ["beta"], "a question mark is one"),
    ({"Name": "tag:name", "Value_1": "ALPHA"}, [], "case counts"),
    ({"Name": "tag:name", "Value_1": "alpha", "Value_2": "beta"}, ["alpha", "beta"], "any of the values"),
    ({"Name": "tag:none", "Value_1": "*"}, [], "no such tag"),
    ({"Name": "tag-key", "Value_1": "name"}, ["alpha", "beta", "a*"], "by key alone"),
    ({"Name": "tag:name", "Value_1": "al.ha"}, [], "a dot is a dot"),
]


@pytest.mark.parametrize(("wish", "names", "why"), FILTERS)
def test_filters_match_as_ec2s_do(cloud: Cloud, wish: dict[str, str], names: list[str], why: str) -> None:
    for name in ("alpha", "beta", "a*"):
        one = cloud.run()
        cloud.act("CreateTags", ResourceId_1=one, Tag_1_Key="name", Tag_1_Value=name)
    found = cloud.describe(**{f"Filter_1_{key}": value for key, value in wish.items()})
    assert [i["tagSet"][0]["value"] for i in found] == names, why


def test_several_filters_must_all_hold_and_an_unknown_one_is_refused(cloud: Cloud) -> None:
    one, two = cloud.run(), cloud.run()
    cloud.act("TerminateInstances", InstanceId_1=two)
    both = {"Filter_1_Name": "instance-id", "Filter_1_Value_1": one, "Filter_1_Value_2": two}
    both |= {"Filter_2_Name": "instance-state-name", "Filter_2_Value_1": "pending"}
    assert [i["instanceId"] for i in cloud.describe(**both)] == [one]
    with refused("InvalidParameterValue"):
        cloud.describe(Filter_1_Name="colour", Filter_1_Value_1="red")


def test_pages_hold_each_instance_once_even_when_others_come_and_go_between_them(cloud: Cloud) -> None:
    ids = [cloud.run() for _ in range(12)]
    seen, token = [], ""
    for _ in itertools.count():
        more = {"NextToken": token} if token else {}
        page = cloud.act("DescribeInstances", MaxResults="5", **more)
        seen += [i["instanceId"] for r in page["reservationSet"] for i in r["instancesSet"]]
        token = page["nextToken"] or ""
        if not token:
            break
        cloud.instances.vanish(seen[0])
        cloud.run()
    assert seen[:12] == ids
    assert len(seen) == len(set(seen)) == 14
    with refused("InvalidNextToken"):
        cloud.act("DescribeInstances", NextToken="bm9uc2Vuc2U=")
    with refused("InvalidParameterCombination"):
        cloud.act("DescribeInstances", MaxResults="5", InstanceId_1=ids[1])
    with refused("InvalidParameterValue"):
        cloud.act("DescribeInstances", MaxResults="4")


def test_tags_are_added_overwritten_removed_and_kept_within_the_rules(cloud: Cloud) -> None:
    one = cloud.run()
    cloud.act("CreateTags", ResourceId_1=one, Tag_1_Key="a", Tag_1_Value="1", Tag_2_Key="b", Tag_2_Value="2")
    cloud.act("CreateTags", ResourceId_1=one, Tag_1_Key="a", Tag_1_Value="3")
    cloud.act("DeleteTags", ResourceId_1=one, Tag_1_Key="a", Tag_1_Value="not this")
    assert cloud.describe()[0]["tagSet"] == [{"key": "a", "value": "3"}, {"key": "b", "value": "2"}]
    cloud.act("DeleteTags", ResourceId_1=one, Tag_1_Key="a")
    assert cloud.describe()[0]["tagSet"] == [{"key": "b", "value": "2"}]
    with refused("InvalidParameterValue"):
        cloud.act("CreateTags", ResourceId_1=one, Tag_1_Key="aws:x", Tag_1_Value="1")
    with refused("TagLimitExceeded"):
        many = {f"Tag_{n}_{part}": f"{n}" for n in range(1, 51) for part in ("Key", "Value")}
        cloud.act("CreateTags", ResourceId_1=one, **many)
    assert cloud.describe()[0]["tagSet"] == [{"key": "b", "value": "2"}]


BAD_CALLS = [
    ("DescribeInstances", {"InstanceId_1": "nonsense"}, "InvalidInstanceID.Malformed"),
    ("DescribeInstances", {"InstanceId_1_Oops": "i-12345678"}, "InvalidParameterValue"),
    ("DescribeInstances", {"Filter": "x"}, "InvalidParameterValue"),
    ("DescribeInstances", {"Filter_1_Name": "tag:a"}, "InvalidParameterValue"),
    ("StopInstances", {}, "MissingParameter"),
    ("CreateTags", {"ResourceId_1": "vpc-1", "Tag_1_Key": "a"}, "InvalidInstanceID.Malformed"),
    ("DescribeInstances", {"a": "1", "a_b": "2"}, "InvalidParameter"),
    ("DescribeInstances", {"MaxResults": "many"}, "InvalidParameterValue"),
]


@pytest.mark.parametrize(("action", "parameters", "code"), BAD_CALLS)
def test_bad_calls_are_refused_with_a_code(cloud: Cloud, action: str, parameters: dict[str, str], code: str) -> None:
    with refused(code):
        cloud.act(action, **parameters)


def test_what_xml_cannot_carry_is_refused_and_the_rest_is_escaped(cloud: Cloud) -> None:
    one = cloud.run()
    with refused("InvalidParameterValue"):
        cloud.act("CreateTags", ResourceId_1=one, Tag_1_Key="a", Tag_1_Value="\x00")
    cloud.act("CreateTags", ResourceId_1=one, Tag_1_Key="a", Tag_1_Value="<&>")
    assert b"<value>&lt;&amp;&gt;</value>" in answer("X", "r", {"tagSet": cloud.describe()[0]["tagSet"]})


BAD_FAULTS: list[dict[str, Any]] = [
    {},
    {"fault": "nonsense"},
    {"fault": "throttle", "times": -1},
    {"fault": "throttle", "times": True},
    {"fault": "delay", "seconds": "1"},
    {"fault": "throttle", "action": ""},
    {"fault": "throttle", "colour": "red"},
    {"fault": "error"},
    {"fault": "error", "code": "X", "status": 200},
]


@pytest.mark.parametrize("wish", BAD_FAULTS)
def test_a_fault_that_means_nothing_is_refused(wish: dict[str, Any]) -> None:
    faults = Faults()
    with pytest.raises(ValueError, match=r"must|needs|unknown"):
        faults.add(wish)
    assert faults.list() == []


def test_faults_strike_as_often_as_they_say_the_oldest_first() -> None:
    faults = Faults()
    faults.add({"action": "RunInstances", "fault": "throttle", "times": 2, "region": HERE})
    everything = faults.add({"fault": "quota", "times": 0})
    struck = [faults.take(a, r) for a, r in [("RunInstances", HERE), ("RunInstances", "x"), ("RunInstances", HERE)]]
    struck += [faults.take("RunInstances", HERE), faults.take("StopInstances", HERE)]
    assert [f.kind if f else "" for f in struck] == ["throttle", "quota", "throttle", "quota", "quota"]
    assert faults.remove(everything.id)
    assert faults.take("RunInstances", HERE) is None
