"""Every error of the packages has an answer; the advice in it is what clients act on."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web

import lrm.errors
import storage.errors
from lrm.api.status import About, RequestError, answer_of, expected, response_headers, status_document
from lrm.errors import Cause, LrmError
from storage.base import Entry, Guard
from storage.errors import StorageError

ENTRY = Entry("/lrm/r/telescopes/default/x", b"secret-value", 7, 7)
INSTANCES: list[Exception] = [
    lrm.errors.Invalid("x", [Cause("spec.a", "FieldValueInvalid", "no")]),
    lrm.errors.Forbidden("no"),
    lrm.errors.ResourceNotFound("telescopes", "x"),
    lrm.errors.ResourceExists("telescopes", "x"),
    lrm.errors.ResourceConflict("telescopes", "x"),
    lrm.errors.Undecodable(ENTRY.key, "broken"),
    lrm.errors.NotLeading("no"),
    lrm.errors.Fenced("no"),
    lrm.errors.CacheBehind("late"),
    lrm.errors.HistoryGone("gone"),
    lrm.errors.NotOpen("starting"),
    storage.errors.NotFound(ENTRY.key),
    storage.errors.AlreadyExists(ENTRY),
    storage.errors.Conflict(ENTRY.key, ENTRY),
    storage.errors.GuardFailed(Guard("/lrm/leader/x", 3)),
    storage.errors.Compacted(5),
    storage.errors.FutureRevision(9, 5),
    storage.errors.StoreReset("restored"),
    storage.errors.TooLarge("big"),
    storage.errors.InvalidKey("bad"),
    storage.errors.PermissionDenied("user lrm"),
    storage.errors.Unavailable("away"),
    storage.errors.NoSpace("full"),
    storage.errors.OutcomeUnknown("lost"),
]
NOT_FOR_HANDLERS = {"TerminalError", "RetryLater", "LeaseNotFound", "RedisFailed"}
"""Errors of reconciles, leases and bookmarks; a handler that meets one has a defect, and it is a 500."""


def _subclasses(base: type[Any]) -> set[type[Any]]:
    return {base} | {s for child in base.__subclasses__() for s in _subclasses(child)}


def test_every_error_class_of_the_packages_is_thought_of() -> None:
    declared = {
        kind
        for base, module in ((LrmError, "lrm.errors"), (StorageError, "storage.errors"))
        for kind in _subclasses(base) - {base}
        if kind.__module__ == module
    }
    missing = {k.__name__ for k in declared} - {type(e).__name__ for e in INSTANCES} - NOT_FOR_HANDLERS
    assert not missing


@pytest.mark.parametrize("error", INSTANCES, ids=lambda e: type(e).__name__)
def test_each_is_expected_and_has_a_code_of_its_own_kind(error: Exception) -> None:
    assert expected(error)
    for writing in (True, False):
        answer = answer_of(error, "id", writing=writing)
        assert 400 <= answer.code < 600
        assert "secret-value" not in answer.message


def test_only_what_is_certainly_not_written_says_come_again_on_a_write() -> None:
    """Kubernetes clients repeat any verb on a Retry-After."""
    told = {type(e).__name__ for e in INSTANCES if answer_of(e, "id", writing=True).retry_after is not None}
    assert told == {"NotLeading", "Fenced", "CacheBehind", "NotOpen", "Unavailable", "NoSpace"}


def test_an_unknown_outcome_is_504_without_advice() -> None:
    for error in (storage.errors.OutcomeUnknown("lost"), storage.errors.StoreReset("restored")):
        answer = answer_of(error, "id", writing=True)
        assert (answer.code, answer.reason, answer.retry_after) == (504, "Timeout", None)
        assert "may have been made" in answer.message
        assert "Retry-After" not in response_headers(answer)


def test_a_defect_says_nothing_but_its_request() -> None:
    error = RuntimeError("password=hunter2")
    assert not expected(error)
    answer = answer_of(error, "abc123", writing=False)
    assert answer.code == 500
    assert "abc123" in answer.message
    assert "hunter2" not in str(status_document(answer))


def test_the_stores_refusal_of_our_credentials_is_not_told_in_detail() -> None:
    assert "user lrm" not in answer_of(storage.errors.PermissionDenied("user lrm"), "id", writing=True).message


def test_a_status_carries_every_cause_and_the_object() -> None:
    error = lrm.errors.Invalid("x", [Cause("spec.a", "FieldValueRequired", "needed"), Cause("spec.b", "Odd", "odd")])
    document = status_document(answer_of(error, "id", writing=True), About("g.io", "telescopes", "x"))
    assert document["details"] == {
        "name": "x",
        "group": "g.io",
        "kind": "telescopes",
        "causes": [
            {"reason": "FieldValueRequired", "message": "needed", "field": "spec.a"},
            {"reason": "Odd", "message": "odd", "field": "spec.b"},
        ],
    }


def test_an_object_that_is_missing_is_named_as_kubernetes_does() -> None:
    answer = answer_of(lrm.errors.ResourceNotFound("telescopes", "x"), "id", writing=False)
    document = status_document(answer, About("g.io", "telescopes", "x"))
    assert (document["code"], document["reason"]) == (404, "NotFound")
    assert document["message"] == 'telescopes.g.io "x" not found'


def test_what_the_http_library_refuses_is_a_status_too() -> None:
    answer = answer_of(web.HTTPMethodNotAllowed("POST", ["GET"]), "id", writing=True)
    assert (answer.code, answer.reason) == (405, "MethodNotAllowed")
    assert response_headers(answer) == {"Allow": "GET"}


def test_a_retry_is_told_in_header_and_body() -> None:
    answer = answer_of(RequestError(429, "TooManyRequests", "busy", retry_after=3), "id", writing=True)
    assert response_headers(answer) == {"Retry-After": "3"}
    assert status_document(answer)["details"] == {"retryAfterSeconds": 3}
