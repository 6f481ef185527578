"""Settings of the AWS accounts: what a name that resources carry means.

No secret is here: a profile is one of boto3's own configuration files, a role is assumed with credentials found there.
"""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lrm.settings import LrmSettings

_NAME = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"


class AwsAccount(BaseModel):
    """How to get into an account: a profile's credentials, or a role assumed with them or with the daemon's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    profile: str = Field("", max_length=255)
    """A profile of boto3's configuration files, with credentials of its own."""
    role_arn: str = Field("", max_length=640, pattern=r"^(arn:[\w-]+:iam::\d{12}:role/[\w+=,.@/-]+)?$")
    external_id: str = Field("", max_length=1224, pattern=r"^([\w+=,.@:/-]+)?$")
    """What the role's owner wants to be told by whoever assumes it; not a secret."""

    number: str = Field("", pattern=r"^(\d{12})?$")
    """AWS's number of the account, if the credentials are to be refused when they are another's."""
    namespaces: tuple[Annotated[str, Field(pattern=_NAME)], ...] = ()
    """Those whose objects may name it; none: all."""

    def serves(self, namespace: str) -> bool:
        """Whether objects of the namespace may name the account."""
        return not self.namespaces or namespace in self.namespaces

    @model_validator(mode="after")
    def _sense(self) -> Self:
        if not (self.profile or self.role_arn):
            raise ValueError("an account needs a profile or a role_arn")
        if self.external_id and not self.role_arn:
            raise ValueError("an external_id says nothing without a role_arn")
        if self.number and self.role_arn and self.role_arn.split(":")[4] != self.number:
            raise ValueError("the role_arn is one of another account than the number says")
        return self


class AwsSettings(LrmSettings):
    """What the clients of AWS can be told."""

    aws_accounts: dict[str, AwsAccount] = Field(
        default_factory=dict,
        description="AWS accounts by the short name that spec.account carries, each with profile, role_arn, "
        "external_id, its number if that is to be checked, and the namespaces that may name it (none: all), as JSON "
        'in the environment: {"exams": {"role_arn": "arn:aws:iam::111122223333:role/lrm", "namespaces": ["exams"]}}. '
        "Without a name it is the account of the daemon's own credentials.",
    )

    aws_regions: tuple[str, ...] = Field(
        (),
        description="AWS regions that resources may name, as JSON in the environment. Empty: all that botocore knows, "
        "which may lack one that is newer than it.",
    )

    @field_validator("aws_accounts")
    @classmethod
    def _names(cls, accounts: dict[str, AwsAccount]) -> dict[str, AwsAccount]:
        for name in accounts:
            if not re.fullmatch(_NAME, name):
                raise ValueError(f"{name[:70]!r}: an account's name has up to 63 of a-z, 0-9 and -, none at its ends")
        return accounts
