"""What AWS's codes and botocore's exceptions mean to us."""

from __future__ import annotations

import re
from typing import Any

import pytest
from botocore import exceptions as boto

from controllers.aws import errors
from controllers.aws.errors import (
    AwsAuthError,
    AwsBadInput,
    AwsCapacity,
    AwsError,
    AwsIdempotentMismatch,
    AwsNotFound,
    AwsOutcomeUnknown,
    AwsQuota,
    AwsServerError,
    AwsThrottled,
    AwsUnavailable,
    AwsWrongState,
    Ec2NotFound,
    Effect,
    from_botocore,
    from_code,
)
from controllers.aws.place import Place

CODES: list[tuple[str, int, type[AwsError], str]] = [
    ("UnauthorizedOperation", 403, AwsAuthError, "the role lacks the right"),
    ("AuthFailure", 401, AwsAuthError, "wrong credentials"),
    ("ExpiredToken", 400, AwsAuthError, "temporary credentials ran out"),
    ("InvalidInstanceID.NotFound", 400, Ec2NotFound, "the one proof that an instance is gone"),
    ("InvalidInstanceID.Malformed", 400, AwsBadInput, "says nothing about an instance"),
    ("InvalidAMIID.NotFound", 400, AwsBadInput, "a launch that can never work, not a missing instance"),
    ("InvalidGroup.NotFound", 400, AwsBadInput, "as for an image"),
    ("InvalidParameterValue", 400, AwsBadInput, "plainly wrong"),
    ("InstanceLimitExceeded", 400, AwsQuota, "the account's limit"),
    ("VcpuLimitExceeded", 400, AwsQuota, "the account's limit, in vCPUs"),
    ("InsufficientInstanceCapacity", 500, AwsCapacity, "AWS sends it as a 500, but nothing was launched"),
    ("RequestLimitExceeded", 503, AwsThrottled, "AWS sends it as a 503, but nothing was carried out"),
    ("SomethingNew", 429, AwsThrottled, "the status says enough"),
    ("IncorrectInstanceState", 400, AwsWrongState, "look again and it may pass"),
    ("IdempotentParameterMismatch", 400, AwsIdempotentMismatch, "the token belongs to another launch"),
    ("IdempotentInstanceTerminated", 400, AwsIdempotentMismatch, "the token's instance has ended"),
    ("InternalError", 500, AwsServerError, "may have been carried out"),
    ("InvalidParameterValue", 500, AwsServerError, "a 5xx is no refusal, whatever its code"),
    ("InvalidInstanceID.NotFound", 502, AwsServerError, "a broken gateway proves no absence"),
    ("AuthFailure", 500, AwsServerError, "nor a refusal"),
    ("", 502, AwsServerError, "a proxy's page without a code"),
    ("", 400, AwsBadInput, "refused without a word"),
    ("", 302, AwsServerError, "a redirect is no answer of EC2"),
]


@pytest.mark.parametrize(("code", "status", "kind", "why"), CODES, ids=[f"{c[0]}-{c[1]}" for c in CODES])
def test_each_code_becomes_the_error_that_says_what_to_do(
    code: str, status: int, kind: type[AwsError], why: str
) -> None:
    place = Place("eu-west-1", "training")
    error = from_code(code, "because", status=status, operation="RunInstances", place=place, request_id="r-1")
    assert type(error) is kind, why
    assert error.request_id == "r-1"
    assert "RunInstances in training/eu-west-1" in str(error)
    assert error.code == (code or f"HTTP {status}")


LOST = boto.ConnectionClosedError(endpoint_url="https://ec2")
LATE = boto.ReadTimeoutError(endpoint_url="https://ec2")
NOBODY = boto.EndpointConnectionError(endpoint_url="https://ec2")
GARBLED = boto.IncompleteReadError(actual_bytes=1, expected_bytes=2)
EXCEPTIONS: list[tuple[Exception, Effect, bool, type[AwsError], str]] = [
    (NOBODY, Effect.CREATING, True, AwsUnavailable, "nobody was reached, so nothing was launched"),
    (boto.ConnectTimeoutError(endpoint_url="x"), Effect.CREATING, True, AwsUnavailable, "as above"),
    (LOST, Effect.CREATING, True, AwsOutcomeUnknown, "the launch may have been made"),
    (LATE, Effect.CREATING, True, AwsOutcomeUnknown, "the launch may yet be made"),
    (LOST, Effect.REPEATABLE, True, AwsOutcomeUnknown, "the instance may be stopping"),
    (LOST, Effect.READ, True, AwsUnavailable, "a read has nothing that could be carried out"),
    (GARBLED, Effect.CREATING, True, AwsOutcomeUnknown, "an answer, so it was carried out or not: unknown"),
    (GARBLED, Effect.READ, True, AwsServerError, "never an empty list"),
    (ValueError("Invalid endpoint: nonsense"), Effect.CREATING, False, AwsUnavailable, "it never left"),
    (ValueError("what is this"), Effect.CREATING, True, AwsOutcomeUnknown, "it may have left"),
    (boto.SSLError(endpoint_url="x", error="CERTIFICATE_VERIFY_FAILED"), Effect.CREATING, True, AwsUnavailable, "no"),
    (boto.SSLError(endpoint_url="x", error="bad record mac"), Effect.CREATING, True, AwsOutcomeUnknown, "in flight"),
    (boto.NoCredentialsError(), Effect.READ, False, AwsAuthError, "nobody to be"),
    (boto.InvalidRegionError(region_name="x y"), Effect.READ, False, AwsBadInput, "there is no such region"),
]


@pytest.mark.parametrize(("error", "effect", "sent", "kind", "why"), EXCEPTIONS)
def test_what_is_not_known_to_have_stopped_before_sending_counts_as_sent(
    error: Exception, effect: Effect, sent: bool, kind: type[AwsError], why: str
) -> None:
    assert type(from_botocore(error, effect, operation="X", place=Place("r"), sent=sent)) is kind, why


def test_messages_carry_neither_aws_own_words_about_credentials_nor_passwords_of_urls() -> None:
    said = "The request signature we calculated does not match. The Canonical String was GET / AKIASECRET"
    refused = from_code("SignatureDoesNotMatch", said, status=403)
    assert "AKIASECRET" not in f"{refused} {refused.message} {refused!r}"
    lost = boto.EndpointConnectionError(endpoint_url="https://user:hunter2@proxy.example/x?token=hunter3")
    told = str(from_botocore(lost, Effect.READ, operation="X", place=Place("r")))
    assert "proxy.example" in told
    assert "hunter" not in told


def test_a_long_message_is_cut() -> None:
    assert len(str(from_code("InvalidParameterValue", "x" * 100_000, status=400))) < 700


def test_the_table_in_the_docstring_is_what_the_classes_say() -> None:
    """A reader plans by that table."""
    rows = re.findall(r"[├└]── (\w+)\s+(yes|no)\s+(yes|no)", errors.__doc__ or "")
    kinds: dict[str, Any] = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, AwsError) and kind is not AwsError
    }
    assert {name for name, _, _ in rows} == set(kinds)
    for name, retryable, refusal in rows:
        assert kinds[name].retryable == (retryable == "yes"), name
        assert kinds[name].definite_refusal == (refusal == "yes"), name
    assert issubclass(Ec2NotFound, AwsNotFound)
