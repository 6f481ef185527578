"""Launch parameters: stored and sent."""

from __future__ import annotations

import json
from typing import Any

import botocore.session
import pytest
from botocore.validate import ParamValidator
from hypothesis import given
from hypothesis import strategies as st

from controllers.aws.launch import LaunchParameters

PLAIN = LaunchParameters(ami_id="ami-1", instance_type="m5zn.metal", client_token="t")
words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
launches = st.builds(
    LaunchParameters,
    ami_id=words,
    instance_type=words,
    client_token=words,
    key_name=words | st.just(""),
    subnet_id=words | st.just(""),
    security_group_ids=st.lists(words, max_size=3).map(tuple),
    assign_public_ip=st.booleans(),
    volume_size_gb=st.integers(1, 16_000),
    volume_type=st.sampled_from(["io1", "io2", "gp3", "gp2"]),
    iops=st.integers(0, 64_000),
    iam_instance_profile=words | st.just("arn:aws:iam::1:instance-profile/x") | st.just(""),
    tags=st.dictionaries(words, words, max_size=3),
)


@given(launches)
def test_a_stored_copy_gives_the_same_request_byte_for_byte(parameters: LaunchParameters) -> None:
    stored = json.dumps(parameters.to_json(), sort_keys=True)
    again = LaunchParameters.from_json(json.loads(stored))
    assert again == parameters
    assert json.dumps(again.request()) == json.dumps(parameters.request())


@pytest.fixture(scope="module")
def shape() -> Any:
    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def test_every_request_is_one_that_ec2s_own_model_accepts(shape: Any) -> None:
    """For each way in which a field changes the request's form."""
    for changes in (
        {},
        {"subnet_id": "subnet-1", "security_group_ids": ("sg-1",)},
        {"security_group_ids": ("sg-1",)},
        {"assign_public_ip": False},
        {"volume_type": "gp2"},
        {"iam_instance_profile": "arn:aws:iam::1:instance-profile/x", "key_name": "k", "tags": {"a": "b"}},
        {"iam_instance_profile": "name"},
    ):
        request = LaunchParameters.from_json(PLAIN.to_json() | _wire(changes)).request()
        assert not ParamValidator().validate(request, shape).has_errors(), changes


def _wire(changes: dict[str, Any]) -> dict[str, Any]:
    names = {"subnet_id": "subnetId", "security_group_ids": "securityGroupIds", "assign_public_ip": "assignPublicIp"}
    names |= {"volume_type": "volumeType", "iam_instance_profile": "iamInstanceProfile", "key_name": "keyName"}
    return {names.get(k, k): list(v) if isinstance(v, tuple) else v for k, v in changes.items()}


def test_the_disk_dies_with_the_instance_and_iops_go_only_to_types_that_take_them() -> None:
    [disk] = PLAIN.request()["BlockDeviceMappings"]
    assert disk["Ebs"]["DeleteOnTermination"] is True
    assert disk["Ebs"]["Iops"] == 10_000
    gp2 = LaunchParameters.from_json(PLAIN.to_json() | {"volumeType": "gp2"})
    assert "Iops" not in gp2.request()["BlockDeviceMappings"][0]["Ebs"]


def test_the_wish_for_no_public_address_is_sent_even_without_a_subnet() -> None:
    request = LaunchParameters.from_json(PLAIN.to_json() | {"assignPublicIp": False}).request()
    assert request["NetworkInterfaces"][0]["AssociatePublicIpAddress"] is False
    assert "SecurityGroupIds" not in request


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"newField": 1}, "newField"),
        ({"iops": "many"}, "iops"),
        ({"iops": True}, "iops"),
        ({"tags": []}, "tags"),
        ({"securityGroupIds": "sg-1"}, "securityGroupIds"),
        ({"amiId": ""}, "amiId"),
        ({"clientToken": ""}, "clientToken"),
    ],
)
def test_a_stored_copy_that_is_not_understood_is_refused(change: dict[str, Any], word: str) -> None:
    """Sent without the field it would be another launch under the same token."""
    with pytest.raises(ValueError, match=word):
        LaunchParameters.from_json(PLAIN.to_json() | change)
