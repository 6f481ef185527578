"""What a person may ask of a LabWorker: the machine, the CML on it, and how it serves.

Pure data. Secrets are never part of it, only references to them. What types cannot say (what a launch needs, what is
fixed once there is an instance) is `controllers.workers.kind.validate`. Pools and imports are made of the same parts.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from controllers.aws.place import Place
from lrm.model import Model, Timestamp
from lrm.secrets import SecretRef

_INSTANCE_ID = re.compile(r"i-[0-9a-f]{8,17}")
_REGION = re.compile(r"[a-z]{2}(-[a-z]+)+-\d{1,2}")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_TAGS_MOST = 40
"""EC2 takes 50 on a resource; the others are for lrm's own and the account's."""


def region_of(value: str) -> str:
    """A region's name. Raises ValueError for what cannot be one."""
    if not _REGION.fullmatch(value):
        raise ValueError("a region looks like us-east-1")
    return value


AccountName = Annotated[str, Field(max_length=63, pattern=r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$")]
"""An AWS account, by the short name under which the settings know it (LRM_AWS_ACCOUNTS); empty: the daemon's own."""


def instance_id_of(value: str) -> str:
    """An instance's id. Raises ValueError for what cannot be one."""
    if not _INSTANCE_ID.fullmatch(value):
        raise ValueError("an instance id looks like i-0123456789abcdef0")
    return value


class AwsSpec(Model):
    """The EC2 instance: either the one to launch, or with `instanceId` the one to adopt."""

    ami_id: str | None = Field(None, pattern=r"^ami-[0-9a-zA-Z]{4,40}$")
    instance_type: str = Field("m5zn.metal", pattern=r"^[a-z0-9][a-z0-9.-]{1,30}$")
    key_name: str | None = Field(None, min_length=1, max_length=255)
    subnet_id: str | None = Field(None, min_length=1, max_length=64)
    security_group_ids: list[str] = Field(default_factory=list, max_length=16)
    assign_public_ip: bool = True
    volume_size_gb: int = Field(500, ge=1, le=65536)
    volume_type: Literal["gp2", "gp3", "io1", "io2", "st1", "sc1", "standard"] = "io1"
    iops: int = Field(10000, ge=100, le=256000)
    iam_instance_profile: str | None = Field(None, min_length=1, max_length=2048)
    tags: dict[str, str] = Field(default_factory=dict, max_length=_TAGS_MOST)
    instance_id: str | None = None

    @field_validator("instance_id")
    @classmethod
    def _id(cls, value: str | None) -> str | None:
        return None if value is None else instance_id_of(value)

    @field_validator("tags")
    @classmethod
    def _tags(cls, tags: dict[str, str]) -> dict[str, str]:
        for key, value in tags.items():
            if key.startswith(("lrm/", "aws:")):
                raise ValueError(f"{key[:60]!r} is reserved: tags of lrm/ and aws: are not the user's")
            if not 1 <= len(key) <= 128 or len(value) > 256:
                raise ValueError(f"{key[:60]!r}: EC2 takes keys of 1 to 128 and values of up to 256 characters")
        return tags


class TlsSpec(Model):
    """How the worker's certificate is checked."""

    verify: bool = True
    ca_file: str | None = Field(None, pattern=r"^/.+")
    fingerprint: str | None = None

    @field_validator("fingerprint")
    @classmethod
    def _normal(cls, value: str | None) -> str | None:
        if value is not None and not _FINGERPRINT.fullmatch(re.sub(r"[:\s]", "", value.lower())):
            raise ValueError("a fingerprint is the certificate's sha256: 64 hex digits, colons allowed")
        return value

    @model_validator(mode="after")
    def _sense(self) -> TlsSpec:
        if self.ca_file and not self.verify:
            raise ValueError("caFile says nothing when verify is false")
        return self


class CmlSpec(Model):
    """The CML on it: where it answers, who logs in, what it is licensed for."""

    username: str = Field("admin", min_length=1, max_length=32)
    password_from: SecretRef | None = None
    license_token_from: SecretRef | None = None
    product_license: str | None = Field(None, pattern=r"^\w{1,20}$")
    api_base_url: str | None = Field(None, pattern=r"^https?://[^\s/?#@]+(/[^\s?#@]*)?$", max_length=512)
    use_private_ip: bool = False
    tls: TlsSpec = Field(default_factory=TlsSpec)
    max_nodes_unlicensed: int = Field(5, ge=0)
    max_nodes_licensed: int = Field(200, ge=0)


USER_CATEGORIES = (
    "start_lab",
    "stop_lab",
    "queue_node",
    "start_node",
    "stop_node",
    "wipe_node",
    "packet_capture",
    "import_lab",
    "export_lab",
    "user_activity",
    "user_group",
)
"""CML's categories of telemetry for what a person did; the others tell of the machine, its licence and its load."""


class IdleDetection(Model):
    """When a worker on which nobody does anything is stopped, to be started again on request."""

    enabled: bool = False
    timeout_minutes: int = Field(60, ge=1, le=7 * 24 * 60)
    rule: Literal["NoRunningLabs", "NoUserActivity"] = "NoRunningLabs"
    """NoRunningLabs: a lab that runs keeps its worker up. NoUserActivity: it does not, only what people do counts.
    A lab instance that is placed on a worker always keeps it up."""
    categories: list[str] = Field(default_factory=lambda: list(USER_CATEGORIES), min_length=1, max_length=64)
    """Categories of CML's telemetry that count as somebody's doing."""
    snooze_until: Timestamp | None = None
    """Not before; the annotation `lab.neuroglia.io/snooze-until` says the same, and the later one holds."""


class ServiceSpec(Model):
    """How a worker serves, whatever machine it is on."""

    lab_track: str = Field("", max_length=63)
    cml: CmlSpec = Field(default_factory=CmlSpec)
    auto_license: bool = True
    drain_timeout_minutes: int = Field(240, ge=0, le=7 * 24 * 60)
    max_concurrent_labs: int = Field(20, ge=0, le=10000)
    idle_detection: IdleDetection = Field(default_factory=IdleDetection)
    shared: bool = False
    observe_only: bool = False


class LabWorkerSpec(ServiceSpec):
    """What is wanted."""

    region: str
    account: AccountName = ""
    aws: AwsSpec = Field(default_factory=AwsSpec)
    desired_phase: Literal["Ready", "Draining", "Stopped", "Terminated"] = "Ready"
    deletion_policy: Literal["Terminate", "Retain"] | None = None

    _known_region = field_validator("region")(region_of)

    @property
    def place(self) -> Place:
        """Where the instance is, or is to be."""
        return Place(self.region, self.account)

    @property
    def adopts(self) -> bool:
        """Whether an existing instance is taken over instead of launching one."""
        return self.aws.instance_id is not None

    @property
    def retains(self) -> bool:
        """Whether the instance outlives this object."""
        if self.observe_only:
            return True
        if self.deletion_policy is None:
            return self.adopts
        return self.deletion_policy == "Retain"

    @property
    def wants_license(self) -> bool:
        return self.auto_license and self.cml.license_token_from is not None
