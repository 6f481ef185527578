"""Several AWS accounts side by side: whose credentials a call has, and what happens when they are not to be had."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import weakref
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.config import Config

from controllers.aws.accounts import Accounts, Making
from controllers.aws.calls import IN_FLIGHT
from controllers.aws.cloudwatch import CloudWatch, cpu
from controllers.aws.ec2 import Ec2, Ec2Instance
from controllers.aws.errors import (
    AwsAuthError,
    AwsError,
    AwsThrottled,
    AwsUnavailable,
    AwsUnknownRegion,
    AwsWrongAccount,
    Ec2NotFound,
    Effect,
)
from controllers.aws.place import Place
from controllers.aws.settings import AwsAccount
from controllers.aws.simulator import AwsShim
from equipment.aws import (
    ABSENT,
    ACCOUNTS,
    CLASSES,
    CLASSES_NUMBER,
    EXAMS,
    EXAMS_NUMBER,
    HERE,
    PARTNER,
    PARTNER_NUMBER,
    REGION,
    ROLE,
    LaterClock,
    launch,
    lying_server,
    reply,
    write_profiles,
)
from equipment.waiting import until
from storage.clock import SystemClock


@pytest.fixture
async def fleet(aws_shim: AwsShim, profiles: Path) -> AsyncIterator[Ec2]:
    async with Ec2(SystemClock(), ACCOUNTS, endpoint_url=aws_shim.url) as client:
        yield client


async def test_instances_of_one_account_are_invisible_from_the_others(fleet: Ec2, aws_shim: AwsShim) -> None:
    places = (HERE, EXAMS, CLASSES, PARTNER)
    # At once, so that a role's first calls meet before it is assumed.
    launches = [fleet.run_instance(place, launch(f"in-{place}", tags={"fleet": "1"})) for place in places]
    looks = [fleet.find_by_tags(PARTNER, {"another": "one"}) for _ in range(4)]
    (*launched, _, _, _, _) = await asyncio.gather(*launches, *looks)
    made = dict(zip(places, launched, strict=True))
    for place in places:
        assert [i.id for i in await fleet.find_by_tags(place, {"fleet": "1"})] == [made[place].id]
    with pytest.raises(Ec2NotFound):
        await fleet.terminate(CLASSES, made[EXAMS].id)
    numbers = {world.account for world, _ in aws_shim.worlds.everywhere()}
    assert numbers == {EXAMS_NUMBER, CLASSES_NUMBER, PARTNER_NUMBER, "123456789012"}
    assert aws_shim.calls["AssumeRole"] == 1, "a role is assumed once for all its calls"


async def test_credentials_of_one_account_that_are_refused_concern_no_other(fleet: Ec2, aws_shim: AwsShim) -> None:
    aws_shim.faults.add({"action": "*", "fault": "auth", "times": 0, "account": EXAMS_NUMBER})
    for _ in range(2):
        with pytest.raises(AwsAuthError, match=f"in exams/{REGION}"):
            await fleet.find_by_tags(EXAMS, {"a": "b"})
        assert await fleet.find_by_tags(CLASSES, {"a": "b"}) == []
    aws_shim.faults.clear()
    assert await fleet.find_by_tags(EXAMS, {"a": "b"}) == []


async def test_an_account_whose_calls_hang_holds_up_no_other(fleet: Ec2, aws_shim: AwsShim) -> None:
    fault = {"action": "DescribeInstances", "fault": "dropped", "seconds": 60, "times": 0, "account": EXAMS_NUMBER}
    aws_shim.faults.add(fault)
    hanging = [asyncio.create_task(fleet.describe_instance(EXAMS, ABSENT)) for _ in range(IN_FLIGHT + 1)]
    try:
        await until(lambda: aws_shim.calls["DescribeInstances"] == IN_FLIGHT, "all threads of the account")
        assert await fleet.find_by_tags(CLASSES, {"a": "b"}) == []
        assert not any(task.done() for task in hanging)
    finally:
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)


async def test_a_role_is_assumed_anew_when_its_credentials_are_refused(aws_shim: AwsShim, profiles: Path) -> None:
    clock = LaterClock()
    async with Ec2(clock, ACCOUNTS, endpoint_url=aws_shim.url) as ec2:
        one = await ec2.run_instance(PARTNER, launch("role"))
        aws_shim.worlds.forget_roles()
        with pytest.raises(AwsAuthError):
            await ec2.describe_instance(PARTNER, one.id)
        clock.ahead = 31
        with pytest.raises(AwsAuthError):
            await ec2.describe_instance(PARTNER, one.id)
        assert (await ec2.describe_instance(PARTNER, one.id)).id == one.id
    assert aws_shim.calls["AssumeRole"] == 2


def given(key: str, lasts: timedelta) -> bytes:
    """STS's answer to AssumeRole."""
    until_then = (datetime.now(UTC) + lasts).strftime("%Y-%m-%dT%H:%M:%SZ")
    keys = f"<AccessKeyId>{key}</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken>"
    result = f"<Credentials>{keys}<Expiration>{until_then}</Expiration></Credentials>"
    inner = (
        f"<AssumeRoleResult>{result}</AssumeRoleResult><ResponseMetadata><RequestId>r</RequestId></ResponseMetadata>"
    )
    return reply(f"<AssumeRoleResponse>{inner}</AssumeRoleResponse>")


