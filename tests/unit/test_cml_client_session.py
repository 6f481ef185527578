"""Logins, identity, the throttle and the circuit breaker, on a clock that the test moves."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from controllers.cml.breaker import Breaker
from controllers.cml.client import CmlClient, Credentials
from controllers.cml.errors import (
    CmlAuthError,
    CmlBadAnswer,
    CmlCircuitOpen,
    CmlForbidden,
    CmlIdentityMismatch,
    CmlInvalid,
    CmlLoginThrottled,
    CmlNotReady,
    CmlUnreachable,
)
from equipment.scripted_cml import IDENTITY, PASSWORD, USERNAME, ScriptedCml, page, refusal, silence
from equipment.waiting import until
from lrm.testing import VirtualClock

LAB = "90f84e38-a71c-4d57-8d90-00fa8a197385"
OTHER = "564d4a4c-0000-4000-8000-00000000000b"


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
async def cml() -> AsyncIterator[ScriptedCml]:
    async with ScriptedCml.run() as server:
        yield server


@pytest.fixture
async def client(cml: ScriptedCml, clock: VirtualClock) -> AsyncIterator[CmlClient]:
    async with CmlClient(cml.url, Credentials(USERNAME, PASSWORD), clock=clock) as made:
        yield made


def claims(**values: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(values).encode()).rstrip(b"=").decode()


async def test_the_constructor_sends_nothing_and_the_first_call_logs_in_by_itself(
    cml: ScriptedCml, client: CmlClient
) -> None:
    assert client.session is None
    assert cml.seen == []
    await client.lab_ids()
    assert cml.paths() == ["POST /auth_extended", "GET /labs"]
    assert client.session is not None
    assert client.session.admin is True


async def test_system_information_needs_no_login_and_sends_no_token(cml: ScriptedCml, client: CmlClient) -> None:
    await client.lab_ids()
    assert (await client.system_information()).ready
    assert "Authorization" not in cml.seen[-1].headers


@pytest.mark.parametrize(("admin", "proven"), [(True, True), (False, False), ("yes", None), (1, None)])
async def test_a_session_is_an_admins_only_if_cml_says_so_in_so_many_words(
    cml: ScriptedCml, client: CmlClient, admin: Any, proven: bool | None
) -> None:
    cml.admin = admin
    await client.lab_ids()
    assert client.session is not None
    assert client.session.admin is proven


async def test_a_login_that_does_not_tell_of_admin_is_completed_by_get_authentication(
    cml: ScriptedCml, client: CmlClient
) -> None:
    cml.admin = None
    cml.on("GET", "/authentication", web.json_response({"id": "u", "username": "root", "admin": True}))
    await client.lab_ids()
    assert client.session is not None
    assert (client.session.admin, client.session.username) == (True, "root")


@pytest.mark.parametrize(
    ("authentication", "admin", "paths"),
    [
        (web.json_response({"id": "u", "username": "admin", "admin": True}), True, ["/authentication"]),
        (page(404), None, ["/authentication", "/authok"]),
    ],
    ids=["2.10", "older"],
)
async def test_a_cml_without_auth_extended_is_logged_in_to_the_old_way(
    cml: ScriptedCml, client: CmlClient, authentication: web.Response, admin: bool | None, paths: list[str]
) -> None:
    cml.valid_tokens.add("old.token.x")
    cml.on("POST", "/auth_extended", page(404))
    cml.on("POST", "/authenticate", web.json_response("old.token.x"))
    cml.on("GET", "/authentication", authentication)
    cml.on("GET", "/authok", web.json_response("ok"))
    await client.lab_ids()
    assert client.session is not None
    assert client.session.admin is admin
    assert [s.path for s in cml.seen] == ["/auth_extended", "/authenticate", *paths, "/labs"]


@pytest.mark.parametrize(
    "answer",
    [{}, {"token": ""}, {"token": 5}, {"token": "a b"}, {"token": "a\r\nX-Evil: 1"}, {"token": "ä"}, [], "token", None],
    ids=repr,
)
async def test_a_login_without_a_usable_token_is_a_bad_answer(cml: ScriptedCml, client: CmlClient, answer: Any) -> None:
    cml.on("POST", "/auth_extended", web.json_response(answer))
    with pytest.raises(CmlBadAnswer):
        await client.lab_ids()
    assert client.session is None


@pytest.mark.parametrize("status", [400, 401, 403])
async def test_refused_credentials_are_tried_at_most_once_a_minute_and_leave_the_probe_alone(
    cml: ScriptedCml, client: CmlClient, clock: VirtualClock, status: int
) -> None:
    cml.on("POST", "/auth_extended", refusal(status, "Authentication failed!"))
    with pytest.raises(CmlAuthError, match="Authentication failed!"):
        await client.lab_ids()
    for _ in range(59):
        await clock.advance(1)
        with pytest.raises(CmlLoginThrottled):
            await client.stop_lab(LAB)
        assert (await client.system_information()).ready
    assert cml.logins == 1
    await clock.advance(1)
    with pytest.raises(CmlAuthError):
        await client.lab_ids()
    assert cml.logins == 2
    assert cml.paths().count("PUT /labs/" + LAB + "/stop") == 0


async def test_callers_that_wait_for_a_login_that_is_refused_do_not_try_it_again(
    cml: ScriptedCml, client: CmlClient
) -> None:
    cml.on("POST", "/auth_extended", refusal(403, "no"))
    results = await asyncio.gather(*(client.lab_ids() for _ in range(8)), return_exceptions=True)
    assert all(isinstance(r, CmlAuthError) for r in results)
    assert cml.logins == 1


@pytest.mark.parametrize(
    ("told", "lasts"),
    [
        ({"exp": 10_600, "iat": 10_000}, 540),
        ({"exp": 10_020, "iat": 10_000}, 18),
        ({"exp": 1_767_225_600 + 600}, 540),
    ],
    ids=[
        "a minute before the end, by the server's own clock, however wrong that is",
        "a short life is used to nine tenths",
        "without iat, by our wall clock, which starts 2026-01-01 here",
    ],
)
async def test_a_session_is_renewed_shortly_before_its_token_expires(
    cml: ScriptedCml, client: CmlClient, clock: VirtualClock, told: dict[str, float], lasts: float
) -> None:
    cml.token_claims = claims(**told)
    await client.lab_ids()
    await clock.advance(lasts - 1)
    await client.lab_ids()
    assert cml.logins == 1
    await clock.advance(2)
    await client.lab_ids()
    assert cml.logins == 2


@pytest.mark.parametrize(
    "middle",
    ["", "!!", "e30", claims(exp="soon"), claims(exp=-5, iat=0), claims(exp=True), claims(exp=1e400), "bnVsbA", "Ww"],
    ids=["opaque", "not base64", "empty", "text", "past", "boolean", "infinite", "null", "half"],
)
async def test_a_token_that_does_not_tell_its_end_is_used_until_it_is_refused(
    cml: ScriptedCml, client: CmlClient, clock: VirtualClock, middle: str
) -> None:
    cml.token_claims = middle
    await client.lab_ids()
    await clock.advance(10 * 365 * 86400)
    await client.lab_ids()
    assert cml.logins == 1


async def test_the_identity_is_asked_once_per_session(cml: ScriptedCml, client: CmlClient) -> None:
    assert await client.identity() == IDENTITY
    assert await client.identity() == IDENTITY
    assert cml.count("GET", "/licensing") == 1
    cml.expire_tokens()
    await client.lab_ids()
    assert await client.identity() == IDENTITY
    assert (cml.logins, cml.count("GET", "/licensing")) == (2, 2)


async def test_an_identity_without_a_uuid_is_a_bad_answer_not_an_empty_identity(
    cml: ScriptedCml, client: CmlClient
) -> None:
    for told in ({}, {"udi": None}, {"udi": {"product_uuid": ""}}, {"udi": {"product_uuid": " "}}):
        cml.on("GET", "/licensing", web.json_response(told))
        with pytest.raises(CmlBadAnswer, match="product_uuid"):
            await client.identity()


async def test_nothing_but_the_question_itself_is_sent_to_a_cml_of_another_identity(
    cml: ScriptedCml, client: CmlClient, clock: VirtualClock
) -> None:
    client.expect_identity(OTHER)
    for call in (
        client.delete_lab(LAB),
        client.import_lab("x", "lab: {}", timeout=6),
        client.lab_ids(),
        client.register("token", timeout=6),
        client.system_information(),
    ):
        with pytest.raises(CmlIdentityMismatch) as caught:
            await call
        assert (caught.value.expected, caught.value.found) == (OTHER, IDENTITY)
    assert cml.paths() == ["POST /auth_extended", "GET /licensing"]
    assert client.session is None
    await clock.advance(61)
    cml.identity = OTHER.upper()
    assert await client.lab_ids() == ()


async def test_a_new_expectation_is_checked_against_the_session_at_hand(cml: ScriptedCml, client: CmlClient) -> None:
    await client.lab_ids()
    client.expect_identity(IDENTITY.upper())
    await client.stop_lab(LAB)
    assert cml.logins == 1
    client.expect_identity(OTHER)
    with pytest.raises(CmlIdentityMismatch):
        await client.stop_lab(LAB)
    client.expect_identity(None)
    await client.stop_lab(LAB)
    assert cml.paths().count(f"PUT /labs/{LAB}/stop") == 2


async def test_a_change_replayed_after_401_is_not_sent_to_the_cml_that_took_the_address(
    cml: ScriptedCml, client: CmlClient
) -> None:
    client.expect_identity(IDENTITY)
    await client.stop_lab(LAB)
    cml.identity = OTHER
    cml.expire_tokens()
    with pytest.raises(CmlIdentityMismatch):
        await client.delete_lab(LAB)
    # The delete with the old token was refused with 401; no second one was sent.
    assert cml.count("DELETE", f"/labs/{LAB}") == 1


async def test_a_session_that_may_not_read_the_licence_proves_no_identity_and_sends_nothing(
    cml: ScriptedCml, client: CmlClient
) -> None:
    client.expect_identity(IDENTITY)
    cml.on("GET", "/licensing", refusal(403, "admins only"))
    with pytest.raises(CmlForbidden):
        await client.stop_lab(LAB)
    assert cml.count("PUT", f"/labs/{LAB}/stop") == 0


async def test_an_identity_check_met_by_401_renews_an_old_session_but_not_a_fresh_one(
    cml: ScriptedCml, client: CmlClient
) -> None:
    await client.lab_ids()
    cml.expire_tokens()
    assert await client.identity() == IDENTITY
    assert cml.logins == 2
    cml.on("GET", "/licensing", refusal(401, "never"))
    cml.expire_tokens()
    await client.lab_ids()
    with pytest.raises(CmlAuthError):
        await client.identity()
    assert cml.logins == 4


async def test_the_proof_can_be_asked_for_again(cml: ScriptedCml, client: CmlClient) -> None:
    first = await client.proven_session()
    cml.identity = OTHER
    assert (await client.proven_session()).identity == IDENTITY
    assert (await client.proven_session(again=True)).identity == OTHER
    cml.expire_tokens()
    again = await client.proven_session(again=True)
    assert (again.identity, again.serial) == (OTHER, first.serial + 1)


async def test_after_several_unreachable_results_calls_fail_fast_until_one_probe_finds_the_server(
    clock: VirtualClock,
) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
    async with CmlClient(f"http://127.0.0.1:{port}", Credentials(USERNAME, PASSWORD), clock=clock) as client:
        for _ in range(5):
            with pytest.raises(CmlUnreachable):
                await client.stop_lab(LAB)
        async with ScriptedCml.run(port=port) as cml:
            with pytest.raises(CmlCircuitOpen):
                await client.lab_ids()
            await clock.advance(9.9)
            with pytest.raises(CmlCircuitOpen):
                await client.lab_ids()
            assert cml.seen == []
            await clock.advance(0.2)
            assert await client.lab_ids() == ()
            assert await client.lab_ids() == ()


def fail(breaker: Breaker) -> None:
    with pytest.raises(CmlUnreachable), breaker.attempt():
        raise CmlUnreachable("no")


async def test_a_probe_that_fails_tells_what_it_met_and_not_that_it_may_not_try_again(clock: VirtualClock) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{holder.getsockname()[1]}"
        async with CmlClient(url, Credentials(USERNAME, PASSWORD), clock=clock, jitter=lambda: -1.0) as client:
            for _ in range(5):
                with pytest.raises(CmlUnreachable):
                    await client.stop_lab(LAB)
            await clock.advance(10)
            with pytest.raises(CmlUnreachable, match="no connection"):
                await client.lab_ids()
            assert client.failed_at == 10


async def test_a_circuit_tells_when_it_opens_and_when_it_closes_and_nothing_between(clock: VirtualClock) -> None:
    told: list[bool] = []
    breaker = Breaker(clock, threshold=2, cool_down=0, turned=lambda: told.append(breaker.is_open))
    fail(breaker)
    assert told == []
    fail(breaker)
    fail(breaker)
    assert told == [True]
    for _ in range(2):
        with breaker.attempt():
            pass
    assert told == [True, False]


async def test_a_half_open_circuit_lets_one_probe_through_and_its_failure_opens_it_again(clock: VirtualClock) -> None:
    breaker = Breaker(clock, threshold=2, cool_down=10)
    fail(breaker)
    assert not breaker.is_open
    fail(breaker)
    assert breaker.is_open
    await clock.advance(10)
    probe = breaker.attempt()
    probe.__enter__()
    with pytest.raises(CmlCircuitOpen), breaker.attempt():
        pytest.fail("a second probe")
    assert probe.__exit__(CmlUnreachable, CmlUnreachable("no"), None) is False
    await clock.advance(9)
    with pytest.raises(CmlCircuitOpen), breaker.attempt():
        pytest.fail("too early")
    await clock.advance(1)
    with breaker.attempt():
        pass
    assert not breaker.is_open


async def test_a_cancelled_probe_leaves_the_probe_to_the_next(clock: VirtualClock) -> None:
    breaker = Breaker(clock, threshold=1, cool_down=10)
    fail(breaker)
    await clock.advance(10)
    with pytest.raises(asyncio.CancelledError), breaker.attempt():
        raise asyncio.CancelledError
    with breaker.attempt():
        pass


async def test_any_answer_closes_the_circuit_and_only_unreachable_counts(clock: VirtualClock) -> None:
    breaker = Breaker(clock, threshold=2, cool_down=10)
    for _ in range(10):
        fail(breaker)
        with pytest.raises(CmlNotReady), breaker.attempt():
            raise CmlNotReady(502)
    assert not breaker.is_open


async def test_a_server_that_lets_deadlines_pass_opens_the_circuit(
    cml: ScriptedCml, client: CmlClient, clock: VirtualClock
) -> None:
    await client.lab_ids()
    cml.on("PUT", f"/labs/{LAB}/stop", silence)
    for n in range(5):
        task = asyncio.create_task(client.stop_lab(LAB))
        await until(lambda n=n: cml.count("PUT", f"/labs/{LAB}/stop") == n + 1)
        await clock.advance(61)
        with pytest.raises(CmlUnreachable, match="within 60 s"):
            await task
    with pytest.raises(CmlCircuitOpen):
        await client.lab_ids()


@pytest.mark.parametrize(
    "url",
    [
        "http://cml.example.org",
        "http://10.0.0.1",
        "http://127.0.0.1.example.org",
        "http://2130706433",
        "ftp://127.0.0.1",
        "https://",
        "https://user:pass@host",
        "https://host?x=1",
        "https://host#x",
        "host",
        "",
        "https://" + "a" * 5000,
        "https://ho st",
        "https://[::1",
    ],
)
def test_an_address_that_is_no_cmls_or_would_show_the_password_is_refused(url: str) -> None:
    with pytest.raises(CmlInvalid) as caught:
        CmlClient(url, Credentials(USERNAME, PASSWORD))
    assert "pass@" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1", "http://[::1]:1", "http://localhost", "https://10.0.0.1/api/v0/"]
)
def test_https_and_loopback_are_accepted(url: str) -> None:
    assert CmlClient(url, Credentials(USERNAME, PASSWORD)).session is None


def test_plain_http_may_be_allowed() -> None:
    assert "10.0.0.1" in repr(CmlClient("http://10.0.0.1", Credentials(USERNAME, PASSWORD), allow_plain_http=True))


@pytest.mark.parametrize(("username", "password"), [("", "x"), ("x" * 33, "x"), ("x", "")])
def test_credentials_that_cml_cannot_have_are_refused(username: str, password: str) -> None:
    with pytest.raises(CmlInvalid):
        Credentials(username, password)
