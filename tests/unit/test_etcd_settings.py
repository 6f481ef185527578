"""Impossible settings of the etcd backend are refused in one sentence, and construction touches nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.errors import Unavailable
from storage.etcd import EtcdStorage, TlsConfig
from storage.etcd_gateway import check_endpoint
from storage.etcd_health import version_note


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("http://a", "http://a:2379"),
        ("https://a.b:1/", "https://a.b:1"),
        ("http://[::1]:2379", "http://[::1]:2379"),
    ],
)
def test_an_endpoint_has_one_form(given: str, plain: str) -> None:
    assert check_endpoint(given) == plain


@pytest.mark.parametrize("given", ["", "a:2379", "ftp://a", "http://", "http://a/v3", "http://a:x", "http://u:pw@a"])
def test_anything_else_is_refused_without_showing_a_password(given: str) -> None:
    with pytest.raises(ValueError, match=r"endpoint|[Pp]ort") as caught:
        check_endpoint(given)
    assert "pw" not in str(caught.value)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one endpoint"):
        EtcdStorage([])
    with pytest.raises(ValueError, match="request_timeout"):
        EtcdStorage(["http://a"], request_timeout=0)
    with pytest.raises(ValueError, match="liveness"):
        EtcdStorage(["http://a"], liveness_silence=0)


async def test_a_missing_certificate_is_told_at_the_first_call(tmp_path: Path) -> None:
    storage = EtcdStorage(["https://127.0.0.1:1"], tls=TlsConfig(ca=tmp_path / "ca.pem", cert=None, key=None))
    with pytest.raises(Unavailable, match="TLS file"):
        await storage.get("/a")
    await storage.aclose()


@pytest.mark.parametrize(
    ("version", "named"),
    [
        ("3.3.27", True),
        ("3.4.23", True),
        ("3.4.42", False),
        ("3.5.1", True),
        ("3.5.27", True),
        ("3.5.28", False),
        ("3.6.0", False),
        ("4.0.0", False),
        ("", False),
    ],
)
def test_versions_with_known_bugs_are_named(version: str, *, named: bool) -> None:
    assert bool(version_note(version)) == named
