"""What LRM_AWS_ACCOUNTS may say, and the names by which resources call the accounts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from controllers.aws.place import Place
from controllers.aws.settings import AwsAccount, AwsSettings
from controllers.workers.spec import LabWorkerSpec

ROLE = "arn:aws:iam::111122223333:role/teams/lrm"


def test_accounts_come_from_the_environment_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"exams": {"role_arn": ROLE, "external_id": "lab-42"}, "a": {"profile": "classes"}}
    monkeypatch.setenv("LRM_AWS_ACCOUNTS", json.dumps(said))
    settings = AwsSettings()
    assert settings.aws_accounts["exams"] == AwsAccount(role_arn=ROLE, external_id="lab-42")
    assert settings.aws_accounts["a"].profile == "classes"
    monkeypatch.delenv("LRM_AWS_ACCOUNTS")
    assert AwsSettings().aws_accounts == {}


@pytest.mark.parametrize(
    ("accounts", "told"),
    [
        ({"exams": {}}, "needs a profile or a role_arn"),
        ({"exams": {"profile": "p", "external_id": "x"}}, "without a role_arn"),
        ({"exams": {"role_arn": "arn:aws:iam::1:role/x"}}, "pattern"),
        ({"exams": {"profile": "p", "secret_access_key": "x"}}, "secret_access_key"),
        ({"exams": {"profile": "p", "number": "1"}}, "pattern"),
        ({"exams": {"role_arn": ROLE, "number": "444455556666"}}, "of another account"),
        ({"exams": {"profile": "p", "namespaces": ["Exams/*"]}}, "pattern"),
        ({"": {"profile": "p"}}, "name has up to 63"),
        ({"Exams": {"profile": "p"}}, "name has up to 63"),
        ({"-": {"profile": "p"}}, "name has up to 63"),
        ({"a" * 64: {"profile": "p"}}, "name has up to 63"),
    ],
)
def test_what_makes_no_sense_is_refused(accounts: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        AwsSettings(aws_accounts=accounts)


@pytest.mark.parametrize("name", ["", "a", "exams", "exams-2026", "a" * 63])
def test_every_name_that_settings_take_a_worker_can_say(name: str) -> None:
    spec = LabWorkerSpec(region="us-east-1", account=name)
    assert spec.place == Place("us-east-1", name)
    if name:
        assert AwsSettings(aws_accounts={name: AwsAccount(profile="p")}).aws_accounts


@pytest.mark.parametrize("name", ["Exams", "-", "a-", "a/b", "a b", "a" * 64])
def test_a_worker_cannot_say_what_is_no_name(name: str) -> None:
    with pytest.raises(ValidationError):
        LabWorkerSpec(region="us-east-1", account=name)


def test_a_place_is_told_by_its_account_and_region() -> None:
    assert [str(Place("us-east-1")), str(Place("us-east-1", "exams"))] == ["us-east-1", "exams/us-east-1"]
