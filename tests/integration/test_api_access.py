"""Who may do what, what is recorded of it, and TLS."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web

from equipment import certificates
from equipment.api import GROUP, JumpingClock, Served, path_of, served, telescope, tokens_file
from equipment.waiting import until
from lrm.api.app import Api, ApiError, call_of, serve
from lrm.api.auth import is_loopback
from storage.memory import MemoryStorage


def entry(name: str, role: str, *namespaces: str) -> dict[str, Any]:
    """A token called `NAME-token`."""
    found: dict[str, Any] = {"name": name, "sha256": hashlib.sha256(f"{name}-token".encode()).hexdigest(), "role": role}
    return found | ({"namespaces": list(namespaces)} if namespaces else {})


ENTRIES = [
    entry("viewer", "viewer"),
    entry("manager", "manager"),
    entry("controller", "controller"),
    entry("admin", "admin"),
    entry("student", "viewer", "lab"),
    entry("teacher", "manager", "lab"),
    entry("robot", "controller", "lab"),
]


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}-token"}


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(
        MemoryStorage(), tokens_file=tokens_file(tmp_path, *ENTRIES), audit_file=tmp_path / "audit.log"
    ) as it:
        yield it


def audit(folder: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in (folder / "audit.log").read_bytes().splitlines()]


STATUS = {"status": {"azimuth": 5}}
ACTIONS: dict[str, tuple[str, str, Any, dict[str, str]]] = {
    "read": ("GET", path_of("hubble", namespace="lab"), None, {}),
    "list": ("GET", path_of(namespace="lab"), None, {}),
    "list other": ("GET", path_of(namespace="other"), None, {}),
    "list all": ("GET", path_of(namespace=""), None, {}),
    "watch": ("GET", path_of(namespace="lab"), None, {"watch": "true", "timeoutSeconds": "1"}),
    "watch all": ("GET", path_of(namespace=""), None, {"watch": "true", "timeoutSeconds": "1"}),
    "discover": ("GET", "/apis", None, {}),
    "openapi": ("GET", "/openapi/v3", None, {}),
    "daemon": ("GET", "/api/status/status", None, {}),
    "metrics": ("GET", "/metrics", None, {}),
    "create": ("POST", path_of(namespace="lab"), telescope("new"), {"dryRun": "All"}),
    "create other": ("POST", path_of(namespace="other"), telescope("new"), {"dryRun": "All"}),
    "apply": ("POST", f"/apis/{GROUP}", telescope("new", namespace="lab"), {"dryRun": "All"}),
    "apply other": ("POST", f"/apis/{GROUP}", telescope("new", namespace="other"), {"dryRun": "All"}),
    "patch": ("PATCH", path_of("hubble", namespace="lab"), {"spec": {"tracking": True}}, {"dryRun": "All"}),
    "put": ("PUT", path_of("hubble", namespace="lab"), telescope(), {"dryRun": "All"}),
    "delete": ("DELETE", path_of("hubble", namespace="lab"), None, {"dryRun": "All"}),
    "status": (
        "PATCH",
        path_of("hubble", namespace="lab", sub="status"),
        STATUS,
        {"dryRun": "All", "fieldManager": "telescopes"},
    ),
    "status other": (
        "PATCH",
        path_of("hubble", namespace="other", sub="status"),
        STATUS,
        {"dryRun": "All", "fieldManager": "telescopes"},
    ),
    "force": ("PATCH", path_of("hubble", namespace="lab", sub="status"), STATUS, {"dryRun": "All", "force": "true"}),
}
READS_LAB = {"read", "list", "watch", "discover", "openapi", "daemon", "metrics"}
READS = READS_LAB | {"list other", "list all", "watch all"}
WRITES_LAB = {"create", "apply", "patch", "put", "delete"}
WRITES = WRITES_LAB | {"create other", "apply other"}
MAY: dict[str, set[str]] = {
    "viewer": READS,
    "manager": READS | WRITES,
    "controller": READS | WRITES | {"status", "status other"},
    "admin": set(ACTIONS),
    "student": READS_LAB,
    "teacher": READS_LAB | WRITES_LAB,
    "robot": READS_LAB | WRITES_LAB | {"status"},
}


@pytest.mark.parametrize("who", MAY)
async def test_each_role_may_what_it_may_and_nothing_else(api: Served, who: str) -> None:
    for namespace in ("lab", "other"):
        made = await api.post(path_of(namespace=namespace), telescope(), headers=bearer("admin"))
        assert made.status == 201
    for action, (method, path, body, params) in ACTIONS.items():
        patch = {"content_type": "application/merge-patch+json"} if method == "PATCH" else {}
        if "watch" in params:
            async with api.session.get(api.url + path, params=params, headers=bearer(who)) as reply:
                assert reply.status == (200 if action in MAY[who] else 403), action
            continue
        answer = await api.call(method, path, body, params=params, headers=bearer(who), **patch)
        if action in MAY[who]:
            assert answer.status < 300, (action, answer.raw)
        else:
            assert (answer.status, answer.body["reason"]) == (403, "Forbidden"), action
            assert f'"{who}" with role' in answer.body["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer nobody-token"},
        {"Authorization": "Basic YTpi"},
        {"Authorization": "admin-token"},
        {"Authorization": "Bearer admin-token2"},
        {"Authorization": "Bearer \udcff"},
    ],
)
async def test_without_a_known_token_nothing_is_answered_but_the_probes(
    api: Served, headers: dict[str, str], tmp_path: Path
) -> None:
    for path in (path_of(), "/apis", "/api", "/openapi/v3", "/api/status/health", "/metrics", "/nothing"):
        refused = await api.get(path, headers=headers)
        assert (refused.status, refused.body["reason"]) == (401, "Unauthorized")
        assert refused.headers["WWW-Authenticate"].startswith("Bearer")
    assert (await api.post(path_of(), telescope(), headers=headers)).status == 401
    for path in ("/livez", "/readyz", "/version"):
        assert (await api.get(path, headers=headers)).status == 200
    assert {record["code"] for record in audit(tmp_path)} == {401}
    assert (await api.storage.list("/")).entries == ()


async def test_the_case_of_the_scheme_does_not_matter(api: Served) -> None:
    assert (await api.get("/apis", headers={"Authorization": "bearer admin-token"})).status == 200


async def test_namespaces_are_listed_for_those_who_may_read_them(api: Served) -> None:
    for namespace in ("lab", "other"):
        await api.post(path_of(namespace=namespace), telescope(), headers=bearer("admin"))
    await api.get(path_of(namespace=""), headers=bearer("admin"))

    async def seen(who: str) -> list[str]:
        answer = await api.get("/api/v1/namespaces", headers=bearer(who))
        return [item["metadata"]["name"] for item in answer.body["items"]]

    assert await seen("viewer") == ["default", "lab", "other"]
    assert await seen("student") == ["lab"]


async def test_the_tokens_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    clock = JumpingClock()
    async with served(MemoryStorage(), tokens_file=tokens_file(tmp_path, *ENTRIES), clock=clock) as api:

        async def status(who: str) -> int:
            return (await api.get(path_of(), headers=bearer(who))).status

        assert await status("newcomer") == 401
        tokens_file(tmp_path, *ENTRIES[1:], entry("newcomer", "viewer"))
        clock.jump(2)
        assert await status("newcomer") == 200
        assert await status("viewer") == 401


@pytest.mark.parametrize(
    "text",
    [
        b"[{name: x}]",
        b"{",
        b"\xff",
        b"[{name: x, sha256: zz, role: viewer}]",
        b"[{name: x, sha256: '" + b"a" * 64 + b"', role: king}]",
        b"[{name: x, sha256: '" + b"a" * 64 + b"', role: viewer, admin: true}]",
        b"- &e {name: x, sha256: '" + b"a" * 64 + b"', role: viewer}\n- *e",
        b"{tokens: []}",
    ],
)
async def test_a_broken_tokens_file_keeps_a_daemon_from_starting_and_changes_nothing_later(
    text: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_bytes(text)
    with pytest.raises(ApiError, match=r"tokens\.yaml"):
        async with served(MemoryStorage(), tokens_file=path):
            pytest.fail("it is served")
    tokens_file(tmp_path, *ENTRIES)
    clock = JumpingClock()
    async with served(MemoryStorage(), tokens_file=path, clock=clock) as api:
        assert (await api.get(path_of(), headers=bearer("viewer"))).status == 200
        path.write_bytes(text)
        clock.jump(2)  # longer than between two looks at the file
        assert (await api.get(path_of(), headers=bearer("viewer"))).status == 200
        assert (await api.get(path_of(), headers=bearer("nobody"))).status == 401
        path.unlink()
        clock.jump(2)
        assert (await api.get(path_of(), headers=bearer("viewer"))).status == 200


async def test_an_empty_tokens_file_lets_nobody_in(tmp_path: Path) -> None:
    async with served(MemoryStorage(), tokens_file=tokens_file(tmp_path)) as api:
        assert (await api.get(path_of())).status == 401


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Host": "localhost"}, 200),
        ({"Host": "localhost:1234"}, 200),
        ({"Host": "127.0.0.1:80"}, 200),
        ({"Host": "127.9.9.9"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "evil.example.com"}, 403),
        ({"Host": "127.0.0.1.evil.example.com"}, 403),
        ({"Host": "localhost.evil.example.com"}, 403),
        ({"Host": "10.0.0.1"}, 403),
        ({"Host": "0.0.0.0"}, 403),
        ({"Host": "evil@localhost:80"}, 200),
        ({"Host": "localhost@evil.example.com"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "localhost:80", "Origin": "http://localhost:80"}, 200),
        ({"Host": "localhost:80", "Origin": "http://localhost:81"}, 403),
        ({"Host": "localhost:80", "Origin": "https://localhost:80"}, 403),
        ({"Origin": "http://evil.example.com"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
    ],
)
async def test_without_tokens_only_this_machine_and_its_own_pages_are_served(
    headers: dict[str, str], code: int
) -> None:
    async with served(MemoryStorage()) as api:
        assert (await api.get(path_of(), headers=headers)).status == code
        assert (await api.post(path_of(), telescope(), headers=headers)).status == (201 if code == 200 else 403)
        assert len((await api.storage.list("/")).entries) == (code == 200)


def test_what_loopback_is() -> None:
    assert all(map(is_loopback, ["localhost", "LOCALHOST.", "127.0.0.1", "127.1.2.3", "::1", "[::1]"]))
    assert not any(map(is_loopback, ["", "0.0.0.0", "::", "example.com", "localhost.example.com", "128.0.0.1"]))


async def test_other_than_loopback_is_not_served_without_tokens() -> None:
    for host in ("0.0.0.0", "::"):
        with pytest.raises(ApiError, match="needs a tokens file"):
            async with served(MemoryStorage(), host=host):
                pytest.fail("it is served")


async def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    async with served(MemoryStorage()) as api:
        port = int(api.url.rpartition(":")[2])
        taken = Api(**{**vars(api.api), "settings": api.api.settings.model_copy(update={"port": port})})
        with pytest.raises(ApiError, match=rf"^cannot serve on 127.0.0.1 port {port}: .*in use$"):
            async with serve(taken):
                pytest.fail("it is served twice")


async def test_every_write_and_every_refusal_is_recorded_before_the_answer(api: Served, tmp_path: Path) -> None:
    made = await api.post(path_of(namespace="lab"), telescope(), headers=bearer("teacher"))
    version = made.body["metadata"]["resourceVersion"]
    record = audit(tmp_path)[-1]
    assert record["request"] == made.headers["X-Request-Id"]
    assert (record["who"], record["role"], record["method"], record["code"]) == ("teacher", "manager", "POST", 201)
    assert record["objects"] == [
        {"plural": "telescopes", "namespace": "lab", "name": "hubble", "result": "created", "after": version}
    ]
    one = path_of("hubble", namespace="lab")
    patched = await api.merge(one, {"spec": {"tracking": True}}, headers=bearer("teacher"))
    [changed] = audit(tmp_path)[-1]["objects"]
    assert (changed["before"], changed["after"]) == (version, patched.body["metadata"]["resourceVersion"])
    await api.call("DELETE", one, headers=bearer("viewer"))
    refused = audit(tmp_path)[-1]
    assert (refused["who"], refused["method"], refused["code"]) == ("viewer", "DELETE", 403)
    assert refused["objects"][0]["name"] == "hubble"
    forced = {"fieldManager": "telescopes", "force": "true"}
    await api.merge(
        path_of("hubble", namespace="lab", sub="status"),
        {"status": {"cloudCover": 9}},
        params=forced,
        headers=bearer("admin"),
    )
    assert "forced status.cloudCover" in audit(tmp_path)[-1]["objects"][0]["note"]
    await api.call("DELETE", one, headers=bearer("teacher"))
    assert audit(tmp_path)[-1]["objects"][0]["result"] == "deleted"
    count = len(audit(tmp_path))
    assert (await api.get(one, headers=bearer("viewer"))).status == 404
    assert len(audit(tmp_path)) == count, "reads are not recorded"
    assert oct((tmp_path / "audit.log").stat().st_mode & 0o777) == "0o600"
    assert b"-token" not in (tmp_path / "audit.log").read_bytes()


async def test_a_record_that_cannot_be_written_stops_further_writes_until_it_can(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    async with served(MemoryStorage(), audit_file=folder / "audit.log") as api:
        first = await api.post(path_of(), telescope("a"))
        assert first.status == 201, "it was made, and that is told"
        assert any("could not be recorded" in warning for warning in first.warnings)
        second = await api.post(path_of(), telescope("b"))
        assert (second.status, second.body["reason"]) == (503, "ServiceUnavailable")
        assert "Retry-After" in second.headers
        assert (await api.get(path_of("b"))).status == 404
        folder.mkdir()
        assert (await api.post(path_of(), telescope("c"))).status == 201
        events = audit(folder)
        assert "resumed" in events[0]["event"]
        assert events[-1]["objects"][0]["name"] == "c"


async def test_the_record_can_be_rotated_by_renaming(tmp_path: Path) -> None:
    async with served(MemoryStorage(), audit_file=tmp_path / "audit.log") as api:
        await api.make("a")
        (tmp_path / "audit.log").rename(tmp_path / "audit.log.1")
        await api.make("b")
        assert [r["objects"][0]["name"] for r in audit(tmp_path)] == ["b"]


async def test_a_plug_ins_routes_are_guarded_recorded_and_answered_like_all_others(tmp_path: Path) -> None:
    def routes(app: web.Application, api: Api) -> None:
        async def act(request: web.Request) -> web.Response:
            namespace = request.match_info["namespace"]
            call_of(request).principal.require("write", namespace, "act")
            if namespace == "lab":
                raise RuntimeError("password=hunter2")
            return web.json_response({"root": api.registry.root})

        app.router.add_post("/api/acts/{namespace}", act)

    async with served(
        MemoryStorage(),
        tokens_file=tokens_file(tmp_path, *ENTRIES),
        audit_file=tmp_path / "audit.log",
        routes=[routes],
    ) as api:
        assert (await api.post("/api/acts/other", {})).status == 401
        assert (await api.post("/api/acts/other", {}, headers=bearer("teacher"))).status == 403
        assert (await api.post("/api/acts/other", {}, headers=bearer("manager"))).body == {"root": "/lrm"}
        failed = await api.post("/api/acts/lab", {}, headers=bearer("teacher"))
        assert (failed.status, failed.body["reason"]) == (500, "InternalError")
        assert b"hunter2" not in failed.raw
        assert failed.headers["X-Request-Id"] in failed.body["message"]
        assert [r["code"] for r in audit(tmp_path)] == [401, 403, 200, 500]


def trusting(made: certificates.Certificates) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=made.ca)


async def _serial(port: int) -> str:
    """The certificate that a new connection is shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    await writer.wait_closed()
    return hashlib.sha256(shown).hexdigest()