NOTHING_FOUND = reply(
    "<DescribeInstancesResponse><requestId>r</requestId><reservationSet/></DescribeInstancesResponse>"
)


async def test_a_roles_credentials_are_renewed_before_they_end(aws_credentials: None) -> None:
    soon, later = timedelta(minutes=5), timedelta(hours=1)
    answers = (given("ASIAFIRST", soon), NOTHING_FOUND, given("ASIASECOND", later), NOTHING_FOUND)
    async with lying_server(*answers) as (url, seen), Ec2(SystemClock(), ACCOUNTS, endpoint_url=url) as ec2:
        for _ in range(3):
            assert await ec2.find_by_tags(PARTNER, {"a": "b"}) == []
    keys = [re.findall(rb"Credential=(\w+)/", request) for request in seen]
    assert keys == [[b"testing"], [b"ASIAFIRST"], [b"testing"], [b"ASIASECOND"], [b"ASIASECOND"]]


async def test_a_role_is_assumed_with_its_external_id_and_by_whom_the_profile_says(
    aws_credentials: None, profiles: Path
) -> None:
    accounts = {"partner": ROLE.model_copy(update={"profile": "exams"})}
    answers = (given("ASIATHEIRS", timedelta(hours=1)), NOTHING_FOUND)
    async with lying_server(*answers) as (url, seen), Ec2(SystemClock(), accounts, endpoint_url=url) as ec2:
        for _ in range(2):
            assert await ec2.find_by_tags(PARTNER, {"a": "b"}) == []
    assert len(seen) == 3
    assert f"Credential={EXAMS_NUMBER}/".encode() in seen[0]
    assert b"ExternalId=lab-42" in seen[0]
    assert all(b"Credential=ASIATHEIRS/" in request for request in seen[1:])


def refusal(code: str, status: int) -> bytes:
    error = f"<Error><Type>Sender</Type><Code>{code}</Code><Message>AKIASECRET is not allowed</Message></Error>"
    return reply(f"<ErrorResponse>{error}<RequestId>r</RequestId></ErrorResponse>", status=status)


