"""What the CML client makes of refusals, faults and lies, against a server that tells them."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import socket
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
import pytest
from aiohttp import web

from controllers.cml.client import CmlClient, Credentials, Timeouts
from controllers.cml.errors import (
    CmlAuthError,
    CmlBadAnswer,
    CmlClosed,
    CmlError,
    CmlForbidden,
    CmlInvalid,
    CmlNotFound,
    CmlNotReady,
    CmlOutcomeUnknown,
    CmlRefused,
    CmlTimeout,
    CmlUnreachable,
)
from controllers.cml.models import TelemetryEvent
from equipment.scripted_cml import PASSWORD, USERNAME, ScriptedCml, cut_off, hang_up, page, refusal, silence
from equipment.waiting import until

LAB = "90f84e38-a71c-4d57-8d90-00fa8a197385"
TOPOLOGY = "lab:\n  version: 0.1.0\nnodes: []\nlinks: []\n"
FAST = Timeouts(connect=2.0, attempt=0.3, read=2.0, change=0.3)


@pytest.fixture
async def cml() -> AsyncIterator[ScriptedCml]:
    async with ScriptedCml.run() as server:
        yield server


@pytest.fixture
async def client(cml: ScriptedCml) -> AsyncIterator[CmlClient]:
    async with CmlClient(cml.url, Credentials(USERNAME, PASSWORD), jitter=lambda: 0.0) as made:
        yield made


def fast_client(cml: ScriptedCml, **how: Any) -> CmlClient:
    return CmlClient(cml.url, Credentials(USERNAME, PASSWORD), timeouts=FAST, jitter=lambda: 0.0, **how)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


async def imported(client: CmlClient) -> object:
    return await client.import_lab("lrm-1", TOPOLOGY, timeout=0.5)


async def registered(client: CmlClient) -> object:
    return await client.register("licence-token", timeout=0.5)


CREATING = [imported, registered]
CREATING_PATHS = {imported: "/import", registered: "/licensing/registration"}


async def test_a_refused_connection_is_unreachable_for_every_class_of_call_and_never_an_unknown_outcome() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    async with CmlClient(url, Credentials(USERNAME, PASSWORD), jitter=lambda: 0.0, breaker_threshold=100) as client:
        calls: list[Callable[[], Awaitable[object]]] = [
            client.system_information,
            client.lab_ids,
            lambda: client.stop_lab(LAB),
            lambda: imported(client),
        ]
        for call in calls:
            with pytest.raises(CmlUnreachable, match="no connection") as caught:
                await call()
            assert caught.value.retryable


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_a_front_servers_page_is_not_ready_and_a_read_is_tried_three_times(
    cml: ScriptedCml, client: CmlClient, status: int
) -> None:
    cml.on("GET", "/system_information", page(status))
    with pytest.raises(CmlNotReady) as caught:
        await client.system_information()
    assert caught.value.status == status
    assert cml.count("GET", "/system_information") == 3


async def test_a_read_survives_two_bad_gateways_and_a_dropped_connection_does_not_lose_it(
    cml: ScriptedCml, client: CmlClient
) -> None:
    cml.on("GET", "/labs", page(502), hang_up, web.json_response([LAB]))
    assert await client.lab_ids() == (LAB,)
    assert cml.logins == 1


@pytest.mark.parametrize("fault", [page(502), hang_up, silence], ids=["502", "hang up", "silence"])
async def test_a_change_is_sent_once_and_left_to_the_caller(cml: ScriptedCml, fault: Any) -> None:
    cml.on("PUT", f"/labs/{LAB}/stop", fault)
    async with fast_client(cml) as client:
        with pytest.raises((CmlNotReady, CmlUnreachable)) as caught:
            await client.stop_lab(LAB)
        assert caught.value.retryable
    assert cml.count("PUT", f"/labs/{LAB}/stop") == 1


@pytest.mark.parametrize(
    "fault",
    [page(502), page(503), page(504), refusal(500, "unexpected"), hang_up, silence, cut_off],
    ids=["502", "503", "504", "500", "hang up", "silence", "cut off"],
)
@pytest.mark.parametrize("call", CREATING)
async def test_a_creating_call_without_a_usable_answer_is_an_unknown_outcome_and_was_sent_once(
    cml: ScriptedCml, client: CmlClient, call: Callable[[CmlClient], Awaitable[object]], fault: Any
) -> None:
    cml.on("POST", CREATING_PATHS[call], fault)
    with pytest.raises(CmlOutcomeUnknown) as caught:
        await call(client)
    assert not caught.value.retryable
    assert cml.count("POST", CREATING_PATHS[call]) == 1


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[]", b'{"id": 7}', b'{"id": "', b"<html>"],
    ids=["nothing", "no id", "a list", "a wrong id", "half", "a page"],
)
async def test_an_import_answered_without_an_id_is_an_unknown_outcome(
    cml: ScriptedCml, client: CmlClient, body: bytes
) -> None:
    cml.on("POST", "/import", web.Response(body=body))
    with pytest.raises(CmlOutcomeUnknown, match="import of 'lrm-1' may have been carried out"):
        await imported(client)


@pytest.mark.parametrize("status", [400, 403, 404, 409])
async def test_a_creating_call_that_cml_refuses_was_not_carried_out(
    cml: ScriptedCml, client: CmlClient, status: int
) -> None:
    cml.on("POST", "/import", refusal(status, "no"))
    with pytest.raises((CmlRefused, CmlNotFound)):
        await imported(client)
    assert cml.count("POST", "/import") == 1


async def test_an_overload_answer_to_a_creating_call_says_that_it_was_not_carried_out(
    cml: ScriptedCml, client: CmlClient
) -> None:
    cml.on("POST", "/import", refusal(429, "slow down"))
    with pytest.raises(CmlNotReady):
        await imported(client)


async def test_a_creating_call_whose_login_hangs_was_never_sent(cml: ScriptedCml, client: CmlClient) -> None:
    cml.on("POST", "/auth_extended", silence)
    with pytest.raises(CmlTimeout):
        await imported(client)
    assert cml.count("POST", "/import") == 0


async def test_a_creating_call_met_by_401_is_replayed_once_and_is_known_if_the_new_login_fails(
    cml: ScriptedCml, client: CmlClient
) -> None:
    await client.lab_ids()
    cml.expire_tokens()
    cml.on("POST", "/import", refusal(401, "expired"), web.json_response({"id": LAB, "warnings": None}))
    assert (await client.import_lab("x", TOPOLOGY, timeout=5)).id == LAB
    assert cml.logins == 2
    cml.on("POST", "/import", refusal(401, "expired"))
    cml.on("POST", "/auth_extended", hang_up)
    with pytest.raises(CmlUnreachable):
        await imported(client)


async def test_an_expired_session_is_renewed_once_and_the_call_replayed(cml: ScriptedCml, client: CmlClient) -> None:
    await client.lab_ids()
    cml.expire_tokens()
    assert await client.lab_ids() == ()
    assert cml.logins == 2
    assert cml.count("GET", "/labs") == 3


async def test_many_calls_that_meet_401_at_once_make_one_login(cml: ScriptedCml, client: CmlClient) -> None:
    await asyncio.gather(*(client.lab_ids() for _ in range(8)))
    assert cml.logins == 1
    arrived = asyncio.Barrier(8)

    async def together(_: web.Request) -> web.StreamResponse:
        await arrived.wait()
        return refusal(401, "expired")

    cml.on("GET", "/labs", *([together] * 8), web.json_response([]))
    await asyncio.gather(*(client.lab_ids() for _ in range(8)))
    assert cml.logins == 2


async def test_a_late_401_of_an_old_session_does_not_end_the_new_one(cml: ScriptedCml, client: CmlClient) -> None:
    await client.lab_ids()

    async def late(_: web.Request) -> web.StreamResponse:
        await until(lambda: cml.logins == 2)
        return refusal(401, "expired")

    cml.on("GET", "/system_health", late, web.json_response({}))
    cml.on("GET", "/labs", refusal(401, "expired"), web.json_response([]))
    await asyncio.gather(client.system_health(), client.lab_ids())
    assert cml.logins == 2


async def test_a_caller_who_only_needs_a_session_does_not_share_the_failure_of_one_who_needs_its_identity(
    cml: ScriptedCml, client: CmlClient
) -> None:
    release = asyncio.Event()

    async def forbid_late(_: web.Request) -> web.StreamResponse:
        await release.wait()
        return refusal(403, "admins only")

    cml.on("GET", "/licensing", forbid_late)
    good = cml._login

    async def login(request: web.Request) -> web.StreamResponse:
        await release.wait()
        return good(await request.json())

    cml.on("POST", "/auth_extended", login)
    first = asyncio.create_task(client.identity())
    await until(lambda: cml.logins == 1)
    second = asyncio.create_task(client.lab_ids())
    await asyncio.sleep(0)
    release.set()
    with pytest.raises(CmlForbidden):
        await first
    assert await second == ()
    assert cml.logins == 1


async def test_a_server_that_answers_401_for_ever_costs_one_login_per_call_and_is_an_auth_error(
    cml: ScriptedCml, client: CmlClient
) -> None:
    cml.on("GET", "/labs", refusal(401, "never"))
    with pytest.raises(CmlAuthError):
        await client.lab_ids()
    assert (cml.logins, cml.count("GET", "/labs")) == (2, 2)


async def test_a_failed_login_is_one_failure_for_all_who_waited_for_it(cml: ScriptedCml, client: CmlClient) -> None:
    release = asyncio.Event()

    async def refuse_late(_: web.Request) -> web.StreamResponse:
        await release.wait()
        return refusal(500, "database is gone")

    cml.on("POST", "/auth_extended", refuse_late)
    calls = [asyncio.create_task(client.stop_lab(LAB)) for _ in range(8)]
    await until(lambda: cml.logins == 1)
    release.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(r, CmlBadAnswer) for r in results), results
    assert cml.logins == 1


async def test_a_403_is_a_missing_permission_and_is_not_answered_by_a_login(
    cml: ScriptedCml, client: CmlClient
) -> None:
    cml.on("GET", "/system_stats", refusal(403, "User does not have required access."))
    with pytest.raises(CmlForbidden, match="required access"):
        await client.system_stats()
    assert (cml.logins, cml.count("GET", "/system_stats")) == (1, 1)


async def test_only_cmls_own_404_proves_an_absence(cml: ScriptedCml, client: CmlClient) -> None:
    cml.on("GET", f"/labs/{LAB}", refusal(404, f"Lab not found: {LAB}"))
    with pytest.raises(CmlNotFound, match="Lab not found"):
        await client.lab(LAB)
    for lie in (page(404), web.Response(status=404), web.Response(status=404, text="404 page not found")):
        cml.on("GET", f"/labs/{LAB}", lie)
        with pytest.raises(CmlBadAnswer):
            await client.lab(LAB)


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (refusal(500, "The API encountered an unexpected error."), "a 500 says nothing about what was asked"),
        (page(200), "a page with 200 is some portal, not an empty list"),
        (web.Response(text=f'["{LAB}", "90f8'), "half a JSON must not pass for a short list"),
        (web.Response(text=""), "no body is not an empty list"),
        (web.json_response({}), "an object is not a list"),
        (web.json_response(None), "null is not an empty list"),
        (web.json_response([LAB, 7]), "a list with something else in it is not a list of labs"),
        (web.json_response([LAB.upper()]), "an id of another form is not an id"),
        (web.Response(body=b'["\xff\xfe"]'), "not UTF-8 is not JSON"),
        (web.Response(status=302, headers={"Location": "/elsewhere"}), "redirects are not followed"),
        (web.Response(body=b"not gzip", headers={"Content-Encoding": "gzip"}), "garbage instead of gzip"),
        (cut_off, "a body shorter than announced"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
async def test_an_unusable_list_is_an_error_and_never_an_empty_one(
    cml: ScriptedCml, client: CmlClient, reply: Any, why: str
) -> None:
    cml.on("GET", "/labs", reply)
    with pytest.raises(CmlBadAnswer):
        await client.lab_ids()
    assert cml.count("GET", "/labs") == 1


async def test_a_body_without_end_and_one_that_unpacks_without_end_are_cut_short(cml: ScriptedCml) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while request.transport is not None and not request.transport.is_closing():
            await response.write(b"[" * 65536)
        return response

    bomb = web.Response(body=gzip.compress(b"0" * 30_000_000), headers={"Content-Encoding": "gzip"})
    async with CmlClient(cml.url, Credentials(USERNAME, PASSWORD), max_body=1_000_000) as client:
        for reply in (endless, bomb):
            cml.on("GET", "/labs", reply)
            with pytest.raises(CmlBadAnswer, match="more than 1000000 bytes"):
                await client.lab_ids()
            await until(lambda: cml.open_connections == 0, "the rest is not read, so the connection is closed")


async def test_a_long_history_is_read_beside_the_loop_and_a_longer_one_is_refused(
    cml: ScriptedCml, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[int] = []
    validate = TelemetryEvent.model_validate

    def spied(value: Any) -> TelemetryEvent:
        readers.append(threading.get_ident())
        return validate(value)

    monkeypatch.setattr(TelemetryEvent, "model_validate", spied)
    event = {"category": "start_node", "timestamp": "2026-05-06T12:00:00Z", "data": {"node": "x" * 1000}}
    async with CmlClient(cml.url, Credentials(USERNAME, PASSWORD)) as client:
        cml.on("GET", "/telemetry/events", web.json_response([event] * 100))
        assert len(await client.telemetry_events()) == 100
        assert threading.get_ident() not in readers
        cml.on("GET", "/telemetry/events", web.json_response([event] * 8_500))
        with pytest.raises(CmlBadAnswer, match="more than 8388608 bytes"):
            await client.telemetry_events()
        cml.on("GET", "/labs", web.json_response(["x" * 9_000_000]))
        with pytest.raises(CmlBadAnswer, match="not a lab's id"):
            await client.lab_ids()


async def test_an_answer_that_drips_for_ever_ends_by_the_deadline_of_the_whole_call(cml: ScriptedCml) -> None:
    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while request.transport is not None and not request.transport.is_closing():
            await response.write(b" ")
            await asyncio.sleep(0.05)
        return response

    cml.on("GET", "/labs", drip)
    async with CmlClient(cml.url, Credentials(USERNAME, PASSWORD), timeouts=Timeouts(read=0.6)) as client:
        async with asyncio.timeout(20):
            with pytest.raises(CmlTimeout, match=r"within 0\.6 s"):
                await client.lab_ids()
    await until(lambda: cml.open_connections == 0)


async def test_a_silent_server_is_a_timeout_after_three_tries(cml: ScriptedCml) -> None:
    cml.on("GET", "/labs", silence)
    async with fast_client(cml) as client:
        with pytest.raises(CmlTimeout):
            await client.lab_ids()
    assert cml.count("GET", "/labs") == 3


async def test_cancelling_a_call_leaves_no_task_and_no_connection(cml: ScriptedCml, client: CmlClient) -> None:
    for method, path, call in (
        ("POST", "/auth_extended", client.lab_ids),
        ("GET", "/labs", client.lab_ids),
        ("POST", "/import", lambda: client.import_lab("x", TOPOLOGY, timeout=60)),
    ):
        cml.on(method, path, silence)
        before = cml.count(method, path)
        mine = asyncio.all_tasks()
        task = asyncio.create_task(call())
        await until(lambda m=method, p=path, b=before: cml.count(m, p) == b + 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: cml.open_connections == 0, "the connection is closed")
        left = {t for t in asyncio.all_tasks() - mine if "RequestHandler" not in repr(t)}
        assert not left
        if path == "/auth_extended":
            cml._scripts.clear()


async def test_a_caller_cancelled_in_the_middle_of_the_shared_login_does_not_take_the_others_along(
    cml: ScriptedCml, client: CmlClient
) -> None:
    async def never(request: web.Request) -> web.StreamResponse:
        return await silence(request)

    good = cml._login

    async def login(request: web.Request) -> web.StreamResponse:
        return good(await request.json())

    cml.on("POST", "/auth_extended", never, login)
    first = asyncio.create_task(client.lab_ids())
    await until(lambda: cml.logins == 1)
    others = [asyncio.create_task(client.lab_ids()) for _ in range(4)]
    await asyncio.sleep(0)
    first.cancel()
    assert await asyncio.gather(*others) == [()] * 4
    assert cml.logins == 2
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_closing_ends_calls_under_way_and_refuses_later_ones(cml: ScriptedCml, client: CmlClient) -> None:
    await client.lab_ids()
    cml.on("GET", "/labs", silence)
    task = asyncio.create_task(client.lab_ids())
    await until(lambda: cml.count("GET", "/labs") == 2)
    await client.aclose()
    await client.aclose()
    with pytest.raises(CmlClosed):
        await task
    with pytest.raises(CmlClosed):
        await client.lab_ids()
    await until(lambda: cml.open_connections == 0)


async def test_no_error_repr_or_chained_cause_shows_a_password_a_token_or_a_licence(cml: ScriptedCml) -> None:
    """The server echoes what it was sent, as validation errors do."""

    async def echo(request: web.Request) -> web.StreamResponse:
        told = f"{(await request.read()).decode()} {request.headers.get('Authorization')} {password}"
        return refusal(400, told)

    licence = "licence-very-secret"
    password = 'p"\\ä word'
    good = cml._login

    async def login(_: web.Request) -> web.StreamResponse:
        return good({"username": USERNAME, "password": PASSWORD})

    cml.on("POST", "/auth_extended", login)
    async with CmlClient(cml.url, Credentials(USERNAME, password), timeouts=FAST, jitter=lambda: 0.0) as client:
        token = (await client.proven_session()).token
        secrets = [password, orjson.dumps(password).decode()[1:-1], json.dumps(password)[1:-1], token, licence]
        errors: list[BaseException] = []
        for script in (echo, hang_up, silence, cut_off):
            for method, path in (("POST", "/licensing/registration"), ("GET", "/labs"), ("POST", "/auth_extended")):
                cml._scripts.clear()
                cml.on("POST", "/auth_extended", login)
                await client.lab_ids()
                cml.on(method, path, script)
                if path == "/auth_extended":
                    client._sessions.drop(client._sessions._serial)
                call = client.register(licence, timeout=0.3) if method == "POST" else client.lab_ids()
                with pytest.raises(CmlError) as caught:
                    await call
                errors.append(caught.value)
                client._sessions._barred = None
        assert len(errors) == 12
        shown = "\n".join(
            "".join(traceback.TracebackException.from_exception(e, capture_locals=False).format()) + repr(e)
            for e in errors
        )
        shown += repr(client) + repr(client.session) + repr(client._sessions._credentials)
        for secret in secrets:
            assert secret not in shown
        assert all(not hasattr(link, "request") for e in errors for link in chain(e))


WIRE = [
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n[]",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n[\r\n1\r\n]\r\n0\r\n\r\n",
    b'HTTP/1.1 401 No\r\nContent-Length: 27\r\n\r\n{"code":401,"description":1}',
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 x\r\nConnection: close\r\n\r\n<html>",
    b"HTTP/1.0 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(b'["x"]'),
]


def damaged(seed: int) -> bytes:
    """An answer with bytes changed, dropped, doubled or cut off."""
    dice = random.Random(seed)
    raw = bytearray(dice.choice(WIRE))
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(raw))
        match dice.randrange(4):
            case 0:
                raw[at] = dice.randrange(256)
            case 1:
                del raw[at + 1 : at + dice.randint(2, 9)]
            case 2:
                raw[at:at] = raw[at : at + 20] * dice.randint(1, 3)
            case 3:
                del raw[max(at, 1) :]
    return bytes(raw)


async def test_whatever_bytes_a_server_sends_come_out_as_an_empty_list_or_as_our_own_error() -> None:
    raw = b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if b"auth_extended" in head:
                told = b'{"token":"t","admin":true}'
                writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(told) + told)
            else:
                writer.write(raw)
            await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            return
        finally:
            writer.close()

    outcomes = set()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        how = {"timeouts": FAST, "breaker_threshold": 10**6, "jitter": lambda: -1.0}
        async with CmlClient(url, Credentials(USERNAME, PASSWORD), **how) as client:
            for seed in range(300):
                raw = damaged(seed)
                try:
                    assert await client.lab_ids() == (), raw
                    outcomes.add("empty list")
                except CmlError as error:
                    outcomes.add(type(error).__name__)
    assert {"empty list", "CmlBadAnswer", "CmlUnreachable", "CmlAuthError", "CmlNotReady"} <= outcomes


def chain(error: BaseException) -> list[BaseException]:
    links: list[BaseException] = []
    left: list[BaseException | None] = [error]
    while left:
        link = left.pop()
        if link is not None and link not in links:
            links.append(link)
            left += [link.__cause__, link.__context__]
    return links


@pytest.mark.parametrize("lab_id", ["", "..", "../users", "x/y", LAB + "?a=b", LAB + "\n", LAB.upper(), "0" * 36])
async def test_what_is_not_a_labs_id_never_becomes_part_of_an_address(
    cml: ScriptedCml, client: CmlClient, lab_id: str
) -> None:
    with pytest.raises(CmlInvalid):
        await client.delete_lab(lab_id)
    assert cml.seen == []


async def test_titles_tokens_and_products_that_cml_would_refuse_are_not_sent(
    cml: ScriptedCml, client: CmlClient
) -> None:
    for call in (
        client.import_lab("", TOPOLOGY, timeout=1),
        client.import_lab("x" * 65, TOPOLOGY, timeout=1),
        client.import_lab("x", " \n", timeout=1),
        client.import_lab("x", TOPOLOGY, timeout=0),
        client.register("no spaces", timeout=1),
        client.register("", timeout=1),
        client.set_product_license("a b"),
    ):
        with pytest.raises(CmlInvalid):
            await call
    assert cml.seen == []


@pytest.mark.parametrize(
    ("reply", "status", "expected"),
    [
        (web.Response(status=204), "NOT_REGISTERED", "done"),
        (web.Response(status=202), "NOT_REGISTERED", "seat-leaked"),
        (web.Response(status=400), "COMPLETED", "already"),
        (refusal(400, "already"), "NOT_REGISTERED", "already"),
    ],
    ids=["given back", "leaked", "already, no body", "already, with a reason and the status agrees"],
)
async def test_a_deregistration_tells_how_it_ended(
    cml: ScriptedCml, client: CmlClient, reply: web.Response, status: str, expected: str
) -> None:
    cml.on("GET", "/licensing", web.json_response({"registration": {"status": status}}))
    cml.on("DELETE", "/licensing/deregistration", reply)
    assert (await client.deregister()).value == expected


async def test_a_400_with_a_reason_while_still_registered_is_a_refusal_to_deregister(
    cml: ScriptedCml, client: CmlClient
) -> None:
    cml.on("GET", "/licensing", web.json_response({"registration": {"status": "COMPLETED"}}))
    cml.on("DELETE", "/licensing/deregistration", refusal(400, "labs are running"))
    with pytest.raises(CmlRefused, match="labs are running"):
        await client.deregister()


@pytest.mark.parametrize("body", ["lab:\n  title: x\n", '"lab:\\n  title: x\\n"'], ids=["raw", "a JSON string"])
async def test_a_download_is_yaml_however_cml_sends_it(cml: ScriptedCml, client: CmlClient, body: str) -> None:
    cml.on("GET", f"/labs/{LAB}/download", web.Response(text=body))
    assert await client.download(LAB) == "lab:\n  title: x\n"


async def test_a_client_closed_while_its_first_call_gets_ready_opens_nothing(cml: ScriptedCml) -> None:
    client = CmlClient(cml.url.replace("http:", "https:"), Credentials(USERNAME, PASSWORD))
    call = asyncio.create_task(client.lab_ids())
    await until(client._transport._opening.locked, "the CA files are being read")
    await client.aclose()
    with pytest.raises(CmlClosed):
        await call
    assert client._transport._http is None


async def test_a_cookie_that_a_server_sets_is_not_kept(cml: ScriptedCml, client: CmlClient) -> None:
    cml.on("GET", "/labs", web.Response(text="[]", headers={"Set-Cookie": "track=1; Path=/"}))
    await client.lab_ids()
    await client.lab_ids()
    assert all("Cookie" not in s.headers for s in cml.seen)


async def test_a_server_that_goes_away_between_calls_costs_a_read_nothing(cml: ScriptedCml, client: CmlClient) -> None:
    """The kept connection is dead; whether that is noticed before or after sending, a read is tried again."""
    await client.lab_ids()
    for connection in cml.connections:
        connection.abort()  # type: ignore[attr-defined]
    assert await client.lab_ids() == ()


ODD: list[Any] = [
    None,
    True,
    7,
    1e308,
    "",
    "x",
    [],
    [[]],
    [{}],
    [None, 1, "x"],
    [{"id": []}, {"id": {}}, {"id": LAB, "lab_title": 5, "state": []}],
    {},
    {"": {}},
    {"lab_tiles": None},
    {"lab_tiles": [{"id": []}, {"id": LAB}]},
    {"lab_tiles": {LAB: {"id": LAB, "lab_title": "x", "state": {"a": 1}, "groups": {}, "created": []}}},
    {"lab_tiles": {LAB: {"lab_title": "x", "state": "STARTED", "node_count": 1e300, "owner": []}}},
    {"id": 5, "state": "x"},
    {"state": None, "id": LAB},
    {"all": [], "computes": [], "controller": 5, "valid": "x"},
    {"computes": {"a": {"stats": [], "hostname": {}}}, "udi": [], "registration": "x", "features": {"a": 1}},
    {"token": {}, "admin": [], "username": {}, "id": 5, "error": {"a": [1]}},
]


@pytest.mark.parametrize("odd", ODD, ids=lambda v: repr(v)[:40])
async def test_odd_json_anywhere_ends_in_a_model_or_in_our_own_error(cml: ScriptedCml, odd: Any) -> None:
    for path in ("/labs", "/populate_lab_tiles", "/system_stats", "/system_health", "/licensing", "/nodes"):
        cml.on("GET", path, web.json_response(odd))
    for path in ("/telemetry/events", "/system_information", f"/labs/{LAB}", f"/labs/{LAB}/state"):
        cml.on("GET", path, web.json_response(odd))
    cml.on("GET", f"/labs/{LAB}/check_if_converged", web.json_response(odd))
    cml.on("GET", f"/labs/{LAB}/lab_element_state", web.json_response(odd))
    cml.on("GET", f"/labs/{LAB}/download", web.json_response(odd))
    cml.on("PUT", f"/labs/{LAB}/stop", web.json_response(odd, status=400))
    cml.on("DELETE", "/licensing/deregistration", web.json_response(odd, status=400))
    cml.on("POST", "/import", web.json_response(odd))

    def calls(client: CmlClient) -> list[Awaitable[Any]]:
        return [
            client.system_information(),
            client.lab_ids(),
            client.tiles(),
            client.list_labs(),
            client.system_stats(),
            client.system_health(),
            client.licensing(),
            client.identity(),
            client.nodes(),
            client.telemetry_events(),
            client.lab(LAB),
            client.lab_state(LAB),
            client.converged(LAB),
            client.node_states(LAB),
            client.download(LAB),
            client.stop_lab(LAB),
            client.deregister(),
            imported(client),
        ]

    for script in ((), (web.json_response(odd),)):
        if script:
            cml.on("POST", "/auth_extended", *script)
        async with fast_client(cml) as client:
            results = await asyncio.gather(*calls(client), return_exceptions=True)
        strangers = [r for r in results if isinstance(r, BaseException) and not isinstance(r, CmlError)]
        assert strangers == []
