"""What etcd's answers mean; each row says why. In doubt a reply is lost: settling is safe, assuming is not."""

from __future__ import annotations

import pytest

from storage.errors import (
    Compacted,
    FutureRevision,
    LeaseNotFound,
    NoSpace,
    PermissionDenied,
    StorageError,
    TooLarge,
)
from storage.etcd_errors import LostReply, NotDone, TokenRefused, classify, classify_body

ROWS = [
    (14, "etcdserver: request timed out", LostReply, "raft may have it"),
    (14, "etcdserver: request timed out, possibly due to previous leader failure", LostReply, "likewise"),
    (14, "etcdserver: server stopped", LostReply, "it stopped while the proposal was under way"),
    (14, "etcdserver: leader changed", LostReply, "a read; it is repeated"),
    (14, "transport is closing", LostReply, "the gateway lost its own connection"),
    (4, "context deadline exceeded", LostReply, "somebody's patience ended"),
    (2, "raft proposal dropped", LostReply, "an unknown code is a doubt"),
    (13, "stream terminated by RST_STREAM", LostReply, "likewise"),
    (0, "", LostReply, "and so is no code"),
    (14, "etcdserver: no leader", NotDone, "refused before it was proposed"),
    (8, "etcdserver: too many requests", NotDone, "likewise"),
    (14, "etcdserver: rpc not supported for learner", NotDone, "another member takes it"),
    (16, "etcdserver: invalid auth token", TokenRefused, "a new token helps"),
    (3, "etcdserver: user name is empty", TokenRefused, "authentication was enabled since"),
    (3, "etcdserver: revision of auth store is old", TokenRefused, "roles changed since the token was made"),
    (7, "etcdserver: permission denied", PermissionDenied, "a new token does not help"),
    (3, "etcdserver: authentication failed, invalid user ID or password", PermissionDenied, "nor here"),
    (8, "etcdserver: mvcc: database space exceeded", NoSpace, "not written"),
    (11, "etcdserver: mvcc: required revision has been compacted", Compacted, "list again"),
    (11, "etcdserver: mvcc: required revision is a future revision", FutureRevision, "wait, or list again"),
    (5, "etcdserver: requested lease not found", LeaseNotFound, "grant another"),
    (3, "etcdserver: request is too large", TooLarge, "send less"),
    (8, "grpc: trying to send message larger than max (1 vs. 2)", TooLarge, "likewise"),
    (3, "etcdserver: duplicate key given in txn request", StorageError, "a mistake of ours, told as it is"),
]


@pytest.mark.parametrize(("code", "message", "meaning", "why"), ROWS, ids=[row[1] or "nothing" for row in ROWS])
def test_every_row_of_the_table(code: int, message: str, meaning: type[Exception], why: str) -> None:
    assert type(classify(code, message)) is meaning, why
    assert type(classify_body(400, {"error": message, "code": code})) is meaning or not message, why


@pytest.mark.parametrize("body", [None, [], "text", {}, {"error": {}}, {"error": 5}, {"error": "x", "code": "y"}])
def test_an_answer_that_is_not_etcds_is_a_lost_reply(body: object) -> None:
    assert type(classify_body(502, body)) is LostReply


def test_a_streams_error_carries_its_own_code() -> None:
    body = {"grpc_code": 16, "http_code": 401, "message": "etcdserver: invalid auth token"}
    assert type(classify_body(200, body)) is TokenRefused
