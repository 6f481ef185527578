"""Which servers the CML client talks to over TLS, and that a refused one receives no byte of a request."""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from controllers.cml.client import CmlClient, Credentials, TlsPolicy
from controllers.cml.errors import CmlBadAnswer, CmlFingerprintMismatch, CmlInvalid, CmlTlsError, CmlUnreachable
from controllers.cml.tls import normal_fingerprint
from equipment.certificates import Certificates, make
from equipment.scripted_cml import PASSWORD, USERNAME, ScriptedCml
from equipment.waiting import until

WRONG = "ab" * 32


@pytest.fixture
def one(tmp_path: Path) -> Certificates:
    return make(tmp_path / "one")


@pytest.fixture
def two(tmp_path: Path) -> Certificates:
    return make(tmp_path / "two")


def server_context(certificates: Certificates) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.server.cert, certificates.server.key)
    return context


def leaf_of(certificates: Certificates) -> str:
    leaf = x509.load_pem_x509_certificate(certificates.server.cert.read_bytes())
    return hashlib.sha256(leaf.public_bytes(Encoding.DER)).hexdigest()


def client_of(url: str, policy: TlsPolicy) -> CmlClient:
    return CmlClient(url, Credentials(USERNAME, PASSWORD), tls=policy, jitter=lambda: 0.0)


class Tap:
    """A TLS server that counts what clients say to it after the handshake."""

    def __init__(self) -> None:
        self.handshakes = 0
        self.decrypted = bytearray()
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.handshakes += 1
        try:
            while data := await reader.read(65536):
                self.decrypted += data
        except (OSError, ssl.SSLError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def tapped(context: ssl.SSLContext) -> AsyncIterator[Tap]:
    tap = Tap()
    server = await asyncio.start_server(tap.serve, "127.0.0.1", 0, ssl=context)
    tap.url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield tap


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("verify", [True, False])
async def test_a_server_with_another_leaf_receives_no_byte_of_a_request(
    one: Certificates, version: ssl.TLSVersion, verify: bool
) -> None:
    context = server_context(one)
    context.minimum_version = context.maximum_version = version
    async with tapped(context) as tap, client_of(tap.url, TlsPolicy(verify=verify, fingerprint=WRONG)) as client:
        for call in (client.lab_ids, client.system_information):
            with pytest.raises(CmlFingerprintMismatch) as caught:
                await call()
            assert (caught.value.expected, caught.value.observed) == (WRONG, leaf_of(one))
            assert not caught.value.retryable
        assert client.peer_fingerprint is None
    assert bytes(tap.decrypted) == b""


async def test_the_tap_itself_sees_what_a_client_with_the_right_leaf_sends(one: Certificates) -> None:
    policy = TlsPolicy(fingerprint=leaf_of(one))
    async with tapped(server_context(one)) as tap, client_of(tap.url, policy) as client:
        call = asyncio.create_task(client.lab_ids())
        await until(lambda: PASSWORD.encode() in tap.decrypted)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ("{}", "plain hex"),
        ("SHA256 Fingerprint={}", "openssl x509 -fingerprint"),
        ("sha256:{}", "as tools print it"),
    ],
)
async def test_the_right_fingerprint_replaces_the_chain(one: Certificates, form: str, why: str) -> None:
    leaf = leaf_of(one)
    colons = ":".join(leaf[i : i + 2] for i in range(0, 64, 2)).upper()
    async with ScriptedCml.run(tls=server_context(one)) as cml:
        for text in (leaf, colons):
            async with client_of(cml.url, TlsPolicy(fingerprint=form.format(text))) as client:
                await client.lab_ids()
                assert client.peer_fingerprint == leaf, why


async def test_a_chain_is_checked_against_the_given_authority(one: Certificates, two: Certificates) -> None:
    async with ScriptedCml.run(tls=server_context(one)) as cml:
        async with client_of(cml.url, TlsPolicy(ca_file=str(one.ca))) as client:
            await client.lab_ids()
            assert client.peer_fingerprint == leaf_of(one)
        for policy in (TlsPolicy(), TlsPolicy(ca_file=str(two.ca))):
            seen = len(cml.seen)
            async with client_of(cml.url, policy) as client:
                with pytest.raises(CmlTlsError, match="does not verify"):
                    await client.lab_ids()
                assert len(cml.seen) == seen


async def test_the_host_name_is_checked_with_the_chain(one: Certificates) -> None:
    async with ScriptedCml.run(tls=server_context(one), host="127.0.0.2") as cml:
        async with client_of(cml.url, TlsPolicy(ca_file=str(one.ca))) as client:
            with pytest.raises(CmlTlsError, match="does not verify"):
                await client.lab_ids()
        assert cml.seen == []


async def test_a_recorded_leaf_pins_where_nothing_verifies_unless_a_new_one_is_trusted(
    one: Certificates, two: Certificates
) -> None:
    async with ScriptedCml.run(tls=server_context(two)) as cml:
        async with client_of(cml.url, TlsPolicy(verify=False, known=leaf_of(one))) as client:
            with pytest.raises(CmlFingerprintMismatch):
                await client.lab_ids()
            assert cml.seen == []
        async with client_of(cml.url, TlsPolicy(verify=False, known=leaf_of(one), trust_new=True)) as client:
            await client.lab_ids()
        async with client_of(cml.url, TlsPolicy(ca_file=str(two.ca), known=leaf_of(one))) as client:
            await client.lab_ids()
            assert client.peer_fingerprint == leaf_of(two)


