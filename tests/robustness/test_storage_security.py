"""TLS and etcd's own users: what is refused is said to be refused, and tokens that end are replaced unnoticed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from equipment import certificates
from equipment.certificates import Certificates
from equipment.etcd import VERSIONS, WHEEL, Gateway, b64, binary
from equipment.fault_proxy import FaultProxy
from equipment.listener import listening
from equipment.waiting import until
from lrm.devservers import EtcdServer
from storage.errors import PermissionDenied, Unavailable
from storage.etcd import EtcdStorage, TlsConfig

PREFIX, USER, PASSWORD = "/t/r/", "lrm", "a secret of this test"


@asynccontextmanager
async def _guarded(folder: Path, version: str) -> AsyncIterator[tuple[EtcdServer, Gateway]]:
    """An etcd with users, whose tokens end after a second or two without use."""
    args = ("--auth-token=simple", "--auth-token-ttl=1", "--log-level=debug")
    async with EtcdServer(folder / "etcd", binary=binary(version), args=args) as etcd:
        direct = Gateway(etcd.endpoint)
        await direct.enable_auth(USER, PASSWORD)
        yield etcd, direct


def _storage(endpoint: str, **options: Any) -> EtcdStorage:
    return EtcdStorage([endpoint], root="/t", **{"user": USER, "password": PASSWORD, **options})


async def _token(direct: Gateway) -> str:
    token: str = (await direct.call("auth/authenticate", {"name": USER, "password": PASSWORD}))["token"]
    return token


async def _tokens_end(etcd: EtcdServer) -> None:
    """Wait until etcd says that it has dropped a token that was not used."""
    said = len(etcd.log_path.read_bytes())
    await until(
        lambda: b"deleted a simple token" in etcd.log_path.read_bytes()[said:], "etcd drops the tokens", timeout=15
    )


@pytest.mark.parametrize(
    "version", [pytest.param(version, marks=pytest.mark.soak if version == WHEEL else ()) for version in VERSIONS]
)
async def test_a_token_that_ends_under_a_live_watch_is_replaced(server_dir: Path, version: str) -> None:
    """The stream is reset after the token has ended: it resumes with another one, and misses nothing."""
    async with (
        _guarded(server_dir, version) as (etcd, direct),
        FaultProxy(etcd.endpoint) as proxy,
        aclosing(_storage(proxy.endpoint)) as storage,
    ):
        entry = await storage.create(f"{PREFIX}a", b"1")
        async with listening(storage, PREFIX, entry.revision - 1) as listener:
            await listener.reach(entry.revision)
            await _tokens_end(etcd)
            assert proxy.abort("/v3/watch") == 1
            put = {"key": b64(f"{PREFIX}a"), "value": b64("2")}
            reply = await direct.call("kv/put", put, token=await _token(direct))
            await listener.reach(int(reply["header"]["revision"]))
            assert [changes for _, changes in listener.deliveries] == [
                ((f"{PREFIX}a", b"1"),),
                ((f"{PREFIX}a", b"2"),),
            ]
            await _tokens_end(etcd)
            updated = await storage.update(entry.key, b"3", expected_revision=listener.revision)
            await listener.reach(updated.revision)
            assert await listener.watch.barrier() > updated.revision
        assert proxy.counts["/v3/auth/authenticate"] <= 4, "a token is fetched when one was refused, and once"


async def test_a_change_of_users_makes_tokens_stale_and_is_not_noticed(server_dir: Path) -> None:
    async with _guarded(server_dir, WHEEL) as (etcd, direct), aclosing(_storage(etcd.endpoint)) as storage:
        entry = await storage.create(f"{PREFIX}a", b"1")
        async with listening(storage, PREFIX, entry.revision) as listener:
            await direct.call("auth/user/add", {"name": "new", "password": "x"}, token=await _token(direct))
            assert (await storage.get(entry.key)).value == b"1"
            updated = await storage.update(entry.key, b"2", expected_revision=entry.revision)
            await listener.reach(updated.revision)


async def test_authentication_switched_on_under_a_running_client_with_a_user_is_not_noticed(server_dir: Path) -> None:
    async with EtcdServer(server_dir / "etcd") as etcd, aclosing(_storage(etcd.endpoint)) as storage:
        entry = await storage.create(f"{PREFIX}a", b"1")
        async with listening(storage, PREFIX, entry.revision) as listener:
            await Gateway(etcd.endpoint).enable_auth(USER, PASSWORD)
            updated = await storage.update(entry.key, b"2", expected_revision=entry.revision)
            await listener.reach(updated.revision)


@pytest.mark.parametrize("version", VERSIONS)
async def test_bad_credentials_are_denied_and_not_shown(server_dir: Path, version: str) -> None:
    """A wrong password, an unknown user, no user where one is asked for: denied, at once, and nothing is written."""
    async with _guarded(server_dir, version) as (etcd, direct):
        for credentials in ({"password": "wrong"}, {"user": "nobody"}, {"user": "", "password": ""}):
            async with aclosing(_storage(etcd.endpoint, **credentials)) as storage:
                for call in (
                    storage.get("/t/r/a"),
                    storage.create("/t/r/a", b"1"),
                    storage.list("/t/r/"),
                    storage.set("/t/r/a", b"1"),
                ):
                    with pytest.raises(PermissionDenied) as denied:
                        await call
                    assert "wrong" not in str(denied.value)
                    assert PASSWORD not in str(denied.value)
                with pytest.raises(PermissionDenied):
                    async with listening(storage, PREFIX, 1):
                        pass
                assert not (await storage.health()).ok
        found = await direct.call("kv/range", {"key": b64("/t/r/a")}, token=await _token(direct))
        assert "kvs" not in found


async def test_a_user_who_may_only_read_is_denied_a_write(server_dir: Path) -> None:
    async with _guarded(server_dir, "current") as (etcd, direct):
        permission = {"permType": "READ", "key": b64("/t/"), "range_end": b64("/t0")}
        for path, body in (
            ("auth/role/add", {"name": "reader"}),
            ("auth/role/grant", {"name": "reader", "perm": permission}),
            ("auth/user/add", {"name": "eve", "password": "x"}),
            ("auth/user/grant", {"user": "eve", "role": "reader"}),
        ):
            await direct.call(path, body, token=await _token(direct))
        await direct.call("kv/put", {"key": b64("/t/r/a"), "value": b64("1")}, token=await _token(direct))
        async with aclosing(_storage(etcd.endpoint, user="eve", password="x")) as storage:
            entry = await storage.get("/t/r/a")
            with pytest.raises(PermissionDenied):
                await storage.update("/t/r/a", b"2", expected_revision=entry.revision)
            with pytest.raises(PermissionDenied):
                await storage.delete("/t/r/a", expected_revision=entry.revision)
            with pytest.raises(PermissionDenied):
                await storage.get("/elsewhere")
            assert (await storage.get("/t/r/a")) == entry


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates.make(tmp_path_factory.mktemp("certificates"))


@pytest.mark.parametrize("version", VERSIONS)
async def test_mutual_tls_carries_everything(server_dir: Path, papers: Certificates, version: str) -> None:
    tls = TlsConfig(ca=papers.ca, cert=papers.client.cert, key=papers.client.key)
    async with (
        EtcdServer(server_dir / "etcd", binary=binary(version), args=papers.etcd_args(), scheme="https") as etcd,
        aclosing(EtcdStorage([etcd.endpoint], root="/t", tls=tls)) as storage,
    ):
        entry = await storage.create(f"{PREFIX}a", b"1")
        async with listening(storage, PREFIX, entry.revision - 1) as listener:
            updated = await storage.update(entry.key, b"2", expected_revision=entry.revision)
            deleted = await storage.delete(entry.key, expected_revision=updated.revision)
            await listener.reach(deleted)
            assert await listener.watch.barrier() > deleted
        assert [revision for revision, _ in listener.deliveries] == [entry.revision, updated.revision, deleted]
        assert (await storage.health()).ok


async def test_tls_that_does_not_verify_is_unavailable_and_says_why(
    server_dir: Path, papers: Certificates, tmp_path: Path
) -> None:
    """Another authority, no certificate of ours, plain http at a TLS port: never an answer, never a hang."""
    other = certificates.make(tmp_path / "other")
    args = papers.etcd_args()
    async with EtcdServer(server_dir / "etcd", args=args, scheme="https") as etcd:
        plain = etcd.endpoint.replace("https:", "http:")
        client = papers.client
        for endpoint, tls, why in (
            (etcd.endpoint, TlsConfig(other.ca, client.cert, client.key), "certificate verify failed"),
            (etcd.endpoint, TlsConfig(papers.ca), "certificate"),
            (etcd.endpoint, TlsConfig(papers.ca, other.client.cert, other.client.key), ""),
            (etcd.endpoint, None, "certificate verify failed"),
            (plain, None, ""),
        ):
            async with aclosing(EtcdStorage([endpoint], root="/t", tls=tls, request_timeout=1.0)) as storage:
                with pytest.raises(Unavailable) as refused:
                    await storage.get("/t/r/a")
                assert why in str(refused.value).lower(), refused.value
                with pytest.raises(Unavailable):
                    async with listening(storage, PREFIX, 0):
                        pass


async def test_a_tls_file_that_is_missing_is_named(papers: Certificates, tmp_path: Path) -> None:
    async with aclosing(EtcdStorage(["https://127.0.0.1:1"], tls=TlsConfig(ca=tmp_path / "no-such-file"))) as storage:
        with pytest.raises(Unavailable, match="TLS file"):
            await storage.get("/t/r/a")