async def test_tls_is_served_and_a_renewed_certificate_is_taken_without_a_restart(tmp_path: Path) -> None:
    made, clock = certificates.make(tmp_path / "one"), JumpingClock()
    async with served(MemoryStorage(), clock=clock, tls_cert=made.server.cert, tls_key=made.server.key) as api:
        assert api.url.startswith("https://127.0.0.1:")
        port = int(api.url.rpartition(":")[2])
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusting(made))) as session:
            async with session.get(api.url + path_of()) as reply:
                assert reply.status == 200
            before = await _serial(port)
            renewed = certificates.make(tmp_path / "two")
            # The half of a pair is no pair: nothing changes until the key has followed.
            made.server.cert.write_bytes(renewed.server.cert.read_bytes())
            clock.jump(2)  # longer than between two looks at the files
            assert await _serial(port) == before
            renewed.server.key.replace(made.server.key)
            clock.jump(2)
            assert await _serial(port) != before
            async with session.get(api.url + path_of()) as reply:
                assert reply.status == 200, "the connection that was open goes on"


async def test_a_bad_certificate_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("nothing")
    for cert in (tmp_path / "cert.pem", tmp_path / "missing.pem"):
        with pytest.raises(ApiError, match=r"the API cannot be served: certificate \S+\.pem"):
            async with served(MemoryStorage(), tls_cert=cert, tls_key=cert):
                pytest.fail("it is served")