async def test_the_leaf_of_the_first_login_stays_pinned_for_the_life_of_the_client(
    one: Certificates, two: Certificates
) -> None:
    async with ScriptedCml.run(tls=server_context(one)) as cml:
        url = cml.url
        client = client_of(url, TlsPolicy(verify=False))
        await client.lab_ids()
    port = int(url.rsplit(":", 1)[1])
    async with ScriptedCml.run(tls=server_context(two), port=port) as cml:
        with pytest.raises(CmlFingerprintMismatch):
            await client.lab_ids()
        assert cml.seen == []
        await client.aclose()


async def test_a_booting_cml_may_change_its_certificate_before_credentials_are_sent(
    one: Certificates, two: Certificates
) -> None:
    async with ScriptedCml.run(tls=server_context(one)) as cml:
        url = cml.url
        client = client_of(url, TlsPolicy(verify=False))
        await client.system_information()
        assert client.peer_fingerprint == leaf_of(one)
    port = int(url.rsplit(":", 1)[1])
    async with ScriptedCml.run(tls=server_context(two), port=port) as cml:
        await client.system_information()
        await client.lab_ids()
        assert client.peer_fingerprint == leaf_of(two)
        await client.aclose()


async def test_the_login_never_uses_a_connection_from_before_the_pin(one: Certificates) -> None:
    async with ScriptedCml.run(tls=server_context(one)) as cml, client_of(cml.url, TlsPolicy(verify=False)) as client:
        await client.system_information()
        await client.lab_ids()
        await client.lab_ids()
        assert [s.headers.get("Connection") for s in cml.seen] == ["close", "keep-alive", "keep-alive", "keep-alive"]
        assert len(cml.connections) == 2


async def test_https_to_a_server_that_speaks_plain_http_is_a_tls_error() -> None:
    async with (
        ScriptedCml.run() as cml,
        client_of(cml.url.replace("http:", "https:"), TlsPolicy(verify=False)) as client,
    ):
        with pytest.raises(CmlTlsError):
            await client.lab_ids()


async def test_a_server_that_leaves_in_the_middle_of_the_handshake_is_unreachable() -> None:
    server = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0)
    async with server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with client_of(url, TlsPolicy(verify=False)) as client:
            with pytest.raises(CmlUnreachable):
                await client.stop_lab("90f84e38-a71c-4d57-8d90-00fa8a197385")


@pytest.mark.parametrize("content", [None, "no certificate"], ids=["missing", "garbage"])
async def test_a_ca_file_that_cannot_be_used_is_an_error_and_not_a_fallback(
    tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "ca.crt"
    if content is not None:
        path.write_text(content)
    async with client_of("https://127.0.0.1:1", TlsPolicy(ca_file=str(path))) as client:
        with pytest.raises(CmlTlsError, match="CA file"):
            await client.lab_ids()


async def test_clients_share_what_they_trust_and_not_what_they_have_pinned(one: Certificates) -> None:
    """A set of roots takes most of a megabyte: a thousand workers' clients must not have one each."""
    pinned, wrong = TlsPolicy(fingerprint=leaf_of(one)), TlsPolicy(fingerprint=WRONG)
    chained = TlsPolicy(ca_file=str(one.ca))
    async with ScriptedCml.run(tls=server_context(one)) as cml, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client_of(cml.url, p)) for p in (pinned, wrong, chained) * 2]
        plain = await stack.enter_async_context(client_of(cml.url.replace("https:", "http:"), TlsPolicy()))
        told = await asyncio.gather(*(c.lab_ids() for c in clients), return_exceptions=True)
        assert [isinstance(t, CmlFingerprintMismatch) for t in told] == [False, True, False] * 2
        channels = [c.listen(lambda: None, lambda: None) for c in clients]
        ends = await asyncio.gather(*channels, return_exceptions=True)
        assert [type(e) for e in ends] == [CmlBadAnswer, CmlFingerprintMismatch, CmlBadAnswer] * 2
        assert [c.peer_fingerprint for c in clients] == [leaf_of(one), None, leaf_of(one)] * 2
        contexts = [await client._transport.tls() for client in (*clients, plain)]
        assert len(set(contexts)) == 2
        system = [await client_of(cml.url, TlsPolicy())._transport.tls() for _ in range(2)]
        assert system[0] is system[1]


async def test_no_connection_is_made_without_a_guard(one: Certificates) -> None:
    async with client_of("https://127.0.0.1:1", TlsPolicy(ca_file=str(one.ca))) as client:
        context = await client._transport.tls()
        with pytest.raises(LookupError):
            context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="localhost")


async def test_a_ca_file_that_has_changed_is_read_for_those_who_come_later(
    one: Certificates, two: Certificates
) -> None:
    policy = TlsPolicy(ca_file=str(one.ca))
    async with (
        ScriptedCml.run(tls=server_context(two)) as cml,
        client_of(cml.url, policy) as before,
        client_of(cml.url, policy) as after,
    ):
        with pytest.raises(CmlTlsError, match="does not verify"):
            await before.lab_ids()
        one.ca.write_bytes(two.ca.read_bytes())
        await after.lab_ids()


async def test_a_ca_file_that_would_be_read_for_ever_is_not_begun(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    async with client_of("https://127.0.0.1:1", TlsPolicy(ca_file=str(tmp_path / "pipe"))) as client:
        with pytest.raises(CmlTlsError, match="CA file"):
            await client.lab_ids()


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(CmlInvalid):
        TlsPolicy(verify=False, ca_file="x")


@pytest.mark.parametrize("text", ["", "ab", "g" * 64, "ab" * 31, "ab" * 33, "md5:" + "ab" * 32])
def test_what_is_not_a_sha256_fingerprint_is_refused(text: str) -> None:
    with pytest.raises(CmlInvalid):
        normal_fingerprint(text)