@pytest.mark.parametrize(
    ("answer", "kind", "why"),
    [
        (refusal("AccessDenied", 403), AwsAuthError, "the role does not trust us"),
        (refusal("ExpiredToken", 400), AwsAuthError, "our own credentials have expired"),
        (refusal("ValidationError", 400), AwsAuthError, "nobody but who wrote the settings can help"),
        (refusal("RegionDisabledException", 403), AwsAuthError, "as above"),
        (refusal("Throttling", 400), AwsThrottled, "a storm of our own"),
        (refusal("InternalFailure", 500), AwsUnavailable, "nothing was launched, whatever STS did"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nbroken", AwsUnavailable, "as above"),
        (reply("<html>a portal</html>"), AwsUnavailable, "as above"),
    ],
)
async def test_what_sts_refuses_was_certainly_not_launched(
    aws_credentials: None, answer: bytes, kind: type[AwsError], why: str
) -> None:
    async with lying_server(answer) as (url, seen), Ec2(SystemClock(), ACCOUNTS, endpoint_url=url) as ec2:
        with pytest.raises(kind, match="role/lrm cannot be assumed") as raised:
            await ec2.run_instance(PARTNER, launch("never"))
    assert raised.value.definite_refusal, why
    assert raised.value.retryable, why
    assert "AKIASECRET" not in str(raised.value)
    assert all(b"Action=AssumeRole" in request for request in seen), why


async def test_a_profile_that_is_renewed_serves_its_role_without_a_restart(
    aws_credentials: None, profiles: Path
) -> None:
    accounts, clock = {"partner": ROLE.model_copy(update={"profile": "exams"})}, LaterClock()
    expired, answer = refusal("ExpiredToken", 400), given("ASIATHEIRS", timedelta(hours=1))
    async with (
        lying_server(expired, expired, answer, NOTHING_FOUND) as (url, seen),
        Ec2(clock, accounts, endpoint_url=url) as ec2,
    ):
        for ahead in (0, 31):
            clock.ahead = ahead
            with pytest.raises(AwsAuthError):
                await ec2.find_by_tags(PARTNER, {"a": "b"})
            write_profiles(profiles, exams=CLASSES_NUMBER)
        assert await ec2.find_by_tags(PARTNER, {"a": "b"}) == []
    keys = [re.findall(r"Credential=(\w+)/", request.decode()) for request in seen]
    assert keys == [[EXAMS_NUMBER], [EXAMS_NUMBER], [CLASSES_NUMBER], ["ASIATHEIRS"]]


@pytest.mark.parametrize(
    ("account", "told"),
    [
        (AwsAccount(profile="exams"), "'exams' has no credentials of its own"),
        (AwsAccount(profile="mars"), "there is no profile 'mars'"),
        (AwsAccount(profile="exams", role_arn=ROLE.role_arn), "'exams' has no credentials of its own"),
    ],
)
async def test_a_profile_without_credentials_never_becomes_the_daemons_own_account(
    aws_shim: AwsShim, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, account: AwsAccount, told: str
) -> None:
    config = tmp_path / "config"
    config.write_text("[profile exams]\nregion = us-east-1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    answer = b'{"AccessKeyId": "k", "SecretAccessKey": "s", "Token": "t", "Expiration": "2099-01-01T00:00:00Z"}'
    container = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(answer), answer)
    async with lying_server(container) as (url, _):
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", url)
        async with Ec2(SystemClock(), {"exams": account}, endpoint_url=aws_shim.url) as ec2:
            with pytest.raises(AwsAuthError, match=told):
                await ec2.run_instance(EXAMS, launch("stray"))
            assert not aws_shim.calls
            await ec2.run_instance(HERE, launch("own"))


@pytest.mark.parametrize(
    ("variable", "content"),
    [
        ("BOTO_CONFIG", "[Credentials]\naws_access_key_id = testing\naws_secret_access_key = s\n"),
        ("AWS_CREDENTIAL_FILE", "AWSAccessKeyId=testing\nAWSSecretKey=s\n"),
    ],
)
async def test_files_of_older_tools_are_no_profiles_credentials(
    aws_shim: AwsShim, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, content: str
) -> None:
    config, old = tmp_path / "config", tmp_path / "old"
    config.write_text("[profile exams]\nregion = us-east-1\n")
    old.write_text(content)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv(variable, str(old))
    async with Ec2(SystemClock(), {"exams": AwsAccount(profile="exams")}, endpoint_url=aws_shim.url) as ec2:
        with pytest.raises(AwsAuthError, match="'exams' has no credentials of its own"):
            await ec2.run_instance(EXAMS, launch("stray"))
    assert not aws_shim.calls


async def test_a_profile_that_is_written_later_is_taken_without_a_restart(
    fleet: Ec2, aws_shim: AwsShim, profiles: Path
) -> None:
    write_profiles(profiles)
    with pytest.raises(AwsAuthError, match="there is no profile 'exams'"):
        await fleet.run_instance(EXAMS, launch("early"))
    write_profiles(profiles, exams=EXAMS_NUMBER)
    launched: Ec2Instance = await fleet.run_instance(EXAMS, launch("early"))
    found = aws_shim.worlds.find(launched.id)
    assert found is not None
    assert found[0].account == EXAMS_NUMBER


async def test_credentials_of_another_account_are_told_and_read_again(aws_shim: AwsShim, profiles: Path) -> None:
    clock = LaterClock()
    async with Ec2(clock, ACCOUNTS, endpoint_url=aws_shim.url) as ec2:
        for place, number in ((HERE, "123456789012"), (EXAMS, EXAMS_NUMBER), (PARTNER, PARTNER_NUMBER)):
            await ec2.check_owner(place, number)
        assert (await ec2.run_instance(EXAMS, launch("owned"))).owner == EXAMS_NUMBER
        write_profiles(profiles, exams=CLASSES_NUMBER)
        clock.ahead = 31
        with pytest.raises(AwsWrongAccount, match=f"of account {EXAMS_NUMBER}, and not of {CLASSES_NUMBER}"):
            await ec2.check_owner(EXAMS, CLASSES_NUMBER)
        await ec2.check_owner(EXAMS, CLASSES_NUMBER)


async def test_all_services_of_an_account_have_its_role_assumed_once(aws_shim: AwsShim, profiles: Path) -> None:
    clock = LaterClock()
    accounts = Accounts(ACCOUNTS, clock, endpoint_url=aws_shim.url)
    async with Ec2(clock, accounts) as ec2, CloudWatch(clock, accounts) as cloud_watch:
        await ec2.run_instance(PARTNER, launch("role"))
        await cloud_watch.latest(PARTNER, [cpu(ABSENT)])
        assert aws_shim.calls["AssumeRole"] == 1
        aws_shim.worlds.forget_roles()
        clock.ahead = 31
        with pytest.raises(AwsAuthError):
            await ec2.describe_instance(PARTNER, ABSENT)
        await cloud_watch.latest(PARTNER, [cpu(ABSENT)])
    assert aws_shim.calls["AssumeRole"] == 2, "what one service was refused, none of them uses again"


async def test_a_profiles_program_that_never_ends_keeps_nobody_from_renewing_credentials(
    aws_credentials: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, pipe = tmp_path / "config", tmp_path / "pipe"
    os.mkfifo(pipe)
    config.write_text(f"[profile exams]\nregion = us-east-1\ncredential_process = cat {pipe}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    accounts = Accounts({"exams": AwsAccount(profile="exams")}, SystemClock())
    made = asyncio.create_task(asyncio.to_thread(accounts.client, EXAMS, "sts", Effect.READ, Making(Config(), str)))
    end = await asyncio.to_thread(pipe.open, "w")  # opens when the program reads
    try:
        async with asyncio.timeout(30):
            await asyncio.to_thread(accounts.refused, EXAMS)
        assert not made.done()
    finally:
        end.write('{"Version": 1, "AccessKeyId": "k", "SecretAccessKey": "s"}')
        end.close()
        await made
    accounts.close()


async def test_a_region_that_may_not_be_named_is_asked_of_nobody(aws_shim: AwsShim) -> None:
    nowhere = Place("aa-abc-1")
    async with Ec2(SystemClock(), endpoint_url=aws_shim.url) as ec2:
        assert ec2.knows(HERE)
        assert not ec2.knows(nowhere)
        with pytest.raises(AwsUnknownRegion, match=r"'aa-abc-1'.*LRM_AWS_REGIONS") as raised:
            await ec2.run_instance(nowhere, launch("stray"))
        assert raised.value.definite_refusal
        assert raised.value.retryable, "its worker waits for the settings"
    assert not aws_shim.calls
    accounts = Accounts({}, SystemClock(), regions=["aa-abc-1"], endpoint_url=aws_shim.url)
    async with Ec2(SystemClock(), accounts) as ec2:
        assert await ec2.find_by_tags(nowhere, {"a": "b"}) == []
        assert not ec2.knows(HERE)


async def test_a_client_that_nobody_uses_goes_when_another_is_made(aws_shim: AwsShim) -> None:
    clock = LaterClock()
    accounts = Accounts({}, clock, endpoint_url=aws_shim.url)
    places = [Place(region) for region in ("eu-west-1", "eu-west-2", "eu-west-3")]

    def client(place: Place) -> Any:
        return accounts.client(place, "ec2", Effect.READ, Making(Config(), lambda _: None))

    first, second = (weakref.ref(client(place)) for place in places[:2])
    clock.ahead = 800
    client(places[1])
    gc.collect()
    assert first() is not None, "it may be asked for soon"
    clock.ahead = 1000
    client(places[2])
    gc.collect()
    assert first() is None
    assert second() is client(places[1]), "who is used stays"


async def test_credentials_of_another_account_than_the_settings_number_do_nothing(
    aws_shim: AwsShim, profiles: Path
) -> None:
    clock = LaterClock()
    accounts = {
        "exams": AwsAccount(profile="exams", number=CLASSES_NUMBER),
        "partner": ROLE.model_copy(update={"number": PARTNER_NUMBER}),
    }
    async with Ec2(clock, accounts, endpoint_url=aws_shim.url) as ec2:
        await ec2.run_instance(PARTNER, launch("role"))

        async def refused() -> None:
            with pytest.raises(AwsWrongAccount, match=f"of account {EXAMS_NUMBER}, and not of {CLASSES_NUMBER}"):
                await ec2.run_instance(EXAMS, launch("stray"))

        for _ in range(3):
            await refused()
        assert (aws_shim.calls["GetCallerIdentity"], aws_shim.calls["RunInstances"]) == (1, 1)
        write_profiles(profiles, exams=CLASSES_NUMBER)
        clock.ahead = 31
        await refused()
        assert (await ec2.run_instance(EXAMS, launch("right"))).owner == CLASSES_NUMBER


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (refusal("InvalidClientTokenId", 403), AwsAuthError),
        (refusal("InternalFailure", 500), AwsUnavailable),
        (reply("<html>a portal</html>"), AwsUnavailable),
    ],
)
async def test_where_sts_does_not_say_whose_credentials_are_nothing_is_sent(
    profiles: Path, answer: bytes, kind: type[AwsError]
) -> None:
    accounts = {"exams": AwsAccount(profile="exams", number=EXAMS_NUMBER)}
    async with lying_server(answer) as (url, seen), Ec2(SystemClock(), accounts, endpoint_url=url) as ec2:
        with pytest.raises(kind) as raised:
            await ec2.run_instance(EXAMS, launch("never"))
    assert raised.value.definite_refusal
    assert all(b"Action=GetCallerIdentity" in request for request in seen)
