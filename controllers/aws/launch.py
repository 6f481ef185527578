"""What a launch asks of EC2, as it is stored and as it is sent.

A worker's status keeps the parameters of each attempt, and exactly that copy is sent, however often: EC2 refuses a
client token that comes back with other parameters. So the request is a pure function of these values, and a stored
copy with a field that this program does not know is refused rather than sent without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from mypy_boto3_ec2.type_defs import (
        EbsBlockDeviceTypeDef,
        InstanceNetworkInterfaceSpecificationTypeDef,
        RunInstancesRequestTypeDef,
    )

_IOPS_TYPES = frozenset({"io1", "io2", "gp3"})
"""Volume types that take a number of IOPS; EC2 refuses it on the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchParameters:
    """One launch of one instance. `client_token` is at most 64 characters; `iam_instance_profile` a name or an ARN."""

    ami_id: str
    instance_type: str
    client_token: str
    key_name: str = ""
    subnet_id: str = ""
    security_group_ids: tuple[str, ...] = ()
    assign_public_ip: bool = True
    volume_size_gb: int = 500
    volume_type: str = "io1"
    iops: int = 10000
    root_device: str = "/dev/sda1"
    iam_instance_profile: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def sends_iops(self) -> bool:
        """Whether the request names a number of IOPS."""
        return self.iops > 0 and self.volume_type in _IOPS_TYPES

    def to_json(self) -> dict[str, Any]:
        """A copy made of JSON's own types, with names as on the wire; `from_json` gives an equal object back."""
        values = asdict(self)
        values["security_group_ids"] = list(self.security_group_ids)
        values["tags"] = dict(sorted(self.tags.items()))
        return {_camel(name): value for name, value in values.items()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> LaunchParameters:
        """The parameters of a stored copy. Raises `ValueError` for a field unknown, missing or of a wrong type."""
        types = {_camel(f.name): (f.name, type(getattr(_EXAMPLE, f.name))) for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in stored.items():
            if key not in types:
                raise ValueError(f"launch parameters: {key!r} is not known to this version")
            name, kind = types[key]
            wanted = list if kind is tuple else kind
            if not isinstance(value, wanted) or (kind is int and isinstance(value, bool)):
                raise ValueError(f"launch parameters: {key!r} must be of type {wanted.__name__}")
            values[name] = tuple(value) if kind is tuple else value
        missing = [wire for wire in ("amiId", "instanceType", "clientToken") if not stored.get(wire)]
        if missing:
            raise ValueError(f"launch parameters: {', '.join(missing)} missing")
        return cls(**values)

    def request(self) -> RunInstancesRequestTypeDef:
        """The arguments of RunInstances: one instance, or none."""
        tags = [{"Key": key, "Value": value} for key, value in sorted(self.tags.items())]
        ebs: EbsBlockDeviceTypeDef = {
            "VolumeSize": self.volume_size_gb,
            "VolumeType": cast("Any", self.volume_type),
            "DeleteOnTermination": True,  # else each worker that ends leaves a disk that is billed
        }
        if self.sends_iops:
            ebs["Iops"] = self.iops
        request: dict[str, Any] = {
            "ImageId": self.ami_id,
            "InstanceType": self.instance_type,
            "MinCount": 1,
            "MaxCount": 1,
            "ClientToken": self.client_token,
            "BlockDeviceMappings": [{"DeviceName": self.root_device, "Ebs": ebs}],
        }
        if self.key_name:
            request["KeyName"] = self.key_name
        if self.subnet_id or not self.assign_public_ip:
            # EC2 takes the wish for a public address only here, and the groups then in the same place.
            interface: InstanceNetworkInterfaceSpecificationTypeDef = {
                "DeviceIndex": 0,
                "AssociatePublicIpAddress": self.assign_public_ip,
                "DeleteOnTermination": True,
            }
            if self.subnet_id:
                interface["SubnetId"] = self.subnet_id
            if self.security_group_ids:
                interface["Groups"] = list(self.security_group_ids)
            request["NetworkInterfaces"] = [interface]
        elif self.security_group_ids:
            request["SecurityGroupIds"] = list(self.security_group_ids)
        if self.iam_instance_profile:
            kind = "Arn" if self.iam_instance_profile.startswith("arn:") else "Name"
            request["IamInstanceProfile"] = {kind: self.iam_instance_profile}
        if tags:
            request["TagSpecifications"] = [{"ResourceType": kind, "Tags": tags} for kind in ("instance", "volume")]
        return cast("RunInstancesRequestTypeDef", request)


_EXAMPLE = LaunchParameters(ami_id="", instance_type="", client_token="", tags={})


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(word.title() for word in rest)