async def test_probes_say_what_the_daemon_says(tmp_path: Path) -> None:
    async with served(MemoryStorage()) as api:
        assert [(await api.get(p)).raw for p in ("/livez", "/readyz")] == [b"ok\n", b"ok\n"]
        assert (await api.get("/api/status/ready")).body == {"ready": True, "reason": ""}
        api.status.alive, api.status.is_ready, api.status.state = False, False, "degraded"
        for path in ("/livez", "/readyz", "/api/status/ready"):
            assert (await api.get(path)).status == 503
        assert ((await api.get("/api/status/health")).status, (await api.get("/livez")).raw) == (
            200,
            b"a worker has died\n",
        )
        api.status.state = "unhealthy"
        assert (await api.get("/api/status/health")).status == 503
        for path in ("/api/status/status", "/api/status/leader"):
            assert (await api.get(path)).body["identity"] == "test"


async def test_too_many_requests_at_once_are_told_to_come_again() -> None:
    async with served(MemoryStorage(), max_in_flight=2, body_seconds=20) as api:
        port = int(api.url.rpartition(":")[2])
        held = []
        for _ in range(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = (
                f"POST {path_of()} HTTP/1.1",
                "Host: localhost",
                "Content-Type: application/json",
                "Content-Length: 9",
            )
            writer.write("\r\n".join([*head, "", "{"]).encode())
            held.append((reader, writer))

        async def refused() -> bool:
            return (await api.get(path_of())).status == 429

        await until(refused, "the limit")
        assert (await api.get("/livez")).status == 200, "probes are always answered"
        for _, writer in held:
            writer.close()

        async def served_again() -> bool:
            return (await api.get(path_of())).status == 200

        await until(served_again, "room again")
