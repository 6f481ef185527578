"""Credentials that expire while the daemon runs: what somebody renews is taken without a restart, and not before."""

from __future__ import annotations

from pathlib import Path

import pytest

from controllers.aws.ec2 import Ec2
from controllers.aws.errors import AwsAuthError
from equipment.aws import HERE, LaterClock, lying_server, reply

EXPIRED = reply(
    "<Response><Errors><Error><Code>ExpiredToken</Code><Message>expired</Message></Error></Errors>"
    "<RequestID>r</RequestID></Response>",
    status=400,
)
NOTHING_FOUND = reply(
    "<DescribeInstancesResponse><requestId>r</requestId><reservationSet/></DescribeInstancesResponse>"
)


def renew(file: Path, key: str) -> None:
    file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")


async def test_credentials_that_expired_are_read_again_and_not_at_every_call(
    aws_credentials: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file, clock = tmp_path / "credentials", LaterClock()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    renew(file, "AKIAOLD")
    answers = (EXPIRED, EXPIRED, EXPIRED, NOTHING_FOUND)
    async with lying_server(*answers) as (url, seen), Ec2(clock, endpoint_url=url) as ec2:

        async def ask() -> None:
            assert await ec2.find_by_tags(HERE, {"a": "b"}) == []

        for _ in range(2):
            with pytest.raises(AwsAuthError):
                await ask()
        renew(file, "AKIANEW")
        clock.ahead = 31
        with pytest.raises(AwsAuthError):
            await ask()
        await ask()
    assert [b"AKIANEW" in request for request in seen] == [False, False, False, True]
