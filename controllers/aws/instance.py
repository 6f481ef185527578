"""An EC2 instance and its checks as values, and how they are read from an answer of EC2.

An answer that lacks what every answer of its kind has is an error, never an empty list: proxies and portals answer too.
Called by `controllers.aws.ec2`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from controllers.aws.errors import AwsServerError
from controllers.aws.place import Place

if TYPE_CHECKING:
    from mypy_boto3_ec2.type_defs import InstanceTypeDef

LIVE_STATES = ("pending", "running", "stopping", "stopped", "shutting-down")
"""Every state but `terminated`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ec2Instance:
    """An instance as EC2 describes it; what EC2 leaves out is empty. `launch_time` is that of the last start."""

    id: str
    state: str
    state_reason: str = ""
    public_ip: str = ""
    private_ip: str = ""
    launch_time: datetime | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    instance_type: str = ""
    image_id: str = ""
    client_token: str = ""
    owner: str = ""
    """The number of the account that has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceChecks:
    """EC2's two status checks: ok, impaired, initializing, insufficient-data, or not-applicable (not running)."""

    state: str
    system: str
    instance: str


def described(answer: Mapping[str, Any], place: Place) -> Iterable[Ec2Instance]:
    """The instances in an answer of DescribeInstances; raises `AwsServerError` when it is none."""
    if "Reservations" not in answer:
        raise AwsServerError("NoAnswer", "the answer lacks Reservations", operation="DescribeInstances", place=place)
    for reservation in answer["Reservations"]:
        for instance in reservation.get("Instances", ()):
            if not instance.get("InstanceId") or not (instance.get("State") or {}).get("Name"):
                raise AwsServerError(
                    "NoAnswer", "an instance without id or state", operation="DescribeInstances", place=place
                )
            yield instance_of(instance, reservation.get("OwnerId") or "")


def instance_of(said: InstanceTypeDef, owner: str) -> Ec2Instance:
    """One instance as boto3 hands it over."""
    reason, launched = said.get("StateReason") or {}, said.get("LaunchTime")
    return Ec2Instance(
        id=said["InstanceId"],
        state=(said.get("State") or {}).get("Name", ""),
        state_reason=reason.get("Message") or reason.get("Code") or said.get("StateTransitionReason") or "",
        public_ip=said.get("PublicIpAddress") or "",
        private_ip=said.get("PrivateIpAddress") or "",
        launch_time=launched.astimezone(UTC) if launched else None,
        tags={tag.get("Key", ""): tag.get("Value", "") for tag in said.get("Tags", ())},
        instance_type=said.get("InstanceType", ""),
        image_id=said.get("ImageId", ""),
        client_token=said.get("ClientToken") or "",
        owner=owner,
    )
